"""What begin, put, get and the operations on sequences do and refuse, one small cache at a time.

Laws that hold for every cache stand in contract.py.
"""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxkv
from jaxkv import Cache, Chunk, Dense, Full, LayerSpec, Window


@dataclasses.dataclass(frozen=True)
class Count:
    """Keys whose first number is their position, re-rotated by adding."""

    def shift(self, k, delta):
        return k + delta.astype(k.dtype)


def make(*reaches, rows=2, capacity=12, max_block=4, **options):
    specs = [LayerSpec(reach, 1, 2, rotary=Count()) for reach in reaches]
    return Cache.init(specs, rows, capacity, max_block=max_block, **options)


@jax.jit
def feed(cache, positions, rows=None, spans=None):
    """Puts keys that are their position, and values that are 10 x position + row."""
    cache, step = cache.begin(positions, rows, spans)
    batch = step.rows[:, None]
    k = jnp.broadcast_to(positions[:, :, None, None].astype(jnp.float32), (*positions.shape, 1, 2))
    v = 10 * k + batch[:, :, None, None].astype(jnp.float32)
    layers = [layer if layer.num_stacked is None else layer.at(0) for layer in cache.layers]
    layers = [layer.put(step, k, v) for layer in layers]
    return cache.with_layers(layers), step, [layer.get(step) for layer in layers]


def fill(cache, length):
    """Feeds positions 0..length-1 to every row."""
    for begin in range(0, length, cache.max_block):
        p = np.arange(begin, begin + cache.max_block)
        p = np.where(p < length, p, -1)
        cache, _, _ = feed(cache, jnp.asarray(np.tile(p, (cache.num_rows, 1)), jnp.int32))
    return cache


def seen(step, gets, layer=0, row=0):
    """Returns per query of a batch row the sorted (key, value) that it may see; EMPTY queries give []."""
    k, v, mask = (np.asarray(x) for x in gets[layer])
    return [
        sorted((int(k[row, s, 0, 0]), int(v[row, s, 0, 0])) for s in np.flatnonzero(picture))
        for picture in mask[row, 0]
    ]


def keys(cache, row=0, layer=0):
    """Returns the keys that the next query of a row would see, its own aside, by value."""
    p = np.full((cache.num_rows, 1), -1)
    p[row] = int(cache.lengths[row])
    _, step, gets = feed(cache, jnp.asarray(p, jnp.int32))
    return [k for k, _ in seen(step, gets, layer, row)[0] if k != int(cache.lengths[row])]


def test_a_query_sees_what_lies_before_it_in_its_own_row():
    cache = make(Full())
    cache, step, gets = feed(cache, jnp.array([[0, 1, 2], [0, 1, -1]]))
    assert seen(step, gets, row=0) == [[(0, 0)], [(0, 0), (1, 10)], [(0, 0), (1, 10), (2, 20)]]
    assert seen(step, gets, row=1) == [[(0, 1)], [(0, 1), (1, 11)], []]
    assert cache.lengths.tolist() == [3, 2]


def test_a_flat_list_of_tokens_is_a_batch_of_single_tokens():
    cache = make(Full(), Window(2))
    rows = jnp.array([1, 0, 1, 1])
    cache, step, gets = feed(cache, jnp.array([[2], [0], [0], [1]]), rows)
    assert [[k for k, _ in seen(step, gets, row=b)[0]] for b in range(4)] == [[0, 1, 2], [0], [0], [0, 1]]
    assert [[k for k, _ in seen(step, gets, 1, b)[0]] for b in range(4)] == [[1, 2], [0], [0], [0, 1]]
    assert cache.lengths.tolist() == [1, 3]


def test_spans_see_each_other_in_both_directions_across_batch_rows():
    cache = make(Full())
    rows = jnp.array([0, 0, 0, 1])
    spans = jnp.array([[0], [7], [7], [7]])
    _, step, gets = feed(cache, jnp.array([[0], [1], [2], [0]]), rows, spans)
    assert [[k for k, _ in seen(step, gets, row=b)[0]] for b in range(4)] == [[0], [0, 1, 2], [0, 1, 2], [0]]


