"""Layout Rows: each sequence owns one contiguous stretch of slots.

A layout translates (row, slot) to a place in a buffer and does nothing else. Buffers are [R, K, V, H], or
[L, R, K, V, H] for stacked layers, of which `index` names one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class Rows:
    """One contiguous stretch of slots per sequence."""

    def lead(self, num_rows: int, num_kv_heads: int, num_slots: int) -> tuple[int, ...]:
        """Returns the shape of a buffer without its last axis."""
        return num_rows, num_kv_heads, num_slots

    def write(self, buffer: Any, index: Any, rows: Any, slots: Any, x: Any, *, whole: bool) -> Any:
        """Returns the buffer with x [B, T, K, H] at slots [B, T] of rows [B]; slots past the end are dropped.

        A scatter whose indices are all different, so that it happens in place and has a cheap gradient. Where batch
        row b is sequence b (`whole`), it is batched over rows: then sharding over rows needs no communication.
        """
        num_slots = buffer.shape[-2]
        nowhere = num_slots + jnp.arange(slots.size, dtype=jnp.int32).reshape(slots.shape)
        slots = jnp.where(slots < num_slots, slots, nowhere)
        if whole and index is None:

            def write_row(row: Any, s: Any, y: Any) -> Any:
                return row.at[:, s].set(y.swapaxes(0, 1), mode="drop", unique_indices=True)

            return jax.vmap(write_row)(buffer, slots, x)
        lead = () if index is None else (index,)
        return buffer.at[(*lead, rows[:, None], slice(None), slots)].set(x, mode="drop", unique_indices=True)

    def read(self, buffer: Any, index: Any, rows: Any, start: Any, size: int, *, whole: bool) -> Any:
        """Returns slots [start, start + size) of the sequences in `rows`: [B, K, size, H]."""
        if whole and index is None:
            return lax.dynamic_slice_in_dim(buffer, start, size, axis=2)
        if whole:
            stretch = (1, *buffer.shape[1:3], size, buffer.shape[4])
            return lax.dynamic_slice(buffer, (index, 0, 0, start, 0), stretch)[0]
        if index is not None:  # the layers of a stack one after the other: row r of layer i is row i * R + r
            num_rows = buffer.shape[1]
            rows = index * num_rows + jnp.clip(rows, 0, num_rows - 1)
            buffer = buffer.reshape(-1, *buffer.shape[2:])
        one = (1, buffer.shape[1], size, buffer.shape[3])
        return jax.vmap(lambda row: lax.dynamic_slice(buffer, (row, 0, start, 0), one)[0])(rows)

    def take(self, buffer: Any, rows: Any) -> Any:
        """Returns the buffer whose row r is row rows[r] of this one."""
        return jnp.take(buffer, rows, axis=buffer.ndim - 4, mode="clip")

    def copy(self, buffer: Any, src: Any, dst: Any) -> Any:
        """Returns the buffer with row `src` copied onto row `dst`; a dst past the last row is dropped."""
        lead = (slice(None),) * (buffer.ndim - 4)
        return buffer.at[(*lead, dst)].set(buffer[(*lead, src)], mode="drop")

    def move(self, buffer: Any, row: Any, sources: Any, turn: Callable[[Any], Any]) -> Any:
        """Returns the buffer with slot s of one row replaced by `turn` of what lay in slot sources[s].

        A gather, then one write: a shift of a buffer onto itself gives wrong values on XLA's CPU (openxla/xla#49176).
        """
        lead = (slice(None),) * (buffer.ndim - 4)
        moved = jnp.take(buffer[(*lead, row)], sources, axis=-2, mode="clip")  # [K, V, H]
        return buffer.at[(*lead, row)].set(turn(moved))
