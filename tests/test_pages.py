"""Rows on pages: what is shared, claimed, copied and freed. Laws that hold for every cache stand in contract.py."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import Cache, Chunk, Cross, Full, LayerSpec, Pages, Rows, Window

BLOCK = 4


def make(*reaches, layout=Pages(5, 4), rows=3, capacity=24, max_block=BLOCK, drops=False, **options):  # noqa: B008
    specs = [
        LayerSpec(reach, 1, 2, rotary=None if isinstance(reach, Cross) else jaxkv.Rotary(), drops=drops)
        for reach in reaches or (Full(), Window(20))
    ]
    return Cache.init(specs, rows, capacity, layout=layout, max_block=max_block, **options)


@jax.jit
def _feed(cache, positions, where):
    cache, step = cache.begin(positions)
    x = (100 * step.rows[:, None] + step.positions)[:, :, None, None].astype(jnp.float32)
    x = jnp.broadcast_to(x, (*positions.shape, 1, 2))
    layers = [
        layer if isinstance(layer.spec.reach, Cross) else layer.put(step, x, x, where if layer.spec.drops else None)
        for layer in cache.layers
    ]
    out = [jaxkv.attend(jnp.ones_like(x), layer, step) for layer in layers]
    return cache.with_layers(layers), step.ok, out, [layer.get(step) for layer in layers]


def feed(cache, *positions, where=None):
    """Puts keys and values that are 100 x row + position. One list of positions for each row."""
    block = np.full((cache.num_rows, BLOCK), -1)
    kept = np.ones(block.shape, bool)
    for row, given in enumerate(positions):
        block[row, : len(given)] = given
    if where is not None:
        kept[:, : len(where[0])] = where
    cache, ok, *_ = _feed(cache, block, kept)
    return cache, ok.tolist()


def fill(cache, *lengths):
    """Feeds each row the positions below its length."""
    for begin in range(0, max(lengths), BLOCK):
        cache, ok = feed(cache, *([p for p in range(begin, begin + BLOCK) if p < length] for length in lengths))
        assert all(ok)
    return cache


def held(cache, layer=0):
    """The values that each row holds, by position."""
    *_, gets = _feed(cache, np.full((cache.num_rows, BLOCK), -1), np.ones((cache.num_rows, BLOCK), bool))
    values = np.asarray(gets[layer][1])[:, :, 0, 0]
    positions = np.asarray(cache.groups[cache.layers[layer].group].positions)
    return [[int(values[r, s]) for s in np.argsort(p, kind="stable") if p[s] >= 0] for r, p in enumerate(positions)]


OPERATIONS = {
    name: jax.jit(functools.partial(lambda name, cache, *args: getattr(cache, name)(*args), name))
    for name in ("copy_prefix", "take", "rewind", "reset", "remove", "keep")
}


def change(cache, name, *args):
    return OPERATIONS[name](cache, *(np.asarray(x) for x in args))


def check(cache):
    """The bookkeeping is what it has to be, counted by hand."""
    for group in cache.bookkeeping:
        table, refs, free = (np.asarray(x) for x in (group.pages.table, group.pages.refs, group.pages.free))
        num_free = int(group.pages.num_free)
        np.testing.assert_array_equal(refs, np.bincount(table[table < refs.size], minlength=refs.size))
        assert table.min() >= 0
        assert sorted(free[:num_free].tolist()) == np.flatnonzero(refs == 0).tolist()
        live = np.asarray(group.in_use).reshape(*table.shape, -1).any(-1)
        np.testing.assert_array_equal(live, table < refs.size)


# ---------------------------------------------------------------- sharing and claiming


def test_a_fork_takes_no_page_until_one_side_writes():
    cache = change(fill(make(), 10, 0, 0), "take", [0, 0, 0])
    assert cache.num_free[0] == 5 - 3
    assert cache.groups[0].pages.refs.max() == 3
    cache, ok = feed(cache, [10])
    assert all(ok)
    assert cache.num_free[0] == 5 - 4  # a copy of the third page
    check(cache)
    assert held(cache) == [[*range(11)], [*range(10)], [*range(10)]]
    cache = change(cache, "reset", [True, False, False])
    assert cache.num_free[0] == 5 - 3
    assert change(cache, "rewind", [0, 4, 4]).num_free[0] == 5 - 1
    check(cache)


def test_when_all_who_share_a_page_write_to_it_the_last_keeps_it():
    cache = change(fill(make(), 10, 0, 0), "take", [0, 0, 0])
    cache, ok = feed(cache, [10], [10], [10])
    assert all(ok)
    assert cache.num_free[0] == 0
    check(cache)
    assert held(cache) == [[*range(10), 10], [*range(10), 110], [*range(10), 210]]


def test_rows_are_served_in_order_and_who_gets_no_page_takes_nothing():
    cache, ok = feed(fill(make(), 4, 4, 4), [4, 5], [4, 5], [4, 5])
    assert ok == cache.ok.tolist() == [True, True, False]
    assert cache.lengths.tolist() == [6, 6, 4]
    assert held(cache) == [[0, 1, 2, 3, 4, 5], [*range(100, 106)], [*range(200, 204)]]
    check(cache)
    with pytest.raises(jaxkv.CacheFullError) as caught:
        cache.check()
    assert "sequence 2 (holds 4) did not fit into capacity 24" in str(caught.value)
    assert "the pages of Full(): a pool of 5 pages has 0 left" in str(caught.value)
    assert "Make a larger cache or pool, remove or rewind tokens and call retry" in str(caught.value)
    cache = change(cache, "reset", [True, False, False]).retry(jnp.array([True] * 3))
    cache, ok = feed(cache, [], [], [4, 5])
    assert all(ok)
    check(cache)


def test_a_row_that_needs_less_is_served_after_one_that_needs_too_much():
    cache, ok = feed(fill(make(), 4, 3, 0), [4, 8, 12, 16], [3, 4], [0])
    assert ok == [False, True, True]
    check(cache)


def test_a_page_counts_as_shared_with_rows_that_were_refused():
    cache = change(fill(make(), 6, 0, 0), "take", [0, 0, 0])  # two pages are used, three free
    cache, ok = feed(cache, [6, 8, 12, 16], [6], [6])
    assert ok == [False, True, True]
    assert cache.num_free[0] == 1
    check(cache)
    cache, ok = feed(cache.retry(jnp.array([True] * 3)), [6, 8], [8], [7])  # the first has its page for itself now
    assert ok == [True, False, True]
    assert cache.num_free[0] == 0
    check(cache)
    assert held(cache) == [[*range(7), 8], [*range(6), 106], [*range(6), 206, 207]]


def test_remove_makes_private_copies_or_changes_nothing():
    cache = change(fill(make(), 12, 0, 0), "copy_prefix", 0, 1, 12)
    after = change(cache, "remove", 0, 5, 7)
    assert after.lengths.tolist() == [10, 12, 0]
    assert held(after) == [[*range(5), *range(7, 12)], [*range(12)], []]
    check(after)
    cache, _ = feed(cache, [], [], [0])  # one page is left, and two are needed
    after = change(cache, "remove", 0, 5, 7)
    assert (after.lengths.tolist(), after.ok.tolist()) == ([12, 12, 1], [False, True, True])
    assert held(after) == held(cache)
    check(after)


@pytest.mark.parametrize("size", [1, 256])
def test_pages_have_any_size_and_the_capacity_need_not_be_a_multiple(size):
    cache = fill(make(Full(), layout=Pages(900 // size + 1, size), rows=2, capacity=300), 10, 3)
    assert cache.groups[0].num_slots >= 300
    assert cache.groups[0].num_slots % size == 0
    cache, ok = feed(change(cache, "take", [0, 0]), [10], [9, 10, 299])
    assert all(ok)
    assert held(cache) == [[*range(11)], [*range(9), 109, 110, 399]]
    check(cache)


def test_an_encoders_output_is_shared_until_it_is_written_again():
    cache = make(Full(), Cross(6), layout=Pages(6, 4))

    @jax.jit
    def encode(cache, lengths):
        cache, step = cache.begin_cross(lengths)
        x = jnp.broadcast_to(10 * jnp.arange(3.0)[:, None] + jnp.arange(6.0)[None], (3, 6))[:, :, None, None]
        x = x * jnp.ones((1, 1, 1, 2)) + lengths[:, None, None, None].astype(jnp.float32) / 10
        cache = cache.with_layers([cache.layers[0], cache.layers[1].put(step, x, x)])
        return cache, cache.layers[1].get(cache.begin(jnp.full((3, 1), -1))[1])[1][:, :, 0, 0]

    cache, _ = encode(cache, np.array([5, -1, -1]))
    cache = change(cache, "take", [0, 0, 0])
    assert cache.num_free.tolist() == [6, 6 - 2]  # as many pages as all rows can fill
    check(cache)
    cache, seen = encode(cache, np.array([-1, 2, 6]))
    np.testing.assert_allclose(seen[0, :5], np.arange(5) + 0.5)
    np.testing.assert_allclose(seen[1, :2], np.arange(2) + 10.2)
    np.testing.assert_allclose(seen[2, :6], np.arange(6) + 20.6)
    assert cache.num_free.tolist() == [6, 6 - 5]
    check(cache)


def test_gradients_flow_through_the_copy_of_a_page():
    cache = change(fill(make(Full()), 6, 0, 0), "take", [0, 0, 0])

    def loss(x, k, cache, read):
        cache = cache.with_layers([dataclasses.replace(cache.layers[0], k=k)])
        cache, step = cache.begin(jnp.array([[6], [6], [-1]]))
        layer = cache.layers[0].put(step, x, 2 * x)
        return jnp.sin(read(x, layer, step)).sum() + layer.k[:, 0, 1].sum()

    def plain(q, layer, step):
        k, v, mask = layer.get(step)
        weights = jax.nn.softmax(jnp.einsum("bqnh,bknh->bnqk", q, k) / np.float32(np.sqrt(2)), where=mask)
        return jnp.einsum("bnqk,bknh->bqnh", jnp.where(mask, weights, 0), v)

    gradient = jax.jit(jax.grad(loss, (0, 1)), static_argnums=3)
    x = jnp.linspace(-1, 1, 6).reshape(3, 1, 1, 2)
    got, want = (gradient(x, cache.layers[0].k, cache, read) for read in (jaxkv.attend, plain))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        assert np.asarray(b).any()
    copied = np.asarray(cache.groups[0].pages.table)[0, 1]  # its sum counts once for itself and once for each copy
    untouched = np.asarray(gradient(0 * x, cache.layers[0].k, cache, lambda q, *_: q)[1])
    assert untouched[copied, 0, 1].tolist() == [3, 3]


def test_another_rows_nan_is_not_read_where_a_row_has_no_page():
    cache = fill(make(), 1, 1, 1)
    ill = cache.groups[0].pages.table[:, 0].tolist().index(4)
    cache = cache.with_layers([dataclasses.replace(x, v=x.v.at[4].set(jnp.nan)) for x in cache.layers])
    *_, out, gets = _feed(cache, np.array([[1, -1, -1, -1]] * 3), np.ones((3, BLOCK), bool))
    for x in (*out, *(v for _, v, _ in gets)):
        assert np.isnan(x).any((1, 2, 3)).tolist() == [row == ill for row in range(3)]


# ---------------------------------------------------------------- what it costs


@pytest.mark.optimized
def test_a_step_costs_what_the_call_brings_whatever_the_capacity():
    def costs(capacity, length):
        cache = jax.eval_shape(lambda: make(layout=Pages(3 * capacity // 16, 16), capacity=capacity))
        begin = jax.jit(lambda cache, positions: cache.begin(positions)[0], donate_argnums=0)
        compiled = begin.lower(cache, jax.ShapeDtypeStruct((3, length), jnp.int32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes, compiled.cost_analysis()["flops"]

    for length in (1, BLOCK):
        assert costs(4096, length) == costs(65_536, length)


# ---------------------------------------------------------------- sizes, and what is said


def test_rings_have_no_more_pages_than_their_rows_can_fill():
    cache = jax.eval_shape(lambda: make(Full(), Window(5, sinks=2), Chunk(3), Cross(9), layout=Pages(100, 4)))
    # Slots in use: 2 + 4 + 4, 2 + 4, 9; of 3 rows.
    assert [group.pages.num_pages for group in cache.bookkeeping] == [100, 3 * 3, 3 * 2, 3 * 3]
    assert [group.num_slots for group in cache.bookkeeping] == [24, 12, 8, 12]
    assert [layer.k.shape for layer in cache.layers[:2]] == [(100, 1, 4, 2), (9, 1, 4, 2)]
    few = jax.eval_shape(lambda: make(Full(), Window(5, sinks=2), layout=Pages(4, 4)))
    assert [group.pages.num_pages for group in few.groups] == [4, 4]
    assert jax.eval_shape(lambda: make(Full(), layout=Pages(9, 4), max_block=None)).max_block == 24
    assert jax.eval_shape(lambda: make(Full(), layout=Pages(3, 4), max_block=None)).max_block == 12


def test_pages_are_counted_in_describe_and_planned():
    cache = change(fill(make(), 10, 0, 0), "copy_prefix", 0, 1, 5)
    assert "24 slots, a pool of 5 pages of 4: 3 used (2 shared), 2 free, " in cache.describe()
    assert "  row 1: 0-4" in cache.describe()
    plan = jaxkv.plan_memory(cache.specs, 3, 24, layout=cache.layout, max_block=BLOCK)
    assert plan.nbytes == cache.nbytes == sum(x.nbytes for x in jax.tree.leaves(cache))
    assert plan.bytes_per_token == 2 * 2 * 4
    assert "24 slots per sequence, a pool of 5 pages of 4, " in str(plan)
    assert make(layout=Rows()).num_free.tolist() == []


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Pages(0), "num_pages is a whole number of at least 1"),
        (lambda: Pages(4, 0), "page_size is a whole number of at least 1"),
        (lambda: Pages(4, 257), "a page has 1 to 256 slots"),
        (lambda: make(layout=Pages(4, 25)), "a page of 25 slots is larger than the capacity, 24"),
        (lambda: make(layout=Pages(1, 3)), "holds 3 tokens, and one block may bring 4; give num_pages=2 or more"),
        (lambda: make(layout=Pages), "give Rows() or Pages(num_pages, page_size)"),
        (lambda: make(sharding=spread("data")), "not over rows or slots; give PartitionSpec(None, None)"),
        (lambda: make().keep(jnp.ones((3, 23), bool)), "keep: mask is bool[3, 23]; give bool [R, capacity] = [3, 24]"),
        (lambda: put(make(), jnp.ones((3, 1), bool)), "give its LayerSpec drops=True"),
        (lambda: put(make(drops=True), jnp.ones((3,), bool)), "where is bool[3]; give bool [B, T] = [3, 1]"),
        (lambda: LayerSpec(Full(), 1, 2, drops=1), "give True or False"),
    ],
)
def test_wrong_arguments_are_refused_with_both_numbers_and_the_cure(call, says):
    with pytest.raises(ValueError) as caught:
        jax.eval_shape(call)
    assert says in str(caught.value)


def spread(*axes):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))


def put(cache, where):
    x = jnp.ones((3, 1, 1, 2))
    return cache.layers[0].put(cache.begin(jnp.zeros((3, 1), jnp.int32))[1], x, x, where)


def test_a_program_with_pages_is_written_to_a_file():
    cache = make(drops=True)
    exported = jax.export.export(jax.jit(lambda cache: cache.rewind(jnp.zeros((3,), jnp.int32))))(cache)
    again = jax.export.deserialize(exported.serialize())
    (same,), _ = jax.tree.unflatten(again.in_tree, jax.tree.leaves(cache))
    assert jax.tree.structure(same) == jax.tree.structure(cache)
    assert again.call(cache).num_free.tolist() == cache.num_free.tolist()


# ---------------------------------------------------------------- forgetting


@pytest.mark.parametrize("layout", [Rows(), Pages(5, 4)], ids=str)
def test_keep_forgets_what_it_does_not_name(layout):
    cache = fill(make(layout=layout), 10, 3, 0)
    mask = np.ones((3, 24), bool)
    mask[0, [0, 5, 6, 8]] = mask[0, 4:8] = mask[1, 1] = False
    kept = change(cache, "keep", mask)
    assert kept.lengths.tolist() == [10, 3, 0]
    assert held(kept) == [[1, 2, 3, 9], [100, 102], []]
    assert held(kept, 1)[0] == [p for p in held(cache, 1)[0] if mask[0, p]]
    assert [bool(kept.can_resume(row, length)) for row, length in enumerate((10, 3, 0))] == [True] * 3
    if layout != Rows():
        assert kept.num_free[0] == cache.num_free[0] + 1
        check(kept)
    kept, ok = feed(kept, [5, 10], [3])
    assert all(ok)
    assert held(kept) == [[1, 2, 3, 5, 9, 10], [100, 102, 103], []]


@pytest.mark.parametrize("layout", [Rows(), Pages(5, 4)], ids=str)
def test_put_leaves_tokens_out_for_good(layout):
    cache = make(Full(), layout=layout, drops=True, rows=2)
    cache, _ = feed(cache, [0, 1, 2], [0, 1], where=[[True, False, True], [True, True, True]])
    cache, _ = feed(change(cache, "take", [0, 0]), [], [3, 4], where=[[True] * 2, [False, True]])
    block, kept = np.full((2, BLOCK), -1), np.ones((2, BLOCK), bool)
    block[:, 0], block[1, 1], kept[1, 1] = (3, 5), 6, False
    cache, ok, (out,), [(_, v, mask)] = _feed(cache, block, kept)
    assert ok.tolist() == [True, True]
    v, mask = np.asarray(v)[:, :, 0, 0], np.asarray(mask)[:, 0]
    assert [sorted(v[row, mask[row, t]].tolist()) for row, t in ((0, 0), (1, 0), (1, 1))] == [
        [0, 2, 3],
        [0, 2, 104, 105],
        [0, 2, 104, 105],  # it doesn't even see itself
    ]
    x = v[0, mask[0, 0]]
    weights = np.exp(2 * x / np.sqrt(2) - (2 * x / np.sqrt(2)).max())
    np.testing.assert_allclose(out[0, 0, 0, 0], (weights * x).sum() / weights.sum(), rtol=1e-5)
    # Removing moves them along; a place that is written anew is kept unless it is left out again.
    cache = change(cache, "remove", 1, 0, 1)
    cache, _, _, [(_, v, mask)] = _feed(cache, np.array([[1, -1, -1, -1], [6, -1, -1, -1]]), np.ones((2, BLOCK), bool))
    v, mask = np.asarray(v)[:, :, 0, 0], np.asarray(mask)[:, 0]
    assert sorted(v[0, mask[0, 0]].tolist()) == [0, 1]
    assert sorted(v[1, mask[1, 0]].tolist()) == [2, 104, 105, 106]