def test_a_position_written_again_is_replaced():
    cache = make(Full())
    cache = fill(cache, 4)
    cache, step = cache.begin(jnp.array([[2], [-1]]))
    layer = cache.layers[0].put(step, jnp.full((2, 1, 1, 2), 9.0), jnp.zeros((2, 1, 1, 2)))
    cache = cache.with_layers([layer])
    assert cache.lengths.tolist() == [4, 4]
    assert keys(cache) == [0, 1, 3, 9]


def test_a_ring_keeps_what_the_first_query_of_a_block_may_see():
    cache = fill(make(Window(3), capacity=64), 8)
    cache, step, gets = feed(cache, jnp.tile(jnp.arange(8, 12), (2, 1)))
    assert [[k for k, _ in row] for row in seen(step, gets)] == [[6, 7, 8], [7, 8, 9], [8, 9, 10], [9, 10, 11]]
    assert cache.groups[0].ring == 3 - 1 + 4


def test_past_the_capacity_a_row_stops_and_keeps_what_it_has():
    cache = fill(make(Full(), Window(3)), 12)
    held = jax.tree.map(np.asarray, cache.layers)
    for _ in range(2):  # and stays stopped
        cache, step, gets = feed(cache, jnp.array([[12], [-1]]))
        assert step.ok.tolist() == [False, True]
        assert step.positions.tolist() == [[-1], [-1]]
        assert seen(step, gets) == [[]]
    assert cache.ok.tolist() == [False, True]
    assert cache.lengths.tolist() == [12, 12]
    jax.tree.map(np.testing.assert_array_equal, held, jax.tree.map(np.asarray, cache.layers))
    with pytest.raises(jaxkv.CacheFullError) as caught:
        cache.check()
    assert "sequence 0 (holds 12) did not fit into capacity 12" in str(caught.value)
    cache = cache.rewind(jnp.array([8, 12])).retry(jnp.array([True, False]))
    cache, step, _ = feed(cache, jnp.array([[8], [-1]]))
    assert step.ok.all()
    cache.check()


def test_all_or_nothing_within_a_call():
    cache = fill(make(Full()), 10)
    cache, step, _ = feed(cache, jnp.array([[10, 11, 12], [10, 11, -1]]))
    assert step.ok.tolist() == [False, True]
    assert cache.lengths.tolist() == [10, 12]


def test_the_same_position_twice_in_one_call_is_refused():
    cache, step, _ = feed(make(Full()), jnp.array([[0, 1, 1], [0, 1, 2]]))
    assert step.ok.tolist() == [False, True]
    assert cache.lengths.tolist() == [0, 3]


def test_gaps_are_allowed():
    cache, step, gets = feed(make(Full()), jnp.array([[0, 5, 7], [3, -1, 4]]))
    assert [[k for k, _ in row] for row in seen(step, gets)] == [[0], [0, 5], [0, 5, 7]]
    assert cache.lengths.tolist() == [8, 5]


def test_remove_moves_the_rest_down_and_turns_its_keys():
    cache = jax.jit(Cache.remove)(fill(make(Full()), 8), 0, 2, 5)
    assert cache.lengths.tolist() == [5, 8]
    assert keys(cache, 0) == [0, 1, 2, 3, 4]  # Count: a key is its position, old 5, 6, 7 now say 2, 3, 4
    assert keys(cache, 1) == list(range(8))
    _, v, _ = cache.layers[0].get(cache.begin(jnp.array([[5], [8]]))[1])
    assert np.asarray(v)[0, :5, 0, 0].tolist() == [0, 10, 50, 60, 70]  # values are not rotated


def test_remove_in_a_ring():
    cache = jax.jit(Cache.remove)(fill(make(Window(4), capacity=64), 10), 0, 5, 7)
    assert cache.lengths.tolist() == [8, 10]
    assert keys(cache, 0) == [5, 6, 7]


@pytest.mark.parametrize(
    ("row", "begin", "end"), [(0, 5, 5), (0, 6, 2), (0, 8, 9), (5, 0, 4), (-1, 0, 4), (0, 20, None)]
)
def test_remove_of_nothing_changes_nothing(row, begin, end):
    before = fill(make(Full()), 8)
    after = before.remove(row, begin, end)
    jax.tree.map(np.testing.assert_array_equal, before.groups, after.groups)
    assert after.lengths.tolist() == [8, 8]
    assert keys(after) == keys(before)


