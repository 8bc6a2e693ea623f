"""Rows of buffers chosen anew, as far as they hold something, in place: `take` and `copy_prefix` of the layout Rows.

XLA copies blocks of slots in a loop. On one CPU the native library moves what is held of all buffers in one call. Where
that can't be had, and in what `jax.export` writes, it is XLA's loop.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import mlir

from jaxkv.cache import bits
from jaxkv.meshes import vary_alike
from jaxkv.native import library
from jaxkv.native.library import ROWS
from jaxkv.native.lowering import on_one_device, primitive

_MOVE_NUMBERS = 2**15  # of a head, moved at a time by XLA at most: a state is large


class _Change(NamedTuple):
    """Which rows buffers get.

    `block`(buffer, axis, places, start, size) returns the buffer, whose rows are along `axis`, changed in these slots:
    it is linear in the buffer, and treats all slots alike. `rows`(places, num_rows) returns which row each row becomes,
    int32 [R].
    """

    block: Callable[..., Any]
    rows: Callable[..., Any]


def take(buffers: Any, rows: Any, filled: Any) -> Any:
    """Returns buffers [..., R, K, V, H], a pytree, whose row r is row rows[r] of these, in slots below `filled`."""
    return _moved(_TAKE, buffers, filled, (rows,))


def copy(buffers: Any, src: Any, dst: Any, filled: Any) -> Any:
    """Returns buffers [..., R, K, V, H], a pytree, with slots below `filled` of row `src` in row `dst`."""
    return _moved(_COPY, buffers, filled, (src, dst))


@functools.partial(jax.jit, static_argnums=0)  # a call outside of jit finds its program again
def _moved(change: _Change, buffers: Any, filled: Any, places: Any) -> Any:
    leaves, tree = jax.tree.flatten(buffers)
    if not leaves:
        return buffers
    leaves = [vary_alike((x, filled, places))[0] for x in leaves]
    return jax.tree.unflatten(tree, _changed(change, leaves, filled, places))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _changed(change: _Change, buffers: list[Any], filled: Any, places: Any) -> list[Any]:
    return moved_p.bind(filled, *places, *buffers, change=change, count=len(places))


def _forward(change: _Change, buffers: list[Any], filled: Any, places: Any) -> Any:
    return _changed(change, buffers, filled, places), (filled, places)


def _backward(change: _Change, saved: Any, d_buffers: list[Any]) -> Any:
    # A loop as long as what is filled has no reverse derivative; one change of all slots at once has.
    filled, places = saved

    def one(d_buffer: Any) -> Any:
        if d_buffer.dtype == jax.dtypes.float0:  # of whole numbers
            return None
        axis, num_slots = d_buffer.ndim - 4, d_buffer.shape[-2]
        below = (jnp.arange(num_slots, dtype=jnp.int32) < filled)[:, None]

        def plain(buffer: Any) -> Any:
            return jnp.where(below, change.block(buffer, axis, places, jnp.int32(0), num_slots), buffer)

        return jax.linear_transpose(plain, d_buffer)(d_buffer)[0]

    return [one(x) for x in d_buffers], None, None


_changed.defvjp(_forward, _backward)


def _shapes(filled: Any, *others: Any, change: _Change, count: int) -> list[Any]:
    return list(others[count:])


def _as_xla(filled: Any, *others: Any, change: _Change, count: int) -> list[Any]:
    return [_each_block(change, x, filled, others[:count]) for x in others[count:]]


def _as_library(filled: Any, *others: Any, change: _Change, count: int) -> list[Any]:
    places, buffers = others[:count], others[count:]
    rows = change.rows(places, buffers[0].shape[-4])
    call = jax.ffi.ffi_call(
        ROWS, [jax.typeof(x) for x in buffers], input_output_aliases={i + 2: i for i in range(len(buffers))}
    )
    return list(call(rows, filled, *buffers))


def _batched(operands: Any, axes: Any, *, change: _Change, count: int) -> Any:
    results = jax.vmap(functools.partial(_as_xla, change=change, count=count), in_axes=tuple(axes))(*operands)
    return results, [0] * len(results)


def _lower(ctx: Any, *operands: Any, change: _Change, count: int) -> Any:
    buffers = ctx.avals_in[1 + count :]
    whole = all(bits.width(x.dtype) >= 8 for x in buffers)
    native = whole and on_one_device(ctx.module_context) and library.problem() is None
    form = functools.partial(_as_library if native else _as_xla, change=change, count=count)
    return mlir.lower_fun(form, multiple_results=True)(ctx, *operands)


moved_p = primitive(ROWS, _shapes, _batched, _lower, _as_xla)


def _each_block(change: _Change, buffer: Any, filled: Any, places: Any) -> Any:
    """Returns the buffer after the change of every block of slots below `filled`.

    What is read must not be read from where it is written (the barriers below). On a CPU a row's slots of a head are
    one stretch of numbers, [..., R, K, V * H], which is copied twice as fast.
    """
    *lead, num_heads, num_slots, size = buffer.shape
    buffer, filled, places = vary_alike((buffer, filled, places))
    # Of a buffer with an axis of 1 that is to be flat, or was, XLA may make a copy in another layout.
    flat = _on_cpu() and num_heads > 1 and 1 < size < 2**31 // num_slots
    x = buffer.reshape(*lead, num_heads, -1) if flat else buffer
    axis, per_slot = buffer.ndim - 4, size if flat else 1
    slots, count = _blocks(buffer, filled)
    block = slots * per_slot
    x = lax.fori_loop(0, count, lambda i, b: change.block(b, axis, places, i * block, block), x)
    return x.reshape(buffer.shape)


def _blocks(buffer: Any, filled: Any) -> tuple[int, Any]:
    """Returns how many slots are moved at a time, and how often until all that is filled is."""
    num_slots, size = buffer.shape[-2:]
    most = max(1, min(8 if _on_cpu() else 64, _MOVE_NUMBERS // max(size, 1)))  # small ones stay in a core's cache
    slots = math.gcd(1 << (most.bit_length() - 1), num_slots)
    return slots, (filled + (slots - 1)) // slots


def _take_block(buffer: Any, axis: int, places: Any, start: Any, size: int) -> Any:
    """Returns the buffer with its rows chosen anew in [start, start + size)."""
    (rows,) = places
    block = lax.dynamic_slice_in_dim(buffer, start, size, axis=axis + 2)
    if not _on_cpu() or size == buffer.shape[axis + 2]:  # the latter for `_backward`, as a loop has no derivative
        taken = lax.optimization_barrier(jnp.take(block, rows, axis=axis, mode="clip"))
        return lax.dynamic_update_slice_in_dim(buffer, taken, start, axis=axis + 2)
    block = lax.optimization_barrier(block)
    moves = rows != jnp.arange(rows.shape[0], dtype=rows.dtype)
    moved = jnp.nonzero(moves, size=rows.shape[0], fill_value=0)[0].astype(jnp.int32)

    def write(i: Any, buffer: Any) -> Any:  # XLA's CPU gathers number by number, but copies slices as they lie
        dst = moved[i]
        row = lax.dynamic_slice_in_dim(block, rows[dst], 1, axis=axis)
        return _write_row(buffer, axis, row, dst, start)

    return lax.fori_loop(0, moves.sum(dtype=jnp.int32), write, buffer)


def _copy_block(buffer: Any, axis: int, places: Any, start: Any, size: int) -> Any:
    """Returns the buffer with [start, start + size) of one row in another."""
    src, dst = places
    block = lax.dynamic_slice_in_dim(buffer, start, size, axis=axis + 2)
    # Not a slice at `src`, for which XLA would gather a buffer whose rows lie on several devices.
    row = jnp.expand_dims(jnp.take(block, src, axis=axis, mode="clip"), axis)
    return _write_row(buffer, axis, lax.optimization_barrier(row), dst, start)


def _write_row(buffer: Any, axis: int, x: Any, row: Any, start: Any) -> Any:
    zero = jnp.int32(0)
    at = (*[zero] * axis, row, zero, start, *[zero] * (buffer.ndim - axis - 3))
    return lax.dynamic_update_slice(buffer, x, at)


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _with_copy(places: Any, num_rows: int) -> Any:
    src, dst = places
    return jnp.arange(num_rows, dtype=jnp.int32).at[dst].set(src)


_TAKE = _Change(_take_block, lambda places, num_rows: places[0])
_COPY = _Change(_copy_block, _with_copy)
