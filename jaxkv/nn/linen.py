"""Attention for `flax.linen`, with or without a cache, and the way from a model to the function `generate` wants."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxkv.cache.cache import Cache
from jaxkv.cache.spec import Cross, Full, LayerSpec, Reach
from jaxkv.kinds import kind_of
from jaxkv.meshes import forward
from jaxkv.nn import dropout
from jaxkv.nn.arguments import check_call, check_kv
from jaxkv.nn.heads import PROJECTIONS, Heads, QueryTemperature, biased, qk_scale
from jaxkv.nn.latent_linen import LatentAttention as LatentAttention
from jaxkv.nn.module import CROSS, OPTIONS, SIZES, AttentionModule, CrossAttentionModule
from jaxkv.nn.own_linen import OwnCache, returned
from jaxkv.nn.porting import attention_params as attention_params
from jaxkv.nn.product import dot_general
from jaxkv.nn.recurrent_linen import GatedDelta as GatedDelta
from jaxkv.nn.recurrent_linen import Mamba2 as Mamba2
from jaxkv.nn.recurrent_linen import Scale
from jaxkv.nn.recurrent_linen import ShortConv as ShortConv


class Attention(OwnCache, AttentionModule, nn.Module):
    __doc__ = f"""Causal self-attention over a cache layer, or, without one, over its own input.

    With the default arguments the parameters are those of `flax.linen.MultiHeadDotProductAttention`, so its checkpoints
    load unchanged and give the numbers that it gives under a causal mask. Dropout draws from the stream "dropout".

    Attributes:
      num_heads: query heads N.
      in_features: size D of the input; None takes it from the input.
      {SIZES}
      {OPTIONS}
      decode: whether calls read and write the module's own cache, see `__call__`.
      cache_capacity: tokens a sequence of that cache can hold; None takes the length of the input of `init`.

    Raises:
      ValueError: when called, for sizes that don't fit together, naming both.

    >>> attn = jaxkv.linen.Attention(num_heads=2, head_dim=4, rotary=jaxkv.Rotary())
    >>> x = jnp.ones((1, 3, 8))
    >>> variables = attn.init(jax.random.key(0), x)
    >>> y = attn.apply(variables, x)                                           # training
    >>> cache = jaxkv.Cache.init([attn.layer_spec()], num_rows=1, capacity=16)
    >>> cache, step = cache.begin(jnp.arange(3)[None])
    >>> z, layer = attn.apply(variables, x, cache.layers[0], step)
    >>> cache = cache.with_layers([layer])
    >>> bool(jnp.allclose(y, z, atol=1e-6))
    True
    """

    num_heads: int
    in_features: int | None = None
    qkv_features: int | None = None
    out_features: int | None = None
    num_kv_heads: int | None = None
    _: dataclasses.KW_ONLY
    head_dim: int | None = None
    reach: Reach = Full()
    shares: int | None = None
    rotary: Any = None
    qk_norm: bool | str = False
    qk_norm_epsilon: float = 1e-6
    value_norm: bool = False
    tied_values: bool = False
    softcap: float | None = None
    scale: float | None = None
    temperature: QueryTemperature | None = None
    gated: bool = False
    sink_logits: bool = False
    use_bias: bool | Collection[str] = True
    dropout_rate: float = 0.0
    broadcast_dropout: bool = True
    deterministic: bool | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Any = nn.linear.default_kernel_init
    out_kernel_init: Any = None
    bias_init: Any = nn.initializers.zeros_init()
    out_bias_init: Any = None
    implementation: str = "auto"
    decode: bool = False
    cache_capacity: int | None = None

    @nn.compact
    def __call__(
        self,
        x: Any,
        layer: Any = None,
        step: Any = None,
        *,
        kv: Any = None,
        return_kv: bool = False,
        positions: Any = None,
        spans: Any = None,
        deterministic: bool | None = None,
        dropout_rng: Any = None,
        decode: bool | None = None,
    ) -> Any:
        """Returns attention over the layer after storing the call's tokens in it, or over x itself without a layer.

        With `decode` the module keeps a cache of its own as variable "kv" of the collection "cache", one token or a
        whole prompt at a time, as far as `cache_capacity`. It is made on the first call, with as many rows as x, or by
        `init`, which does not write to it. For quick use of single modules; a model does better with one cache for all
        its layers, given to the call.

        Args:
          x: [B, T, D], floating.
          layer: None, or this module's layer of a cache, made from `layer_spec()`; for a module that shares, the layer
            that it shares, as that one's module returned it.
          step: None, or the step of this forward pass from `cache.begin`.
          kv: without a layer, for a module that shares: what the module of the layer that it shares returned.
          return_kv: without a layer: whether to return keys and values too, for modules that share them.
          positions: without a layer: int32 [B, T], EMPTY for padding; None means 0, 1, 2, ... in every row, or with
            `decode` that every row continues where it ended.
          spans: without a layer: int32 [B, T]; tokens of the same span other than 0 see each other in both directions.
          deterministic: without a layer: overrides the attribute of this name; False for dropout.
          dropout_rng: without a layer: the key of the dropout, instead of `make_rng("dropout")`.
          decode: overrides the attribute of this name.

        Returns:
          y [B, T, out_features]; with a layer (y, the layer with the call's tokens); with return_kv (y, (k, v)), keys
          [B, T, K, H], rotated, and values [B, T, K, H].

        Raises:
          ValueError: while tracing, for shapes that don't fit, a layer that was not made for this module, or `decode`
            without a capacity.

        >>> attn = jaxkv.linen.Attention(num_heads=2, cache_capacity=16)
        >>> x = jnp.ones((1, 3, 8))
        >>> variables = attn.init(jax.random.key(0), x)
        >>> y, state = attn.apply(variables, x, decode=True, mutable=["cache"])
        >>> y, state = attn.apply(variables | state, x[:, :1], decode=True, mutable=["cache"])
        >>> state["cache"]["kv"].lengths
        Array([4], dtype=int32)
        """
        heads = self._heads(x.shape[-1])
        check_call(heads, x, layer, step, positions, spans)
        check_kv(heads, x, layer, kv, return_kv)
        hidden = self._hidden(x, layer, positions, spans, decode)
        if hidden is not None:
            layer, step, positions, spans = hidden.layer, hidden.step, None, None
        out_features = x.shape[-1] if self.out_features is None else self.out_features
        linear = {name: functools.partial(_projection, self, heads, out_features, name) for name in PROJECTIONS}
        q, k, v = linear["query"](name="query")(x), None, None
        if self.shares is None:
            k, v = linear["key"](name="key")(x), None if self.tied_values else linear["value"](name="value")(x)
            k, v = self._keys_and_values(k, v, _scale(self, heads, heads.num_kv_heads, "key_norm"))
        q, gate = self._ungated(q)
        q = self._normed(q, _scale(self, heads, heads.num_heads, "query_norm"))
        sinks = None
        if self.sink_logits:
            sinks = self.param("sink_logits", nn.initializers.zeros_init(), (heads.num_heads,), self.param_dtype)
        key = dropout.key_of_call(self, layer, deterministic, functools.partial(dropout.draw_linen, self, dropout_rng))
        rest = {"kv": kv, "positions": positions, "spans": spans, "sink_logits": sinks, "dropout_key": key}
        y, kept = heads.attend(q, k, v, layer, step, **rest)
        y = linear["out"](name="out")(y if gate is None else y * gate)
        return returned(y, kept if layer is not None or return_kv else None, hidden)

    def _heads(self, features: int | None = None) -> Heads:
        if self.in_features is not None and features is not None and features != self.in_features:
            raise ValueError(f"x has {features} features, this module was made for in_features={self.in_features}")
        features = self.in_features if features is None else features
        return Heads.choose(
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.qkv_features,
            features,
            reach=self.reach,
            shares=self.shares,
            rotary=self.rotary,
            softcap=self.softcap,
            scale=self.scale,
            temperature=self.temperature,
            implementation=self.implementation,
            dropout_rate=self.dropout_rate,
            broadcast_dropout=self.broadcast_dropout,
        )

    def _own_spec(self, x: Any) -> LayerSpec:  # in_features may be that of the input
        return self._heads(x.shape[-1]).layer_spec(dtype=self._kept_dtype)


class CrossAttention(CrossAttentionModule, nn.Module):
    __doc__ = f"""Attention over an encoder's output, in a cache layer or, without one, as an argument of the call.

    Every query sees all of its row's output, whatever its position. With a cache the output goes in once, by `write`;
    afterwards `attn(x, layer, step)` reads it in every forward pass. With the default arguments the parameters, and the
    numbers, are those of `flax.linen.MultiHeadDotProductAttention` called with (x, encoded).

    Attributes:
      {CROSS}

    Raises:
      ValueError: when called, for sizes that don't fit together, naming both.

    >>> attn = jaxkv.linen.CrossAttention(num_heads=2, in_features=8, encoded_features=6, size=10)
    >>> x, encoded = jnp.ones((1, 3, 8)), jnp.ones((1, 10, 6))
    >>> variables = attn.init(jax.random.key(0), x, encoded=encoded)
    >>> y = attn.apply(variables, x, encoded=encoded)                          # training
    >>> cache = jaxkv.Cache.init([attn.layer_spec()], num_rows=1, capacity=16)
    >>> cache, step = cache.begin_cross(jnp.array([10]))                       # once
    >>> layer = attn.apply(variables, encoded, cache.layers[0], step, method="write")
    >>> cache, step = cache.with_layers([layer]).begin(jnp.arange(3)[None])    # every forward pass
    >>> bool(jnp.allclose(attn.apply(variables, x, cache.layers[0], step), y, atol=1e-6))
    True
    """

    num_heads: int
    in_features: int
    encoded_features: int | None = None
    qkv_features: int | None = None
    out_features: int | None = None
    num_kv_heads: int | None = None
    _: dataclasses.KW_ONLY
    size: int
    head_dim: int | None = None
    qk_norm: bool | str = False
    qk_norm_epsilon: float = 1e-6
    softcap: float | None = None
    scale: float | None = None
    use_bias: bool | Collection[str] = True
    dropout_rate: float = 0.0
    broadcast_dropout: bool = True
    deterministic: bool | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Any = nn.linear.default_kernel_init
    out_kernel_init: Any = None
    bias_init: Any = nn.initializers.zeros_init()
    out_bias_init: Any = None
    implementation: str = "auto"

    def setup(self) -> None:
        heads = self._heads()
        out_features = self.in_features if self.out_features is None else self.out_features
        self.query, self.key, self.value, self.out = (
            _projection(self, heads, out_features, name) for name in PROJECTIONS
        )
        self.query_norm, self.key_norm = (_scale(self, heads, count) for count in (heads.num_heads, heads.num_kv_heads))

    def __call__(
        self,
        x: Any,
        layer: Any = None,
        step: Any = None,
        *,
        encoded: Any = None,
        encoded_lengths: Any = None,
        deterministic: bool | None = None,
        dropout_rng: Any = None,
    ) -> Any:
        """Returns attention over what was written into the layer, or over `encoded` without a layer.

        Args:
          x, layer, step, encoded, encoded_lengths: as in `jaxkv.nnx.CrossAttention`.
          deterministic: without a layer: overrides the attribute of this name; False for dropout.
          dropout_rng: without a layer: the key of the dropout, instead of `make_rng("dropout")`.

        Returns:
          [B, T, out_features]; the layer stays as it is.

        Raises:
          ValueError: while tracing, for shapes that don't fit, or a layer that was not made for this module.
        """
        key = dropout.key_of_call(self, layer, deterministic, functools.partial(dropout.draw_linen, self, dropout_rng))
        y = self._read(x, layer, step, encoded, encoded_lengths, key)
        if encoded is None and self.is_initializing():  # what `write` needs is made here too
            features = self.in_features if self.encoded_features is None else self.encoded_features
            self._project(jnp.zeros((1, 1, features), x.dtype))
        return y

    def _heads(self) -> Heads:
        return Heads.choose(
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.qkv_features,
            self.in_features,
            reach=Cross(self.size),
            softcap=self.softcap,
            scale=self.scale,
            implementation=self.implementation,
            dropout_rate=self.dropout_rate,
            broadcast_dropout=self.broadcast_dropout,
        )


def _projection(module: Any, heads: Heads, out_features: int, which: str, **name: Any) -> Any:
    """Returns one of the projections of an attention module, as its attributes say."""
    kernel_init, bias_init = module.kernel_init, module.bias_init
    features: Any = (heads.num_kv_heads, heads.head_dim)
    if which == "query":
        features = heads.num_heads, heads.head_dim * (1 + module.gated)
    if which == "out":
        features = out_features
        kernel_init = kernel_init if module.out_kernel_init is None else module.out_kernel_init
        bias_init = bias_init if module.out_bias_init is None else module.out_bias_init
    return nn.DenseGeneral(
        features,
        axis=(-2, -1) if which == "out" else -1,
        use_bias=which in biased(module.use_bias),
        dot_general=dot_general,
        kernel_init=_named(kernel_init),
        bias_init=_named(bias_init),
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        precision=module.precision,
        **name,
    )


def _named(init: Any) -> Any:
    """Returns an initializer whose sharding annotation survives `nn.DenseGeneral` under `jax.set_mesh`.

    DenseGeneral initializes a flat kernel and reshapes it, and in between its annotation, which names the axes of the
    whole kernel, would be applied to the flat one: an error in every Flax that is supported.
    """

    def named(key: Any, shape: Any, dtype: Any) -> Any:
        box = init(key, shape, dtype)
        return _Flat(box) if isinstance(box, nn.meta.AxisMetadata) else box

    return named


@dataclasses.dataclass(frozen=True)
class _Flat(nn.meta.AxisMetadata[Any]):
    """An annotated array on its way to its shape: taken out as it is, put back into its own annotation."""

    box: Any

    def unbox(self) -> Any:
        (x,) = jax.tree.leaves(self.box)
        return x

    def replace_boxed(self, val: Any) -> Any:
        return jax.tree.map(lambda _: val, self.box)

    def add_axis(self, index: int, params: Any) -> Any:
        return _Flat(self.box.add_axis(index, params))

    def remove_axis(self, index: int, params: Any) -> Any:
        return _Flat(self.box.remove_axis(index, params))


def _scale(module: Any, heads: Heads, count: int, name: str | None = None) -> Any:
    """Returns the module of the scale of q or k, with `count` heads; None if there is none to learn."""
    shape = qk_scale(module.qk_norm, count, heads.head_dim)
    return None if shape is None else Scale(shape, module.param_dtype, name=name)


@dataclasses.dataclass(frozen=True)
class Forward:
    """A model without its arrays: `forward(params, tokens, positions, cache) -> (logits, cache)`. Hashable."""

    module: nn.Module

    def __call__(
        self, params: Any, tokens: Any, positions: Any, cache: Cache, parents: Any = None
    ) -> tuple[Any, Cache]:
        """Returns logits and the cache after the call's tokens.

        Args:
          params: `variables["params"]` of the module.
          tokens: int32 [B, T].
          positions: int32 [B, T], EMPTY for padding.
          cache: what the tokens continue.
          parents: int32 [B, T], of a tree of tokens, see `Cache.begin`; the model gets it by name. None: no tree.

        Raises:
          ValueError: for all the variables instead of the parameters alone.
        """
        if "params" in params:
            raise ValueError("params holds a collection 'params'; give the parameters alone: variables['params']")

        def call(params: Any, *args: Any, **tree: Any) -> Any:
            return self.module.apply({"params": params}, *args, **tree)

        return forward(call, params, tokens, positions, cache, parents)

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self.module)

    def __hash__(self) -> int:  # remembered: a module hashes all its fields, and jit asks at every call
        return self._hash


def functional(module: nn.Module) -> Forward:
    """Returns forward(params, tokens, positions, cache), as `jaxkv.generate` wants it: `module.apply`, hashable.

    Args:
      module: any linen module that is called as `module(tokens, positions, cache) -> (logits, cache)`; its fields must
        be hashable for it to be a static argument of `jax.jit`.

    Raises:
      TypeError: if module is not a linen module.
      ValueError: if a field is not hashable, naming it: a list, a dict, an array, a dataclass that is not frozen.

    >>> from flax import linen as nn
    >>> class Model(nn.Module):
    ...     def setup(self):
    ...         self.embed = nn.Embed(5, 8)
    ...         self.attn = jaxkv.linen.Attention(2, 8)
    ...     def __call__(self, tokens, positions, cache):
    ...         cache, step = cache.begin(positions)
    ...         y, layer = self.attn(self.embed(tokens), cache.layers[0], step)
    ...         return self.embed.attend(y), cache.with_layers([layer])
    >>> forward = jaxkv.linen.functional(Model())
    >>> spec = jaxkv.linen.Attention(2, 8).layer_spec()
    >>> cache = jaxkv.Cache.init([spec], num_rows=1, capacity=16)
    >>> tokens, positions = jnp.array([[1, 2]]), jnp.array([[0, 1]])
    >>> params = Model().init(jax.random.key(0), tokens, positions, cache)["params"]
    >>> logits, cache = jax.jit(forward)(params, tokens, positions, cache)
    >>> logits.shape
    (1, 2, 5)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"functional needs a flax.linen module, got a {type(module).__name__}")
    if not _is_hashable(module):
        name, value = _unhashable(type(module).__name__, module)
        raise ValueError(
            f"{name} is {kind_of(value)}, which can't be hashed, so the module can't be a static argument of "
            "jax.jit; make a config a frozen dataclass, @dataclasses.dataclass(frozen=True), and a list a tuple"
        )
    return Forward(module)


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _unhashable(name: str, value: Any) -> tuple[str, Any]:
    """Returns the part of a value that can't be hashed that is to blame for it, with its name."""
    parts: list[tuple[str, Any]] = []
    if type(value).__hash__ is None:  # whatever is in it
        return name, value
    if dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value) if field.name != "parent"]
        parts = [(f"{name}.{field}", getattr(value, field)) for field in fields]
    elif isinstance(value, tuple):
        parts = [(f"{name}[{i}]", part) for i, part in enumerate(value)]
    elif isinstance(value, Mapping):
        parts = [(f"{name}[{key!r}]", part) for key, part in value.items()]
    return next((_unhashable(*part) for part in parts if not _is_hashable(part[1])), (name, value))
