"""The gated delta rule: a state of keys by values, which fades, and in which each token corrects what its key finds.

    S_t = exp(g_t) S_(t-1) + k_t (beta_t (v_t - exp(g_t) S_(t-1)^T k_t))^T,    o_t = S_t^T q_t

Yang, Kautz & Hatamizadeh 2024, https://arxiv.org/abs/2412.06464; in chunks by the WY form of Yang et al. 2024,
https://arxiv.org/abs/2406.06484. As in Qwen3-Next, queries and keys are normalized to length 1, and queries divided by
the root of their size.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv.cache.arguments import checked_size
from jaxkv.cache.spec import Recurrent
from jaxkv.nn.heads import rms_norm
from jaxkv.nn.recurrence import RecurrentModule, causal_conv, recur

CHUNK = 64  # tokens whose corrections are solved for at once
_NORM_EPSILON = 1e-6  # of the length of queries and keys

# Into the docstrings of the classes.
ARGUMENTS = """in_features: size D of input and output.
      num_key_heads: heads of queries and keys.
      num_value_heads: heads of values, a multiple of num_key_heads; consecutive ones share a key.
      key_dim, value_dim: sizes of a head of keys, and of values.
      kernel_size: how many tokens the convolution of queries, keys and values sees, at least 2.
      norm_epsilon: added to the mean square of what a head reads, which is normalized.
      dtype: of the projections and the convolution; None infers it from input and parameters. States are float32.
      param_dtype: of the parameters.
      precision: of the projections, see `jax.lax.Precision`.
      kernel_init: initializer of the kernels, called as Flax calls it."""


class GatedDeltaModule(RecurrentModule):
    """A module with the sizes of a gated delta layer."""

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    kernel_size: int
    norm_epsilon: float

    def _reach(self, every: int | None, keep: int) -> Recurrent:
        names = ("num_key_heads", "num_value_heads", "key_dim", "value_dim")
        sizes = [checked_size(type(self).__name__, name, getattr(self, name), 1) for name in names]
        width = checked_size(type(self).__name__, "kernel_size", self.kernel_size, 2) - 1
        key_heads, value_heads, key_dim, value_dim = sizes
        if value_heads % key_heads:
            raise ValueError(f"num_value_heads={value_heads} is not a multiple of num_key_heads={key_heads}")
        channels = 2 * key_heads * key_dim + value_heads * value_dim
        return Recurrent(state=(value_heads, key_dim, value_dim), tail=(channels, width), every=every, keep=keep)

    @property
    def _projected(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The features of the two projections: of each key head its query, key, values and gates; betas and decays."""
        each = self.num_value_heads // self.num_key_heads
        return (self.num_key_heads, 2 * self.key_dim + 2 * each * self.value_dim), (self.num_key_heads, 2 * each)

    def _mix(
        self, qkvz: Any, ba: Any, weights: Any, scale: Any, layer: Any, step: Any, positions: Any
    ) -> tuple[Any, Any]:
        """Returns what goes into the last projection, [B, T, Hv, dv], and the layer.

        Args:
          qkvz, ba: [B, T, Hk, ...], as projected.
          weights: kernel [W, 1, C], decay [Hv] (log A) and its bias [Hv].
          scale: of the norm of what is read, [dv].
          layer, step, positions: as of the call.
        """
        lead, sizes = qkvz.shape[:2], [self.key_dim, 2 * self.key_dim]
        q, k, vz = jnp.split(qkvz, sizes, -1)
        v, z = (x.reshape(*lead, self.num_value_heads, self.value_dim) for x in jnp.split(vz, 2, -1))
        beta, decay = (x.reshape(*lead, self.num_value_heads) for x in jnp.split(ba, 2, -1))
        mixed = jnp.concatenate([x.reshape(*lead, -1) for x in (q, k, v)], -1)
        reach = self._reach(None, 0)

        def rule(inputs: Any, weights: Any, tail: Any, state: Any, real: Any, counts: Any) -> Any:
            mixed, beta, decay = inputs
            kernel, a_log, dt_bias = weights
            mixed, tails = causal_conv(mixed, tail, kernel, None, counts)
            mixed = jnp.where(real[:, :, None], jax.nn.silu(mixed), 0).astype(jnp.float32)
            keys = self.num_key_heads * self.key_dim
            q, k, v = jnp.split(mixed, [keys, 2 * keys], -1)
            q, k = (self._unit(x.reshape(*x.shape[:2], self.num_key_heads, self.key_dim)) for x in (q, k))
            v = v.reshape(*v.shape[:2], self.num_value_heads, self.value_dim)
            a, bias = (x.astype(jnp.float32)[None, None] for x in (a_log, dt_bias))
            g = -jnp.exp(a) * jax.nn.softplus(decay.astype(jnp.float32) + bias)
            g = jnp.where(real[:, :, None], g, 0)
            beta = jnp.where(real[:, :, None], jax.nn.sigmoid(beta).astype(jnp.float32), 0)
            y, states = gated_delta(q * jnp.float32(self.key_dim**-0.5), k, v, g, beta, state, counts)
            return y, tails, states

        y, layer = recur(rule, reach, (mixed, beta, decay), weights, layer, step, positions)
        y = rms_norm(y, scale, self.norm_epsilon) * jax.nn.silu(z.astype(jnp.float32))
        return y.astype(z.dtype), layer

    def _unit(self, x: Any) -> Any:
        """Returns queries or keys of length 1, each as often as value heads share it."""
        x = x * lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + jnp.float32(_NORM_EPSILON))
        return jnp.repeat(x, self.num_value_heads // self.num_key_heads, axis=2)


def gated_delta(q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any, counts: Any = None) -> tuple[Any, Any]:
    """Returns what the tokens read, [B, T, H, V], and the states after `counts` of them, [B, M, H, K, V].

    In chunks of 64 tokens, one after the other, within which all are computed at once; a single token in one step.

    Args:
      q, k: [B, T, H, K], float32.
      v: [B, T, H, V], float32.
      g: [B, T, H], the logarithm of how much of the state stays, 0 for a token that is none.
      beta: [B, T, H], how much of the correction is made, 0 for a token that is none.
      state: [B, H, K, V] before.
      counts: int32 [B, M], where M = 1 all tokens but those that are none; None for no states.
    """
    length = q.shape[1]
    if length == 1:
        q, k, v, g, beta = (x[:, 0] for x in (q, k, v, g, beta))
        state = state * jnp.exp(g)[:, :, None, None]
        change = (v - jnp.einsum("bhkv,bhk->bhv", state, k)) * beta[:, :, None]
        state = state + k[:, :, :, None] * change[:, :, None]
        return jnp.einsum("bhkv,bhk->bhv", state, q)[:, None], None if counts is None else state[:, None]

    chunk = min(CHUNK, length)
    pad = -length % chunk

    def chunks(x: Any) -> Any:  # [N, B, H, Q, ...]
        x = jnp.pad(x, ((0, 0), (0, pad), *((0, 0),) * (x.ndim - 2)))
        x = x.reshape(x.shape[0], -1, chunk, *x.shape[2:])
        return jnp.moveaxis(jnp.moveaxis(x, 3, 2), 1, 0)

    q, k, v, g, beta = map(chunks, (q, k, v, g, beta))
    g = jnp.cumsum(g, -1)
    below = jnp.tri(chunk, dtype=bool)
    fade = jnp.exp(jnp.where(below, g[..., :, None] - g[..., None, :], -jnp.inf))  # from one token to a later one
    corrections = jnp.einsum("nbhqk,nbhsk->nbhqs", k * beta[..., None], k) * fade
    corrections = jnp.where(below & ~jnp.eye(chunk, dtype=bool), corrections, 0)
    wanted = jnp.concatenate([v * beta[..., None], k * (beta * jnp.exp(g))[..., None]], -1)
    solved = lax.linalg.triangular_solve(corrections, wanted, left_side=True, lower=True, unit_diagonal=True)
    values, erased = jnp.split(solved, [v.shape[-1]], -1)
    seen = jnp.einsum("nbhqk,nbhsk->nbhqs", q, k) * fade

    def one(state: Any, x: Any) -> Any:
        q, k, g, values, erased, seen = x
        new = values - erased @ state  # what each token adds, once those before it in the chunk have
        y = (q * jnp.exp(g)[..., None]) @ state + seen @ new
        kept = k * jnp.exp(g[..., -1:] - g)[..., None]
        after = state * jnp.exp(g[..., -1])[..., None, None] + jnp.einsum("bhqk,bhqv->bhkv", kept, new)
        return after, (y, state, new)

    last, (y, before, new) = lax.scan(one, state, (q, k, g, values, erased, seen))
    y = jnp.moveaxis(jnp.moveaxis(y, 0, 1), 2, 3).reshape(y.shape[1], -1, *y.shape[2::2])[:, :length]
    if counts is None or counts.shape[1] == 1:
        return y, None if counts is None else last[:, None]

    def after_some(count: Any, k: Any, g: Any, before: Any, new: Any) -> Any:
        number = jnp.minimum(count // chunk, k.shape[0] - 1)
        k, g, before, new = (x[number] for x in (k, g, before, new))  # of one row: [H, Q, ...]
        inside = jnp.arange(chunk, dtype=jnp.int32) < count - number * chunk
        faded = jnp.where(inside, g, 0).min(-1)  # g falls
        kept = k * jnp.where(inside, jnp.exp(jnp.where(inside, faded[:, None] - g, 0)), 0)[..., None]
        return before * jnp.exp(faded)[:, None, None] + jnp.einsum("hqk,hqv->hkv", kept, new)

    some = jax.vmap(after_some, (0, None, None, None, None))  # over counts
    return y, jax.vmap(some, (0, 1, 1, 1, 1))(counts, k, g, before, new)
