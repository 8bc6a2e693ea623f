"""Attention for `flax.nnx`, with or without a cache, and the way from a model to the function `generate` wants."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Collection
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.linear import default_bias_init, default_kernel_init

from jaxkv.cache.cache import Cache
from jaxkv.cache.spec import Cross, Full, Reach
from jaxkv.meshes import forward
from jaxkv.nn import dropout
from jaxkv.nn.arguments import check_call, check_kv
from jaxkv.nn.fuse import Joined, Transposed, with_rotation
from jaxkv.nn.fuse import fuse as fuse
from jaxkv.nn.heads import Heads, QueryTemperature, biased, qk_scale
from jaxkv.nn.latent_nnx import LatentAttention as LatentAttention
from jaxkv.nn.module import CROSS, OPTIONS, SIZES, AttentionModule, CrossAttentionModule
from jaxkv.nn.own_nnx import OwnCache
from jaxkv.nn.porting import attention_params as attention_params
from jaxkv.nn.product import dot_general
from jaxkv.nn.recurrent_nnx import GatedDelta as GatedDelta
from jaxkv.nn.recurrent_nnx import Mamba2 as Mamba2
from jaxkv.nn.recurrent_nnx import Scale
from jaxkv.nn.recurrent_nnx import ShortConv as ShortConv


class Attention(OwnCache, AttentionModule, nnx.Module):
    __doc__ = f"""Causal self-attention over a cache layer, or, without one, over its own input.

    With the default arguments the parameters are those of `flax.nnx.MultiHeadAttention`, so its checkpoints load
    unchanged and give the numbers that it gives under a causal mask.

    Args:
      num_heads: query heads N.
      in_features: size D of the input.
      {SIZES}
      {OPTIONS}
      rngs: random streams of the parameters, and of the dropout.
      keep_rngs: whether the module keeps a stream for its dropout; False: each call is given `rngs`.

    Raises:
      ValueError: for sizes that don't fit together, naming both.

    >>> from flax import nnx
    >>> attn = jaxkv.nnx.Attention(num_heads=2, in_features=8, rotary=jaxkv.Rotary(), rngs=nnx.Rngs(0))
    >>> x = jnp.ones((1, 3, 8))
    >>> y = attn(x)                                                            # training
    >>> cache = jaxkv.Cache.init([attn.layer_spec()], num_rows=1, capacity=16)
    >>> cache, step = cache.begin(jnp.arange(3)[None])
    >>> z, layer = attn(x, cache.layers[0], step)
    >>> cache = cache.with_layers([layer])
    >>> bool(jnp.allclose(y, z, atol=1e-6))
    True
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        reach: Reach = Full(),
        shares: int | None = None,
        rotary: Any = None,
        qk_norm: bool | str = False,
        qk_norm_epsilon: float = 1e-6,
        value_norm: bool = False,
        tied_values: bool = False,
        softcap: float | None = None,
        scale: float | None = None,
        temperature: QueryTemperature | None = None,
        gated: bool = False,
        sink_logits: bool = False,
        use_bias: bool | Collection[str] = True,
        dropout_rate: float = 0.0,
        broadcast_dropout: bool = True,
        deterministic: bool | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Any = default_kernel_init,
        out_kernel_init: Any = None,
        bias_init: Any = default_bias_init,
        out_bias_init: Any = None,
        implementation: str = "auto",
        rngs: nnx.Rngs,
        keep_rngs: bool = True,
    ) -> None:
        self.heads = Heads.choose(
            num_heads,
            num_kv_heads,
            head_dim,
            qkv_features,
            in_features,
            reach=reach,
            shares=shares,
            rotary=rotary,
            softcap=softcap,
            scale=scale,
            temperature=temperature,
            implementation=implementation,
            dropout_rate=dropout_rate,
            broadcast_dropout=broadcast_dropout,
        )
        self.in_features = in_features
        self.out_features = in_features if out_features is None else out_features
        self.gated = gated
        _fill(
            self,
            (in_features, in_features, self.out_features),
            biased(use_bias),
            (kernel_init, bias_init),
            (out_kernel_init or kernel_init, out_bias_init or bias_init),
            qk_norm,
            qk_norm_epsilon,
            deterministic,
            keep_rngs,
            tied_values=tied_values,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            rngs=rngs,
        )
        self.value_norm = value_norm
        self.sink_logits = nnx.Param(jnp.zeros((num_heads,), param_dtype)) if sink_logits else nnx.data(None)
        self.qkv: Joined | None = nnx.data(None)  # instead of query, key and value, after `fuse`

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
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> Any:
        """Returns attention over the layer after storing the call's tokens in it, or over x itself without a layer.

        Args:
          x: [B, T, D], floating.
          layer: None, or this module's layer of a cache, made from `layer_spec()`; for a module that shares, the layer
            that it shares, as that one's module returned it.
          step: None, or the step of this forward pass from `cache.begin`.
          kv: without a layer, for a module that shares: what the module of the layer that it shares returned.
          return_kv: without a layer: whether to return keys and values too, for modules that share them.
          positions: without a layer: int32 [B, T], EMPTY for padding; None means 0, 1, 2, ... in every row.
          spans: without a layer: int32 [B, T]; tokens of the same span other than 0 see each other in both directions.
          deterministic: without a layer: overrides the attribute of this name; False for dropout.
          rngs: without a layer: where dropout draws from, instead of the module's own stream.

        Returns:
          y [B, T, out_features]; with a layer (y, the layer with the call's tokens); with return_kv (y, (k, v)), keys
          [B, T, K, H], rotated, and values [B, T, K, H].

        Raises:
          ValueError: while tracing, for shapes that don't fit, or a layer that was not made for this module.
        """
        check_call(self.heads, x, layer, step, positions, spans)
        check_kv(self.heads, x, layer, kv, return_kv)
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x has {x.shape[-1]} features, this module was made for in_features={self.in_features}")
        q, k, v = self._projected(x)
        q, gate = self._ungated(q)
        q = self._normed(q, self.query_norm)
        if k is not None:
            k, v = self._keys_and_values(k, v, self.key_norm)
        sinks = None if self.sink_logits is None else self.sink_logits[...]
        key = dropout.key_of_call(self, layer, deterministic, functools.partial(dropout.draw_nnx, self, rngs))
        rest = {"kv": kv, "positions": positions, "spans": spans, "sink_logits": sinks, "dropout_key": key}
        y, kept = self.heads.attend(q, k, v, layer, step, **rest)
        y = self.out(y if gate is None else y * gate)
        return y if layer is None and not return_kv else (y, kept)

    def _projected(self, x: Any) -> tuple[Any, Any, Any]:
        """Returns what query, key and value give for x; None for one that the module doesn't have."""
        if self.qkv is not None:
            return (*self.qkv(x), None)[:3]
        q, k, v = (None if part is None else part(x) for part in (self.query, self.key, self.value))
        return q, k, v

    def rotate(self) -> None:
        """Puts the Hadamard rotation of stored numbers into the projections, where it can be. See `jaxkv.nnx.fuse`."""
        if not isinstance(self.out, Transposed) and not self.heads.rotated:
            with_rotation(self)

    def fuse(self) -> None:
        """Lays the weights out for decoding: query, key and value in one product. See `jaxkv.nnx.fuse`."""
        if not isinstance(self.out, Transposed):
            self.out = Transposed(self.out)
            if self.heads.shares is None:
                parts = [self.query, self.key, self.value]
                self.qkv = Joined([part for part in parts if part is not None])
                self.query = self.key = self.value = nnx.data(None)


