"""One decode step of one attention layer: write a token, attend to what is held. jaxkv beside what else there is.

    python benchmarks/decode.py                                 # a table
    python benchmarks/decode.py --out docs/data/decode.json     # the same, kept, with docs/figures/decode.png
    python benchmarks/decode.py --plot docs/data/decode.json    # only draws the figure again
    python benchmarks/decode.py --quick                         # tiny sizes: does it run?
    python benchmarks/decode.py --shape 12 4 64 --dtype bfloat16 --only jaxkv "jaxkv, XLA"

Float32, 32 query and 8 kv heads of 128. "jaxkv" is what `attend` takes by itself, on a CPU the kernel in C++; "jaxkv,
XLA" is its form as XLA compiles it. JAX's contestants run in a compiled loop that carries its cache, as generation
does; torch runs eagerly, as it is used. Flax's caches know no grouped heads: theirs have 8 query heads, a fourth of
the work, and projections of next to no size. "plain read" is the sum of the filled keys and values, the fastest of
20: no attention can be faster. Contestants take turns; medians and ratios are of one run.

A second table is beam search's reordering of rows: `Cache.take` in a donated loop, transformers' `reorder_cache`, and a
plain copy of what is held.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import ROOT, about, count_cores, interleave, medians, say

import jaxkv

READ = "plain read"


@dataclasses.dataclass(frozen=True)
class Setting:
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    batches: tuple[int, ...] = (1, 8)
    capacities: tuple[int, ...] = (4096, 16384)
    fills: tuple[int, ...] = (64, 256, 1024, 4096)
    dtype: str = "float32"  # in which jaxkv keeps keys and values


QUICK = Setting(4, 2, 16, (1, 2), (128, 256), (8, 128))


def random(seed: int, *shape: int) -> Any:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


# The contestants. Each holds `capacity` slots for `batch` sequences; `at(fill)` returns a function that runs so many
# steps, each of which writes token fill - 1 and attends to the first `fill` tokens, and returns the seconds they took.


class Jaxkv:
    """Cache.begin, put, attend."""

    form = "auto"

    def __init__(self, s: Setting, batch: int, capacity: int):
        storage = jaxkv.Dense(s.dtype)
        spec = jaxkv.LayerSpec(jaxkv.Full(), s.num_kv_heads, s.head_dim, None, storage, storage)
        cache = self.empty(spec, batch, capacity)
        block = min(cache.max_block, capacity)

        @functools.partial(jax.jit, donate_argnums=0)
        def fill(cache, start, k, v):
            positions = jnp.broadcast_to(start + jnp.arange(block, dtype=jnp.int32), (batch, block))
            cache, step = cache.begin(positions)
            return cache.with_layers([cache.layers[0].put(step, k, v)])

        for start in range(0, max(s.fills), block):
            k, v = (random(start + i, batch, block, s.num_kv_heads, s.head_dim) for i in range(2))
            cache = fill(cache, jnp.int32(start), k, v)
        # k and v stay; the bookkeeping is that of a cache that holds `fill` tokens.
        rewind = jax.jit(lambda cache, n: cache.rewind(jnp.full((batch,), n, jnp.int32)))
        shorter = {n: rewind(cache, jnp.int32(n)) for n in s.fills}
        self.books = {n: (c.groups, c.lengths) for n, c in shorter.items()}
        self.cache = cache
        self.q, self.k = random(1, batch, 1, s.num_heads, s.head_dim), random(2, batch, 1, s.num_kv_heads, s.head_dim)

    def empty(self, spec: jaxkv.LayerSpec, batch: int, capacity: int) -> jaxkv.Cache:
        return jaxkv.Cache.init([spec], batch, capacity)

    @staticmethod
    @functools.partial(jax.jit, donate_argnums=0, static_argnames="form")
    def loop(cache, q, k, position, steps, form="auto"):
        def body(_, carry):
            cache, x = carry
            cache, step = cache.begin(jnp.full((q.shape[0], 1), position))
            layer = cache.layers[0].put(step, k, k)
            return cache.with_layers([layer]), q + jaxkv.attend(x, layer, step, implementation=form)

        return jax.lax.fori_loop(0, steps, body, (cache, q))

    def at(self, fill: int):
        def run(steps):
            groups, lengths = jax.tree.map(jnp.copy, self.books[fill])  # the loop is given them to keep
            cache = dataclasses.replace(self.cache, groups=groups, lengths=lengths)
            begin = time.perf_counter()
            self.cache, out = self.loop(cache, self.q, self.k, jnp.int32(fill - 1), jnp.int32(steps), form=self.form)
            out.block_until_ready()
            return time.perf_counter() - begin

        return run


class Blockwise(Jaxkv):
    """The same as XLA compiles it."""

    form = "blockwise"


class Static:
    """jax.nn.dot_product_attention over the whole of a static [B, S, K, H] cache."""

    def __init__(self, s: Setting, batch: int, capacity: int):
        self.held = tuple(random(i, batch, capacity, s.num_kv_heads, s.head_dim) for i in range(2))
        self.q, self.k = random(1, batch, 1, s.num_heads, s.head_dim), random(2, batch, 1, s.num_kv_heads, s.head_dim)

    @staticmethod
    @functools.partial(jax.jit, donate_argnums=0)
    def loop(held, q, new, position, steps):
        def body(_, carry):
            (k, v), x = carry
            k, v = (jax.lax.dynamic_update_slice_in_dim(y, new, position, 1) for y in (k, v))
            lengths = jnp.full((q.shape[0],), position + 1)
            return (k, v), q + jax.nn.dot_product_attention(x, k, v, key_value_seq_lengths=lengths)

        return jax.lax.fori_loop(0, steps, body, (held, q))

    def at(self, fill: int):
        def run(steps):
            begin = time.perf_counter()
            self.held, out = self.loop(self.held, self.q, self.k, jnp.int32(fill - 1), jnp.int32(steps))
            out.block_until_ready()
            return time.perf_counter() - begin

        return run


class Linen:
    """flax.linen.MultiHeadDotProductAttention(decode=True)."""

    def __init__(self, s: Setting, batch: int, capacity: int):
        from flax import linen

        heads = s.num_kv_heads
        self.module = linen.MultiHeadDotProductAttention(heads, qkv_features=heads * s.head_dim, decode=True)
        self.x = random(1, batch, 1, 8)
        shapes = jax.eval_shape(self.module.init, jax.random.key(0), jnp.zeros((batch, capacity, 8)))
        fill = iter(range(100))
        made = jax.tree.map(lambda x: 0.1 * random(next(fill), *x.shape).astype(x.dtype), shapes)
        self.params, held = made["params"], dict(made["cache"])
        held.pop("cache_index")
        self.held = held

    @functools.cached_property
    def loop(self):
        @functools.partial(jax.jit, donate_argnums=0)
        def loop(held, params, x, position, steps):
            def body(_, carry):
                held, y = carry
                variables = {"params": params, "cache": {**held, "cache_index": position}}
                out, changed = self.module.apply(variables, y, mutable=["cache"])
                return {name: changed["cache"][name] for name in held}, x + out

            return jax.lax.fori_loop(0, steps, body, (held, x))

        return loop

    def at(self, fill: int):
        def run(steps):
            begin = time.perf_counter()
            self.held, out = self.loop(self.held, self.params, self.x, jnp.int32(fill - 1), jnp.int32(steps))
            out.block_until_ready()
            return time.perf_counter() - begin

        return run


class Nnx:
    """flax.nnx.MultiHeadAttention(decode=True)."""

    def __init__(self, s: Setting, batch: int, capacity: int):
        from flax import nnx

        heads = s.num_kv_heads
        module = nnx.MultiHeadAttention(
            heads, in_features=8, qkv_features=heads * s.head_dim, decode=True, rngs=nnx.Rngs(0)
        )
        module.init_cache((batch, capacity, 8))
        self.x = random(1, batch, 1, 8)
        graph, params, rest = nnx.split(module, nnx.Param, ...)

        @functools.partial(jax.jit, donate_argnums=0)
        def loop(rest, params, x, position, steps):
            def body(_, carry):
                rest, y = carry
                module = nnx.merge(graph, params, rest)
                module.cache_index.set_value(position)
                out = module(y)
                return nnx.split(module, nnx.Param, ...)[2], x + out

            return jax.lax.fori_loop(0, steps, body, (rest, x))

        self.loop, self.params, self.rest = loop, params, rest

    def at(self, fill: int):
        def run(steps):
            begin = time.perf_counter()
            self.rest, out = self.loop(self.rest, self.params, self.x, jnp.int32(fill - 1), jnp.int32(steps))
            out.block_until_ready()
            return time.perf_counter() - begin

        return run


class Torch:
    """torch's scaled_dot_product_attention(enable_gqa=True) on the filled slice of [B, K, S, H]."""

    def __init__(self, s: Setting, batch: int, capacity: int):
        import torch

        torch.set_num_threads(count_cores())
        torch.manual_seed(0)
        self.k, self.v = (torch.randn(batch, s.num_kv_heads, capacity, s.head_dim) for _ in range(2))
        self.q, self.new = (
            torch.randn(batch, s.num_heads, 1, s.head_dim),
            torch.randn(batch, s.num_kv_heads, s.head_dim),
        )
        self.torch = torch

    def at(self, fill: int):
        attention = self.torch.nn.functional.scaled_dot_product_attention

        def run(steps):
            with self.torch.inference_mode():
                x = self.q
                begin = time.perf_counter()
                for _ in range(steps):
                    self.k[:, :, fill - 1] = self.new
                    self.v[:, :, fill - 1] = self.new
                    x = self.q + attention(x, self.k[:, :, :fill], self.v[:, :, :fill], enable_gqa=True)
                return time.perf_counter() - begin

        return run


