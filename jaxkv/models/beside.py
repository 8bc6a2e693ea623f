"""Experts beside the MLP of a layer."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxkv.models.experts import Experts, ExpertsConfig
from jaxkv.models.norm import Norm
from jaxkv.nn.heads import rms_norm


class ExpertsBeside(nnx.Module):
    """norm(what the MLP gives) + norm(experts(norm(x))), where x is what the layer's MLP reads before its norm.

    The router reads x too, normalized without a scale, times a learned one, divided by sqrt(width). As in Gemma 4.

    Args:
      config: a `DecoderConfig`.
      experts: what they are.
      rngs: random streams of the parameters.
    """

    def __init__(self, config: Any, experts: ExpertsConfig, *, rngs: nnx.Rngs) -> None:
        self.epsilon = config.norm_eps
        self.mlp_norm, self.norm, self.post_norm = (Norm(config) for _ in range(3))
        self.router_scale = nnx.Param(jnp.ones((config.width,), config.param_dtype))
        self.experts = Experts(config, experts, rngs=rngs)

    def __call__(self, y: Any, x: Any) -> Any:
        """Returns [B, T, D] of what the MLP gave, y [B, T, D], and what the layer's MLP reads, x [B, T, D]."""
        routed = rms_norm(x, None, self.epsilon).astype(jnp.float32)
        routed = routed * (self.router_scale[...].astype(jnp.float32) * jnp.float32(x.shape[-1] ** -0.5))[None, None]
        return self.mlp_norm(y) + self.post_norm(self.experts(self.norm(x), routed))
