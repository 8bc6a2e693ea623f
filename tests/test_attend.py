"""attend against plain NumPy in float64, and the laws it promises."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import EMPTY, Cache, Chunk, Full, LayerSpec, Window

REACHES = (Full(), Window(40), Window(1500, sinks=2), Chunk(33))
FORMS = ("reference", "blockwise")


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def sees(reach, q, s, same_span=False):
    """One query position, one key position: the rule, word for word."""
    if q < 0 or s < 0 or (s > q and not same_span):
        return False
    if isinstance(reach, Window):
        return s > q - reach.size or s < reach.sinks
    if isinstance(reach, Chunk):
        return s // reach.size == q // reach.size
    return True


def numpy_attention(q, k, v, see, softcap=None, sinks=None, scale=None):
    """q [T, N, H], k [S, K, H], v [S, K, Hv], see [T, S] -> [T, N, Hv], one query and one head at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros((q.shape[0], q.shape[1], v.shape[2]))
    for t in range(q.shape[0]):
        if see[t].any():
            for n in range(q.shape[1]):
                head = n // (q.shape[1] // k.shape[1])
                scores = k[see[t], head] @ q[t, n] * (q.shape[2] ** -0.5 if scale is None else scale)
                if softcap is not None:
                    scores = softcap * np.tanh(scores / softcap)
                weights = np.exp(scores)
                total = weights.sum() + (0 if sinks is None else np.exp(np.float64(sinks[n])))
                out[t, n] = weights @ v[see[t], head] / total
    return out


# Every line differs from the others in several ways: [B, T, N, K, H, Hv], reach, softcap, sinks, spans, padding.
BLOCKS = {
    "plain": ((1, 5, 2, 2, 8, 8), Full(), None, False, False, False),
    "window of several tiles, grouped, sinks": ((2, 150, 6, 2, 8, 8), Window(40), None, True, False, True),
    "window with first tokens, soft cap": ((2, 150, 4, 2, 8, 4), Window(30, sinks=3), 2.0, False, False, True),
    "chunk with spans": ((2, 150, 3, 1, 4, 6), Chunk(33), None, True, True, True),
    "full with spans in order": ((1, 130, 2, 1, 4, 4), Full(), 1.5, True, True, False),
}


@pytest.fixture
def small_pieces(monkeypatch):
    """The smallest tiles and blocks, 64, so that few tokens are several of them."""
    monkeypatch.setattr("jaxkv.nn.plan._power", lambda x, least, most: least)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.usefixtures("small_pieces")
def test_a_block_over_itself_equals_numpy_and_so_do_gradients(name):
    (b, t, n, heads, size, value), reach, softcap, with_sinks, with_spans, padded = BLOCKS[name]
    rng = np.random.default_rng(1)
    q, k, v, w = (
        normal(2, b, t, n, size),
        normal(3, b, t, heads, size),
        normal(4, b, t, heads, value),
        normal(5, b, t, n, value),
    )
    sinks = normal(6, n) if with_sinks else None
    spans = rng.integers(0, 3, (b, t)).astype(np.int32) if with_spans else None
    positions = None
    if padded:  # holes in the middle, another order of the rows
        positions = np.where(rng.random((b, t)) < 0.2, EMPTY, np.arange(t)[None]).astype(np.int32)

    def loss(args, form):
        q, k, v, sinks = args
        options = dict(reach=reach, positions=positions, spans=spans, softcap=softcap, sink_logits=sinks)
        out = jaxkv.self_attend(q, k, v, implementation=form, **options)
        return (out * w).sum(), out

    results = [
        jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)((q, k, v, sinks), form) for form in FORMS
    ]
    at = np.broadcast_to(np.arange(t), (b, t)) if positions is None else positions
    same = (
        np.zeros((b, t, t), bool) if spans is None else (spans[:, :, None] == spans[:, None]) & (spans[:, :, None] != 0)
    )
    for row in range(b):
        see = np.array([[sees(reach, at[row, i], at[row, j], same[row, i, j]) for j in range(t)] for i in range(t)])
        want = numpy_attention(q[row], k[row], v[row], see, softcap, sinks)
        for (_, out), _ in results:
            np.testing.assert_allclose(out[row], want, atol=3e-6)
    (_, plain), (_, blockwise) = results
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(blockwise), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=1e-4)


# The cache of most tests below: more slots than one block, and not a whole number of blocks.
CAPACITY, HEADS, KV_HEADS, SIZE, VALUE = 2200, 4, 2, 8, 4
SPECS = [LayerSpec(reach, KV_HEADS, SIZE, VALUE) for reach in REACHES]


