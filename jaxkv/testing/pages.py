"""What must hold of every cache on pages, read off its arrays on the host."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxkv.cache.cache import Cache
from jaxkv.cache.layer import Layer
from jaxkv.cache.spec import EMPTY, Cross


def assert_pages_sound(cache: Cache) -> None:
    """Checks page tables, reference counts and free lists of a cache on pages against one another.

    In every pool: a table entry is a page, or the number past the last for none; a row has a page exactly where it
    holds a position; each count is how often tables name the page; the free list has every page that no table names,
    once, and no other; rows share a page at one place of their tables only, and agree on the positions that they both
    hold in it.

    Args:
      cache: any cache, not traced. One on rows has no pools, so nothing can be wrong with them.

    Raises:
      AssertionError: with all that is wrong.

    >>> spec = jaxkv.LayerSpec(jaxkv.Full(), num_kv_heads=1, head_dim=2)
    >>> cache = jaxkv.Cache.init([spec], num_rows=2, capacity=8, layout=jaxkv.Pages(num_pages=4, page_size=2))
    >>> cache, step = cache.begin(jnp.array([[0, 1, 2], [0, -1, -1]]))
    >>> assert_pages_sound(cache)
    """
    faults = [
        f"pool of {book.reach}: {fault}"
        for book in cache.bookkeeping
        if book.pages is not None
        for fault in _faults(book.pages, np.asarray(book.held))
    ]
    if faults:
        raise AssertionError("\n".join(["the pages of this cache are not sound:", *faults]))


def _faults(pool: Any, held: np.ndarray) -> Iterator[str]:
    table, refs, free, num_free = (np.asarray(x) for x in (pool.table, pool.refs, pool.free, pool.num_free))
    size = len(refs)
    for row, i in np.argwhere((table < 0) | (table > size)):
        yield f"row {row} names page {table[row, i]} at place {i}; there are pages 0 to {size - 1}, and {size} for none"
    if not 0 <= num_free <= size:
        yield f"{num_free} of {size} pages are said to be free"
    named = (table >= 0) & (table < size)
    counts = np.bincount(table[named], minlength=size)
    for page in np.flatnonzero(counts != refs):
        yield f"page {page} counts {refs[page]} references, but the tables name it {counts[page]} times"
    free = free[: max(0, int(num_free))]
    there = (free >= 0) & (free < size)
    if not there.all():
        yield f"the free list names pages that there are not: {free}"
    listed = np.bincount(free[there], minlength=size)
    for page in np.flatnonzero(listed > 1):
        yield f"the free list has page {page} {listed[page]} times"
    for page in np.flatnonzero((listed > 0) & (counts > 0)):
        yield f"page {page} is in use and in the free list"
    for page in np.flatnonzero((listed == 0) & (counts == 0)):
        yield f"page {page} is lost: in no table and not in the free list"
    held = held.reshape(*table.shape, -1)
    for row, i in np.argwhere(named != (held != EMPTY).any(-1)):
        has = f"has page {table[row, i]}" if named[row, i] else "has no page"
        yield f"row {row} {has} at place {i}, where it holds positions {held[row, i][held[row, i] != EMPTY].tolist()}"
    for page in np.flatnonzero(counts > 1):
        (first, place), *others = np.argwhere(table == page)
        for row, i in others:
            a, b = held[first, place], held[row, i]
            if i != place or ((a != b) & (a != EMPTY) & (b != EMPTY)).any():
                yield (
                    f"page {page} is at place {place} of row {first} with positions {a.tolist()}, "
                    f"at place {i} of row {row} with {b.tolist()}"
                )


def assert_only_written(before: Cache, after: Cache, positions: Any, rows: Any = None) -> None:
    """Checks that a forward pass has changed no key and no value but those of the tokens it was given.

    On pages that is: nothing was written into a page that another row reads too, and what was copied first was copied
    whole. Bits are compared, of all layers but Cross, at all positions that a row held before and still holds.

    Args:
      before: the cache that `begin` was called on; it must not have been donated.
      after: the cache after all layers have put.
      positions: int [B, T], as `begin` got them.
      rows: int [B], as `begin` got them.

    Raises:
      AssertionError: at the first row that changed, with its position, layer and place.

    >>> spec = jaxkv.LayerSpec(jaxkv.Full(), num_kv_heads=1, head_dim=2)
    >>> before = jaxkv.Cache.init([spec], num_rows=2, capacity=8)
    >>> after, step = before.begin(jnp.array([[0], [0]]))
    >>> after = after.with_layers([after.layers[0].put(step, jnp.ones((2, 1, 1, 2)), jnp.ones((2, 1, 1, 2)))])
    >>> assert_only_written(before, after, [[0], [0]])
    """
    positions = np.asarray(positions)
    names = range(len(positions)) if rows is None else np.asarray(rows).tolist()
    written = {(int(row), int(p)) for row, new in zip(names, positions, strict=True) for p in new}
    assert_unchanged(before, after, written=written)


def assert_unchanged(
    before: Cache,
    after: Cache,
    *,
    sources: Sequence[int] | None = None,
    written: Collection[tuple[int, int]] = (),
    encoded: Collection[int] = (),
) -> None:
    """Checks bit by bit that rows still hold the keys and values they held, or those of the rows they were made of.

    Args:
      before, after: caches of the same specs.
      sources: for each row of `after`, the row of `before` that it comes from; outside [0, R) for none. None: itself.
      written: pairs (row of `after`, position) that may differ.
      encoded: rows of `after` whose encoder outputs may differ.

    Raises:
      AssertionError: at the first difference.
    """
    rows = np.arange(after.num_rows) if sources is None else np.asarray(sources)
    known = (rows >= 0) & (rows < before.num_rows)
    rows = np.where(known, rows, 0)
    for i, (old, new) in enumerate(zip(before.layers, after.layers, strict=True)):
        cross = isinstance(new.spec.reach, Cross)
        source, book = before.bookkeeping[old.group], after.bookkeeping[new.group]
        held = np.asarray(book.held)
        watched = (held != EMPTY) & (np.asarray(source.held)[rows] == held) & known[:, None]
        for row, p in () if cross else written:
            watched[row : row + 1][held[row : row + 1] == p] = False
        watched[[row for row in encoded if cross and 0 <= row < len(held)]] = False
        names = ("k", "v", "a side") if isinstance(new, Layer) else ("the tail", "the state")
        for name, x, y in zip(names, old.buffers, new.buffers, strict=True):
            for leaves in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
                a, b = _contents(leaves[0], source)[..., rows, :, :, :], _contents(leaves[1], book)
                changed = watched & (a != b).any((*range(a.ndim - 4), -3, -1))
                if changed.any():
                    row, slot = np.argwhere(changed)[0]
                    raise AssertionError(
                        f"row {row} was given nothing at position {held[row, slot]}, but {name} of layer {i}, "
                        f"{new.spec.reach}, changed there (slot {slot})"
                    )


def _contents(buffer: Any, book: Any) -> np.ndarray:
    """Returns what every row has in every slot, as bytes: uint8 [..., R, K, V, bytes]."""
    x = np.ascontiguousarray(np.asarray(buffer))
    x = x.view(np.uint8).reshape(*x.shape[:-1], -1)
    if book.pages is None:
        return x
    x = np.take(x, np.asarray(book.pages.table), axis=-4, mode="clip")  # [..., R, V / page_size, K, page_size, bytes]
    x = np.moveaxis(x, -3, -4)
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])