def test_remove_with_an_end_needs_keys_that_can_turn():
    cache = Cache.init([LayerSpec(Full(), 1, 2, rotary=Count()), LayerSpec(Full(), 1, 2)], 1, 8)
    with pytest.raises(jaxkv.NotSupportedError, match=r"layer 1 has rotary=None.*end=None to truncate"):
        cache.remove(0, 1, 2)
    assert cache.remove(0, 0).lengths.tolist() == [0]


def test_rewind_lands_where_every_layer_can_go_on():
    cache = fill(make(Full(), Window(3), capacity=64), 12)  # ring 6: positions 6..11 are held
    assert int(cache.resume_point(0, 8)) == 8
    assert int(cache.resume_point(0, 7)) == 0  # a query at 7 would see 5, which is gone
    assert cache.can_resume(0, 8)
    assert not cache.can_resume(0, 7)
    assert cache.rewind(jnp.array([9, 7])).lengths.tolist() == [9, 0]
    assert cache.rewind(jnp.array([12, 99])).lengths.tolist() == [12, 12]
    assert keys(cache.rewind(jnp.array([9, 12])), 0, layer=1) == [7, 8]


def test_a_chunk_falls_back_to_the_start_of_its_chunk():
    cache = fill(make(Chunk(4), capacity=64, max_block=2), 12)  # ring 5: positions 7..11 are held
    assert int(cache.resume_point(0, 10)) == 10
    assert int(cache.resume_point(0, 8)) == 8
    assert int(cache.resume_point(0, 7)) == 4  # and a query at 4 sees nothing below it


def test_copy_prefix_and_take_copy_rows():
    cache = fill(make(Full(), rows=3), 6)
    copied = jax.jit(Cache.copy_prefix)(cache, 0, 2, 4)
    assert copied.lengths.tolist() == [6, 6, 4]
    assert keys(copied, 2) == [0, 1, 2, 3]
    _, step, gets = feed(copied, jnp.array([[-1], [-1], [4]]))
    assert seen(step, gets, row=2)[0][:2] == [(0, 0), (1, 10)]  # values of row 0
    taken = cache.take(jnp.array([2, 7, 2, -1]))
    assert taken.lengths.tolist() == [6, 0, 6, 0]
    assert taken.ok.all()


def test_copy_prefix_onto_itself_is_rewind():
    cache = fill(make(Window(5, sinks=2), capacity=24), 15).remove(0, 4, 15)
    assert int(cache.lengths[0]) == 4
    assert int(cache.resume_point(0, 4)) == 2  # 2 and 3 are overwritten
    assert cache.copy_prefix(0, 0, 99).lengths.tolist() == [4, 15]  # as long as it is: not touched
    assert cache.copy_prefix(0, 0, 3).lengths.tolist() == [2, 15]


def test_copy_prefix_of_unknown_rows():
    cache = fill(make(Full()), 6)
    assert cache.copy_prefix(0, 9, 4).lengths.tolist() == [6, 6]
    assert cache.copy_prefix(0, -1, 4).lengths.tolist() == [6, 6]
    assert cache.copy_prefix(9, 1, 4).lengths.tolist() == [6, 0]


def test_reset_forgets_and_makes_ok_again():
    cache = fill(make(Full()), 12)
    cache, _, _ = feed(cache, jnp.array([[12], [12]]))
    assert not cache.ok.any()
    cache = cache.reset(jnp.array([True, False]))
    assert cache.lengths.tolist() == [0, 12]
    assert cache.ok.tolist() == [True, False]


def test_describe_says_what_lies_where():
    cache = fill(make(Full(), Window(3, sinks=1), Full(), capacity=64), 11)
    cache = cache.remove(1, 0)
    text = cache.describe().splitlines()
    assert text[0].startswith("Cache(layers=3, num_rows=2, capacity=64")
    assert text[1].startswith("2 layers Full(): 1 x 2 k Dense('float32') v Dense('float32'), 64 slots, ")
    assert text[2:4] == ["  row 0: 0-10", "  row 1: empty"]
    assert text[4].startswith("1 layer Window(size=3, sinks=1): ")
    assert text[5] == "  row 0: 0, 5-10"
    assert "row 0" not in jax.eval_shape(lambda: cache).describe()  # shapes alone have no positions


