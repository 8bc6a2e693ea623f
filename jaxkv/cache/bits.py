"""Numbers that lie in a buffer as bits, in unsigned integers.

XLA writes small floats into a buffer by widening all of it: a loop that puts one token pays for the whole capacity.
Unsigned integers are written in place, if they are what goes into the compiled program and what comes out of it. So
floats of 8 bits, and bfloat16 where it has the same fault, lie there as bits; numbers of less than a byte are packed,
several per byte.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv.errors import NotSupportedError


def width(dtype: Any) -> int:
    """Returns how many bits a number of this dtype has."""
    return int((jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo)(dtype).bits)


def carrier(dtype: Any) -> Any:
    """Returns the dtype of the buffer that numbers of `dtype` lie in: itself, or uint8 or uint16 for their bits."""
    small_float = jnp.issubdtype(dtype, jnp.floating) and width(dtype) == 8
    if width(dtype) < 8 or small_float:
        return jnp.dtype("uint8")
    if dtype == jnp.bfloat16 and jax.default_backend() == "cpu" and jax.__version_info__ < (0, 12):
        return jnp.dtype("uint16")
    return dtype


def per_item(dtype: Any) -> int:
    """Returns how many numbers one item of the buffer holds."""
    return max(1, 8 // width(dtype))


def pack(x: Any) -> Any:
    """Returns numbers [..., H] as a buffer holds them: [..., ceil(H / per_item)].

    Raises:
      NotSupportedError: while tracing, if it is differentiated: bits have no gradient.
    """
    to, bits, count = carrier(x.dtype), width(x.dtype), per_item(x.dtype)
    if to == x.dtype:
        return x
    x = _bits(x)
    if count == 1:
        return x
    x = jnp.pad(x.astype(to), [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % count)])
    x = x.reshape(*x.shape[:-1], -1, count) << (bits * jnp.arange(count, dtype=to))[(None,) * x.ndim]
    return lax.reduce(x, to.type(0), lax.bitwise_or, (x.ndim - 1,))


def unpack(stored: Any, dtype: Any) -> Any:
    """Returns the numbers [..., H] that `pack` made this of; H is rounded up to whole items."""
    bits, count = width(dtype), per_item(dtype)
    if carrier(dtype) == dtype:
        return stored
    if count > 1:
        parts = stored[..., None] >> (bits * jnp.arange(count, dtype=stored.dtype))[(None,) * stored.ndim]
        stored = (parts & (2**bits - 1)).reshape(*stored.shape[:-1], -1)
    stored = stored.astype(f"uint{bits}")
    return stored if stored.dtype == dtype else lax.bitcast_convert_type(stored, dtype)


def without_gradient(x: Any, kept: str) -> Any:
    """Returns x; to differentiate it is a NotSupportedError that says how it is kept."""

    @jax.custom_jvp
    def same(x: Any) -> Any:
        return x

    @same.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise NotSupportedError(
            f"keys and values kept as {kept} are stored as bits, which have no gradient; differentiate with "
            "Dense('float32') or Dense('float16'), or stop the gradient before put: jax.lax.stop_gradient(k)"
        )

    return same(x)


def _bits(x: Any) -> Any:
    unsigned = jnp.dtype(f"uint{width(x.dtype)}")
    return x if x.dtype == unsigned else lax.bitcast_convert_type(without_gradient(x, x.dtype.name), unsigned)
