"""jaxkv.testing finds what it is there to find: right things pass, each deliberate fault is caught and named."""

from __future__ import annotations

import collections
import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv import Cache, Chunk, Cross, Dense, Full, LayerSpec, Pages, Rotary, Window
from jaxkv.testing import (
    Begin,
    CopyPrefix,
    Keep,
    Machine,
    Oracle,
    Remove,
    Reset,
    Retry,
    Rewind,
    Take,
    assert_cache_correct,
    assert_only_written,
    assert_pages_sound,
    run_program,
)

# ---------------------------------------------------------------- the oracle


def test_oracle_sizes_rings_by_reach_and_block_or_slack():
    oracle = Oracle([Window(5, sinks=2), Chunk(4), Full(), Window(90)], num_rows=1, capacity=24, max_block=3, slack=6)
    assert list(oracle.ring.values()) == [4 + 6, 3 + 6, 24, 24]
    assert [oracle.slot(Window(5, sinks=2), p) for p in (0, 1, 2, 11, 12, 13)] == [0, 1, 2, 11, 2, 3]


def test_oracle_sees_what_reach_and_order_allow():
    oracle = Oracle([Full(), Window(2, sinks=1), Chunk(4)], num_rows=1, capacity=12, max_block=6)
    oracle.begin([range(6)], tokens=[range(6)])
    step = oracle.begin([[6, -1, 8]], tokens=[[6, 0, 8]])
    pictures = [
        ["".join(str(int(p in sees[reach])) for p in range(9)) for reach in oracle.reaches]
        for sees in step.sees[0]
        if sees is not None
    ]
    assert pictures == [
        ["111111100", "100001100", "000011100"],
        ["111111101", "100000001", "000000001"],
    ]


def test_oracle_spans_see_each_other():
    oracle = Oracle([Full()], num_rows=1, capacity=8, max_block=4)
    step = oracle.begin([[0, 1, 2, 3]], spans=[[0, 7, 7, 0]], tokens=[[0, 1, 2, 3]])
    assert [sorted(sees[Full()]) for sees in step.sees[0]] == [[0], [0, 1, 2], [0, 1, 2], [0, 1, 2, 3]]


def test_oracle_refuses_what_does_not_fit():
    oracle = Oracle([Window(3)], num_rows=4, capacity=8, max_block=2)
    step = oracle.begin([[0, 1], [0, 0], [7, 8], [-1, -1]], tokens=np.zeros((4, 2), int))
    assert step.ok.tolist() == [True, False, False, True]
    assert step.positions.tolist() == [[0, 1], [-1, -1], [-1, -1], [-1, -1]]
    assert oracle.lengths == [2, 0, 0, 0]
    assert oracle.ok == [True, False, False, True]


def test_oracle_resumes_where_nothing_seen_is_overwritten():
    oracle = Oracle([Window(3)], num_rows=1, capacity=20, max_block=2)  # 4 slots: 6, 7, 8, 9
    for p in range(0, 10, 2):
        oracle.begin([[p, p + 1]], tokens=[[p, p + 1]])
    assert [oracle.resume_point(0, p) for p in (10, 9, 8, 7, 1)] == [10, 9, 8, 0, 0]
    oracle.remove(0, 7)
    assert oracle.lengths == [0]


def test_oracle_moves_tokens_down():
    oracle = Oracle([Full()], num_rows=1, capacity=8, max_block=4)
    oracle.begin([[0, 1, 2, 3]], tokens=[[10, 11, 12, 13]])
    oracle.remove(0, 1, 3)
    assert oracle.history == [{0: 10, 1: 13}]
    assert oracle.lengths == [2]


def test_oracle_keeps_an_encoder_output_with_the_row():
    oracle = Oracle([Full(), Cross(3)], num_rows=3, capacity=8, max_block=4)
    tokens = [[10, 11, 12], [20, 21, 22], [30, 31, 32]]
    assert oracle.begin_cross([2, 3, 4], tokens=tokens).tolist() == [True, True, False]
    assert oracle.begin_cross([1, 1, -1], rows=[0, 0, 1], tokens=tokens).tolist() == [False, False, True]
    oracle.retry([True] * 3)
    step = oracle.begin([[5], [0], [0]], tokens=[[0], [0], [0]])
    assert [sees[0][Cross(3)] for sees in step.sees] == [{0: 10, 1: 11}, {0: 20, 1: 21, 2: 22}, {}]
    oracle.rewind([0, 0, 0])
    oracle.copy_prefix(0, 2, 0)
    oracle.reset([False, True, False])
    assert oracle.encoded == [[10, 11], None, [10, 11]]


