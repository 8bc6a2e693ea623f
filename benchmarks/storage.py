"""How the cache keeps numbers: bytes, what rounding does to attention, and the time of a decode step.

    python benchmarks/storage.py                                 # tables
    python benchmarks/storage.py --out docs/data/storage.json    # the same, kept
    python benchmarks/storage.py --only errors                   # no times
    python benchmarks/storage.py --quick                         # tiny sizes: does it run?

Errors are |what attention gives - what it gives in float32| / |the latter|, over all queries: of the last 64 tokens of
1,024, one sequence. Normal data: q, k, v are N(0, 1), the scores too. With outliers: two channels of k and one of v are
ten times as large, as real models have them; the queries in the channels of k are a tenth, so that scores stay as they
were.

The model's figures are of the bundled one, teacher-forced on texts that the standard library
carries: bits per byte, and the Kullback-Leibler divergence of its predictions from those with a float32 cache. Four of
its five layers see 128 bytes, so this says little about long contexts.

Times are of one layer in a compiled loop that carries its cache, as generation does: a token is put, and attends to all
that is held: with what XLA compiles, and with the native kernel where that reads the storage. Files are saved and
loaded beside the same bytes written, made safe on the disk, and read, of rows that are full and of one that is not.
transformers' quantized cache (optimum-quanto) runs eagerly, as it is used: `update` with one token, which brings back
all of the cache, and torch's attention over it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import pydoc_data.topics
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import about, count_cores, interleave, medians, say, warn_if_busy

import jaxkv
from jaxkv import Dense, Float8, Full, Int4, Int8, LayerSpec, whole

STORAGES: dict[str, tuple[Any, Any]] = {
    "float32": (Dense("float32"),) * 2,
    "float16": (Dense("float16"),) * 2,
    "int8": (Int8(),) * 2,
    "int8, not rotated": (Int8(rotate=False),) * 2,
    "int4": (Int4(),) * 2,
    "int4, not rotated": (Int4(rotate=False),) * 2,
    "int4, groups of 16": (Int4(group=16),) * 2,
    "k int8, v int4": (Int8(), Int4()),
    "float8 e4m3": (Float8("e4m3"),) * 2,
    "float8 e5m2": (Float8("e5m2"),) * 2,
}
TIMED = ("float32", "float16", "int8", "int4", "k int8, v int4", "float8 e4m3")


@dataclasses.dataclass(frozen=True)
class Setting:
    held: int = 16384
    batches: tuple[int, ...] = (1, 8)
    heads: tuple[tuple[int, int, int], ...] = ((32, 8, 128),)  # query heads, kv heads, head_dim
    error_tokens: int = 1024
    texts: int = 32


QUICK = Setting(128, (1,), ((4, 2, 64),), 128, 2)


def measure_bytes(s: Setting) -> list[dict[str, Any]]:
    """Bytes of one more token, as a share of float32's."""
    rows = []
    for name, storage in STORAGES.items():
        share = {}
        for size in (64, 128):
            spec = LayerSpec(Full(), 8, size)
            plain, kept = (
                jaxkv.plan_memory([spec], 1, s.held, storage=x).bytes_per_token for x in (STORAGES["float32"], storage)
            )
            share[size] = kept / plain
        rows.append({"storage": name, "share": share})
    return rows


# ------------------------------------------------------------------------------------------------------- errors


