"""What `jaxkv.generate` adds to a model's own time per token, at the 125 M shape of model.py.

The bare loop is a jitted `lax.while_loop` of the model's step and an argmax, with nothing else: no stop tokens, no
limits per row, no log of probabilities. Both begin with the same cache and write the same tokens, and take turns in one
process. The time per token is the difference of a long and a short run: what a call costs once is given apart.

    python benchmarks/overhead.py                              # a table
    python benchmarks/overhead.py --out docs/data/overhead.json
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import about, in_turn, say, warn_if_busy
from model import TINY, Shape, write_checkpoint

import jaxkv

SHORT = 4  # tokens of the short run


def bare(forward: Any) -> Callable[..., Any]:
    """Returns the loop: (params, token int32 [B, 1], cache, count int32) -> (tokens int32 [B, most], cache)."""

    def loop(params: Any, token: Any, cache: Any, count: Any, most: int) -> Any:
        def more(carry: Any) -> Any:
            return carry[0] < count

        def step(carry: Any) -> Any:
            i, token, tokens, cache = carry
            logits, cache = forward(params, token, cache.lengths[:, None], cache)
            token = jnp.argmax(logits[:, -1:], -1).astype(jnp.int32)
            return i + 1, token, jax.lax.dynamic_update_slice_in_dim(tokens, token, i, 1), cache

        tokens = jnp.full((token.shape[0], most), -1, jnp.int32)
        _, _, tokens, cache = jax.lax.while_loop(more, step, (jnp.int32(0), token, tokens, cache))
        return tokens, cache

    return jax.jit(loop, static_argnums=4, donate_argnums=2)


class Bench:
    """One model and one cache, which the contestants use in turn."""

    def __init__(self, shape: Shape, folder: str, rows: int, most: int):
        model = jaxkv.models.load(folder, dtype="float32", fuse=True)
        self.forward, self.params, self.rows, self.most = model.forward, model.params, rows, most
        self.cache = jaxkv.Cache.init(model.specs, rows, shape.capacity, max_block=shape.max_block)
        self.rewind = jax.jit(lambda cache, n: cache.rewind(jnp.full(rows, n)), donate_argnums=0)
        self.loop = bare(model.forward)

    def hold(self, history: np.ndarray) -> None:
        """Has the cache hold all but the last token of a text."""
        self.cache = jaxkv.generate(
            self.forward, self.params, [history] * self.rows, self.cache, max_new_tokens=1
        ).cache
        self.back(history)

    def back(self, history: np.ndarray) -> None:
        self.cache = jax.block_until_ready(self.rewind(self.cache, jnp.int32(len(history) - 1)))

    def run(self, name: str, history: np.ndarray, count: int) -> tuple[float, np.ndarray]:
        """Returns the seconds that `count` tokens took, and the tokens."""
        start = time.perf_counter()
        if name == "generate":
            args = self.forward, self.params, [history] * self.rows, self.cache
            result = jaxkv.generate(*args, max_new_tokens=count)
            tokens, self.cache = np.asarray(result.tokens), result.cache
        else:
            last = jnp.full((self.rows, 1), history[-1], jnp.int32)
            out, self.cache = self.loop(self.params, last, self.cache, jnp.int32(count), self.most)
            tokens = np.asarray(out)[:, :count]
        seconds = time.perf_counter() - start
        self.back(history)
        return seconds, tokens


def measure(shape: Shape, folder: str, rounds: int, tokens: int, rows: int) -> dict[str, Any]:
    bench = Bench(shape, folder, rows, tokens)
    text = np.random.default_rng(1).integers(0, shape.vocab_size, shape.capacity)
    names, found = ["bare", "generate"], {}
    for context in shape.contexts:
        history = text[: context + 1]
        bench.hold(history)
        written = {name: bench.run(name, history, tokens)[1] for name in names}  # compiles, touches memory
        for name in names:
            bench.run(name, history, SHORT)
        if not np.array_equal(*written.values()):
            raise SystemExit(f"the loops write different tokens: {written}")
        times: dict[str, list[float]] = {name: [] for name in names}
        calls: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(rounds):
            say(f"{context} tokens: round {turn + 1} of {rounds}")
            for name in in_turn(names, turn):
                long, short = (bench.run(name, history, count)[0] for count in (tokens, SHORT))
                each = (long - short) / (tokens - SHORT)
                times[name].append(1e3 * each)
                calls[name].append(1e3 * (short - SHORT * each))
        found[str(context)] = {"ms_per_token": times, "ms_per_call": calls}
    say("")
    return {
        **about(("jax", "jaxlib", "flax")),
        "native": jaxkv.native.library.problem() is None,
        "settings": {"rounds": rounds, "tokens": tokens, "rows": rows},
        "contexts": found,
    }


def quartile(values: list[float]) -> float:
    return statistics.quantiles(values, n=4)[0] if len(values) > 1 else values[0]


def table(data: dict[str, Any]) -> str:
    lines = [
        "| tokens held | bare loop, ms a token | generate | overhead | once per call, ms |",
        "|---|---|---|---|---|",
    ]
    for context, both in data["contexts"].items():
        loop, generate = (quartile(both["ms_per_token"][name]) for name in ("bare", "generate"))
        ratios = [a / b for a, b in zip(both["ms_per_token"]["generate"], both["ms_per_token"]["bare"], strict=True)]
        once = statistics.median(both["ms_per_call"]["generate"]) - statistics.median(both["ms_per_call"]["bare"])
        over = 100 * (statistics.median(ratios) - 1)
        lines.append(f"| {int(context):,} | {loop:.2f} | {generate:.2f} | {over:+.1f} % | {once:.1f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=48, help="of a long run")
    parser.add_argument("--rows", type=int, default=1, help="texts at once")
    parser.add_argument("--tiny", action="store_true", help="a model of no use, to see that it runs")
    parser.add_argument("--out", type=pathlib.Path, help="where the data is written, as JSON")
    args = parser.parse_args(argv)
    shape = TINY if args.tiny else Shape(contexts=(32, 1024))
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(shape, folder)
        data = measure(shape, folder, args.rounds, args.tokens, args.rows)
    print(table(data))
    warn_if_busy(data)
    if args.out:
        args.out.write_text(json.dumps(data, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
