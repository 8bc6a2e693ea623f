"""The MLP of a layer, and the activations that it may have."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxkv.nn.fuse import Joined, Transposed
from jaxkv.nn.product import dot_general


def gelu(x: Any) -> Any:
    """Returns x times the share of a normal distribution that lies below x (Hendrycks & Gimpel 2016), in x's dtype.

    By erf, as torch does, in float32 at least: `jax.nn.gelu` computes erfc, which takes a CPU twice as long. The error
    is small beside 1, not beside the result: far below 0, where the result nears 0, its digits are rounding.

    >>> gelu(jnp.array([-20.0, 0.0, 20.0])).tolist()
    [-0.0, 0.0, 20.0]
    """
    y = x.astype(x.dtype if x.dtype.itemsize > 4 else jnp.float32)
    return (y * (0.5 * (1 + jax.lax.erf(y * math.sqrt(0.5))))).astype(x.dtype)


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


class MLP(nnx.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) when not gated.

    Args:
      config: a `DecoderConfig`.
      mlp_dim: inner size; None means the config's.
      rngs: random streams of the parameters.
    """

    def __init__(self, config: Any, mlp_dim: int | None = None, *, rngs: nnx.Rngs) -> None:
        kind = {
            "use_bias": "mlp" in config.biases,
            "dot_general": dot_general,
            "dtype": config.dtype,
            "param_dtype": config.param_dtype,
            "rngs": rngs,
        }
        mlp_dim = config.mlp_dim if mlp_dim is None else mlp_dim
        self.activation = config.activation
        self.gate: Any = nnx.Linear(config.width, mlp_dim, **kind) if config.gated else nnx.data(None)
        self.up: Any = nnx.Linear(config.width, mlp_dim, **kind)
        self.down: Any = nnx.Linear(mlp_dim, config.width, **kind)
        self.gate_up: Joined | None = nnx.data(None)  # instead of gate and up, after `fuse`

    def __call__(self, x: Any) -> Any:
        act = ACTIVATIONS[self.activation]
        if self.gate_up is not None:
            gate, up = self.gate_up(x)
            return self.down(act(gate) * up)
        return self.down(act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x))

    def fuse(self) -> None:
        """Lays the weights out for decoding, see `jaxkv.nnx.fuse`."""
        if isinstance(self.down, Transposed):
            return
        self.down = Transposed(self.down)
        if self.gate is not None:
            self.gate_up = Joined([self.gate, self.up])
            self.gate = self.up = nnx.data(None)