def data(kind: str, tokens: int, size: int, seed: int) -> tuple[Any, Any, Any]:
    """Queries [1, T, 8, H], keys and values [1, T, 4, H]."""
    random = np.random.default_rng(seed)
    q, k, v = (random.standard_normal((1, tokens, heads, size), dtype=np.float32) for heads in (8, 4, 4))
    if kind == "outliers":
        k[..., [3, size // 2]] *= 10
        q[..., [3, size // 2]] /= 10
        v[..., 5] *= 10
    return q, k, v


@jax.jit
def attended(cache: Any, q: Any, k: Any, v: Any) -> Any:
    cache, step = cache.begin(jnp.arange(q.shape[1], dtype=jnp.int32)[None])
    return jaxkv.attend(q, cache.layers[0].put(step, k, v), step)


def measure_errors(s: Setting) -> list[dict[str, Any]]:
    rows = []
    for size in (64, 128):
        for name, storage in STORAGES.items():
            say(f"errors, head_dim {size}: {name}")
            error = {}
            for kind in ("normal", "outliers"):
                outs = []
                for kept in (STORAGES["float32"], storage):
                    spec = LayerSpec(Full(), 4, size)
                    cache = jaxkv.Cache.init([spec], 1, s.error_tokens, storage=kept, max_block=s.error_tokens)
                    outs.append(np.asarray(attended(cache, *data(kind, s.error_tokens, size, 0)))[:, -64:])
                error[kind] = float(np.linalg.norm(outs[1] - outs[0]) / np.linalg.norm(outs[0]))
            rows.append({"storage": name, "head_dim": size, "error": error})
    return rows


def texts(count: int, length: int) -> np.ndarray:
    """Bytes of texts that the standard library carries: int32 [count, length]."""
    long = [text.encode() for text in pydoc_data.topics.topics.values() if len(text.encode()) >= length]
    return np.array([list(text[:length]) for text in long[:count]], np.int32)


def measure_model(s: Setting) -> list[dict[str, Any]]:
    """Bits per byte of the bundled model, and the divergence from its float32 cache in bits."""
    model = jaxkv.models.tiny.load()
    tokens = texts(s.texts, 512)
    rows, plain = [], None
    positions = jnp.broadcast_to(jnp.arange(64, dtype=jnp.int32), (len(tokens), 64))

    @jax.jit
    def block(params, tokens, positions, cache):
        logits, cache = model.forward(params, tokens, positions, cache)
        return jax.nn.log_softmax(logits.astype(jnp.float32)), cache

    for name, storage in STORAGES.items():
        say(f"model: {name}")
        cache = model.init_cache(len(tokens), 512, storage=storage)
        parts = []
        for start in range(0, 512, 64):
            predicted, cache = block(model.params, tokens[:, start : start + 64], positions + start, cache)
            parts.append(np.asarray(predicted))
        logs = np.concatenate(parts, 1)[:, :-1] / np.log(2)
        plain = logs if plain is None else plain
        nll = -np.take_along_axis(logs, tokens[:, 1:, None], 2).mean()
        kl = (np.exp2(plain) * (plain - logs)).sum(-1).mean()
        rows.append({"storage": name, "bits_per_byte": float(nll), "kl_bits": float(kl)})
    return rows


# -------------------------------------------------------------------------------------------------------- times


@functools.partial(jax.jit, donate_argnums=0)
def fill(cache: Any, start: Any, k: Any, v: Any) -> Any:
    positions = jnp.broadcast_to(start + jnp.arange(k.shape[1], dtype=jnp.int32), k.shape[:2])
    cache, step = cache.begin(positions)
    return cache.with_layers([cache.layers[0].put(step, k, v)])


@functools.partial(jax.jit, donate_argnums=0, static_argnames="implementation")
def loop(cache: Any, q: Any, k: Any, position: Any, steps: Any, implementation: str) -> Any:
    def body(_, carry):
        cache, x = carry
        cache, step = cache.begin(jnp.full((q.shape[0], 1), position))
        layer = cache.layers[0].put(step, k, k)
        return cache.with_layers([layer]), q + jaxkv.attend(x, layer, step, implementation=implementation)

    return jax.lax.fori_loop(0, steps, body, (cache, q))


def decoding(storage: Any, batch: int, held: int, heads: tuple[int, int, int]) -> dict[str, Any]:
    """Returns what runs so many steps over `held` tokens and says how many seconds they took: by what computes it."""
    num_heads, num_kv_heads, size = heads
    random = np.random.default_rng(0)
    cache = jaxkv.Cache.init([LayerSpec(Full(), num_kv_heads, size)], batch, held, storage=storage)
    block = min(cache.max_block, held)
    new = random.standard_normal((2, batch, block, num_kv_heads, size), dtype=np.float32)
    for start in range(0, held, block):
        cache = fill(cache, jnp.int32(start), *new)
    q = jnp.asarray(random.standard_normal((batch, 1, num_heads, size), dtype=np.float32))
    k = jnp.asarray(new[0][:, :1])

    def run(steps: int, implementation: str) -> float:
        nonlocal cache
        begin = time.perf_counter()
        cache, out = loop(cache, q, k, jnp.int32(held - 1), jnp.int32(steps), implementation)
        out.block_until_ready()
        return time.perf_counter() - begin

    runs = {"XLA": functools.partial(run, implementation="blockwise")}
    try:
        jax.eval_shape(functools.partial(loop, implementation="native"), cache, q, k, jnp.int32(0), jnp.int32(0))
        runs["native"] = functools.partial(run, implementation="native")
    except jaxkv.NotSupportedError as error:
        say(str(error))
    return runs


def quantized_cache(batch: int, held: int, heads: tuple[int, int, int]) -> Any:
    """The same with the quantized cache of transformers, of 4 bits: of this backend's 4 and 2 the larger number."""
    import torch
    from optimum import quanto  # noqa: F401  what QuantizedCache wants for this backend
    from transformers import PretrainedConfig, QuantizedCache

    torch.set_num_threads(count_cores())
    num_heads, num_kv_heads, size = heads
    cache = QuantizedCache("quanto", PretrainedConfig(num_hidden_layers=1), nbits=4, q_group_size=64)
    cache.update(*torch.randn(2, batch, num_kv_heads, held - 1, size), 0)
    q, new = torch.randn(batch, num_heads, 1, size), torch.randn(batch, num_kv_heads, 1, size)

    def run(steps):
        with torch.inference_mode():
            begin = time.perf_counter()
            for _ in range(steps):
                k, v = cache.update(new, new, 0)
                torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            return time.perf_counter() - begin

    return run


def measure_times(s: Setting, *, rounds: int, seconds: float) -> list[dict[str, Any]]:
    cells = []
    for heads in s.heads:
        for batch in s.batches:
            say(f"{heads}, {batch} x {s.held:,} tokens")
            runs = {
                name if form == "XLA" else f"{name}, {form}": run
                for name in TIMED
                for form, run in decoding(STORAGES[name], batch, s.held, heads).items()
            }
            try:
                runs["transformers, 4 bits"] = quantized_cache(batch, s.held, heads)
            except ImportError as error:
                say(f"transformers' quantized cache: {error}")
            ms = interleave(runs, rounds=rounds, seconds=seconds)
            cells.append({"heads": heads, "batch": batch, "held": s.held, "ms": ms})
    return cells


def measure_files(s: Setting, *, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Seconds to write and read the bytes of a saved row, and to save and load it, in turn: the file is in memory."""
    rows, spec = [], LayerSpec(Full(), 8, 128)
    with tempfile.TemporaryDirectory() as folder:
        path, plain = f"{folder}/rows", f"{folder}/plain"
        for name, share in (("float32", 1), ("float32", 0.7), ("k int8, v int4", 1), ("k int8, v int4", 0.7)):
            held = s.held // 4
            make = functools.partial(jaxkv.Cache.init, [spec] * 4, 1, held, max_block=held, storage=STORAGES[name])
            cache, _ = make().begin(jnp.arange(int(share * held), dtype=jnp.int32)[None])
            cache.save(path)
            content = np.fromfile(path, np.uint8)

            def write(content: Any = content) -> None:
                with whole.written(plain) as file:
                    file.write(content.data)

            def load(make: Any = make) -> float:
                empty = jax.block_until_ready(make())
                begin = time.perf_counter()
                jax.block_until_ready(empty.load(path))
                return time.perf_counter() - begin

            def timed(run: Any) -> float:
                begin = time.perf_counter()
                run()
                return time.perf_counter() - begin

            runs = {
                "write": functools.partial(timed, write),
                "save": functools.partial(timed, functools.partial(cache.save, path)),
                "read": functools.partial(timed, lambda: np.fromfile(path, np.uint8)),
                "load": load,
            }
            turns = {key: (lambda steps, run=run: sum(run() for _ in range(steps))) for key, run in runs.items()}
            ms = medians(interleave(turns, rounds=rounds, seconds=seconds))
            rows.append({"storage": name, "filled": share, "nbytes": content.size, "ms": ms})
    return rows


def table(found: dict[str, Any]) -> str:
    lines = []
    if "bytes" in found:
        lines.append("share of float32's bytes, scales counted       head_dim 64   128")
        lines += [f"{row['storage']:>44} {row['share'][64]:12.3f} {row['share'][128]:.3f}" for row in found["bytes"]]
    if "errors" in found:
        lines.append("error of attention's output                  head_dim normal outliers")
        lines += [
            f"{row['storage']:>44} {row['head_dim']:8} {row['error']['normal']:6.2%} {row['error']['outliers']:8.2%}"
            for row in found["errors"]
        ]
    if "model" in found:
        lines.append("the bundled model: bits per byte, of float32's, KL in bits")
        plain = found["model"][0]["bits_per_byte"]
        lines += [
            f"{row['storage']:>44} {row['bits_per_byte']:8.4f} {row['bits_per_byte'] / plain - 1:+8.3%} "
            f"{row['kl_bits']:.6f}"
            for row in found["model"]
        ]
    for cell in found.get("times", ()):
        ms, least = medians(cell["ms"]), {name: min(values) for name, values in cell["ms"].items()}
        shape = f"{cell['batch']} x {cell['held']:,} tokens, heads {cell['heads']}"
        lines.append(f"{shape}: ms, least; times float32's of that form")
        lines += [
            f"{name:>44} {value:9.3f} {least[name]:9.3f} {value / ms[plain]:6.2f}x {least[name] / least[plain]:6.2f}x"
            for name, value in ms.items()
            for plain in ["float32, native" if name.endswith(", native") else "float32"]
        ]
    for row in found.get("files", ()):
        ms = row["ms"]
        lines.append(
            f"a row of {row['nbytes'] / 1e6:,.0f} MB, {row['filled']:.0%} full, {row['storage']}: save at "
            f"{ms['write'] / ms['save']:.2f} of the speed of writing its bytes, load at {ms['read'] / ms['load']:.2f} "
            "of reading them"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, help="where the numbers go (json)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and two rounds: does it run?")
    parser.add_argument("--only", nargs="+", choices=("bytes", "errors", "model", "times", "files"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.1, help="about how long one turn lasts")
    parser.add_argument("--batch", type=int, nargs="+", help="batch sizes")
    parser.add_argument("--held", type=int, help="tokens in the cache")
    args = parser.parse_args(argv)
    s = QUICK if args.quick else Setting()
    if args.batch:
        s = dataclasses.replace(s, batches=tuple(args.batch))
    if args.held:
        s = dataclasses.replace(s, held=args.held)
    rounds, seconds = (2, 0.001) if args.quick else (args.rounds, args.seconds)
    measures = {
        "bytes": lambda: measure_bytes(s),
        "errors": lambda: measure_errors(s),
        "model": lambda: measure_model(s),
        "times": lambda: measure_times(s, rounds=rounds, seconds=seconds),
        "files": lambda: measure_files(s, rounds=rounds, seconds=seconds),
    }
    found = about(("jax", "jaxlib", "numpy", "torch", "transformers", "optimum-quanto"))
    found |= {name: measure() for name, measure in measures.items() if not args.only or name in args.only}
    print(table(found))
    if "times" in found or "files" in found:
        warn_if_busy(found)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
