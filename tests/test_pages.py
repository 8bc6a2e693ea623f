"""Rows on pages: what is shared, claimed, copied and freed. Laws that hold for every cache stand in contract.py."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import Cache, Chunk, Cross, Full, LayerSpec, Pages, Window


def make(*reaches, pages=12, size=4, rows=3, capacity=24, max_block=4, **options):
    specs = [LayerSpec(reach, 1, 2, rotary=None if isinstance(reach, Cross) else jaxkv.Rotary()) for reach in reaches]
    return Cache.init(specs, rows, capacity, layout=Pages(pages, size), max_block=max_block, **options)


@jax.jit
def feed(cache, positions, rows=None):
    """Puts keys and values that are 100 x row + position."""
    cache, step = cache.begin(positions, rows)
    x = (100 * step.rows[:, None] + step.positions)[:, :, None, None].astype(jnp.float32)
    x = jnp.broadcast_to(x, (*positions.shape, 1, 2))
    layers = [layer if isinstance(layer.spec.reach, Cross) else layer.put(step, x, x) for layer in cache.layers]
    return cache.with_layers(layers), step.ok


@jax.jit
def look(cache):
    """What the rows hold, by slot, in each layer."""
    _, step = cache.begin(jnp.full((cache.num_rows, 1), -1))
    return [layer.get(step)[1][:, :, 0, 0] for layer in cache.layers], [g.kv_positions for g in step.groups]


OPERATIONS = {
    name: jax.jit(functools.partial(lambda name, cache, *args: getattr(cache, name)(*args), name))
    for name in ("copy_prefix", "take", "rewind", "reset", "remove")
}


def change(cache, name, *args):
    return OPERATIONS[name](cache, *(np.asarray(x) for x in args))


def fill(cache, *lengths):
    for begin in range(0, max(lengths), cache.max_block):
        p = begin + np.arange(cache.max_block)[None]
        cache, ok = feed(cache, np.where(p < np.array(lengths)[:, None], p, -1))
        assert ok.all()
    return cache


def held(cache, layer=0):
    """The values that each row holds, by position."""
    values, positions = look(cache)
    values, positions = np.asarray(values[layer]), np.asarray(positions[cache.layers[layer].group])
    return [[int(values[r, s]) for s in np.argsort(p, kind="stable") if p[s] >= 0] for r, p in enumerate(positions)]


def check(cache):
    """The bookkeeping is what it has to be, counted by hand."""
    for group in cache.bookkeeping:
        table, refs, free = (np.asarray(x) for x in (group.pages.table, group.pages.refs, group.pages.free))
        num_free = int(group.pages.num_free)
        used = table[table < refs.size]
        np.testing.assert_array_equal(refs, np.bincount(used, minlength=refs.size))
        assert table.min() >= 0
        assert sorted(free[:num_free].tolist()) == np.flatnonzero(refs == 0).tolist()
        page_size = group.num_slots // table.shape[1]
        live = np.asarray(group.in_use).reshape(*table.shape, page_size).any(-1)
        np.testing.assert_array_equal(live, table < refs.size)


def test_a_fork_takes_no_page_until_one_side_writes():
    cache = fill(make(Full()), 10, 0, 0)
    assert cache.num_free.tolist() == [12 - 3]
    cache = change(cache, "take", [0, 0, 0])
    assert cache.num_free.tolist() == [12 - 3]
    assert cache.groups[0].pages.refs.max() == 3
    cache, ok = feed(cache, np.array([[10], [-1], [-1]]))
    assert ok.all()
    assert cache.num_free.tolist() == [12 - 4]  # a copy of the third page
    check(cache)
    assert held(cache) == [[*range(11)], [*range(10)], [*range(10)]]


def test_when_all_who_share_a_page_write_to_it_the_last_keeps_it():
    cache = change(fill(make(Full(), pages=5), 10, 0, 0), "take", [0, 0, 0])
    cache, ok = feed(cache, np.array([[10], [10], [10]]))
    assert ok.all()
    assert cache.num_free.tolist() == [0]
    check(cache)
    assert held(cache) == [[*range(10), 10], [*range(10), 110], [*range(10), 210]]


def test_rows_are_served_in_order_and_who_gets_no_page_takes_nothing():
    cache = fill(make(Full(), Window(3), pages=5), 4, 4, 4)
    cache, ok = feed(cache, np.array([[4, 5], [4, 5], [4, 5]]))
    assert ok.tolist() == [True, True, False]
    assert (cache.lengths.tolist(), cache.ok.tolist()) == ([6, 6, 4], [True, True, False])
    assert held(cache) == [[0, 1, 2, 3, 4, 5], [*range(100, 106)], [*range(200, 204)]]
    check(cache)
    cache = change(cache, "reset", [True, False, False]).retry(jnp.array([True] * 3))
    cache, ok = feed(cache, np.array([[-1, -1], [-1, -1], [4, 5]]))
    assert ok.all()
    check(cache)


def test_a_row_that_needs_less_is_served_after_one_that_needs_too_much():
    cache = fill(make(Full(), pages=4), 4, 3, 0)
    cache, ok = feed(cache, np.array([[4, 8, 12], [3, 4, -1], [0, -1, -1]]))
    assert ok.tolist() == [False, True, True]
    check(cache)


def test_among_sharers_a_page_is_kept_by_the_last_who_is_served():
    cache = change(fill(make(Full(), pages=3), 6, 0, 0), "take", [0, 0, 0])  # one page is free
    cache, ok = feed(cache, np.array([[6, -1, -1], [-1, -1, -1], [6, -1, -1]]))
    assert ok.tolist() == [True, True, False]  # rows 1 and 2 have the page still
    check(cache)
    cache = change(cache, "reset", [False, True, False]).retry(jnp.array([True] * 3))
    cache, ok = feed(cache, np.array([[7, -1, -1], [-1, -1, -1], [6, -1, -1]]))
    assert ok.all()
    assert held(cache) == [[*range(8)], [], [*range(6), 206]]
    check(cache)


def test_remove_makes_private_copies_or_changes_nothing():
    cache = change(fill(make(Full(), pages=5), 12, 0, 0), "copy_prefix", 0, 1, 12)
    after = change(cache, "remove", 0, 5, 7)
    assert held(after) == [[*range(5), *range(7, 12)], [*range(12)], []]
    assert after.lengths.tolist() == [10, 12, 0]
    check(after)
    cache, _ = feed(cache, np.array([[-1], [-1], [0]]))  # one page is left, and two are needed
    after = change(cache, "remove", 0, 5, 7)
    assert (after.lengths.tolist(), after.ok.tolist()) == ([12, 12, 1], [False, True, True])
    assert held(after) == held(cache)
    check(after)


@pytest.mark.parametrize("size", [1, 5, 24])
def test_pages_of_any_size_hold_what_rows_hold(size):
    """Of Full, rings with and without sinks, and an encoder's output, through every operation."""
    specs = make(Full(), Window(5, sinks=2), Chunk(7), Cross(5)).specs
    rows, pages = (
        Cache.init(specs, 3, 24, max_block=4, slack=2, layout=layout) for layout in (jaxkv.Rows(), Pages(3 * 24, size))
    )

    @jax.jit
    def encode(cache):
        cache, step = cache.begin_cross(jnp.array([3, 5]), jnp.array([2, 0]))
        x = jnp.arange(10.0).reshape(2, 5, 1, 1) * jnp.ones((1, 1, 1, 2))
        return cache.with_layers([*cache.layers[:3], cache.layers[3].put(step, x, x)]), step.ok

    def edit(cache):
        cache, _ = encode(cache)
        for start in range(0, 12, 4):
            block = start + np.arange(4) + np.zeros((3, 1), int)
            cache, _ = feed(cache, np.where([[True], [True], [False]], block, -1))
        cache = change(change(cache, "take", [0, 0, 2]), "copy_prefix", 0, 2, 11)
        cache, _ = feed(cache, np.array([[12, -1, -1, -1], [12, 13, -1, -1], [11, -1, -1, -1]]))
        cache = change(cache, "remove", 1, 4, 7)
        cache, _ = feed(cache, np.array([[13], [11], [12], [14]]), np.array([0, 1, 2, 0]))
        cache = change(change(cache, "rewind", [13, 99, 12]), "reset", [False, True, False])
        return feed(cache, np.array([[13, 14, 15, 16], [0, 1, 2, 3], [-1, -1, -1, -1]]))[0]

    rows, pages = edit(rows), edit(pages)
    assert pages.lengths.tolist() == rows.lengths.tolist() == [17, 4, 12]
    assert pages.ok.all()
    for layer in range(4):
        assert held(pages, layer) == held(rows, layer)
    check(pages)


