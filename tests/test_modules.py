"""The attention modules of both Flax flavors: Flax's parameters and numbers, cached equals uncached, hidden caches."""

from __future__ import annotations

import dataclasses
import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict

import jaxkv
from jaxkv import EMPTY, Cache, CacheFullError, Chunk, Cross, Dense, Full, LayerSpec, Rotary, Window

B, T, D = 2, 8, 12  # batch, tokens, model width of every test that can choose
# The dense form compiles faster; the blockwise one has tests of its own and stays in two of these.
CONFIGS = {
    "default": dict(num_heads=2, implementation="reference"),
    "window, grouped, rotary": dict(num_heads=4, num_kv_heads=2, head_dim=6, reach=Window(3), rotary=Rotary(100.0)),
    "sinks, qk_norm, softcap": dict(
        num_heads=2,
        reach=Window(3, sinks=1),
        qk_norm=True,
        softcap=3.0,
        rotary=Rotary(dim=4),
        use_bias=("query", "key"),
    ),
    "chunk, sink logits, scale": dict(
        num_heads=4,
        num_kv_heads=1,
        head_dim=6,
        reach=Chunk(3),
        sink_logits=True,
        scale=0.7,
        use_bias=False,
        implementation="reference",
    ),
}


def some(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


X = some(B, T, D)


def noise(tree):
    """The same tree of arrays or shapes, with noise everywhere, so that biases, scales and sinks count."""
    leaves, tree = jax.tree.flatten(tree)
    return tree.unflatten(
        [some(*x.shape, seed=i, dtype=x.dtype) * np.array(0.3, x.dtype) for i, x in enumerate(leaves)]
    )


class Attn:
    """A flavor-free view of an attention module, made once for all tests with the same arguments.

    Attributes: module; params, nested dicts; apply(params, *arguments of the call), jitted; read(params, cache, x,
    positions) -> (cache, y), jitted: one forward pass of a model of one layer.
    """

    def __init__(self, module, params, apply):
        self.module, self.params, self.apply = module, params, jax.jit(apply)
        self.read = jax.jit(self._read)

    def _read(self, params, cache, x, positions):
        cache, step = cache.begin(positions)
        y, layer = self.apply(params, x, cache.layers[0], step)
        return cache.with_layers([layer]), y


def nnx_attention(**arguments):
    module = nnx.eval_shape(lambda: jaxkv.nnx.Attention(in_features=D, rngs=nnx.Rngs(0), **arguments))
    graphdef, state = nnx.split(module)
    params = noise(nnx.to_pure_dict(state))
    return Attn(module, params, lambda params, *a, **k: nnx.merge(graphdef, params)(*a, **k))


def linen_attention(**arguments):
    module = jaxkv.linen.Attention(in_features=D, **arguments)
    params = noise(jax.eval_shape(module.init, jax.random.key(0), X)["params"])
    return Attn(module, params, lambda params, *a, **k: module.apply({"params": params}, *a, **k))


FLAVORS = {"nnx": functools.lru_cache(None)(nnx_attention), "linen": functools.lru_cache(None)(linen_attention)}
nnx_attention, linen_attention = FLAVORS["nnx"], FLAVORS["linen"]


@pytest.fixture(params=list(FLAVORS))
def flavor(request):
    return FLAVORS[request.param]


def blocks(length, size):
    """Positions of a sequence in blocks of one size, the last padded with EMPTY."""
    for start in range(0, length, size):
        p = np.arange(start, start + size)
        yield np.where(p < length, p, EMPTY)


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


# Flax's own modules


@pytest.mark.parametrize(
    "arguments",
    [{}, {"use_bias": False}, {"qkv_features": 8, "out_features": 5}],
    ids=["default", "no bias", "other sizes"],
)
def test_linen_parameters_and_numbers_are_flax_s(arguments):
    theirs = nn.MultiHeadDotProductAttention(num_heads=2, **arguments)
    ours = jaxkv.linen.Attention(num_heads=2, **arguments)
    variables = jax.jit(theirs.init)(jax.random.key(0), X)
    mine = jax.jit(ours.init)(jax.random.key(0), X)
    assert jax.tree.structure(mine) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, mine, variables)  # the same key even draws the same numbers
    variables = noise(variables)
    want = theirs.apply(variables, X, mask=nn.make_causal_mask(X[..., 0]))
    np.testing.assert_allclose(ours.apply(variables, X), want, atol=2e-6)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"use_bias": False}, {"qkv_features": 8, "out_features": 5, "num_kv_heads": 1}],
    ids=["default", "no bias", "other sizes"],
)
def test_nnx_parameters_and_numbers_are_flax_s(arguments):
    theirs = nnx.MultiHeadAttention(2, D, decode=False, rngs=nnx.Rngs(0), **arguments)
    ours = jaxkv.nnx.Attention(2, D, rngs=nnx.Rngs(0), **arguments)
    state = nnx.state(theirs, nnx.Param)
    assert nnx.to_pure_dict(nnx.state(ours)).keys() == nnx.to_pure_dict(state).keys()
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(ours, nnx.Param)), nnx.to_pure_dict(state))
    state = noise(state)
    nnx.update(theirs, state)
    nnx.update(ours, state)
    want = theirs(X, mask=nnx.make_causal_mask(X[..., 0]))
    np.testing.assert_allclose(ours(X), want, atol=2e-6)


