"""Cross layers: an encoder's output, written once per row and seen from everywhere in it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import Cache, Cross, Dense, Full, LayerSpec, Rotary, Window, attend

ROWS, SIZE, CAPACITY = 3, 5, 12
PAST = LayerSpec(Window(3), 1, 2, rotary=Rotary())
CROSS = LayerSpec(Cross(SIZE), 1, 2)


def make(*specs, **options):
    return Cache.init(specs or (PAST, CROSS), ROWS, CAPACITY, max_block=4, **options)


@functools.partial(jax.jit, static_argnames="size")
def encode(cache, lengths, rows=None, first=0.0, size=SIZE):
    """Puts keys and values that are first, first + 1, ... into the Cross layers."""
    cache, step = cache.begin_cross(lengths, rows)
    x = first + jnp.arange(size, dtype=jnp.float32)[None, :, None, None] * jnp.ones((lengths.shape[0], 1, 1, 2))
    layers = [layer.put(step, x, x) if layer.spec.reach == Cross(SIZE) else layer for layer in cache.layers]
    return cache.with_layers(layers), step.ok


@jax.jit
def feed(cache, positions, rows=None, spans=None):
    cache, step = cache.begin(positions, rows, spans)
    x = jnp.ones((*positions.shape, 1, 2))
    layers, seen = [], []
    for layer in cache.layers:
        if layer.spec.reach != Cross(SIZE):
            layer = layer.put(step, x, x)
        layers.append(layer)
        seen.append((*layer.get(step), attend(jnp.zeros_like(x), layer, step)))
    return cache.with_layers(layers), step, seen


def picture(seen, layer=1):
    """Who sees what of the encoder's output: per batch row a line per query."""
    return [["".join(str(int(x)) for x in query) for query in row] for row in np.asarray(seen[layer][2])[:, 0]]


def held(cache, positions=None):
    """The values that one query in each row sees of its encoder's output."""
    positions = jnp.zeros((cache.num_rows, 1), jnp.int32) if positions is None else positions
    *_, seen = feed(cache, positions)
    _, v, mask, _ = (np.asarray(x) for x in seen[1])
    return [v[row, mask[row, 0, 0], 0, 0].tolist() for row in range(len(v))]


def encoded(*lengths):
    cache, ok = encode(make(), jnp.array(lengths))
    assert ok.all()
    return cache


def test_every_query_of_a_row_sees_all_its_encoder_output_whatever_its_position():
    cache, step, seen = feed(encoded(3, 5, -1), jnp.array([[0, 1], [7, -1], [4, 5]]))
    assert step.ok.all()
    assert picture(seen) == [["11100", "11100"], ["11111", "00000"], ["00000", "00000"]]
    mean = np.asarray(seen[1][3])[..., 0, 0]  # of what is seen, as all scores are 0
    np.testing.assert_allclose(mean, [[1, 1], [2, 0], [0, 0]])
    _, _, seen = feed(cache, jnp.array([[10], [8], [-1]]))
    assert picture(seen) == [["11100"], ["11111"], ["00000"]]


def test_spans_and_flat_batches_leave_what_is_seen_of_the_encoder():
    rows = jnp.array([1, 0, 1, 1, 9, -1])
    positions, spans = jnp.array([[1], [0], [0], [2], [0], [0]]), jnp.array([[7], [7], [7], [0], [0], [0]])
    _, step, seen = feed(encoded(3, 2, 5), positions, rows, spans)
    assert step.positions[:, 0].tolist() == [1, 0, 0, 2, -1, -1]
    assert picture(seen) == [["11000"], ["11100"], ["11000"], ["11000"], ["00000"], ["00000"]]


def test_encoder_cached_says_whose_output_is_there():
    assert make().encoder_cached.tolist() == [False, False, False]
    assert make(PAST).encoder_cached.tolist() == [False, False, False]
    assert encoded(3, -1, 0).encoder_cached.tolist() == [True, False, True]


def test_an_output_without_keys_replaces_another_and_gives_zeros():
    cache, _ = encode(encoded(3, 3, 3), jnp.array([0, -1, -9]))
    assert held(cache) == [[], [0, 1, 2], [0, 1, 2]]
    *_, seen = feed(cache, jnp.zeros((ROWS, 1), jnp.int32))
    assert not np.asarray(seen[1][3])[0].any()


