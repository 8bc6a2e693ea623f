"""What an attention layer is apart from its parameters; the modules of `jaxkv.nnx` and `jaxkv.linen` add those."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv.cache.cache import Cache
from jaxkv.cache.layer import Layer
from jaxkv.cache.spec import LayerSpec, Reach
from jaxkv.cache.storage import Dense
from jaxkv.nn.attend import attend
from jaxkv.nn.uncached import cross_attend, self_attend

PROJECTIONS = ("query", "key", "value", "out")


@dataclasses.dataclass(frozen=True)
class Heads:
    """The static facts of an attention layer, and its way from projected q, k, v to what goes into the last projection.

    Args:
      num_heads: query heads, a multiple of num_kv_heads.
      num_kv_heads: heads of k and v.
      head_dim: size of a head.
      reach: which past tokens a query may see; Cross(size) for an encoder's output.
      rotary: None, or a frozen, hashable object with `rotate` and `shift`, such as `jaxkv.Rotary()`.
      softcap: None, or the bound of the scores.
      scale: factor of the scores; None means head_dim ** -0.5.
      implementation: of `attend`.

    Raises:
      ValueError: for counts that are below 1 or don't divide, or a rotary that does not fit head_dim.

    >>> Heads(num_heads=4, num_kv_heads=2, head_dim=8, reach=jaxkv.Window(16)).layer_spec().head_dim
    8
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    reach: Reach
    rotary: Any = None
    softcap: float | None = None
    scale: float | None = None
    implementation: str = "auto"

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
                "every kv head serves as many query heads"
            )
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap={self.softcap}: it bounds the scores, so it is above 0; None turns it off")
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
        )

    def check_call(self, x: Any, layer: Any, step: Any, positions: Any, spans: Any) -> None:
        """Raises ValueError if the arguments of a module's call don't belong together or to this module."""
        _check_input("x", x)
        if layer is None and step is None:
            return
        if step is None and _is_array(layer):
            raise ValueError(
                f"the second argument is {layer.dtype}{layer.shape}, an array; with a cache it is a layer. No mask is "
                "passed: the reach says who sees whom, and without a cache, by name, attn(x, positions=positions, "
                "spans=spans). Keys and values of other inputs than x are for CrossAttention"
            )
        if not isinstance(layer, Layer) or step is None:
            given = f"layer is a {type(layer).__name__}, step is a {type(step).__name__}"
            raise ValueError(
                f"{given}; with a cache call attn(x, layer, step), both from it: cache, step = cache.begin(positions), "
                "layer = cache.layers[i]. Without a cache give positions by name: attn(x, positions=positions)"
            )
        if positions is not None or spans is not None:
            raise ValueError(
                "positions and spans are given to cache.begin(positions, spans=spans); the step carries them, so "
                "attn(x, layer, step) takes neither"
            )
        if x.shape[:2] != step.positions.shape:
            raise ValueError(
                f"x has [B, T] = {x.shape[:2]}, the step was begun for {step.positions.shape}; they must agree"
            )
        self._check_layer(layer)

    def check_cross_call(self, x: Any, layer: Any, step: Any, encoded: Any) -> None:
        """Raises ValueError if the arguments of a cross-attention's call don't belong together or to this module."""
        _check_input("x", x)
        if encoded is None:
            if step is None and _is_array(layer):
                raise ValueError(
                    f"the second argument is {layer.dtype}{layer.shape}, an array; with a cache it is a layer. Give "
                    "an encoder's output by name, attn(x, encoded=encoded, encoded_lengths=lengths); no mask is passed"
                )
            if not isinstance(layer, Layer) or step is None:
                raise ValueError(
                    f"layer is a {type(layer).__name__}, step is a {type(step).__name__}; with a cache call "
                    "attn(x, layer, step), both from it: cache, step = cache.begin(positions), layer = "
                    "cache.layers[i]; without one attn(x, encoded=encoded)"
                )
            self._check_layer(layer)
        elif layer is not None or step is not None:
            raise ValueError(
                "encoded was given, and a layer or step too; with a cache the encoder's output goes in once, "
                "layer = attn.write(encoded, layer, step), and attn(x, layer, step) reads it from there"
            )
        else:
            self.check_encoded(encoded)
            if encoded.shape[0] != x.shape[0]:
                raise ValueError(f"encoded has {encoded.shape[0]} batch rows, x has {x.shape[0]}; they must agree")

    def check_encoded(self, encoded: Any, layer: Any = None) -> None:
        """Raises ValueError unless `encoded` is an encoder's output that the reach, and the layer, can hold."""
        _check_input("encoded", encoded)
        if layer is not None:
            self._check_layer(layer)
        size = self.reach.size
        if size is not None and encoded.shape[1] > size:
            raise ValueError(
                f"encoded has {encoded.shape[1]} places, this module was made for size={size} at most; give it a "
                "larger size"
            )

    def _check_layer(self, layer: Any) -> None:
        mine = self.layer_spec(layer.spec.k_storage, layer.spec.v_storage)
        for name in ("reach", "num_kv_heads", "head_dim", "value_dim", "rotary"):
            here, there = getattr(mine, name), getattr(layer.spec, name)
            if here != there:
                raise ValueError(
                    f"the layer was made for {name}={there}, this module has {name}={here}; make the cache from the "
                    "modules: Cache.init([attn.layer_spec(), ...], ...)"
                )

    def attend(
        self, q: Any, k: Any, v: Any, layer: Any, step: Any, *, positions: Any, spans: Any, sink_logits: Any
    ) -> tuple[Any, Any]:
        """Returns what the heads read, [B, T, N, H], and the layer after its put (None without a cache).

        Args:
          q: [B, T, N, H], not yet rotated.
          k, v: [B, T, K, H], not yet rotated.
          layer, step: both or neither.
          positions: int32 [B, T] or None (0, 1, 2, ...); without a layer only.
          spans: int32 [B, T] or None; without a layer only.
          sink_logits: float [N] or None.
        """
        rest = {
            "scale": self.scale,
            "softcap": self.softcap,
            "sink_logits": sink_logits,
            "implementation": self.implementation,
        }
        if layer is not None:
            q, k = self._rotate(q, k, step.positions)
            layer = layer.put(step, k, v)
            return attend(q, layer, step, **rest), layer
        if self.rotary is not None:
            there = jnp.arange(q.shape[1], dtype=jnp.int32)[None, :] if positions is None else positions
            q, k = self._rotate(q, k, there)
        return self_attend(q, k, v, reach=self.reach, positions=positions, spans=spans, **rest), None

    def cross_attend(self, q: Any, layer: Any, step: Any, k: Any, v: Any, *, lengths: Any) -> Any:
        """Returns what the heads read of an encoder's output: [B, T, N, H].

        Args:
          q: [B, T, N, H].
          layer, step: where the output was put; or None, and instead
          k, v: [B, S, K, H];
          lengths: int [B] or None, how many keys are real.
        """
        rest: Any = {"scale": self.scale, "softcap": self.softcap, "implementation": self.implementation}
        if layer is not None:
            return attend(q, layer, step, **rest)
        return cross_attend(q, k, v, lengths=lengths, **rest)

    def own_cache(
        self, num_rows: int, capacity: int, dtype: Any, k_storage: Any = None, v_storage: Any = None, **options: Any
    ) -> Cache:
        """Returns an empty cache of this one layer, for a module that hides it."""
        if self.reach.size is None and options.get("max_block") is None:
            options["max_block"] = capacity
        return Cache.init([self.layer_spec(k_storage, v_storage, dtype)], num_rows, capacity, **options)

    def begin(self, cache: Cache, x: Any, positions: Any, spans: Any) -> tuple[Cache, Any]:
        """Returns (cache, step) for x [B, T, D] in a hidden cache; positions None continues every row."""
        if x.ndim != 3 or x.shape[0] != cache.num_rows:
            raise ValueError(
                f"x has shape {x.shape}, the module's own cache has {cache.num_rows} rows; give x [B, T, D] with as "
                "many batch rows, or make a cache of that size"
            )
        if positions is None:
            positions = cache.lengths[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)[None, :]
        return cache.begin(positions, spans=spans)

    def _rotate(self, q: Any, k: Any, positions: Any) -> tuple[Any, Any]:
        if self.rotary is None:
            return q, k
        positions = positions[:, :, None, None]
        return self.rotary.rotate(q, positions), self.rotary.rotate(k, positions)


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _check_input(name: str, x: Any) -> None:
    if getattr(x, "ndim", None) != 3 or not jnp.issubdtype(x.dtype, jnp.floating):
        what = f"{x.dtype}{x.shape}" if hasattr(x, "shape") else type(x).__name__
        raise ValueError(f"{name} is {what}; attention wants floating numbers [B, T, D]: a batch of sequences")


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


def rms_norm(x: Any, scale: Any, epsilon: float) -> Any:
    """Returns x divided by its root mean square along the last axis, times `scale`, computed in float32.

    Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467.

    Args:
      x: [..., H], any floating dtype.
      scale: [H].
      epsilon: added to the mean square.

    Returns:
      x's shape and dtype.

    >>> rms_norm(jnp.array([[3.0, 3.0]]), jnp.ones(2), 0.0).tolist()
    [[1.0, 1.0]]
    """
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + jnp.float32(epsilon))
    return (y * scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)