def test_gradients_flow_through_the_copy_of_a_page():
    cache = change(fill(make(Full()), 6, 0, 0), "take", [0, 0, 0])

    def loss(x, cache, read):
        cache, step = cache.begin(jnp.array([[6], [6], [-1]]))
        layer = cache.layers[0].put(step, x, 2 * x)
        cache, step = cache.with_layers([layer]).begin(jnp.array([[7], [-1], [6]]))
        layer = cache.layers[0].put(step, 3 * x, x)
        return jnp.sin(read(x, layer, step)).sum()

    def plain(q, layer, step):
        k, v, mask = layer.get(step)
        weights = jax.nn.softmax(jnp.einsum("bqnh,bknh->bnqk", q, k) / np.sqrt(2), where=mask)
        return jnp.einsum("bnqk,bknh->bqnh", jnp.where(mask, weights, 0), v)

    def stored(k, cache, read):
        layer = jax.tree.map(lambda x: x, cache.layers[0])
        return loss(x, cache.with_layers([type(layer)(**{**vars(layer), "k": k})]), read)

    x = jnp.linspace(-1, 1, 6).reshape(3, 1, 1, 2)
    for function, at in ((loss, x), (stored, cache.layers[0].k)):
        gradient = jax.jit(jax.grad(function), static_argnums=2)
        got, want = (gradient(at, cache, read) for read in (jaxkv.attend, plain))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        assert np.asarray(want).any()
