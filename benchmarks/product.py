"""A decode step of several rows, with the native product of few tokens and with XLA's, at the 125 M shape of model.py.

Both are the same compiled loop: the model's step, the largest logit, and the cache carried on. They take turns in one
process, and in float32 must write the same tokens. Attention is the same in both.

    python benchmarks/product.py                             # a table
    python benchmarks/product.py --out docs/data/product.json
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import tempfile
import time
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from common import about, in_turn, say, warn_if_busy
from model import TINY, Shape, write_checkpoint

import jaxkv
from jaxkv.nn import product

MOST = {"XLA's": 0, "the library's": product.MOST_TOKENS}  # tokens that the library multiplies


class Loop:
    """One contestant: `run` writes some tokens more, of all rows."""

    def __init__(self, model: Any, most: int, rows: int, held: int, steps: int, capacity: int):
        def loop(params: Any, token: Any, cache: Any) -> Any:
            def step(carry: Any, _: Any) -> Any:
                token, cache = carry
                logits, cache = model.forward(params, token, cache.lengths[:, None], cache)
                token = jnp.argmax(logits[:, -1:], -1).astype(jnp.int32)
                return (token, cache), token[:, 0]

            return jax.lax.scan(step, (token, cache), None, steps)

        self.params, self.steps = model.params, steps
        prompts = np.random.default_rng(0).integers(0, 256, (rows, held))
        cache = jaxkv.Cache.init(model.specs, rows, capacity)
        cache = jaxkv.generate(model.forward, model.params, list(prompts), cache, max_new_tokens=1).cache
        self.carry = jnp.ones((rows, 1), jnp.int32), cache
        with mock.patch.object(product, "MOST_TOKENS", most):  # read while the loop is traced
            self.loop = jax.jit(loop, donate_argnums=2).lower(self.params, *self.carry).compile()

    def run(self) -> tuple[float, np.ndarray]:
        """Returns the milliseconds of a step, and the tokens [steps, rows]."""
        start = time.perf_counter()
        self.carry, tokens = jax.block_until_ready(self.loop(self.params, *self.carry))
        return 1e3 * (time.perf_counter() - start) / self.steps, np.asarray(tokens)


def measure(shape: Shape, folder: str, dtype: str, rows: list[int], rounds: int, steps: int) -> dict[str, Any]:
    model, found = jaxkv.models.load(folder, dtype=dtype, fuse=True), {}
    held = shape.contexts[0]
    for count in rows:
        say(f"{dtype}, {count} rows")
        capacity = held + 1 + (rounds + 1) * steps
        loops = {name: Loop(model, most, count, held, steps, capacity) for name, most in MOST.items()}
        tokens = [loop.run()[1] for loop in loops.values()]
        if dtype == "float32" and not np.array_equal(*tokens):  # logits of 16 bits are often equally large
            raise SystemExit(f"{count} rows: the products lead to different tokens")
        times: dict[str, list[float]] = {name: [] for name in MOST}
        for turn in range(rounds):
            for name in in_turn(list(MOST), turn):
                times[name].append(loops[name].run()[0])
        found[str(count)] = times
    say("")
    return found


def table(data: dict[str, Any]) -> str:
    lines = ["| dtype | rows | XLA's product, ms a step | the library's | ratio |", "|---|---|---|---|---|"]
    for dtype, found in data["ms_per_step"].items():
        for rows, times in found.items():
            theirs, ours = (statistics.quantiles(times[name], n=4)[0] for name in MOST)
            lines.append(f"| {dtype} | {rows} | {theirs:.1f} | {ours:.1f} | {ours / theirs:.2f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="of the weights and the cache")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8, help="of a round")
    parser.add_argument("--tiny", action="store_true", help="a model of no use, to see that it runs")
    parser.add_argument("--out", type=pathlib.Path, help="where the data is written, as JSON")
    args = parser.parse_args(argv)
    if reason := jaxkv.native.library.problem():
        raise SystemExit(f"there is no native product here: {reason}")
    shape = TINY if args.tiny else Shape(contexts=(32,))
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(shape, folder)
        times = {d: measure(shape, folder, d, args.rows, args.rounds, args.steps) for d in args.dtypes}
    data = {
        **about(("jax", "jaxlib", "flax")),
        "settings": {"rounds": args.rounds, "steps": args.steps, "held": shape.contexts[0]},
        "ms_per_step": times,
    }
    print(table(data))
    warn_if_busy(data)
    if args.out:
        args.out.write_text(json.dumps(data, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