def test_sequences_are_encoded_at_different_times_and_again():
    cache = encoded(3, -1, -1)
    cache, _, _ = feed(cache, jnp.array([[0, 1], [-1, -1], [-1, -1]]))
    cache, ok = encode(cache, jnp.array([2, 4]), rows=jnp.array([2, 1]), first=10.0)
    assert ok.tolist() == [True, True]
    assert held(cache, jnp.array([[2], [0], [0]])) == [[0, 1, 2], [10, 11, 12, 13], [10, 11]]
    cache, _ = encode(cache, jnp.array([1]), rows=jnp.array([1]), first=20.0, size=2)
    assert held(cache, jnp.array([[2], [0], [0]])) == [[0, 1, 2], [20], [10, 11]]
    assert cache.lengths.tolist() == [2, 0, 0]


def test_what_does_not_fit_takes_nothing():
    cache = encoded(3, 2, 1)
    after, ok = encode(cache, jnp.array([SIZE + 1, 4, -1]), first=10.0)
    assert ok.tolist() == [False, True, True]
    assert after.ok.tolist() == [False, True, True]
    with pytest.raises(jaxkv.CacheFullError, match=r"sequence 0 .* its encoder's output into Cross\(size=5\)"):
        after.check()
    assert held(after.retry(~after.ok)) == [[0, 1, 2], [10, 11, 12, 13], [0]]
    # A row that is not ok takes nothing more until it may try again.
    again, ok = encode(after, jnp.array([4, 4, 4]), first=20.0)
    assert ok.tolist() == [False, True, True]
    assert held(again.retry(~again.ok)) == [[0, 1, 2], [20, 21, 22, 23], [20, 21, 22, 23]]
    # Nor does one for which two outputs come at once; rows that don't exist bring nothing.
    twice, ok = encode(cache, jnp.array([4, 4, 4, 4]), rows=jnp.array([1, 0, 1, ROWS]), first=10.0)
    assert ok.tolist() == [False, True, False, True]
    assert twice.ok.tolist() == [True, False, True]
    assert held(twice.retry(~twice.ok)) == [[10, 11, 12, 13], [0, 1], [0]]


def test_what_was_not_given_shows():
    cache, _ = encode(make(), jnp.array([3, 2, 3]), size=2)
    assert str(held(cache)) == "[[0.0, 1.0, nan], [0.0, 1.0], [0.0, 1.0, nan]]"
    *_, seen = feed(cache, jnp.zeros((ROWS, 1), jnp.int32))
    assert np.isnan(np.asarray(seen[1][3])).all((1, 2, 3)).tolist() == [True, False, True]


@pytest.mark.parametrize("jit", [True, False])
def test_a_shorter_output_makes_no_nan_unless_a_length_lies_beyond_it(jit):
    with jax.debug_nans(True), jax.disable_jit(not jit):
        cache, _ = encode(make(), jnp.array([3, 1, -1]), size=3)
        assert held(cache) == [[0.0, 1.0, 2.0], [0.0], []]
        with pytest.raises(FloatingPointError):
            encode(make(), jnp.array([3, 4, -1]), size=3)


def test_nan_beyond_a_length_and_in_other_rows_is_not_read():
    cache, step = make(CROSS).begin_cross(jnp.array([2, 5, 3]))
    x = jnp.ones((ROWS, SIZE, 1, 2)).at[0, 2:].set(jnp.nan).at[1].set(jnp.nan)
    cache = cache.with_layers([cache.layers[0].put(step, x, x)])
    cache, step = cache.begin(jnp.zeros((ROWS, 1), jnp.int32))
    out = np.asarray(attend(jnp.ones((ROWS, 1, 1, 2)), cache.layers[0], step))
    assert np.isnan(out).all((1, 2, 3)).tolist() == [False, True, False]
    np.testing.assert_allclose(out[[0, 2]], 1)


