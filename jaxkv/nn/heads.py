"""What an attention layer is apart from its parameters; the modules of `jaxkv.nnx` and `jaxkv.linen` add those."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv.cache.spec import LayerSpec, Reach
from jaxkv.cache.storage import Dense
from jaxkv.nn.attend import attend
from jaxkv.nn.dropout import check_rate
from jaxkv.nn.uncached import cross_attend, self_attend

PROJECTIONS = ("query", "key", "value", "out")
QK_NORMS = (False, True, "together", "centered", "plain")


@dataclasses.dataclass(frozen=True)
class QueryTemperature:
    """Queries grow with their positions: by 1 + scale * ln(1 + floor((position + first) / length)).

    So attention stays sharp over long contexts, in layers without rotary embeddings of Llama 4 and in all of
    Ministral 3. Nakanishi 2025, https://arxiv.org/abs/2501.19399.

    Args:
      length: tokens over which the factor stays the same, at least 1.
      scale: how fast it grows, at least 0.
      first: what the first position counts as: 1 in Llama 4, 0 in Ministral 3.

    Raises:
      ValueError: for a length below 1, a negative scale, or a negative first.

    >>> QueryTemperature(length=4, scale=0.1).factors(jnp.array([0, 2, 3, 7])).round(4).tolist()
    [1.0, 1.0, 1.0692999362945557, 1.1098999977111816]
    """

    length: float
    scale: float
    first: int = 1

    def __post_init__(self) -> None:
        if not (self.length >= 1 and self.scale >= 0 and self.first >= 0):
            raise ValueError(f"{self}: length is at least 1, scale and first at least 0")

    def factors(self, positions: Any) -> Any:
        """Returns the factor of each query. float32, the shape of positions."""
        times = jnp.floor((positions + jnp.int32(self.first)).astype(jnp.float32) / jnp.float32(self.length))
        return 1 + jnp.float32(self.scale) * jnp.log1p(jnp.maximum(times, 0))


@dataclasses.dataclass(frozen=True)
class Heads:
    """The static facts of an attention layer, and its way from projected q, k, v to what goes into the last projection.

    Args:
      num_heads: query heads, a multiple of num_kv_heads.
      num_kv_heads: heads of k and v.
      head_dim: size of a head.
      reach: which past tokens a query may see; Cross(size) for an encoder's output.
      shares: None, or the number of the layer whose keys and values are read.
      rotary: None, or a frozen, hashable object with `rotate` and `shift`, such as `jaxkv.Rotary()`.
      softcap: None, or the bound of the scores.
      scale: factor of the scores; None means head_dim ** -0.5.
      temperature: None, or what queries are multiplied by, position by position.
      implementation: of `attend`.
      dropout_rate: share of the attention weights left out in training.
      broadcast_dropout: whether all rows and heads leave out the same.
      rotated: which of "k" and "v" the projections give in the Hadamard basis, see `LayerSpec`.

    Raises:
      ValueError: for counts that are below 1 or don't divide, or a rotary that does not fit head_dim.

    >>> Heads(num_heads=4, num_kv_heads=2, head_dim=8, reach=jaxkv.Window(16)).layer_spec().head_dim
    8
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    reach: Reach
    shares: int | None = None
    rotary: Any = None
    softcap: float | None = None
    scale: float | None = None
    temperature: QueryTemperature | None = None
    implementation: str = "auto"
    dropout_rate: float = 0.0
    broadcast_dropout: bool = True
    rotated: tuple[str, ...] = ()

    @classmethod
    def choose(
        cls,
        num_heads: int,
        num_kv_heads: int | None,
        head_dim: int | None,
        qkv_features: int | None,
        in_features: int | None,
        **rest: Any,
    ) -> Heads:
        """Returns Heads with the sizes that are not given filled in as Flax does: in_features shared by num_heads."""
        if not isinstance(num_heads, int) or isinstance(num_heads, bool) or num_heads < 1:
            raise ValueError(f"num_heads={num_heads!r}: give a whole number of at least 1")
        if head_dim is None:
            features = in_features if qkv_features is None else qkv_features
            if features is None:
                raise ValueError(
                    "the size of a head is not known; give head_dim, or in_features if num_heads divides it"
                )
            if features % num_heads:
                name = "in_features" if qkv_features is None else "qkv_features"
                raise ValueError(f"{name}={features} can't be shared by num_heads={num_heads}; give head_dim")
            head_dim = features // num_heads
        elif qkv_features is not None and qkv_features != num_heads * head_dim:
            raise ValueError(
                f"qkv_features={qkv_features} is not num_heads * head_dim = {num_heads} * {head_dim}; give only one"
            )
        return cls(num_heads, num_heads if num_kv_heads is None else num_kv_heads, head_dim, **rest)

    def __post_init__(self) -> None:
        self.layer_spec()
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}: "
                "each kv head has the same number of query heads"
            )
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap={self.softcap}: it bounds the scores, so it is above 0; None turns it off")
        check_rate(self.dropout_rate)
        if self.rotary is not None:
            if not callable(getattr(self.rotary, "rotate", None)):
                raise ValueError(f"rotary={self.rotary!r} has no rotate(x, positions); give for example jaxkv.Rotary()")
            x = jax.ShapeDtypeStruct((1, 1, 1, self.head_dim), jnp.float32)
            jax.eval_shape(self.rotary.rotate, x, jax.ShapeDtypeStruct((1, 1, 1, 1), jnp.int32))

    def layer_spec(self, k_storage: Any = None, v_storage: Any = None, dtype: Any = jnp.float32) -> LayerSpec:
        """Returns what a cache must keep for this layer; a storage of None is Dense of `dtype`."""
        k_storage, v_storage = (Dense(dtype) if storage is None else storage for storage in (k_storage, v_storage))
        return LayerSpec(
            self.reach,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            k_storage=k_storage,
            v_storage=v_storage,
            rotary=self.rotary,
            shares=self.shares,
            rotated=self.rotated,
        )

    def attend(
        self,
        q: Any,
        k: Any,
        v: Any,
        layer: Any,
        step: Any,
        *,
        kv: Any,
        positions: Any,
        spans: Any,
        sink_logits: Any,
        dropout_key: Any,
    ) -> tuple[Any, Any]:
        """Returns what the heads read, [B, T, N, H], and where: the layer after its put, or without one (k, v).

        Args:
          q: [B, T, N, H], not yet rotated.
          k, v: [B, T, K, H], not yet rotated; not looked at where another layer's are read.
          layer, step: both or neither.
          kv: without a layer: the (k, v) of the layer whose keys and values are read, or None.
          positions: int32 [B, T] or None (0, 1, 2, ...); without a layer only.
          spans: int32 [B, T] or None; without a layer only.
          sink_logits: float [N] or None.
          dropout_key: a PRNG key, or None for no dropout.
        """
        rest = self._options | {"sink_logits": sink_logits}
        if layer is not None:
            if self.shares is None:
                if layer.spec.v_in_k and v is not k:
                    raise ValueError(
                        "the layer was made for v_in_k=True, but this module's values are not its keys: that takes "
                        "tied_values=True, and the same norm or none for both"
                    )
                k = self._rotated(k, step.depths) if layer.spec.rotary_at == "put" else k
                layer = layer.put(step, k, None if layer.spec.v_in_k else v)
            return attend(self._turned(q, step.depths), layer, step, **rest), layer
        there = jnp.arange(q.shape[1], dtype=jnp.int32)[None, :] if positions is None else positions
        k, v = (self._rotated(k, there), v) if kv is None else kv
        rest |= {"reach": self.reach, "positions": positions, "spans": spans, **self._dropout(dropout_key)}
        return self_attend(self._turned(q, there), k, v, **rest), (k, v)

    def cross_attend(self, q: Any, layer: Any, step: Any, k: Any, v: Any, *, lengths: Any, dropout_key: Any) -> Any:
        """Returns what the heads read of an encoder's output: [B, T, N, H].

        Args:
          q: [B, T, N, H].
          layer, step: where the output was put; or None, and instead
          k, v: [B, S, K, H];
          lengths: int [B] or None, how many keys are real.
          dropout_key: a PRNG key, or None for no dropout.
        """
        if layer is not None:
            return attend(q, layer, step, **self._options)
        return cross_attend(q, k, v, lengths=lengths, **self._options, **self._dropout(dropout_key))

    @property
    def _options(self) -> dict[str, Any]:
        return {"scale": self.scale, "softcap": self.softcap, "implementation": self.implementation}

    def _dropout(self, key: Any) -> dict[str, Any]:
        if key is None:
            return {}
        return {
            "dropout_rate": self.dropout_rate,
            "dropout_key": key,
            "broadcast_dropout": self.broadcast_dropout,
        }

    def _rotated(self, x: Any, positions: Any) -> Any:
        """Returns queries or keys [B, T, N, H] rotated to their positions [B, T]."""
        return x if self.rotary is None else self.rotary.rotate(x, positions[:, :, None, None])

    def _turned(self, q: Any, positions: Any) -> Any:
        """Returns queries [B, T, N, H] as their positions [B, T] make them."""
        q = self._rotated(q, positions)
        if self.temperature is None:
            return q
        return (q.astype(jnp.float32) * self.temperature.factors(positions[:, :, None, None])).astype(q.dtype)


