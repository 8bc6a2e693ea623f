"""The short convolution of LFM2: out(c * conv(b * x)), with b, c and x projected from the input.

LiquidAI 2025, https://huggingface.co/LiquidAI/LFM2-1.2B; https://arxiv.org/abs/2511.23404.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jaxkv.cache.arguments import checked_size
from jaxkv.cache.spec import Recurrent
from jaxkv.nn.recurrence import RecurrentModule, causal_conv, recur

# Into the docstrings of the classes, behind the arguments that differ.
ARGUMENTS = """in_features: size D of input and output.
      kernel_size: how many tokens a convolution sees, its own included, at least 2.
      use_bias: whether the projections and the convolution have a bias.
      dtype: of the computation; None infers it from input and parameters.
      param_dtype: of the parameters.
      precision: of the projections, see `jax.lax.Precision`.
      kernel_init, bias_init: initializers, called as Flax calls them."""


class ShortConvModule(RecurrentModule):
    """A module with the sizes of a short convolution."""

    kernel_size: int

    def _reach(self, every: int | None, keep: int) -> Recurrent:
        width = checked_size(type(self).__name__, "kernel_size", self.kernel_size, 2) - 1
        return Recurrent(tail=(self.in_features, width), every=every, keep=keep)

    def _mix(self, projected: Any, weights: Any, layer: Any, step: Any, positions: Any) -> tuple[Any, Any]:
        """Returns what goes into the last projection, [B, T, D], and the layer.

        projected: [B, T, 3 D]; weights: kernel [W, 1, D] and bias [D] or None.
        """
        reach = self._reach(None, 0)
        return recur(_rule, reach, projected, weights, layer, step, positions)


def _rule(x: Any, weights: Any, tail: Any, state: Any, real: Any, counts: Any) -> tuple[Any, Any, Any]:
    b, c, x = jnp.split(x, 3, -1)
    kernel, bias = weights
    y, tails = causal_conv(b * x, tail, kernel, bias, counts)
    return c * y, tails, None