def test_the_encoder_output_belongs_to_the_row_not_to_positions():
    cache, _, _ = feed(encoded(3, 5, -1), jnp.tile(jnp.arange(4), (ROWS, 1)))
    at = jnp.array([[4], [4], [4]])
    for after in (
        cache.rewind(jnp.array([0, 0, 0])),
        cache.remove(0, 0),
        cache.remove(0, 1, 3),  # though the keys of a Cross layer can't be turned
        cache.copy_prefix(1, 1, 0),
        cache.retry(cache.ok),
    ):
        assert held(after, at) == [[0, 1, 2], [0, 1, 2, 3, 4], []]
    copied = cache.copy_prefix(0, 2, 1)  # whole, however short the prefix
    assert copied.lengths.tolist() == [4, 4, 1]
    assert held(copied, at) == [[0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2]]
    assert held(cache.copy_prefix(2, 0, 4), at) == [[], [0, 1, 2, 3, 4], []]
    assert held(cache.copy_prefix(9, 0, 4), at) == [[], [0, 1, 2, 3, 4], []]
    assert held(cache.copy_prefix(0, 9, 4), at) == [[0, 1, 2], [0, 1, 2, 3, 4], []]
    taken = cache.take(jnp.array([1, 1, -1, 0]))
    assert taken.encoder_cached.tolist() == [True, True, False, True]
    assert held(taken, jnp.full((4, 1), 4)) == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [], [0, 1, 2]]
    reset = cache.reset(jnp.array([True, False, False]))
    assert reset.encoder_cached.tolist() == [False, True, False]
    assert held(reset, jnp.array([[0], [4], [4]])) == [[], [0, 1, 2, 3, 4], []]
    assert int(cache.resume_point(0, 4)) == 4


def test_a_cache_of_cross_layers_alone_works():
    cache, ok = encode(make(CROSS, CROSS), jnp.array([3, 5, 1]))
    cache, step, seen = feed(cache, jnp.array([[0, 1, 2], [5, -1, 6], [CAPACITY, -1, -1]]))
    assert step.ok.tolist() == [True, True, False]
    assert picture(seen) == [["11100"] * 3, ["11111", "00000", "11111"], ["00000"] * 3]
    assert cache.lengths.tolist() == [3, 7, 0]
    assert cache.remove(0, 1, 2).rewind(jnp.array([1, 9, 9])).lengths.tolist() == [1, 7, 0]


def test_a_stack_of_cross_layers_is_the_carry_of_scans():
    specs = [LayerSpec(Cross(100), 2, 4, 6, Dense("int8"), Dense("int8")), LayerSpec(Full(), 2, 4)] * 3
    cache = Cache.init(specs, ROWS, CAPACITY, stacked=True)
    k, v = (jnp.tile(jnp.arange(3, dtype=jnp.int8)[:, None, None, None, None], (1, ROWS, 70, 2, h)) for h in (4, 6))

    @jax.jit
    def run(cache):
        cache, step = cache.begin_cross(jnp.array([70, 0, 66]))

        def write(stack, x):
            i, k, v = x
            return stack.at(i).put(step, k, v).at(None), None

        stack, _ = jax.lax.scan(write, cache.layers[0], (jnp.arange(3), k, v))
        cache, step = cache.with_layers([stack, cache.layers[1]]).begin(jnp.zeros((ROWS, 1), jnp.int32))
        q = jnp.ones((ROWS, 1, 2, 4))
        stack = cache.layers[0]
        return jax.lax.scan(lambda _, i: (None, attend(q, stack.at(i), step)), None, jnp.arange(3))[1]

    np.testing.assert_allclose(run(cache)[:, :, 0, 0, 0], [[0, 0, 0], [1, 0, 1], [2, 0, 2]])


@pytest.mark.optimized
def test_put_is_in_place():
    specs = [LayerSpec(Cross(4096), 2, 32), LayerSpec(Full(), 2, 32)]
    cache = jax.eval_shape(lambda: Cache.init(specs, ROWS, 4096))

    def one(cache, k, row):  # one row of many: what is written is small beside the buffer
        cache, step = cache.begin_cross(jnp.full((1,), 4096), rows=row)
        return cache.with_layers([cache.layers[0].put(step, k, k), cache.layers[1]])

    k = jax.ShapeDtypeStruct((1, 4096, 2, 32), jnp.float32)
    row = jax.ShapeDtypeStruct((1,), jnp.int32)
    memory = jax.jit(one, donate_argnums=0).lower(cache, k, row).compile().memory_analysis()
    buffers = sum(x.size * 4 for layer in cache.layers for x in (layer.k, layer.v))
    assert memory.alias_size_in_bytes >= buffers
    assert memory.temp_size_in_bytes < buffers / 4