def test_decoding_gives_what_linen_s_own_decoding_gives():
    theirs = nn.MultiHeadDotProductAttention(num_heads=2, decode=True)
    variables = jax.jit(theirs.init)(jax.random.key(0), X)
    params, state = noise(variables["params"]), {"cache": variables["cache"]}
    decode = jax.jit(lambda state, x: theirs.apply({"params": params} | state, x, mutable=["cache"]))

    read = linen_attention(num_heads=2).read
    cache = Cache.init([LayerSpec(Full(), 2, D // 2)], B, T)

    hidden = jaxkv.linen.Attention(num_heads=2, decode=True)  # made and used exactly as theirs is
    ours = {"cache": jax.jit(hidden.init)(jax.random.key(0), X)["cache"]}
    hidden_decode = jax.jit(lambda state, x: hidden.apply({"params": params} | state, x, mutable=["cache"]))
    for t in range(T):
        x = X[:, t : t + 1]
        want, state = decode(state, x)
        cache, y = read(params, cache, x, jnp.full((B, 1), t))
        z, ours = hidden_decode(ours, x)
        np.testing.assert_allclose(y, want, atol=2e-6)
        np.testing.assert_allclose(z, want, atol=2e-6)


def test_decoding_gives_what_nnx_s_own_decoding_gives():
    theirs = nnx.MultiHeadAttention(2, D, num_kv_heads=1, decode=True, rngs=nnx.Rngs(0))
    ours = jaxkv.nnx.Attention(2, D, num_kv_heads=1, rngs=nnx.Rngs(0))
    theirs.init_cache(X.shape)
    ours.init_cache(B, T)
    decode = nnx.jit(lambda module, x: module(x))
    ours_decode = nnx.jit(lambda module, x: module.decode(x))
    for t in range(T):
        x = X[:, t : t + 1]
        np.testing.assert_allclose(ours_decode(ours, x), decode(theirs, x), atol=2e-6)


def test_both_flavors_have_the_same_parameters_and_give_the_same_numbers():
    for arguments in CONFIGS.values():
        one, other = nnx_attention(**arguments), linen_attention(**arguments)
        assert shapes(one.params) == shapes(other.params)
        assert one.module.layer_spec() == other.module.layer_spec()
        np.testing.assert_allclose(one.apply(one.params, X), other.apply(one.params, X), atol=1e-6)


# With a cache and without


@pytest.mark.parametrize(("name", "sizes"), list(zip(CONFIGS, [(T, 1), (T, 3, 1), (3, 1), (3,)], strict=True)))
def test_any_split_of_a_sequence_equals_the_whole_without_a_cache(name, sizes):
    attn = nnx_attention(**CONFIGS[name])
    params, read = attn.params, attn.read
    want = attn.apply(params, X)
    for size in sizes:
        cache, ys = Cache.init([attn.module.layer_spec()], B, T, max_block=T), []
        for p in blocks(T, size):
            cache, y = read(params, cache, X[:, np.maximum(p, 0)], jnp.tile(jnp.asarray(p, jnp.int32), (B, 1)))
            ys.append(np.asarray(y)[:, p >= 0])
        np.testing.assert_allclose(np.concatenate(ys, 1), want, atol=3e-6)


def test_linen_reads_a_cache_too_and_padding_is_inert_in_both(flavor):
    attn = flavor(**CONFIGS["window, grouped, rotary"])
    params, read = attn.params, attn.read
    want = attn.apply(params, X)
    positions = jnp.array([[EMPTY, 0, 1, EMPTY, 2], [0, 1, 2, 3, EMPTY]])  # left, middle, right
    more = jnp.array([[3, 4, 5, EMPTY, EMPTY], [EMPTY] * 5])
    cache = Cache.init([attn.module.layer_spec()], B, T)
    for p in (positions, more):
        x = jnp.take_along_axis(X, jnp.maximum(p, 0)[:, :, None], axis=1)
        x = jnp.where(p[:, :, None] == EMPTY, 99.0, x)
        cache, y = read(params, cache, x, p)
        for b in range(B):
            there = np.asarray(p[b]) != EMPTY
            np.testing.assert_allclose(y[b, there], want[b, np.asarray(p[b])[there]], atol=3e-6)
        whole = attn.apply(params, x, positions=p)
        assert whole.shape == y.shape
    assert cache.lengths.tolist() == [6, 4]


def test_padding_is_inert_without_a_cache(flavor):
    attn = flavor(**CONFIGS["window, grouped, rotary"])
    params = attn.params
    want = attn.apply(params, X)
    p = jnp.array([[EMPTY, 0, 1, EMPTY, 2, 3, 4, EMPTY], list(range(T))])
    x = jnp.take_along_axis(X, jnp.maximum(p, 0)[:, :, None], axis=1)
    y = attn.apply(params, jnp.where(p[:, :, None] == EMPTY, 99.0, x), positions=p)
    there = np.asarray(p[0]) != EMPTY
    np.testing.assert_allclose(y[0, there], want[0, :5], atol=3e-6)
    np.testing.assert_allclose(y[1], want[1], atol=3e-6)


def test_reach_is_the_receptive_field_without_a_cache():
    attn = nnx_attention(num_heads=2, reach=Window(3, sinks=1))
    jacobian = jax.jit(jax.jacrev(lambda x: attn.apply(attn.params, x).sum(-1)))(X[:1, :6])  # [1, T, 1, T, D]
    picture = (np.abs(jacobian[0, :, 0]).sum(-1) > 1e-9).astype(int)
    assert picture.tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 0, 1, 1, 1, 0],
        [1, 0, 0, 1, 1, 1],
    ]


def test_spans_see_each_other_in_both_directions_with_a_cache_and_without(flavor):
    attn = flavor(num_heads=2)
    spans = jnp.tile(jnp.array([0, 1, 1, 1, 0, 0, 0, 0]), (B, 1))
    cache = Cache.init([LayerSpec(Full(), 2, D // 2)], B, T)
    cache, step = cache.begin(jnp.tile(jnp.arange(T), (B, 1)), spans=spans)
    y, _ = attn.apply(attn.params, X, cache.layers[0], step)
    z = attn.apply(attn.params, X, spans=spans)
    np.testing.assert_allclose(y, z, atol=3e-6)
    causal = attn.apply(attn.params, X)
    changed = np.abs(z - causal).max((0, 2)) > 1e-4
    assert changed.astype(int).tolist() == [0, 1, 1, 0, 0, 0, 0, 0]


def test_tokens_removed_from_the_middle_were_as_good_as_never_there():
    attn = nnx_attention(num_heads=2, rotary=Rotary(100.0), implementation="reference")
    params, read = attn.params, attn.read
    cache = Cache.init([attn.module.layer_spec()], B, T)
    cache, _ = read(params, cache, X[:, : T - 1], jnp.tile(jnp.arange(T - 1), (B, 1)))
    cache = jax.jit(Cache.remove)(cache, 0, 2, 5)  # of row 0: 0 1 5 6 are left
    assert cache.lengths.tolist() == [4, 7]
    cache, y = read(params, cache, X[:, T - 1 :], cache.lengths[:, None])
    kept = attn.apply(params, jnp.pad(X[:, [0, 1, 5, 6, 7]], ((0, 0), (0, T - 5), (0, 0))))
    np.testing.assert_allclose(y[0, 0], kept[0, 4], atol=5e-6)
    np.testing.assert_allclose(y[1, 0], attn.apply(params, X)[1, 7], atol=5e-6)


def test_a_stack_of_layers_is_carried_by_scan():
    attn = nnx_attention(**CONFIGS["window, grouped, rotary"])
    params = [attn.params, jax.tree.map(lambda x: -x, attn.params)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *params)
    apply, spec = attn.apply, attn.module.layer_spec()
    cache = Cache.init([spec] * 2, B, T, stacked=True)

    @jax.jit
    def read(params, cache, x, positions):
        cache, step = cache.begin(positions)

        def one(carry, layer_params):
            x, stack, i = carry
            y, layer = apply(layer_params, x, stack.at(i), step)
            return (x + y, layer.at(None), i + 1), None

        (x, stack, _), _ = jax.lax.scan(one, (x, cache.layers[0], jnp.int32(0)), params)
        return cache.with_layers([stack]), x

    want = X
    for p in params:
        want = want + apply(p, want)
    for p in blocks(T, 4):
        cache, y = read(stacked, cache, X[:, p], jnp.tile(jnp.asarray(p, jnp.int32), (B, 1)))
        np.testing.assert_allclose(y, want[:, p], atol=1e-5)


# dtypes, gradients, sharding


@pytest.mark.parametrize(("flavor", "dtype"), [("nnx", "bfloat16"), ("linen", "float16")], indirect=["flavor"])
def test_small_dtypes_stay_close_to_float32(flavor, dtype):
    arguments = CONFIGS["sinks, qk_norm, softcap"]
    attn, exact = flavor(dtype=dtype, **arguments), flavor(**arguments)
    assert shapes(attn.params) == shapes(exact.params)
    params = exact.params
    x = X.astype(dtype)
    y = attn.apply(params, x)
    assert y.dtype == dtype
    np.testing.assert_allclose(y.astype(jnp.float32), exact.apply(params, X), atol=0.1)
    spec = attn.module.layer_spec()  # of the dtype of the computation
    assert spec == attn.module.layer_spec(k_storage=Dense(dtype), v_storage=Dense(dtype))
    cache, z = attn.read(params, Cache.init([spec], B, T), x, jnp.tile(jnp.arange(T), (B, 1)))
    assert cache.layers[0].spec == spec
    assert z.dtype == dtype
    np.testing.assert_allclose(z.astype(jnp.float32), y.astype(jnp.float32), atol=0.03)


def test_param_dtype_is_the_parameters_own(flavor):
    attn = flavor(num_heads=2, param_dtype=jnp.bfloat16, dtype=jnp.float32, qk_norm=True, sink_logits=True)
    assert {x.dtype.name for x in jax.tree.leaves(attn.params)} == {"bfloat16"}
    assert attn.apply(attn.params, X).dtype == jnp.float32
    assert attn.module.layer_spec().v_storage == Dense(jnp.float32)


def test_without_a_dtype_the_cache_keeps_that_of_the_parameters_unless_told():
    half, rngs = Dense(jnp.bfloat16), nnx.Rngs(0)
    for attn in (
        jaxkv.linen.Attention(2, D, param_dtype=jnp.bfloat16),
        jaxkv.nnx.Attention(2, D, param_dtype=jnp.bfloat16, rngs=rngs),
    ):
        spec = attn.layer_spec(v_storage=Dense(jnp.float32))
        assert (spec.k_storage, spec.v_storage) == (half, Dense(jnp.float32))


def test_what_is_kept_of_an_encoder_output_follows_the_dtype_too(cross_flavor):
    module, _, _ = cross_flavor(**CROSS["default"], dtype=jnp.bfloat16)
    assert module.layer_spec().k_storage == module.layer_spec().v_storage == Dense(jnp.bfloat16)


def test_gradients_through_the_cache_equal_those_without():
    attn = nnx_attention(**CONFIGS["window, grouped, rotary"])
    params = attn.params
    spec = attn.module.layer_spec()
    weights = some(B, T, D, seed=5)

    def plain(params, x):
        return (attn.apply(params, x) * weights).sum()

    def cached(params, x):
        cache, step = Cache.init([spec], B, T).begin(jnp.tile(jnp.arange(T), (B, 1)))
        return (attn.apply(params, x, cache.layers[0], step)[0] * weights).sum()

    want = jax.jit(jax.grad(plain, (0, 1)))(params, X)
    got = jax.jit(jax.grad(cached, (0, 1)))(params, X)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5), got, want)


def test_flax_s_own_remat_works_in_both_flavors():
    arguments = CONFIGS["default"]
    attn = nnx_attention(**arguments)
    variables = {"params": attn.params}
    want = jax.jit(jax.grad(lambda v: attn.apply(v["params"], X).sum()))(variables)
    remat = nn.remat(jaxkv.linen.Attention)(**arguments)
    close = functools.partial(np.testing.assert_allclose, atol=1e-5)
    jax.tree.map(close, jax.jit(jax.grad(lambda v: remat.apply(v, X).sum()))(variables), want)

    graphdef, _ = nnx.split(attn.module)
    remat = nnx.remat(lambda module, x: module(x))
    got = jax.jit(jax.grad(lambda v: remat(nnx.merge(graphdef, v["params"]), X).sum()))(variables)
    jax.tree.map(close, got, want)


def mesh_of_4():
    return jax.make_mesh((2, 2), ("data", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def sharded_like_flax(with_partitioning):
    """Arguments of a module whose heads are sharded, as users of either flavor write them."""
    lecun, zeros = nn.initializers.lecun_normal(), nn.initializers.zeros_init()
    return dict(
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        reach=Window(3),
        rotary=Rotary(100.0),
        kernel_init=with_partitioning(lecun, (None, "heads", None)),
        bias_init=with_partitioning(zeros, ("heads", None)),
        out_kernel_init=with_partitioning(lecun, ("heads", None, None)),
        out_bias_init=zeros,
    )


def test_sharding_annotations_arrive_in_the_parameters_and_shard_the_forward_pass(flavor):
    spec = jax.sharding.PartitionSpec
    mesh = mesh_of_4()
    with jax.set_mesh(mesh):
        if flavor is nnx_attention:
            attn = flavor(**sharded_like_flax(nnx.with_partitioning))
            module = jaxkv.nnx.Attention(in_features=D, rngs=nnx.Rngs(0), **sharded_like_flax(nnx.with_partitioning))
        else:
            attn = flavor(**sharded_like_flax(nn.with_partitioning))
            boxed = jax.jit(attn.module.init)(jax.random.key(0), X)["params"]
    if flavor is nnx_attention:  # nnx shards while it makes parameters
        params, specs = nnx.to_pure_dict(nnx.state(module)), nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(module)))
    else:
        specs = nn.get_partition_spec(boxed)
        params = jax.tree.map(lambda x, s: jax.device_put(x, jax.NamedSharding(mesh, s)), nn.meta.unbox(boxed), specs)
    assert specs["query"]["kernel"] == specs["value"]["kernel"] == spec(None, "heads", None)
    assert specs["key"]["bias"] == spec("heads", None)
    assert specs["out"]["kernel"] == spec("heads", None, None)
    assert params["key"]["kernel"].sharding.spec == spec(None, "heads", None)

    whole = jax.device_put(params, jax.devices()[0])
    want = flavor(**CONFIGS["window, grouped, rotary"]).apply(whole, X)
    with jax.set_mesh(mesh):
        x = jax.device_put(X, jax.NamedSharding(mesh, spec("data", None, None)))
        y = attn.apply(params, x)
        np.testing.assert_allclose(y, want, atol=3e-6)
        kv = jax.NamedSharding(mesh, spec("data", "heads", None, None))
        cache = Cache.init([attn.module.layer_spec()], B, T, sharding=kv)
        cache, z = attn.read(params, cache, x, jnp.tile(jnp.arange(T), (B, 1)))
        np.testing.assert_allclose(z, want, atol=3e-6)
        assert jax.tree.leaves(cache.layers[0].k)[0].sharding.is_equivalent_to(kv, 4)


# Dropout


def test_dropout_is_asked_for_and_drawn_as_in_flax(flavor):
    streams = {"keep_rngs": False} if flavor is nnx_attention else {}
    attn = flavor(num_heads=2, dropout_rate=0.5, deterministic=True, implementation="reference", **streams)
    if flavor is linen_attention:
        train = functools.partial(attn.module.apply, {"params": attn.params})
        key = lambda: {"dropout_rng": jax.random.key(3)}  # noqa: E731
    else:
        graphdef = nnx.split(attn.module)[0]
        train = lambda *a, **k: nnx.merge(graphdef, attn.params)(*a, **k)  # noqa: E731
        key = lambda: {"rngs": nnx.Rngs(dropout=3)}  # noqa: E731
    want = attn.apply(attn.params, X)
    y = train(X, deterministic=False, **key())
    assert not np.allclose(y, want, atol=1e-3)
    np.testing.assert_array_equal(train(X, deterministic=False, **key()), y)
    cache, step = Cache.init([attn.module.layer_spec()], B, T).begin(jnp.tile(jnp.arange(T), (B, 1)))
    np.testing.assert_allclose(train(X, cache.layers[0], step)[0], want, atol=3e-6)
    with pytest.raises(ValueError, match="deterministic=False, and a layer was given"):
        train(X, cache.layers[0], step, deterministic=False)
    with pytest.raises(ValueError, match=r"dropout_rate=1\.5: give a number from 0 to below 1"):
        flavor(num_heads=2, dropout_rate=1.5)
    with pytest.raises(ValueError, match=r"dropout_rate=0\.5, and it is not known whether to apply it; give determin"):
        jaxkv.linen.Attention(2, dropout_rate=0.5).init(jax.random.key(0), X)


def test_dropout_follows_the_mode_of_an_nnx_model_and_the_streams_of_a_linen_one():
    ours = jaxkv.nnx.Attention(2, D, dropout_rate=0.5, rngs=nnx.Rngs(0))
    theirs = nnx.MultiHeadAttention(2, D, dropout_rate=0.5, decode=False, rngs=nnx.Rngs(0))
    for module in (ours, theirs):
        module.train()
        assert (module(X) != module(X)).any()  # each call draws anew
        module.eval()
        np.testing.assert_array_equal(module(X), module(X))
    np.testing.assert_array_equal(ours.query.kernel[...], theirs.query.kernel[...])
    ours.train()
    with pytest.raises(ValueError, match=r"the model, a Attention, is in training mode .* call model\.eval\(\)"):
        jaxkv.nnx.functional(ours)
    bare = jaxkv.nnx.Attention(2, D, dropout_rate=0.5, deterministic=False, keep_rngs=False, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"keep_rngs=False\); give the call one"):
        bare(X)
    assert bare(X, rngs=nnx.Rngs(0)).shape == X.shape

    linen = jaxkv.linen.CrossAttention(2, D, E, size=S, dropout_rate=0.5, broadcast_dropout=False, deterministic=False)
    variables = linen.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, X, encoded=ENCODED)
    calls = [linen.apply(variables, X, encoded=ENCODED, rngs={"dropout": jax.random.key(i)}) for i in (1, 1, 2)]
    np.testing.assert_array_equal(calls[0], calls[1])
    assert (calls[0] != calls[2]).any()


# Hidden caches


def test_linen_s_hidden_cache_takes_prompts_and_tokens_and_is_left_empty_by_init():
    attn = jaxkv.linen.Attention(**CONFIGS["chunk, sink logits, scale"], decode=True, cache_capacity=T)
    variables = jax.jit(attn.init)(jax.random.key(0), X[:, :3])
    params, state = noise(variables["params"]), {"cache": variables["cache"]}
    assert state["cache"]["kv"].lengths.tolist() == [0, 0]
    assert state["cache"]["kv"].capacity == T
    want = jax.jit(lambda x: attn.apply({"params": params}, x, decode=False))(X)
    decode = jax.jit(lambda state, x: attn.apply({"params": params} | state, x, mutable=["cache"]))
    ys = []
    for x in (X[:, :5], X[:, 5:6], X[:, 6:7], X[:, 7:]):
        y, state = decode(state, x)
        ys.append(y)
    np.testing.assert_allclose(np.concatenate(ys, 1), want, atol=3e-6)
    y, state = decode(state, X[:, :1])  # past the capacity
    assert state["cache"]["kv"].ok.tolist() == [False, False]
    assert state["cache"]["kv"].lengths.tolist() == [T, T]
    with pytest.raises(CacheFullError):
        state["cache"]["kv"].check()


def test_linen_s_hidden_cache_is_made_on_first_use_and_takes_positions():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, positions=None, decode=False):
            attn = jaxkv.linen.Attention(**CONFIGS["default"], cache_capacity=T, dtype=jnp.bfloat16, name="attn")
            return x + attn(x, positions=positions, decode=decode)

    x = X.astype(jnp.bfloat16)
    shape = jax.eval_shape(Block().init, jax.random.key(0), x)
    assert set(shape) == {"params"}
    variables = noise(shape)

    @jax.jit
    def decode(state, x, positions=None):
        return Block().apply(variables | state, x, positions, decode=True, mutable=["cache"])

    positions = jnp.array([[EMPTY, 0, 1], [0, 1, 2]])
    _, state = decode({}, x[:, :3], positions)
    cache = state["cache"]["attn"]["kv"]
    assert cache.lengths.tolist() == [2, 3]
    assert cache.specs[0].k_storage == Dense("bfloat16")
    y, state = decode(state, x[:, 3:4])
    want = jax.jit(Block().apply)(variables, x)
    np.testing.assert_allclose(y[1, 0].astype(jnp.float32), want[1, 3].astype(jnp.float32), atol=0.05)


