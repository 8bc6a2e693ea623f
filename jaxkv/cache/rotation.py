"""The Hadamard rotation: a change of basis that spreads outliers over all numbers of a vector before they are rounded.

QuaRot, Ashkboos et al. 2024, https://arxiv.org/abs/2404.00456. The matrix is symmetric and orthonormal: turning twice
gives back what there was, and products of rotated vectors are those of the vectors. So queries are rotated once per
call, instead of every key that they meet, and what was read of rotated values is rotated back once.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax


def hadamard(size: int) -> np.ndarray:
    """Returns Sylvester's matrix of signs, float32 [size, size], for a power of two; divided by sqrt(size) it rotates.

    >>> hadamard(2).tolist()
    [[1.0, 1.0], [1.0, -1.0]]
    """
    signs = np.ones((1, 1), np.float32)
    while len(signs) < size:
        signs = np.block([[signs, signs], [signs, -signs]])
    return signs


def rotate(x: Any) -> Any:
    """Returns vectors x [..., H] in the rotated basis, or, if they are in it, in their own.

    Where H is not a power of two it is cut into blocks of the largest one that divides it, each rotated by itself; an
    odd H is left as it is.

    Args:
      x: [..., H], floating.

    Returns:
      x's shape and dtype.

    >>> rotate(jnp.array([2.0, 0.0, 0.0, 0.0])).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    size = x.shape[-1] & -x.shape[-1]
    if size == 1:
        return x
    signs = jnp.asarray(hadamard(size), x.dtype)
    blocks = x.reshape(*x.shape[:-1], -1, size)
    turned = lax.dot_general(blocks, signs, (((blocks.ndim - 1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)
    return (turned * jnp.asarray(size**-0.5, x.dtype)).reshape(x.shape)
