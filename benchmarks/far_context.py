"""What rounding does to a model that uses its whole context: loss and divergence, token by token, over 4,096 bytes.

    python benchmarks/far_context.py --minutes 20 --weights far.safetensors     # trains, then measures
    python benchmarks/far_context.py --weights far.safetensors                  # measures what was trained
    python benchmarks/far_context.py --weights ... --out docs/data/far_context.json  # the same, kept

The model is trained here, on texts that the standard library carries: passages of them, many of which come
again, anywhere later in the sequence. Whoever has the earlier one at hand predicts the later one nearly for nothing,
so the model learns to look there. Half of the passages to train on are strings of random letters, from which copying is
learned sooner; at first all are. The sequences grow while it trains, from 128 to 4,096 bytes.

What is measured is of other passages, all of them text, which the model has not read: teacher-forced, in blocks, with a
cache of each storage. Bytes of a passage that comes again after more than half of the context, its first eight left
out, are counted apart: `far`. That the model uses the context shows in their loss when the cache is a window of half of
it.

`tail` is what would be gained by keeping the last tokens before each query in full precision, and the others as `Int4`
does: attention over keys and values of both kinds, without a cache.
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
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from common import ROOT, about, say
from flax import nnx

import jaxkv
from jaxkv import Dense, Float8, Int4, Int8, Rotary, Window, safetensors
from jaxkv.models import Decoder, DecoderConfig, ShortConvConfig

sys.path.insert(0, str(ROOT / "examples"))
import train_tiny

STORAGES: dict[str, Any] = {
    "float32": Dense("float32"),
    "int8": Int8(),
    "k int8, v int4": (Int8(), Int4()),
    "k int4, v int8": (Int4(), Int8()),
    "int4": Int4(),
    "int4, not rotated": Int4(rotate=False),
    "int4, groups of 16": Int4(group=16),
    "float8 e4m3": Float8("e4m3"),
}
SKIPPED = 8  # bytes of a passage that tell which one it is
BLOCK = 256  # bytes that the model reads at a time


@dataclasses.dataclass(frozen=True)
class Setting:
    config: DecoderConfig
    lengths: tuple[tuple[float, int], ...]  # from which share of the run on, how long sequences are
    tokens: int  # bytes of a training step
    length: int  # bytes of a measured sequence
    count: int  # of them


CONFIG = DecoderConfig(
    vocab_size=256,
    width=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    mlp_dim=128,
    mixers=(ShortConvConfig(4), None),  # it hands on what came just before, by which the other finds a passage
    rotary=Rotary(theta=100_000.0, dim=16),  # most of a head compares what tokens are, wherever they stand
)
FULL = Setting(CONFIG, ((0.0, 128), (0.4, 512), (0.7, 2048), (0.9, 4096)), 2048, 4096, 2)
QUICK = Setting(CONFIG, ((0.0, 64), (0.5, 128)), 128, 1024, 1)


# ------------------------------------------------------------------------------------------------------------ data


def sequence(
    random: np.random.Generator,
    text: np.ndarray,
    length: int,
    letters: float,
    again: float = 0.5,
    sizes: tuple[int, int] = (32, 129),
) -> tuple[Any, Any]:
    """Returns bytes int32 [length + 1], and for each how far back it was read before, 0 if it was not: int32.

    Args:
      random: where the choices come from.
      text: bytes to take passages from.
      length: of the sequence.
      letters: the share of new passages that are random letters.
      again: the chance that a passage is one that was there before.
      sizes: the bytes of a new passage: at least the first number, fewer than the second.
    """
    parts: list[np.ndarray] = []
    back: list[np.ndarray] = []
    starts: list[int] = []
    size = 0
    while size <= length:
        if parts and random.random() < again:
            which = int(random.integers(len(parts)))
            part, away = parts[which], np.full(len(parts[which]), size - starts[which])
            away[:SKIPPED] = 0
        else:
            count = int(random.integers(*sizes))
            if random.random() < letters:
                part = random.integers(97, 123, count)
            else:
                begin = int(random.integers(len(text) - count))
                part = text[begin : begin + count]
            away = np.zeros(count, int)
        parts.append(part)
        back.append(away)
        starts.append(size)
        size += len(part)
    return tuple(np.concatenate(x)[: length + 1].astype(np.int32) for x in (parts, back))


# -------------------------------------------------------------------------------------------------------- training


def train(s: Setting, minutes: float, text: np.ndarray) -> tuple[Any, dict[str, Any]]:
    """Returns the trained parameters, and what there is to say of the run."""
    init, train_step, _ = train_tiny.make_functions(s.config)
    params, opt_state = init(jax.random.key(0))
    curve, losses, begin, said = [], [], time.monotonic(), 0.0
    step = size = 0
    while (progress := (time.monotonic() - begin) / (60 * minutes)) < 1:
        length = [length for share, length in s.lengths if progress >= share][-1]
        kind = (1.0, 0.7, (8, 33)) if length == s.lengths[0][1] else (0.5,)  # at first, there is but copying to learn
        count = max(s.tokens // length, 1)
        rows = [sequence(np.random.default_rng([step, row]), text, length, *kind)[0] for row in range(count)]
        rate = jnp.float32(train_tiny.learning_rate(progress, 1e-2))
        params, opt_state, loss = train_step(params, opt_state, np.stack(rows), rate)
        losses.append(float(loss) / np.log(2))
        step, size = step + 1, size + len(rows) * length
        if time.monotonic() - said > 15:
            said = time.monotonic()
            curve.append({"step": step, "length": length, "bits_per_byte": round(float(np.mean(losses)), 4)})
            losses = []
            say(f"step {step}, {length} bytes, {curve[-1]['bits_per_byte']:.3f} bits per byte")
    facts = {"minutes": minutes, "steps": step, "bytes": size, "curve": curve}
    return params, facts | {"parameters": sum(x.size for x in jax.tree.leaves(params))}


# ------------------------------------------------------------------------------------------------------- measuring


def predictions(config: DecoderConfig, params: Any, tokens: np.ndarray, storage: Any) -> np.ndarray:
    """Returns the log2 of what the model predicts after each byte: float32 [B, T, 256]."""
    module = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    forward, _ = jaxkv.nnx.functional(module)
    batch, length = tokens.shape
    cache = jaxkv.Cache.init(module.specs(), batch, length, storage=storage, max_block=BLOCK)

    @functools.partial(jax.jit, donate_argnums=2)
    def read(params: Any, start: Any, cache: Any, block: Any) -> Any:
        positions = jnp.broadcast_to(start + jnp.arange(block.shape[1], dtype=jnp.int32), block.shape)
        logits, cache = forward(params, block, positions, cache)
        return jax.nn.log_softmax(logits.astype(jnp.float32)) / np.float32(np.log(2)), cache

    parts = []
    for start in range(0, length, BLOCK):
        logs, cache = read(params, jnp.int32(start), cache, tokens[:, start : start + BLOCK])
        parts.append(np.asarray(logs))
    return np.concatenate(parts, 1)


def with_tail(config: DecoderConfig, params: Any, tokens: np.ndarray, storage: Any, tail: int) -> np.ndarray:
    """Returns `predictions` if each query read the `tail` tokens up to its own unrounded, those before as stored."""

    def attended(q: Any, k: Any, v: Any, **rest: Any) -> Any:
        batch, length, heads, size = q.shape
        q = q.reshape(batch, length, k.shape[2], -1, size)
        stored = [storage.decode(storage.encode(x)) for x in (k, v)]
        away = jnp.arange(length)[:, None] - jnp.arange(length)[None]
        scores = [jnp.einsum("btkgh,bskh->bkgts", q, x) * np.float32(size**-0.5) for x in (k, stored[0])]
        weights = jax.nn.softmax(jnp.where(away < 0, -jnp.inf, jnp.where(away < tail, *scores)), axis=-1)
        parts = jnp.where(away < tail, weights, 0), jnp.where(away < tail, 0, weights)
        out = sum(jnp.einsum("bkgts,bskh->btkgh", p, x) for p, x in zip(parts, (v, stored[1]), strict=True))
        return out.reshape(batch, length, heads, size)

    graph = nnx.graphdef(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))

    @jax.jit
    def read(params: Any, row: Any) -> Any:
        logits = nnx.merge(graph, params)(row[None])
        return jax.nn.log_softmax(logits[0].astype(jnp.float32)) / np.float32(np.log(2))

    with mock.patch("jaxkv.nn.heads.self_attend", attended):
        return np.stack([np.asarray(read(params, row)) for row in tokens])


def measure(s: Setting, params: Any, text: np.ndarray) -> dict[str, Any]:
    """Bits per byte and divergence from the float32 cache, of all bytes and of those that were read far back."""
    rows = [sequence(np.random.default_rng([1, row]), text, s.length, letters=0.0) for row in range(s.count)]
    tokens, back = (np.stack(x) for x in zip(*rows, strict=True))
    inputs, targets, back = tokens[:, :-1], tokens[:, 1:], back[:, 1:]
    which = {"all": np.ones(back.shape, bool), "new": back == 0, "far": back > s.length // 2}
    found: dict[str, Any] = {
        "length": s.length,
        "bytes": {name: int(mask.sum()) for name, mask in which.items()},
        "storages": [],
    }

    def losses(logs: np.ndarray) -> np.ndarray:
        return -np.take_along_axis(logs, targets[..., None], 2)[..., 0]

    runs = {name: functools.partial(predictions, storage=storage) for name, storage in STORAGES.items()}
    for tail in (0, 64):
        runs[f"int4, a tail of {tail}"] = functools.partial(with_tail, storage=Int4(), tail=tail)
    plain = None
    for name, run in runs.items():
        say(f"measuring: {name}")
        logs = run(s.config, params, inputs)
        plain = logs if plain is None else plain
        loss, apart = losses(logs), (np.exp2(plain) * (plain - logs)).sum(-1)
        bits = {part: float(loss[mask].mean()) for part, mask in which.items()}
        divergence = {part: float(apart[mask].mean()) for part, mask in which.items()}
        found["storages"].append({"storage": name, "bits_per_byte": bits, "kl_bits": divergence})
    window = dataclasses.replace(s.config, reaches=(Window(s.length // 2),))
    loss = losses(predictions(window, params, inputs, STORAGES["float32"]))
    found["half_context"] = {part: float(loss[mask].mean()) for part, mask in which.items()}
    return found


def table(found: dict[str, Any]) -> str:
    plain = found["storages"][0]["bits_per_byte"]
    count = found["bytes"]
    lines = [
        f"{found['length']} bytes, {count['all']:,} in all, {count['far']:,} of them read before, more than half of "
        "that ago",
        f"their bits per byte: {plain['far']:.3f}, with half of the context {found['half_context']['far']:.3f}; of all "
        f"{plain['all']:.4f}, {found['half_context']['all']:.4f}",
        f"{'':>24} bits per byte, against float32's   KL in bits   of the far ones",
    ]
    for row in found["storages"]:
        bits, divergence = row["bits_per_byte"], row["kl_bits"]
        lines.append(
            f"{row['storage']:>24} {bits['all']:8.4f} {bits['all'] / plain['all'] - 1:+10.3%} {divergence['all']:16.6f}"
            f" {bits['far']:10.4f} {bits['far'] / plain['far'] - 1:+10.3%} {divergence['far']:12.6f}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, help="train for so long; without it, measure what --weights has")
    parser.add_argument("--weights", type=pathlib.Path, required=True, help="the model's file")
    parser.add_argument("--out", type=pathlib.Path, help="where the numbers go (json)")
    parser.add_argument("--quick", action="store_true", help="a tiny model and short texts: does it run?")
    args = parser.parse_args(argv)
    s = QUICK if args.quick else FULL
    text, other = train_tiny.corpus(topics=1)
    if args.minutes is not None:
        params, facts = train(s, args.minutes, text)
        safetensors.write(args.weights, flat(params), metadata={"run": json.dumps(facts)})
    file = safetensors.File(args.weights)
    shapes = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Decoder(s.config, rngs=nnx.Rngs(0)))))
    params = jax.tree_util.tree_map_with_path(lambda path, _: jnp.asarray(file[jax.tree_util.keystr(path)]), shapes)
    found = about(("jax", "jaxlib", "numpy", "optax")) | {"run": json.loads(file.metadata["run"])}
    found |= measure(s, params, other)
    print(table(found))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def flat(params: Any) -> dict[str, Any]:
    paths, _ = jax.tree_util.tree_flatten_with_path(params)
    return {jax.tree_util.keystr(path): x for path, x in paths}


if __name__ == "__main__":
    sys.exit(main())
