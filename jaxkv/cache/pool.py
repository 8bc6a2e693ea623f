"""The bookkeeping of pages: which page holds which slots of a row, how many rows have it, and which are free.

Rows may share a page as long as none of them writes to it. Who writes needs one of its own: `claim` finds out, from the
slots that a call writes, who needs how many, serves the rows in order, and says what is to be copied before the write.
It costs what the call brings. Everything else says what rows hold afterwards, and counts anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv.cache.show import show
from jaxkv.meshes import vary_alike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Pool:
    """The pages of the layers of one group."""

    table: Any  # int32 [R, V // page_size], the page of each stretch of a row's slots; P: none
    refs: Any  # int32 [P], how many rows have the page
    free: Any  # int32 [P]; those before num_free are nobody's, the last of them is the next to go
    num_free: Any  # int32 scalar

    __repr__ = show

    @classmethod
    def of(cls, table: Any, num_pages: int) -> Pool:
        """Returns the pool whose rows have the pages of a table [R, V // page_size]; num_pages or more: none."""
        refs = jnp.zeros((num_pages,), jnp.int32).at[table.ravel()].add(1, mode="drop")
        unused = refs == 0
        place = jnp.where(unused, jnp.cumsum(unused, dtype=jnp.int32) - 1, num_pages)
        pages = jnp.arange(num_pages, dtype=jnp.int32)
        free = jnp.full((num_pages,), num_pages, jnp.int32).at[place].set(pages, mode="drop")
        return cls(table, refs, free, unused.sum(dtype=jnp.int32))

    @property
    def num_pages(self) -> int:
        return self.refs.shape[-1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Writes:
    """The pages that a call writes to, each once for each row, in the order of rows."""

    rows: Any  # int32 [N]; R: nothing
    columns: Any  # int32 [N], which stretch of the row's slots
    pages: Any  # int32 [N], the page that it has; P: none
    refs: Any  # int32 [N], how many rows have that page
    shared: Any  # int32 [N], a number below N for each page that several of them may have

    @classmethod
    def of(cls, pool: Pool, rows: Any, columns: Any) -> _Writes:
        rows, columns = lax.sort((rows, columns), num_keys=2)
        rows = jnp.where(_starts(rows) | _starts(columns), rows, pool.table.shape[0])
        pages = pool.table.at[rows, columns].get(mode="fill", fill_value=pool.num_pages)
        refs = pool.refs.at[pages].get(mode="fill", fill_value=0)
        alike, order = lax.sort((pages, jnp.arange(pages.size, dtype=jnp.int32)), num_keys=1)
        number = jnp.cumsum(_starts(alike), dtype=jnp.int32) - 1
        return cls(rows, columns, pages, refs, jnp.zeros_like(pages).at[order].set(number))

    def wants(self, num_rows: int) -> Any:
        """Returns which of them need a page if all get one: bool [N].

        Those without one do, and those that share theirs; but where all who share a page write to it the last keeps it.
        """
        number = jnp.arange(self.rows.size, dtype=jnp.int32)
        writers = jnp.zeros_like(number).at[self.shared].add(1)
        last = jnp.zeros_like(number).at[self.shared].max(number)
        keeps = (writers[self.shared] == self.refs) & (last[self.shared] == number)
        return (self.rows < num_rows) & ~keeps


def _starts(x: Any) -> Any:
    """Returns where another number stands than just before: bool [N]."""
    return jnp.pad(x[1:] != x[:-1], (1, 0), constant_values=True)[: x.size]


def claim(
    pools: Sequence[Pool], rows: Sequence[Any], columns: Sequence[Any], fit: Any
) -> tuple[Any, list[tuple[Pool, Any]]]:
    """Gives rows pages of their own to write to, all that a row needs in all pools or none, in the order of rows.

    Args:
      pools: one per group.
      rows: per group int32 [N], who writes; R for nobody.
      columns: per group int32 [N], to which stretch of its slots; the same may come several times.
      fit: bool [R], who may write. Nobody else stands in `rows`.

    Returns:
      Those of `fit` that are served, bool [R], and per group the new pool and the copies (source and target pages
      int32 [N], how many of them).
    """
    pools, rows, columns, fit = vary_alike((list(pools), list(rows), list(columns), fit))
    writes = [_Writes.of(pool, r, c) for pool, r, c in zip(pools, rows, columns, strict=True)]
    wants = [w.wants(fit.size) for w in writes]
    enough = [want.sum(dtype=jnp.int32) <= pool.num_free for want, pool in zip(wants, pools, strict=True)]
    fit, needs = lax.cond(jnp.stack(enough).all(), lambda: (fit, wants), lambda: _one_by_one(pools, writes, wants, fit))
    return fit, [_taken(pool, w, need) for pool, w, need in zip(pools, writes, needs, strict=True)]


def _one_by_one(pools: Any, writes: Any, wants: Any, fit: Any) -> Any:
    """Returns which rows are served, bool [R], and which writes get a page, bool [N] per pool, if not all can."""

    def serve(carry: Any, row: Any) -> Any:
        left, free, needs = carry
        wanted = [  # a page that nobody else has any more, as others left it in this call, is kept
            (w.rows == row) & fit[row] & (w.refs - others[w.shared] != 1)
            for w, others in zip(writes, left, strict=True)
        ]
        asked = [want.sum(dtype=jnp.int32) for want in wanted]
        served = fit[row] & jnp.stack([n <= m for n, m in zip(asked, free, strict=True)]).all()
        wanted = [want & served for want in wanted]
        left = [
            others.at[w.shared].add(want.astype(jnp.int32))
            for w, others, want in zip(writes, left, wanted, strict=True)
        ]
        free = [m - jnp.where(served, n, 0) for n, m in zip(asked, free, strict=True)]
        return (left, free, [a | b for a, b in zip(needs, wanted, strict=True)]), served

    nothing = [jnp.zeros_like(want) for want in wants]
    carry = [x.astype(jnp.int32) for x in nothing], [pool.num_free for pool in pools], nothing
    (_, _, needs), served = lax.scan(serve, carry, jnp.arange(fit.size, dtype=jnp.int32))
    return served, needs


def _taken(pool: Pool, writes: _Writes, need: Any) -> tuple[Pool, Any]:
    """Returns the pool after these writes, bool [N], got free pages; and the copies."""
    num_rows, num_pages, size = pool.table.shape[0], pool.num_pages, need.size
    rank = jnp.cumsum(need, dtype=jnp.int32)
    new = pool.free.at[jnp.where(need, pool.num_free - rank, num_pages)].get(mode="fill", fill_value=num_pages)
    old = jnp.where(need, writes.pages, num_pages)
    copied = old < num_pages
    place = jnp.where(copied, jnp.cumsum(copied, dtype=jnp.int32) - 1, size)
    nowhere = jnp.full((size,), num_pages, jnp.int32)
    copies = (
        nowhere.at[place].set(old, mode="drop"),
        nowhere.at[place].set(new, mode="drop"),
        copied.sum(dtype=jnp.int32),
    )
    pool = Pool(
        table=pool.table.at[jnp.where(need, writes.rows, num_rows), writes.columns].set(new, mode="drop"),
        refs=pool.refs.at[old].add(-1, mode="drop").at[new].set(1, mode="drop"),
        free=pool.free,
        num_free=pool.num_free - need.sum(dtype=jnp.int32),
    )
    return pool, copies
