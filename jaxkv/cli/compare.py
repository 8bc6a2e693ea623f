"""`jaxkv generate --compare`: the same text with a cache and without."""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxkv.cache.cache import Cache
from jaxkv.cli.devices import place_of
from jaxkv.cli.run import describe_size
from jaxkv.cli.source import told
from jaxkv.cli.terminal import counted, note, printable, write
from jaxkv.generate import generate
from jaxkv.models import Model

_HOW = """\
Greedy decoding of whole texts after a prompt of {}, in one compiled loop each way. Without a
cache the model reads all of the text again for every token, padded to the final length so that one program
serves all steps. Both programs ran once before the clock started; the times are the best of up to five.

"""


def compare(args: argparse.Namespace, model: Model, prompt: list[int], max_new_tokens: int, capacity: int) -> int:
    """Returns 0 if the tokens are the same at every length, or a storage was asked for, which may round; else 1."""
    graphdef, state = nnx.split(model.module)

    @jax.jit
    def recompute(state: Any, tokens: Any, begin: Any) -> Any:
        def step(i: Any, tokens: Any) -> Any:
            logits = nnx.merge(graphdef, state)(tokens)  # [1, S, V]; position i - 1 sees nothing after itself
            return tokens.at[0, i].set(jnp.argmax(logits[0, i - 1]).astype(tokens.dtype))

        return jax.lax.fori_loop(begin, tokens.shape[1], step, tokens)

    def without_cache(num_tokens: int) -> list[int]:
        tokens = jnp.array([prompt + [0] * num_tokens], jnp.int32)
        return recompute(state, tokens, len(prompt))[0, len(prompt) :].tolist()

    def with_cache(num_tokens: int) -> list[int]:
        cache = Cache.init(model.specs, 1, capacity, sharding=place_of(model))
        result = generate(model.forward, model.params, [prompt], cache, max_new_tokens=num_tokens)
        return result.tokens[0, : result.lengths[0]].tolist()

    write(_HOW.format(counted(len(prompt), "token")))
    write(f"{'new tokens':>10}{'with a cache':>16}{'without':>16}{'ratio':>10}   same tokens\n")
    all_same = True
    for num_tokens in sorted({max(1, max_new_tokens // part) for part in (8, 4, 2, 1)}):
        with told():
            kept, seconds = _best_time(functools.partial(with_cache, num_tokens))
            computed, seconds_without = _best_time(functools.partial(without_cache, num_tokens))
        differs = next((i for i, (a, b) in enumerate(zip(kept, computed, strict=True)) if a != b), None)
        all_same = all_same and differs is None
        rounds = (
            "rounding decided between two equal tokens"
            if args.storage is None
            else f"the storage {args.storage} rounds"
        )
        same = "yes" if differs is None else f"up to {differs:,}: {rounds}"
        ratio = seconds_without / seconds
        write(
            f"{num_tokens:>10,}{seconds * 1e3:>13,.1f} ms{seconds_without * 1e3:>13,.1f} ms{ratio:>9,.1f}x   {same}\n"
        )
    write(f"\n{printable(model.tokenizer.decode(prompt + kept))}\n")
    if not args.quiet:
        note(describe_size(model.specs, 1, capacity))
    return 0 if all_same or args.storage else 1


def _best_time(decode: Callable[[], list[int]]) -> tuple[list[int], float]:
    tokens = decode()  # compiles
    times: list[float] = []
    while len(times) < 5 and sum(times) < 2:
        begin = time.perf_counter()
        decode()
        times.append(time.perf_counter() - begin)
    return tokens, min(times)
