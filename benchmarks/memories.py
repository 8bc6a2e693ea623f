"""The memories of gated delta and Mamba-2 layers: one call of the native library, beside what XLA compiles.

One sequence of some tokens goes through the states of one layer: 8 heads of 128 x 128 by the delta rule, as Qwen3-Next
has them, and 24 heads of 128 x 64 without it, as Mamba-2 has them. Both forms are the same function, compiled with and
without the library. They take turns in one process, and must give the same.

    python benchmarks/memories.py                              # a table
    python benchmarks/memories.py --out docs/data/memories.json
    python benchmarks/memories.py --quick                      # few tokens: does it run?
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from common import about, interleave, medians, say, timed, warn_if_busy

from jaxkv.native import library
from jaxkv.nn.fading import fading_memory

FORMS = "XLA's", "the library's"
LAYERS = {"gated delta": (8, 128, 128, True), "Mamba-2": (24, 128, 64, False)}  # heads, keys, values, the delta rule


def operands(tokens: int, heads: int, keys: int, values: int, delta: bool) -> list[Any]:
    random = np.random.default_rng(0)
    q, k, v = (random.normal(size=(1, tokens, heads, size)) for size in (keys, keys, values))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    g, beta = -random.exponential(0.1, (1, tokens, heads)), random.uniform(size=(1, tokens, heads))
    state = random.normal(size=(1, heads, keys, values))
    made = [None if x is None else jnp.asarray(x, jnp.float32) for x in (q, k, v, g, beta if delta else None, state)]
    return [*made, jnp.full((1, 1), tokens, jnp.int32)]


def compiled(form: str, given: list[Any]) -> Any:
    if form == "the library's":
        return jax.jit(fading_memory).lower(*given).compile()
    with mock.patch.object(library, "problem", return_value="not asked for"):  # read while the program is lowered
        return jax.jit(lambda *given: fading_memory(*given)).lower(*given).compile()


def measure(layer: str, tokens: int, rounds: int, seconds: float) -> dict[str, list[float]]:
    say(f"{layer}, {tokens} tokens")
    given = operands(tokens, *LAYERS[layer])
    programs = {form: compiled(form, given) for form in FORMS}
    for one, other in zip(*(program(*given) for program in programs.values()), strict=True):
        if not np.allclose(one, other, atol=1e-3):
            raise SystemExit(f"{layer}, {tokens} tokens: the forms differ by {np.abs(one - other).max()}")

    def once(program: Any) -> Callable[[], Any]:
        return lambda: jax.block_until_ready(program(*given))

    return interleave({form: timed(once(x)) for form, x in programs.items()}, rounds=rounds, seconds=seconds)


def table(data: dict[str, Any]) -> str:
    lines = ["| layer | tokens | XLA's form, ms | the library's | ratio |", "|---|---|---|---|---|"]
    for layer, found in data["ms"].items():
        for tokens, times in found.items():
            theirs, ours = medians(times).values()
            lines.append(f"| {layer} | {int(tokens):,} | {theirs:.3f} | {ours:.3f} | {ours / theirs:.2f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="turns of each (default 9)")
    parser.add_argument("--seconds", type=float, default=0.2, help="about how long one turn lasts (default 0.2)")
    parser.add_argument("--quick", action="store_true", help="few tokens and two rounds: does it run?")
    parser.add_argument("--out", type=pathlib.Path, help="where the data is written, as JSON")
    args = parser.parse_args(argv)
    if reason := library.problem():
        raise SystemExit(f"there is no native library here: {reason}")
    rounds, seconds = (2, 0.001) if args.quick else (args.rounds, args.seconds)
    data = about(("jax", "jaxlib", "flax")) | {"settings": {"rounds": rounds, "seconds": seconds}}
    counts = (1, 8) if args.quick else (1, 16, 64, 512, 2048)
    data["ms"] = {layer: {str(n): measure(layer, n, rounds, seconds) for n in counts} for layer in LAYERS}
    say("")
    print(table(data))
    warn_if_busy(data)
    if args.out:
        args.out.write_text(json.dumps(data, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