def plain_read(s: Setting, batch: int, fill: int) -> float:
    """Milliseconds to sum the filled keys and values, contiguous, the fastest of 20; torch's sum if that is faster."""
    held = [random(i, batch, s.num_kv_heads, fill, s.head_dim) for i in range(2)]
    total = jax.jit(lambda k, v: k.sum() + v.sum())
    sums = [lambda: total(*held).block_until_ready()]
    if jax.default_backend() == "cpu":
        try:
            import torch
        except ModuleNotFoundError:
            pass
        else:
            tensors = [torch.tensor(np.asarray(x)) for x in held]
            sums.append(lambda: [x.sum() for x in tensors])
    best = float("inf")
    for once in sums:
        once()
        for _ in range(20):
            begin = time.perf_counter()
            once()
            best = min(best, time.perf_counter() - begin)
    return 1e3 * best


@dataclasses.dataclass(frozen=True)
class Beams:
    """What is reordered: as many rows as there are beams."""

    num_beams: int = 8
    num_layers: int = 12
    num_kv_heads: int = 12
    head_dim: int = 64
    capacities: tuple[int, ...] = (512, 4096, 16384)
    fills: tuple[int, ...] = (20, 256)


QUICK_BEAMS = Beams(4, 2, 2, 8, (64, 128), (8,))


