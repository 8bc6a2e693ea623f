"""Side buffers follow the tokens they belong to, and `attend(select=)` reads the chosen slots alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import Cache, Full, Int8, LayerSpec, Pages, Rotary, Rows, SideBuffer, Window
from jaxkv.testing.programs import Machine, random_operation

HEADS, SIZE, ROWS = 2, 4, Rows()
COPY = {"copy": SideBuffer(SIZE, num_heads=HEADS)}


# ---------------------------------------------------------------- side buffers


@pytest.mark.parametrize(
    ("layout", "stacked", "reach"), [(Rows(), False, Window(5, sinks=1)), (Pages(24, 2), True, Full())]
)
def test_a_side_buffer_holds_of_each_token_what_was_put_whatever_happens(layout, stacked, reach):
    """The programs put the values there too, so both buffers are alike after every operation."""
    spec = LayerSpec(reach, HEADS, SIZE, rotary=Rotary(), side_buffers=COPY)
    sizes = {"num_rows": 4, "capacity": 24, "max_block": 4, "slack": 2}
    machine = Machine(Cache.init([spec] * 2, layout=layout, stacked=stacked, **sizes))
    random = np.random.default_rng(0)
    for _ in range(40):
        machine.run(random_operation(machine.oracle, lambda a, b: int(random.integers(a, b + 1)), max_block=4))
        for layer in machine.cache.layers:
            np.testing.assert_array_equal(layer.sides["copy"], layer.v)
    assert sum(machine.counts.values()) >= 40 and np.asarray(machine.cache.layers[0].v).any()


def filled(spec, tokens=10, sizes=None, layout=ROWS, seed=0):
    """Returns (layer, step, its keys and values) of a cache whose two rows got `tokens` in one block."""
    random = np.random.default_rng(seed)
    x = [jnp.asarray(random.normal(size=(2, tokens, HEADS, SIZE)), jnp.float32) for _ in range(2)]
    cache = Cache.init([spec], num_rows=2, capacity=16, layout=layout, **(sizes or {}))
    cache, step = cache.begin(jnp.tile(jnp.arange(tokens), (2, 1)))
    sides = {name: x[0][:, :, : side.num_heads] for name, side in spec.side_buffers}
    return cache.with_layers([cache.layers[0].put(step, *x, sides=sides)]), step, x


def test_a_side_is_turned_when_tokens_move_only_if_it_is_to_be():
    sides = {"turned": SideBuffer(SIZE, HEADS, rotary=Rotary()), "kept": SideBuffer(SIZE, HEADS)}
    spec = LayerSpec(Full(), HEADS, SIZE, rotary=Rotary(), side_buffers=sides)
    cache, _, (k, _) = filled(spec)
    cache = cache.remove(0, 2, 5)
    cache, step = cache.begin(jnp.full((2, 1), -1))
    layer = cache.layers[0]
    keys = layer.read(step, 0, layer.num_slots)[0][0, :, :7]
    np.testing.assert_array_equal(layer.read_side("turned", step)[0, :, :7], keys)
    moved = np.asarray(k[0, [0, 1, *range(5, 10)]]).swapaxes(0, 1)
    np.testing.assert_array_equal(layer.read_side("kept", step)[0, :, :7], moved)
    assert not layer.read_side("kept", step)[0, :, 7:].any()  # nothing lies there


def test_side_buffers_are_counted_described_and_exported():
    spec = LayerSpec(Full(), HEADS, SIZE, side_buffers={"index": SideBuffer(3, storage=jaxkv.Dense("float16"))})
    plain = dataclasses.replace(spec, side_buffers=())
    sizes = {"num_rows": 2, "capacity": 16}
    cache, plan = Cache.init([spec], **sizes), jaxkv.plan_memory([spec], **sizes)
    assert cache.nbytes == plan.nbytes == Cache.init([plain], **sizes).nbytes + 2 * 16 * 3 * 2
    assert plan.bytes_per_token == 2 * HEADS * SIZE * 4 + 3 * 2
    assert "v Dense('float32') index 1 x 3 Dense('float16'), 16 slots" in cache.describe()
    begin = jax.export.export(jax.jit(lambda cache: cache.begin(jnp.zeros((2, 1), jnp.int32))[0]))(cache)
    again = jax.export.deserialize(begin.serialize()).call(cache)
    assert again.specs == cache.specs


def test_what_does_not_fit_a_side_buffer_is_an_error():
    spec = LayerSpec(Full(), HEADS, SIZE, side_buffers=COPY)
    with pytest.raises(ValueError, match=r"SideBuffer\(size=0\): size is a whole number of at least 1"):
        SideBuffer(0)
    with pytest.raises(ValueError, match=r"SideBuffer\(storage=3\): give a storage such as"):
        SideBuffer(4, storage=3)
    with pytest.raises(ValueError, match=r"side_buffers=\{'x': 4\}\): give a mapping of names to jaxkv\.SideBuffer"):
        LayerSpec(Full(), 1, 2, side_buffers={"x": 4})
    with pytest.raises(ValueError, match="'dropped' is what drops=True keeps"):
        LayerSpec(Full(), 1, 2, side_buffers={"dropped": SideBuffer(1)})
    cache, step = Cache.init([spec], num_rows=1, capacity=8).begin(jnp.array([[0]]))
    layer, x = cache.layers[0], jnp.ones((1, 1, HEADS, SIZE))
    with pytest.raises(ValueError, match=r"put got sides \[\], the layer's spec has side_buffers \['copy'\]"):
        layer.put(step, x, x)
    with pytest.raises(ValueError, match=r"side 'copy' has shape \(1, 1, 4\), .* = \(1, 1, 2, 4\)"):
        layer.put(step, x, x, sides={"copy": x[:, :, 0]})
    with pytest.raises(ValueError, match=r"read_side\('index'\): the layer's spec has these side_buffers: copy"):
        layer.read_side("index", step)


# ---------------------------------------------------------------- attend over chosen slots


def visible(layer, step):
    return np.asarray(layer.get(step)[2])[:, 0]


KINDS = {
    "rows": ({}, Rows(), {}),
    "window on pages": ({"reach": Window(6, sinks=1)}, Pages(20, 2), {}),
    "int8, rotated when read": (
        {"k_storage": Int8(), "v_storage": Int8(), "rotary": Rotary(), "rotary_at": "read"},
        Rows(),
        {"softcap": 2.0, "sink_logits": jnp.arange(4.0)},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_where_all_that_is_seen_is_chosen_it_is_dense_attention(kind):
    given, layout, options = KINDS[kind]
    spec = LayerSpec(**{"reach": Full(), "num_kv_heads": HEADS, "head_dim": SIZE, **given})
    cache, step, _ = filled(spec, layout=layout)
    layer = cache.layers[0]
    q = jnp.asarray(np.random.default_rng(1).normal(size=(2, 10, 2 * HEADS, SIZE)), jnp.float32)
    # In any order, with slots that are empty, not seen, or out of range among them.
    slots = np.random.default_rng(2).permuted(np.tile(np.arange(-2, layer.num_slots + 1), (2, 10, 1)), axis=2)
    got = jaxkv.attend(q, layer, step, select=slots, **options)
    np.testing.assert_allclose(got, jaxkv.attend(q, layer, step, **options), atol=2e-6)


def plain(q, k, v, see, chosen):
    """Softmax over the chosen slots that are seen; q [B, T, N, H], k, v [B, S, K, H], see [B, T, S]."""
    num = k.shape[1]
    picked = (chosen[..., None] == jnp.arange(num)[None, None, None]).any(2) & see
    q = q.reshape(*q.shape[:2], HEADS, -1, SIZE)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k) / np.float32(np.sqrt(SIZE))
    weights = jax.nn.softmax(scores, axis=-1, where=picked[:, None, None])
    return jnp.einsum("bkgts,bskh->btkgh", jnp.where(picked[:, None, None], weights, 0), v)


def test_an_indexers_choice_is_softmax_over_it_and_so_are_its_gradients():
    spec = LayerSpec(Full(), HEADS, SIZE, side_buffers={"index": SideBuffer(SIZE)})
    random = np.random.default_rng(3)
    q, index_q, weight = (jnp.asarray(random.normal(size=(2, 10, n, SIZE)), jnp.float32) for n in (4, 1, 4))
    cache, step, kv = filled(spec)
    see = visible(cache.layers[0], step)

    def choose(layer):
        scores = jnp.einsum("btnh,bnsh->bts", index_q, layer.read_side("index", step))
        return jax.lax.top_k(jnp.where(see, scores, -jnp.inf), 3)[1]

    def loss(q, kv, sparse):
        fresh = Cache.init([spec], num_rows=2, capacity=16)
        fresh, step = fresh.begin(jnp.tile(jnp.arange(10), (2, 1)))
        layer = fresh.layers[0].put(step, *kv, sides={"index": kv[0][:, :, :1]})
        chosen = jax.lax.stop_gradient(choose(layer))
        if sparse:
            return (jaxkv.attend(q, layer, step, select=chosen) * weight).sum()
        k, v, _ = layer.get(step)
        return (plain(q, k, v, see, chosen).reshape(weight.shape) * weight).sum()

    got, want = (jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)(q, kv, sparse) for sparse in (True, False))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), got, want)
    assert np.abs(np.asarray(got[1][1][0])).max() > 0.01
    dense = (jaxkv.attend(q, cache.layers[0], step) * weight).sum()
    assert abs(float(dense - got[0])) > 0.01  # three of ten are something else


def test_padding_and_rows_that_did_not_fit_get_zeros_and_dropped_tokens_are_passed_over():
    spec = LayerSpec(Full(), HEADS, SIZE, drops=True)
    cache = Cache.init([spec], num_rows=2, capacity=4)
    cache, step = cache.begin(jnp.array([[0, 1, 2, -1], [0, 1, 2, 4]]))
    x = jnp.ones((2, 4, HEADS, SIZE)) * jnp.arange(1.0, 5.0)[None, :, None, None]
    layer = cache.layers[0].put(step, x, x, where=jnp.array([[True, False, True, True]] * 2))
    out = jaxkv.attend(0 * x, layer, step, select=jnp.broadcast_to(jnp.arange(4), (2, 4, 4)))
    np.testing.assert_allclose(out[0, :, 0, 0], [1, 1, 2, 0], atol=1e-6)
    assert not out[1].any()


@pytest.mark.optimized
def test_nothing_but_the_chosen_slots_is_read():
    spec = LayerSpec(Full(), 8, 64, k_storage=Int8(), v_storage=Int8())
    cache = jax.eval_shape(lambda: Cache.init([spec], num_rows=2, capacity=2**16))

    def decode(cache, q, slots):
        cache, step = cache.begin(cache.lengths[:, None])
        return jaxkv.attend(q, cache.layers[0], step, select=slots)

    arrays = jax.ShapeDtypeStruct((2, 1, 8, 64), jnp.float32), jax.ShapeDtypeStruct((2, 1, 16), jnp.int32)
    memory = jax.jit(decode).lower(cache, *arrays).compile().memory_analysis()
    assert memory.temp_size_in_bytes < max(x.size for x in jax.tree.leaves(cache.layers[0].v)) / 20


def test_chosen_slots_and_sides_on_explicit_axes_and_in_a_stack_with_named_rows():
    mesh = jax.make_mesh((2, 2), ("rows", "heads"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    spec = LayerSpec(Full(), HEADS, SIZE, side_buffers=COPY)
    random = np.random.default_rng(5)
    q, k, v = (jnp.asarray(random.normal(size=(2, 8, HEADS, SIZE)), jnp.float32) for _ in range(3))
    slots = jnp.asarray(random.permuted(np.tile(np.arange(16), (2, 8, 1)), axis=2)[:, :, :6])

    @jax.jit
    def run(cache, q, k, v, slots):
        rows = None if cache.layers[0].num_stacked is None else jnp.arange(2)[::-1]
        cache, step = cache.begin(jnp.tile(jnp.arange(8), (2, 1)), rows)
        layer = cache.layers[0] if rows is None else cache.layers[0].at(1)
        layer = layer.put(step, k, v, sides={"copy": v})
        return jaxkv.attend(q, layer, step, select=slots), layer.read_side("copy", step)

    want, sides = run(Cache.init([spec], 2, 16), q, k, v, slots)
    named = run(Cache.init([spec] * 2, 2, 16, stacked=True), q, k, v, slots)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), named, (want, sides))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows", "heads"))
    with jax.set_mesh(mesh):
        axes = jax.sharding.PartitionSpec("rows", None, "heads")
        q, k, v = (jax.device_put(x, jax.sharding.NamedSharding(mesh, axes)) for x in (q, k, v))
        got = run(Cache.init([spec], 2, 16, sharding=place), q, k, v, slots)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, (want, sides))


def test_what_select_can_not_be_is_said():
    spec = LayerSpec(Full(), HEADS, SIZE)
    cache, step, _ = filled(spec)
    q, slots = jnp.ones((2, 10, HEADS, SIZE)), jnp.zeros((2, 10, 1), jnp.int32)
    with pytest.raises(
        ValueError, match=r"select has shape \(2, 10\); give the slots that each query reads, int \[B, T"
    ):
        jaxkv.attend(q, cache.layers[0], step, select=slots[:, :, 0])
    with pytest.raises(ValueError, match="select has dtype float32; give integers"):
        jaxkv.attend(q, cache.layers[0], step, select=slots.astype(jnp.float32))
    for option in ({"shared": 4}, {"implementation": "reference"}):
        with pytest.raises(ValueError, match="it takes neither shared nor an implementation"):
            jaxkv.attend(q, cache.layers[0], step, select=slots, **option)
