"""Latent attention as a part of a `Decoder`."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx

from jaxkv.nn.indexer import Indexer
from jaxkv.nn.nnx import LatentAttention


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """The sizes of multi-head latent attention. Frozen and hashable.

    Args:
      rank: size of the latent.
      rotary_dim: size of the rotary key, which all heads share.
      value_dim: size of a head's value; None means head_dim.
      query_rank: None, or the size through which queries are projected.
      indexer: None, or what chooses the tokens that each query reads; it needs a query_rank.

    >>> LatentConfig(rank=512, rotary_dim=64, value_dim=128, query_rank=1536).rank
    512
    """

    rank: int
    rotary_dim: int
    value_dim: int | None = None
    query_rank: int | None = None
    indexer: Indexer | None = None

    def attention(self, config: Any, index: int, *, rngs: nnx.Rngs) -> LatentAttention:
        """Returns the attention of a layer of a decoder with a `DecoderConfig`."""
        return LatentAttention(
            config.num_heads,
            config.width,
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
            head_dim=config.head_dim,
            reach=config.reach(index),
            rotary=config.layer_rotary(index),
            scale=config.attention_scale,
            use_bias=bool(config.biases - {"mlp"}),
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