def test_parts_are_printed_without_their_contents():
    cache = make(Full(), stacked=True)
    cache, step = cache.begin(P)
    assert repr(cache.layers[0]).startswith("Layer(k=float32[1,2,1,12,2], v=float32[1,2,1,12,2], index=None, group=0,")
    assert repr(step).startswith("Step(positions=int32[2,1], rows=int32[2], ok=bool[2], spans=None, groups=(GroupStep(")
    assert repr(cache).startswith("Cache(layers=1, num_rows=2, capacity=12, ")
    shapes = jax.tree.map(lambda x: x.shape, cache)
    assert repr(shapes).startswith("Cache(layers=(Layer(k=(1, 2, 1, 12, 2), ")
    assert repr(jax.tree.map(lambda x: None, cache)).startswith("Cache(layers=(Layer(k=None, ")
    assert repr(jax.eval_shape(lambda: cache)) == repr(cache)
    assert repr(cache) in str(nnx.Cache(cache))


def test_nbytes_is_what_the_arrays_take():
    cache = make(Full(), Window(3), Full(), stacked=True)
    assert cache.nbytes == sum(np.asarray(x).nbytes for x in jax.tree.leaves(cache))


def test_a_stack_is_the_carry_of_a_scan_over_layers():
    stacked = Cache.init([LayerSpec(Full(), 1, 2)] * 3, 2, 8, max_block=4, stacked=True)
    plain = Cache.init([LayerSpec(Full(), 1, 2)] * 3, 2, 8, max_block=4)
    p = jnp.array([[0, 1], [0, -1]])
    k = jnp.arange(3 * 2 * 2 * 2, dtype=jnp.float32).reshape(3, 2, 2, 1, 2)

    @jax.jit
    def run(cache):
        cache, step = cache.begin(p)

        def layer(stack, x):
            i, k = x
            layer = stack.at(i).put(step, k, k + 1)
            return layer.at(None), layer.get(step)

        stack, gets = jax.lax.scan(layer, cache.layers[0], (jnp.arange(3), k))
        return cache.with_layers([stack]), gets

    after, gets = run(stacked)
    plain, step = plain.begin(p)
    for i, layer in enumerate(plain.layers):
        want = layer.put(step, k[i], k[i] + 1).get(step)
        jax.tree.map(np.testing.assert_array_equal, want, jax.tree.map(lambda x: x[i], gets))  # noqa: B023
    assert jax.tree.structure(after) == jax.tree.structure(stacked)


def test_an_operation_outside_of_jit_is_one_program_that_later_calls_find_again(caplog):
    cache = Cache.init([LayerSpec(Full(), 1, 2), LayerSpec(Window(3), 1, 2)], 3, 11, max_block=5)
    positions, rows = jnp.tile(jnp.arange(5), (3, 1)), jnp.array([2, 1, 0])

    def compiled():
        caplog.clear()
        with jax.log_compiles():
            after, step = cache.begin(positions)
            layers = [layer.put(step, jnp.ones((3, 5, 1, 2)), jnp.ones((3, 5, 1, 2))) for layer in after.layers]
            after.with_layers(layers).take(rows).rewind(rows)
        return [record for record in caplog.records if record.getMessage().startswith("Compiling")]

    assert len(compiled()) < 20  # op by op they are over a hundred
    assert not compiled()


@pytest.mark.parametrize("layout", [jaxkv.Rows(), jaxkv.Pages(12, 4)], ids=["rows", "pages"])
def test_an_operation_outside_of_jit_copies_nothing_that_it_leaves_as_it_is(layout):
    cache = Cache.init([LayerSpec(Full(), 1, 2)], 3, 12, max_block=4, layout=layout)
    after, _ = cache.begin(jnp.array([[0, 1], [0, -1], [-1, -1]]))
    moved = [after, after.rewind(jnp.array([1, 1, 1])), after.reset(jnp.array([True, False, False]))]
    if layout != jaxkv.Rows():
        moved += [after.take(jnp.array([1, 0, 0])), after.copy_prefix(0, 2, 2)]
    for other in moved:
        assert other.layers[0].k is cache.layers[0].k


