"""Storage: how the numbers of a key or a value are kept."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Dense:
    """Keeps numbers as they are, in one dtype.

    Args:
      dtype: what is stored; keys and values are cast to it when they are put. Any floating dtype, or an integer dtype
        for keys and values that are integers of at most its width already.

    Raises:
      ValueError: for a dtype that is neither floating nor integer.

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
        object.__setattr__(self, "dtype", dtype)

    def __repr__(self) -> str:
        return f"Dense({self.dtype.name!r})"

    def zeros(self, lead: tuple[int, ...], size: int) -> Any:
        """Returns what is allocated for vectors of `size` numbers: a pytree of arrays, here one [*lead, size]."""
        return jnp.zeros((*lead, size), self.dtype)

    def encode(self, x: Any) -> Any:
        """Returns x [..., H] as it is stored: the pytree of `zeros`, with the leading axes of x."""
        if jnp.issubdtype(self.dtype, jnp.integer) and not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(
                f"{x.dtype} numbers would be cut to {self.dtype} by {self}; store them with Dense({x.dtype.name!r})"
            )
        return x.astype(self.dtype)

    def decode(self, stored: Any) -> Any:
        """Returns the numbers [..., H] that `encode` stored."""
        return stored