def test_nnx_s_hidden_cache_takes_prompts_and_tokens():
    attn = jaxkv.nnx.Attention(in_features=D, rngs=nnx.Rngs(0), **CONFIGS["chunk, sink logits, scale"])
    before = nnx.to_pure_dict(nnx.state(attn))
    attn.init_cache(B, T, k_storage=Dense("float16"), max_block=5)
    assert nnx.to_pure_dict(nnx.state(attn, nnx.Param)).keys() == before.keys()
    assert attn.cache.get_value().specs[0].v_storage == Dense("float32")
    assert attn.cache.get_value().max_block == 5
    decode = nnx.jit(lambda module, x: module.decode(x))
    ys = [decode(attn, x) for x in (X[:, :5], X[:, 5:6], X[:, 6:7], X[:, 7:])]
    np.testing.assert_allclose(np.concatenate(ys, 1), nnx.jit(lambda module, x: module(x))(attn, X), atol=3e-3)
    decode(attn, X[:, :1])
    assert attn.cache.get_value().lengths.tolist() == [T, T]
    assert not attn.cache.get_value().ok.any()
    attn.init_cache(B, T)
    y = nnx.jit(lambda m, x, p: m.decode(x, p))(attn, X[:, :3], jnp.array([[EMPTY, 0, 1], [0, 1, EMPTY]]))
    assert attn.cache.get_value().lengths.tolist() == [2, 2]
    assert bool(jnp.isfinite(y).all())


