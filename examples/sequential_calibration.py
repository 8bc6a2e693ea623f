"""Calibrates and rounds a model that does not fit on the device, layer by layer, as llm-compressor's pipeline does.

    python examples/sequential_calibration.py
    python examples/sequential_calibration.py --to pinned_host --layers 24 --width 1024 --batches 64

Two passes over all batches per layer. The first gathers the ranges of what goes into every linear layer, per channel;
by them the layer is rounded to int8. The second runs the rounded layer and replaces each batch by its output. Layers
and batches lie in `jaxkv.Offload`; on the device there is one layer, the batch in use and its output, and the next
batch. Then everything is done again with all of it on the device, and both must agree to the last bit.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxkv
from jaxkv.sizes import format_bytes


class Range(nnx.Variable):
    """Least and largest value seen in each channel."""


class Linear(nnx.Linear):
    """A linear layer that gathers the ranges of its input, or rounds its input to 256 steps within them."""

    def __init__(self, in_features: int, out_features: int, rngs: nnx.Rngs) -> None:
        super().__init__(in_features, out_features, rngs=rngs)
        self.low = Range(jnp.full(in_features, jnp.inf))
        self.high = Range(jnp.full(in_features, -jnp.inf))
        self.rounds = False

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.rounds:
            low, step = self.low[...], (self.high[...] - self.low[...]) / 255 + 1e-8
            x = jnp.clip(jnp.round((x - low) / step), 0, 255) * step + low
        else:
            self.low[...] = jnp.minimum(self.low[...], x.min((0, 1)))
            self.high[...] = jnp.maximum(self.high[...], x.max((0, 1)))
        return super().__call__(x)


class Block(nnx.Module):
    """One layer of a transformer, with four linear layers."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.norms = nnx.List([nnx.RMSNorm(width, rngs=rngs) for _ in range(2)])
        self.qkv, self.out = Linear(width, 3 * width, rngs), Linear(width, width, rngs)
        self.up, self.down = Linear(width, 4 * width, rngs), Linear(4 * width, width, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        q, k, v = jnp.split(self.qkv(self.norms[0](x))[:, :, None], 3, axis=-1)  # [B, T, 1, D]
        x = x + self.out(jax.nn.dot_product_attention(q, k, v, mask=mask)[:, :, 0])
        return x + self.down(jax.nn.gelu(self.up(self.norms[1](x))))


class Layer:
    """What is done with one layer, compiled once for all of them."""

    def __init__(self, width: int) -> None:
        block = nnx.eval_shape(lambda: Block(width, nnx.Rngs(0)))
        gathering = nnx.graphdef(block)
        block.set_attributes(rounds=True)
        rounding = nnx.graphdef(block)
        self.make = jax.jit(lambda key: nnx.split(Block(width, nnx.Rngs(key)), nnx.Param, Range)[1:])

        @jax.jit
        def gather(params: Any, ranges: Any, hidden: jax.Array, mask: jax.Array) -> Any:
            block = nnx.merge(gathering, params, ranges)
            block(hidden, mask)
            return nnx.state(block, Range)

        @jax.jit
        def run(params: Any, ranges: Any, hidden: jax.Array, mask: jax.Array) -> jax.Array:
            return nnx.merge(rounding, params, ranges)(hidden, mask)

        self.gather, self.run, self.round = gather, run, jax.jit(lambda params: jax.tree.map(rounded, params))


def rounded(weights: jax.Array) -> jax.Array:
    """The nearest of 255 values, per output channel."""
    step = jnp.abs(weights).max(0, keepdims=True) / 127 + 1e-8
    return jnp.round(weights / step) * step


class Peak:
    """The most bytes that were seen on the device."""

    def __init__(self) -> None:
        self.most, self.before = 0, self._now()

    def _now(self) -> int:
        arrays = {x.unsafe_buffer_pointer(): x for x in jax.live_arrays() if x.sharding.memory_kind == "device"}
        return sum(x.nbytes for x in arrays.values())

    def look(self) -> None:
        self.most = max(self.most, self._now() - self.before)

    def told(self) -> int:
        """What the device itself says, where it does, since the program started; else what was seen."""
        stats = jax.devices()[0].memory_stats() or {}
        return stats.get("peak_bytes_in_use", self.most)


def loader(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Activations in which some channels are much larger than others, as they are in language models."""
    mask = jnp.tril(jnp.ones((1, 1, options.length, options.length), bool))  # one for all: stored once
    for i in range(options.batches):
        random = np.random.default_rng(i)
        scale = 1 + 30 * (np.random.default_rng(0).random(options.width) > 0.98)
        hidden = scale * random.standard_normal((options.batch, options.length, options.width))
        yield {"hidden": jnp.asarray(hidden.astype("float32")), "mask": mask}


def keys(options: argparse.Namespace) -> jax.Array:
    return jax.random.split(jax.random.key(0), options.layers)


def sequential(layer: Layer, options: argparse.Namespace, peak: Peak) -> tuple[Any, Any, Any, dict[str, int]]:
    """Returns ranges of all layers, rounded layers, outputs, all as NumPy arrays, and the bytes off the device."""
    with jaxkv.Offload(options.to) as layers, jaxkv.Offload.from_batches(loader(options), options.to) as batches:
        for key in keys(options):
            params, ranges = layer.make(key)
            layers.append({"params": params, "ranges": ranges})
            del params, ranges
        sizes = {kind: layers.size().get(kind, 0) + size for kind, size in batches.size().items()}
        for number in range(len(layers)):
            params, ranges = layers.take(number).values()
            for batch in batches.iter(["hidden", "mask"], prefetch=1):
                ranges = jax.block_until_ready(layer.gather(params, ranges, **batch))
                peak.look()
                del batch  # before the next one is asked for
            params = layer.round(params)
            indices = itertools.count()  # enumerate would hold the batch
            for batch in batches.iter(["hidden", "mask"], prefetch=1):
                out = jax.block_until_ready(layer.run(params, ranges, **batch))
                peak.look()
                batches.update(next(indices), {"hidden": out})  # the input is dropped here, where it was used last
                del batch, out
            layers.update(number, {"params": params, "ranges": ranges})
            del params, ranges
        params, ranges = zip(*(jax.tree.map(np.array, tuple(one.values())) for one in layers), strict=True)
        return ranges, params, [np.array(batch["hidden"]) for batch in batches.iter(["hidden"])], sizes


def at_once(layer: Layer, options: argparse.Namespace, peak: Peak) -> tuple[Any, Any, Any]:
    """Does the same with everything on the device."""
    layers = [layer.make(key) for key in keys(options)]
    batches = list(loader(options))
    peak.look()
    for number, (params, ranges) in enumerate(layers):
        for batch in batches:
            ranges = layer.gather(params, ranges, **batch)
        params = layer.round(params)
        for batch in batches:
            batch["hidden"] = layer.run(params, ranges, **batch)
            peak.look()
        layers[number] = params, ranges
    params, ranges = zip(*jax.tree.map(np.array, layers), strict=True)
    return ranges, params, [np.array(batch["hidden"]) for batch in batches]


def table(ranges: Any) -> str:
    lines = [
        f"{'layer':>5} {'linear':>7} {'channels':>8} {'least':>8} {'largest':>8}  channels 5 times wider than most"
    ]
    for number, state in enumerate(ranges):
        for name, found in nnx.to_pure_dict(state).items():
            low, high = found["low"], found["high"]
            wide = int((high - low > 5 * np.median(high - low)).sum())
            lines.append(f"{number:5} {name:>7} {len(low):8} {low.min():8.2f} {high.max():8.2f}  {wide}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", default="numpy", help="where layers and batches lie (default numpy)")
    parser.add_argument("--layers", type=int, default=6, help="layers of the model (default 6)")
    parser.add_argument("--width", type=int, default=256, help="channels (default 256)")
    parser.add_argument("--length", type=int, default=64, help="tokens of a sequence (default 64)")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a batch (default 8)")
    parser.add_argument("--batches", type=int, default=16, help="batches (default 16)")
    options = parser.parse_args(argv)
    layer = Layer(options.width)
    peak = Peak()
    *found, sizes = sequential(layer, options, peak)
    bytes_sequential = peak.told()
    peak = Peak()
    expected = at_once(layer, options, peak)
    bytes_at_once = peak.told()
    print(table(found[0]))
    stored = ", ".join(f"{format_bytes(size)} {kind}" for kind, size in sizes.items())
    one, batch = (sum(x.nbytes for x in jax.tree.leaves(part)) for part in (found[1][0], found[2][0]))
    print(f"off the device: {stored}; one layer is {format_bytes(one)}, one batch {format_bytes(batch)}")
    print(f"most on the device, layer by layer: {format_bytes(bytes_sequential)}")
    print(f"most on the device, all at once:    {format_bytes(bytes_at_once)}")
    same = all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(list(expected)), strict=True)
    )
    print(f"ranges, rounded layers and outputs are {'equal to the last bit' if same else 'NOT equal'}")
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
