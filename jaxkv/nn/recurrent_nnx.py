"""Recurrent layers for `flax.nnx`."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.linear import default_bias_init, default_kernel_init

from jaxkv.meshes import dot_general
from jaxkv.nn import short_conv


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


class ShortConv(short_conv.ShortConvModule, nnx.Module):
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

    __call__.__doc__ = short_conv.CALL