# Cross-attention

E, S = 6, 7  # features and places of an encoder's output
CROSS = {
    "default": dict(num_heads=2, encoded_features=E, size=S),
    "grouped, norms": dict(
        num_heads=4,
        encoded_features=E,
        out_features=5,
        num_kv_heads=2,
        size=S,
        head_dim=6,
        qk_norm=True,
        softcap=2.0,
        scale=0.3,
        use_bias=("query", "value", "out"),
    ),
}
ENCODED = some(B, S, E, seed=9)


def nnx_cross(**arguments):
    module = nnx.eval_shape(lambda: jaxkv.nnx.CrossAttention(in_features=D, rngs=nnx.Rngs(0), **arguments))
    graphdef, state = nnx.split(module)

    def apply(params, *a, method="__call__", **k):
        return getattr(nnx.merge(graphdef, params), method)(*a, **k)

    return module, noise(nnx.to_pure_dict(state)), apply


def linen_cross(**arguments):
    module = jaxkv.linen.CrossAttention(in_features=D, **arguments)
    params = noise(jax.eval_shape(functools.partial(module.init, encoded=ENCODED), jax.random.key(0), X)["params"])
    return module, params, lambda params, *a, **k: module.apply({"params": params}, *a, **k)


@pytest.fixture(params=[nnx_cross, linen_cross], ids=["nnx", "linen"])
def cross_flavor(request):
    return request.param


