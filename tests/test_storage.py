"""Storages of codes and scales: what is kept of a vector, what attention makes of it, and what it takes."""

from __future__ import annotations

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxkv
from jaxkv import Cache, Dense, Float8, Full, Int4, Int8, LayerSpec, Rotary, Window
from jaxkv.cache.rotation import hadamard, rotate
from jaxkv.cli import main

FORMATS = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
STORAGES = [Int8(), Int4(), Int4(group=4, rotate=False), Float8("e4m3"), Float8("e5m2")]


@functools.partial(jax.jit, static_argnums=0)
def round_trip(storage, x):
    return storage.decode(storage.encode(x))


# ------------------------------------------------------------------ the same rounding, once more in NumPy


def in_basis(storage, x):
    """x [..., H] rotated, H a power of 4: exact where the sums of x are."""
    if not getattr(storage, "rotate", False):
        return x
    size = x.shape[-1]
    return (x @ hadamard(size)) * np.float32(size**-0.5)


def expected(storage, x):
    """What the storage keeps of x float32 [..., H], worked out here once more."""
    y = in_basis(storage, x)
    if isinstance(storage, Int4):
        kept = expected_int4(storage, y)
    elif isinstance(storage, Int8):
        scale = np.abs(y).max(-1, keepdims=True) * np.float32(1 / 127)
        scale = np.where(scale == 0, np.float32(1), scale)
        kept = np.rint(y / scale) * scale
    else:
        kind = FORMATS[storage.format]
        scale = np.abs(y).max(-1, keepdims=True) * np.float32(1 / float(ml_dtypes.finfo(kind).max))
        scale = np.where(scale == 0, np.float32(1), scale)
        kept = (y / scale).astype(kind).astype(np.float32) * scale
    return in_basis(storage, kept)


def expected_int4(storage, y):
    kept = np.zeros_like(y)
    for at in np.ndindex(y.shape[:-1]):
        groups = y[at].reshape(-1, storage.group)
        low, high = np.minimum(groups.min(1), 0), np.maximum(groups.max(1), 0)
        wide = (high - low) * np.float32(1 / 15)
        scale = (wide.max() * np.float32(1 / 16)).astype(ml_dtypes.bfloat16).astype(np.float32) or np.float32(1)
        for g, numbers in enumerate(groups):
            best = np.inf
            for level in (np.ceil(wide[g] / scale) + d for d in (0, -1, 1)):
                step = np.float32(np.clip(level, 1, 16)) * scale
                zero = np.clip(np.rint(-low[g] / step), 0, 15)
                codes = np.clip(np.rint(numbers / step) + zero, 0, 15) - zero
                error = ((codes * step - numbers) ** 2).sum()
                if error < best:
                    best = error
                    kept[at][g * storage.group : (g + 1) * storage.group] = codes * step
    return kept


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_what_is_kept_is_what_the_format_says(storage):
    random = np.random.default_rng(0)
    # Whole numbers, whose sums are exact: the rotation rounds nothing, in whatever order it adds.
    x = np.round(random.standard_normal((6, 8, 64)) * 20).astype(np.float32)
    x[0] *= 1000
    x[1, :, 3] *= 50
    x[2, 0] = 0
    x[2, 1, 1:] = 0
    x[3] = np.abs(x[3])
    x[4] = np.exp2(np.round(x[4] / 10))
    if storage == Int4(group=4, rotate=False):  # no ties between steps that are as good as one another
        x *= np.float32(1.1) + np.float32(0.01) * random.standard_normal(x.shape).astype(np.float32)
    got, want = np.asarray(round_trip(storage, x)), expected(storage, x)
    assert (np.abs(got - want) <= 2e-6 * np.abs(x).max(-1, keepdims=True)).all()
    assert not got[2, 0].any()


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_scales_of_zeros_are_1_and_no_number_overflows(storage):
    x = np.zeros((6, 8, 64), np.float32)
    x[1, 0, :2] = 1e30, -3e30
    x[1, 1] = 1e-40
    x[1, 2] = np.float32(448) * np.float32(1.0000001)
    assert (
        np.asarray(jax.tree.leaves(storage.encode(x[0]))[-1]) == np.asarray(storage.zeros((1,), 64)["scales"])
    ).all()
    kept = np.asarray(round_trip(storage, x))
    assert np.isfinite(kept).all()
    np.testing.assert_allclose(kept[1, 0, 1], -3e30, rtol=0.3)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_a_number_that_is_not_finite_spoils_its_own_vector_alone(storage):
    x = np.ones((6, 8, 64), np.float32)
    x[0, 0, 3], x[0, 1, 3] = np.nan, -np.inf
    kept = np.asarray(round_trip(storage, x))
    assert np.isnan(kept[0, :2]).all()
    np.testing.assert_allclose(kept[0, 2:], 1, rtol=1e-2)


