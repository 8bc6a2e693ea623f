"""Layout Rows: each sequence owns one contiguous stretch of slots.

A layout translates (row, slot) to a place in a buffer and does nothing else. Buffers are [R, K, V, H], or
[L, R, K, V, H] for stacked layers, of which `index` names one. A row's slots are its own from the start, so there is
nothing to claim, to share or to free: the bookkeeping that other layouts have (`pages`) is None.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxkv.cache import moves


@dataclasses.dataclass(frozen=True)
class Rows:
    """One contiguous stretch of slots per sequence."""

    page_size = 1  # rows can have any number of slots in common

    def check(self, capacity: int, max_block: int, sharding: Any) -> None:
        """Raises ValueError if a cache of these sizes can't lie so."""

    def most(self, capacity: int) -> int:
        """Returns how many tokens one sequence can bring at most."""
        return capacity

    def round_up(self, num_slots: int) -> int:
        """Returns how many slots a row has of which `num_slots` are asked for."""
        return num_slots

    def pages(self, reach: Any, num_rows: int, num_slots: int, used: int) -> None:
        """Returns the bookkeeping of the places of one group's slots: none."""

    def lead(self, pages: None, num_rows: int, num_kv_heads: int, num_slots: int) -> tuple[int, ...]:
        """Returns the shape of a buffer without its last axis."""
        return num_rows, num_kv_heads, num_slots

    def claim(
        self, pages: Sequence[None], rows: Sequence[Any], slots: Sequence[Any], fit: Any
    ) -> tuple[Any, list[tuple[None, None]]]:
        """Returns which rows [R] of those that fit have room for what they write: all. And per group pages, copies."""
        return fit, [(None, None) for _ in pages]

    def keep(self, pages: None, held: Any, rows: Any = None) -> None:
        """Returns the bookkeeping when row r is what row rows[r] was, and has positions `held`."""

    def describe(self, pages: None) -> str:
        """Returns what is to be said of the bookkeeping."""
        return ""

    def refill(self, pages: None, rows: Any, held: Any) -> None:
        """Returns the bookkeeping when these rows hold something in the slots `held`, and nothing else."""

    def unit(self, num_slots: int) -> int:
        """Returns how many slots lie together, from each multiple of it on, that are one row's."""
        return num_slots if num_slots <= 64 else math.gcd(num_slots, 1024)

    def table(self, pages: None) -> None:
        """Returns what `places` needs of the bookkeeping."""

    def places(self, table: None, rows: np.ndarray, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns where in a buffer [A, K, S, h] slots of rows, int [N] each, lie: along A and along S."""
        return rows, slots

    def step(self, pages: None, rows: Any, copies: Any = None) -> None:
        """Returns what the layers must know of the bookkeeping in one call."""

    def own(self, buffer: Any, index: Any, step: Any, group: int) -> Any:
        """Returns the buffer with what a row writes to being its own: it always is."""
        return buffer

    def write(self, buffer: Any, index: Any, step: Any, group: int, x: Any) -> Any:
        """Returns the buffer with x [B, T, K, H] at the slots of the step's tokens; slots past the end are dropped.

        A scatter whose indices are all different, so that it happens in place and has a cheap gradient. Where batch
        row b is sequence b (`whole`), it is batched over rows: then sharding over rows needs no communication.
        """
        num_slots, rows, slots = buffer.shape[-2], step.rows, step.groups[group].slots[:, : x.shape[1]]
        nowhere = num_slots + jnp.arange(slots.size, dtype=jnp.int32).reshape(slots.shape)
        slots = jnp.where(slots < num_slots, slots, nowhere)
        if step.whole and index is None:

            def write_row(row: Any, s: Any, y: Any) -> Any:
                return row.at[:, s].set(y.swapaxes(0, 1), mode="drop", unique_indices=True)

            return jax.vmap(write_row)(buffer, slots, x)
        lead = () if index is None else (index,)
        return buffer.at[(*lead, rows[:, None], slice(None), slots)].set(x, mode="drop", unique_indices=True)

    def read(self, buffer: Any, index: Any, step: Any, group: int, start: Any, size: int) -> Any:
        """Returns slots [start, start + size) of the step's sequences: [B, K, size, H]."""
        rows = step.rows
        if step.whole:
            buffer = buffer if index is None else lax.dynamic_index_in_dim(buffer, index, 0, keepdims=False)
            return lax.dynamic_slice_in_dim(buffer, start, size, axis=2)
        if index is not None:  # the layers of a stack one after the other: row r of layer i is row i * R + r
            num_rows = buffer.shape[1]
            rows = index * num_rows + jnp.clip(rows, 0, num_rows - 1)
            buffer = buffer.reshape(-1, *buffer.shape[2:])
        one = (1, buffer.shape[1], size, buffer.shape[3])
        zero, start = jnp.int32(0), jnp.asarray(start, jnp.int32)
        return jax.vmap(lambda row: lax.dynamic_slice(buffer, (row, zero, start, zero), one)[0])(rows)

    def gather(self, buffer: Any, index: Any, step: Any, group: int, slots: Any) -> Any:
        """Returns what lies in slots [B, T] of the step's sequences: [B, T, K, H]."""
        if step.whole and index is None:
            one = jax.vmap(lambda row, s: row.at[:, s].get(mode="clip"))
            return one(buffer, slots).swapaxes(1, 2)
        lead = () if index is None else (index,)
        return buffer.at[(*lead, step.rows[:, None], slice(None), slots)].get(mode="clip")

    def take(self, buffers: Any, rows: Any, filled: Any) -> Any:
        """Returns the buffers, a pytree, whose row r is row rows[r] of these, in slots below `filled` (int32 scalar).

        As many rows as before are taken in place.
        """
        if all(rows.shape[0] == x.shape[-4] for x in jax.tree.leaves(buffers)):
            return moves.take(buffers, rows, filled)
        return jax.tree.map(lambda x: jnp.take(x, rows, axis=x.ndim - 4, mode="clip"), buffers)

    def copy(self, buffers: Any, src: Any, dst: Any, filled: Any) -> Any:
        """Returns the buffers, a pytree, with slots below `filled` of row `src` in row `dst`, in place."""
        return moves.copy(buffers, src, dst, filled)

    def move(self, buffers: Any, row: Any, sources: Any, changed: Any, pages: Any, shift: Callable[[Any], Any]) -> Any:
        """Returns the buffers, a pytree, with slot s of one row replaced by `shift` of what lay in slot sources[s].

        `shift` is of what the buffers have of the row: the same pytree.

        A gather, then one write: a shift of a buffer onto itself gives wrong values on XLA's CPU (openxla/xla#49176).
        """
        at = (..., row, slice(None), slice(None), slice(None))
        moved = jax.tree.map(lambda x: jnp.take(x[at], sources, axis=-2, mode="clip"), buffers)  # [K, V, H]
        return jax.tree.map(lambda x, y: x.at[at].set(y), buffers, shift(moved))