def test_oracle_refuses_to_follow_a_cache_without_a_reason():
    oracle = Oracle([Full()], num_rows=1, capacity=8, max_block=4)
    with pytest.raises(ValueError, match="row 0 fits and has no gaps"):
        oracle.begin([[0]], tokens=[[0]], refused=[0])
    oracle.begin([[0]], tokens=[[0]])
    with pytest.raises(ValueError, match="must have length 1, not 0"):
        oracle.settle(0, 0)


# ---------------------------------------------------------------- the oracle's pages


def paged(*reaches, num_pages, page_size=2, num_rows=3, capacity=8, max_block=4):
    return Oracle(
        reaches,
        num_rows=num_rows,
        capacity=capacity,
        max_block=max_block,
        num_pages=num_pages,
        page_size=page_size,
    )


def give(oracle, *positions):
    """Gives each row tokens at these positions in one call, and returns which rows were served."""
    longest = max(map(len, positions))
    positions = [[*row, *[-1] * (longest - len(row))] for row in positions]
    return oracle.begin(positions, tokens=np.zeros_like(positions)).ok.tolist()


def sharers(oracle):
    """Returns for each row, place by place, which rows have the page, of the first reach."""
    pool, *_ = oracle.pools.values()
    return [{i: "".join(map(str, sorted(page))) for i, page in row.items()} for row in pool.table]


def test_oracle_gives_each_pool_what_its_reach_needs():
    reaches = Full(), Window(3, sinks=1), Window(90), Cross(3)  # 7 + 1 slots in the ring, 8 in the long window
    sizes = [pool.size for pool in paged(*reaches, num_pages=99, page_size=3).pools.values()]
    assert sizes == [99, 3 * 3, 3 * 3, 3 * 1]
    assert [pool.size for pool in paged(*reaches, num_pages=5, page_size=3).pools.values()] == [5, 5, 5, 3]


def test_oracle_serves_rows_in_order_while_there_are_pages():
    oracle = paged(Full(), num_pages=4)
    assert give(oracle, (0, 1, 2), (0, 1, 2, 3), (0,)) == [True, True, False]
    assert sharers(oracle) == [{0: "0", 1: "0"}, {0: "1", 1: "1"}, {}]
    oracle.reset([True, False, True])
    assert give(oracle, (0, 1, 2, 3), (4, 5), (0,)) == [True, False, False]  # row 0 took the two pages
    oracle = paged(Full(), num_pages=4)
    assert give(oracle, (0, 1, 2), (0, 1, 2, 3, 4), (0,)) == [True, False, True]  # a small one after a large one


def test_oracle_takes_pages_of_all_reaches_or_of_none():
    oracle = paged(Full(), Window(2), num_pages=3, num_rows=2)  # 5 slots in the ring: 3 pages a row
    assert give(oracle, (0, 1, 2, 3), ()) == [True, True]
    oracle.remove(0, 0, 2)
    assert [pool.num_free for pool in oracle.pools.values()] == [2, 2]
    assert give(oracle, (2, 3), (0, 1, 2, 3)) == [True, False]
    assert [pool.num_free for pool in oracle.pools.values()] == [1, 1]


def test_oracle_lets_the_last_sharer_keep_a_page():
    oracle = paged(Full(), num_pages=3)
    give(oracle, (0,), (), ())
    oracle.take([0, 0, 0])
    assert sharers(oracle) == [{0: "012"}] * 3
    assert give(oracle, (1,), (1,), (1,)) == [True, True, True]  # three pages are enough for three rows
    assert sharers(oracle) == [{0: "0"}, {0: "1"}, {0: "2"}]


def test_oracle_copies_for_the_last_sharer_when_another_was_refused_or_does_not_write():
    oracle = paged(Full(), num_pages=2)
    give(oracle, (0,), (), ())
    oracle.take([0, 0, 0])
    assert give(oracle, (1,), (1,), (1,)) == [True, False, False]
    assert sharers(oracle) == [{0: "0"}, {0: "12"}, {0: "12"}]
    oracle = paged(Full(), num_pages=2)
    give(oracle, (0,), (), ())
    oracle.take([0, 0, 0])
    assert give(oracle, (1,), (), (1,)) == [True, True, False]


