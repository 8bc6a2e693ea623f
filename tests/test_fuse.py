"""Weights laid out for decoding give the same numbers, and leave the original alone."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxkv
from jaxkv.models import Decoder, DecoderConfig

X = jax.random.normal(jax.random.key(0), (2, 5, 12))
ATTENTIONS = {
    "biases": {},
    "no biases": {"use_bias": False},
    "some biases, grouped": {"use_bias": ("key", "out"), "num_kv_heads": 2, "rotary": jaxkv.Rotary(), "head_dim": 6},
    "qk_norm, bfloat16": {"qk_norm": True, "dtype": jnp.bfloat16},
}
SIZES = {"vocab_size": 11, "width": 8, "num_layers": 2, "num_heads": 4, "mlp_dim": 12, "num_kv_heads": 2}
DECODERS = {
    "gated, tied": DecoderConfig(**SIZES, rotary=jaxkv.Rotary()),
    "plain, learned positions, biases": DecoderConfig(
        **SIZES, gated=False, norm="layer", max_positions=16, use_bias=True, tied=False
    ),
}


def scrambled(model):
    """The model with no parameter left at its initial 0 or 1."""
    state = nnx.state(model, nnx.Param)
    leaves, kind = jax.tree.flatten(state)
    random = np.random.default_rng(0)
    leaves = [jnp.asarray(random.normal(size=x.shape), x.dtype) for x in leaves]
    nnx.update(model, jax.tree.unflatten(kind, leaves))
    return model


@pytest.mark.parametrize("name", ATTENTIONS)
def test_fused_attention_gives_the_same_numbers(name):
    attn = scrambled(jaxkv.nnx.Attention(4, 12, **ATTENTIONS[name], rngs=nnx.Rngs(0)))
    fused = jaxkv.nnx.fuse(attn)
    want, got = attn(X), fused(X)
    assert got.dtype == want.dtype
    tolerance = 2e-2 if want.dtype == jnp.bfloat16 else 1e-5
    scale = float(jnp.abs(want.astype(jnp.float32)).max())
    np.testing.assert_allclose(
        got.astype(jnp.float32), want.astype(jnp.float32), rtol=tolerance, atol=tolerance * scale
    )
    assert "query" in nnx.state(attn)  # the original keeps Flax's parameters
    assert set(nnx.state(fused)) >= {"qkv", "out"}
    assert not {"query", "key", "value"} & set(nnx.state(fused))


@pytest.mark.parametrize("name", DECODERS)
def test_a_fused_decoder_decodes_the_same(name):
    model = scrambled(Decoder(DECODERS[name], rngs=nnx.Rngs(0)))
    fused = jaxkv.nnx.fuse(jaxkv.nnx.fuse(model))  # a second time changes nothing
    tokens = jnp.array([[1, 2, 3, 4, 5]])
    want = nnx.jit(model)(tokens)
    forward, params = jaxkv.nnx.functional(fused)
    cache = jaxkv.Cache.init(fused.specs(), num_rows=1, capacity=8)
    got, cache = jax.jit(forward)(params, tokens, jnp.arange(5)[None], cache)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * float(jnp.abs(want).max()))
    count = sum(x.size for x in jax.tree.leaves(nnx.state(model)))
    assert sum(x.size for x in jax.tree.leaves(params)) == count


ROTATED = {
    "values, for keys have a rotary": (("v",), {"num_kv_heads": 2, "rotary": jaxkv.Rotary(), "use_bias": True}),
    "both, biases": (("k", "v"), {"num_kv_heads": 2}),
    "both, norms that learned nothing": (("k", "v"), {"qk_norm": "plain", "value_norm": True, "use_bias": False}),
    "values, for norms of keys learned": (("v",), {"qk_norm": True, "use_bias": ("value",)}),
    "keys, for the output is gated": (("k",), {"gated": True}),
    "neither, for values are keys": ((), {"tied_values": True}),
}


@pytest.mark.parametrize("name", ROTATED)
def test_a_rotation_in_the_projections_changes_nothing_but_where_it_is_computed(name):
    rotated, options = ROTATED[name]
    attn = scrambled(jaxkv.nnx.Attention(4, 12, head_dim=8, **options, rngs=nnx.Rngs(0)))
    fused = jaxkv.nnx.fuse(attn, rotate=True)
    spec = fused.layer_spec(k_storage=jaxkv.Int8(), v_storage=jaxkv.Int8())
    assert spec.rotated == rotated
    assert [spec.k_storage.rotate, spec.v_storage.rotate] == ["k" not in rotated, "v" not in rotated]
    want = attn(X)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4 * float(jnp.abs(want).max()))
    close(fused(X), want)
    outs = []
    for module in (attn, fused):  # what is stored is in the Hadamard basis in both, and rounded alike
        spec = module.layer_spec(k_storage=jaxkv.Int8(), v_storage=jaxkv.Int8())
        cache, step = jaxkv.Cache.init([spec], num_rows=2, capacity=8).begin(jnp.arange(5)[None].repeat(2, 0))
        y, layer = module(X, cache.layers[0], step)
        outs.append((y, layer.v["codes"]))
    (y, codes), (z, same) = outs
    assert int(jnp.abs(codes.astype(int) - same.astype(int)).max()) <= 1  # on an edge either way
    np.testing.assert_allclose(y, z, rtol=1e-2, atol=2e-2 * float(jnp.abs(want).max()))


def test_layers_of_a_rotated_module_are_made_from_its_own_spec():
    attn = jaxkv.nnx.Attention(4, 12, rngs=nnx.Rngs(0))
    cache, step = jaxkv.Cache.init([attn.layer_spec()], num_rows=2, capacity=8).begin(jnp.arange(5)[None].repeat(2, 0))
    with pytest.raises(ValueError, match=r"this module has rotated=.'k', 'v'."):
        jaxkv.nnx.fuse(attn, rotate=True)(X, cache.layers[0], step)
    with pytest.raises(ValueError, match="a rotary turns pairs of numbers"):
        jaxkv.LayerSpec(jaxkv.Full(), 1, 8, rotary=jaxkv.Rotary(), rotated=("k",))
    cross = scrambled(jaxkv.nnx.CrossAttention(4, 12, size=5, num_kv_heads=2, head_dim=8, rngs=nnx.Rngs(0)))
    fused, want = jaxkv.nnx.fuse(cross, rotate=True), cross(X, encoded=X)
    assert fused.layer_spec().rotated == ("k", "v")
    np.testing.assert_allclose(fused(X, encoded=X), want, rtol=1e-4, atol=1e-4 * float(jnp.abs(want).max()))
    sharing = nnx.List([attn, jaxkv.nnx.Attention(4, 12, shares=0, rngs=nnx.Rngs(0))])
    assert jaxkv.nnx.fuse(sharing, rotate=True)[0].layer_spec().rotated == ()  # who shares it would have to know
