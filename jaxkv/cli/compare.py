"""`jaxkv generate --compare`: the same text with a cache and without."""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable

import jax.numpy as jnp

from jaxkv.cache.cache import Cache
from jaxkv.cli.run import Model, describe_size, load_model
from jaxkv.cli.terminal import note, text_of, write
from jaxkv.generate import generate

_HOW = """\
Greedy decoding of whole texts after a prompt of {}, in one compiled loop each way. Without a
cache the model reads all of the text again for every token, padded to the final length so that one program
serves all steps. Both programs ran once before the clock started; the times are the best of up to five.

"""


def compare(args: argparse.Namespace, prompt: list[int], capacity: int) -> int:
    """Returns 0 if the tokens are the same at every length, else 1."""
    model = load_model()
    write(_HOW.format("1 token" if len(prompt) == 1 else f"{len(prompt):,} tokens"))
    write(f"{'new tokens':>10}{'with a cache':>16}{'without':>16}{'ratio':>10}   same tokens\n")
    all_same = True
    for num_tokens in sorted({max(1, args.max_new_tokens // part) for part in (8, 4, 2, 1)}):
        kept, seconds = _best_time(functools.partial(_with_cache, model, prompt, num_tokens, capacity))
        computed, seconds_without = _best_time(functools.partial(_without_cache, model, prompt, num_tokens))
        differs = next((i for i, (a, b) in enumerate(zip(kept, computed, strict=True)) if a != b), None)
        all_same = all_same and differs is None
        same = "yes" if differs is None else f"up to {differs:,}: rounding chose between equals"
        ratio = seconds_without / seconds
        write(
            f"{num_tokens:>10,}{seconds * 1e3:>13,.1f} ms{seconds_without * 1e3:>13,.1f} ms{ratio:>9,.1f}x   {same}\n"
        )
    write(f"\n{text_of(prompt + kept)}\n")
    if not args.quiet:
        note(describe_size(model, 1, capacity))
    return 0 if all_same else 1


def _best_time(decode: Callable[[], list[int]]) -> tuple[list[int], float]:
    tokens = decode()  # compiles
    times: list[float] = []
    while len(times) < 5 and sum(times) < 2:
        begin = time.perf_counter()
        decode()
        times.append(time.perf_counter() - begin)
    return tokens, min(times)


def _with_cache(model: Model, prompt: list[int], num_tokens: int, capacity: int) -> list[int]:
    cache = Cache.init(model.specs, 1, capacity)
    result = generate(model.forward, model.params, [prompt], cache, max_new_tokens=num_tokens)
    return result.tokens[0, : result.lengths[0]].tolist()


def _without_cache(model: Model, prompt: list[int], num_tokens: int) -> list[int]:
    tokens = jnp.array([prompt + [0] * num_tokens], jnp.int32)
    return model.recompute(tokens, len(prompt))[0, len(prompt) :].tolist()