@pytest.mark.optimized
def test_a_sharded_cache_keeps_its_sharding_and_its_bookkeeping_is_replicated():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "heads"))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "heads"))
    cache = Cache.init([LayerSpec(Full(), 2, 2)], 2, 8, max_block=4, sharding=sharding)
    assert cache.layers[0].k.sharding.spec == sharding.spec
    assert cache.groups[0].positions.sharding.is_fully_replicated

    @jax.jit
    def put(cache):
        cache, step = cache.begin(jnp.array([[0, 1], [0, 1]]))
        x = jnp.ones((2, 2, 2, 2))
        return cache.with_layers([cache.layers[0].put(step, x, x)])

    after = put(cache)
    assert after.layers[0].k.sharding.is_equivalent_to(sharding, 4)
    assert "all-gather" not in put.lower(cache).compile().as_text()


def test_rows_divided_by_shard_map_are_each_as_one_device_has_them():
    specs = [LayerSpec(Full(), 1, 2, rotary=Count()), LayerSpec(Window(3), 1, 2, rotary=Count())]
    positions, k = jnp.tile(jnp.arange(3), (2, 1)).astype(jnp.int32), jnp.ones((2, 3, 1, 2))

    def put(cache, positions, k, rows=None):
        cache, step = cache.begin(positions, rows)
        return cache.with_layers([layer.at(0).put(step, k, k + 1) for layer in cache.layers])

    def edit(_, cache):
        cache = cache.take(jnp.array([1, 0])).copy_prefix(0, 1, 2).remove(0, 1, 2).rewind(jnp.array([9, 1]))
        return cache.reset(jnp.array([False, True])).retry(jnp.array([True, True]))

    def run(cache, positions, k):
        cache = put(cache, positions, k)
        cache = put(cache, jnp.array([[3]]), 2 * k[:1, :1], rows=jnp.array([1]))
        return jax.lax.fori_loop(0, 2, edit, cache)

    both = Cache.init(specs, 4, 12, max_block=4, stacked=True)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("rows",))
    rows = jax.sharding.PartitionSpec("rows")
    places = jax.tree.map(
        lambda x: jax.sharding.PartitionSpec(None, "rows") if x.ndim == 5 else rows, both
    )  # a stack's layers come first
    sharded = jax.shard_map(run, mesh=mesh, in_specs=(places, rows, rows), out_specs=places)
    k = jnp.concatenate([k, 3 * k])
    got = jax.jit(sharded)(both, jnp.tile(positions, (2, 1)), k)
    one = Cache.init(specs, 2, 12, max_block=4, stacked=True)
    alone = [jax.jit(run)(one, positions, k[i : i + 2]) for i in (0, 2)]
    jax.tree.map(
        lambda x, *parts: np.testing.assert_array_equal(x, np.concatenate(parts, int(x.ndim == 5))), got, *alone
    )


@pytest.mark.optimized
def test_reordering_rows_on_several_devices_gathers_a_block_at_a_time():
    mesh = jax.make_mesh((2, 2), ("rows", "heads"))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows", "heads"))
    cache = Cache.init([LayerSpec(Full(), 2, 4)], 4, 4096, sharding=sharding)
    for change in (lambda c: c.take(jnp.array([1, 0, 3, 2])), lambda c: c.copy_prefix(0, 3, 9)):
        text = jax.jit(change, donate_argnums=0).lower(cache).compile().as_text()
        moved = re.findall(r"f32\[([\d,]+)\]\S* (?:all-gather|all-reduce|all-to-all)\(", text)
        assert all(np.prod([int(n) for n in shape.split(",")]) <= 4 * 2 * 64 * 4 for shape in moved)