def test_oracle_gives_back_pages_in_which_nothing_is_held():
    oracle = paged(Full(), num_pages=9)
    give(oracle, (0, 1, 2, 3), (0, 1, 2), ())
    oracle.copy_prefix(0, 2, 3)
    assert sharers(oracle) == [{0: "02", 1: "02"}, {0: "1", 1: "1"}, {0: "02", 1: "02"}]
    oracle.rewind([2, 9, 9])
    assert sharers(oracle) == [{0: "02"}, {0: "1", 1: "1"}, {0: "02", 1: "2"}]
    oracle.keep(np.arange(8) == np.array([[0], [2], [9]]))
    assert sharers(oracle) == [{0: "0"}, {1: "1"}, {}]
    oracle.reset([True, True, True])
    assert oracle.pools[Full()].num_free == 9


def test_oracle_remembers_what_a_mask_names_and_where_the_row_goes_on():
    oracle = paged(Full(), num_pages=9)
    give(oracle, (0, 1, 2, 3), (), ())
    oracle.keep(np.arange(8)[None].repeat(3, 0) % 2 == 0)
    assert oracle.lengths[0] == 4
    step = oracle.begin([[4], [-1], [-1]], tokens=[[7], [0], [0]])
    assert sorted(step.sees[0][0][Full()]) == [0, 2, 4]


def test_oracle_moves_tokens_down_only_with_pages_of_its_own():
    oracle = paged(Full(), num_pages=4)
    give(oracle, (0, 1, 2, 3, 4), (), ())
    oracle.copy_prefix(0, 1, 5)
    oracle.remove(1, 0, 2)  # moves into two shared pages, and there is one page left
    assert (oracle.ok[1], oracle.lengths[1], oracle.pools[Full()].num_free) == (False, 5, 1)
    oracle.remove(1, 2, 4)  # moves into one
    assert (oracle.lengths[1], sharers(oracle)[1]) == (3, {0: "01", 1: "1"})
    oracle.remove(1, 3, 9)  # there is nothing to move
    assert oracle.ok[1] is False
    assert sharers(oracle)[0] == {0: "01", 1: "0", 2: "0"}


def test_oracle_never_lacks_pages_for_an_encoder_output():
    oracle = paged(Cross(3), num_pages=1)
    tokens = np.zeros((3, 3), int)
    oracle.begin_cross([3, -1, -1], tokens=tokens)
    oracle.take([0, 0, 0])
    assert oracle.begin_cross([3, 1, -1], tokens=tokens).tolist() == [True, True, True]
    assert sharers(oracle) == [{0: "0", 1: "0"}, {0: "1"}, {0: "2", 1: "2"}]


def test_oracle_follows_a_cache_that_holds_less_only_where_it_may():
    oracle = Oracle([Full(), Window(2)], num_rows=1, capacity=8, max_block=2)
    oracle.begin([[0, 1]], tokens=[[0, 1]])
    with pytest.raises(ValueError, match=r"row 0 must hold positions \[0, 1\] of Full\(\), not \[1\]"):
        oracle.settle(0, 2, {Full(): [1], Window(2): [0, 1]})
    oracle.begin([[4, 5]], tokens=[[4, 5]])  # gaps
    held = {Full(): [0, 1, 4, 5], Window(2): [4, 5]}
    with pytest.raises(ValueError, match=r"of Full\(\), not \[0, 4, 5\]"):
        oracle.settle(0, 6, held | {Full(): [0, 4, 5]})
    oracle.settle(0, 6, held)
    assert sorted(oracle.kept[0][Window(2)]) == [4, 5]


# ---------------------------------------------------------------- programs


@dataclasses.dataclass(frozen=True)
class LongWindow(Window):
    """Sees one token more than it says."""

    def sees(self, q, s):
        return (s >= q - self.size) | (s < self.sinks)


@dataclasses.dataclass(frozen=True)
class ForgetfulWindow(Window):
    """Says that nothing before a position is needed to go on from it."""

    def first(self, p):
        return p


@dataclasses.dataclass(frozen=True)
class Negated(Dense):
    """Hands out the negative of what was put."""

    def decode(self, stored):
        return -stored


