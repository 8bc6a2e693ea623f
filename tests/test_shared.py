"""What rows share is read once, and nothing else changes."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import EMPTY, Cache, Cross, Full, LayerSpec, Pages, Rows, Window
from jaxkv.cache.arguments import FAR
from jaxkv.native import library
from jaxkv.testing import assert_shared

HEADS, KV_HEADS, SIZE, VALUE = 4, 2, 8, 4
R, CAPACITY, BLOCK, SHARED = 4, 300, 70, 200
# Slot = position; a ring; a window longer than what is shared, whose slots are positions; an encoder's output.
REACHES = (Full(), Window(90, sinks=2), Window(250), Cross(90))
ROWS = Rows()
FORMS = ("reference", "blockwise")


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """The smallest tiles and blocks, 64, so that few tokens are several of them."""
    monkeypatch.setattr("jaxkv.nn.plan._power", lambda x, least, most: least)


@jax.jit
def feed(cache, positions, k, v):
    cache, step = cache.begin(positions)
    layers = [x if isinstance(x.spec.reach, Cross) else x.put(step, k, v) for x in cache.layers]
    return cache.with_layers(layers)


def block(*starts, length):
    """int32 [R, length]: positions from each start on, padding for None."""
    rows = [np.full(length, EMPTY) if start is None else np.arange(start, start + length) for start in starts]
    return np.stack(rows).astype(np.int32)


def filled(layout=ROWS, reaches=REACHES):
    """A cache whose rows share 200 tokens, and hold 0 to 60 of their own."""
    specs = [LayerSpec(reach, KV_HEADS, SIZE, VALUE) for reach in reaches]
    cache = Cache.init(specs, R, CAPACITY, max_block=BLOCK, layout=layout)
    if cache.encoded is not None:
        cache, step = cache.begin_cross(jnp.full(R, 80))
        k, v = (np.tile(normal(size, 1, 90, KV_HEADS, size), (R, 1, 1, 1)) for size in (SIZE, VALUE))
        cache = cache.with_layers([x.put(step, k, v) if isinstance(x.spec.reach, Cross) else x for x in cache.layers])
    own = np.array([[60], [0], [1], [33]])
    for start in (0, 70, 140, 200):
        positions = np.tile(np.arange(start, start + BLOCK), (R, 1))
        if start < SHARED:
            positions = np.where((positions < SHARED) & (np.arange(R) == 0)[:, None], positions, EMPTY)
        else:
            for row in range(1, R):
                cache = cache.copy_prefix(0, row, SHARED)
            positions = np.where(positions < SHARED + own, positions, EMPTY)
        k, v = (normal(start + size, R, BLOCK, KV_HEADS, size) for size in (SIZE, VALUE))
        cache = feed(cache, positions.astype(np.int32), k, v)
    return cache


def read_all(cache, positions, spans=None, n=None, form="blockwise"):
    """What queries at these positions get from each layer, after their keys were put; softcap and sinks in some."""
    q = jax.random.normal(jax.random.key(5), (*positions.shape, HEADS, SIZE))
    k, v = q[:, :, :KV_HEADS] + 1, q[:, :, KV_HEADS:, :VALUE]
    cache, step = cache.begin(positions, spans=spans)
    outs = []
    for i, layer in enumerate(cache.layers):
        options = {"softcap": 3.0, "sink_logits": jnp.arange(4.0)} if i % 2 == 0 else {}
        layer = layer if isinstance(layer.spec.reach, Cross) else layer.put(step, k, v)
        outs.append(jaxkv.attend(q, layer, step, shared=n, implementation=form, **options))
    return outs


CALLS = {
    "a token each": block(260, 200, 201, 233, length=1),
    "a row idle, one that does not fit": block(260, None, 300, 233, length=1),
    "nobody": block(*[None] * 4, length=1),
    "blocks of several tiles": block(200, 205, 201, None, length=BLOCK),
}


@pytest.mark.parametrize(
    ("layout", "reaches", "calls", "by_row"),
    [
        (Rows(), REACHES, list(CALLS), False),
        (Pages(80, 16), REACHES[:2], list(CALLS)[:3], True),
        (Pages(30, 48), REACHES[:1], list(CALLS)[:1], False),  # no block is a multiple of such a page
    ],
    ids=["rows", "pages, row by row", "large pages"],
)
def test_what_is_read_once_gives_what_each_row_alone_gives(layout, reaches, calls, by_row, monkeypatch):
    monkeypatch.setattr("jaxkv.nn.plan.pays_by_row", lambda spec: by_row)
    read = jax.jit(lambda *args, form: read_all(*args, form=form), static_argnames="form")
    cache = filled(layout, reaches)
    size, forms = layout.page_size, ("blockwise", "native")[: 1 if library.problem() else 2]
    for name in calls:
        want = read(cache, CALLS[name], form="reference")
        for n in (SHARED // size * size, 96, 0):
            for form in forms if layout == Rows() or n == 96 else forms[:1]:
                got = read(cache, CALLS[name], None, n, form=form)
                for reach, one, other in zip(reaches, want, got, strict=True):
                    np.testing.assert_allclose(one, other, atol=3e-6, err_msg=f"{reach}, {n} shared, {form}")


def test_it_is_read_from_one_row_the_one_furthest_behind():
    cache, read = filled(), jax.jit(read_all)
    positions = CALLS["a token each"]
    want = read(cache, positions, None, SHARED)

    def spoiled(rows):
        """The cache with NaN in all that these rows have of what is shared."""
        layers = []
        for layer in cache.layers:
            held = np.asarray(cache.bookkeeping[layer.group].held)
            bad = (held != EMPTY) & (held < SHARED) & np.isin(np.arange(R), rows)[:, None]
            k, v = (jnp.where(bad[:, None, :, None], jnp.nan, x) for x in (layer.k, layer.v))
            layers.append(dataclasses.replace(layer, k=k, v=v))
        return cache.with_layers(layers)

    for one, other in zip(want, read(spoiled([0, 2, 3]), positions, None, SHARED), strict=True):
        np.testing.assert_array_equal(one, other)
    assert all(np.isnan(x).all() for x in read(spoiled([1]), positions, None, SHARED))


def test_a_row_does_not_depend_on_what_its_neighbors_have_of_their_own():
    cache, read = filled(), jax.jit(read_all)
    positions = CALLS["a token each"]
    one, other = (read(c, positions, None, SHARED) for c in (cache, cache.rewind(np.array([FAR, 200, 200, 200]))))
    for x, y in zip(one, other, strict=True):
        np.testing.assert_array_equal(x[0], y[0])


@pytest.mark.parametrize("layout", [Rows(), Pages(80, 16)], ids=["rows", "pages"])
def test_gradients_are_those_of_each_row_alone(layout):
    cache = filled(layout, REACHES[:2])
    positions = CALLS["a token each"]
    q, k, v = normal(1, R, 1, HEADS, SIZE), normal(2, R, 1, KV_HEADS, SIZE), normal(3, R, 1, KV_HEADS, VALUE)
    w, sinks = normal(4, R, 1, HEADS, VALUE), normal(5, HEADS)

    @partial(jax.jit, static_argnums=1)
    def gradient(args, form):
        def loss(args):
            q, k, v, sinks, buffers = args
            c, step = cache.sharing(192).begin(positions)
            total = 0.0
            for layer, (old_k, old_v) in zip(c.layers, buffers, strict=True):
                layer = dataclasses.replace(layer, k=old_k, v=old_v).put(step, k, v)
                out = jaxkv.attend(q, layer, step, softcap=3.0, sink_logits=sinks, implementation=form)
                total += (out * w).sum()
            return total

        return jax.value_and_grad(loss)(args)

    args = (q, k, v, sinks, [(x.k, x.v) for x in cache.layers])
    want, got = (gradient(args, form) for form in FORMS)
    for one, other in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-4)


# The promise, from the cache to the layers


def forward(params, tokens, positions, cache):
    """A model that knows nothing of it."""
    cache, step = cache.begin(positions)
    x = params[tokens]  # [B, T, 8]
    q, k = x.reshape(*tokens.shape, HEADS, 2), x[..., :4].reshape(*tokens.shape, KV_HEADS, 2)
    layer = cache.layers[0].put(step, k, k)
    y = jaxkv.attend(q, layer, step).reshape(*tokens.shape, 8)
    return (x + y) @ params.T, cache.with_layers([layer])


def test_a_model_takes_part_without_a_change():
    layout = Pages(40, 8)
    params, system = normal(0, 20, 8), np.random.default_rng(1).integers(0, 20, 40)
    prompts = [[*system, *tail] for tail in ([1, 2, 3], [4], [5, 6])]
    empty = Cache.init([LayerSpec(Full(), KV_HEADS, 2)], 3, 96, max_block=32, layout=layout)
    want = jaxkv.generate(forward, params, prompts, empty, max_new_tokens=8)
    empty = Cache.init([LayerSpec(Full(), KV_HEADS, 2)], 3, 96, max_block=32, layout=layout)
    _, cache = jaxkv.prefill(forward, params, [system, None, None], empty)
    cache = cache.take(np.array([0, 0, 0])).sharing(40)
    assert_shared(cache)
    got = jaxkv.generate(forward, params, prompts, cache, max_new_tokens=8)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    assert int(got.cache.shared) == 40
    assert got.cache.sharing(0).shared is None
    assert jax.tree.structure(got.cache.sharing(0)) == jax.tree.structure(want.cache)


def test_one_program_serves_shared_beginnings_of_any_length():
    cache = filled(Pages(80, 16), REACHES[:1])
    read = jax.jit(lambda cache, n, positions: read_all(cache.sharing(n), positions)[0])
    first = read(cache, jnp.int32(0), CALLS["a token each"])
    for n in (16, 111, 192):  # what is no whole number of pages is rounded down
        np.testing.assert_allclose(read(cache, jnp.int32(n), CALLS["a token each"]), first, atol=3e-6)
    assert read._cache_size() == 1


def test_what_is_shared_lies_on_the_mesh_of_the_cache():
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(jax.sharding.AxisType.Explicit,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "heads"))
    cache = Cache.init([LayerSpec(Full(), KV_HEADS, 2)], 3, 96, max_block=32, sharding=place)
    assert cache.sharing(8).shared.sharding.mesh == mesh
    params = normal(0, 20, 8)
    prompts = [np.arange(12), np.arange(13), np.arange(11)]
    want = jaxkv.generate(forward, params, prompts, cache, max_new_tokens=4).tokens
    cache = Cache.init([LayerSpec(Full(), KV_HEADS, 2)], 3, 96, max_block=32, sharding=place)
    _, cache = jaxkv.prefill(forward, params, [np.arange(9)] * 3, cache)
    np.testing.assert_array_equal(
        jaxkv.generate(forward, params, prompts, cache.sharing(8), max_new_tokens=4).tokens, want
    )


@pytest.mark.parametrize(
    ("n", "match"),
    [
        (-16, "shared=-16: rows of 320 slots share from 0 to 320 of their first tokens"),
        (336, "shared=336: rows of 320 slots share from 0 to 320"),
        (40, "shared=40 is not a multiple of the page size 16; 32 is"),
        (True, "shared has dtype bool"),
        (1.5, "shared has dtype float"),
        (np.array([16, 16]), r"shared has shape \(2,\); give one number"),
    ],
)
def test_what_can_not_be_shared_is_said(n, match):
    cache = Cache.init([LayerSpec(Full(), 1, 2)], 2, 320, layout=Pages(80, 16))
    with pytest.raises(ValueError, match=match):
        cache.sharing(n)
    cache, step = cache.begin(jnp.zeros((2, 1), jnp.int32))
    with pytest.raises(ValueError, match=match):
        jaxkv.attend(jnp.zeros((2, 1, 1, 2)), cache.layers[0], step, shared=n)


def test_assert_shared_finds_what_differs():
    cache = filled()
    assert_shared(cache, SHARED)
    assert_shared(cache.reset(np.array([False, True, False, False])), SHARED)  # a row without tokens shares nothing
    with pytest.raises(AssertionError, match="row 1 holds 200 tokens, fewer than the 201 that it is to share"):
        assert_shared(cache, 201)
    layer = cache.layers[0]
    other = dataclasses.replace(layer, v=layer.v.at[2, 0, 150, 1].add(1.0))
    with pytest.raises(AssertionError, match="layer 0: rows 0 and 2 have other values at position 150"):
        assert_shared(cache.with_layers([other, *cache.layers[1:]]), SHARED)
    assert_shared(cache.with_layers([other, *cache.layers[1:]]), 150)
    assert_shared(cache.with_layers([other, *cache.layers[1:]]), SHARED, rows=[0, 1, 3])
    group = dataclasses.replace(cache.groups[0], positions=cache.groups[0].positions.at[3, 7].set(EMPTY))
    with pytest.raises(AssertionError, match="layer 0: at position 7 row 0 holds something and row 3 nothing"):
        assert_shared(dataclasses.replace(cache, groups=(group, *cache.groups[1:])), SHARED)
