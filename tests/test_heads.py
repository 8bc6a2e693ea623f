"""What attention does to queries and keys before they meet: the ways to normalize them, and growth with position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxkv
from jaxkv.nn.heads import qk_normed, qk_scale

B, T, N, K, H, D = 2, 6, 4, 2, 6, 12
EPS = 1e-3


def some(*shape, seed=0):
    return np.random.default_rng(seed).normal(1, 1, size=shape).astype(np.float32)


def by_hand(kind, x, scale):
    y = x.astype(np.float64)
    if kind == "centered":
        y = y - y.mean(-1, keepdims=True)
    axes = (-2, -1) if kind == "together" else (-1,)
    return y / np.sqrt((y * y).mean(axes, keepdims=True) + EPS) * (1 if scale is None else scale)


@pytest.mark.parametrize("kind", [True, "together", "centered", "plain"])
def test_queries_and_keys_are_normalized_as_asked_for(kind):
    for heads in (N, K):
        shape = qk_scale(kind, heads, H)
        assert shape == {True: (H,), "plain": None}.get(kind, (heads, H))
        x, scale = some(B, T, heads, H), None if shape is None else some(*shape, seed=1)
        got = qk_normed(kind, jnp.asarray(x), None if scale is None else jnp.asarray(scale), EPS)
        np.testing.assert_allclose(got, by_hand(kind, x, scale), rtol=1e-5, atol=1e-5)


KINDS = {
    "together": {"qk_norm": "together", "rotary": jaxkv.Rotary()},
    "centered": {"qk_norm": "centered"},
    "plain": {"qk_norm": "plain", "temperature": jaxkv.QueryTemperature(2, 0.7)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_both_flavors_give_the_same_with_a_cache_and_without(kind):
    options = {"num_kv_heads": K, "head_dim": H, "qk_norm_epsilon": EPS, **KINDS[kind]}
    module = jaxkv.nnx.Attention(N, D, **options, rngs=nnx.Rngs(0))
    params = jax.tree.map(lambda x: jnp.asarray(some(*x.shape)) * 0.5, nnx.to_pure_dict(nnx.state(module)))
    nnx.update(module, params)
    other = jaxkv.linen.Attention(N, **options)
    x = jnp.asarray(some(B, T, D, seed=2))
    want = nnx.jit(lambda module, x: module(x))(module, x)
    np.testing.assert_allclose(jax.jit(other.apply)({"params": params}, x), want, rtol=1e-5, atol=1e-5)

    @nnx.jit
    def cached(module, x):
        cache = jaxkv.Cache.init([module.layer_spec()], B, capacity=8)
        parts = []
        for part, begin in ((x[:, :4], 0), (x[:, 4:], 4)):
            cache, step = cache.begin(jnp.broadcast_to(begin + jnp.arange(part.shape[1]), (B, part.shape[1])))
            y, layer = module(part, cache.layers[0], step)
            cache = cache.with_layers([layer])
            parts.append(y)
        return jnp.concatenate(parts, axis=1)

    np.testing.assert_allclose(cached(module, x), want, rtol=1e-4, atol=1e-5)


def test_a_temperature_makes_attention_sharper_with_position():
    attn = jaxkv.nnx.Attention(1, 2, temperature=jaxkv.QueryTemperature(3, 1.0), rngs=nnx.Rngs(0))
    plain = jaxkv.nnx.Attention(1, 2, rngs=nnx.Rngs(0))
    # As if each query were multiplied before it is projected, for there is no bias at first.
    factors = 1 + np.log1p(np.floor((np.arange(6) + 1) / 3))
    q = np.asarray(plain.query(jnp.asarray(some(1, 6, 2)))) * factors[None, :, None, None]
    x = jnp.asarray(some(1, 6, 2))
    k, v = np.asarray(plain.key(x))[0, :, 0], np.asarray(plain.value(x))[0, :, 0]
    scores = np.where(np.tri(6, dtype=bool), q[0, :, 0] @ k.T / np.sqrt(2), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    want = plain.out(jnp.asarray((weights / weights.sum(-1, keepdims=True) @ v)[None, :, None, :], jnp.float32))
    np.testing.assert_allclose(attn(x), want, rtol=1e-4, atol=1e-5)


def test_what_is_not_known_is_refused():
    with pytest.raises(ValueError, match="qk_norm='both': known are False, True, 'together', 'centered', 'plain'"):
        jaxkv.nnx.Attention(2, 4, qk_norm="both", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="length is at least 1"):
        jaxkv.QueryTemperature(0, 0.1)
