"""What every layer reads of a token besides what the layer before gives: a small vector for each token and layer.

Per-layer embeddings of Gemma 3n and 4: a table of what a token is, and a projection of its embedding, for all layers at
once; each layer lets them through a gate. Google 2025, https://huggingface.co/google/gemma-4-E2B.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxkv.models.mlp import ACTIVATIONS
from jaxkv.models.norm import Norm
from jaxkv.nn.product import dot_general


class LayerInputs(nnx.Module):
    """The vectors of all layers: (norm(project(embedding) / sqrt(width)) + sqrt(size) * table) / sqrt(2).

    Args:
      config: a `DecoderConfig`.
      rngs: random streams of the parameters.
    """

    def __init__(self, config: Any, *, rngs: nnx.Rngs) -> None:
        kind = {"dtype": config.dtype, "param_dtype": config.param_dtype, "rngs": rngs}
        self.num_layers, self.size, self.width = config.num_layers, config.layer_input_dim, config.width
        self.table = nnx.Embed(config.layer_input_vocab, self.num_layers * self.size, **kind)
        self.projection = nnx.Linear(
            config.width, self.num_layers * self.size, use_bias=False, dot_general=dot_general, **kind
        )
        self.norm = Norm(config, self.size)

    def __call__(self, tokens: Any, x: Any) -> list[Any]:
        """Returns what each layer reads: [B, T, size] each.

        Args:
          tokens: int [B, T]; one outside the table gives NaN.
          x: their embeddings [B, T, D].
        """
        shape = (*tokens.shape, self.num_layers, self.size)
        projected = (self.projection(x) * jnp.asarray(self.width**-0.5, x.dtype)).reshape(shape)
        table = (self.table(tokens) * jnp.asarray(self.size**0.5, x.dtype)).reshape(shape)
        both = (self.norm(projected) + table) * jnp.asarray(2**-0.5, x.dtype)
        return [both[:, :, i] for i in range(self.num_layers)]


class LayerInput(nnx.Module):
    """What one layer adds to its stream: norm(project(act(gate(x)) * its vectors)).

    Args:
      config: a `DecoderConfig`.
      rngs: random streams of the parameters.
    """

    def __init__(self, config: Any, *, rngs: nnx.Rngs) -> None:
        kind = {
            "use_bias": False,
            "dot_general": dot_general,
            "dtype": config.dtype,
            "param_dtype": config.param_dtype,
            "rngs": rngs,
        }
        self.activation = config.activation
        self.gate = nnx.Linear(config.width, config.layer_input_dim, **kind)
        self.projection = nnx.Linear(config.layer_input_dim, config.width, **kind)
        self.norm = Norm(config)

    def __call__(self, x: Any, inputs: Any) -> Any:
        """Returns [B, T, D] of the stream x [B, T, D] and the layer's vectors [B, T, size]."""
        return self.norm(self.projection(ACTIVATIONS[self.activation](self.gate(x)) * inputs))
