"""The norms of a decoder."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxkv.nn.heads import rms_norm

NORMS = ("rms", "layer")


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over the last axis, computed in float32. Parameters as Flax names them: `scale`, `bias`.

    Args:
      config: a `DecoderConfig`: its norm and dtypes are looked at.
      size: of the last axis; None means the config's width.
    """

    def __init__(self, config: Any, size: int | None = None) -> None:
        size = config.width if size is None else size
        self.centered, self.epsilon, self.dtype = config.norm == "layer", config.norm_eps, config.dtype
        biased = self.centered and config.norm_bias
        self.scale = nnx.Param(jnp.ones((size,), config.param_dtype))
        self.bias = nnx.Param(jnp.zeros((size,), config.param_dtype)) if biased else nnx.data(None)

    def __call__(self, x: Any) -> Any:
        y = x.astype(jnp.float32)
        if self.centered:
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = rms_norm(y, self.scale[...], self.epsilon)
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32).reshape((1,) * (y.ndim - 1) + (-1,))
        return y.astype(self.dtype)
