"""Products of tokens with weights: what every projection of jaxkv.nn and jaxkv.models computes with.

On a CPU, XLA multiplies more than one token by a matrix after it has copied the whole matrix in another order, in each
call anew: a step of 4 rows takes twice as long as one of 1 row. For a few tokens the native library multiplies instead,
and reads the weights once, where they lie.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.nnx.nn.dtypes import promote_dtype
from jax.interpreters import mlir

from jaxkv import meshes
from jaxkv.native import library
from jaxkv.native.library import PRODUCT
from jaxkv.native.lowering import on_one_device, primitive

MOST_TOKENS = 16  # from 32 on XLA's product is as fast, for some shapes
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
_LEAST = 2**16  # numbers of a matrix, below which a call costs more than it brings


class _Form(NamedTuple):
    """How two operands are multiplied."""

    summed: int  # how many axes are summed over, the last ones of the tokens
    transposed: bool  # whether they are the last ones of the weights too, not the first
    dtype: Any  # of the result
    precision: Any  # as of `jax.lax.dot_general`, for XLA's product


def dot_general(lhs: Any, rhs: Any, dimension_numbers: Any, *, out_sharding: Any = None, **options: Any) -> Any:
    """Returns `jax.lax.dot_general(lhs, rhs, ...)`, by the native library where that is faster. To be given to Flax.

    That is for 2 to 16 tokens times a matrix, [in, out] or [out, in], in a program for one CPU; of several devices,
    each multiplies by itself inside `jax.shard_map`. Both are float32, or both bfloat16 or float16: then also for 1
    token. Sums are of float32 numbers, in another order than XLA's, and are rounded once. Elsewhere, in what
    `jax.export` writes, and in derivatives, it is XLA's product.

    Args:
      lhs: tokens.
      rhs: weights.
      dimension_numbers: as of `jax.lax.dot_general`.
      out_sharding: the result's, where axes are Explicit; None leaves it to what the operands have.
      options: `precision`, `preferred_element_type`.
    """
    if out_sharding is None and meshes.explicit_mesh((lhs, rhs)) is None:
        form = _form(lhs, rhs, dimension_numbers, **options)
        if form is not None:
            return _product(*meshes.vary_alike((lhs, rhs)), form)
    return meshes.dot_general(lhs, rhs, dimension_numbers, out_sharding=out_sharding, **options)


def tied(embed: Any, x: Any) -> Any:
    """Returns `embed.attend(x)` of an `nnx.Embed`: the product of x [..., D] with each of its vectors, [..., V]."""
    x, table = promote_dtype((x, embed.embedding[...]), dtype=embed.dtype)
    return dot_general(x, table, (((x.ndim - 1,), (1,)), ((), ())))


def _form(
    lhs: Any, rhs: Any, dimension_numbers: Any, precision: Any = None, preferred_element_type: Any = None
) -> _Form | None:
    """Returns None if the library has no such product, whatever the device."""
    (summed, others_summed), batch = dimension_numbers
    count = len(summed)
    if any(batch) or not count or count == rhs.ndim:
        return None
    dtype = jnp.dtype(lhs.dtype if preferred_element_type is None else preferred_element_type)
    if lhs.dtype != rhs.dtype or lhs.dtype not in _DTYPES or dtype not in (lhs.dtype, jnp.float32):
        return None
    if not _is_plain(precision) or rhs.size < _LEAST or _tokens(lhs, count) > MOST_TOKENS:
        return None
    if tuple(summed) != tuple(range(lhs.ndim - count, lhs.ndim)):
        return None
    first, last = tuple(range(count)), tuple(range(rhs.ndim - count, rhs.ndim))
    if tuple(others_summed) not in (first, last):
        return None
    return _Form(count, tuple(others_summed) == last, dtype, precision)


def _is_plain(precision: Any) -> bool:
    """Returns whether sums of float32 numbers are as precise as is asked for."""
    both = precision if isinstance(precision, tuple) else (precision,)
    return all(each is None or isinstance(each, jax.lax.Precision) for each in both)


def _tokens(lhs: Any, count: int) -> int:
    return math.prod(lhs.shape[: lhs.ndim - count])


def _as_xla(lhs: Any, rhs: Any, *, form: _Form) -> list[Any]:
    summed = tuple(range(lhs.ndim - form.summed, lhs.ndim))
    others = tuple(range(rhs.ndim - form.summed, rhs.ndim)) if form.transposed else tuple(range(form.summed))
    numbers = ((summed, others), ((), ()))
    return [jax.lax.dot_general(lhs, rhs, numbers, precision=form.precision, preferred_element_type=form.dtype)]


def _as_library(lhs: Any, rhs: Any, *, form: _Form) -> list[Any]:
    tokens, inner = _tokens(lhs, form.summed), math.prod(lhs.shape[lhs.ndim - form.summed :])
    outer = rhs.size // inner
    result = jax.typeof(lhs).update(shape=(tokens, outer), dtype=jnp.float32)
    x = lhs.astype(jnp.float32).reshape(tokens, inner)
    weights = rhs.reshape((outer, inner) if form.transposed else (inner, outer))
    y = jax.ffi.ffi_call(PRODUCT, result)(x, weights, transposed=np.int64(form.transposed))
    return [y.reshape(_shape(lhs, rhs, form)).astype(form.dtype)]


def _shape(lhs: Any, rhs: Any, form: _Form) -> tuple[int, ...]:
    left = lhs.shape[: lhs.ndim - form.summed]
    return (*left, *(rhs.shape[: rhs.ndim - form.summed] if form.transposed else rhs.shape[form.summed :]))


def _shapes(lhs: Any, rhs: Any, *, form: _Form) -> list[Any]:
    return [lhs.update(shape=_shape(lhs, rhs, form), dtype=form.dtype)]


def _lower(ctx: Any, lhs: Any, rhs: Any, *, form: _Form) -> Any:
    tokens, least = _tokens(ctx.avals_in[0], form.summed), 2 if ctx.avals_in[0].dtype == jnp.float32 else 1
    native = least <= tokens <= MOST_TOKENS and on_one_device(ctx.module_context) and library.problem() is None
    product = functools.partial(_as_library if native else _as_xla, form=form)
    return mlir.lower_fun(product, multiple_results=True)(ctx, lhs, rhs)


def _batched(operands: Any, axes: Any, *, form: _Form) -> Any:
    if axes[1] is None:  # more tokens
        return product_p.bind(jnp.moveaxis(operands[0], axes[0], 0), operands[1], form=form), [0]
    return jax.vmap(functools.partial(_as_xla, form=form), in_axes=tuple(axes))(*operands), [0]


product_p = primitive(PRODUCT, _shapes, _batched, _lower, _as_xla)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _product(lhs: Any, rhs: Any, form: _Form) -> Any:
    return product_p.bind(lhs, rhs, form=form)[0]


@_product.defjvp
def _derivative(form: _Form, primals: Any, tangents: Any) -> Any:
    (lhs, rhs), (d_lhs, d_rhs) = primals, tangents
    (left,), (right,) = _as_xla(d_lhs, rhs, form=form), _as_xla(lhs, d_rhs, form=form)
    return _product(lhs, rhs, form), left + right
