"""NumPy memory that XLA's CPU client reads in place: it copies what isn't aligned."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

_ALIGNMENT = 64  # bytes


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Returns a new array that is aligned; its values are whatever was there.

    >>> array = empty((3, 5), "int8")
    >>> array.shape, is_aligned(array), is_aligned(array[1:])
    ((3, 5), True, False)
    """
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    begin = -raw.ctypes.data % _ALIGNMENT
    return raw[begin : begin + nbytes].view(dtype).reshape(shape)


def is_aligned(array: np.ndarray) -> bool:
    """Returns whether an array is contiguous in C order, and begins where XLA wants it to."""
    return array.flags.c_contiguous and array.ctypes.data % _ALIGNMENT == 0
