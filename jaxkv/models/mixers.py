"""What a layer of a decoder may have in attention's place."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx

from jaxkv.nn.recurrent_nnx import ShortConv


@dataclasses.dataclass(frozen=True)
class ShortConvConfig:
    """A short convolution, see `jaxkv.nnx.ShortConv` (LFM2).

    Args:
      kernel_size: how many tokens it sees, its own included.
      use_bias: whether projections and convolution have a bias.
    """

    kernel_size: int = 3
    use_bias: bool = False

    def make(self, width: int, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs) -> ShortConv:
        """Returns the module for a stream of this width."""
        return ShortConv(
            width, self.kernel_size, use_bias=self.use_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )


MixerConfig = ShortConvConfig