def tensors(positions, seed):
    """q, k, v of tokens at [B, T] positions: numbers that depend on row and position only."""
    at = np.asarray(positions)
    b, _ = at.shape
    table = [normal(seed + row, CAPACITY + 1, HEADS * SIZE + KV_HEADS * (SIZE + VALUE)) for row in range(b)]
    x = np.stack([table[row][at[row]] for row in range(b)])
    q, k, v = np.split(x, [HEADS * SIZE, HEADS * SIZE + KV_HEADS * SIZE], axis=-1)
    return (
        q.reshape(*at.shape, HEADS, SIZE),
        k.reshape(*at.shape, KV_HEADS, SIZE),
        v.reshape(*at.shape, KV_HEADS, VALUE),
    )


@partial(jax.jit, static_argnames="form")
def read_block(cache, positions, q, k, v, spans=None, form="blockwise"):
    cache, step = cache.begin(positions, spans=spans)
    layers = [layer.put(step, k, v) for layer in cache.layers]
    outs = [jaxkv.attend(q, layer, step, sink_logits=jnp.ones(HEADS), implementation=form) for layer in layers]
    return cache.with_layers(layers), outs


def test_decoding_from_a_cache_equals_numpy_with_gaps_idle_rows_and_padding():
    cache = Cache.init(SPECS, num_rows=3, capacity=CAPACITY, max_block=20)
    far = np.arange(1400, 1420)
    hole = np.where(np.arange(20) % 7 == 3, EMPTY, np.arange(20))
    calls = [
        np.stack([np.arange(20), hole, np.full(20, EMPTY)]),
        np.stack([np.arange(20, 40), far, np.full(20, EMPTY)]),
        np.array([[40], [1420], [EMPTY]]),
        np.array([[41], [2199], [0]]),
    ]
    held: list[set] = [set(), set(), set()]
    for positions in calls:
        q, k, v = tensors(positions, 10)
        cache, outs = read_block(cache, positions.astype(np.int32), q, k, v)
        for row in range(3):
            held[row] |= set(positions[row]) - {EMPTY}
            keys = np.array(sorted(held[row]), int)
            everything = np.tile(keys, (3, 1))
            _, all_k, all_v = tensors(everything, 10)
            for reach, out in zip(REACHES, outs, strict=True):
                see = np.array([[sees(reach, p, s) for s in keys] for p in positions[row]]).reshape(
                    positions.shape[1], len(keys)
                )
                want = numpy_attention(q[row], all_k[row], all_v[row], see, sinks=np.ones(HEADS))
                np.testing.assert_allclose(out[row], want, atol=3e-6)
    assert bool(cache.ok.all())


def test_rows_visited_one_after_the_other_give_the_same(monkeypatch):
    """The form for one CPU, which the several devices of the tests would not choose."""
    cache = Cache.init(SPECS, num_rows=3, capacity=CAPACITY, max_block=20)
    first = read_block(cache, *block_of([np.arange(20)] * 3))[0]
    far = read_block(first, *block_of([[EMPTY], [2100], [1300]]))[0]
    want = read_block(far, *block_of([[20], [EMPTY], [1301]]))[1]
    monkeypatch.setattr("jaxkv.nn.plan.pays_by_row", lambda spec: True)
    by_row = jax.jit(read_block.__wrapped__)
    got = by_row(far, *block_of([[20], [EMPTY], [1301]]))[1]
    alone = by_row(first, *block_of([[20], [2100], [EMPTY]]))[1]
    for one, other, neighbors in zip(want, got, alone, strict=True):
        np.testing.assert_allclose(one, other, atol=3e-6)
        np.testing.assert_array_equal(other[0], neighbors[0])
    q, k, v = normal(1, 2, 5, 2, 8), normal(2, 2, 5, 2, 8), normal(3, 2, 5, 2, 8)
    np.testing.assert_allclose(
        jaxkv.self_attend(q, k, v), jaxkv.self_attend(q, k, v, implementation="reference"), atol=3e-6
    )


def test_one_sequence_alone_is_right_at_every_fill():
    """Batch 1 ends in a block of a size that fits: each of the sizes, and their edges."""
    cache = Cache.init([LayerSpec(Full(), 1, 4)], num_rows=1, capacity=CAPACITY, max_block=1)
    k, v = normal(1, 1, 1, cache.layers[0].num_slots, 4), normal(2, 1, 1, cache.layers[0].num_slots, 4)
    layer = dataclasses.replace(cache.layers[0], k=jnp.asarray(k), v=jnp.asarray(v))
    _, step = cache.begin(jnp.zeros((1, 1), jnp.int32))
    q = normal(3, 1, 1, 2, 4)

    @jax.jit
    def at_fill(n):
        slots = jnp.arange(layer.num_slots, dtype=jnp.int32)[None]
        group = dataclasses.replace(step.groups[0], kv_positions=jnp.where(slots < n, slots, EMPTY), filled=n[None])
        here = dataclasses.replace(step, positions=n[None, None] - 1, groups=(group,))
        return jaxkv.attend(q, layer, here)

    for n in (1, 63, 64, 65, 129, 512, 513, 1023, 1024, 1025, 1100, 2048, 2049, 2112, 2113, 2200):
        want = numpy_attention(q[0], k[0].swapaxes(0, 1)[:n], v[0].swapaxes(0, 1)[:n], np.ones((1, n), bool))
        np.testing.assert_allclose(at_fill(jnp.int32(n))[0], want, atol=3e-6)


