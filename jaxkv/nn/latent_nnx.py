"""Multi-head latent attention for `flax.nnx`."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.linear import default_bias_init, default_kernel_init

from jaxkv.cache.spec import Full, Reach
from jaxkv.nn import dropout
from jaxkv.nn.fuse import Transposed
from jaxkv.nn.indexer import Indexer
from jaxkv.nn.latent import OPTIONS, LatentHeads, LatentModule, biased, checked_indexer
from jaxkv.nn.own_nnx import OwnCache
from jaxkv.nn.product import dot_general
from jaxkv.nn.recurrent_nnx import Scale

_EXPAND_INIT = nnx.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))


class Affine(nnx.Module):
    """The learned scale and bias of a norm. Parameters: `scale`, ones, and `bias`, zeros."""

    def __init__(self, size: int, *, param_dtype: Any = jnp.float32) -> None:
        self.scale = nnx.Param(jnp.ones((size,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((size,), param_dtype))

    def __call__(self) -> tuple[Any, Any]:
        """Returns both."""
        return self.scale[...], self.bias[...]


class LatentAttention(OwnCache, LatentModule, nnx.Module):
    __doc__ = f"""Multi-head latent attention (DeepSeek): the cache keeps one latent and one rotary key per token.

    Decoding with a cache makes no keys and values of heads: queries are projected to the latents, and what was read of
    those to the heads' values. Many queries at once, and those without a cache, read what heads make of the latents.

    Args:
      {OPTIONS}
      rngs: random streams of the parameters, and of the dropout.
      keep_rngs: whether the module keeps a stream for its dropout; False: each call is given `rngs`.

    Raises:
      ValueError: for sizes below 1, or names that are not known.

    >>> from flax import nnx
    >>> rotary = jaxkv.Rotary(interleaved=True)
    >>> attn = jaxkv.nnx.LatentAttention(2, 8, rank=6, rotary_dim=2, head_dim=4, rotary=rotary, rngs=nnx.Rngs(0))
    >>> x = jnp.ones((1, 3, 8))
    >>> y = attn(x)                                                            # training
    >>> cache = jaxkv.Cache.init([attn.layer_spec()], num_rows=1, capacity=16)
    >>> cache, step = cache.begin(jnp.arange(3)[None])
    >>> z, layer = attn(x, cache.layers[0], step)
    >>> bool(jnp.allclose(y, z, atol=1e-6))
    True
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        out_features: int | None = None,
        *,
        rank: int,
        rotary_dim: int,
        head_dim: int,
        value_dim: int | None = None,
        query_rank: int | None = None,
        reach: Reach = Full(),
        rotary: Any = None,
        scale: float | None = None,
        norm_epsilon: float = 1e-6,
        indexer: Indexer | None = None,
        use_bias: bool | Collection[str] = False,
        dropout_rate: float = 0.0,
        broadcast_dropout: bool = True,
        deterministic: bool | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Any = default_kernel_init,
        bias_init: Any = default_bias_init,
        expand_init: Any = _EXPAND_INIT,
        implementation: str = "auto",
        rngs: nnx.Rngs,
        keep_rngs: bool = True,
    ) -> None:
        heads = LatentHeads(
            num_heads,
            rank,
            rotary_dim,
            head_dim,
            reach,
            value_dim,
            rotary,
            scale,
            indexer,
            implementation,
            dropout_rate,
            broadcast_dropout,
        )
        checked_indexer(indexer, query_rank)
        self.heads, self.in_features, self.dtype, self.param_dtype = heads, in_features, dtype, param_dtype
        self.norm_epsilon = norm_epsilon
        self.dropout_rate, self.deterministic = dropout_rate, deterministic
        self.rngs = rngs.dropout.fork() if keep_rngs and dropout_rate else nnx.data(None)
        kind = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        with_bias = biased(use_bias)

        def linear(features: Any, shape: Any, name: str, **options: Any) -> Any:
            options |= {"kernel_init": kernel_init, "bias_init": bias_init, "use_bias": name in with_bias}
            return nnx.LinearGeneral(features, shape, dot_general=dot_general, precision=precision, **options, **kind)

        queries = (num_heads, head_dim + rotary_dim)
        self.query = self.query_down = self.query_norm = self.query_up = nnx.data(None)
        if query_rank is None:
            self.query = linear(in_features, queries, "query")
        else:
            self.query_down = linear(in_features, query_rank, "query_down")
            self.query_norm = Scale((query_rank,), param_dtype=param_dtype)
            self.query_up = linear(query_rank, queries, "query_up")
        self.index_query = self.index_key = self.index_norm = self.index_weights = nnx.data(None)
        if indexer is not None:
            self.index_query = linear(query_rank, (indexer.num_heads, indexer.head_dim), "index_query")
            self.index_key = linear(in_features, indexer.head_dim, "index_key")
            self.index_norm = Affine(indexer.head_dim, param_dtype=param_dtype)
            self.index_weights = linear(in_features, indexer.num_heads, "index_weights")
        self.latent = linear(in_features, rank + rotary_dim, "latent")
        self.latent_norm = Scale((rank,), param_dtype=param_dtype)
        self.expand = nnx.Param(expand_init(rngs.params(), (rank, num_heads, head_dim + heads.value_dim), param_dtype))
        values = (num_heads, heads.value_dim)
        self.out: Any = linear(values, in_features if out_features is None else out_features, "out", axis=(-2, -1))

    def __call__(
        self,
        x: Any,
        layer: Any = None,
        step: Any = None,
        *,
        positions: Any = None,
        spans: Any = None,
        deterministic: bool | None = None,
        rngs: Any = None,
    ) -> Any:
        """Returns attention over the layer after storing the call's tokens in it, or over x itself without a layer.

        Args:
          x: [B, T, D], floating.
          layer: None, or this module's layer of a cache, made from `layer_spec()`.
          step: None, or the step of this forward pass from `cache.begin`.
          positions: without a layer: int32 [B, T], EMPTY for padding; None means 0, 1, 2, ... in every row.
          spans: without a layer: int32 [B, T]; tokens of the same span other than 0 see each other in both directions.
          deterministic: without a layer: overrides the attribute of this name; False for dropout.
          rngs: without a layer: where dropout draws from, instead of the module's own stream.

        Returns:
          y [B, T, out_features], or with a layer (y, the layer with the call's tokens).

        Raises:
          ValueError: while tracing, for shapes that don't fit, or a layer that was not made for this module.
        """
        key = dropout.key_of_call(self, layer, deterministic, functools.partial(dropout.draw_nnx, self, rngs))
        y, layer = self._attend(x, layer, step, positions, spans, self.expand[...], key)
        return y if layer is None else (y, layer)

    def _heads(self) -> LatentHeads:
        return self.heads

    def fuse(self) -> None:
        """Lays the weights out for decoding. See `jaxkv.nnx.fuse`."""
        if not isinstance(self.out, Transposed):
            self.out = Transposed(self.out)