def test_linen_cross_parameters_and_numbers_are_flax_s():
    theirs = nn.MultiHeadDotProductAttention(num_heads=2)
    ours = jaxkv.linen.CrossAttention(2, D, E, size=S)
    variables = theirs.init(jax.random.key(0), X, ENCODED)
    jax.tree.map(np.testing.assert_array_equal, ours.init(jax.random.key(0), X, encoded=ENCODED), variables)
    variables = noise(variables)
    want = theirs.apply(variables, X, ENCODED)
    np.testing.assert_allclose(ours.apply(variables, X, encoded=ENCODED), want, atol=2e-6)


def test_nnx_cross_parameters_and_numbers_are_flax_s():
    theirs = nnx.MultiHeadAttention(2, D, in_kv_features=E, decode=False, rngs=nnx.Rngs(0))
    ours = jaxkv.nnx.CrossAttention(2, D, E, size=S, rngs=nnx.Rngs(0))
    state = nnx.state(theirs, nnx.Param)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(ours, nnx.Param)), nnx.to_pure_dict(state))
    state = noise(state)
    nnx.update(theirs, state)
    nnx.update(ours, state)
    mask = jnp.arange(S)[None, None, None] < jnp.array([S, 3])[:, None, None, None]
    want = theirs(X, ENCODED, mask=mask)
    np.testing.assert_allclose(ours(X, encoded=ENCODED, encoded_lengths=jnp.array([S, 3])), want, atol=2e-6)
    np.testing.assert_allclose(jaxkv.nnx.fuse(ours)(X, encoded=ENCODED), theirs(X, ENCODED), atol=2e-6)