def small(reach, **storage):
    return Cache.init([LayerSpec(reach, 1, 2, **storage)], num_rows=1, capacity=16, max_block=4)


def steps(*starts):
    return [Begin((tuple(range(p, p + 4)),)) for p in starts]


def test_a_wrong_mask_is_shown_as_a_picture():
    with pytest.raises(AssertionError) as error:
        run_program(small(LongWindow(2)), steps(0))
    assert "after operation 0 cache and oracle differ: layer 0 LongWindow(size=2, sinks=0)" in str(error.value)
    assert [line.split() for line in str(error.value).splitlines()[2:6]] == [
        ["q=0", "1000000000000000", "1000000000000000"],
        ["q=1", "1100000000000000", "1100000000000000"],
        ["q=2", "0110000000000000", "1110000000000000", "<-"],
        ["q=3", "0011000000000000", "0111000000000000", "<-"],
    ]


def test_a_reported_program_can_be_run_again():
    def report(source):
        with pytest.raises(AssertionError) as error:
            run_program(small(LongWindow(2)), source)
        return str(error.value)

    first = report(3)
    assert "source: 3" in first
    names = {x.__name__: x for x in (Begin, CopyPrefix, Keep, Remove, Reset, Retry, Rewind, Take)}
    program = eval(first[first.index("program = [") + len("program = ") : first.index("]\ncache:") + 1], names)
    assert report(program) == first[: first.index("\nsource: 3")]


def test_a_row_that_resumes_where_it_can_not_is_caught():
    with pytest.raises(AssertionError, match="row 0 must have length 0, not 7"):
        run_program(small(ForgetfulWindow(4)), [*steps(0, 4, 8), Rewind((7,))])


def test_wrong_values_are_caught():
    with pytest.raises(AssertionError, match=r"Full\(\): v of batch row 0, position 0 \(slot 0\)"):
        run_program(small(Full(), v_storage=Negated()), steps(0))


def test_a_cache_that_holds_something_is_refused():
    cache, _ = small(Full()).begin(jnp.zeros((1, 1), jnp.int32))
    with pytest.raises(ValueError, match="give an empty one"):
        run_program(cache, 0)
    encoded, _ = small(Cross(2)).begin_cross(jnp.zeros((1,), jnp.int32))
    with pytest.raises(ValueError, match=r"encoder outputs of rows \[0\]; give an empty one"):
        run_program(encoded, 0)
    with pytest.raises(ValueError, match="give an empty one"):
        assert_cache_correct(None, None, cache, vocab_size=3)


# ---------------------------------------------------------------- pages

PROGRAMS = int(os.environ.get("JAXKV_PROGRAMS", "25")) // 4 + 1


def on_pages(*specs, num_pages, page_size, num_rows=4, capacity=24, **options):
    layout = Pages(num_pages, page_size)
    return Cache.init(specs, num_rows, capacity, layout=layout, max_block=4, **options)


def turned(reach, **options):
    return LayerSpec(reach, 2, 4, rotary=Rotary(), **options)


# Tiny pools, whose pages divide neither capacity nor ring, or do; the contract's table has ample ones.
TINY = {
    "mixture": lambda: on_pages(
        turned(Full()), turned(Window(5, sinks=2)), turned(Chunk(4)), num_pages=11, page_size=5, slack=2
    ),
    "cells, some dropped": lambda: on_pages(
        turned(Window(5), drops=True), LayerSpec(Cross(3), 2, 4), turned(Window(5)), num_pages=17, page_size=1
    ),
}


@pytest.mark.parametrize("make", TINY.values(), ids=TINY)
def test_random_programs_with_trees_agree_with_the_oracle_on_tiny_pools(make):
    counts = collections.Counter()
    for seed in range(PROGRAMS):
        counts += run_program(make(), seed, num_operations=40, trees=True)
    kinds = ("did not fit", "Grow", "Remove", "CopyPrefix", "Take", "Keep")
    assert min(counts[kind] for kind in kinds) > PROGRAMS / 2, counts


def test_random_programs_with_trees_agree_with_the_oracle_on_rows():
    specs, counts = (turned(Full()), turned(Window(5, sinks=2), rotary_at="read")), collections.Counter()
    for seed in range(PROGRAMS):
        counts += run_program(Cache.init(specs, 4, 24, max_block=4, slack=2), seed, num_operations=30, trees=True)
    assert counts["Grow"] > PROGRAMS, counts


