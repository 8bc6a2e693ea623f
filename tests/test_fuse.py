"""Weights laid out for decoding give the same numbers, and leave the original alone."""

from __future__ import annotations

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