@pytest.mark.optimized
def test_a_row_does_not_depend_on_its_neighbors_not_by_one_bit():
    cache = Cache.init(SPECS, num_rows=3, capacity=CAPACITY, max_block=20)
    cache = read_block(cache, *block_of([np.arange(20)] * 3))[0]
    jump = read_block(cache, *block_of([[EMPTY], [2100], [1300]]))[0]
    idle = cache.reset(jnp.array([False, True, True]))
    nan = jax.tree.map(lambda x: x.at[1:].set(jnp.nan) if x.ndim == 4 else x, idle)
    results = [
        read_block(c, *block_of(last))[1]
        for c, last in (
            (cache, [[20], [20], [20]]),
            (jump, [[20], [2101], [1301]]),
            (idle, [[20], [EMPTY], [0]]),
            (nan, [[20], [EMPTY], [0]]),
        )
    ]
    for outs in results[1:]:
        for one, other in zip(results[0], outs, strict=True):
            np.testing.assert_array_equal(one[0], other[0])
    assert all(np.isfinite(out).all() for out in results[-1])


def block_of(positions):
    positions = np.asarray(positions, np.int32)
    return positions, *tensors(positions, 10)


def test_a_query_that_sees_nothing_gets_zeros():
    cache = Cache.init(SPECS, num_rows=3, capacity=CAPACITY, max_block=20)
    for form in FORMS:
        calls = block_of([[EMPTY], [3], [CAPACITY]])  # padding, a token, one that does not fit
        outs = read_block(cache, *calls, form=form)[1]
        for out in outs:
            assert (np.asarray(out[0]) == 0).all()
            assert (np.asarray(out[1]) != 0).all()
            assert (np.asarray(out[2]) == 0).all()


@partial(jax.jit, static_argnames=("form", "flat", "stacked"))
def through_put(cache, positions, q, k, v, sinks, w, form, flat=False, stacked=False):
    """A loss of what is read right after a put, and its gradients in q, k, v, sinks and all that was held before."""

    def loss(args):
        q, k, v, sinks, buffers = args
        rows = jnp.zeros(positions.shape[0], jnp.int32) if flat else None
        c, step = cache.begin(positions, rows=rows)
        total = 0.0
        for layer, (old_k, old_v) in zip(c.layers, buffers, strict=True):
            layer = dataclasses.replace(layer, k=old_k, v=old_v)
            layer = (layer.at(jnp.int32(1)) if stacked else layer).put(step, k, v)
            total += (jaxkv.attend(q, layer, step, softcap=3.0, sink_logits=sinks, implementation=form) * w).sum()
        return total

    buffers = [(layer.k, layer.v) for layer in cache.layers]
    return jax.value_and_grad(loss)((q, k, v, sinks, buffers))


@pytest.mark.parametrize("kind", ["rows", "flat", "stacked"])
def test_gradients_equal_those_of_the_reference_also_through_put(kind):
    flat, stacked = kind == "flat", kind == "stacked"
    specs = [LayerSpec(reach, KV_HEADS, SIZE, VALUE) for reach in (Full(), Window(30, sinks=1))] * (2 if stacked else 1)
    cache = Cache.init(specs, num_rows=2, capacity=200, max_block=100, stacked=stacked)
    first = np.stack([np.arange(100), np.where(np.arange(100) % 5 == 0, EMPTY, np.arange(100))])
    cache, _ = jax.jit(Cache.begin)(cache, first.astype(np.int32))
    fill = iter(range(100))
    layers = [
        dataclasses.replace(
            x, k=jnp.asarray(normal(next(fill), *x.k.shape)), v=jnp.asarray(normal(next(fill), *x.v.shape))
        )
        for x in cache.layers
    ]
    cache = cache.with_layers(layers)
    positions = np.array([[100], [101], [102]]) if flat else np.array([[100, EMPTY, 101], [100, 101, 102]])
    positions = positions.astype(np.int32)
    q, k, v = (x[..., :] for x in tensors(positions, 20))
    w = normal(30, *positions.shape, HEADS, VALUE)
    want, got = (through_put(cache, positions, q, k, v, normal(31, HEADS), w, form, flat, stacked) for form in FORMS)
    for one, other in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-4)
    assert np.abs(got[1][4][0][0]).max() > 0.01  # what was held before has a gradient