@pytest.mark.parametrize("name", CROSS)
def test_what_was_written_once_is_read_as_without_a_cache(cross_flavor, name):
    module, params, apply = cross_flavor(**CROSS[name])
    other = linen_cross(**CROSS[name])
    assert shapes(params) == shapes(other[1])
    assert module.layer_spec() == other[0].layer_spec()
    lengths = jnp.array([S, 3])
    want = jax.jit(apply)(params, X, encoded=ENCODED, encoded_lengths=lengths)
    cut = apply(params, X[1:], encoded=ENCODED[1:, :3])
    np.testing.assert_allclose(want[1:], cut, atol=3e-6)

    @jax.jit
    def write(params, cache, encoded):
        cache, step = cache.begin_cross(lengths)
        return cache.with_layers([apply(params, encoded, cache.layers[0], step, method="write")])

    @jax.jit
    def read(params, cache, x, positions):
        cache, step = cache.begin(positions)
        return cache, apply(params, x, cache.layers[0], step)

    cache = write(params, Cache.init([module.layer_spec()], B, T), ENCODED)
    for p in blocks(T, 3):
        cache, y = read(params, cache, X[:, np.maximum(p, 0)], jnp.tile(jnp.asarray(p, jnp.int32), (B, 1)))
        np.testing.assert_allclose(y[:, p >= 0], want[:, p[p >= 0]], atol=3e-6)


def test_a_linen_model_that_is_initialized_through_a_cache_has_all_parameters():
    module = jaxkv.linen.CrossAttention(in_features=D, **CROSS["grouped, norms"])
    cache, step = Cache.init([module.layer_spec()], B, T).begin(jnp.tile(jnp.arange(T), (B, 1)))
    params = jax.eval_shape(module.init, jax.random.key(0), X, cache.layers[0], step)["params"]
    assert shapes(params) == shapes(linen_cross(**CROSS["grouped, norms"])[1])


def test_one_span_over_all_is_the_attention_of_an_encoder(flavor):
    attn = flavor(num_heads=2)
    theirs = nn.MultiHeadDotProductAttention(num_heads=2)
    there = jnp.arange(T)[None] < jnp.array([T, 5])[:, None]
    want = theirs.apply({"params": attn.params}, X, mask=there[:, None, None])
    positions = jnp.where(there, jnp.arange(T)[None], EMPTY)
    y = attn.apply(attn.params, X, positions=positions, spans=jnp.ones((B, T), jnp.int32))
    np.testing.assert_allclose(y[0], want[0], atol=3e-6)
    np.testing.assert_allclose(y[1, :5], want[1, :5], atol=3e-6)