NONE = (-1,) * 4
FORKED = Begin(((0, 1, 2, 3), NONE)), CopyPrefix(0, 1, 2), Begin(((4, -1, -1, -1), NONE))
FULL = Begin(((5, 6, 7, -1), NONE)), CopyPrefix(0, 1, 7), Begin((NONE, (7, -1, -1, -1)))


def run_on_forked(*operations):
    """Two rows share their first page, then one gets two pages more; 4 pages of 2 are free. Then these operations."""
    machine = Machine(on_pages(turned(Full()), num_pages=7, page_size=2, num_rows=2, capacity=8))
    for operation in (*FORKED, *operations):
        machine.run(operation)
    return machine


def forked():
    return run_on_forked().cache


@pytest.mark.parametrize("row", [0, 1])
def test_tokens_move_into_shared_pages_only_if_there_are_pages_for_copies(row):
    machine = run_on_forked(*FULL, Remove(row, 0, 2))  # three pages of four are shared, and two are free
    assert machine.oracle.ok[row] is False
    machine.run(Remove(row, 2, 4))  # two copies
    assert machine.oracle.lengths[row] == 6


def test_pages_in_which_nothing_moves_are_not_written():
    run_on_forked(*FULL[:2], Keep(((), (0,))), Remove(1, 5, 6))  # row 0 has position 0 in a page that row 1 has too


def with_pool(cache, **arrays):
    group = cache.groups[0]
    pool = dataclasses.replace(
        group.pages, **{name: change(getattr(group.pages, name)) for name, change in arrays.items()}
    )
    return dataclasses.replace(cache, groups=(dataclasses.replace(group, pages=pool),))


def test_pages_that_are_sound_pass():
    cache = forked()
    pool = cache.groups[0].pages
    assert [sorted(set(row.tolist()) - {7}) for row in np.asarray(pool.table)] == [[4, 5, 6], [6]]
    assert pool.free[: int(pool.num_free)].tolist() == [0, 1, 2, 3]
    assert_pages_sound(cache)
    assert_pages_sound(small(Full()))


@pytest.mark.parametrize(
    ("fault", "report"),
    [
        ({"refs": lambda x: x.at[6].set(1)}, r"page 6 counts 1 references, but the tables name it 2 times"),
        ({"table": lambda x: x.at[1, 3].set(-1)}, r"row 1 names page -1 at place 3; there are pages 0 to 6, and 7 for"),
        ({"free": lambda x: x.at[0].set(3)}, r"the free list has page 3 2 times\n.*page 0 is lost: in no table"),
        ({"free": lambda x: x.at[0].set(5)}, r"page 5 is in use and in the free list"),
        ({"free": lambda x: x.at[0].set(-1)}, r"the free list names pages that there are not: \[-1  1  2  3\]"),
        ({"num_free": lambda x: x - 1}, r"page 3 is lost: in no table and not in the free list"),
        ({"num_free": lambda x: x + 4}, r"8 of 7 pages are said to be free"),
        ({"table": lambda x: x.at[1, 1].set(3)}, r"row 1 has page 3 at place 1, where it holds positions \[\]"),
        ({"table": lambda x: x.at[1, 0].set(7)}, r"row 1 has no page at place 0, where it holds positions \[0, 1\]"),
        ({"table": lambda x: x.at[0, 1].set(6)}, r"page 6 is at place 0 of row 0 .* at place 1 of row 0 with \[2, 3\]"),
    ],
)
def test_a_fault_in_a_pool_is_named(fault, report):
    with pytest.raises(AssertionError, match=f"(?s)the pages of this cache are not sound:\npool of Full.*{report}"):
        assert_pages_sound(with_pool(forked(), **fault))


def test_rows_that_share_a_page_and_differ_in_its_positions_are_named():
    cache = forked()
    group = dataclasses.replace(cache.groups[0], positions=cache.groups[0].positions.at[1, 1].set(3))
    with pytest.raises(AssertionError, match=r"page 6 is at place 0 of row 0 with positions \[0, 1\], .* \[0, 3\]"):
        assert_pages_sound(dataclasses.replace(cache, groups=(group,)))