def biased(use_bias: bool | Collection[str]) -> frozenset[str]:
    """Returns the names of the projections that have a bias.

    Args:
      use_bias: True for all, False for none, or names out of "query", "key", "value", "out".

    Raises:
      ValueError: for another name.

    >>> sorted(biased(("query", "key", "value")))
    ['key', 'query', 'value']
    """
    if isinstance(use_bias, bool):
        return frozenset(PROJECTIONS if use_bias else ())
    names = frozenset((use_bias,) if isinstance(use_bias, str) else use_bias)
    if not names <= set(PROJECTIONS):
        raise ValueError(f"use_bias={use_bias!r}: give True, False, or names out of {', '.join(PROJECTIONS)}")
    return names


def qk_scale(kind: bool | str, num_heads: int, head_dim: int) -> tuple[int, ...] | None:
    """Returns the shape of the learned scale of queries or keys, None where there is none.

    Args:
      kind: the `qk_norm` of an attention module.
      num_heads: heads of what is normalized, N or K.
      head_dim: size of a head.

    Raises:
      ValueError: for a kind that is not known.

    >>> qk_scale(True, 4, 8), qk_scale("together", 4, 8)
    ((8,), (4, 8))
    """
    if kind not in QK_NORMS:
        raise ValueError(f"qk_norm={kind!r}: known are {', '.join(map(repr, QK_NORMS))}")
    return {True: (head_dim,), "together": (num_heads, head_dim), "centered": (num_heads, head_dim)}.get(kind)