def test_nan_in_slots_that_nobody_sees_reaches_neither_result_nor_gradient():
    cache = Cache.init([LayerSpec(Window(30), KV_HEADS, SIZE, VALUE)], num_rows=2, capacity=200, max_block=100)
    positions = np.array([[0, EMPTY, 1], [EMPTY, EMPTY, EMPTY]], np.int32)
    q, k, v = tensors(positions, 20)
    w, sinks = normal(30, 2, 3, HEADS, VALUE), normal(31, HEADS)
    bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan) if x.ndim == 4 else x, cache)
    nan_q = np.where((positions == EMPTY)[:, :, None, None], np.float32(np.nan), q)
    for form in FORMS:
        clean = through_put(cache, positions, q, k, v, sinks, w, form)
        dirty = through_put(bad, positions, nan_q, k, v, sinks, w, form)
        for one, other in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
            np.testing.assert_array_equal(one, other)


PICTURES = {
    Full(): """
        1000000
        1100000
        1110000
        1111000
        1111100
        1111110
        1111111""",
    Window(2, sinks=1): """
        1000000
        1100000
        1110000
        1011000
        1001100
        1000110
        1000011""",
    Chunk(3): """
        1000000
        1100000
        1110000
        0001000
        0001100
        0001110
        0000001""",
}


@pytest.mark.parametrize("reach", PICTURES, ids=repr)
def test_the_receptive_field_is_what_the_reach_says(reach):
    q, k, v = normal(1, 1, 7, 1, 4), normal(2, 1, 7, 1, 4), normal(3, 1, 7, 1, 4)

    def one(query, v):
        return jaxkv.self_attend(q, k, v, reach=reach)[0, query].sum()

    field = jax.jit(jax.vmap(jax.grad(one, 1), (0, None)))(jnp.arange(7), v)[:, 0, :, 0, 0] != 0
    drawn = "\n".join("".join("01"[int(x)] for x in row) for row in field)
    assert drawn == re.sub(r" +", "", PICTURES[reach].strip())


def test_spans_see_each_other_in_both_directions():
    q, k, v = normal(1, 1, 5, 1, 4), normal(2, 1, 5, 1, 4), normal(3, 1, 5, 1, 4)
    spans = jnp.array([[0, 7, 7, 7, 0]])

    def one(query, v):
        return jaxkv.self_attend(q, k, v, spans=spans)[0, query].sum()

    field = jax.jit(jax.vmap(jax.grad(one, 1), (0, None)))(jnp.arange(5), v)[:, 0, :, 0, 0] != 0
    drawn = ["".join("01"[int(x)] for x in row) for row in field]
    assert drawn == ["10000", "11110", "11110", "11110", "11111"]


