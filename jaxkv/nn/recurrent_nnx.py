"""Recurrent layers for `flax.nnx`."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.linear import default_bias_init, default_kernel_init

from jaxkv.nn import gated_delta, mamba2, recurrence, short_conv
from jaxkv.nn.own_nnx import OwnCache
from jaxkv.nn.product import dot_general


class ConvKernel(nnx.Module):
    """The parameters of a convolution along each channel, named as Flax names them: `kernel` [W, 1, C], `bias` [C]."""

    def __init__(
        self,
        kernel_size: int,
        channels: int,
        *,
        use_bias: bool,
        param_dtype: Any = jnp.float32,
        kernel_init: Any = default_kernel_init,
        bias_init: Any = default_bias_init,
        rngs: nnx.Rngs,
    ) -> None:
        self.kernel = nnx.Param(kernel_init(rngs.params(), (kernel_size, 1, channels), param_dtype))
        self.bias = nnx.Param(bias_init(rngs.params(), (channels,), param_dtype)) if use_bias else nnx.data(None)

    def __call__(self) -> tuple[Any, Any]:
        """Returns the kernel and the bias or None."""
        return self.kernel[...], None if self.bias is None else self.bias[...]


class Scale(nnx.Module):
    """The learned scale of a norm. Parameter: `scale`, ones of a shape."""

    def __init__(self, shape: tuple[int, ...], *, param_dtype: Any = jnp.float32) -> None:
        self.scale = nnx.Param(jnp.ones(shape, param_dtype))

    def __call__(self) -> Any:
        """Returns the scale."""
        return self.scale[...]


class ShortConv(OwnCache, short_conv.ShortConvModule, nnx.Module):
    __doc__ = f"""A short convolution between two products, as in LFM2, that reads its past out of a cache layer.

    Parameters: `in_proj` of b, c and x, `conv`, `out_proj`.

    Args:
      {short_conv.ARGUMENTS}
      rngs: random streams of the parameters.

    Raises:
      ValueError: for a kernel size below 2.

    >>> from flax import nnx
    >>> conv = jaxkv.nnx.ShortConv(8, rngs=nnx.Rngs(0))
    >>> x = jnp.ones((1, 3, 8))
    >>> y = conv(x)                                                            # training
    >>> cache = jaxkv.Cache.init([conv.layer_spec()], num_rows=1, capacity=16)
    >>> cache, step = cache.begin(jnp.arange(3)[None])
    >>> z, layer = conv(x, cache.layers[0], step)
    >>> cache = cache.with_layers([layer])
    >>> bool(jnp.allclose(y, z, atol=1e-6))
    True
    """

    def __init__(
        self,
        in_features: int,
        kernel_size: int = 3,
        *,
        use_bias: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Any = default_kernel_init,
        bias_init: Any = default_bias_init,
        rngs: nnx.Rngs,
    ) -> None:
        self.in_features, self.kernel_size = in_features, kernel_size
        self.layer_spec()
        parameters = {"use_bias": use_bias, "param_dtype": param_dtype, "rngs": rngs}
        parameters |= {"kernel_init": kernel_init, "bias_init": bias_init}
        linear = {"dtype": dtype, "precision": precision, "dot_general": dot_general, **parameters}
        self.in_proj = nnx.Linear(in_features, 3 * in_features, **linear)
        self.conv = ConvKernel(kernel_size, in_features, **parameters)
        self.out_proj = nnx.Linear(in_features, in_features, **linear)

    def __call__(self, x: Any, layer: Any = None, step: Any = None, *, positions: Any = None) -> Any:
        self._check(x, layer, step, positions)
        y, layer = self._mix(self.in_proj(x), self.conv(), layer, step, positions)
        y = self.out_proj(y)
        return y if layer is None else (y, layer)

    __call__.__doc__ = recurrence.CALL


class GatedDelta(OwnCache, gated_delta.GatedDeltaModule, nnx.Module):
    __doc__ = f"""A gated delta layer, as in Qwen3-Next, that reads its past out of a cache layer.

    Parameters: `qkvz` and `ba`, projections for each key head; `conv`; `a_log` and `dt_bias`, how fast each value head
    fades; `norm`; `out`.

    Args:
      {gated_delta.ARGUMENTS}
      rngs: random streams of the parameters.

    Raises:
      ValueError: for sizes that don't fit together, naming both.

    >>> from flax import nnx
    >>> delta = jaxkv.nnx.GatedDelta(8, num_key_heads=1, num_value_heads=2, key_dim=4, value_dim=4, rngs=nnx.Rngs(0))
    >>> x = jnp.ones((1, 3, 8))
    >>> y = delta(x)                                                           # training
    >>> cache = jaxkv.Cache.init([delta.layer_spec()], num_rows=1, capacity=16)
    >>> cache, step = cache.begin(jnp.arange(3)[None])
    >>> z, layer = delta(x, cache.layers[0], step)
    >>> cache = cache.with_layers([layer])
    >>> bool(jnp.allclose(y, z, atol=1e-6))
    True
    """

    def __init__(
        self,
        in_features: int,
        *,
        num_key_heads: int,
        num_value_heads: int,
        key_dim: int,
        value_dim: int,
        kernel_size: int = 4,
        norm_epsilon: float = 1e-6,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Any = default_kernel_init,
        rngs: nnx.Rngs,
    ) -> None:
        self.in_features, self.kernel_size, self.norm_epsilon = in_features, kernel_size, norm_epsilon
        self.num_key_heads, self.num_value_heads = num_key_heads, num_value_heads
        self.key_dim, self.value_dim = key_dim, value_dim
        reach = self._reach(None, 0)
        parameters = {"use_bias": False, "param_dtype": param_dtype, "kernel_init": kernel_init, "rngs": rngs}
        linear = {"dtype": dtype, "precision": precision, "dot_general": dot_general, **parameters}
        self.qkvz, self.ba = (nnx.LinearGeneral(in_features, features, **linear) for features in self._projected)
        self.conv = ConvKernel(kernel_size, reach.tail[0], **parameters)  # type: ignore[index]
        self.a_log = nnx.Param(recurrence.decay_init(rngs.params(), (num_value_heads,), param_dtype))
        self.dt_bias = nnx.Param(jnp.ones((num_value_heads,), param_dtype))
        self.norm = Scale((value_dim,), param_dtype=param_dtype)
        self.out = nnx.LinearGeneral((num_value_heads, value_dim), in_features, axis=(-2, -1), **linear)

    def __call__(self, x: Any, layer: Any = None, step: Any = None, *, positions: Any = None) -> Any:
        self._check(x, layer, step, positions)
        weights = self.conv()[0], self.a_log[...], self.dt_bias[...]
        y, layer = self._mix(self.qkvz(x), self.ba(x), weights, self.norm(), layer, step, positions)
        y = self.out(y)
        return y if layer is None else (y, layer)

    __call__.__doc__ = recurrence.CALL


class Mamba2(OwnCache, mamba2.Mamba2Module, nnx.Module):
    __doc__ = f"""A Mamba-2 layer, as in Granite 4 and Bamba, that reads its past out of a cache layer.

    Parameters: `in_proj` of gate, values, keys and time steps; `conv`; `a_log`, `d` and `dt_bias` of each head; `norm`;
    `out_proj`.

    Args:
      {mamba2.ARGUMENTS}
      rngs: random streams of the parameters.

    Raises:
      ValueError: for sizes that don't fit together, naming both.

    >>> from flax import nnx
    >>> mamba = jaxkv.nnx.Mamba2(8, num_heads=4, head_dim=4, state_dim=8, rngs=nnx.Rngs(0))
    >>> x = jnp.ones((1, 3, 8))
    >>> y = mamba(x)                                                           # training
    >>> cache = jaxkv.Cache.init([mamba.layer_spec()], num_rows=1, capacity=16)
    >>> cache, step = cache.begin(jnp.arange(3)[None])
    >>> z, layer = mamba(x, cache.layers[0], step)
    >>> cache = cache.with_layers([layer])
    >>> bool(jnp.allclose(y, z, atol=1e-6))
    True
    """

    def __init__(
        self,
        in_features: int,
        *,
        num_heads: int,
        head_dim: int,
        state_dim: int,
        num_groups: int = 1,
        kernel_size: int = 4,
        norm_epsilon: float = 1e-6,
        use_bias: bool = False,
        conv_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Any = default_kernel_init,
        bias_init: Any = default_bias_init,
        rngs: nnx.Rngs,
    ) -> None:
        self.in_features, self.kernel_size, self.norm_epsilon = in_features, kernel_size, norm_epsilon
        self.num_heads, self.head_dim = num_heads, head_dim
        self.state_dim, self.num_groups = state_dim, num_groups
        self.layer_spec()
        parameters = {"param_dtype": param_dtype, "kernel_init": kernel_init, "bias_init": bias_init, "rngs": rngs}
        linear = {
            "dtype": dtype,
            "precision": precision,
            "dot_general": dot_general,
            "use_bias": use_bias,
            **parameters,
        }
        self.in_proj = nnx.Linear(in_features, self._inner + self._channels + num_heads, **linear)
        self.conv = ConvKernel(kernel_size, self._channels, use_bias=conv_bias, **parameters)
        self.a_log = nnx.Param(recurrence.decay_init(rngs.params(), (num_heads,), param_dtype))
        self.d = nnx.Param(jnp.ones((num_heads,), param_dtype))
        self.dt_bias = nnx.Param(jnp.ones((num_heads,), param_dtype))
        self.norm = Scale((self._inner,), param_dtype=param_dtype)
        self.out_proj = nnx.Linear(self._inner, in_features, **linear)

    def __call__(self, x: Any, layer: Any = None, step: Any = None, *, positions: Any = None) -> Any:
        self._check(x, layer, step, positions)
        weights = *self.conv(), self.a_log[...], self.d[...], self.dt_bias[...]
        y, layer = self._mix(self.in_proj(x), weights, self.norm(), layer, step, positions)
        y = self.out_proj(y)
        return y if layer is None else (y, layer)

    __call__.__doc__ = recurrence.CALL