P = jnp.zeros((2, 1), jnp.int32)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Cache.init([], 1, 8), "specs is empty"),
        (lambda: Cache.init([Full()], 1, 8), "give one jaxkv.LayerSpec per layer"),
        (lambda: make(Full(), capacity=0), "Cache.init(capacity=0): capacity is a whole number of at least 1"),
        (lambda: make(Full(), rows=0), "num_rows=0"),
        (lambda: make(Full(), max_block=0), "max_block=0"),
        (lambda: make(Full(), slack=-1), "slack=-1"),
        (lambda: make(Window(2, sinks=12)), "keeps 12 sinks, but the capacity is 12"),
        (lambda: make(Full()).begin(jnp.zeros((2, 5), jnp.int32)), "a block of 5 tokens is longer than max_block 4"),
        (lambda: make(Full()).begin(jnp.zeros((3, 1), jnp.int32)), "3 batch rows, the cache 2 sequences"),
        (lambda: make(Full()).begin(jnp.zeros((2,), jnp.int32)), "give int [B, T]"),
        (lambda: make(Full()).begin(jnp.zeros((2, 1))), "positions has dtype float32; give integers"),
        (lambda: make(Full()).begin(jnp.zeros((2, 1), bool)), "positions has dtype bool"),
        (lambda: make(Full()).begin(P, rows=jnp.zeros((3,), jnp.int32)), "rows has shape (3,)"),
        (lambda: make(Full()).begin(P, rows=jnp.zeros((2,))), "rows has dtype float32"),
        (lambda: make(Full()).begin(P, spans=jnp.zeros((2, 2), jnp.int32)), "spans has shape (2, 2)"),
        (lambda: make(Full()).rewind(jnp.array([1])), "lengths has shape (1,), the cache 2 rows"),
        (lambda: make(Full()).reset(jnp.array([1, 0])), "give bool [2]"),
        (lambda: make(Full()).retry(True), "give bool [2]"),
        (lambda: make(Full()).take(jnp.array(0)), "give a list of row numbers"),
        (lambda: make(Full()).remove(jnp.array([0]), 0, 1), "name one sequence by an int32 scalar"),
        (lambda: make(Full()).with_layers([]), "with_layers got 0 layers, the cache has 1"),
        (lambda: make(Full()).with_layers([None]), "layer 0 is of type NoneType; give what its put returned"),
        (lambda: make(Full(), Window(3)).with_layers(make(Window(3), Full()).layers), "keep their order"),
        (lambda: make(Full()).layers[0].at(0), "not stacked"),
        (lambda: make(Full(), stacked=True).layers[0].get(make(Full()).begin(P)[1]), "choose one with stack.at(i)"),
        (lambda: make(Full()).layers[0].get(make(Full(), capacity=9).begin(P)[1]), "belongs to another cache"),
        (lambda: make(Full()).layers[0].get(None), "give the Step"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused_with_both_numbers_and_the_cure(call, says):
    with pytest.raises(ValueError) as caught:
        call()
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("k", "v", "says"),
    [
        ((2, 1, 1, 3), (2, 1, 1, 2), "k has shape (2, 1, 1, 3), this layer and step need [B, T, K, H] = (2, 1, 1, 2)"),
        ((2, 1, 1, 2), (2, 1, 2, 2), "v has shape (2, 1, 2, 2)"),
        ((2, 2, 1, 2), (2, 2, 1, 2), "k has shape (2, 2, 1, 2)"),
    ],
)
def test_put_refuses_wrong_shapes(k, v, says):
    cache, step = make(Full()).begin(P)
    with pytest.raises(ValueError) as caught:
        cache.layers[0].put(step, jnp.zeros(k), jnp.zeros(v))
    assert says in str(caught.value)


def test_integer_storage_refuses_fractions():
    spec = LayerSpec(Full(), 1, 2, k_storage=Dense("int8"))
    cache, step = Cache.init([spec], 2, 8).begin(P)
    with pytest.raises(ValueError, match=r"float32 numbers would be cut to int8.*store them with Dense\('float32'\)"):
        cache.layers[0].put(step, jnp.zeros((2, 1, 1, 2)), jnp.zeros((2, 1, 1, 2)))


def test_any_integer_dtype_of_positions_is_taken():
    for dtype in (np.int64, np.uint8, np.int16):
        cache, _ = make(Full()).begin(np.array([[3], [4]], dtype))
        assert cache.lengths.tolist() == [4, 5]
        assert cache.lengths.dtype == jnp.int32


HUGE = [2**31 - 1, 2**31, 2**32 + 1, 2**63 - 1, 2**64, 2**200]