def take(b: Beams, capacity: int, fill: int) -> Any:
    """Returns what runs so many reorderings of a cache of `capacity` tokens that holds `fill`."""
    specs = [jaxkv.LayerSpec(jaxkv.Full(), b.num_kv_heads, b.head_dim)] * b.num_layers
    cache, _ = jaxkv.Cache.init(specs, b.num_beams, capacity).begin(np.tile(np.arange(fill), (b.num_beams, 1)))
    rows = jnp.arange(b.num_beams, dtype=jnp.int32)[::-1]

    @functools.partial(jax.jit, donate_argnums=0)
    def loop(cache, rows, steps):
        return jax.lax.fori_loop(0, steps, lambda _, cache: cache.take(rows), cache)

    def run(steps):
        nonlocal cache
        begin = time.perf_counter()
        cache = loop(cache, rows, jnp.int32(steps))
        cache.layers[-1].v.block_until_ready()
        return time.perf_counter() - begin

    return run


def reorder_cache(b: Beams, fill: int) -> Any:
    """The same of a transformers cache."""
    import torch
    from transformers import DynamicCache

    torch.set_num_threads(count_cores())
    cache = DynamicCache()
    for layer in range(b.num_layers):
        cache.update(*torch.randn(2, b.num_beams, b.num_kv_heads, fill, b.head_dim), layer)
    rows = torch.arange(b.num_beams).flip(0)

    def run(steps):
        begin = time.perf_counter()
        for _ in range(steps):
            cache.reorder_cache(rows)
        return time.perf_counter() - begin

    return run


def plain_copy(b: Beams, fill: int) -> Any:
    """NumPy's copy of what is held from one place to another."""
    held = np.ones((2 * b.num_layers, b.num_beams, b.num_kv_heads, fill, b.head_dim), np.float32)
    other = np.zeros_like(held)

    def run(steps):
        begin = time.perf_counter()
        for _ in range(steps):
            np.copyto(other, held)
        return time.perf_counter() - begin

    return run