def test_cross_attention_refuses_what_does_not_belong_together(cross_flavor):
    module, params, apply = cross_flavor(**CROSS["default"])
    cache = Cache.init([module.layer_spec(), LayerSpec(Full(), 2, 6)], B, T)
    layer, other = cache.layers
    cross, step = cache.begin_cross(jnp.array([S, 3]))[1], cache.begin(jnp.tile(jnp.arange(T), (B, 1)))[1]
    write = functools.partial(apply, params, method="write")
    for call, message in [
        (lambda: apply(params, X), r"without one attn\(x, encoded=encoded\)"),
        (lambda: apply(params, X, layer), "step is a NoneType"),
        (lambda: apply(params, X, ENCODED), r"float32\(2, 7, 6\), an array; .* by name, attn\(x, encoded=encoded"),
        (lambda: apply(params, X, layer, step, encoded=ENCODED), r"layer = attn.write\(encoded, layer, step\)"),
        (lambda: apply(params, X, layer, cross), r"take the step of cache.begin\(positions\)"),
        (lambda: apply(params, X, other, step), r"made for reach=Full\(\), this module has reach=Cross\(size=7\)"),
        (lambda: apply(params, X[..., 1:], layer, step), "x has 11 features, .* in_features=12"),
        (lambda: apply(params, X, encoded=ENCODED[..., 1:]), "encoded has 5 features, .* encoded_features=6"),
        (lambda: apply(params, X, encoded=ENCODED[:1]), "encoded has 1 batch rows, x has 2"),
        (lambda: apply(params, X, encoded=ENCODED[0]), r"encoded is float32\(7, 6\)"),
        (lambda: apply(params, X, encoded=ENCODED, encoded_lengths=jnp.ones(B)), r"lengths must be int \[B\]"),
        (lambda: write(jnp.ones((B, S + 1, E)), layer, cross), "encoded has 8 places, .* size=7"),
        (lambda: write(ENCODED, layer, step), r"with the step of cache.begin_cross\(lengths\)"),
        (lambda: write(ENCODED, other, cross), r"made for reach=Full\(\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="attend over that with cross_attend"):
        jaxkv.self_attend(*[jnp.ones((1, 2, 1, 4))] * 3, reach=Cross(2))


# Models as functions


class Tied(nnx.Module):
    def __init__(self, layers, *, rngs, **arguments):
        self.embed = nnx.Embed(7, D, rngs=rngs)
        self.layers = nnx.List([jaxkv.nnx.Attention(in_features=D, rngs=rngs, **arguments) for _ in range(layers)])

    def __call__(self, tokens, positions, cache):
        cache, step = cache.begin(positions)
        x, layers = self.embed(tokens), []
        for attn, layer in zip(self.layers, cache.layers, strict=True):
            y, layer = attn(x, layer, step)
            x, layers = x + y, [*layers, layer]
        return self.embed.attend(x), cache.with_layers(layers)


class LinenTied(nn.Module):
    def setup(self):
        self.embed = nn.Embed(7, D)
        self.attn = jaxkv.linen.Attention(2, D, implementation="reference")

    def __call__(self, tokens, positions, cache):
        cache, step = cache.begin(positions)
        y, layer = self.attn(self.embed(tokens), cache.layers[0], step)
        return self.embed.attend(y), cache.with_layers([layer])


TIED = dict(num_heads=2, rotary=Rotary(), implementation="reference")
TOKENS = jnp.array([[1, 2, 3]])
POSITIONS = jnp.array([[0, 1, 2]])


def test_functional_of_nnx_is_equal_for_equal_structure_and_compiles_once():
    models = [Tied(2, rngs=nnx.Rngs(seed), **TIED) for seed in (0, 1)]
    (one, params), (other, others) = map(jaxkv.nnx.functional, models)
    assert one == other
    assert hash(one) == hash(other)
    assert one != jaxkv.nnx.functional(Tied(1, rngs=nnx.Rngs(0), **TIED))[0]
    assert one != jaxkv.nnx.functional(Tied(2, rngs=nnx.Rngs(0), **TIED | {"rotary": Rotary(5.0)}))[0]
    assert all(type(x) is dict for x in (params, params["layers"], params["layers"][0]))

    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def run(forward, params, tokens, positions, cache):
        traces.append(forward)
        return forward(params, tokens, positions, cache)

    cache = Cache.init([a.layer_spec() for a in models[0].layers], 1, T)
    first, _ = run(one, params, TOKENS, POSITIONS, cache)
    second, after = run(other, others, TOKENS, POSITIONS, cache)
    run(one, others, TOKENS, POSITIONS, after)
    assert len(traces) == 1
    call = nnx.jit(lambda model, cache: model(TOKENS, POSITIONS, cache)[0])
    np.testing.assert_allclose(first, call(models[0], cache), atol=3e-6)
    np.testing.assert_allclose(second, call(models[1], cache), atol=3e-6)

    nnx.update(models[0], others)  # trained params go back into the module
    np.testing.assert_allclose(call(models[0], cache), second, atol=3e-6)


def test_functional_of_linen_is_module_apply():
    forward = jaxkv.linen.functional(LinenTied())
    assert forward == jaxkv.linen.functional(LinenTied())
    assert hash(forward) == hash(jaxkv.linen.functional(LinenTied()))
    cache = Cache.init([LayerSpec(Full(), 2, D // 2)], 1, T)
    variables = noise(jax.eval_shape(LinenTied().init, jax.random.key(0), TOKENS, POSITIONS, cache))
    logits, after = jax.jit(forward)(variables["params"], TOKENS, POSITIONS, cache)
    want, _ = jax.jit(LinenTied().apply)(variables, TOKENS, POSITIONS, cache)
    np.testing.assert_allclose(logits, want, atol=3e-6)
    assert after.lengths.tolist() == [3]
    with pytest.raises(ValueError, match=r"variables\['params'\]"):
        forward(variables, TOKENS, POSITIONS, cache)


def test_functional_refuses_what_is_no_module_of_its_flavor():
    with pytest.raises(TypeError, match=r"flax\.nnx module, got a LinenTied"):
        jaxkv.nnx.functional(LinenTied())
    with pytest.raises(TypeError, match=r"flax\.linen module, got a function"):
        jaxkv.linen.functional(some)
    with pytest.raises(
        ValueError, match=r"a Linear can't be called with three arguments.*model\(tokens, positions, cache"
    ):
        jaxkv.nnx.functional(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


@dataclasses.dataclass
class Loose:
    sizes: object = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    sizes: object = None


class Configured(nn.Module):
    config: object
    inner: object = None


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Configured(Loose()), r"Configured\.config is a Loose.*@dataclasses\.dataclass\(frozen=True\)"),
        (Configured({"sizes": 3}), r"Configured\.config is a dict"),
        (Configured(Frozen([1, 2])), r"Configured\.config\.sizes is a list.*a list a tuple"),
        (Configured(Frozen(), (1, Configured([2]))), r"Configured\.inner\[1\]\.config is a list"),
        (Configured(Frozen(), FrozenDict(a=np.ones(2))), r"Configured\.inner\['a'\] is an ndarray"),
    ],
)
def test_functional_of_linen_names_the_field_that_can_not_be_hashed(module, message):
    with pytest.raises(ValueError, match=message):
        jaxkv.linen.functional(module)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda rngs: nnx.Dropout(0.1, rngs=rngs),
            r"layers\.1, a Dropout, is in training mode \(deterministic=False\)",
        ),
        (lambda rngs: nnx.BatchNorm(4, rngs=rngs), r"layers\.1, a BatchNorm, .*\(use_running_average=False\)"),
    ],
)
def test_functional_of_nnx_wants_a_model_in_evaluation_mode(make, message):
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), make(rngs))
    with pytest.raises(ValueError, match=message + r"; call model\.eval\(\)"):
        jaxkv.nnx.functional(model)
    model.eval()
    jaxkv.nnx.functional(model)