@pytest.mark.parametrize("huge", HUGE)
def test_numbers_beyond_int32_are_as_large_as_possible_and_never_wrap(huge):
    cache = fill(make(Full(), Window(3), capacity=64), 8)
    for lengths in ([huge, huge], np.array([huge, huge])):
        jax.tree.map(np.testing.assert_array_equal, cache.rewind(lengths), cache)
    assert int(cache.resume_point(0, huge)) == 8
    assert int(cache.resume_point(0, -huge)) == int(cache.resume_point(0, 0))
    after, step = cache.begin([[huge], [8]])
    assert (step.ok.tolist(), after.lengths.tolist()) == ([False, True], [8, 9])
    after, step = cache.begin([[-huge], [8]], rows=[0, huge])
    assert (step.ok.tolist(), after.lengths.tolist()) == ([True, True], [8, 8])
    assert cache.remove(0, 3, huge).lengths.tolist() == [3, 8]
    assert cache.remove(0, huge).lengths.tolist() == cache.remove(huge, 0).lengths.tolist() == [8, 8]
    assert cache.copy_prefix(0, 1, huge).lengths.tolist() == [8, 8]
    assert cache.copy_prefix(huge, 1, 4).lengths.tolist() == [8, 0]
    assert cache.take([huge, 1]).lengths.tolist() == [0, 8]


@pytest.mark.parametrize("dtype", ["uint32", "uint64", "int64"])
def test_arrays_of_wider_integers_are_bounded_before_they_are_cast(dtype):
    huge = np.iinfo(dtype).max
    with jax.enable_x64(True):
        cache = make(Full())
        after, step = jax.jit(Cache.begin)(cache, jnp.array([[huge], [3]], dtype))
        assert (step.ok.tolist(), after.lengths.tolist()) == ([False, True], [0, 4])
        assert after.rewind(jnp.array([huge, huge], dtype)).lengths.tolist() == [0, 4]


def test_rows_move_outside_of_jit_under_x64():
    with jax.enable_x64(True):
        cache, *_ = feed(make(Full()), jnp.array([[0, 1], [0, -1]], jnp.int32))
        for after in (cache.take([1, 0]), cache.copy_prefix(0, 1, 2)):
            assert after.lengths[1] == 2
            assert after.layers[0].v[1, 0, :2, 0].tolist() == [0, 10]


def test_the_largest_capacity_keeps_its_rows_apart():
    cache = jax.eval_shape(lambda: Cache.init([LayerSpec(Full(), 1, 1)], 2, 2**30))
    assert cache.capacity == 2**30
    for sizes, says in (
        ({"capacity": 2**30 + 1}, "capacity is a whole number of at least 1 and at most 2**30 = 1,073,741,824"),
        ({"max_block": 2**31}, "max_block"),
        ({"slack": 2**31}, "slack"),
        ({"rows": 2**31}, "num_rows"),
    ):
        with pytest.raises(ValueError) as caught:
            make(Full(), **sizes)
        assert says in str(caught.value)
    for reach, sizes in ((Window, [2**31]), (Window, [1, 2**40]), (Chunk, [2**31]), (jaxkv.Cross, [2**31])):
        with pytest.raises(ValueError, match=r"at most 2\*\*30"):
            reach(*sizes)


