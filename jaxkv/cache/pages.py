"""Layout Pages: slots lie in pages, out of a pool that all sequences share.

A page table translates (row, slot) to (page, offset). Sequences that have a beginning in common have its pages in
common: `copy_prefix`, `take`, `rewind` and `reset` move integers and no keys. Buffers are [P, K, page_size, H], or
[L, P, K, page_size, H] for stacked layers, of which `index` names one.
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

from jaxkv.cache.arguments import checked_size
from jaxkv.cache.pool import Pool, claim
from jaxkv.cache.show import show
from jaxkv.cache.spec import Cross, Reach
from jaxkv.errors import CacheFullError
from jaxkv.meshes import vary_alike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class PageStep:
    """Where the slots of the sequences of one call lie, in the layers of one group."""

    table: Any  # int32 [B, V // page_size], the page of each stretch of slots; P: none
    copies: Any  # pages copied before the write: int32 [N] from, int32 [N] to, int32 scalar: how many; None: none

    __repr__ = show

    def copied(self) -> PageStep:
        """Returns this without the copies, which were made."""
        return PageStep(self.table, None)

    def of_row(self, one: Callable[[Any], Any]) -> PageStep:
        """Returns this for one batch row, to be read; `one` cuts it out of an array [B, ...]."""
        return PageStep(one(self.table), None)


@dataclasses.dataclass(frozen=True)
class Pages:
    """A pool of pages that all sequences share. Forking one costs a few integers.

    Args:
      num_pages: pages of the Full layers. It may be less than what one sequence can hold: a sequence that finds no page
        is refused, as it is at its capacity. Layers with a window or chunks get at most as many, and no more than all
        rows can fill; Cross layers get as many as all rows can fill.
      page_size: slots of a page, 1 to 256. Small pages waste less at the end of a sequence, and share more of what two
        sequences have in common; large ones are read faster.

    Raises:
      ValueError: for fewer pages than 1, or a page size out of range.
    """

    num_pages: int
    page_size: int = 16

    def __post_init__(self) -> None:
        for name in ("num_pages", "page_size"):
            object.__setattr__(self, name, checked_size("Pages", name, getattr(self, name), 1))
        if self.page_size > 256:
            raise ValueError(f"Pages(page_size={self.page_size}): a page has 1 to 256 slots")

    def check(self, capacity: int, max_block: int, sharding: Any) -> None:
        """Raises ValueError if a cache of these sizes can't lie so."""
        if self.page_size > capacity:
            raise ValueError(
                f"{self}: a page of {self.page_size} slots is larger than the capacity, {capacity}; give a page_size "
                "of at most that"
            )
        if max_block > self.most(max_block):
            raise ValueError(
                f"{self} holds {self.most(max_block)} tokens, and one block may bring {max_block}; give "
                f"num_pages={-(-max_block // self.page_size)} or more, or a smaller max_block"
            )
        spec = () if sharding is None else tuple(sharding.spec) + (None,) * 4
        if any(spec[i] for i in (0, 2) if spec):
            raise ValueError(
                f"{self} with sharding {sharding.spec}: all rows share the pool, so it can be divided over heads, not "
                f"over rows or slots; give PartitionSpec(None, {spec[1]!r}), or a cache for each device"
            )

    def most(self, capacity: int) -> int:
        """Returns how many tokens one sequence can bring at most."""
        return min(capacity, self.num_pages * self.page_size)

    def round_up(self, num_slots: int) -> int:
        """Returns how many slots a row has of which `num_slots` are asked for."""
        return -(-num_slots // self.page_size) * self.page_size

    def pages(self, reach: Reach, num_rows: int, num_slots: int, used: int) -> Pool:
        """Returns the bookkeeping of an empty pool of the layers of one reach.

        Args:
          reach: of the layers.
          num_rows: of the cache.
          num_slots: of a row.
          used: how many of them can be in use.
        """
        num_pages, all_rows = self.num_pages, num_rows * -(-used // self.page_size)
        if reach.size is not None:
            num_pages = all_rows if isinstance(reach, Cross) else min(num_pages, all_rows)
        return Pool.of(jnp.full((num_rows, num_slots // self.page_size), num_pages, jnp.int32), num_pages)

    def lead(self, pages: Pool, num_rows: int, num_kv_heads: int, num_slots: int) -> tuple[int, ...]:
        """Returns the shape of a buffer without its last axis."""
        return pages.num_pages, num_kv_heads, self.page_size

    def claim(
        self, pages: Sequence[Pool], rows: Sequence[Any], slots: Sequence[Any], fit: Any
    ) -> tuple[Any, list[tuple[Pool, Any]]]:
        """Returns which rows [R] of those that fit get the pages that they write to; and per group (pages, copies).

        Args:
          pages: per group.
          rows: per group int32 [B, T], who writes; R for nobody.
          slots: per group int32 [B, T], to which of its slots.
          fit: bool [R].
        """
        if not pages:
            return fit, []
        columns = [s.ravel() // self.page_size for s in slots]
        return claim(pages, [r.ravel() for r in rows], columns, fit)

    def keep(self, pages: Pool, held: Any, rows: Any = None) -> Pool:
        """Returns the bookkeeping when row r is what row rows[r] was, and holds something in the slots `held`.

        Args:
          pages: of one group.
          held: bool [R2, V].
          rows: int32 [R2], rows that there are; None: each row is what it was.
        """
        table = pages.table if rows is None else pages.table[rows]
        held = held.reshape(*table.shape, self.page_size).any(-1)
        return Pool.of(jnp.where(held, table, pages.num_pages), pages.num_pages)

    def refill(self, pages: Pool, rows: np.ndarray, held: np.ndarray) -> Pool:
        """Returns the bookkeeping when these rows hold something in the slots `held`, on pages of their own.

        Args:
          pages: of one group, not traced.
          rows: int [N].
          held: bool [N, V].

        Raises:
          CacheFullError: if there are too few pages.
        """
        table, num_pages = np.array(pages.table), pages.num_pages
        table[rows] = num_pages
        free = np.setdiff1d(np.arange(num_pages), table).astype(np.int32)
        row, column = np.nonzero(held.reshape(len(rows), -1, self.page_size).any(-1))
        if row.size > free.size:
            raise CacheFullError(
                f"these rows need {row.size} pages of {self.page_size}, and a pool of {num_pages} has {free.size} left "
                "for them; nothing was changed. Make a larger pool, or reset other rows"
            )
        table[rows[row], column] = free[: row.size]
        return Pool.of(jnp.asarray(table), num_pages)

    def unit(self, num_slots: int) -> int:
        """Returns how many slots lie together, from each multiple of it on, that are one row's."""
        return self.page_size

    def table(self, pages: Pool) -> np.ndarray:
        """Returns what `places` needs of the bookkeeping."""
        return np.asarray(pages.table)

    def places(self, table: np.ndarray, rows: np.ndarray, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns where in a buffer [A, K, S, h] slots of rows, int [N] each, lie: along A and along S."""
        return table[rows, slots // self.page_size], slots % self.page_size

    def describe(self, pages: Pool) -> str:
        """Returns how many pages there are and, unless the values are abstract, how many are used, shared and free."""
        text = f", a pool of {pages.num_pages} pages of {self.page_size}"
        if isinstance(pages.refs, jax.core.Tracer) or not isinstance(pages.refs, jax.Array | np.ndarray):
            return text
        used, shared = (int((np.asarray(pages.refs) > n).sum()) for n in (0, 1))
        return f"{text}: {used} used ({shared} shared), {int(pages.num_free)} free"

    def step(self, pages: Pool, rows: Any, copies: Any = None) -> PageStep:
        """Returns what the layers must know of the bookkeeping in one call of rows [B], None for all in order."""
        return PageStep(pages.table if rows is None else pages.table[rows], copies)

    def own(self, buffer: Any, index: Any, step: Any, group: int) -> Any:
        """Returns the buffer with the pages copied that a row writes to and another has too."""
        copies = step.groups[group].pages.copies
        return buffer if copies is None else _copy_pages(buffer, index, copies)

    def write(self, buffer: Any, index: Any, step: Any, group: int, x: Any) -> Any:
        """Returns the buffer with x [B, T, K, H] at the slots of the step's tokens; slots past the end are dropped."""
        slots, pages = step.groups[group].slots[:, : x.shape[1]], step.groups[group].pages
        buffer = self.own(buffer, index, step, group)
        num_pages, batch = buffer.shape[-4], jnp.arange(slots.shape[0], dtype=jnp.int32)[:, None]
        nowhere = num_pages + jnp.arange(slots.size, dtype=jnp.int32).reshape(slots.shape)  # all different
        page = pages.table.at[batch, slots // self.page_size].get(mode="fill", fill_value=num_pages)
        page = jnp.where(page < num_pages, page, nowhere)
        lead = () if index is None else (index,)
        at = (*lead, page, slice(None), slots % self.page_size)
        return buffer.at[at].set(x, mode="drop", unique_indices=True)

    def read(self, buffer: Any, index: Any, step: Any, group: int, start: Any, size: int) -> Any:
        """Returns slots [start, start + size) of the step's sequences: [B, K, size, H].

        It is anything where a row has no page: to read 0 there would cost as much again.
        """
        table = step.groups[group].pages.table
        num_pages = buffer.shape[-4]
        if index is not None:  # the layers of a stack one after the other: page p of layer i is page i * P + p
            buffer = buffer.reshape(-1, *buffer.shape[2:])
            table = index * num_pages + jnp.minimum(table, num_pages - 1)
        # Pages are read in equal parts, the largest of which the stretch is made.
        part = math.gcd(self.page_size, size, start if isinstance(start, int | np.integer) else 0)
        per_page, count = self.page_size // part, size // part
        if per_page == 1:
            at: Any = (lax.dynamic_slice_in_dim(table, start // part, count, 1),)
        else:
            number = start // part + jnp.arange(count, dtype=jnp.int32)
            buffer = buffer.reshape(*buffer.shape[:2], per_page, part, buffer.shape[3])
            at = table[:, number // per_page], slice(None), (number % per_page)[None]
        x = buffer.at[at].get(mode="clip")  # [B, count, K, part, H]
        return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], size, x.shape[4])

    def gather(self, buffer: Any, index: Any, step: Any, group: int, slots: Any) -> Any:
        """Returns what lies in slots [B, T] of the step's sequences: [B, T, K, H]; anything where a row has no page."""
        table, batch = step.groups[group].pages.table, jnp.arange(slots.shape[0], dtype=jnp.int32)[:, None]
        page = table.at[batch, slots // self.page_size].get(mode="clip")
        lead = () if index is None else (index,)
        return buffer.at[(*lead, page, slice(None), slots % self.page_size)].get(mode="clip")

    def take(self, buffers: Any, rows: Any, filled: Any) -> Any:
        """Returns the buffers after rows were taken: what they were, the page table says the rest."""
        return buffers

    def copy(self, buffers: Any, src: Any, dst: Any, filled: Any) -> Any:
        """Returns the buffers after a row was copied: what they were, the page table says the rest."""
        return buffers

    def move(
        self, buffers: Any, row: Any, sources: Any, changed: Any, pages: tuple[Pool, Pool], shift: Callable[[Any], Any]
    ) -> Any:
        """Returns the buffers, a pytree, with slot s of one row replaced by `shift` of what lay in slot sources[s].

        `shift` is of what the buffers have of the row: the same pytree. Only pages are written that have a slot which
        changed [V]: those are the row's own in the second of the pools.
        """
        before, after = (pool.table[row] for pool in pages)
        changed = changed.reshape(-1, self.page_size).any(1)

        def gather(buffer: Any) -> Any:
            x = jnp.moveaxis(jnp.take(buffer, before, axis=-4, mode="clip"), -4, -3)  # [.., K, pages, page_size, H]
            return jnp.take(x.reshape(*x.shape[:-3], -1, x.shape[-1]), sources, axis=-2, mode="clip")

        def write(buffer: Any, x: Any) -> Any:
            x = x.reshape(*x.shape[:-2], -1, self.page_size, x.shape[-1])
            at = (slice(None),) * (buffer.ndim - 4) + (jnp.where(changed, after, buffer.shape[-4]),)
            return buffer.at[at].set(jnp.moveaxis(x, -3, -4), mode="drop")

        return jax.tree.map(write, buffers, shift(jax.tree.map(gather, buffers)))


@jax.jit  # a call outside of jit finds its program again
def _copy_pages(buffer: Any, index: Any, copies: Any) -> Any:
    """Returns the buffer with pages copied, each from one that is not written to another that nobody has read."""
    return _copy(*vary_alike((buffer, index, copies)))


@jax.custom_vjp
def _copy(buffer: Any, index: Any, copies: Any) -> Any:
    sources, targets, count = copies
    zero = jnp.int32(0)
    lead = () if index is None else (index,)
    one = (*[1] * (len(lead) + 1), *buffer.shape[-3:])

    def copy(i: Any, buffer: Any) -> Any:
        page = lax.dynamic_slice(buffer, (*lead, sources[i], zero, zero, zero), one)
        at = (*lead, targets[i], zero, zero, zero)
        return lax.dynamic_update_slice(buffer, lax.optimization_barrier(page), at)

    return lax.fori_loop(0, count, copy, buffer)


def _forward(buffer: Any, index: Any, copies: Any) -> Any:
    return _copy(buffer, index, copies), (index, copies)


def _backward(saved: Any, d_buffer: Any) -> Any:
    # A loop as long as there are copies has no reverse derivative. Past the last copy are pages that there aren't.
    index, (sources, targets, _) = saved
    lead = () if index is None else (index,)
    moved = d_buffer.at[(*lead, targets)].get(mode="fill", fill_value=0)
    d_buffer = d_buffer.at[(*lead, targets)].set(0, mode="drop")
    return d_buffer.at[(*lead, sources)].add(moved, mode="drop"), None, None


_copy.defvjp(_forward, _backward)
