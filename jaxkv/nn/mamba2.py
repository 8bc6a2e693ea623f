"""Mamba-2: a state of keys by values, in which every token writes and which it makes fade.

    S_t = exp(-A dt_t) S_(t-1) + dt_t b_t x_t^T,    y_t = S_t^T c_t + d x_t

Dao & Gu 2024, https://arxiv.org/abs/2405.21060. What is read is multiplied by a gate, then normalized, as in Granite 4
and Bamba.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxkv.cache.arguments import checked_size
from jaxkv.cache.spec import Recurrent
from jaxkv.nn.fading import fading_memory
from jaxkv.nn.heads import rms_norm
from jaxkv.nn.recurrence import RecurrentModule, causal_conv, recur

# Into the docstrings of the classes.
ARGUMENTS = """in_features: size D of input and output.
      num_heads: heads of values.
      head_dim: size of a head's values.
      state_dim: size of the keys: numbers of a state for each number of a value.
      num_groups: how many keys there are, a divisor of num_heads; consecutive heads share one. What is read is
        normalized by as many groups.
      kernel_size: how many tokens the convolution of values and keys sees, at least 2.
      norm_epsilon: added to the mean square of what is read.
      use_bias: whether the projections have a bias.
      conv_bias: whether the convolution has one.
      dtype: of the projections and the convolution; None infers it from input and parameters. States are float32.
      param_dtype: of the parameters.
      precision: of the projections, see `jax.lax.Precision`.
      kernel_init, bias_init: initializers, called as Flax calls them."""


class Mamba2Module(RecurrentModule):
    """A module with the sizes of a Mamba-2 layer."""

    num_heads: int
    head_dim: int
    state_dim: int
    num_groups: int
    kernel_size: int
    norm_epsilon: float

    def _reach(self, every: int | None, keep: int) -> Recurrent:
        names = ("num_heads", "head_dim", "state_dim", "num_groups")
        heads, head_dim, state_dim, groups = (
            checked_size(type(self).__name__, name, getattr(self, name), 1) for name in names
        )
        width = checked_size(type(self).__name__, "kernel_size", self.kernel_size, 2) - 1
        if heads % groups:
            raise ValueError(f"num_heads={heads} is not a multiple of num_groups={groups}")
        channels = heads * head_dim + 2 * groups * state_dim
        return Recurrent(state=(heads, state_dim, head_dim), tail=(channels, width), every=every, keep=keep)

    @property
    def _inner(self) -> int:
        """The size of all heads' values."""
        return self.num_heads * self.head_dim

    @property
    def _channels(self) -> int:
        """How many numbers go through the convolution: values, keys, and what reads by keys."""
        return self._inner + 2 * self.num_groups * self.state_dim

    def _mix(self, projected: Any, weights: Any, scale: Any, layer: Any, step: Any, positions: Any) -> tuple[Any, Any]:
        """Returns what goes into the last projection, [B, T, inner], and the layer.

        Args:
          projected: gate, what goes through the convolution, and dt: [B, T, inner + channels + num_heads].
          weights: kernel [W, 1, channels], its bias or None, log A [H], d [H], the bias of dt [H].
          scale: of the norm, [inner].
          layer, step, positions: as of the call.
        """
        gate, mixed, dt = jnp.split(projected, [self._inner, self._inner + self._channels], -1)

        def rule(inputs: Any, weights: Any, tail: Any, state: Any, real: Any, counts: Any) -> Any:
            mixed, dt = inputs
            kernel, bias, *per_head = weights
            a_log, d, dt_bias = (x.astype(jnp.float32)[None, None] for x in per_head)
            mixed, tails = causal_conv(mixed, tail, kernel, bias, counts)
            mixed = jnp.where(real[:, :, None], jax.nn.silu(mixed), 0).astype(jnp.float32)
            keys = self.num_groups * self.state_dim
            x, b, c = jnp.split(mixed, [self._inner, self._inner + keys], -1)
            x = x.reshape(*x.shape[:2], self.num_heads, self.head_dim)
            b, c = (self._shared(y.reshape(*y.shape[:2], self.num_groups, self.state_dim)) for y in (b, c))
            dt = jax.nn.softplus(dt.astype(jnp.float32) + dt_bias)
            g = jnp.where(real[:, :, None], -jnp.exp(a_log) * dt, 0)
            y, states = fading_memory(c, b, x * dt[..., None], g, None, state, counts)
            return y + x * d[..., None], tails, states

        y, layer = recur(rule, self._reach(None, 0), (mixed, dt), weights, layer, step, positions)
        y = y.reshape(*gate.shape) * jax.nn.silu(gate.astype(jnp.float32))
        groups = (*y.shape[:2], self.num_groups, -1)
        y = rms_norm(y.reshape(groups), None, self.norm_epsilon).reshape(gate.shape)
        return (y * scale.astype(jnp.float32)[None, None]).astype(gate.dtype), layer

    def _shared(self, x: Any) -> Any:
        """Returns keys [B, T, G, N] for each head, [B, T, H, N]."""
        return jnp.repeat(x, self.num_heads // self.num_groups, axis=2)