def test_gradients_reach_the_encoder():
    def loss(k, v, read):
        cache, step = make(CROSS).begin_cross(jnp.array([3, 5, 0]))
        layer = cache.layers[0].put(step, k, v)
        cache, step = cache.begin(jnp.array([[0, 1], [3, -1], [0, 1]]))
        return jnp.sin(read(q, layer, step)).sum()

    def plain(q, layer, step):
        k, v, mask = layer.get(step)
        out = jax.nn.dot_product_attention(q, k, v, mask=mask)
        return jnp.where(mask.any(-1)[:, 0, :, None, None], out, 0)

    q, k, v = (jax.random.normal(jax.random.key(i), (ROWS, n, 1, 2)) for i, n in enumerate((2, SIZE, SIZE)))
    gradient = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
    got, want = gradient(k, v, attend), gradient(k, v, plain)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
        assert (np.asarray(x).any((2, 3)) == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0] * 5]).all()


def test_vmap_keeps_encoders_apart():
    caches = jax.tree.map(lambda x: jnp.stack([x, x]), make())
    caches, ok = jax.vmap(encode)(caches, jnp.array([[1, 2, 3], [SIZE + 1, 0, -1]]))
    assert ok.tolist() == [[True] * 3, [False, True, True]]
    assert caches.encoder_cached.tolist() == [[True] * 3, [False, True, False]]


def test_memory_and_description_count_the_encoder():
    specs = [LayerSpec(Full(), 2, 8), LayerSpec(Cross(1500), 2, 8)] * 2
    plan = jaxkv.plan_memory(specs, num_rows=2, capacity=448)
    cache = Cache.init(specs, 2, 448)
    assert plan.nbytes == cache.nbytes
    assert plan.bytes_per_token == 2 * 2 * 2 * 8 * 4  # the encoder's output does not grow
    assert [group[:3] for group in plan.groups] == [(Full(), 2, 448), (Cross(1500), 2, 1536)]
    cache, _ = cache.begin_cross(jnp.array([1500, -1]))
    text = cache.describe().splitlines()
    assert text[4].startswith("2 layers Cross(size=1500): 2 x 8 k Dense('float32') v Dense('float32'), 1536 slots, ")
    assert text[5:] == ["  row 0: 0-1499", "  row 1: empty"]
    assert "row 0" not in jax.eval_shape(lambda: cache).describe()


L = jnp.array([1, 1, 1])
P = jnp.zeros((ROWS, 1), jnp.int32)
X, Y = jnp.zeros((ROWS, SIZE, 1, 2)), jnp.zeros((ROWS, 1, 1, 2))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Cross(0), "Cross(size=0): size is a whole number of at least 1"),
        (lambda: LayerSpec(Cross(4), 1, 2, rotary=Rotary()), "an encoder's keys never move; give rotary=None"),
        (lambda: make(CROSS, LayerSpec(Cross(4), 1, 2)), "Cross(size=5) and Cross(size=4) in one cache"),
        (lambda: make(PAST).begin_cross(L), "give Cache.init a LayerSpec(Cross(size), ...)"),
        (lambda: make().begin_cross(L[:, None]), "lengths has shape (3, 1); give int [B]"),
        (lambda: make().begin_cross(jnp.ones(3)), "lengths has dtype float32; give integers"),
        (lambda: make().begin_cross(jnp.ones(4, jnp.int32)), "4 batch rows, the cache 3 sequences"),
        (lambda: make().begin_cross(L, rows=L[:2]), "rows has shape (2,), lengths has 3 batch rows"),
        (
            lambda: make().layers[0].put(make().begin_cross(L)[1], X, X),
            "to use a layer of Window(size=3, sinks=0) take",
        ),
        (lambda: make().layers[1].put(make().begin(P)[1], Y, Y), "with the step of cache.begin_cross(lengths)"),
        (lambda: make().layers[1].get(make().begin_cross(L)[1]), "take the step of cache.begin(positions)"),
        (lambda: attend(Y, make().layers[1], make().begin_cross(L)[1]), "take the step of cache.begin(positions)"),
        (
            lambda: make().layers[1].put(make().begin_cross(L)[1], jnp.zeros((ROWS, 6, 1, 2)), X),
            "k has shape (3, 6, 1, 2), this layer and step need [B, T, K, H] = (3, 5, 1, 2)",
        ),
        (lambda: make().layers[1].put(make().begin_cross(L)[1], X, Y), "v has shape (3, 1, 1, 2)"),
    ],
)
def test_wrong_arguments_are_refused_with_the_cure(call, says):
    with pytest.raises(ValueError) as caught:
        call()
    assert says in str(caught.value)