def measure_reordering(b: Beams, *, rounds: int, seconds: float) -> dict[str, Any]:
    cells = []
    for fill in b.fills:
        say(f"reordering {b.num_beams} rows of {fill} tokens")
        runs = {"plain copy": plain_copy(b, fill)}
        runs |= {f"take, capacity {capacity:,}": take(b, capacity, fill) for capacity in b.capacities}
        try:
            runs["transformers' reorder_cache"] = reorder_cache(b, fill)
        except ModuleNotFoundError as error:
            say(f"transformers' reorder_cache: {error.name} is not installed")
        cells.append({"fill": fill, "ms": interleave(runs, rounds=rounds, seconds=seconds)})
    return {"shape": dataclasses.asdict(b), "cells": cells}


def reordering_table(data: dict[str, Any]) -> str:
    lines = []
    for cell in data["cells"]:
        ms = medians(cell["ms"])
        lines.append(f"{data['shape']['num_beams']} rows of {cell['fill']} tokens reordered: ms; x: times a plain copy")
        lines += [f"{name:>30} {value:9.3f} {value / ms['plain copy']:6.2f}x" for name, value in ms.items()]
    return "\n".join(lines)


CONTESTANTS = {
    "jaxkv": Jaxkv,
    "jaxkv, XLA": Blockwise,
    "jax.nn.dot_product_attention": Static,
    "flax.linen (8 heads)": Linen,
    "flax.nnx (8 heads)": Nnx,
    "torch SDPA": Torch,
}


def measure(s: Setting, names: list[str], *, rounds: int, seconds: float) -> dict[str, Any]:
    """Runs all contestants and returns what `--out` writes."""
    facts = about(("jax", "jaxlib", "flax", "numpy", "torch"))
    facts["device"]["jax"] = f"{jax.default_backend()}: {jax.devices()[0].device_kind}"
    left_out: dict[str, str] = {}
    cells = []
    for batch in s.batches:
        read = {fill: plain_read(s, batch, fill) for fill in s.fills}
        made: dict[int, dict[str, Any]] = {}
        for capacity in s.capacities:
            say(f"batch {batch}, capacity {capacity}: filling")
            made[capacity] = {}
            for name in names:
                try:
                    if name == "torch SDPA" and jax.default_backend() != "cpu":
                        left_out[name] = "it is compared on the CPU only"
                    else:
                        made[capacity][name] = CONTESTANTS[name](s, batch, capacity)
                except ModuleNotFoundError as error:
                    left_out[name] = f"{error.name} is not installed"
        for fill in s.fills:
            say(f"batch {batch}, {fill} tokens")
            # Both capacities in the same turns: that the time does not depend on the capacity is one of the claims.
            runs = {
                (name, capacity): contestant.at(fill)
                for capacity, by_name in made.items()
                if fill <= capacity
                for name, contestant in by_name.items()
            }
            times = interleave(runs, rounds=rounds, seconds=seconds)
            for capacity in made:
                ms = {name: values for (name, at), values in times.items() if at == capacity}
                cells.append({"batch": batch, "capacity": capacity, "fill": fill, "ms": ms, "read_ms": read[fill]})
        made.clear()
    say("")
    settings = {"rounds": rounds, "seconds": seconds}
    return {**facts, "shape": dataclasses.asdict(s), "settings": settings, "cells": cells, "left_out": left_out}


def table(data: dict[str, Any]) -> str:
    """The medians as text, each with its ratio to jaxkv."""
    names = list(dict.fromkeys(name for cell in data["cells"] for name in cell["ms"]))
    lines = ["batch  capacity   fill" + "".join(f"{name:>30}" for name in (*names, READ))]
    for cell in data["cells"]:
        ms = medians(cell["ms"]) | {READ: cell["read_ms"]}
        line = f"{cell['batch']:5}{cell['capacity']:10}{cell['fill']:7}"
        for name in (*names, READ):
            ratio = f" {ms[name] / ms['jaxkv']:6.2f}x" if name in ms and name != "jaxkv" and "jaxkv" in ms else ""
            line += f"{f'{ms[name]:.3f}{ratio}' if name in ms else '-':>30}"
        lines.append(line)
    lines.append("ms per step, medians (plain read: the fastest of 20); x: times jaxkv's")
    lines += [f"left out: {name}: {why}" for name, why in data["left_out"].items()]
    return "\n".join(lines)


