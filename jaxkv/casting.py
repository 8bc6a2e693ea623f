"""Which values a dtype can't hold."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np


def unheld(array: Any, dtype: Any) -> Any:
    """Returns a value of an array that a dtype can't hold; None if it can hold all.

    Rounding floating numbers is not a loss; a finite number that would become infinite or NaN is one. Data are looked
    at only if their dtype has a wider range than the other one.

    Args:
      array: of bools, integers, floating or complex numbers.
      dtype: of the same kind, or one that holds its values: integers may become floating, and not the other way round.

    >>> unheld(np.array([1, 70_000]), "float16"), unheld(np.array([1, 2049]), "float16")
    (np.int64(70000), None)
    """
    dtype = jnp.dtype(dtype)
    if array.size == 0 or _holds(dtype, *_range(array.dtype)):
        return None
    array = np.asarray(array)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        both = (unheld(part, dtype) for part in (array.real, array.imag))
        return next((value for value in both if value is not None), None)
    # NumPy finds the extremes of narrow floats at a tenth of the speed.
    narrow = jnp.issubdtype(array.dtype, jnp.floating) and array.itemsize < 4
    wide = array.astype(np.float32) if narrow else array
    ends = wide.min(), wide.max()
    for value in ends:
        if math.isfinite(value) and not _holds(dtype, value, value):
            return value
    if all(map(math.isfinite, ends)):
        return None
    with np.errstate(all="ignore"):
        lost = wide[np.isfinite(wide) & ~np.isfinite(wide.astype(dtype))]
    return lost[0] if lost.size else None


def _holds(dtype: Any, low: Any, high: Any) -> bool:
    if _is_whole(dtype):
        least, most = _range(dtype)
        return int(low) >= least and int(high) <= most
    with np.errstate(all="ignore"):
        return bool(np.isfinite(np.array([float(low), float(high)]).astype(dtype)).all())


def _range(dtype: Any) -> tuple[Any, Any]:
    if dtype == jnp.bool_:
        return 0, 1
    info: Any = jnp.iinfo(dtype) if _is_whole(dtype) else jnp.finfo(dtype)
    return info.min, info.max


def _is_whole(dtype: Any) -> bool:
    return dtype == jnp.bool_ or jnp.issubdtype(dtype, jnp.integer)