def test_a_put_into_a_shared_page_is_named():
    before = forked()
    layer = before.layers[0]
    after = before.with_layers([dataclasses.replace(layer, v=layer.v.at[6, 0, 1].add(1))])
    assert_only_written(before, after, [[1], [1]])
    with pytest.raises(
        AssertionError, match=r"row 1 was given nothing at position 1, but v of layer 0, Full\(\), chan"
    ):
        assert_only_written(before, after, [[1], [-1]])
    with pytest.raises(AssertionError, match="row 0 was given nothing at position 1"):
        assert_only_written(before, after, [[1]], rows=[1])


def test_a_put_beside_its_row_is_named_on_rows_too():
    cache = run_on_rows()
    layer = cache.layers[0]
    after = cache.with_layers([dataclasses.replace(layer, k=layer.k.at[0, 0, 2].add(1))])
    with pytest.raises(AssertionError, match="row 0 was given nothing at position 2, but k of layer 0"):
        assert_only_written(cache, after, [[3]])


def run_on_rows():
    machine = Machine(small(Full()))
    machine.run(steps(0)[0])
    return machine.cache


# ---------------------------------------------------------------- a model, right and wrong

VOCAB, WIDTH, WINDOW = 11, 8, 5


def init_params():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"embed": (VOCAB, WIDTH), "place": (64, WIDTH), "qkv": (2, 3, WIDTH, WIDTH)}
    return {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}


def mix(q, k, v, mask):
    """Attention of one head; q [B, T, H], k [B, S, H], mask [B, T, S]."""
    scores = jnp.where(mask, jnp.einsum("bth,bsh->bts", q, k) / np.float32(WIDTH**0.5), -1e9)
    return jnp.einsum("bts,bsh->bth", jax.nn.softmax(scores), v)


def project(params, layer, x):
    return [jnp.einsum("btd,dh->bth", x, params["qkv"][layer, i]) / np.float32(WIDTH**0.5) for i in range(3)]


def embed(params, tokens, positions):
    return params["embed"][tokens] + params["place"][jnp.maximum(positions, 0)]


@jax.jit
def uncached(params, tokens):
    length = tokens.shape[1]
    x = embed(params, tokens, jnp.broadcast_to(jnp.arange(length), tokens.shape))
    q, s = jnp.arange(length)[:, None], jnp.arange(length)[None]
    for layer, mask in enumerate([(s <= q) & (s > q - WINDOW), s <= q]):
        x = x + mix(*project(params, layer, x), mask[None])
    return jnp.einsum("btd,vd->btv", x, params["embed"])


def cached(params, tokens, positions, cache, *, fault=None):
    given = cache
    if fault == "positions start over with each block":
        real = positions >= 0
        x = embed(params, tokens, jnp.where(real, jnp.arange(tokens.shape[1])[None], 0))
    elif fault == "positions are off by one":
        x = embed(params, tokens, positions + 1)
    else:
        x = embed(params, tokens, positions)
    if fault == "padding is taken for tokens":
        positions = jnp.maximum(positions, 0)
    if fault == "rows mix":
        x = x + x.mean(0, keepdims=True)
    cache, step = cache.begin(positions)
    layers = []
    for i, layer in enumerate(cache.layers):
        q, k, v = project(params, i, x)
        put = layer.put(step, k[:, :, None], v[:, :, None])
        if fault != "a layer is not handed on" or i == 0:
            layer = put
        k, v, mask = put.get(step)
        mask = mask[:, 0]
        if fault == "the step's mask is ignored":
            mask = jnp.ones_like(mask)
        elif fault == "the mask asks slots, not positions":
            mask = jnp.arange(k.shape[1])[None, None] <= step.positions[:, :, None]
        x = x + mix(q, k[:, :, 0], v[:, :, 0], mask)
        layers.append(layer)
    if fault == "with_layers is forgotten":
        layers = cache.layers
    if fault == "the cache of begin is forgotten":
        cache = given
    return jnp.einsum("btd,vd->btv", x, params["embed"]), cache.with_layers(layers)


def model_cache(window=WINDOW, **sizes):
    specs = [LayerSpec(Window(window), 1, WIDTH), LayerSpec(Full(), 1, WIDTH)]
    return Cache.init(specs, **{"num_rows": 3, "capacity": 24, "max_block": 4} | sizes)


