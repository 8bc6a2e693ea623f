"""What every cache promises: a table of caches, and the laws that each of them meets.

A new kind of cache is one new row of `TABLE`; `test_contract.py` runs every law on it. All rows have the same sizes, so
that the laws can share their blocks of tokens, and most of what they compile. The laws about what JAX makes of a cache
(`grad`, `vmap`, `scan`, sharding) compile programs that no other law needs, so each of them names the rows that give it
programs of different kinds.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import re
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import (
    EMPTY,
    Cache,
    Chunk,
    Cross,
    Dense,
    Float8,
    Full,
    Int4,
    Int8,
    LayerSpec,
    Pages,
    Recurrent,
    Rows,
    StateLayer,
    Window,
)
from jaxkv.cache.bits import carrier
from jaxkv.nn.attend import attend
from jaxkv.nn.rotary import Rotary
from jaxkv.testing import states
from jaxkv.testing.programs import OPERATIONS, Machine, encode, forward, input_sizes

ROWS, CAPACITY, BLOCK = 4, 24, 4
ENCODED = np.array([5, 1, 4, 2], np.int32)  # lengths of the rows' encoder outputs
HEADS = Machine.HEADS


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table: a kind of cache."""

    specs: tuple[LayerSpec, ...]
    slack: int = 0
    stacked: bool = False
    layout: Any = Rows()  # noqa: RUF009 (frozen)

    def cache(self, **changes: Any) -> Cache:
        """Returns a cache without tokens; Cross layers have their rows' encoder outputs."""
        return encoded(self, self.empty(**changes))

    def empty(self, **changes: Any) -> Cache:
        sizes = {"num_rows": ROWS, "capacity": CAPACITY, "max_block": BLOCK, "slack": self.slack}
        return Cache.init(self.specs, stacked=self.stacked, layout=self.layout, **{**sizes, **changes})

    @property
    def layers(self) -> list[LayerSpec]:
        """The spec of each layer in the order of `forward`: a stack's layers follow one another."""
        if not self.stacked:
            return list(self.specs)
        return [spec for spec in dict.fromkeys(self.specs) for _ in range(self.specs.count(spec))]

    @property
    def sources(self) -> list[int]:
        """Whose keys and values each layer reads, its own or those of another, in the order of `layers`."""
        return [i if layer.shares is None else layer.shares for i, layer in enumerate(self.layers)]

    @property
    def dtypes(self) -> set[Any]:
        return {storage.dtype for spec in self.specs for storage in (spec.k_storage, spec.v_storage)}

    @property
    def turns(self) -> bool:
        """Whether all keys that have positions can be re-rotated to others."""
        return all(spec.rotary is not None for spec in self.specs if not isinstance(spec.reach, Cross))

    @property
    def recurs(self) -> bool:
        """Whether rows can only go on where they stand."""
        return any(isinstance(spec.reach, Recurrent) for spec in self.specs)

    @property
    def floats(self) -> bool:
        return all(jnp.issubdtype(dtype, jnp.floating) for dtype in self.dtypes)


@dataclasses.dataclass(frozen=True)
class Turn:
    """A rotary embedding of somebody else's: anything frozen with `shift` serves."""

    angle: float = 0.5

    def shift(self, k: Any, delta: Any) -> Any:
        a = self.angle * delta.astype(jnp.float32)
        x, y = jnp.split(k.astype(jnp.float32), 2, -1)
        return jnp.concatenate([x * jnp.cos(a) - y * jnp.sin(a), x * jnp.sin(a) + y * jnp.cos(a)], -1).astype(k.dtype)


def in_bits(storage: Any) -> bool:
    """Whether what is stored has no gradient."""
    return not isinstance(storage, Dense) or carrier(storage.dtype) != storage.dtype


def spec(
    reach: Any,
    k: Any = "float32",
    v: Any = None,
    *,
    value_dim: int | None = None,
    rotary: Any = None,
    shares: int | None = None,
) -> LayerSpec:
    return LayerSpec(reach, 2, 4, value_dim, Dense(k), Dense(v or k), rotary or Rotary(), shares=shares)


