"""Experts in place of an MLP: of many, each token is sent to a few."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class Experts(nnx.Module):
    """The experts of gpt-oss in place of an MLP: a router sends each token to a few of them and weighs what they give.

    An expert is (up + 1) * gate * sigmoid(1.702 gate), clamped at 7, between two projections with biases, as
    transformers' `GptOssExperts` has it: gate and up lie interleaved in one kernel. Every token runs through every
    expert in turn, but for few tokens, which run through theirs alone: decoding reads the weights that it needs.

    Args:
      config: a `DecoderConfig`: width, mlp_dim, num_experts, experts_per_token and dtypes are looked at.
      rngs: random streams of the parameters.
    """

    def __init__(self, config: Any, *, rngs: nnx.Rngs) -> None:
        experts = config.num_experts or 1
        width, hidden, dtype = config.width, config.mlp_dim, config.param_dtype
        self.dtype, self.chosen = config.dtype, config.experts_per_token
        self.router = nnx.Linear(width, experts, dtype=config.dtype, param_dtype=dtype, rngs=rngs)
        init = nnx.initializers.lecun_normal(batch_axis=0)
        self.gate_up = nnx.Param(init(rngs.params(), (experts, width, 2 * hidden), dtype))
        self.gate_up_bias = nnx.Param(jnp.zeros((experts, 2 * hidden), dtype))
        self.down = nnx.Param(init(rngs.params(), (experts, hidden, width), dtype))
        self.down_bias = nnx.Param(jnp.zeros((experts, width), dtype))

    def __call__(self, x: Any) -> Any:
        tokens = x.reshape(-1, x.shape[-1])
        scores, experts = jax.lax.top_k(self.router(tokens), self.chosen)  # [T, k]
        weights = jax.nn.softmax(scores, axis=-1)
        parts = [p[...].astype(self.dtype) for p in (self.gate_up, self.gate_up_bias, self.down, self.down_bias)]
        if experts.size < parts[0].shape[0]:

            def one_choice(total: Any, choice: Any) -> tuple[Any, None]:
                token, expert, weight = choice
                y = _expert(tokens[token][None, :], *(part[expert] for part in parts))
                return total.at[token].add(weight * y[0]), None

            owners = jnp.repeat(jnp.arange(tokens.shape[0], dtype=jnp.int32), self.chosen)
            total, _ = jax.lax.scan(one_choice, jnp.zeros_like(tokens), (owners, experts.ravel(), weights.ravel()))
        else:
            all_weights = jnp.zeros((tokens.shape[0], parts[0].shape[0]), weights.dtype)
            all_weights = jnp.put_along_axis(all_weights, experts, weights, axis=1, inplace=False)

            def one_expert(total: Any, expert: Any) -> tuple[Any, None]:
                weight, *part = expert
                return total + weight[:, None] * _expert(tokens, *part), None

            total, _ = jax.lax.scan(one_expert, jnp.zeros_like(tokens), (all_weights.T, *parts))
        return total.reshape(x.shape)


def _expert(x: Any, gate_up: Any, gate_up_bias: Any, down: Any, down_bias: Any) -> Any:
    """Returns what one expert gives for x [T, D]."""
    y = x @ gate_up + gate_up_bias[None, :]
    gate, up = jnp.minimum(y[:, ::2], 7.0), jnp.clip(y[:, 1::2], -7.0, 7.0)
    return ((up + 1) * gate * jax.nn.sigmoid(1.702 * gate)) @ down + down_bias[None, :]