def test_spans_in_a_cache_equal_the_reference():
    cache = Cache.init(SPECS[1:3], num_rows=3, capacity=CAPACITY, max_block=20)
    positions, q, k, v = block_of([np.arange(20), np.arange(1490, 1510), np.full(20, EMPTY)])
    spans = np.where(np.arange(20) % 10 < 6, np.arange(20) // 10 + 1, 0) * np.ones((3, 1), int)
    want, got = (read_block(cache, positions, q, k, v, spans.astype(np.int32), form=form)[1] for form in FORMS)
    for one, other in zip(want, got, strict=True):
        np.testing.assert_allclose(one, other, atol=3e-6)


@pytest.mark.optimized
def test_a_long_prompt_never_has_an_array_of_queries_times_slots():
    length = 4096
    cache = jax.eval_shape(lambda: Cache.init([LayerSpec(Full(), 1, 8)], 1, length, max_block=length))

    def prefill(cache, q, k, v):
        cache, step = cache.begin(jnp.arange(length, dtype=jnp.int32)[None])
        layer = cache.layers[0].put(step, k, v)
        return jaxkv.attend(q, layer, step), cache.with_layers([layer])

    x = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
    q = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
    forward = jax.jit(prefill, donate_argnums=0).lower(cache, q, x, x).compile()
    backward = jax.jit(jax.grad(lambda q, k, v: jaxkv.self_attend(q, k, v).sum(), (0, 1, 2))).lower(q, x, x).compile()
    for compiled in (forward, backward):
        assert compiled.memory_analysis().temp_size_in_bytes < length * length // 4  # a mask of bools would be 4 x that
        assert not re.search(rf"\[[\d,]*{length},{length}[\d,]*\]", compiled.as_text())


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("batch", "dtype", "page_size"), [(1, "float32", None), (2, "float16", None), (1, "int8", None), (2, "float32", 48)]
)
def test_a_decode_step_has_no_temporary_of_cache_size(batch, dtype, page_size):
    capacity = 65536
    spec = LayerSpec(Full(), 2, 16, None, jaxkv.Dense(dtype), jaxkv.Dense(dtype))
    layout = jaxkv.Rows() if page_size is None else jaxkv.Pages(batch * capacity // page_size, page_size)
    cache = jax.eval_shape(lambda: Cache.init([spec], batch, capacity, layout=layout))

    def decode(cache, x):
        def body(i, carry):
            cache, x = carry
            cache, step = cache.begin(jnp.full((batch, 1), i, jnp.int32))
            layer = cache.layers[0].put(step, x.astype(dtype), x.astype(dtype))
            return cache.with_layers([layer]), jaxkv.attend(x, layer, step)

        return jax.lax.fori_loop(0, 100, body, (cache, x))

    x = jax.ShapeDtypeStruct((batch, 1, 2, 16), jnp.float32)
    compiled = jax.jit(decode, donate_argnums=0).lower(cache, x).compile()
    size = ",".join(map(str, cache.layers[0].k.shape))
    assert not re.search(rf"\[{size}\]\S* copy\(", compiled.as_text())
    if page_size is not None:  # nor are the pages of a row gathered
        others = compiled.as_text().replace(f"[{size}]", "")
        assert not re.search(rf"\[[\d,]*{-(-capacity // page_size)},[\d,]*16\]", others)
    buffer = batch * 2 * capacity * 16 * jnp.dtype(dtype).itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < buffer // 2


def test_scan_remat_and_vmap_give_the_same_gradients():
    q, k, v = normal(1, 3, 1, 70, 2, 4), normal(2, 3, 1, 70, 1, 4), normal(3, 3, 1, 70, 1, 4)

    def one(q, k, v):
        return (jaxkv.self_attend(q, k, v, reach=Window(9)) ** 2).sum()

    def scanned(q, k, v):
        return jax.lax.scan(jax.checkpoint(lambda total, x: (total + one(*x), None)), 0.0, (q, k, v))[0]

    def mapped(q, k, v):
        return jax.vmap(one)(q, k, v).sum()

    want = [
        jnp.stack(x)
        for x in zip(*(jax.jit(jax.grad(one, (0, 1, 2)))(*x) for x in zip(q, k, v, strict=True)), strict=True)
    ]
    for form in (scanned, mapped):
        for one_grad, other in zip(want, jax.jit(jax.grad(form, (0, 1, 2)))(q, k, v), strict=True):
            np.testing.assert_allclose(one_grad, other, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_goes_in_and_comes_out_but_is_not_computed_in(dtype):
    q, k, v = (jnp.asarray(normal(i, 1, 6, 2, 8)).astype(dtype) for i in range(3))
    want = jaxkv.self_attend(*(x.astype(jnp.float32) for x in (q, k, v)))
    for form in FORMS:
        out = jaxkv.self_attend(q, k, v, implementation=form)
        assert out.dtype == dtype
        np.testing.assert_array_equal(out.astype(jnp.float32), want.astype(dtype).astype(jnp.float32))


def test_scale_is_taken_as_given():
    q, k, v = normal(1, 1, 4, 2, 8), normal(2, 1, 4, 2, 8), normal(3, 1, 4, 2, 8)
    want = numpy_attention(q[0], k[0], v[0], np.tri(4, dtype=bool), scale=0.3)
    for form in FORMS:
        np.testing.assert_allclose(jaxkv.self_attend(q, k, v, scale=0.3, implementation=form)[0], want, atol=1e-6)


def bad(match, **changes):
    return pytest.param(changes, match, id=match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        bad("3 query heads are not a multiple of 2 kv heads; 2 would be", q=jnp.zeros((1, 1, 3, 8))),
        bad("q has head_dim 4, the keys have 8", q=jnp.zeros((1, 1, 2, 4))),
        bad(r"q has \[B, T\] = \(2, 1\), the call's positions have \(1, 1\)", q=jnp.zeros((2, 1, 2, 8))),
        bad(r"q has shape \(1, 2, 8\); attend needs \[B, T, N, H\]", q=jnp.zeros((1, 2, 8))),
        bad("q is int32; attend needs a floating dtype", q=jnp.zeros((1, 1, 2, 8), jnp.int32)),
        bad("softcap=0: it bounds the scores and must be above 0", softcap=0),
        bad(r"sink_logits has shape \(3,\); give one per query head: \(2,\)", sink_logits=jnp.zeros(3)),
        bad("sink_logits is int32", sink_logits=jnp.zeros(2, jnp.int32)),
        bad("implementation='fast'; choose one of 'auto', 'reference', 'blockwise'", implementation="fast"),
    ],
)
def test_wrong_arguments_are_named(changes, match):
    cache = Cache.init([LayerSpec(Full(), 2, 8)], num_rows=1, capacity=4)
    cache, step = cache.begin(jnp.zeros((1, 1), jnp.int32))
    arguments = {"q": jnp.zeros((1, 1, 2, 8)), **changes}
    with pytest.raises(ValueError, match=match):
        jaxkv.attend(arguments.pop("q"), cache.layers[0], step, **arguments)


def test_arguments_in_another_order_are_named():
    cache = Cache.init([LayerSpec(Full(), 2, 8)], num_rows=1, capacity=4)
    cache, step = cache.begin(jnp.zeros((1, 1), jnp.int32))
    with pytest.raises(ValueError, match=r"layer is of type Array.*; give attend\(q, layer, step\)"):
        jaxkv.attend(cache.layers[0], jnp.zeros((1, 1, 2, 8)), step)


def test_self_attend_names_keys_and_values_that_do_not_fit():
    q = jnp.zeros((1, 3, 2, 8))
    with pytest.raises(ValueError, match=r"k \(1, 3, 2, 8\) and v \(1, 4, 2, 8\)"):
        jaxkv.self_attend(q, q, jnp.zeros((1, 4, 2, 8)))
    with pytest.raises(ValueError, match=r"positions must be int32 \[B, T\] = \(1, 3\), got float32"):
        jaxkv.self_attend(q, q, q, positions=jnp.zeros((1, 3)))


@pytest.mark.usefixtures("small_pieces")
def test_cross_attend_sees_all_keys_up_to_the_length_and_so_does_a_cross_layer():
    b, t, s, n, heads = 3, 150, 300, 4, 2  # several tiles and blocks
    q, w, k, v = normal(0, b, t, n, 8), normal(3, b, t, n, 6), normal(1, b, s, heads, 8), normal(2, b, s, heads, 6)
    lengths = jnp.array([s, 70, 0])
    see = np.arange(s)[None, :] < np.asarray(lengths)[:, None]
    want = [numpy_attention(q[i], k[i], v[i], np.tile(see[i], (t, 1)), softcap=2.0) for i in range(b)]

    def fresh(k, v, form):
        return jaxkv.cross_attend(q, k, v, lengths=lengths, softcap=2.0, implementation=form)

    def cached(k, v, form):
        cache = Cache.init([LayerSpec(jaxkv.Cross(s), heads, 8, 6)], b, t, max_block=t)
        cache, step = cache.begin_cross(lengths)
        layer = cache.layers[0].put(step, k, v)
        _, step = cache.begin(jnp.tile(jnp.arange(t)[::-1], (b, 1)))  # the order of the queries is all one
        return jaxkv.attend(q, layer, step, softcap=2.0, implementation=form)

    gradient = jax.jit(
        jax.value_and_grad(lambda k, v, read, form: (read(k, v, form) * w).sum(), (0, 1)),
        static_argnums=(2, 3),
    )
    _, reference = gradient(k, v, fresh, "reference")
    for read in (fresh, cached):
        np.testing.assert_allclose(jax.jit(read, static_argnums=2)(k, v, "blockwise"), want, atol=2e-6)
        for got, should in zip(gradient(k, v, read, "blockwise")[1], reference, strict=True):
            np.testing.assert_allclose(got, should, atol=2e-5)
            assert not np.asarray(got)[~see].any()
    assert jaxkv.cross_attend(q, k, v).shape == w.shape


# A call over nothing


@pytest.mark.parametrize("form", ["auto", "reference"])
@pytest.mark.parametrize("sizes", [(0, 3, 2), (2, 0, 2), (2, 3, 0)], ids=["no rows", "no queries", "no keys"])
def test_nothing_gives_nothing_and_so_does_its_gradient(sizes, form):
    b, t, s = sizes
    q, sinks = jnp.ones((b, t, 2, 4)), jnp.ones(2)
    k, v = jnp.ones((b, s, 1, 4)), jnp.ones((b, s, 1, 6))

    def cross(q, k, v, sinks):
        return jaxkv.cross_attend(q, k, v, sink_logits=sinks, implementation=form)

    calls = [(cross, (q, k, v, sinks))]
    if s:  # over itself there are as many keys as queries
        k, v = jnp.ones((b, t, 1, 4)), jnp.ones((b, t, 1, 6))
        calls.append((lambda q, k, v, _: jaxkv.self_attend(q, k, v, implementation=form), (q, k, v, sinks)))
        cache = Cache.init([LayerSpec(Full(), 1, 4, 6)], b + 1, 4)
        step = cache.begin(jnp.zeros((b + 1, t + 1), jnp.int32))[1]
        step = dataclasses.replace(jax.tree.map(lambda x: x[:b], step), positions=step.positions[:b, :t])
        layer = dataclasses.replace(cache.layers[0], k=cache.layers[0].k[:b], v=cache.layers[0].v[:b])
        read = lambda q, *_: jaxkv.attend(q, layer, step, implementation=form)  # noqa: E731
        calls.append((read, (q, k, v, sinks)))
    for call, args in calls:
        assert call(*args).shape == (b, t, 2, 6)
        assert not call(*args).any()
        for x, d in zip(args, jax.grad(lambda *a, call=call: call(*a).sum(), (0, 1, 2, 3))(*args), strict=True):
            assert d.shape == x.shape
            assert not d.any()
        assert jax.jit(call)(*args).dtype == q.dtype


# What is read


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Watched:
    """A layer that notes which slots are read: (first, how many)."""

    layer: jaxkv.Layer
    reads: list = dataclasses.field(metadata={"static": True})

    def __hash__(self):
        return id(self.reads)

    def __getattr__(self, name):
        return getattr(self.layer, name)

    def pieces(self, step, start, size):
        jax.debug.callback(lambda start: self.reads.append((int(start), size)), start)
        return self.layer.pieces(step, start, size)


@pytest.mark.parametrize(
    ("reach", "at", "most"),
    [
        (Window(128, sinks=4), (1000, 20, 643 + 64), (256, 64, 256)),  # the last one lies around the end of its ring
        (Chunk(256), (1000, 1023, 1024), (256, 320, 64)),
    ],
    ids=repr,
)
def test_a_step_of_a_window_layer_reads_its_window_and_not_its_ring(reach, at, most):
    cache = Cache.init([LayerSpec(reach, 1, 4)], 3, 4096, max_block=512)

    @jax.jit
    def fill(cache, positions, k):
        cache, step = cache.begin(positions)
        return cache.with_layers([cache.layers[0].put(step, k, k)])

    for start in (0, 512):
        p = np.tile(np.arange(start, start + 512, dtype=np.int32), (3, 1))
        cache = fill(cache, np.where(p < np.array(at)[:, None], p, EMPTY), normal(start, 3, 512, 1, 4))
    reads = []

    @jax.jit
    def decode(cache, positions, q):
        cache, step = cache.begin(positions)
        layer = cache.layers[0].put(step, q, q)
        plain = jaxkv.attend(q, layer, step, implementation="reference")
        return jaxkv.attend(q, Watched(layer, reads), step), plain

    def count(rows):
        reads.clear()
        positions = np.array([[p if row in rows else EMPTY] for row, p in enumerate(at)], np.int32)
        got, want = decode(cache, positions, normal(2, 3, 1, 1, 4))
        jax.effects_barrier()
        np.testing.assert_allclose(got, want, atol=3e-6)
        return sum(size for _, size in reads)

    alone = [count([row]) for row in range(3)]
    assert all(reach.sinks < n <= m for n, m in zip(alone, most, strict=True))
    assert max(alone) <= count([0, 1, 2]) <= min(sum(alone), cache.layers[0].num_slots)
    assert count([]) == 0


# Dropout


def drop(args, form="auto", rate=0.25, seed=0, broadcast=True, **options):
    options |= dict(dropout_rate=rate, dropout_key=jax.random.key(seed), broadcast_dropout=broadcast)
    return jaxkv.self_attend(*args[:3], sink_logits=args[3], implementation=form, **options)


@pytest.mark.parametrize("broadcast", [True, False])
@pytest.mark.usefixtures("small_pieces")
def test_every_form_leaves_out_the_same_weights_forward_and_backward(broadcast):
    args = normal(1, 2, 150, 4, 8), normal(2, 2, 150, 2, 8), normal(3, 2, 150, 2, 6), normal(4, 4)
    w = normal(5, 2, 150, 4, 6)

    @partial(jax.jit, static_argnums=1)
    def gradient(args, form):
        return jax.value_and_grad(lambda a: (drop(a, form, 0.4, 0, broadcast, softcap=3.0) * w).sum())(args)

    want, got = (gradient(args, form) for form in FORMS)
    for one, other in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(one, other, atol=3e-5, rtol=1e-4)


def test_dropout_leaves_out_its_share_and_keeps_the_expected_value():
    b, t, n = 2, 8, 4
    args = (
        normal(1, b, t, n, 4),
        normal(2, b, t, n, 4),
        np.tile(np.eye(t, dtype=np.float32)[None, :, None], (b, 1, n, 1)),
    )
    weights = np.asarray(
        drop((*args, None), rate=0.0, reach=Full(), spans=jnp.ones((b, t), jnp.int32))
    )  # v = 1: [B, T, N, S]

    @jax.jit
    def many(seeds, broadcast=False):
        def one(seed):
            return drop((*args, None), seed=seed, broadcast=broadcast, spans=jnp.ones((b, t), jnp.int32))

        return jax.vmap(one)(seeds)

    got = np.asarray(many(jnp.arange(500)))
    kept = got > 0
    np.testing.assert_allclose(got, np.where(kept, weights / 0.75, 0), atol=1e-5)  # a weight stays, larger, or goes
    np.testing.assert_allclose(got.mean(0), weights, atol=0.08)
    assert abs(kept.mean() - 0.75) < 0.005
    for axis in range(5):  # as often in every row, query, head and slot, and apart from its neighbor's fate
        others = tuple(i for i in range(5) if i != axis)
        assert np.abs(kept.mean(others) - 0.75).max() < (0.15 if axis == 0 else 0.015)
        one, other = np.delete(kept, 0, axis), np.delete(kept, -1, axis)
        assert abs((one & other).mean() - 0.75**2) < 0.01
    shared = np.asarray(
        jax.vmap(lambda s: drop((*args, None), seed=s, spans=jnp.ones((b, t), jnp.int32)))(jnp.arange(3))
    )
    assert ((shared > 0) == (shared > 0)[:, :1, :, :1]).all()
    assert ((shared > 0)[0] != (shared > 0)[1]).any()


def test_dropout_of_nothing_is_no_dropout_and_a_rate_needs_a_key():
    args = normal(1, 1, 5, 2, 4), normal(2, 1, 5, 2, 4), normal(3, 1, 5, 2, 4)
    for call in (jaxkv.self_attend, jaxkv.cross_attend):
        np.testing.assert_array_equal(call(*args), call(*args, dropout_rate=0.0))
        assert (call(*args) != call(*args, dropout_rate=0.5, dropout_key=jax.random.key(1))).any()
        with pytest.raises(ValueError, match=r"dropout_rate=0\.5 needs dropout_key, a PRNG key"):
            call(*args, dropout_rate=0.5)
        with pytest.raises(ValueError, match="dropout_rate=1: give a number from 0 to below 1"):
            call(*args, dropout_rate=1)


# The modes of JAX


MODES = [("jax_enable_x64", "jax_debug_nans"), ("jax_disable_jit",)]


@contextlib.contextmanager
def mode(names):
    before = {name: getattr(jax.config, name) for name in names}
    try:
        for name in names:
            jax.config.update(name, True)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


@pytest.mark.parametrize("names", MODES, ids=" and ".join)
@pytest.mark.usefixtures("small_pieces")
def test_attention_without_a_cache_is_the_same_in_every_mode(names):
    args = tuple(normal(i, 2, 70, heads, 4) for i, heads in enumerate((2, 1, 1)))
    lengths, positions = (
        np.array([70, 0]),
        np.where(np.arange(70) % 3 == 0, EMPTY, np.arange(70)) * np.ones((2, 1), int),
    )
    sinks = normal(5, 2)

    def loss(form, q, k, v, sinks):
        one = jaxkv.self_attend(q, k, v, reach=Window(9), sink_logits=sinks, softcap=2.0, implementation=form)
        holes = jaxkv.self_attend(q, k, v, reach=Window(9), positions=positions, implementation=form)
        options = dict(dropout_rate=0.3, dropout_key=jax.random.key(0), lengths=lengths, implementation=form)
        return ((one + holes + jaxkv.cross_attend(q, k, v, **options)) ** 2).sum()

    gradient = jax.value_and_grad(loss, (1, 2, 3, 4))
    want = jax.jit(gradient, static_argnums=0)("reference", *args, sinks)
    with mode(names):
        for form in FORMS if jax.config.jax_enable_x64 else FORMS[1:]:  # the reference has no loops to run without jit
            got = jax.jit(gradient, static_argnums=0)(form, *args, sinks)
            for one, other in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
                np.testing.assert_allclose(one, other, atol=3e-5, rtol=1e-4)
                assert one.dtype == other.dtype


@pytest.mark.parametrize("names", MODES, ids=" and ".join)
def test_attention_over_a_cache_is_the_same_in_every_mode(names, monkeypatch):
    monkeypatch.setattr("jaxkv.nn.plan.pays_by_row", lambda spec: True)
    specs = [LayerSpec(reach, KV_HEADS, SIZE, VALUE) for reach in (Full(), Window(70, sinks=2))]
    first, then = np.tile(np.arange(60, dtype=np.int32), (2, 1)), np.array([[60], [EMPTY]], np.int32)

    def run(flat, stacked):
        cache = Cache.init(specs[:1] * 2 if stacked else specs, num_rows=2, capacity=300, max_block=60, stacked=stacked)
        cache, _ = jax.jit(Cache.begin)(cache, first)
        layers = [dataclasses.replace(x, k=x.k + 0.5, v=x.v + 0.25) for x in cache.layers]
        q, k, v = tensors(then, 20)
        w = normal(30, 2, 1, HEADS, VALUE)
        step = through_put.__wrapped__
        return jax.jit(step, static_argnums=(7, 8, 9))(
            cache.with_layers(layers), then, q, k, v, normal(31, HEADS), w, "blockwise", flat, stacked
        )

    for kind in [(False, False), (True, True)][: len(names)]:
        want = run(*kind)
        with mode(names):
            got = run(*kind)
        for one, other in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-4)
            assert one.dtype == other.dtype
