"""Latent attention against the plain form in NumPy, which makes keys and values of all heads."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxkv
from jaxkv import Cache, Dense, Float8, Full, Int4, Int8, LayerSpec, Rotary, Window, YarnScaling
from jaxkv.testing import run_program

BATCH, LENGTH, WIDTH = 2, 9, 12
RANK, ROTARY, HEAD, VALUE, HEADS = 8, 4, 6, 5, 3
YARN = YarnScaling(4.0, 8, mscale=1.0, mscale_all_dim=0.8)
SIZES = {"rank": RANK, "rotary_dim": ROTARY, "head_dim": HEAD, "value_dim": VALUE}
KINDS = {
    "plain": {"rotary": Rotary(interleaved=True)},
    "query-rank": {
        "rotary": Rotary(interleaved=True, scaling=YARN),
        "query_rank": 7,
        "use_bias": True,
        "scale": (HEAD + ROTARY) ** -0.5 * (0.1 * 0.8 * math.log(4.0) + 1.0) ** 2,
        "reach": Window(5),
    },
    "indexer": {
        "rotary": Rotary(interleaved=True, scaling=YARN),
        "query_rank": 7,
        "indexer": jaxkv.Indexer(num_heads=5, head_dim=6, top_k=3),
    },
}


@functools.cache
def _module(kind):
    """A module whose norms and biases are not what they are at first."""
    attn = jaxkv.nnx.LatentAttention(HEADS, WIDTH, **SIZES, **KINDS[kind], rngs=nnx.Rngs(0))
    random = np.random.default_rng(1)
    noise = lambda x: x + jnp.asarray(0.3 * random.normal(size=x.shape), x.dtype)  # noqa: E731
    nnx.update(attn, jax.tree.map(noise, nnx.state(attn, nnx.Param)))
    return attn


X = np.random.default_rng(0).normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)


def _plain(kind, x):
    """What the paper writes, in float64: keys and values of all heads, then attention as everywhere."""
    options, params = KINDS[kind], jax.tree.map(lambda p: np.asarray(p, np.float64), _params(kind))
    x = x.astype(np.float64)

    def project(name, x):
        part = params[name]
        y = np.tensordot(x, part["kernel"], part["kernel"].ndim - 1 if name == "out" else 1)
        return y + part.get("bias", 0)

    def norm(name, x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * params[name]["scale"]

    def rotate(x):  # [B, T, N, rotary_dim], pairs of neighbors
        rotary = options["rotary"]
        frequencies = rotary.frequencies(ROTARY).astype(np.float64)
        turn = np.exp(1j * np.arange(x.shape[1])[:, None] * frequencies)[None, :, None]
        pairs = (x[..., ::2] + 1j * x[..., 1::2]) * turn * (rotary.scaling.magnitude if rotary.scaling else 1.0)
        return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)

    q = project("query", x) if "query" in params else project("query_up", norm("query_norm", project("query_down", x)))
    both = project("latent", x)
    latent, shared = norm("latent_norm", both[..., :RANK]), rotate(both[..., None, RANK:])
    made = np.tensordot(latent, params["expand"], 1)  # [B, T, N, head_dim + value_dim]
    k = np.concatenate([made[..., :HEAD], np.repeat(shared, HEADS, 2)], -1)
    q = np.concatenate([q[..., :HEAD], rotate(q[..., HEAD:])], -1)
    scores = np.einsum("bqnh,bsnh->bnqs", q, k) * options.get("scale", (HEAD + ROTARY) ** -0.5)
    at = np.arange(x.shape[1])
    reach, indexer = options.get("reach", Full()), options.get("indexer")
    see = (at[None] <= at[:, None]) & (at[None] > at[:, None] - (reach.size or x.shape[1]))
    if indexer is not None:  # of those seen the best, by keys that are layer-normalized and rotated in halves
        rotary = options["rotary"]
        turn = np.exp(1j * at[:, None] * rotary.frequencies(ROTARY).astype(np.float64))[None, :, None]

        def halves(x):
            pairs = (x[..., : ROTARY // 2] + 1j * x[..., ROTARY // 2 : ROTARY]) * turn * rotary.scaling.magnitude
            return np.concatenate([pairs.real, pairs.imag, x[..., ROTARY:]], -1)

        keys = project("index_key", x)
        keys = (keys - keys.mean(-1, keepdims=True)) / np.sqrt(keys.var(-1, keepdims=True) + 1e-6)
        keys = halves((keys * params["index_norm"]["scale"] + params["index_norm"]["bias"])[:, :, None])[:, :, 0]
        queries = halves(project("index_query", norm("query_norm", project("query_down", x))))
        scored = np.maximum(np.einsum("bqnh,bsh->bqns", queries, keys), 0) * project("index_weights", x)[..., None]
        order = np.argsort(np.argsort(-np.where(see, scored.sum(2), -np.inf), -1, kind="stable"), -1)
        see = (see & (order < indexer.top_k))[:, None]
    weights = np.exp(np.where(see, scores, -np.inf))
    weights /= weights.sum(-1, keepdims=True)
    read = np.einsum("bnqs,bsnh->bqnh", weights, made[..., HEAD:])
    return np.tensordot(read, params["out"]["kernel"], 2) + params["out"].get("bias", 0)


def _params(kind):
    return nnx.to_pure_dict(nnx.state(_module(kind), nnx.Param))


def _spec(kind, at="put", **storages):
    spec = _module(kind).layer_spec(**storages)
    return dataclasses.replace(spec, rotary_at=at)


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef, params, x, positions, cache):
    cache, step = cache.begin(positions)
    y, layer = nnx.merge(graphdef, params)(x, cache.layers[0], step)
    return y, cache.with_layers([layer])


def _feed(kind, cache, x, *counts):
    """Feeds x [B, T, D] in blocks of these sizes, each padded to 4 tokens; returns what comes out, and the cache."""
    graphdef, params = nnx.split(_module(kind))
    out, begin = [], 0
    for count in counts:
        block = np.zeros((BATCH, 4, WIDTH), np.float32)
        block[:, :count] = x[:, begin : begin + count]
        positions = np.where(np.arange(4) < count, np.asarray(cache.lengths)[:, None] + np.arange(4), -1)
        y, cache = _forward(graphdef, params, block, positions.astype(np.int32), cache)
        out.append(np.asarray(y)[:, :count])
        begin += count
    return np.concatenate(out, 1), cache


def _cache(spec, **options):
    return Cache.init([spec], num_rows=BATCH, capacity=16, max_block=4, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flavor", ["nnx", "linen"])
def test_without_a_cache_it_is_the_plain_form(kind, flavor):
    want = _plain(kind, X)
    if flavor == "nnx":
        got = _module(kind)(X)
        np.testing.assert_allclose(jaxkv.nnx.fuse(_module(kind))(X), got, rtol=1e-5, atol=1e-5)
    else:
        attn = jaxkv.linen.LatentAttention(HEADS, WIDTH, **SIZES, **KINDS[kind])
        made = jax.eval_shape(attn.init, jax.random.key(0), X)["params"]
        assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, _params(kind))
        got = attn.apply({"params": _params(kind)}, X)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("flavor", ["nnx", "linen"])
def test_it_computes_in_bfloat16_with_norms_in_float32(flavor):
    sizes = {**SIZES, **KINDS["query-rank"], "dtype": jnp.bfloat16}
    if flavor == "nnx":
        attn = jaxkv.nnx.LatentAttention(HEADS, WIDTH, **sizes, rngs=nnx.Rngs(0))
        nnx.update(attn, nnx.state(_module("query-rank")))
        got = attn(X)
    else:
        got = jaxkv.linen.LatentAttention(HEADS, WIDTH, **sizes).apply({"params": _params("query-rank")}, X)
    assert got.dtype == jnp.bfloat16
    want = _plain("query-rank", X)
    np.testing.assert_allclose(got.astype(np.float32), want, atol=0.03 * np.abs(want).max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", ["put", "read"])
def test_with_a_cache_it_is_the_plain_form_in_any_blocks(kind, at):
    want = _plain(kind, X)
    for counts in ((4, 4, 1), (1,) * LENGTH, (3, 1, 4, 1)):
        got, cache = _feed(kind, _cache(_spec(kind, at)), X, *counts)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert cache.lengths.tolist() == [LENGTH] * BATCH


def test_the_linen_module_reads_and_writes_a_layer_as_the_nnx_module_does():
    attn = jaxkv.linen.LatentAttention(HEADS, WIDTH, **SIZES, **KINDS["plain"])
    cache, step = _cache(attn.layer_spec()).begin(np.tile(np.arange(4, dtype=np.int32), (BATCH, 1)))
    y, layer = attn.apply({"params": _params("plain")}, X[:, :4], cache.layers[0], step)
    want, after = _feed("plain", _cache(_module("plain").layer_spec()), X[:, :4], 4)
    np.testing.assert_allclose(y, want, rtol=1e-6, atol=1e-6)
    for x, other in zip(jax.tree.leaves(layer.buffers), jax.tree.leaves(after.layers[0].buffers), strict=True):
        np.testing.assert_allclose(x, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("flavor", ["nnx", "linen"])
def test_a_module_s_own_cache_takes_prompts_and_tokens(flavor):
    want = _plain("indexer", X)
    if flavor == "nnx":
        attn = nnx.clone(_module("indexer"))
        attn.init_cache(BATCH, LENGTH, v_storage=Dense("float32"))
        assert attn.cache.get_value().specs == _cache(_module("indexer").layer_spec()).specs
        decode = nnx.jit(lambda module, x: module.decode(x))
        call, held = functools.partial(decode, attn), attn.cache.get_value
    else:
        attn = jaxkv.linen.LatentAttention(HEADS, WIDTH, **SIZES, **KINDS["indexer"], cache_capacity=LENGTH)
        state, params = {}, {"params": _params("indexer")}
        decode = jax.jit(lambda state, x: attn.apply(params | state, x, decode=True, mutable=["cache"]))

        def call(x):
            y, new = decode(state, x)
            state.update(new)
            return y

        def held():
            return state["cache"]["kv"]

    got = np.concatenate([call(X[:, :4]), *(call(X[:, t : t + 1]) for t in range(4, LENGTH))], 1)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert held().lengths.tolist() == [LENGTH] * BATCH
    call(X[:, :1])  # past the capacity
    assert not held().ok.any()


def test_gradients_through_a_cache_are_those_without_one():
    graphdef, params = nnx.split(_module("query-rank"))

    def without(params, x):
        return jnp.sin(nnx.merge(graphdef, params)(x)).sum()

    def through(params, x):
        cache, total = _cache(_spec("query-rank")), jnp.float32(0)
        for begin, end in ((0, 4), (4, 8)):
            positions = jnp.tile(jnp.arange(begin, end, dtype=jnp.int32), (BATCH, 1))
            cache, step = cache.begin(positions)
            y, layer = nnx.merge(graphdef, params)(x[:, begin:end], cache.layers[0], step)
            cache, total = cache.with_layers([layer]), total + jnp.sin(y).sum()
        return total

    got, want = (jax.jit(jax.grad(f, argnums=(0, 1)))(params, X[:, :8]) for f in (through, without))
    assert all(np.asarray(x).any() for x in jax.tree.leaves(want))
    for x, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("storage", [Dense("float32"), Int8()], ids=repr)
def test_a_long_block_gives_what_the_plain_form_gives_and_the_same_gradients(storage):
    """So long that it is cheaper to expand what it reads to all heads."""
    attn = _module("plain")
    assert attn.heads._expands(20) and not attn.heads._expands(4)
    x = np.random.default_rng(2).normal(size=(BATCH, 24, WIDTH)).astype(np.float32)
    graphdef, params = nnx.split(attn)
    spec = LayerSpec.latent(RANK, ROTARY, storage=storage, rotary=KINDS["plain"]["rotary"])

    @jax.jit
    def through(params, x):
        cache, outs = Cache.init([spec], BATCH, 32, max_block=20), []
        for begin, end in ((0, 4), (4, 24)):
            positions = jnp.tile(jnp.arange(begin, end, dtype=jnp.int32), (BATCH, 1))
            cache, step = cache.begin(positions.at[0, end - begin - 3 :].set(-1))  # a row is shorter
            y, layer = nnx.merge(graphdef, params)(x[:, begin:end], cache.layers[0], step)
            cache = cache.with_layers([layer])
            outs.append(y)
        return jnp.concatenate(outs, 1)

    want = np.array(_plain("plain", x))
    got = np.asarray(through(params, x))
    if isinstance(storage, Int8):
        assert np.linalg.norm(got[1] - want[1]) / np.linalg.norm(want[1]) < 0.02
        return
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got[0, -3:], np.zeros((3, WIDTH), np.float32))  # padding sees nothing
    loss = lambda f: lambda *args: jnp.sin(f(*args)[1]).sum()  # noqa: E731
    got = jax.jit(jax.grad(loss(through), argnums=(0, 1)))(params, x)
    want = jax.jit(jax.grad(loss(lambda params, x: nnx.merge(graphdef, params)(x)), argnums=(0, 1)))(params, x)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "at"), [("plain", "put"), ("plain", "read"), ("indexer", "put")])
def test_removed_tokens_were_never_there(kind, at):
    """Of one layer: its latents depend on their own tokens alone."""
    _, cache = _feed(kind, _cache(_spec(kind, at)), X, 4, 4)
    for row in range(BATCH):
        cache = cache.remove(row, 2, 5)
    got, _ = _feed(kind, cache, X[:, 8:], 1)
    left = np.concatenate([X[:, :2], X[:, 5:]], 1)
    np.testing.assert_allclose(got[:, 0], _plain(kind, left)[:, -1], rtol=1e-5, atol=1e-5)


def test_a_token_takes_rank_and_rotary_dim_numbers_and_nothing_more():
    spec = LayerSpec.latent(512, 64, storage=Dense("bfloat16"), rotary=Rotary(interleaved=True))
    plan = jaxkv.plan_memory([spec] * 2, num_rows=3, capacity=256)
    assert plan.bytes_per_token == 2 * (512 + 64) * 2
    cache = Cache.init([spec] * 2, num_rows=3, capacity=256)
    assert plan.nbytes == cache.nbytes == sum(x.nbytes for x in jax.tree.leaves(cache))
    assert "v in k" in cache.describe()


def test_in_training_weights_are_dropped_and_both_flavors_drop_the_same_ones():
    options = {**SIZES, **KINDS["plain"], "dropout_rate": 0.5}
    attn = jaxkv.nnx.LatentAttention(HEADS, WIDTH, **options, rngs=nnx.Rngs(0))
    nnx.update(attn, nnx.state(_module("plain"), nnx.Param))
    want = _module("plain")(X)
    np.testing.assert_allclose(attn(X, deterministic=True), want, rtol=1e-6, atol=1e-6)
    key = jax.random.key(3)
    got = attn(X, deterministic=False, rngs=lambda: key)
    linen = jaxkv.linen.LatentAttention(HEADS, WIDTH, **options)
    other = linen.apply({"params": _params("plain")}, X, deterministic=False, dropout_rng=key)
    np.testing.assert_allclose(got, other, rtol=1e-6, atol=1e-6)
    assert np.abs(got - want).max() > 0.1 and np.abs(got - attn(X, deterministic=False)).max() > 0.1
    with pytest.raises(ValueError, match="it is not known whether to apply it"):
        attn(X)
    cache, step = _cache(attn.layer_spec()).begin(np.tile(np.arange(4, dtype=np.int32), (BATCH, 1)))
    with pytest.raises(ValueError, match="with a cache there is no dropout"):
        attn(X[:, :4], cache.layers[0], step, deterministic=False)
    with pytest.raises(ValueError, match="chosen tokens are read without dropout"):
        jaxkv.linen.LatentAttention(HEADS, WIDTH, **SIZES, **KINDS["indexer"], dropout_rate=0.5).layer_spec()


def test_an_indexer_that_chooses_all_changes_nothing_and_one_that_can_not_is_refused():
    indexer = jaxkv.Indexer(num_heads=5, head_dim=6, top_k=16)
    options = {**SIZES, **KINDS["indexer"]}
    all_of_them = jaxkv.nnx.LatentAttention(HEADS, WIDTH, **options | {"indexer": indexer}, rngs=nnx.Rngs(0))
    nnx.update(all_of_them, nnx.state(_module("indexer")))
    without = jaxkv.nnx.LatentAttention(HEADS, WIDTH, **options | {"indexer": None}, rngs=nnx.Rngs(0))
    jaxkv.load_state_dict(without, jaxkv.state_dict(_module("indexer")), strict=False)
    np.testing.assert_allclose(all_of_them(X), without(X), rtol=1e-6, atol=1e-6)
    assert np.abs(_module("indexer")(X) - without(X)).max() > 0.01
    with pytest.raises(ValueError, match="makes its queries of the latent of attention's: give a query_rank"):
        jaxkv.nnx.LatentAttention(HEADS, WIDTH, **SIZES, indexer=indexer, rngs=nnx.Rngs(0))
    small = jaxkv.Indexer(num_heads=1, head_dim=2, top_k=3)
    with pytest.raises(ValueError, match=r"4 numbers are rotated \(rotary_dim\), so its heads have as many"):
        jaxkv.nnx.LatentAttention(HEADS, WIDTH, **options | {"indexer": small}, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"Indexer.*top_k.*at least 1"):
        jaxkv.Indexer(num_heads=1, head_dim=2, top_k=0)


@pytest.mark.optimized
def test_a_decode_step_makes_no_keys_or_values_of_heads():
    heads, capacity = 16, 4096
    attn = nnx.eval_shape(
        lambda: jaxkv.nnx.LatentAttention(heads, 32, rank=64, rotary_dim=16, head_dim=32, rngs=nnx.Rngs(0))
    )
    graphdef, params = nnx.split(attn)
    cache = jax.eval_shape(lambda: Cache.init([attn.layer_spec()], 1, capacity))
    args = params, jax.ShapeDtypeStruct((1, 1, 32), jnp.float32), jax.ShapeDtypeStruct((1, 1), jnp.int32), cache
    step = jax.jit(lambda *args: _forward.__wrapped__(graphdef, *args), donate_argnums=3)
    memory = step.lower(*args).compile().memory_analysis()
    assert memory.temp_size_in_bytes < heads * 32 * capacity * 4 / 4
    assert memory.alias_size_in_bytes >= cache.nbytes - 64


STORAGES = {Int8(): 0.01, Float8("e4m3"): 0.04, Int4(group=2): 0.08}


@pytest.mark.parametrize("storage", STORAGES, ids=repr)
def test_latents_and_rotary_keys_are_kept_in_any_storage(storage):
    spec = LayerSpec.latent(32, 8, storage=storage, rotary=Rotary(interleaved=True))
    random = np.random.default_rng(0)
    k = random.normal(size=(2, 64, 1, 40)).astype(np.float32)
    k[..., 32:] *= 8  # rotary keys are much larger than latents; they have scales of their own
    q = random.normal(size=(2, 64, 4, 40)).astype(np.float32) / 8

    @jax.jit
    def read(cache, k, q):
        cache, step = cache.begin(jnp.tile(jnp.arange(64, dtype=jnp.int32), (2, 1)))
        return jaxkv.attend(q, cache.layers[0].put(step, k), step)

    got, want = (
        np.asarray(read(Cache.init([one], 2, 64), k, q))
        for one in (spec, LayerSpec.latent(32, 8, rotary=Rotary(interleaved=True)))
    )
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < STORAGES[storage]


def test_random_programs_agree_with_the_oracle_in_int8_latents_with_dense_rotary_keys():
    spec = LayerSpec.latent(4, 2, storage=Int8(), rotary_storage=Dense("float32"), rotary=Rotary())
    cache = Cache.init([spec] * 2, num_rows=4, capacity=24, max_block=4, stacked=True)
    for seed in range(4):
        run_program(cache, seed, num_operations=30)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LayerSpec(Full(), 1, 4, 6, v_in_k=True), "value that is longer"),
        (lambda: LayerSpec(Full(), 1, 4, rotary=Rotary(), v_in_k=True), "give rotary_at='read'"),
        (lambda: LayerSpec(Full(), 1, 4, v_in_k=1), "give True or False"),
        (lambda: LayerSpec.latent(0, 4), "rank"),
        (lambda: LayerSpec.latent(8, 3, storage=Int4()), "odd number"),
        (lambda: LayerSpec.latent(8, 4, storage=Int4(group=8)), "don't divide"),
        (lambda: _module("plain").heads.__class__(3, 8, 4, 0, Full()), "head_dim=0"),
        (lambda: jaxkv.nnx.LatentAttention(2, 4, **SIZES, use_bias="key", rngs=nnx.Rngs(0)), "query_down"),
        (lambda: _put(jnp.ones((1, 1, 1, 5))), r"\[B, T, K, H\] = \(1, 1, 1, 6\)"),
        (lambda: _put(jnp.ones((1, 1, 1, 6)), jnp.ones((1, 1, 1, 4))), r"give put\(step, k\)"),
        (lambda: _put(None), "k is missing"),
        (lambda: _module("plain")(X[..., :4]), "in_features=12"),
    ],
)
def test_wrong_specs_and_calls_are_refused_with_the_cure(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def _put(*args):
    cache, step = Cache.init([LayerSpec.latent(4, 2)], 1, 8).begin(jnp.zeros((1, 1), jnp.int32))
    return cache.layers[0].put(step, *args)


def test_a_layer_made_for_another_attention_is_refused():
    cache, step = _cache(LayerSpec(Full(), 1, 12, 8, rotary=KINDS["plain"]["rotary"])).begin(np.zeros((BATCH, 1), int))
    with pytest.raises(ValueError, match="v_in_k=False, this module has v_in_k=True"):
        _module("plain")(X[:, :1], cache.layers[0], step)


def test_keys_that_are_rotated_when_they_are_read_are_float32_at_least():
    """Of 16 bits the rotation would round once more."""
    specs = [
        LayerSpec(Full(), 1, 4, k_storage=Dense("float16"), v_storage=Dense("float16"), rotary=Rotary(), **rest)
        for rest in ({"rotary_at": "read"}, {"rotary_at": "read", "v_in_k": True})
    ]
    cache, step = Cache.init(specs, 1, 8).begin(jnp.zeros((1, 1), jnp.int32))
    for layer in cache.layers:
        k, v, _ = layer.get(step)
        assert (k.dtype, v.dtype) == ("float32", "float16")
