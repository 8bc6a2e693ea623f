"""Products of tokens with weights: what every projection of jaxkv.nn and jaxkv.models computes with.

On a CPU, XLA multiplies more than one token by a matrix after it has copied the whole matrix in another order, in each
call anew: a step of 4 rows takes twice as long as one of 1 row. For a few tokens the native library multiplies instead,
and reads the weights once, where they lie.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.nnx.nn.dtypes import promote_dtype
from jax.interpreters import mlir

from jaxkv import meshes
from jaxkv.nn.native import library
from jaxkv.nn.native.lowering import on_one_device, primitive

TARGET = "jaxkv_product"
MOST_TOKENS = 16  # from 32 on XLA's product is as fast, for some shapes
_LEAST = 2**16  # numbers of a matrix, below which a call costs more than it brings


def dot_general(lhs: Any, rhs: Any, dimension_numbers: Any, *, out_sharding: Any = None, **options: Any) -> Any:
    """Returns `jax.lax.dot_general(lhs, rhs, ...)`, by the native library where that is faster. To be given to Flax.

    That is for 2 to 16 tokens in float32 times a matrix, [in, out] or [out, in], in a program for one CPU; of several
    devices, each multiplies by itself inside `jax.shard_map`. Elsewhere, in what `jax.export` writes, and in
    derivatives, it is XLA's product. Sums are of float32 numbers, in another order than XLA's.

    Args:
      lhs: tokens.
      rhs: weights.
      dimension_numbers: as of `jax.lax.dot_general`.
      out_sharding: the result's, where axes are Explicit; None leaves it to what the operands have.
      options: `precision`, `preferred_element_type`.
    """
    if out_sharding is None and meshes.explicit_mesh((lhs, rhs)) is None:
        layout = _layout(lhs, rhs, dimension_numbers, **options)
        if layout is not None:
            return _product(*meshes.vary_alike((lhs, rhs)), layout)
    return meshes.dot_general(lhs, rhs, dimension_numbers, out_sharding=out_sharding, **options)


def tied(embed: Any, x: Any) -> Any:
    """Returns `embed.attend(x)` of an `nnx.Embed`: the product of x [..., D] with each of its vectors, [..., V]."""
    x, table = promote_dtype((x, embed.embedding[...]), dtype=embed.dtype)
    return dot_general(x, table, (((x.ndim - 1,), (1,)), ((), ())))


def _layout(
    lhs: Any, rhs: Any, dimension_numbers: Any, precision: Any = None, preferred_element_type: Any = None
) -> tuple[int, bool] | None:
    """Returns how many axes are summed over, and whether they are the last of the weights; None for XLA's product."""
    (summed, others_summed), batch = dimension_numbers
    count = len(summed)
    if any(batch) or not count or count == rhs.ndim:
        return None
    if not _is_plain(precision) or preferred_element_type not in (None, jnp.float32):
        return None
    if any(x.dtype != jnp.float32 for x in (lhs, rhs)) or rhs.size < _LEAST or _tokens(lhs, count) > MOST_TOKENS:
        return None
    if tuple(summed) != tuple(range(lhs.ndim - count, lhs.ndim)):
        return None
    first, last = tuple(range(count)), tuple(range(rhs.ndim - count, rhs.ndim))
    return (count, tuple(others_summed) == last) if tuple(others_summed) in (first, last) else None


def _is_plain(precision: Any) -> bool:
    """Returns whether sums of float32 numbers are as precise as is asked for."""
    both = precision if isinstance(precision, tuple) else (precision,)
    return all(each is None or isinstance(each, jax.lax.Precision) for each in both)


def _tokens(lhs: Any, count: int) -> int:
    return math.prod(lhs.shape[: lhs.ndim - count])


def _as_xla(lhs: Any, rhs: Any, *, layout: tuple[int, bool]) -> list[Any]:
    count, transposed = layout
    summed = tuple(range(lhs.ndim - count, lhs.ndim))
    others = tuple(range(rhs.ndim - count, rhs.ndim)) if transposed else tuple(range(count))
    return [jax.lax.dot_general(lhs, rhs, ((summed, others), ((), ())))]


def _as_library(lhs: Any, rhs: Any, *, layout: tuple[int, bool]) -> list[Any]:
    count, transposed = layout
    tokens, inner = _tokens(lhs, count), math.prod(lhs.shape[lhs.ndim - count :])
    outer = rhs.size // inner
    result = jax.typeof(lhs).update(shape=(tokens, outer))
    weights = rhs.reshape((outer, inner) if transposed else (inner, outer))
    y = jax.ffi.ffi_call(TARGET, result)(lhs.reshape(tokens, inner), weights, transposed=np.int64(transposed))
    return [y.reshape(_shape(lhs, rhs, layout))]


def _shape(lhs: Any, rhs: Any, layout: tuple[int, bool]) -> tuple[int, ...]:
    count, transposed = layout
    return (*lhs.shape[: lhs.ndim - count], *(rhs.shape[: rhs.ndim - count] if transposed else rhs.shape[count:]))


def _shapes(lhs: Any, rhs: Any, *, layout: tuple[int, bool]) -> list[Any]:
    return [lhs.update(shape=_shape(lhs, rhs, layout))]


def _lower(ctx: Any, lhs: Any, rhs: Any, *, layout: tuple[int, bool]) -> Any:
    tokens = _tokens(ctx.avals_in[0], layout[0])
    native = 2 <= tokens <= MOST_TOKENS and on_one_device(ctx.module_context) and library.problem() is None
    form = functools.partial(_as_library if native else _as_xla, layout=layout)
    return mlir.lower_fun(form, multiple_results=True)(ctx, lhs, rhs)


def _batched(operands: Any, axes: Any, *, layout: tuple[int, bool]) -> Any:
    if axes[1] is None:  # more tokens
        return product_p.bind(jnp.moveaxis(operands[0], axes[0], 0), operands[1], layout=layout), [0]
    form = functools.partial(_as_xla, layout=layout)
    return jax.vmap(form, in_axes=tuple(axes))(*operands), [0]


product_p = primitive(TARGET, _shapes, _batched, _lower, _as_xla)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _product(lhs: Any, rhs: Any, layout: tuple[int, bool]) -> Any:
    return product_p.bind(lhs, rhs, layout=layout)[0]


@_product.defjvp
def _derivative(layout: tuple[int, bool], primals: Any, tangents: Any) -> Any:
    (lhs, rhs), (d_lhs, d_rhs) = primals, tangents
    (left,), (right,) = _as_xla(d_lhs, rhs, layout=layout), _as_xla(lhs, d_rhs, layout=layout)
    return _product(lhs, rhs, layout), left + right
