"""The gated delta rule: a state of keys by values, which fades, and in which each token corrects what its key finds.

    S_t = exp(g_t) S_(t-1) + k_t (beta_t (v_t - exp(g_t) S_(t-1)^T k_t))^T,    o_t = S_t^T q_t

Yang, Kautz & Hatamizadeh 2024, https://arxiv.org/abs/2412.06464. As in Qwen3-Next, queries and keys are normalized to
length 1, and queries divided by the root of their size.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv.cache.arguments import checked_size
from jaxkv.cache.spec import Recurrent
from jaxkv.nn.fading import fading_memory
from jaxkv.nn.heads import rms_norm
from jaxkv.nn.recurrence import RecurrentModule, causal_conv, recur

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
            y, states = fading_memory(q * jnp.float32(self.key_dim**-0.5), k, v, g, beta, state, counts)
            return y, tails, states

        y, layer = recur(rule, reach, (mixed, beta, decay), weights, layer, step, positions)
        y = rms_norm(y, scale, self.norm_epsilon) * jax.nn.silu(z.astype(jnp.float32))
        return y.astype(z.dtype), layer

    def _unit(self, x: Any) -> Any:
        """Returns queries or keys of length 1, each as often as value heads share it."""
        x = x * lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + jnp.float32(_NORM_EPSILON))
        return jnp.repeat(x, self.num_value_heads // self.num_key_heads, axis=2)
