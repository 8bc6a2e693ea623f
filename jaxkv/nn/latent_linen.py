"""Multi-head latent attention for `flax.linen`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from jaxkv.cache.spec import Full, Reach
from jaxkv.nn import dropout
from jaxkv.nn.indexer import Indexer
from jaxkv.nn.latent import OPTIONS, LatentHeads, LatentModule, biased, checked_indexer
from jaxkv.nn.own_linen import ATTRIBUTES, OwnCache, returned
from jaxkv.nn.product import dot_general
from jaxkv.nn.recurrent_linen import Scale


class Affine(nn.Module):
    """The learned scale and bias of a norm. Parameters: `scale`, ones, and `bias`, zeros."""

    size: int
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self) -> tuple[Any, Any]:
        """Returns both."""
        scale = self.param("scale", nn.initializers.ones_init(), (self.size,), self.param_dtype)
        return scale, self.param("bias", nn.initializers.zeros_init(), (self.size,), self.param_dtype)


class LatentAttention(OwnCache, LatentModule, nn.Module):
    __doc__ = f"""Multi-head latent attention (DeepSeek): the cache keeps one latent and one rotary key per token.

    The parameters have the names and shapes of those of `jaxkv.nnx.LatentAttention`.

    Attributes:
      {OPTIONS}
      {ATTRIBUTES}

    Raises:
      ValueError: when called, for sizes below 1, or names that are not known.

    >>> attn = jaxkv.linen.LatentAttention(2, 8, rank=6, rotary_dim=2, head_dim=4, rotary=jaxkv.Rotary())
    >>> x = jnp.ones((1, 3, 8))
    >>> variables = attn.init(jax.random.key(0), x)
    >>> y = attn.apply(variables, x)                                           # training
    >>> cache = jaxkv.Cache.init([attn.layer_spec()], num_rows=1, capacity=16)
    >>> cache, step = cache.begin(jnp.arange(3)[None])
    >>> z, layer = attn.apply(variables, x, cache.layers[0], step)
    >>> bool(jnp.allclose(y, z, atol=1e-6))
    True
    """

    num_heads: int
    in_features: int
    out_features: int | None = None
    _: dataclasses.KW_ONLY
    rank: int
    rotary_dim: int
    head_dim: int
    value_dim: int | None = None
    query_rank: int | None = None
    reach: Reach = Full()
    rotary: Any = None
    scale: float | None = None
    norm_epsilon: float = 1e-6
    indexer: Indexer | None = None
    use_bias: bool | Collection[str] = False
    dropout_rate: float = 0.0
    broadcast_dropout: bool = True
    deterministic: bool | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Any = nn.linear.default_kernel_init
    bias_init: Any = nn.initializers.zeros_init()
    expand_init: Any = nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
    implementation: str = "auto"
    decode: bool = False
    cache_capacity: int | None = None

    def setup(self) -> None:
        heads, with_bias = self._heads(), biased(self.use_bias)
        checked_indexer(self.indexer, self.query_rank)
        kind = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def linear(shape: Any, name: str, **options: Any) -> Any:
            options |= {"kernel_init": self.kernel_init, "bias_init": self.bias_init, "use_bias": name in with_bias}
            return nn.DenseGeneral(shape, dot_general=dot_general, precision=self.precision, **options, **kind)

        queries = (self.num_heads, self.head_dim + self.rotary_dim)
        self.query = self.query_down = self.query_norm = self.query_up = None
        if self.query_rank is None:
            self.query = linear(queries, "query")
        else:
            self.query_down = linear(self.query_rank, "query_down")
            self.query_norm = Scale((self.query_rank,), self.param_dtype)
            self.query_up = linear(queries, "query_up")
        self.index_query = self.index_key = self.index_norm = self.index_weights = None
        if self.indexer is not None:
            self.index_query = linear((self.indexer.num_heads, self.indexer.head_dim), "index_query")
            self.index_key = linear(self.indexer.head_dim, "index_key")
            self.index_norm = Affine(self.indexer.head_dim, self.param_dtype)
            self.index_weights = linear(self.indexer.num_heads, "index_weights")
        self.latent = linear(self.rank + self.rotary_dim, "latent")
        self.latent_norm = Scale((self.rank,), self.param_dtype)
        shape = self.rank, self.num_heads, self.head_dim + heads.value_dim
        self.expand = self.param("expand", self.expand_init, shape, self.param_dtype)
        self.out = linear(self.in_features if self.out_features is None else self.out_features, "out", axis=(-2, -1))

    @nn.compact  # for the variable of its own cache
    def __call__(
        self,
        x: Any,
        layer: Any = None,
        step: Any = None,
        *,
        positions: Any = None,
        spans: Any = None,
        deterministic: bool | None = None,
        dropout_rng: Any = None,
        decode: bool | None = None,
    ) -> Any:
        """Returns attention over the layer after storing the call's tokens in it, or over x itself without a layer.

        Args:
          x, layer, step, positions, spans, deterministic: as in `jaxkv.nnx.LatentAttention`.
          decode: overrides the attribute of this name; as in `jaxkv.linen.Attention`.
          dropout_rng: without a layer: the key of the dropout, instead of `make_rng("dropout")`.

        Returns:
          y [B, T, out_features], or with a layer (y, the layer with the call's tokens).

        Raises:
          ValueError: while tracing, for shapes that don't fit, or a layer that was not made for this module.
        """
        key = dropout.key_of_call(self, layer, deterministic, functools.partial(dropout.draw_linen, self, dropout_rng))
        hidden = self._hidden(x, layer, positions, spans, decode)
        if hidden is not None:
            layer, step, positions, spans = hidden.layer, hidden.step, None, None
        y, layer = self._attend(x, layer, step, positions, spans, self.expand, key)
        return returned(y, layer, hidden)

    def _heads(self) -> LatentHeads:
        return LatentHeads(
            self.num_heads,
            self.rank,
            self.rotary_dim,
            self.head_dim,
            self.reach,
            self.value_dim,
            self.rotary,
            self.scale,
            self.indexer,
            self.implementation,
            self.dropout_rate,
            self.broadcast_dropout,
        )
