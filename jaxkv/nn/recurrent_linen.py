"""Recurrent layers for `flax.linen`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from jaxkv.nn import gated_delta, mamba2, recurrence, short_conv
from jaxkv.nn.own_linen import ATTRIBUTES, OwnCache, returned
from jaxkv.nn.product import dot_general

_CALL = recurrence.CALL.replace(
    "\n\n        Returns:",
    """
          decode: overrides the attribute of this name; as in `jaxkv.linen.Attention`.

        Returns:""",
)


class ConvKernel(nn.Module):
    """The parameters of a convolution along each channel, named as Flax names them: `kernel` [W, 1, C], `bias` [C]."""

    kernel_size: int
    channels: int
    _: dataclasses.KW_ONLY
    use_bias: bool
    param_dtype: Any = jnp.float32
    kernel_init: Any = nn.linear.default_kernel_init
    bias_init: Any = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self) -> tuple[Any, Any]:
        """Returns the kernel and the bias or None."""
        kernel = self.param("kernel", self.kernel_init, (self.kernel_size, 1, self.channels), self.param_dtype)
        if not self.use_bias:
            return kernel, None
        return kernel, self.param("bias", self.bias_init, (self.channels,), self.param_dtype)


class Scale(nn.Module):
    """The learned scale of a norm. Parameter: `scale`, ones of a shape."""

    shape: tuple[int, ...]
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self) -> Any:
        """Returns the scale."""
        return self.param("scale", nn.initializers.ones_init(), self.shape, self.param_dtype)


class ShortConv(OwnCache, short_conv.ShortConvModule, nn.Module):
    __doc__ = f"""A short convolution between two products, as in LFM2, that reads its past out of a cache layer.

    Parameters: `in_proj` of b, c and x, `conv`, `out_proj`.

    Attributes:
      {short_conv.ARGUMENTS}
      {ATTRIBUTES}

    Raises:
      ValueError: when called, for a kernel size below 2.

    >>> conv = jaxkv.linen.ShortConv(in_features=8)
    >>> x = jnp.ones((1, 3, 8))
    >>> variables = conv.init(jax.random.key(0), x)
    >>> y = conv.apply(variables, x)                                           # training
    >>> cache = jaxkv.Cache.init([conv.layer_spec()], num_rows=1, capacity=16)
    >>> cache, step = cache.begin(jnp.arange(3)[None])
    >>> z, layer = conv.apply(variables, x, cache.layers[0], step)
    >>> cache = cache.with_layers([layer])
    >>> bool(jnp.allclose(y, z, atol=1e-6))
    True
    """

    in_features: int
    kernel_size: int = 3
    _: dataclasses.KW_ONLY
    use_bias: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Any = nn.linear.default_kernel_init
    bias_init: Any = nn.initializers.zeros_init()
    decode: bool = False
    cache_capacity: int | None = None

    @nn.compact
    def __call__(
        self,
        x: Any,
        layer: Any = None,
        step: Any = None,
        *,
        positions: Any = None,
        decode: bool | None = None,
    ) -> Any:
        self._check(x, layer, step, positions)
        hidden = self._hidden(x, layer, positions, None, decode)
        if hidden is not None:
            layer, step, positions = hidden.layer, hidden.step, None
        parameters = {"use_bias": self.use_bias, "param_dtype": self.param_dtype}
        parameters |= {"kernel_init": self.kernel_init, "bias_init": self.bias_init}
        linear = {"dtype": self.dtype, "precision": self.precision, "dot_general": dot_general, **parameters}
        projected = nn.Dense(3 * self.in_features, name="in_proj", **linear)(x)
        weights = ConvKernel(self.kernel_size, self.in_features, name="conv", **parameters)()
        y, layer = self._mix(projected, weights, layer, step, positions)
        y = nn.Dense(self.in_features, name="out_proj", **linear)(y)
        return returned(y, layer, hidden)

    __call__.__doc__ = _CALL


class GatedDelta(OwnCache, gated_delta.GatedDeltaModule, nn.Module):
    __doc__ = f"""A gated delta layer, as in Qwen3-Next, that reads its past out of a cache layer.

    Parameters: `qkvz` and `ba`, projections for each key head; `conv`; `a_log` and `dt_bias`, how fast each value head
    fades; `norm`; `out`.

    Attributes:
      {gated_delta.ARGUMENTS}
      {ATTRIBUTES}

    Raises:
      ValueError: when called, for sizes that don't fit together, naming both.

    >>> delta = jaxkv.linen.GatedDelta(in_features=8, num_key_heads=1, num_value_heads=2, key_dim=4, value_dim=4)
    >>> x = jnp.ones((1, 3, 8))
    >>> variables = delta.init(jax.random.key(0), x)
    >>> delta.apply(variables, x).shape
    (1, 3, 8)
    """

    in_features: int
    _: dataclasses.KW_ONLY
    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    kernel_size: int = 4
    norm_epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Any = nn.linear.default_kernel_init
    decode: bool = False
    cache_capacity: int | None = None

    @nn.compact
    def __call__(
        self,
        x: Any,
        layer: Any = None,
        step: Any = None,
        *,
        positions: Any = None,
        decode: bool | None = None,
    ) -> Any:
        self._check(x, layer, step, positions)
        hidden = self._hidden(x, layer, positions, None, decode)
        if hidden is not None:
            layer, step, positions = hidden.layer, hidden.step, None
        reach = self._reach(None, 0)
        parameters = {"use_bias": False, "param_dtype": self.param_dtype, "kernel_init": self.kernel_init}
        linear = {"dtype": self.dtype, "precision": self.precision, "dot_general": dot_general, **parameters}
        qkvz, ba = (
            nn.DenseGeneral(features, name=name, **linear)(x)
            for name, features in zip(("qkvz", "ba"), self._projected, strict=True)
        )
        kernel, _ = ConvKernel(self.kernel_size, reach.tail[0], name="conv", **parameters)()  # type: ignore[index]
        heads = (self.num_value_heads,)
        a_log = self.param("a_log", recurrence.decay_init, heads, self.param_dtype)
        dt_bias = self.param("dt_bias", nn.initializers.ones_init(), heads, self.param_dtype)
        scale = Scale((self.value_dim,), self.param_dtype, name="norm")()
        y, layer = self._mix(qkvz, ba, (kernel, a_log, dt_bias), scale, layer, step, positions)
        y = nn.DenseGeneral(self.in_features, axis=(-2, -1), name="out", **linear)(y)
        return returned(y, layer, hidden)

    __call__.__doc__ = _CALL


class Mamba2(OwnCache, mamba2.Mamba2Module, nn.Module):
    __doc__ = f"""A Mamba-2 layer, as in Granite 4 and Bamba, that reads its past out of a cache layer.

    Parameters: `in_proj` of gate, values, keys and time steps; `conv`; `a_log`, `d` and `dt_bias` of each head; `norm`;
    `out_proj`.

    Attributes:
      {mamba2.ARGUMENTS}
      {ATTRIBUTES}

    Raises:
      ValueError: when called, for sizes that don't fit together, naming both.

    >>> mamba = jaxkv.linen.Mamba2(in_features=8, num_heads=4, head_dim=4, state_dim=8)
    >>> x = jnp.ones((1, 3, 8))
    >>> variables = mamba.init(jax.random.key(0), x)
    >>> mamba.apply(variables, x).shape
    (1, 3, 8)
    """

    in_features: int
    _: dataclasses.KW_ONLY
    num_heads: int
    head_dim: int
    state_dim: int
    num_groups: int = 1
    kernel_size: int = 4
    norm_epsilon: float = 1e-6
    use_bias: bool = False
    conv_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Any = nn.linear.default_kernel_init
    bias_init: Any = nn.initializers.zeros_init()
    decode: bool = False
    cache_capacity: int | None = None

    @nn.compact
    def __call__(
        self,
        x: Any,
        layer: Any = None,
        step: Any = None,
        *,
        positions: Any = None,
        decode: bool | None = None,
    ) -> Any:
        self._check(x, layer, step, positions)
        hidden = self._hidden(x, layer, positions, None, decode)
        if hidden is not None:
            layer, step, positions = hidden.layer, hidden.step, None
        inits = {"kernel_init": self.kernel_init, "bias_init": self.bias_init, "param_dtype": self.param_dtype}
        linear = {"dtype": self.dtype, "precision": self.precision, "dot_general": dot_general, **inits}
        linear["use_bias"] = self.use_bias
        projected = nn.Dense(self._inner + self._channels + self.num_heads, name="in_proj", **linear)(x)
        conv = ConvKernel(self.kernel_size, self._channels, use_bias=self.conv_bias, name="conv", **inits)()
        heads, ones = (self.num_heads,), nn.initializers.ones_init()
        a_log = self.param("a_log", recurrence.decay_init, heads, self.param_dtype)
        d, dt_bias = (self.param(name, ones, heads, self.param_dtype) for name in ("d", "dt_bias"))
        scale = Scale((self._inner,), self.param_dtype, name="norm")()
        y, layer = self._mix(projected, (*conv, a_log, d, dt_bias), scale, layer, step, positions)
        y = nn.Dense(self.in_features, name="out_proj", **linear)(y)
        return returned(y, layer, hidden)

    __call__.__doc__ = _CALL
