"""The attention kernel in C++: right, alike whoever computes it, and no trouble where it can't be had."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import EMPTY, Cache, Chunk, Cross, Dense, Full, LayerSpec, NotSupportedError, Pages, Rows, Window, attend

N, K, H, HV, ROWS, CAPACITY = 6, 2, 24, 20, 3, 1216
REACHES = (Full(), Window(40, sinks=3), Chunk(600), Window(30), Cross(70))


pytestmark = pytest.mark.usefixtures("native_kernel")


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


ROWS_LAYOUT, FLOAT32 = Rows(), Dense()
SINKS = normal(5, N)


def filled(storage=FLOAT32, layout=ROWS_LAYOUT, stacked=False):
    """A cache whose rows hold 1,200, 600 (with gaps) and 0 tokens, and encoder outputs of 70, 5 and 0 places."""
    specs = [LayerSpec(reach, K, H, HV, storage, storage) for reach in REACHES]
    cache = Cache.init(
        specs[:1] * 3 if stacked else specs, ROWS, CAPACITY, max_block=1200, layout=layout, stacked=stacked
    )
    at = np.arange(1200)
    positions = np.stack([at, np.where((at < 600) & (at % 7 != 3), at, EMPTY), np.full(1200, EMPTY)])

    @jax.jit
    def fill(cache, positions, k, v):
        cache, step = cache.begin(positions)
        put = lambda layer: layer.put(step, k, v)  # noqa: E731
        if stacked:
            layers = [
                functools.reduce(
                    lambda stack, i: stack.at(i).put(step, k * (i + 1), v).at(None), range(3), cache.layers[0]
                )
            ]
        else:
            layers = [layer if layer.spec.reach == REACHES[4] else put(layer) for layer in cache.layers]
            cache, cross = cache.with_layers(layers).begin_cross(jnp.array([70, 5, 0]))
            layers[4] = layers[4].put(cross, k[:, :70], v[:, :70])
        return cache.with_layers(layers)

    return fill(
        cache,
        positions.astype(np.int32),
        normal(1, ROWS, 1200, K, H),
        normal(2, ROWS, 1200, K, HV),
    )


def in_numpy(q, layer, step, softcap):
    """Float64 attention over the reference form of a layer."""
    k, v, mask = (np.asarray(x, bool if x.dtype == bool else np.float64) for x in layer.get(step))
    groups = N // K
    scores = np.einsum("btkgh,bskh->bkgts", np.asarray(q, np.float64).reshape(*q.shape[:2], K, groups, H), k) * H**-0.5
    scores = np.where(mask[:, :, None], softcap * np.tanh(scores / softcap), -np.inf)
    p = np.exp(scores)
    total = p.sum(-1, keepdims=True) + np.exp(SINKS.astype(np.float64)).reshape(K, groups, 1, 1)
    return np.einsum("bkgts,bskh->btkgh", p / total, v).reshape(*q.shape[:3], HV)


@functools.partial(jax.jit, static_argnames=("form",))
def decode(cache, positions, q, rows=None, spans=None, form="native"):
    """Attention of a call over all layers; k and v of its own tokens are made of q."""
    cache, step = cache.begin(positions, rows=rows, spans=spans)
    k, v = q[:, :, :K], q[:, :, :K, :HV]
    layers = [layer if isinstance(layer.spec.reach, Cross) else layer.put(step, k, v) for layer in cache.layers]
    outs = [attend(q, layer, step, softcap=2.0, sink_logits=SINKS, implementation=form) for layer in layers]
    return outs, layers, step


@pytest.mark.parametrize("storage", [*map(Dense, ("float32", "float16", "bfloat16")), jaxkv.Int8()], ids=str)
def test_decoding_equals_numpy_with_every_reach_gaps_and_a_row_that_holds_nothing(storage):
    positions = np.array([[1200], [600], [EMPTY]], np.int32)
    q = normal(3, ROWS, 1, N, H)
    outs, layers, step = decode(filled(storage), positions, q)
    for out, layer in zip(outs, layers, strict=True):
        np.testing.assert_allclose(out, in_numpy(q, layer, step, 2.0), atol=1e-6)
    assert (np.asarray(outs[0][2]) == 0).all()


@pytest.mark.parametrize("layout", [Rows(), Pages(400, 16)], ids=["rows", "pages"])
def test_a_block_of_some_rows_in_another_order_equals_numpy_with_padding_and_spans(layout):
    cache = filled(layout=layout)
    positions = np.array([[600, EMPTY, 602, 604, 601], [1200, 1201, 1202, 1204, 1206]], np.int32)
    spans = np.array([[0, 0, 5, 0, 5], [0, 1, 1, 0, 0]], np.int32)
    q = normal(4, 2, 5, N, H)
    outs, layers, step = decode(cache, positions, q, np.array([1, 0]), spans)
    for out, layer in zip(outs, layers, strict=True):
        np.testing.assert_allclose(out, in_numpy(q, layer, step, 2.0), atol=1e-6)


def test_a_row_alone_equals_the_row_in_a_batch_bit_for_bit_and_nan_of_others_does_not_reach_it():
    cache, q = filled(), normal(3, ROWS, 1, N, H)
    together = decode(cache, np.array([[1200], [600], [0]], np.int32), q)[0]  # enough work for several threads
    for other in (np.array([[1200], [EMPTY], [EMPTY]]), np.array([[EMPTY], [600], [EMPTY]])):
        held = (other[:, 0] != EMPTY)[:, None, None, None]
        alone = cache.with_layers(
            [
                dataclasses.replace(x, k=jnp.where(held, x.k, jnp.nan), v=jnp.where(held, x.v, jnp.nan))
                for x in cache.layers
            ]
        )
        outs = decode(alone, other.astype(np.int32), q)[0]
        row = int(held.argmax())
        for one, all_of_them in zip(outs, together, strict=True):
            np.testing.assert_array_equal(one[row], all_of_them[row])


def test_sizes_that_vectors_do_not_divide_and_any_number_of_query_heads_equal_the_reference():
    @functools.partial(jax.jit, static_argnums=(3, 4))
    def run(q, k, v, size, form):
        cache = Cache.init([LayerSpec(Full(), 1, size)], 1, 64)
        cache, step = cache.begin(jnp.arange(13)[None])
        return attend(q, cache.layers[0].put(step, k, v), step, implementation=form)

    for heads, size in ((5, 3), (6, 40)):  # four at a time, and one or two
        args = normal(3, 1, 13, heads, size), normal(1, 1, 13, 1, size), normal(2, 1, 13, 1, size), size
        np.testing.assert_allclose(run(*args, "native"), run(*args, "reference"), atol=1e-6)


@pytest.mark.optimized
def test_a_traced_layer_of_a_stack_is_read_where_it_lies():
    cache, q = filled(stacked=True), normal(3, ROWS, 1, N, H)

    @functools.partial(jax.jit, static_argnums=2)
    def scan(cache, q, form):
        cache, step = cache.begin(cache.lengths[:, None])

        def body(stack, i):
            layer = stack.at(i).put(step, q[:, :, :K], q[:, :, :K, :HV])
            return layer.at(None), attend(q, layer, step, implementation=form)

        stack, outs = jax.lax.scan(body, cache.layers[0], jnp.arange(3, dtype=jnp.int32))
        return cache.with_layers([stack]), outs

    np.testing.assert_allclose(scan(cache, q, "native")[1], scan(cache, q, "reference")[1], atol=2e-6)
    compiled = jax.jit(scan.__wrapped__, static_argnums=2, donate_argnums=0).lower(cache, q, "native").compile()
    assert compiled.memory_analysis().temp_size_in_bytes < cache.layers[0].k.nbytes / 2


def loss(q, layer, step, form):
    return (attend(q, layer, step, softcap=2.0, sink_logits=SINKS, implementation=form) ** 2).sum()


def small():
    cache = Cache.init([LayerSpec(Window(5), K, H, HV)], ROWS, 64)
    cache, step = cache.begin(jnp.tile(jnp.arange(8), (ROWS, 1)))
    layer = cache.layers[0].put(step, normal(1, ROWS, 8, K, H), normal(2, ROWS, 8, K, HV))
    return normal(3, ROWS, 8, N, H), layer, step


def test_gradients_equal_those_of_the_reference():
    q, layer, step = small()

    def gradients(form):
        run = jax.jit(
            jax.value_and_grad(lambda q, k, v: loss(q, dataclasses.replace(layer, k=k, v=v), step, form), (0, 1, 2))
        )
        return run(q, layer.k, layer.v)

    for one, other in zip(jax.tree.leaves(gradients("native")), jax.tree.leaves(gradients("reference")), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)


class Own(Window):
    """A reach of somebody else's."""


