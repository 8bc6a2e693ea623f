"""Few tokens times a matrix [out, in]: on a CPU as products that are summed, which reads the matrix once, as it lies.

XLA's CPU backend hands a matrix product of two tokens or more to a library, which first packs the matrix anew. For few
tokens that takes longer than the product: a step of four rows would take twice as long as one of a single row.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_FEW = 32  # tokens; from 64 on the matrix product is as fast
_LARGE = 2**16  # numbers of a matrix that is worth it


def product(x: Any, kernel: Any, precision: Any = None) -> Any:
    """Returns x [..., in] times a kernel [out, in]: [..., out], in their dtype.

    Args:
      x: of the kernel's dtype.
      kernel: a large one in float32 is multiplied and summed if x has 2 to 32 tokens, on a CPU.
      precision: of the matrix product, as for `jax.lax.dot_general`.

    >>> product(jnp.ones((2, 3)), jnp.eye(4, 3)).tolist()
    [[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0]]
    """
    tokens = x.size // max(x.shape[-1], 1)
    if 1 < tokens <= _FEW and kernel.size >= _LARGE and x.dtype == kernel.dtype == jnp.float32 and _sums_fused():
        rows = x.reshape(tokens, 1, x.shape[-1])
        return (kernel[None] * rows).sum(-1).reshape(*x.shape[:-1], kernel.shape[0])
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (1,)), ((), ())), precision=precision)


@functools.cache
def _sums_fused() -> bool:
    """Returns whether XLA has its library sum products too: its own code for that is far slower than a product."""
    if jax.default_backend() != "cpu":
        return False
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 1, 256), (1, 256, 256))]
    program: Any = jax.jit(lambda x, kernel: (x * kernel).sum(-1)).lower(*shapes).compile().runtime_executable()
    return "__ynn_fusion" in program.hlo_modules()[0].to_string()