def test_functional_of_nnx_takes_a_model_in_training_mode_that_drops_nothing():
    rngs = nnx.Rngs(0)
    parts = [jaxkv.nnx.Attention(2, 4, rngs=rngs), nnx.MultiHeadAttention(2, 4, rngs=rngs), nnx.Dropout(0.0)]
    model = nnx.Sequential(*parts)
    model.train()
    jaxkv.nnx.functional(model)
    model.layers[2].rate = 0.1
    with pytest.raises(ValueError, match=r"layers\.2, a Dropout, is in training mode"):
        jaxkv.nnx.functional(model)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_heads=5), r"in_features=12 can't be shared by num_heads=5; give head_dim"),
        (dict(num_heads=2, qkv_features=7), r"qkv_features=7 can't be shared by num_heads=2"),
        (dict(num_heads=2, qkv_features=8, head_dim=6), r"qkv_features=8 is not num_heads \* head_dim = 2 \* 6"),
        (dict(num_heads=4, num_kv_heads=3), r"num_heads=4 is not a multiple of num_kv_heads=3"),
        (dict(num_heads=0), "num_heads=0"),
        (dict(num_heads=2, num_kv_heads=0), "num_kv_heads=0"),
        (dict(num_heads=2, head_dim=0), "head_dim=0"),
        (dict(num_heads=2, reach=3), r"reach=3\): give Full"),
        (dict(num_heads=2, softcap=0.0), "softcap=0.0"),
        (dict(num_heads=2, rotary=Rotary(dim=8)), "more dimensions than a head has, 6"),
        (dict(num_heads=4, rotary=Rotary()), "a head of 3 dimensions"),
        (dict(num_heads=2, rotary=lambda x, p: x), "functions compare by identity"),
        (dict(num_heads=2, use_bias=("query", "keys")), "query, key, value, out"),
    ],
)
def test_modules_that_can_not_be_made(flavor, arguments, message):
    with pytest.raises(ValueError, match=message):
        flavor(**arguments)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(reach=Window(4)), r"reach=Window\(size=4, sinks=0\), this module has reach=Window\(size=3, sinks=0\)"),
        (dict(num_kv_heads=4), "num_kv_heads=4, this module has num_kv_heads=2"),
        (dict(head_dim=8), "head_dim=8, this module has head_dim=6"),
        (dict(value_dim=5), "value_dim=5, this module has value_dim=6"),
        (dict(rotary=None), r"rotary=None, this module has rotary=Rotary\(theta=100.0"),
    ],
)
def test_a_layer_made_for_another_module_is_refused(flavor, wrong, message):
    attn = flavor(**CONFIGS["window, grouped, rotary"])
    facts = dict(reach=Window(3), num_kv_heads=2, head_dim=6, rotary=Rotary(100.0)) | wrong
    cache, step = Cache.init([LayerSpec(**facts)], B, T).begin(jnp.tile(jnp.arange(T), (B, 1)))
    with pytest.raises(ValueError, match=message):
        attn.apply(attn.params, X, cache.layers[0], step)


def test_calls_whose_arguments_do_not_belong_together(flavor):
    attn = flavor(num_heads=2)
    cache, step = Cache.init([attn.module.layer_spec()], B, T).begin(jnp.tile(jnp.arange(3), (B, 1)))
    layer, x = cache.layers[0], X[:, :3]
    for arguments, message in [
        ((x, layer), "layer is a Layer, step is a NoneType"),
        ((x, jnp.tile(jnp.arange(3), (B, 1))), r"by name, attn\(x, positions=positions"),
        ((x, x), r"second argument is float32\(2, 3, 12\).*other inputs than x are for CrossAttention"),
        ((x, x, None), r"No mask is passed: the reach says who sees whom.*positions=positions, spans=spans"),
        ((x, jnp.ones((1, 1, 3, 3), bool)), r"second argument is bool\(1, 1, 3, 3\), an array"),
        ((X, layer, step), r"x has \[B, T\] = \(2, 8\), the step was begun for \(2, 3\)"),
        ((x[0],), r"float32\(3, 12\)|float32\[3,12\]|give floating numbers \[B, T, D\]"),
        ((x.astype(jnp.int32),), "int32"),
        ((x[..., :5],), "x has 5 features, this module was made for in_features=12"),
    ]:
        with pytest.raises(ValueError, match=message):
            attn.apply(attn.params, *arguments)
    with pytest.raises(ValueError, match="takes neither"):
        attn.apply(attn.params, x, layer, step, positions=step.positions)


def test_hidden_caches_say_what_is_missing():
    attn = jaxkv.nnx.Attention(2, D, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"call init_cache\(num_rows, capacity\)"):
        attn.decode(X)
    for shape in [((3, T, D),), ((3, T, D), jnp.float32), ([3, T], T)]:  # as Flax's is called
        with pytest.raises(ValueError, match=r"unlike Flax's it takes no shape.*init_cache\(num_rows, capacity\)"):
            attn.init_cache(*shape)
    attn.init_cache(3, T)
    with pytest.raises(ValueError, match="own cache has 3 rows"):
        attn.decode(X)
    linen = jaxkv.linen.Attention(2)
    variables = linen.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="give cache_capacity"):
        linen.apply(variables, X, decode=True, mutable=["cache"])
    with pytest.raises(ValueError, match="give head_dim"):
        linen.layer_spec()
    cache, step = Cache.init([LayerSpec(Full(), 2, D // 2)], B, T).begin(jnp.tile(jnp.arange(T), (B, 1)))
    with pytest.raises(ValueError, match="give only one of them"):
        linen.apply(variables, X, cache.layers[0], step, decode=True)


def test_flax_version_is_one_of_the_two_that_are_supported():
    assert tuple(map(int, flax.__version__.split(".")[:3])) >= (0, 12, 8)