class CrossAttention(CrossAttentionModule, nnx.Module):
    __doc__ = f"""Attention over an encoder's output, in a cache layer or, without one, as an argument of the call.

    Every query sees all of its row's output, whatever its position. With a cache the output goes in once, by `write`;
    afterwards `attn(x, layer, step)` reads it in every forward pass. With the default arguments the parameters, and the
    numbers, are those of `flax.nnx.MultiHeadAttention` called with (x, encoded).

    Args:
      {CROSS}
      rngs, keep_rngs: as in `Attention`.

    Raises:
      ValueError: for sizes that don't fit together, naming both.

    >>> from flax import nnx
    >>> attn = jaxkv.nnx.CrossAttention(num_heads=2, in_features=8, encoded_features=6, size=10, rngs=nnx.Rngs(0))
    >>> x, encoded = jnp.ones((1, 3, 8)), jnp.ones((1, 10, 6))
    >>> y = attn(x, encoded=encoded)                                           # training
    >>> cache = jaxkv.Cache.init([attn.layer_spec()], num_rows=1, capacity=16)
    >>> cache, step = cache.begin_cross(jnp.array([10]))                       # once
    >>> cache = cache.with_layers([attn.write(encoded, cache.layers[0], step)])
    >>> cache, step = cache.begin(jnp.arange(3)[None])                         # every forward pass
    >>> bool(jnp.allclose(attn(x, cache.layers[0], step), y, atol=1e-6))
    True
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        encoded_features: int | None = None,
        qkv_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        *,
        size: int,
        head_dim: int | None = None,
        qk_norm: bool | str = False,
        qk_norm_epsilon: float = 1e-6,
        softcap: float | None = None,
        scale: float | None = None,
        use_bias: bool | Collection[str] = True,
        dropout_rate: float = 0.0,
        broadcast_dropout: bool = True,
        deterministic: bool | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Any = default_kernel_init,
        out_kernel_init: Any = None,
        bias_init: Any = default_bias_init,
        out_bias_init: Any = None,
        implementation: str = "auto",
        rngs: nnx.Rngs,
        keep_rngs: bool = True,
    ) -> None:
        self.heads = Heads.choose(
            num_heads,
            num_kv_heads,
            head_dim,
            qkv_features,
            in_features,
            reach=Cross(size),
            softcap=softcap,
            scale=scale,
            implementation=implementation,
            dropout_rate=dropout_rate,
            broadcast_dropout=broadcast_dropout,
        )
        self.in_features = in_features
        self.encoded_features = in_features if encoded_features is None else encoded_features
        _fill(
            self,
            (in_features, self.encoded_features, in_features if out_features is None else out_features),
            biased(use_bias),
            (kernel_init, bias_init),
            (out_kernel_init or kernel_init, out_bias_init or bias_init),
            qk_norm,
            qk_norm_epsilon,
            deterministic,
            keep_rngs,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            rngs=rngs,
        )

    def __call__(
        self,
        x: Any,
        layer: Any = None,
        step: Any = None,
        *,
        encoded: Any = None,
        encoded_lengths: Any = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> Any:
        """Returns attention over what was written into the layer, or over `encoded` without a layer.

        Reading leaves the layer as it is, so it is not returned: hand on the one you gave.

        Args:
          x: [B, T, D], floating.
          layer: None, or this module's layer of a cache, made from `layer_spec()`.
          step: None, or the step of this forward pass from `cache.begin`.
          encoded: without a layer: the encoder's output, [B, S, encoded_features].
          encoded_lengths: without a layer: int [B], how many places of each row are real; None means all.
          deterministic: without a layer: overrides the attribute of this name; False for dropout.
          rngs: without a layer: where dropout draws from, instead of the module's own stream.

        Returns:
          [B, T, out_features]; zeros before the output projection where nothing was written.

        Raises:
          ValueError: while tracing, for shapes that don't fit, or a layer that was not made for this module.
        """
        key = dropout.key_of_call(self, layer, deterministic, functools.partial(dropout.draw_nnx, self, rngs))
        return self._read(x, layer, step, encoded, encoded_lengths, key)

    def rotate(self) -> None:
        """Puts the Hadamard rotation of stored numbers into the projections, where it can be. See `jaxkv.nnx.fuse`."""
        if not isinstance(self.out, Transposed) and not self.heads.rotated:
            with_rotation(self)

    def fuse(self) -> None:
        """Lays the weights out for decoding. See `jaxkv.nnx.fuse`."""
        if not isinstance(self.out, Transposed):
            self.out = Transposed(self.out)


def _fill(
    module: Any,
    features: tuple[int, int, int],
    with_bias: Collection[str],
    inner_inits: tuple[Any, Any],
    out_inits: tuple[Any, Any],
    qk_norm: bool | str,
    qk_norm_epsilon: float,
    deterministic: bool | None,
    keep_rngs: bool,
    *,
    tied_values: bool = False,
    **kind: Any,
) -> None:
    """Gives a module with `heads` its parameters and what else both kinds of attention have.

    Features are those of (queries, keys, output), inits (of the kernel, of the bias).
    """
    heads = module.heads

    def linear(features: Any, shape: Any, name: str, inits: tuple[Any, Any], **options: Any) -> Any:
        options |= {"kernel_init": inits[0], "bias_init": inits[1], "use_bias": name in with_bias}
        return nnx.LinearGeneral(features, shape, dot_general=dot_general, **options, **kind)

    queries, keys = ((count, heads.head_dim) for count in (heads.num_heads, heads.num_kv_heads))
    with_gate = heads.num_heads, heads.head_dim * (1 + module.gated)
    module.query = linear(features[0], with_gate, "query", inner_inits)
    own = heads.shares is None
    module.key = linear(features[1], keys, "key", inner_inits) if own else nnx.data(None)
    module.value = linear(features[1], keys, "value", inner_inits) if own and not tied_values else nnx.data(None)
    module.out = linear(queries, features[2], "out", out_inits, axis=(-2, -1))
    module.dtype, module.param_dtype = kind["dtype"], kind["param_dtype"]
    module.qk_norm, module.qk_norm_epsilon = qk_norm, qk_norm_epsilon
    for name, count in (("query_norm", heads.num_heads), ("key_norm", heads.num_kv_heads)):
        shape = qk_scale(qk_norm, count, heads.head_dim) if own or name == "query_norm" else None
        setattr(module, name, nnx.data(None) if shape is None else Scale(shape, param_dtype=module.param_dtype))
    module.dropout_rate, module.deterministic = heads.dropout_rate, deterministic
    module.rngs = kind["rngs"].dropout.fork() if keep_rngs and heads.dropout_rate else nnx.data(None)


@dataclasses.dataclass(frozen=True)
class Forward:
    """A model without its arrays: `forward(params, tokens, positions, cache) -> (logits, cache)`.

    Hashable, and equal for models of equal structure, so it serves as a static argument of `jax.jit`.
    """

    graphdef: Any = dataclasses.field(repr=False)

    def __call__(
        self, params: Any, tokens: Any, positions: Any, cache: Cache, parents: Any = None
    ) -> tuple[Any, Cache]:
        """Returns logits and the cache after the call's tokens.

        Args:
          params: what `functional` returned beside this, or an `nnx.State` of the same structure.
          tokens: int32 [B, T].
          positions: int32 [B, T], EMPTY for padding.
          cache: what the tokens continue.
          parents: int32 [B, T], of a tree of tokens, see `Cache.begin`; the model gets it by name. None: no tree.
        """

        def call(params: Any, *args: Any, **tree: Any) -> Any:
            return nnx.merge(self.graphdef, params)(*args, **tree)

        return forward(call, params, tokens, positions, cache, parents)

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self.graphdef)

    def __hash__(self) -> int:  # remembered: a graphdef hashes the whole model, and jit asks at every call
        return self._hash


def functional(model: nnx.Module) -> tuple[Forward, Any]:
    """Returns (forward, params): a model as a pure function and a plain tree, as `jaxkv.generate` wants them.

    Args:
      model: any nnx module that is called as `model(tokens, positions, cache) -> (logits, cache)`, in evaluation mode.

    Returns:
      forward, hashable and equal for models of equal structure; params, nested dicts of the model's arrays, shared with
      it (`nnx.update(model, params)` puts others back). Dicts pass through `jax.jit` much faster than modules do.

    Raises:
      TypeError: if model is not an nnx module.
      ValueError: if a module in it is in training mode, as BatchNorm, and Dropout of a rate above 0, are until
        `model.eval()`; or if it can't be called so.

    >>> from flax import nnx
    >>> class Model(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.embed = nnx.Embed(5, 8, rngs=rngs)
    ...         self.attn = jaxkv.nnx.Attention(2, 8, rngs=rngs)
    ...     def __call__(self, tokens, positions, cache):
    ...         cache, step = cache.begin(positions)
    ...         y, layer = self.attn(self.embed(tokens), cache.layers[0], step)
    ...         return self.embed.attend(y), cache.with_layers([layer])
    >>> model = Model(nnx.Rngs(0))
    >>> forward, params = jaxkv.nnx.functional(model)
    >>> cache = jaxkv.Cache.init([model.attn.layer_spec()], num_rows=1, capacity=16)
    >>> logits, cache = jax.jit(forward)(params, jnp.array([[1, 2]]), jnp.array([[0, 1]]), cache)
    >>> logits.shape
    (1, 2, 5)
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"functional needs a flax.nnx module, got a {type(model).__name__}")
    try:
        inspect.signature(model).bind(None, None, None)
    except TypeError:
        raise ValueError(
            f"a {type(model).__name__} can't be called with three arguments; jaxkv calls a model as "
            "model(tokens, positions, cache) and gets (logits, cache)"
        ) from None
    for path, module in nnx.iter_modules(model):
        drops = getattr(module, "dropout_rate", getattr(module, "rate", None)) != 0
        for name in ("deterministic", "use_running_average"):
            if drops and getattr(module, name, None) is False:
                raise ValueError(
                    f"{'.'.join(map(str, path)) or 'the model'}, a {type(module).__name__}, is in training mode "
                    f"({name}=False); call model.eval() before functional(model)"
                )
    graphdef, state = nnx.split(model)
    return Forward(graphdef), nnx.to_pure_dict(state)
