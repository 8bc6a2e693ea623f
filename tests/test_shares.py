"""Layers that read the keys and values of another one: said in the specs, kept once, never one step late."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxkv
from jaxkv import Cache, Chunk, Cross, Full, LayerSpec, Pages, Window
from jaxkv.models import Decoder, DecoderConfig

OWN = LayerSpec(Full(), num_kv_heads=2, head_dim=4)
SHARING = dataclasses.replace(OWN, shares=0)


# ---------------------------------------------------------------- specs and caches


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([OWN, dataclasses.replace(OWN, shares=1)], "layer 1 shares layer 1, itself"),
        ([dataclasses.replace(OWN, shares=1), OWN], "layer 0 shares layer 1, a later layer"),
        ([OWN, dataclasses.replace(OWN, shares=2)], "layer 1 shares layer 2, a later layer"),
        ([OWN, SHARING, dataclasses.replace(OWN, shares=1)], "layer 2 shares layer 1, which shares layer 0; give sh"),
        ([OWN, dataclasses.replace(SHARING, head_dim=8)], "layer 1 shares layer 0, but has head_dim=8, and that layer"),
        ([OWN, dataclasses.replace(SHARING, num_kv_heads=1)], "but has num_kv_heads=1, and that layer 2"),
        ([OWN, dataclasses.replace(SHARING, reach=Window(4))], r"but has reach=Window\(size=4, sinks=0\)"),
        ([LayerSpec(Cross(4), 2, 4), SHARING], "layer 1 shares layer 0, but has reach=Full"),
    ],
)
def test_what_can_not_be_shared_is_an_error_when_the_cache_is_made(specs, message):
    with pytest.raises(ValueError, match=message):
        Cache.init(specs, num_rows=1, capacity=8)


def test_specs_and_stacks_that_can_not_share_are_errors():
    with pytest.raises(ValueError, match=r"LayerSpec\(shares=-1\): shares is a whole number of at least 0"):
        dataclasses.replace(OWN, shares=-1)
    with pytest.raises(ValueError, match="an encoder's output is put into each Cross layer"):
        LayerSpec(Cross(4), 2, 4, shares=0)
    with pytest.raises(ValueError, match=r"stacked=True .* read stack\.at\(i\) of the layer that they share"):
        Cache.init([OWN, SHARING], num_rows=1, capacity=8, stacked=True)


@pytest.mark.parametrize("layout", [jaxkv.Rows(), Pages(8, 4)])
def test_what_is_shared_is_kept_and_counted_once(layout):
    sizes = {"num_rows": 2, "capacity": 16, "layout": layout}
    cache, alone = Cache.init([OWN, OWN, SHARING, SHARING], **sizes), Cache.init([OWN, OWN], **sizes)
    assert cache.nbytes == alone.nbytes
    plan = jaxkv.plan_memory(cache.specs, **sizes)
    assert plan.groups[0][1] == 2
    assert plan == dataclasses.replace(jaxkv.plan_memory([OWN] * 2, **sizes), groups=plan.groups)
    assert "2 layers Full(): 2 x 4 k Dense('float32') v Dense('float32'), read by 2 more, " in cache.describe()
    assert str(jaxkv.show(cache)).startswith("2 layers Full()")
    assert cache.layers[2].k is None


def test_an_empty_place_is_not_read_or_put_into_and_with_layers_passes_it_over():
    cache = Cache.init([OWN, SHARING], num_rows=1, capacity=8)
    cache, step = cache.begin(jnp.array([[0]]))
    x = jnp.ones((1, 1, 2, 4))
    for use in (lambda y: y.put(step, x, x), lambda y: y.get(step), lambda y: jaxkv.attend(x, y, step)):
        with pytest.raises(ValueError, match=r"keeps nothing: it shares layer 0\. .*attend\(q, layers\[0\], step\)"):
            use(cache.layers[1])
    put = cache.layers[0].put(step, x, x)
    for given in (cache.layers[1], put, None):
        after = cache.with_layers([put, given])
        assert after.layers[1].k is None
        assert after.layers[0].k is put.k
    with pytest.raises(ValueError, match="layer 0 is of type NoneType"):
        cache.with_layers([None, put])


# ---------------------------------------------------------------- modules

D, T = 8, 6
KIND = {"num_heads": 4, "in_features": D, "num_kv_heads": 2, "head_dim": 4, "qk_norm": True}


def flavors():
    """Returns by flavor: (params, call(params, *args, **options), spec) of a layer and of one that shares it."""
    rotary = {"rotary": jaxkv.Rotary(), "reach": Chunk(4)}
    x = jnp.ones((1, T, D))
    out = {"nnx": [], "linen": []}
    for shares in (None, 0):
        module = jaxkv.nnx.Attention(**KIND, **rotary, shares=shares, rngs=nnx.Rngs(1))
        graphdef, state = nnx.split(module)
        out["nnx"].append((state, lambda p, *a, g=graphdef, **k: nnx.merge(g, p)(*a, **k), module.layer_spec()))
        module = jaxkv.linen.Attention(**KIND, **rotary, shares=shares)
        kv = None if shares is None else (jnp.ones((1, T, 2, 4)),) * 2
        params = module.init(jax.random.key(0), x, kv=kv)
        out["linen"].append((params, module.apply, module.layer_spec()))
    return out


@pytest.mark.parametrize("flavor", ["nnx", "linen"])
def test_a_module_that_shares_has_no_keys_and_decodes_as_it_trains(flavor):
    (own_params, own, own_spec), (params, sharing, spec) = flavors()[flavor]
    names = {getattr(key, "key", "") for path, _ in jax.tree_util.tree_flatten_with_path(params)[0] for key in path}
    assert names & {"query", "key", "value", "out", "query_norm", "key_norm"} == {"query", "out", "query_norm"}
    assert spec == dataclasses.replace(own_spec, shares=0)
    x = jax.random.normal(jax.random.key(2), (2, T, D))

    @jax.jit
    def train(all_params, x):
        y, kv = own(all_params[0], x, return_kv=True)
        return sharing(all_params[1], x + y, kv=kv)

    @jax.jit
    def decode(all_params, x, cache):
        cache, step = cache.begin(cache.lengths[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)[None])
        layers = list(cache.layers)
        y, layers[0] = own(all_params[0], x, layers[0], step)
        y, layers[0] = sharing(all_params[1], x + y, layers[0], step)
        return y, cache.with_layers(layers)

    all_params = own_params, params
    want = train(all_params, x)
    cache, got = Cache.init([own_spec, spec], num_rows=2, capacity=8), []
    for t in range(T):
        y, cache = decode(all_params, x[:, t : t + 1], cache)
        got.append(y)
    np.testing.assert_allclose(jnp.concatenate(got, 1), want, atol=2e-6)
    # What the sharing layer's loss teaches, it teaches the keys of the layer that it shares.
    gradient = jax.grad(lambda p: (train(p, x) ** 2).sum())(all_params)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient) if leaf.size > 4)


def test_a_module_that_shares_says_what_it_is_to_be_given():
    x = jnp.ones((1, T, D))
    own = jaxkv.nnx.Attention(**KIND, rngs=nnx.Rngs(0))
    module = jaxkv.nnx.Attention(**KIND, shares=0, rngs=nnx.Rngs(0))
    kv = (jnp.ones((1, T, 2, 4)),) * 2
    with pytest.raises(ValueError, match=r"shares layer 0, .* got a NoneType\. Without a cache call .* return_kv=True"):
        module(x)
    with pytest.raises(ValueError, match=r"= \(1, 6, 2, 4\), got \[\(1, 3, 2, 4\), \(1, 3, 2, 4\)\]"):
        module(x, kv=tuple(part[:, :3] for part in kv))
    with pytest.raises(ValueError, match="this module has keys and values of its own; make it with shares=i"):
        own(x, kv=kv)
    with pytest.raises(ValueError, match="shares layer 0, so it has no cache of its own"):
        module.init_cache(1, 8)
    cache, step = Cache.init([own.layer_spec(), module.layer_spec()], 1, 8).begin(jnp.arange(T)[None])
    with pytest.raises(ValueError, match="kv and return_kv are for calls without a cache"):
        module(x, cache.layers[0], step, kv=kv)
    with pytest.raises(ValueError, match="keeps nothing: it shares layer 0"):
        module(x, cache.layers[1], step)
    y, layer = own(x, cache.layers[0], step)
    fused = jaxkv.nnx.fuse(module)
    np.testing.assert_allclose(fused(x + y, layer, step)[0], module(x + y, layer, step)[0], atol=1e-5)


def test_keys_that_are_values_are_kept_once():
    options = {"tied_values": True, "rotary": jaxkv.Rotary(), "num_heads": 4, "in_features": D, "num_kv_heads": 2}
    attn = jaxkv.nnx.Attention(**options, rngs=nnx.Rngs(0))
    assert attn.value is None
    spec = attn.layer_spec()
    once = dataclasses.replace(spec, v_in_k=True, rotary_at="read")
    x = jax.random.normal(jax.random.key(3), (2, T, D))
    want = nnx.jit(lambda attn, x: attn(x))(attn, x)

    @nnx.jit
    def run(attn, x, cache):
        cache, step = cache.begin(jnp.tile(jnp.arange(T), (2, 1)))
        return attn(x, cache.layers[0], step)[0]

    two, one = (Cache.init([kind], num_rows=2, capacity=8) for kind in (spec, once))
    np.testing.assert_allclose(run(attn, x, one), want, atol=2e-6)
    np.testing.assert_allclose(run(attn, x, two), want, atol=2e-6)
    assert sum(y.nbytes for y in jax.tree.leaves(one.layers)) * 2 == sum(y.nbytes for y in jax.tree.leaves(two.layers))
    normed = jaxkv.nnx.Attention(**options, qk_norm=True, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="this module's values are not its keys: that takes tied_values=True"):
        run(normed, x, one)


# ---------------------------------------------------------------- a model


def test_a_decoder_that_shares_decodes_trees_and_tokens_as_it_trains():
    config = DecoderConfig(
        vocab_size=32, width=16, num_layers=4, num_heads=2, reaches=(Window(3), Full()), shares=(None, None, 0, 1)
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    assert [spec.shares for spec in model.specs()] == [None, None, 0, 1]
    forward, params = jaxkv.nnx.functional(model)
    tokens = jax.random.randint(jax.random.key(1), (2, 7), 0, 32)
    want = nnx.jit(lambda model, tokens: model(tokens))(model, tokens)
    run = jax.jit(forward)
    cache = Cache.init(model.specs(), num_rows=2, capacity=16)
    positions = jnp.tile(jnp.arange(7), (2, 1))
    first, cache = run(params, tokens[:, :4], positions[:, :4], cache)
    np.testing.assert_allclose(first, want[:, :4], atol=1e-5)
    # The fifth token comes twice, as two branches of a tree: the second one stands where the first does.
    tree = jnp.concatenate([tokens[:, 5:6], tokens[:, 4:7]], 1)
    parents = jnp.tile(jnp.array([-1, -1, 1, 2]), (2, 1))
    got, _ = run(params, tree, positions[:, :4] + 4, cache, parents=parents)
    np.testing.assert_allclose(got[:, 1:], want[:, 4:], atol=1e-5)


def test_a_decoder_config_names_what_can_not_be_shared():
    sizes = {"vocab_size": 32, "width": 16, "num_layers": 2, "num_heads": 2}
    with pytest.raises(ValueError, match=r"shares=\(None,\): give an entry for each of 2 layers"):
        DecoderConfig(**sizes, shares=(None,))
    with pytest.raises(ValueError, match="layer 1 shares layer 1; give the number of an earlier layer"):
        DecoderConfig(**sizes, shares=(None, 1))
