"""Storage: how the numbers of a key or a value are kept."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv.cache.bits import carrier, pack, per_item, unpack, width


@dataclasses.dataclass(frozen=True)
class Dense:
    """Keeps numbers as they are, in one dtype.

    Floats of 8 bits and less, and integers, saturate: what is beyond their range becomes the largest or the smallest
    number there is. 4-bit floats have no NaN and keep 0 for it. Gradients flow through float32, float64, float16, and
    bfloat16 but on CPUs with JAX before 0.12; with smaller floats differentiating is an error.

    Args:
      dtype: what is stored; keys and values are cast to it when they are put. Any floating dtype, or an integer dtype
        for keys and values that are integers already.

    Raises:
      ValueError: for a dtype that is neither floating nor integer, that JAX can't compute with, or that has no 0.

    >>> Dense("float16").dtype
    dtype('float16')
    """

    dtype: Any = "float32"

    def __post_init__(self) -> None:
        try:
            dtype = jnp.dtype(self.dtype)
        except TypeError as error:
            raise ValueError(f"Dense(dtype={self.dtype!r}): not a dtype; give for example 'float32'") from error
        if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
            raise ValueError(f"Dense(dtype={dtype}): keys and values are numbers; give a floating or an integer dtype")
        if width(dtype) not in (2, 4, 8, 16, 32, 64):
            raise ValueError(f"Dense(dtype={dtype}): JAX has no arrays of {width(dtype)} bits; give 'float8_e4m3fn'")
        if jnp.issubdtype(dtype, jnp.floating) and not float(jnp.finfo(dtype).min) < 0:
            raise ValueError(f"Dense(dtype={dtype}): it has neither 0 nor a sign; give for example 'float8_e4m3fn'")
        object.__setattr__(self, "dtype", dtype)

    def __repr__(self) -> str:
        return f"Dense({self.dtype.name!r})"

    def check(self, size: int) -> None:
        """Raises ValueError unless vectors of `size` numbers can be stored: every size can."""

    def zeros(self, lead: tuple[int, ...], size: int) -> Any:
        """Returns the empty storage for vectors of `size` numbers: a pytree of arrays, here one [*lead, items]."""
        return jnp.zeros((*lead, -(-size // per_item(self.dtype))), carrier(self.dtype))

    def encode(self, x: Any) -> Any:
        """Returns x [..., H] as it is stored: the pytree of `zeros`, with the leading axes of x."""
        if jnp.issubdtype(self.dtype, jnp.integer) and not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(
                f"{x.dtype} numbers would be cut to {self.dtype} by {self}; store them with Dense({x.dtype.name!r})"
            )
        return pack(self._saturate(x).astype(self.dtype))

    def decode(self, stored: Any) -> Any:
        """Returns the numbers [..., H] that `encode` stored, of `dtype`; H may be rounded up to whole bytes."""
        return unpack(stored, self.dtype)

    def pieces(self, stored: Any) -> tuple[tuple[Any, Any], ...]:
        """Returns the stored vectors in the form that matrix products need: in pieces, one after another.

        A piece is (numbers [..., h], factor [..., 1] or None): it stands for numbers * factor. With a factor, what is
        not finite is so in the factor alone.
        """
        return ((self.decode(stored), None),)

    def basis(self, x: Any) -> Any:
        """Returns x [..., H] in the basis in which `pieces` are, or from there in its own: here there is but one."""
        return x

    def _saturate(self, x: Any) -> Any:
        if x.dtype == self.dtype:
            return x
        if jnp.issubdtype(self.dtype, jnp.integer):
            mine, given = jnp.iinfo(self.dtype), jnp.iinfo(x.dtype)
            least, most = max(int(mine.min), int(given.min)), min(int(mine.max), int(given.max))
            return jnp.clip(x, least, most) if (least, most) != (int(given.min), int(given.max)) else x
        if width(self.dtype) > 8:
            return x
        x = x if jnp.issubdtype(x.dtype, jnp.floating) and width(x.dtype) > 8 else x.astype(jnp.float32)
        largest = float(jnp.finfo(self.dtype).max)
        return jnp.clip(x, -largest, largest)


def whole(pieces: Any) -> Any:
    """Returns the numbers [..., H] that pieces are, one after another: what lies in bits as float32."""
    parts = [numbers if factor is None else numbers.astype(factor.dtype) * factor for numbers, factor in pieces]
    return joined(*parts)


def joined(*parts: Any) -> Any:
    """Returns numbers [..., h] one after another: [..., H], in a dtype that holds them all."""
    if len(parts) == 1:
        return parts[0]
    dtypes = {x.dtype for x in parts}
    if len(dtypes) > 1:  # those of 8 bits and less have no dtype in common
        dtypes = {dtype if dtype.itemsize > 1 else jnp.dtype("float32") for dtype in dtypes}
    with jax.numpy_dtype_promotion("standard"):
        dtype = functools.reduce(jnp.promote_types, dtypes)
    return jnp.concatenate([x.astype(dtype) for x in parts], -1)