# Pairwise: every reach with every dtype, stacked and not, with and without slack, alone and mixed.
TABLE = {
    "full": Case((spec(Full()),)),
    "full-int8-unturned": Case((LayerSpec(Full(), 2, 4, 6, Dense("int8"), Dense("int8")),), slack=2),
    "window-slack": Case((spec(Window(5), rotary=Turn()),), slack=6),
    "window-sinks-float16": Case((spec(Window(5, sinks=2), "float16", "float32"),)),
    "window-wide-bfloat16": Case((spec(Window(30, sinks=3), "bfloat16", "float16", value_dim=6),), slack=1),
    "chunk-stacked": Case((spec(Chunk(4)), spec(Chunk(4))), slack=3, stacked=True),
    "one-token-reaches": Case((spec(Window(1), "float32", "bfloat16", value_dim=2), spec(Chunk(1), "float16"))),
    "mixture": Case(
        (
            spec(Full()),
            spec(Window(5, sinks=2), "float32", "float16"),
            spec(Window(5, sinks=2), "float32", "float16", shares=1),
            spec(Chunk(7)),
        ),
        slack=2,
    ),
    "mixture-stacked-bfloat16": Case(
        (spec(Window(3, sinks=1), "bfloat16"), spec(Full(), "bfloat16"), spec(Window(3, sinks=1), "bfloat16")),
        stacked=True,
    ),
    "encoder-decoder": Case((spec(Window(5)), LayerSpec(Cross(5), 2, 4), spec(Full()), LayerSpec(Cross(5), 2, 4))),
    "encoder-decoder-stacked-float16": Case(
        (spec(Chunk(4)), LayerSpec(Cross(6), 2, 4, 6, Dense("float16"), Dense("float16"))) * 2, slack=2, stacked=True
    ),
    "small-floats": Case(
        (spec(Window(5, sinks=1), "float8_e4m3fn", "float4_e2m1fn", value_dim=5), spec(Full(), "float8_e5m2", "int4")),
    ),
    "small-floats-stacked": Case((spec(Full(), "float8_e4m3fn"),) * 2, stacked=True),
    "quantized": Case(
        (
            LayerSpec(Full(), 2, 4, 6, Int8(), Float8(), Rotary()),
            LayerSpec(Window(5, sinks=1), 2, 4, None, Int4(group=2), Int8(rotate=False), Rotary(), "read"),
        ),
        slack=2,
    ),
    "quantized-stacked-pages": Case(
        (LayerSpec(Chunk(4), 2, 4, 8, Int4(group=1), Float8("e5m2"), Rotary()),) * 2,
        stacked=True,
        layout=Pages(ROWS * CAPACITY // 2, 2),
    ),
    # A key that begins with its value, and one that is nothing else.
    "values-in-keys": Case(
        (
            LayerSpec(Window(5, sinks=1), 2, 6, 4, Dense("float16"), rotary=Rotary(), v_in_k=True),
            LayerSpec(Full(), 2, 4, rotary=Rotary(), rotary_at="read", v_in_k=True),
        ),
        slack=2,
        layout=Pages(ROWS * CAPACITY // 2, 2),
    ),
    # As many pages as rows can fill. Pages of 2 make no ring longer, those of 16 do.
    "mixture-pages": Case(
        (
            spec(Full()),
            spec(Window(5, sinks=2), "float32", "float16"),
            spec(Chunk(7)),
            spec(Full(), shares=0),
        ),
        slack=2,
        layout=Pages(ROWS * CAPACITY // 2, 2),
    ),
    "encoder-decoder-stacked-pages": Case(
        (
            spec(Window(5, sinks=1), "float8_e4m3fn", "float8_e5m2"),
            LayerSpec(Cross(6), 2, 4, 6, *[Dense("float16")] * 2),
        )
        * 2,
        stacked=True,
        layout=Pages(ROWS * 2, 16),
    ),
    "hybrid": Case(
        (spec(Full()), LayerSpec(Recurrent(state=(2, 4), tail=(4, 2), every=4, keep=2)), spec(Window(5))), slack=2
    ),
    "hybrid-stacked-pages": Case(
        (
            LayerSpec(Recurrent(state=(2, 2, 2), every=None, keep=1)),
            spec(Chunk(4), "float16"),
            *[LayerSpec(Recurrent(tail=(6, 1), every=3))] * 2,
        ),
        slack=3,
        stacked=True,
        layout=Pages(ROWS * CAPACITY // 2, 2),
    ),
}

# Rows that are nothing but parts of others are left to `make test-full`.
OVERLAPPING = {"full", "window-sinks-float16", "small-floats-stacked"}
CHOSEN = [name for name in TABLE if os.environ.get("JAXKV_FULL") or name not in OVERLAPPING]
# Rows that meet all laws with XLA's optimizations, as all rows do those of OF_PROGRAMS. Without them XLA has no int4.
OPTIMIZED = {"small-floats"}


# ---------------------------------------------------------------- feeding

LENGTH = CAPACITY
Seen = list[tuple[np.ndarray, ...]]  # per layer: slot positions, k, v, mask, attended


@functools.cache
def tokens(case: Case) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Keys and values of every layer for ROWS sequences: [ROWS, LENGTH, K, H]."""
    random = np.random.default_rng(0)
    sides: tuple[list[np.ndarray], list[np.ndarray]] = [], []
    for layer in case.layers:
        heads, *sizes = input_sizes(layer)
        for side, size, storage in zip(sides, sizes, (layer.k_storage, layer.v_storage), strict=True):
            x = random.normal(size=(ROWS, LENGTH, heads, size))
            whole = jnp.issubdtype(storage.dtype, jnp.integer)
            side.append(np.round(4 * x).astype(storage.dtype) if whole else x.astype(np.float32))
        if layer.v_in_k:
            sides[1][-1] = sides[0][-1][..., : layer.value_dim]
    return sides


def encoded(case: Case, cache: Cache) -> Cache:
    """Returns the cache with the encoder outputs of all rows: the last of the tokens, of which nothing else is made."""
    crosses = {layer.reach for layer in case.layers if isinstance(layer.reach, Cross)}
    for reach in crosses:
        sides = [[x[:, -reach.size :] for x in side] for side in tokens(case)]
        cache, _ = encode(cache, ENCODED, None, *sides, [None] * len(case.layers))  # traced as a `Machine` does
    return cache


def feed(
    case: Case, cache: Cache, positions: Any, rows: Any = None, *, who: Any = None, poison: int | None = None
) -> tuple[Cache, np.ndarray, np.ndarray, Seen]:
    """Feeds tokens of the sequences at these positions [B, T], and returns (cache, step.positions, step.ok, seen).

    Args:
      case: the kind of cache.
      cache: goes in, is not donated.
      positions: int [B, T].
      rows: int [B] or None, as for `begin`.
      who: int [B], whose tokens; None means those of the row.
      poison: a row all of whose keys and values are NaN.
    """
    positions = np.asarray(positions, np.int32)
    who = np.clip(np.arange(len(positions)) if rows is None else rows, 0, ROWS - 1) if who is None else np.asarray(who)
    at = np.clip(positions, 0, LENGTH - 1)
    sides = [[x[who[:, None], at] for x in side] for side in tokens(case)]
    if poison is not None:
        sides = [
            [np.where((who == poison)[:, None, None, None], np.float32(np.nan), x) for x in side] for side in sides
        ]
    rows = None if rows is None else np.asarray(rows, np.int32)
    wheres = [None] * len(case.layers)  # as a `Machine` calls it, so that it is traced once
    cache, *answers = forward(cache, positions, rows, np.zeros_like(positions), *sides, wheres, num_heads=HEADS)
    return cache, *jax.tree.map(np.asarray, answers)


def block(starts: Any, counts: Any = BLOCK, *, length: int = BLOCK) -> np.ndarray:
    """Returns positions [ROWS, length]: counts[row] tokens from starts[row] on, padding on the right."""
    starts, counts = np.broadcast_to(starts, ROWS)[:, None], np.broadcast_to(counts, ROWS)[:, None]
    columns = np.arange(length)
    return np.where(columns < counts, starts + columns, EMPTY)


def prefilled(case: Case, length: int = 2 * BLOCK) -> Cache:
    """Returns a cache whose rows hold the first `length` tokens of their sequences."""
    cache = case.cache()
    for start in range(0, length, BLOCK):
        cache, *_ = feed(case, cache, block(start, min(BLOCK, length - start)))
    return cache


def attended(case: Case, cache: Cache, blocks: Any, **options: Any) -> list[np.ndarray]:
    """Returns what the queries of a list of blocks get: per layer [ROWS, LENGTH, N, Hv], 0 where nothing was fed."""
    out = []
    for heads, _, size in map(input_sizes, case.layers):
        out.append(np.zeros((ROWS, LENGTH, HEADS * heads, size), np.float32))
    for positions in blocks:
        cache, got, _, seen = feed(case, cache, positions, **options)
        for (*_, y), x in zip(seen, out, strict=True):
            for row, column in np.argwhere(got != EMPTY):
                x[row, got[row, column]] = y[row, column]
    return out


@functools.cache
def whole(case: Case) -> list[np.ndarray]:
    """Returns attention over the whole sequences without any cache, in float64: per layer [ROWS, LENGTH, N, Hv]."""
    out = []
    ks, vs = tokens(case)
    for layer, source, q in zip(case.layers, case.sources, ks, strict=True):
        k, v = ks[source], vs[source]
        if isinstance(layer.reach, Recurrent):
            texts = zip(k, v, strict=True)
            reads = [[states.expected(layer.reach, x[:n], y[:n])[2] for n in range(1, LENGTH + 1)] for x, y in texts]
            out.append(np.concatenate([np.array(reads) * (h + 1) for h in range(HEADS)], 2))
            continue
        p = np.arange(LENGTH)
        see = np.array([[int(s <= q and sees(layer.reach, q, s)) for s in p] for q in p], bool)[None]  # [B or 1, Q, S]
        if isinstance(layer.reach, Cross):
            place = p - (LENGTH - layer.reach.size)
            see = ((place >= 0) & (place < ENCODED[:, None]))[:, None].repeat(LENGTH, 1)
        own, stored_v = (
            np.asarray(
                jnp.asarray(x).astype(storage.dtype)
                if isinstance(storage, Dense)
                else storage.decode(storage.encode(jnp.asarray(x)))
            ).astype(np.float64)
            for x, storage in (
                (k[..., k.shape[-1] - (layer.k_dim or k.shape[-1]) :], layer.k_storage),
                (v, layer.v_storage),
            )
        )
        stored_k = np.concatenate([stored_v, own], -1) if layer.v_in_k and layer.k_dim else own
        if layer.rotary_at == "read":
            stored_k = np.asarray(layer.rotary.rotate(jnp.asarray(stored_k, jnp.float32), p[None, :, None, None]))
        q = np.stack([q.astype(np.float64) * (h + 1) for h in range(HEADS)], 3)  # as `forward` makes its queries
        scores = np.einsum("bqkgh,bskh->bkgqs", q, stored_k) / np.sqrt(layer.head_dim)
        scores = np.where(see[:, None, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        y = np.einsum("bkgqs,bskh->bqkgh", weights, stored_v)
        out.append(y.reshape(ROWS, LENGTH, -1, layer.value_dim))
    return out


def sees(reach: Any, q: int, s: int) -> bool:
    match reach:
        case Window(size, sinks):
            return s > q - size or s < sinks
        case Chunk(size):
            return s // size == q // size
    return True


def held(case: Case, cache: Cache) -> list[tuple[np.ndarray, ...]]:
    """Returns what the rows hold, by position: per layer (which [R, C], k [R, C, K, H], v), 0 elsewhere."""
    _, _, _, seen = feed(case, cache, np.full((ROWS, 1), EMPTY))
    result = []
    for slots, k, v, *_ in seen:
        parts = [np.zeros((ROWS, CAPACITY, *x.shape[2:]), np.float64) for x in (slots, k, v)]
        for row, slot in np.argwhere(slots != EMPTY):
            for part, x in zip(parts, (np.ones_like(slots), k, v), strict=True):
                part[row, slots[row, slot]] = x[row, slot]
        result.append(tuple(parts))
    return result


def leaves(tree: Any) -> list[np.ndarray]:
    return [np.array(x) for x in jax.tree.leaves(tree)]


def assert_equal(a: Any, b: Any, rows: Any = slice(None)) -> None:
    """Bitwise, of trees whose leaves have the rows of the cache or of the call in front."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.atleast_1d(x)[rows], np.atleast_1d(y)[rows])


def assert_close(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=tolerance, atol=tolerance)


def assert_same_contents(case: Case, a: Cache, b: Cache) -> None:
    assert_equal((a.lengths, a.ok), (b.lengths, b.ok))
    assert_equal(held(case, a), held(case, b))


# ---------------------------------------------------------------- laws

LAWS: dict[str, Callable[[Case], None]] = {}
CASES: dict[str, list[str]] = {}  # names of the rows of the table that a law runs on
OF_PROGRAMS = {  # laws about the compiled program itself, and of different programs that are bitwise equal
    "a_compiled_decode_loop_copies_no_buffer",
    "a_compiled_loop_that_reorders_and_copies_rows_copies_no_buffer",
    "rows_on_pages_equal_rows_on_rows",
}


def law(function: Callable[[Case], None]) -> Callable[[Case], None]:
    LAWS[function.__name__] = function
    CASES[function.__name__] = CHOSEN
    return function


def law_on(*cases: str) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    """A law for some rows of the table, those that differ in kind for it."""

    def register(function: Callable[[Case], None]) -> Callable[[Case], None]:
        law(function)
        CASES[function.__name__] = list(cases)
        return function

    return register


@law
def any_split_into_blocks_equals_the_whole(case: Case) -> None:
    in_blocks = [block(start) for start in range(0, LENGTH, BLOCK)]
    one_by_one = [block(p, length=1) for p in range(LENGTH)]
    cuts = [0, 3, 4, 8, 9, 11, 15, 16, 20, 24]
    uneven = [block(a, b - a) for a, b in itertools.pairwise(cuts)]
    for blocks in (in_blocks, one_by_one, uneven):
        assert_close(attended(case, case.cache(), blocks), whole(case))


@law
def padding_is_inert(case: Case) -> None:
    cache = prefilled(case)
    layouts = {"right": [0, 1, 2], "left": [1, 2, 3], "middle": [0, 2, 3], "scattered": [0, 1, 3]}
    results = []
    for columns in layouts.values():
        positions = np.full((ROWS, BLOCK), EMPTY)
        positions[:, columns] = np.arange(8, 11)
        after, got, ok, seen = feed(case, cache, positions)
        np.testing.assert_array_equal(got, positions)
        assert ok.all()
        padded = np.setdiff1d(np.arange(BLOCK), columns)
        for *_, mask, out in seen:
            assert not mask[:, 0, padded].any()
            assert not out[:, padded].any()
        results.append((after, [out[:, columns] for *_, out in seen]))
    for after, out in results[1:]:
        assert_equal(after, results[0][0])
        assert_close(out, results[0][1])


@law
def a_row_alone_equals_the_row_in_a_batch(case: Case) -> None:
    blocks = [block(start) for start in range(0, LENGTH, BLOCK)]
    together = attended(case, case.cache(), blocks)
    alone = attended(case, case.cache(), [np.where(np.arange(ROWS)[:, None] == 2, b, EMPTY) for b in blocks])
    assert_equal([x[2] for x in alone], [x[2] for x in together])
    # Another shape, a flat batch: the same but for rounding. A state takes its tokens in order, in one batch row.
    cache = prefilled(case)
    _, got, _, seen = feed(case, cache, [[11], [EMPTY], [9], [8], [10], [8]], rows=[2, 1, 2, 2, 2, 0])
    if case.recurs:
        np.testing.assert_array_equal(got[:, 0], [EMPTY] * 5 + [8])
        return
    np.testing.assert_array_equal(got[:, 0], [11, EMPTY, 9, 8, 10, 8])
    for (*_, out), x in zip(seen, together, strict=True):
        assert_close(out[[0, 2, 3, 4], 0], x[2, [11, 9, 8, 10]])
        assert_close(out[5, 0], x[0, 8])


@law
def rows_by_name_equal_rows_in_order(case: Case) -> None:
    cache = prefilled(case)
    after, got, _, seen = feed(case, cache, [[8, 9], [8, 9], [8, EMPTY]], rows=[3, 0, ROWS])
    np.testing.assert_array_equal(got, [[8, 9], [8, 9], [EMPTY, EMPTY]])
    np.testing.assert_array_equal(after.lengths, [10, 8, 8, 10])
    for (*_, out), x in zip(seen, whole(case), strict=True):
        assert_close(out[:2], x[[3, 0], 8:10])
        assert not out[2].any()


@law
def the_old_value_is_unchanged(case: Case) -> None:
    cache = prefilled(case)
    before = leaves(cache)
    feed(case, cache, block(8))
    for name, args in operations(case).items():
        OPERATIONS[name](cache, *args)
    assert_equal(before, cache)


@law
def operations_keep_structure_and_dtypes(case: Case) -> None:
    cache = case.cache()
    abstract = jax.eval_shape(lambda: case.cache())
    kind = [(x.shape, x.dtype, False) for x in jax.tree.leaves(abstract)]

    def same(after: Any) -> None:
        assert jax.tree.structure(after) == jax.tree.structure(cache)
        assert [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(after)] == kind

    same(cache)
    for name, args in operations(case).items():
        same(jax.eval_shape(getattr(Cache, name), abstract, *args))
    for dtype in (np.int32, np.int16, np.uint8):
        same(jax.eval_shape(Cache.begin, abstract, np.zeros((ROWS, 1), dtype))[0])
    for rows in (2, 7):
        taken = jax.eval_shape(Cache.take, abstract, np.zeros(rows, np.int32))
        assert taken.num_rows == rows
        assert jax.tree.structure(taken) == jax.tree.structure(cache)
    assert cache.nbytes == abstract.nbytes == sum(x.nbytes for x in leaves(cache))


def operations(case: Case) -> dict[str, tuple[Any, ...]]:
    """Arguments for every operation that returns a cache."""
    i = np.int32
    args: dict[str, tuple[Any, ...]] = {
        "rewind": (np.array([5, 8, 0, 99], i),),
        "copy_prefix": (i(0), i(1), i(3)),
        "take": (np.array([3, 1, 1, -1], i),),
        "reset": (np.array([True, False, False, True]),),
        "retry": (np.array([True, False, False, True]),),
        "remove": (i(0), i(2)),
    }
    if case.turns:
        args["remove"] = (i(0), i(2), i(5))
    return args


@law
def decoding_compiles_once(case: Case) -> None:
    cache, *_ = feed(case, prefilled(case), block(8, length=1))
    compiled = forward._cache_size()
    for name, args in operations(case).items():
        after = OPERATIONS[name](cache, *args)
        for _ in range(2):
            after, *_ = feed(case, after, block(np.asarray(after.lengths), length=1))
    assert forward._cache_size() == compiled


@law_on(
    "full-int8-unturned",
    "mixture",
    "mixture-stacked-bfloat16",
    "encoder-decoder-stacked-float16",
    "small-floats",
    "encoder-decoder-stacked-pages",
    "hybrid",
)
def decoding_runs_in_compiled_loops_and_in_place(case: Case) -> None:
    steps = 6
    cache = prefilled(case)
    expected = cache
    for i in range(steps):
        expected, *_ = _decode(expected, jnp.full((ROWS, 1), 8 + i, jnp.int32))

    def scan(cache: Cache) -> Cache:
        def body(cache: Cache, _: Any) -> Any:
            return decode(cache, cache.lengths[:, None])

        return jax.lax.scan(body, cache, length=steps)[0]

    donated = jax.tree.map(jnp.copy, cache)
    after = jax.jit(scan, donate_argnums=0)(donated)
    assert all(x.is_deleted() for layer in donated.layers for x in jax.tree.leaves(layer.buffers))
    with pytest.raises(jaxkv.CacheError, match="donated"):
        donated.begin(jnp.zeros((ROWS, 1), jnp.int32))
    assert_close((after.lengths, held(case, after)), (expected.lengths, held(case, expected)))


@law_on(
    "full-int8-unturned",
    "chunk-stacked",
    "mixture",
    "mixture-stacked-bfloat16",
    "encoder-decoder-stacked-float16",
    "small-floats",
    "quantized",
    "quantized-stacked-pages",
    "mixture-pages",
    "encoder-decoder-stacked-pages",
)
def a_compiled_decode_loop_copies_no_buffer(case: Case) -> None:
    cache = jax.eval_shape(lambda: enlarged(case))

    def body(cache: Cache) -> Cache:
        return decode(cache, cache.lengths[:, None])[0]

    assert_in_place(cache, body)


@law_on(
    "mixture-stacked-bfloat16",
    "encoder-decoder-stacked-float16",
    "small-floats",
    "quantized",
    "quantized-stacked-pages",
    "mixture-pages",
)
def a_compiled_loop_that_reorders_and_copies_rows_copies_no_buffer(case: Case) -> None:
    cache = jax.eval_shape(lambda: enlarged(case, head_dim=128))  # the bookkeeping is copied

    def body(cache: Cache) -> Cache:
        rows = jnp.arange(ROWS, dtype=jnp.int32)[::-1]
        return cache.take(rows).copy_prefix(cache.lengths[0] % ROWS, 1, cache.lengths[1])

    assert_in_place(cache, body)


def assert_in_place(cache: Cache, body: Callable[[Cache], Cache]) -> None:
    """Reads off the compiled program that a donated loop over `body` makes no array of a buffer's size."""

    def loop(cache: Cache, until: Any) -> Cache:
        return jax.lax.while_loop(lambda c: (c.lengths < until).all(), body, cache)

    compiled = jax.jit(loop, donate_argnums=0).lower(cache, jax.ShapeDtypeStruct((), jnp.int32)).compile()
    both = [x for layer in cache.layers for x in layer.buffers[:2] if x is not None]
    buffers = jax.tree.leaves(both)
    # Of codes and scales the codes: scales are no larger than the bookkeeping.
    largest = [max(jax.tree.leaves(x), key=lambda y: y.size) for x in both]
    smallest = min(x.size * x.dtype.itemsize for x in largest)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(x.size * x.dtype.itemsize for x in buffers)
    assert memory.temp_size_in_bytes < smallest / 2
    copies = re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", compiled.as_text())
    shapes = [tuple(int(n) for n in shape.split(",")) for shape in copies]
    fewest, own = min(x.size for x in largest), {x.shape for x in buffers}
    assert not [shape for shape in shapes if np.prod(shape) >= fewest / 2 or shape in own]


def enlarged(case: Case, scale: int = 4096, head_dim: int = 32) -> Cache:
    """Returns the same kind of cache with buffers that dwarf everything else; only ever abstract."""

    def large(layer: LayerSpec) -> LayerSpec:
        reach = layer.reach
        if isinstance(reach, Recurrent):  # one state is a small part of them
            state, tail = (2, 16 * scale), (4, 4 * scale)
            one = dataclasses.replace(reach, keep=60, state=reach.state and state, tail=reach.tail and tail)
            return LayerSpec(one)
        if reach.size is not None:
            reach = dataclasses.replace(reach, size=max(reach.size, 4) * scale)
        return dataclasses.replace(
            layer, reach=reach, head_dim=head_dim + layer.v_in_k * layer.k_dim * head_dim, value_dim=head_dim
        )

    specs = [large(layer) for layer in case.specs]
    sizes = {"num_rows": ROWS, "capacity": CAPACITY * scale, "max_block": BLOCK}
    layout = case.layout
    if isinstance(layout, Pages):
        layout = Pages(layout.num_pages * scale, layout.page_size)
    return Cache.init(specs, stacked=case.stacked, slack=case.slack, layout=layout, **sizes)


def decode(cache: Cache, positions: Any) -> tuple[Cache, Any]:
    """One step of a model, with keys and values that depend on nothing but the position; a stack is scanned over."""
    cache, step = cache.begin(positions)
    layers, total = [], jnp.float32(0)
    for layer in cache.layers:
        heads, *sizes = input_sizes(layer.spec)
        x = jnp.sin(positions.astype(jnp.float32))[:, :, None, None]
        k, v = (jnp.broadcast_to(x, (*positions.shape, heads, size)) for size in sizes)

        def one(layer: Any, k: Any, v: Any, q: Any) -> Any:
            if isinstance(layer, StateLayer):
                layer, y = states.run(layer, step, k, v)
                return layer, y.sum()
            if layer.num_kept and not isinstance(layer.spec.reach, Cross):
                k_dtype, v_dtype = layer.spec.k_storage.dtype, layer.spec.v_storage.dtype
                layer = layer.put(step, (9 * k).astype(k_dtype), None if layer.spec.v_in_k else (9 * v).astype(v_dtype))
            read = layer if layer.num_kept else layers[layer.spec.shares]
            return layer, attend(q, read, step).sum()

        q = jnp.tile(k, (1, 1, HEADS, 1))
        if layer.num_stacked is None:
            layer, y = one(layer, k, v, q)
        else:

            def body(stack: Any, i: Any, k: Any = k, v: Any = v, q: Any = q, one: Any = one) -> Any:
                layer, y = one(stack.at(i), k, v, q)
                return layer.at(None), y

            layer, ys = jax.lax.scan(body, layer, jnp.arange(layer.num_stacked))
            y = ys.sum()
        layers.append(layer)
        total += y
    return cache.with_layers(layers), total


_decode = jax.jit(decode)


@law_on(
    "mixture",
    "mixture-stacked-bfloat16",
    "encoder-decoder",
    "mixture-pages",
    "hybrid",
    "encoder-decoder-stacked-pages",
)
def vmap_keeps_caches_apart(case: Case) -> None:
    one, other = prefilled(case), prefilled(case, 6)
    positions = jnp.stack([block(8, length=1), block(6, length=1)]).astype(jnp.int32)
    both = jax.tree.map(lambda *x: jnp.stack(x), one, other)
    after, _ = jax.jit(jax.vmap(decode))(both, positions)
    for i, cache in enumerate((one, other)):
        alone, _ = _decode(cache, positions[i])
        mine = jax.tree.map(lambda x, i=i: x[i], after)
        assert_close((mine.lengths, held(case, mine)), (alone.lengths, held(case, alone)))


@law_on("full-int8-unturned", "mixture-stacked-bfloat16", "hybrid-stacked-pages")
def sharding_changes_nothing(case: Case) -> None:
    assert_sharding_changes_nothing(case, jax.sharding.AxisType.Auto)


@law_on(
    "mixture",
    "encoder-decoder-stacked-float16",
    "encoder-decoder-stacked-pages",
    "hybrid",
)
def sharding_on_explicit_axes_changes_nothing(case: Case) -> None:
    assert_sharding_changes_nothing(case, jax.sharding.AxisType.Explicit)


def assert_sharding_changes_nothing(case: Case, kind: jax.sharding.AxisType) -> None:
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")
    mesh = jax.make_mesh((2, 2), ("rows", "heads"), axis_types=(kind,) * 2, devices=jax.devices()[:4])
    axes = "rows" if isinstance(case.layout, Rows) else None, "heads"  # a pool is that of all rows
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    stack = (None,) if case.stacked else ()
    wanted = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*stack, *axes))
    expected, cache = case.cache(), case.cache(sharding=sharding)
    for start in (0, BLOCK):
        expected, _, _, want = feed(case, expected, block(start))
        cache, _, _, seen = feed(case, cache, block(start))
        assert_close([out for *_, out in seen], [out for *_, out in want])
        divided = [layer.state if isinstance(layer, StateLayer) else (layer.k, layer.v) for layer in cache.layers]
        for x in jax.tree.leaves(divided):
            assert x.sharding.is_equivalent_to(wanted, x.ndim), x.sharding
    assert_equal(cache, expected)
    edited = edit(cache), edit(expected)  # several devices and one may move more slots than are held
    assert_same_contents(case, *edited)
    assert_equal(*([x.groups, x.recurrent, [y for y in x.layers if isinstance(y, StateLayer)]] for x in edited))


@jax.jit
def edit(cache: Cache) -> Cache:
    """Every operation that moves something, one after the other."""
    cache = cache.take(np.array([3, 1, 2, 0])).copy_prefix(1, 2, 6)
    if all(spec.rotary is not None or isinstance(spec.reach, Cross) for spec in cache.specs):
        cache = cache.remove(0, 2, 4)
    cache = cache.rewind(np.array([99, 99, 5, 99])).remove(3, 7)
    return cache.reset(np.array([False, True, False, False])).retry(np.array([True] * ROWS))


@law_on("mixture-pages")
def rows_on_pages_equal_rows_on_rows(case: Case) -> None:
    """Bitwise, as pages of this size make no buffer longer."""

    def seen(layout: Any) -> Any:
        kind = dataclasses.replace(case, layout=layout)
        before, seen = prefilled(kind), []
        for name, args in operations(kind).items():
            cache = OPERATIONS[name](before, *args)
            for length in (BLOCK, 1):
                cache, _, ok, answers = feed(kind, cache, block(np.asarray(cache.lengths), length=length))
                assert ok.all()
                seen.append([(mask, out) for *_, mask, out in answers])
            seen.append(held(kind, cache))
        _, _, _, answers = feed(kind, before, [[11], [EMPTY], [9], [8], [10], [8]], rows=[2, 1, 2, 2, 2, 0])
        return seen, [(mask, out) for *_, mask, out in answers]

    assert_equal(seen(case.layout), seen(Rows()))


@law
def nan_stays_in_its_row(case: Case) -> None:
    if not case.floats:
        pytest.skip("integers have no NaN")
    others = [0, 2, 3]
    blocks = [block(start) for start in range(0, LENGTH, BLOCK)]
    clean = attended(case, case.cache(), blocks)
    poisoned = attended(case, case.cache(), blocks, poison=1)
    assert_equal([x[others] for x in poisoned], [x[others] for x in clean])
    assert all(np.isnan(x[1]).all() for x in poisoned)
    # Nor does it outlive a reset, nor come out of slots that were never written.
    cache = case.cache()
    layers = jax.tree.map(
        lambda x: jnp.full_like(x, jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else ~0), cache.layers
    )  # all bits of a small float set: NaN
    cache = dataclasses.replace(cache, layers=layers)
    for positions in blocks:
        cache, *_ = feed(case, cache, positions, poison=1)
    cache = encoded(case, OPERATIONS["reset"](cache, np.ones(ROWS, bool)))
    assert_equal(attended(case, cache, blocks), clean)


@law
def idle_rows_are_untouched(case: Case) -> None:
    cache = prefilled(case)
    after, got, ok, seen = feed(case, cache, block([8, 8, 0, 0], [1, 3, 0, 0]))
    assert ok.all()
    assert (got[2:] == EMPTY).all()
    assert not any(out[2:].any() for *_, out in seen)
    np.testing.assert_array_equal(after.lengths, [9, 11, 8, 8])
    assert_equal(held(case, after), held(case, cache), rows=slice(2, None))
    after, *_ = feed(case, cache, np.full((ROWS, BLOCK), -7))  # any negative position is padding
    assert_equal(after, cache)


@law
def unknown_rows_and_empty_ranges_change_nothing(case: Case) -> None:
    cache = prefilled(case)
    i = np.int32
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("remove", (i(0), i(8))),
        ("remove", (i(0), i(99))),
        ("remove", (i(-1), i(0))),
        ("remove", (i(ROWS), i(0))),
        ("rewind", (np.array([8, 9, 99, 2**31 - 1], i),)),
        ("copy_prefix", (i(0), i(ROWS), i(3))),
        ("copy_prefix", (i(0), i(-1), i(3))),
        ("copy_prefix", (i(2), i(2), i(8))),
        ("reset", (np.zeros(ROWS, bool),)),
        ("retry", (np.ones(ROWS, bool),)),
    ]
    if "remove" in operations(case) and len(operations(case)["remove"]) == 3:
        ranges = [(0, 3, 3), (0, 5, 2), (0, 8, 9), (0, 20, 30), (-1, 0, 3), (ROWS, 0, 3)]
        calls += [("remove", (i(row), i(begin), i(end))) for row, begin, end in ranges]
    for name, args in calls:
        assert_same_contents(case, OPERATIONS[name](cache, *args), cache)
    taken = OPERATIONS["take"](cache, np.array([2, -1, ROWS, 2], i))
    np.testing.assert_array_equal(taken.lengths, [8, 0, 0, 8])
    assert_equal(
        held(case, taken)[0][0], np.stack([held(case, cache)[0][0][2]] + 3 * [np.zeros(CAPACITY)])[[0, 1, 1, 0]]
    )
    after, got, _, _ = feed(case, cache, [[8], [8], [EMPTY], [EMPTY], [8], [8]], rows=[-1, ROWS, 0, 1, 99, -99])
    assert (got == EMPTY).all()
    assert_equal(after, cache)


@law
def what_does_not_fit_takes_nothing(case: Case) -> None:
    full = prefilled(case, CAPACITY)
    full = OPERATIONS["rewind"](full, np.array([99, 22, 99, 99], np.int32))
    assert int(full.lengths[1]) == 22
    after, got, ok, seen = feed(case, full, block([24, 22, 0, 0], [1, 1, 0, 0], length=1))
    np.testing.assert_array_equal(ok, [False, True, True, True])
    np.testing.assert_array_equal(after.ok, [False, True, True, True])
    np.testing.assert_array_equal(after.lengths, [24, 23, 24, 24])
    np.testing.assert_array_equal(got[:, 0], [EMPTY, 22, EMPTY, EMPTY])
    assert not any(out[0].any() or mask[0].any() for *_, mask, out in seen)
    assert_equal(held(case, after), held(case, full), rows=[0, 2, 3])
    with pytest.raises(jaxkv.CacheFullError, match=r"0 \(holds 24\).*capacity 24"):
        after.check()
    # It takes nothing more, not even where there is room, until it may try again.
    back = OPERATIONS["rewind"](after, np.array([23, 99, 99, 99], np.int32))
    again, _, ok, _ = feed(case, back, block([23, 23, 0, 0], [1, 1, 0, 0], length=1))
    np.testing.assert_array_equal(ok, [False, True, True, True])
    again, _, ok, seen = feed(
        case, OPERATIONS["retry"](again, np.ones(ROWS, bool)), block([23, 0, 0, 0], [1, 0, 0, 0], length=1)
    )
    assert ok.all()
    again.check()
    for (*_, out), x in zip(seen, whole(case), strict=True):
        assert_close(out[0, 0], x[0, 23])
    # Nor does a position that comes twice, or one past the end, take the rest of its block with it.
    cache = prefilled(case)
    positions = [[8, 9, 8, 10], [8, 9, 10, 11], [8, 9, 10, CAPACITY], [EMPTY, EMPTY, EMPTY, EMPTY]]
    after, got, ok, _ = feed(case, cache, positions)
    np.testing.assert_array_equal(ok, [False, True, False, True])
    np.testing.assert_array_equal(after.lengths, [8, 12, 8, 8])
    assert_equal(held(case, after), held(case, cache), rows=[0, 2, 3])


@law
def a_block_of_max_block_always_fits(case: Case) -> None:
    for first in range(BLOCK):
        cache = case.cache()
        cache, *_ = feed(case, cache, block(0, first))
        for start in range(first, LENGTH - BLOCK + 1, BLOCK):
            cache, _, ok, _ = feed(case, cache, block(start))
            assert ok.all()
            np.testing.assert_array_equal(cache.lengths, [start + BLOCK] * ROWS)


@law
def a_rewind_within_slack_lands_exactly_and_goes_on_right(case: Case) -> None:
    cache = prefilled(case, 20)
    lengths = 20 - np.minimum(np.arange(ROWS), case.slack)
    back = OPERATIONS["rewind"](cache, lengths.astype(np.int32))
    np.testing.assert_array_equal(back.lengths, lengths)
    back = OPERATIONS["rewind"](cache, np.full(ROWS, 20 - case.slack, np.int32))
    np.testing.assert_array_equal(back.lengths, [20 - case.slack] * ROWS)
    _, _, ok, seen = feed(case, back, block(20 - case.slack, length=1))
    assert ok.all()
    for (*_, out), x in zip(seen, whole(case), strict=True):
        assert_close(out[:, 0], x[:, 20 - case.slack])


@law
def rewind_falls_back_to_where_decoding_is_right(case: Case) -> None:
    cache = prefilled(case, 20)
    for asked in (0, 3, 9, 14, 19):
        back = OPERATIONS["rewind"](cache, np.full(ROWS, asked, np.int32))
        landed = int(back.lengths[0])
        assert landed <= asked
        for row in range(2):
            assert int(OPERATIONS["resume_point"](cache, np.int32(row), np.int32(asked))) == landed
            assert bool(OPERATIONS["can_resume"](cache, np.int32(row), np.int32(asked))) == (landed == asked)
        _, _, ok, seen = feed(case, back, block(landed))
        assert ok.all()
        for (*_, out), x in zip(seen, whole(case), strict=True):
            assert_close(out, x[:, landed : landed + BLOCK])


@law
def copies_go_on_independently(case: Case) -> None:
    cache = prefilled(case)
    copied = OPERATIONS["copy_prefix"](cache, np.int32(0), np.int32(3), np.int32(8))
    taken = OPERATIONS["take"](cache, np.array([0, 1, 2, 0], np.int32))
    for twin in (copied, taken):
        _, _, ok, seen = feed(case, twin, block(8), who=[0, 1, 2, 0])
        assert ok.all()
        for (*_, out), x in zip(seen, whole(case), strict=True):
            assert_close(out[[0, 3]], x[[0, 0], 8:12])
        # Row 3 now says something else; row 0 must not hear of it.
        other, *_ = feed(case, twin, block([0, 0, 0, 8], [0, 0, 0, 4]), who=[0, 1, 2, 2])
        assert_equal(held(case, other), held(case, twin), rows=slice(0, 3))
        _, _, _, seen = feed(case, other, block([8, 0, 0, 0], [4, 0, 0, 0]))
        for (*_, out), x in zip(seen, whole(case), strict=True):
            assert_close(out[0], x[0, 8:12])


@law
def saved_rows_go_on_in_another_cache(case: Case) -> None:
    cache = prefilled(case, 14)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/rows"
        cache.save(path, rows=[2, 0])
        other = prefilled(case).load(path, rows=[1, 3])
    np.testing.assert_array_equal(other.lengths, [8, 14, 8, 14])
    for was, now in zip(held(case, cache), held(case, other), strict=True):
        assert_equal([x[[1, 3]] for x in now], [x[[2, 0]] for x in was])
    _, _, _, want = feed(case, cache, block(14))
    _, got, ok, seen = feed(case, other, block([8, 14, 8, 14]), who=[0, 2, 2, 0])
    assert ok.all() and (got != EMPTY).all()
    for (*_, out), (*_, x) in zip(seen, want, strict=True):
        assert_equal(out[[1, 3]], x[[2, 0]])


@law
def remove_closes_the_gap(case: Case) -> None:
    cache = prefilled(case)
    if not case.turns:
        with pytest.raises(jaxkv.NotSupportedError, match=r"rotary=None|Recurrent"):
            jax.eval_shape(Cache.remove, cache, np.int32(0), np.int32(2), np.int32(5))
        return
    after = OPERATIONS["remove"](cache, np.int32(1), np.int32(5), np.int32(7))
    np.testing.assert_array_equal(after.lengths, [8, 6, 8, 8])
    was, now = held(case, cache), held(case, after)
    assert_equal(now, was, rows=[0, 2, 3])
    for layer, (there, k, v), (there_now, k_now, v_now) in zip(case.layers, was, now, strict=True):
        if isinstance(layer.reach, Cross):
            assert_equal((there_now, k_now, v_now), (there, k, v))
            continue
        np.testing.assert_array_equal(there_now[1, :6], np.r_[there[1, :5], there[1, 7]])
        assert not there_now[1, 6:].any()
        np.testing.assert_array_equal(v_now[1, :6], np.r_[v[1, :5], v[1, 7:8]])
        np.testing.assert_array_equal(k_now[1, :5], k[1, :5])
        still = layer.head_dim - (layer.k_dim or layer.head_dim)
        turned = layer.rotary.shift(jnp.asarray(k[1, 7, :, still:], jnp.float32), jnp.full((2, 1), -2, jnp.int32))
        rounding = float(jnp.finfo(layer.k_storage.dtype).eps)
        if not isinstance(layer.k_storage, Dense) and layer.rotary_at == "put":
            rounding = 0.2
        assert_close(k_now[1, 5, :, still:], turned, 1e-5 if rounding < 1e-5 else max(rounding, 0.02))


@law_on(
    "mixture",
    "chunk-stacked",
    "mixture-stacked-bfloat16",
    "encoder-decoder",
    "values-in-keys",
    "mixture-pages",
    "encoder-decoder-stacked-pages",
)
def gradients_through_put_and_attend_are_those_of_the_plain_softmax(case: Case) -> None:
    cache = prefilled(case)
    random = np.random.default_rng(1)
    positions = [np.array([[8, 9, 10, 11], [8, 9, EMPTY, EMPTY], [EMPTY] * 4, [EMPTY, 8, 9, 10]], np.int32)]
    positions.append(np.array([[12, 13, 14, EMPTY], [EMPTY] * 4, [8, 9, 10, 11], [11, 12, 13, 14]], np.int32))

    def draw(heads: int, side: str) -> list[Any]:
        shapes = [(ROWS, BLOCK, heads * s.num_kv_heads, getattr(s, side)) for s in case.layers]
        return [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]

    ks, vs = ([draw(1, side) for _ in positions] for side in ("head_dim", "value_dim"))
    qs, weights = draw(HEADS, "head_dim"), draw(HEADS, "value_dim")

    def loss(inputs: Any, cache: Cache, read: Any) -> Any:
        ks, vs, qs = inputs
        outs = []
        for p, block_ks, block_vs in zip(positions, ks, vs, strict=True):
            cache, step = cache.begin(p)
            layers, inner = [], iter(zip(block_ks, block_vs, qs, strict=True))
            for layer in cache.layers:
                for i in range(layer.num_stacked or 1):
                    k, v, q = next(inner)
                    layer = layer if layer.num_stacked is None else layer.at(i)
                    if layer.num_kept and not isinstance(layer.spec.reach, Cross):
                        layer = layer.put(step, k, None if layer.spec.v_in_k else v)
                    if p is positions[-1]:  # keys and values of both blocks are seen from the second
                        outs.append(read(q, layer if layer.num_kept else layers[layer.spec.shares], step))
                layers.append(layer if layer.num_stacked is None else layer.at(None))
            cache = cache.with_layers(layers)
        return sum((jnp.sin(out) * weight).sum() for out, weight in zip(outs, weights, strict=True))

    def plain(q: Any, layer: Any, step: Any) -> Any:
        k, v, mask = layer.get(step)
        k, v = k.astype(q.dtype), v.astype(q.dtype)
        q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
        scores = jnp.einsum("btkgh,bskh->bkgts", q, k) / np.float32(np.sqrt(q.shape[-1]))
        weights = jax.nn.softmax(scores, axis=-1, where=mask[:, :, None])
        weights = jnp.where(mask[:, :, None], weights, 0)
        return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(*q.shape[:2], -1, v.shape[-1])

    gradient = jax.jit(jax.grad(loss), static_argnums=2)
    if any(in_bits(storage) for layer in case.specs for storage in (layer.k_storage, layer.v_storage)):
        with pytest.raises(jaxkv.NotSupportedError, match="are stored as bits"):
            gradient((ks, vs, qs), cache, attend)
        return
    got, want = (gradient((ks, vs, qs), cache, read) for read in (attend, plain))
    low = {jnp.dtype(jnp.float16), jnp.dtype(jnp.bfloat16)} & case.dtypes
    assert_close(got, want, 2e-2 if low else 1e-4)
    assert any(np.asarray(x).any() for x in jax.tree.leaves(want[:2]))