COLORS = {
    "jaxkv": "C3",
    "jaxkv, XLA": "C5",
    "jax.nn.dot_product_attention": "C0",
    "flax.linen (8 heads)": "C1",
    "flax.nnx (8 heads)": "C2",
    "torch SDPA": "C4",
    READ: "0.6",
}


def plot(data: dict[str, Any], path: pathlib.Path) -> None:
    """Draws time over fill, both logarithmic: a panel per batch, at the smallest capacity; jaxkv at both."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    batches = list(dict.fromkeys(cell["batch"] for cell in data["cells"]))
    low, high = (f(cell["capacity"] for cell in data["cells"]) for f in (min, max))
    figure, axes = pyplot.subplots(
        1, len(batches), figsize=(5 * len(batches), 4.4), layout="constrained", squeeze=False
    )
    for batch, panel in zip(batches, axes[0], strict=True):
        rows = [cell for cell in data["cells"] if cell["batch"] == batch]
        near = [cell for cell in rows if cell["capacity"] == low]
        fills = [cell["fill"] for cell in near]
        for name, color in COLORS.items():
            ms = [cell["read_ms"] if name == READ else medians(cell["ms"]).get(name) for cell in near]
            if None in ms:
                continue
            style = {"linestyle": ":"} if name == READ else {"marker": "o", "markersize": 4}
            wide = 2.5 if name == "jaxkv" else 1.5
            label = "reading keys and values once" if name == READ else name
            panel.plot(fills, ms, color=color, linewidth=wide, label=label, **style)
        far = [cell for cell in rows if cell["capacity"] == high]
        if high > low and all("jaxkv" in cell["ms"] for cell in far):
            ms = [medians(cell["ms"])["jaxkv"] for cell in far]
            panel.plot([c["fill"] for c in far], ms, "k--", linewidth=1, label=f"jaxkv, {high:,} slots")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(fills, [f"{n:,}" for n in fills])
        panel.minorticks_off()
        title = "one sequence" if batch == 1 else f"{batch} sequences"
        panel.set(title=f"{title}, {low:,} slots", xlabel="tokens held", ylabel="ms per step")
        panel.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=4)
    shape = data["shape"]
    heads = f"{shape['num_heads']} query and {shape['num_kv_heads']} kv heads of {shape['head_dim']}"
    figure.suptitle(f"One decode step of one layer, float32, {heads}; {data['device']['cpu']}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=pathlib.Path, help="where the numbers go (json); the figure goes beside docs/data"
    )
    parser.add_argument("--plot", type=pathlib.Path, help="only draw the figure of these numbers")
    parser.add_argument("--figure", type=pathlib.Path, default=ROOT / "docs/figures/decode.png")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and two rounds: does it run?")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.05, help="about how long one turn lasts")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--batch", type=int, nargs="+", help="batch sizes")
    parser.add_argument("--capacity", type=int, nargs="+")
    parser.add_argument("--fill", type=int, nargs="+")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("N", "K", "H"), help="query heads, kv heads, head_dim")
    parser.add_argument("--dtype", help="in which jaxkv keeps keys and values")
    args = parser.parse_args(argv)
    if args.plot:
        plot(json.loads(args.plot.read_text()), args.figure)
        return 0
    setting = QUICK if args.quick else Setting()
    if args.shape:
        setting = dataclasses.replace(
            setting, **dict(zip(("num_heads", "num_kv_heads", "head_dim"), args.shape, strict=True))
        )
    if args.dtype:
        setting = dataclasses.replace(setting, dtype=args.dtype)
    for field, values in (("batches", args.batch), ("capacities", args.capacity), ("fills", args.fill)):
        if values:
            setting = dataclasses.replace(setting, **{field: tuple(values)})
    if max(setting.fills) > min(setting.capacities):
        parser.error(f"--fill {max(setting.fills)} does not fit --capacity {min(setting.capacities)}")
    rounds, seconds = (2, 0.001) if args.quick else (args.rounds, args.seconds)
    data = measure(setting, args.only, rounds=rounds, seconds=seconds)
    print(table(data))
    data["reordering"] = measure_reordering(QUICK_BEAMS if args.quick else Beams(), rounds=rounds, seconds=seconds)
    print(reordering_table(data["reordering"]))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(data, indent=1) + "\n")
        plot(data, args.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