def qk_normed(kind: bool | str, x: Any, scale: Any, epsilon: float) -> Any:
    """Returns queries or keys normalized, x's shape and dtype.

    Args:
      kind: the `qk_norm` of an attention module.
      x: [B, T, N, H], any floating dtype.
      scale: what was learned, of the shape of `qk_scale`, or None.
      epsilon: added to the mean square.

    >>> qk_normed("together", jnp.full((1, 1, 2, 4), 3.0), jnp.ones((2, 4)), 0.0)[0, 0, 0].tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    y = x.astype(jnp.float32)
    if kind == "centered":
        y = y - jnp.mean(y, axis=-1, keepdims=True)
    return rms_norm(y, scale, epsilon, axes=(-2, -1) if kind == "together" else (-1,)).astype(x.dtype)


def rms_norm(x: Any, scale: Any, epsilon: float, axes: tuple[int, ...] = (-1,)) -> Any:
    """Returns x divided by its root mean square along the last axis or axes, times `scale`, computed in float32.

    Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467.

    Args:
      x: [..., H], any floating dtype.
      scale: [H], or as many of the last axes as it has; None for none.
      epsilon: added to the mean square.
      axes: what the mean is taken over.

    Returns:
      x's shape and dtype.

    >>> rms_norm(jnp.array([[3.0, 3.0]]), jnp.ones(2), 0.0).tolist()
    [[1.0, 1.0]]
    """
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(jnp.square(y), axis=axes, keepdims=True) + jnp.float32(epsilon))
    if scale is not None:
        y = y * scale.astype(jnp.float32).reshape((1,) * (x.ndim - scale.ndim) + scale.shape)
    return y.astype(x.dtype)