def test_empty_batches_change_nothing_and_give_empty_results():
    cache = Cache.init([LayerSpec(reach, 1, 2) for reach in (Full(), Window(3), jaxkv.Cross(3))], 2, 12)
    for positions, rows in ((np.zeros((2, 0), int), None), (np.zeros((0, 3), int), None), (np.zeros((0, 1), int), [])):
        after, step = cache.begin(positions, rows)
        jax.tree.map(np.testing.assert_array_equal, after, cache)
        assert step.ok.tolist() == [True] * len(positions)
        x = jnp.zeros((*positions.shape, 1, 2))
        for layer in after.layers[:2]:
            same = layer.put(step, x, x)
            jax.tree.map(np.testing.assert_array_equal, same, layer)
            k, _, mask = same.get(step)
            assert (k.shape[0], mask.shape[2]) == positions.shape
    after, step = cache.begin_cross([], rows=[])
    x = jnp.zeros((0, 3, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, after.layers[2].put(step, x, x), cache.layers[2])
    assert cache.take([]).num_rows == 0


def test_caches_are_compared_by_identity():
    cache = make(Full())
    _, step = cache.begin(P)
    for part in (cache, cache.layers[0], cache.groups[0], step, step.groups[0]):
        assert part == part
        assert part != jax.tree.map(lambda x: x, part)
        assert {part: 1}[part] == 1


def test_the_default_block_follows_the_shortest_window_that_wraps():
    def made(*reaches, capacity=4096):
        return jax.eval_shape(lambda: Cache.init([LayerSpec(reach, 1, 2) for reach in reaches], 1, capacity))

    assert made(Full()).max_block == 512
    assert made(Full(), capacity=100).max_block == 100
    assert made(Full(), Window(128), Chunk(1000)).max_block == 128
    assert made(Window(200)).max_block == 128
    assert made(Window(3), jaxkv.Cross(5)).max_block == 64
    assert made(Window(8192)).max_block == 512
    cache = made(Full(), Window(128, sinks=4))
    assert cache.groups[1].num_slots == 320
    assert "4096 slots, " in cache.describe()
    assert "320 slots (4 sinks + 127 before a query + 128 for a block, in whole blocks of 64), " in cache.describe()


class _Model:
    specs = (LayerSpec(Full(), 1, 2),)


class _Attention:
    def layer_spec(self):
        return LayerSpec(Full(), 1, 2)


@pytest.mark.parametrize(
    ("given", "cure"),
    [
        (LayerSpec(Full(), 1, 2), "Cache.init([spec] * num_layers)"),
        (_Model(), "got a _Model; give the specs of its layers: Cache.init(model.specs, ...)"),
        (_Attention(), "Cache.init([layer.layer_spec()], ...)"),
        (nnx.Linear(1, 1, rngs=nnx.Rngs(0)), "got a Linear; give a list with one jaxkv.LayerSpec per layer"),
        (8, "got a int; give a list"),
    ],
)
def test_a_model_in_the_place_of_its_specs_is_refused_with_the_cure(given, cure):
    with pytest.raises(ValueError) as caught:
        Cache.init(given, 1, 8)
    assert cure in str(caught.value)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("reach", [Full(), Window(70, sinks=3), Chunk(64)], ids=str)
def test_take_and_copy_prefix_move_all_that_is_held_over_several_blocks(reach, stacked):
    cache = fill(make(reach, rows=3, capacity=200, max_block=50, stacked=stacked), 150)
    (layer,) = cache.layers
    mark = jnp.arange(3, dtype=jnp.float32)[:, None, None, None]
    mark = jnp.broadcast_to(mark, layer.k.shape[-4:]).reshape(layer.k.shape)
    cache = cache.with_layers([dataclasses.replace(layer, k=layer.k + mark, v=layer.v + mark)])
    held = np.asarray(cache.groups[0].positions[0]) >= 0

    def rows(cache):
        return np.moveaxis(np.asarray(cache.layers[0].k), -4, 0)[..., held, :]

    k = rows(cache)
    np.testing.assert_array_equal(rows(jax.jit(Cache.take)(cache, jnp.array([2, 2, 0]))), k[[2, 2, 0]])
    copied = jax.jit(Cache.copy_prefix)(cache, 2, 0, 150)
    np.testing.assert_array_equal(rows(copied), k[[2, 1, 2]])
    assert copied.lengths.tolist() == [150] * 3


def test_gradients_flow_through_take_and_copy_prefix():
    cache = fill(make(Full(), rows=2), 4)

    def loss(k, change):
        (layer,) = cache.layers
        after = change(cache.with_layers([dataclasses.replace(layer, k=k)]))
        return (after.layers[0].k[:, 0, :4, 0] * jnp.array([[1.0] * 4, [2.0] * 4])).sum()

    got = jax.grad(loss)(cache.layers[0].k, lambda c: c.take(jnp.array([1, 1])))
    assert got[:, 0, :4, 0].tolist() == [[0] * 4, [3] * 4]
    got = jax.grad(loss)(cache.layers[0].k, lambda c: c.copy_prefix(0, 1, 4))
    assert got[:, 0, :4, 0].tolist() == [[3] * 4, [0] * 4]


def test_a_donated_cache_says_what_to_use_instead():
    cache = make(Full())
    jax.jit(lambda c: c.reset(jnp.array([True, True])), donate_argnums=0)(cache)
    for use in (
        lambda: cache.begin(P),
        cache.check,
        cache.describe,
        lambda: cache.rewind(jnp.array([0, 0])),
        lambda: cache.take(jnp.array([0])),
    ):
        with pytest.raises(jaxkv.CacheError, match="continue with the cache that the function returned"):
            use()
