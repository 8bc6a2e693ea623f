"""What a layer of a decoder may have in attention's place."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx

from jaxkv.nn.recurrent_nnx import GatedDelta, Mamba2, ShortConv


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
        return ShortConv(width, **dataclasses.asdict(self), dtype=dtype, param_dtype=param_dtype, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class GatedDeltaConfig:
    """A gated delta layer, see `jaxkv.nnx.GatedDelta` (Qwen3-Next).

    Args:
      num_key_heads: heads of queries and keys.
      num_value_heads: heads of values, a multiple of num_key_heads.
      key_dim, value_dim: sizes of a head.
      kernel_size: how many tokens the convolution sees.
      norm_epsilon: added to the mean square of what a head reads.
    """

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    kernel_size: int = 4
    norm_epsilon: float = 1e-6

    def make(self, width: int, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs) -> GatedDelta:
        """Returns the module for a stream of this width."""
        return GatedDelta(width, **dataclasses.asdict(self), dtype=dtype, param_dtype=param_dtype, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class Mamba2Config:
    """A Mamba-2 layer, see `jaxkv.nnx.Mamba2` (Granite 4, Bamba).

    Args:
      num_heads: heads of values.
      head_dim: size of a head's values.
      state_dim: size of the keys.
      num_groups: how many keys there are.
      kernel_size: how many tokens the convolution sees.
      norm_epsilon: added to the mean square of what is read.
      use_bias: whether the projections have a bias.
      conv_bias: whether the convolution has one.
    """

    num_heads: int
    head_dim: int
    state_dim: int
    num_groups: int = 1
    kernel_size: int = 4
    norm_epsilon: float = 1e-6
    use_bias: bool = False
    conv_bias: bool = True

    def make(self, width: int, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs) -> Mamba2:
        """Returns the module for a stream of this width."""
        return Mamba2(width, **dataclasses.asdict(self), dtype=dtype, param_dtype=param_dtype, rngs=rngs)


MixerConfig = ShortConvConfig | GatedDeltaConfig | Mamba2Config