def test_a_right_model_passes_in_every_way_of_feeding():
    differences = assert_cache_correct(cached, init_params(), model_cache(), vocab_size=VOCAB, uncached=uncached)
    assert max(differences.values()) < 1e-4
    assert {"token by token", "padding in the middle", "rejected draft, then rewind"} < set(differences)


def test_a_right_model_passes_without_an_uncached_form():
    assert_cache_correct(cached, init_params(), model_cache(), vocab_size=VOCAB, ways=["token by token"])


@pytest.mark.parametrize(
    ("fault", "way", "report"),
    [
        ("positions start over with each block", "in blocks of max_block", "WRONG  first at position 4 of row 0"),
        ("positions are off by one", "in blocks of max_block", "WRONG  first at position 0 of row 0"),
        ("padding is taken for tokens", "padding on the right", r"WRONG  row \d holds \d tokens and does not fit"),
        ("rows mix", "row by row", "WRONG  first at position"),
        ("the step's mask is ignored", "in blocks of max_block", "WRONG  first at position 0 of row 0"),
        ("the mask asks slots, not positions", "in blocks of max_block", "WRONG  first at position 5 of row 0"),
        ("a layer is not handed on", "token by token", "nothing was ever put into layer 1 .*with_layers"),
        ("with_layers is forgotten", "token by token", "nothing was ever put into layer 0 .*with_layers"),
        ("the cache of begin is forgotten", "token by token", r"cache, step = cache.begin\(positions\)"),
    ],
)
def test_a_wrong_model_is_caught_and_the_fault_shown(fault, way, report):
    forward = functools.partial(cached, fault=fault)
    with pytest.raises(AssertionError, match=f"(?s){report}"):
        assert_cache_correct(
            forward, init_params(), model_cache(), vocab_size=VOCAB, uncached=uncached, ways=[way], seed=1
        )


def test_a_report_says_of_every_way_whether_it_is_right():
    forward = functools.partial(cached, fault="positions start over with each block")
    ways = ["in one block", "in blocks of max_block"]
    with pytest.raises(AssertionError) as error:
        assert_cache_correct(forward, init_params(), model_cache(), vocab_size=VOCAB, uncached=uncached, ways=ways)
    first, one_block, blocks, *picture = str(error.value).splitlines()
    assert first.startswith("cached decoding differs from uncached decoding")
    assert "in one block " in one_block
    assert "right  largest difference" in one_block
    assert "WRONG  first at position 4 of row 0, off by" in blocks
    assert picture[0] == "wrong positions when fed in blocks of max_block, over positions 0..23:"
    assert picture[1] == "  row 0  000011111111111111111111"


@pytest.mark.parametrize("window", [WINDOW - 1, WINDOW + 1])
def test_a_spec_with_another_window_than_the_model_is_caught(window):
    with pytest.raises(AssertionError, match=r"in one block +WRONG") as error:
        assert_cache_correct(
            cached, init_params(), model_cache(window), vocab_size=VOCAB, uncached=uncached, ways=["in one block"]
        )
    first = min(window, WINDOW)
    assert f"over positions 0..23:\n  row 0  {'0' * first}1" in str(error.value)


def test_a_forward_that_returns_another_kind_of_cache_is_caught():
    def forward(params, tokens, positions, cache):
        logits, cache = cached(params, tokens, positions, cache)
        return logits, dataclasses.replace(cache, slack=cache.slack + 1)

    with pytest.raises(AssertionError, match="must return the kind of cache it was given"):
        assert_cache_correct(forward, init_params(), model_cache(), vocab_size=VOCAB, ways=["token by token"])


def test_a_way_of_feeding_must_be_known():
    with pytest.raises(ValueError, match=r"unknown ways of feeding .*backwards.*; there are in one block, "):
        assert_cache_correct(cached, init_params(), model_cache(), vocab_size=VOCAB, ways=["backwards"])


def test_tokens_must_fit_the_cache():
    with pytest.raises(ValueError, match="give vocab_size, or tokens"):
        assert_cache_correct(cached, init_params(), model_cache())
    with pytest.raises(ValueError, match=r"tokens has shape \(3, 25\), the cache 3 rows of capacity 24"):
        assert_cache_correct(cached, init_params(), model_cache(), tokens=np.zeros((3, 25), int))