def test_what_it_can_not_read_is_said_by_name_and_auto_reads_it_otherwise():
    specs = [
        LayerSpec(Full(), 1, 4, rotary=jaxkv.Rotary(), rotary_at="read"),
        LayerSpec(Full(), 1, 4, 4, Dense("float8_e4m3fn")),
        LayerSpec(Full(), 1, 4, 1025),
        LayerSpec(Own(8), 1, 4),
    ]
    reasons = ("rotate keys when it reads", "not Dense..float8_e4m3fn", "vectors of up to 1024", "and Cross, not Own")
    cache = Cache.init(specs, 1, 64)
    cache, step = cache.begin(jnp.array([[0]]))
    x = jnp.ones((1, 1, 1, 4))
    for layer, reason in zip(cache.layers, reasons, strict=True):
        layer = layer.put(step, x, jnp.ones((1, 1, 1, layer.spec.value_dim)))
        with pytest.raises(NotSupportedError, match=f"implementation='native'.*{reason}"):
            attend(x, layer, step, implementation="native")
        np.testing.assert_allclose(attend(x, layer, step), np.ones((1, 1, 1, layer.spec.value_dim)), atol=0.1)
    with pytest.raises(NotSupportedError, match="layers of a cache"):
        jaxkv.self_attend(x, x, x, implementation="native")