def test_all_codes_of_eight_bits_are_read_as_the_floats_they_are():
    codes = np.arange(256, dtype=np.uint8)[:, None]
    for name, kind in FORMATS.items():
        got = Float8(name).decode({"codes": codes, "scales": np.ones((256, 1), np.float32)})
        want = codes.view(kind).astype(np.float32)
        there = np.isfinite(want)  # a code that is NaN is never stored
        np.testing.assert_array_equal(np.asarray(got)[there], want[there])


def test_the_rotation_undoes_itself_and_keeps_products():
    random = np.random.default_rng(1)
    for size in (1, 2, 12, 64):
        x, y = random.standard_normal((2, 5, size)).astype(np.float32)
        np.testing.assert_allclose(rotate(rotate(x)), x, atol=1e-5)
        np.testing.assert_allclose((rotate(x) * rotate(y)).sum(-1), (x * y).sum(-1), atol=1e-4)


# ------------------------------------------------------------------ how far attention is from full precision


def attention(q, k, v):
    scores = np.einsum("th,sh->ts", q, k) / np.sqrt(q.shape[1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


@pytest.mark.parametrize(
    ("storage", "normal", "outliers"),
    [(Int8(), 0.01, 0.02), (Int4(), 0.08, 0.10), (Float8("e4m3"), 0.04, 0.04)],
    ids=str,
)
def test_attention_is_as_near_to_full_precision_as_the_docs_say(storage, normal, outliers):
    size = 64  # benchmarks/storage.py measures 128 too
    random = np.random.default_rng(2)
    for most, large in ((normal, 1), (outliers, 10)):
        q, k, v = (random.standard_normal((4, n, size)).astype(np.float32) for n in (64, 512, 512))
        k[..., [3, size // 2]] *= large
        q[..., [3, size // 2]] /= large  # so that scores stay what they are
        v[..., 5] *= large
        kept = [np.asarray(round_trip(storage, x)) for x in (k, v)]
        got, want = (np.stack([attention(*x) for x in zip(q, *kv, strict=True)]) for kv in (kept, (k, v)))
        assert np.linalg.norm(got - want) < most * np.linalg.norm(want)


# ------------------------------------------------------------------ in a cache

SPECS = [
    LayerSpec(Full(), 2, 16, 32, Int8(), Int4(), Rotary()),
    LayerSpec(Window(20, sinks=2), 2, 16, None, Int4(), Float8(), Rotary()),
    LayerSpec(Full(), 2, 16, None, Int4(rotate=False), Int8(rotate=False), Rotary(), "read"),
    LayerSpec(Full(), 2, 16, None, Dense("float16"), Int4(group=4), Rotary(), "read"),
]


@jax.jit
def forward(cache, positions, x, q):
    """Every layer gets x [B, T, 2, 32]; returns what attention gives, both ways, and what the layers hold."""
    cache, step = cache.begin(positions)
    layers, out = [], []
    for layer in cache.layers:
        k, p = x[..., :16], step.positions[:, :, None, None]
        k = layer.spec.rotary.rotate(k, p) if layer.spec.rotary_at == "put" else k
        layers.append(layer.put(step, k, x[..., : layer.spec.value_dim]))
        turned = layer.spec.rotary.rotate(q, p)
        both = [jaxkv.attend(turned, layers[-1], step, implementation=way) for way in ("blockwise", "reference")]
        out.append((*both, layers[-1].get(step)))
    return cache.with_layers(layers), out


remove = jax.jit(Cache.remove)


def fed(cache, begin, end):
    random = np.random.default_rng(begin)
    x = random.standard_normal((2, end - begin, 2, 32)).astype(np.float32)
    q = random.standard_normal((2, end - begin, 4, 16)).astype(np.float32)
    positions = np.tile(np.arange(begin, end, dtype=np.int32), (2, 1))
    return forward(cache, positions, x, q)


def test_attend_reads_what_is_stored_and_moving_tokens_rounds_keys_once_at_most():
    cache, out = fed(Cache.init(SPECS, 2, 96, max_block=32), 0, 32)
    for got, want, _ in out:
        np.testing.assert_allclose(got, want, atol=2e-5)
    moved = remove(remove(cache, 0, 3, 8), 0, 1, 2)
    there = np.r_[0, 2, 8:32]  # where the 26 tokens of row 0 stood
    for x, y in zip(jax.tree.leaves(cache.layers[2].buffers), jax.tree.leaves(moved.layers[2].buffers), strict=True):
        # Keys that are rotated when they are read were not rounded again: bits moved, and nothing else.
        np.testing.assert_array_equal(np.asarray(y)[0, :, :26], np.asarray(x)[0, :, there].swapaxes(0, 1))
    for x, y in zip(jax.tree.leaves(cache.layers), jax.tree.leaves(moved.layers), strict=True):
        np.testing.assert_array_equal(np.asarray(y)[1], np.asarray(x)[1])
    _, out = fed(moved, 26, 27)
    x = np.random.default_rng(0).standard_normal((2, 32, 2, 32)).astype(np.float32)[0, there]
    now = np.arange(26, dtype=np.int32)[:, None, None]
    want = np.asarray(Rotary().rotate(jnp.asarray(x[..., :16]), now))
    for layer, most in ((0, 0.02), (2, 0.15)):  # 8 bits, turned twice; 4 bits, rotated where the keys now stand
        k = np.asarray(out[layer][2][0])[0, :26]
        assert (np.linalg.norm(k - want, axis=-1) < most * np.linalg.norm(want, axis=-1)).all()
    once = np.asarray(Rotary().rotate(round_trip(Int4(rotate=False), jnp.asarray(x[..., :16])), now))
    np.testing.assert_allclose(np.asarray(out[2][2][0])[0, :26], once, atol=1e-5)


def test_an_attention_module_leaves_keys_as_they_are_where_they_are_rotated_when_read():
    attn = jaxkv.nnx.Attention(4, 16, num_kv_heads=2, rotary=Rotary(), rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(4).standard_normal((1, 6, 16)), jnp.float32)
    spec = dataclasses.replace(attn.layer_spec(), rotary_at="read")
    cache = Cache.init([spec], 1, 8)
    cache, step = cache.begin(jnp.arange(6, dtype=jnp.int32)[None])
    y, layer = attn(x, cache.layers[0], step)
    np.testing.assert_allclose(y, attn(x), atol=1e-5)
    cache = cache.with_layers([layer]).remove(0, 0, 2)  # the four that stay see each other as if they had come first
    _, step = cache.begin(jnp.array([[4]], jnp.int32))
    k, *_ = cache.layers[0].get(step)
    alone = Cache.init([spec], 1, 8)
    alone, step = alone.begin(jnp.arange(4, dtype=jnp.int32)[None])
    want, *_ = attn(x[:, 2:], alone.layers[0], step)[1].get(step)
    np.testing.assert_array_equal(k[:, :4], want[:, :4])


def test_a_put_changes_no_bit_of_another_token():
    cache, _ = fed(Cache.init(SPECS, 2, 96, max_block=32), 0, 32)
    after, _ = fed(cache, 26, 27)
    for x, y in zip(jax.tree.leaves(cache.layers), jax.tree.leaves(after.layers), strict=True):
        x, y = np.array(x), np.array(y)
        others = np.arange(x.shape[2]) != 26  # in the ring too
        np.testing.assert_array_equal(x[:, :, others], y[:, :, others])


@pytest.mark.optimized
def test_a_decode_step_never_holds_the_cache_in_full_precision():
    size, held = 32, 16384
    specs = [
        LayerSpec(Full(), 2, size, None, k, v, Rotary())
        for k, v in ((Int8(), Int4()), (Int4(), Float8("e5m2")), (Float8("e4m3"), Int8()))
    ]
    specs.append(LayerSpec(Full(), 2, size, None, Int8(rotate=False), Float8(), Rotary(), "read"))
    cache = jax.eval_shape(lambda: Cache.init(specs, 1, held))

    def step(cache, x):
        cache, step = cache.begin(cache.lengths[:, None])
        layers = [layer.put(step, x, x) for layer in cache.layers]
        return cache.with_layers(layers), [jaxkv.attend(x, layer, step) for layer in layers]

    x = jax.ShapeDtypeStruct((1, 1, 2, size), jnp.float32)
    memory = jax.jit(step, donate_argnums=0).lower(cache, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < held * 2 * size * 4 // 2  # half of k, or of v, of one layer
    assert memory.alias_size_in_bytes >= cache.nbytes - 64


def test_bytes_are_those_of_codes_and_scales():
    for size in (64, 128):
        spec = LayerSpec(Full(), 8, size)
        plain = jaxkv.plan_memory([spec], 2, 256).bytes_per_token
        for storage, most in ((Int8(), 0.27), (Int4(), 0.17), (Float8(), 0.27)):
            plan = jaxkv.plan_memory([spec], 2, 256, storage=storage)
            assert plan.bytes_per_token <= most * plain
            cache = Cache.init([spec], 2, 256, storage=storage)
            assert plan.nbytes == cache.nbytes == sum(x.nbytes for x in jax.tree.leaves(cache))
            assert str(storage) in cache.describe()


def test_scales_lie_whole_where_heads_are_divided():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("heads", "size"))
    place = NamedSharding(mesh, PartitionSpec(None, "heads", None, "size"))
    spec = LayerSpec(Full(), 2, 64, None, Int8(), Int4())
    cache = Cache.init([spec], 1, 64, sharding=place)
    assert cache.layers[0].k["codes"].sharding.spec == PartitionSpec(None, "heads", None, "size")
    assert cache.layers[0].k["scales"].sharding.shard_shape((1, 2, 64, 1)) == (1, 1, 64, 1)
    assert cache.layers[0].v["groups"].sharding.shard_shape((1, 2, 64, 8)) == (1, 1, 64, 4)
    assert jaxkv.plan_memory([spec], 1, 64, sharding=place).nbytes_per_device < cache.nbytes / 2


def test_queries_have_gradients_and_what_is_stored_has_none():
    cache = Cache.init([LayerSpec(Full(), 1, 16, None, Int8(), Int4())], 1, 16)
    random = np.random.default_rng(3)
    q, k = (jnp.asarray(random.standard_normal((1, 16, n, 16)), jnp.float32) for n in (2, 1))

    def loss(q, k, way):
        _, step = cache.begin(jnp.arange(16, dtype=jnp.int32)[None])
        return jnp.sin(jaxkv.attend(q, cache.layers[0].put(step, k, k), step, implementation=way)).sum()

    got, want = (jax.jit(jax.grad(loss), static_argnums=2)(q, k, way) for way in ("blockwise", "reference"))
    np.testing.assert_allclose(got, want, atol=1e-5)
    with pytest.raises(jaxkv.NotSupportedError, match="kept as Int8"):
        jax.grad(loss, argnums=1)(q, k, "blockwise")


# ------------------------------------------------------------------ what can't be


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LayerSpec(Full(), 1, 64, k_storage=Int4(group=24)), r"k_storage=Int4.*give Int4\(group=16\)"),
        (lambda: LayerSpec(Full(), 1, 64, 33, v_storage=Int4()), "v_storage=Int4.*odd number"),
        (lambda: LayerSpec(Full(), 1, 64, k_storage=Int8), "give a storage"),
        (lambda: Int4(group=0), "at least 1"),
        (lambda: Int8(rotate="yes"), "give True or False"),
        (lambda: Float8("e3m4"), "give 'e4m3' or 'e5m2'"),
        (lambda: LayerSpec(Full(), 1, 64, rotary=Rotary(), rotary_at="get"), "'put' or 'read'"),
        (lambda: LayerSpec(Full(), 1, 64, rotary_at="read"), "nothing rotates the keys"),
        (lambda: Cache.init([LayerSpec(Full(), 1, 12)], 1, 8, storage=Int4()), r"give Int4\(group=6\)"),
    ],
)
def test_bad_choices_are_refused_with_the_cure(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_command_says_what_a_cache_takes(capsys):
    assert main(["info", "--storage", "int8,int4", "--capacity", "512"]) == 0
    out = capsys.readouterr().out
    plan = jaxkv.plan_memory(jaxkv.models.tiny.load().specs, 1, 512, storage=(Int8(), Int4()))
    assert "tokens in int8,int4:" in out
    assert str(plan).splitlines()[-1] in out
    with pytest.raises(SystemExit):
        main(["info", "--storage", "int3"])
    assert "does not name a storage" in capsys.readouterr().err


@pytest.mark.parametrize("storage", [Int8(), Int4(group=4), Float8("e4m3"), Float8("e5m2")], ids=repr)
def test_qwix_reads_what_is_kept_and_gives_it_back(storage):
    qwix = pytest.importorskip("qwix")
    x = np.random.default_rng(0).standard_normal((2, 3, 16), dtype=np.float32)
    stored = storage.encode(x)
    qarray = jaxkv.to_qarray(storage, stored)
    assert qarray.shape == x.shape
    np.testing.assert_allclose(storage.basis(qwix.dequantize(qarray)), storage.decode(stored), rtol=1e-5, atol=1e-5)
    again = jaxkv.from_qarray(storage, qarray)
    if isinstance(storage, Int4):  # rounded once more, nearly to where it was
        np.testing.assert_allclose(storage.decode(again), storage.decode(stored), atol=0.05)
    else:
        jax.tree.map(np.testing.assert_array_equal, again, stored)
    other = qwix.quantize(x, jnp.int8, channelwise_axes=(2,))  # a scale for each channel
    numbers = storage.decode(jaxkv.from_qarray(storage, other))  # of an array that is in the storage's basis
    assert np.linalg.norm(storage.basis(numbers) - x) < 0.1 * np.linalg.norm(x)
    with pytest.raises(ValueError, match=r"give a qwix\.QArray"):
        jaxkv.from_qarray(storage, x)
    with pytest.raises(ValueError, match="keeps numbers without scales"):
        jaxkv.to_qarray(Dense(), x)


def test_without_qwix_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ImportError, match="qwix is not installed, and to_qarray needs it: pip install qwix"):
        jaxkv.to_qarray(Int8(), Int8().encode(jnp.ones(4)))
