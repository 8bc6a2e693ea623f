"""What a cache, and what a query of a step sees, looks like: pictures of slots, pages and masks."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import jax
import numpy as np

from jaxkv.cache.spec import EMPTY
from jaxkv.picture import Cell, Panel, Picture, Strip, runs

_MOST = 48  # cells of a strip; longer ones show several slots in each


def show(cache: Any, rows: Sequence[int] | None = None) -> Picture:
    """Draws a cache: per group of layers a strip of slots for each row, in the order in which they lie.

    A cell tells the position of its token; in a long row a cell stands for several slots. Behind the row stand the
    positions that a ring has lost. With pages, the rows' pages
    are drawn by number, then the pool: which pages are free, and which are shared.

    Args:
      cache: a Cache, outside of jit.
      rows: which rows; None: all.

    Returns:
      A `Picture`: a notebook draws it, `print` writes it as text, `.save("cache.svg")` writes a file.

    Raises:
      ValueError: for a cache that is being traced, or a row that there isn't.

    >>> cache = jaxkv.Cache.init([jaxkv.LayerSpec(jaxkv.Window(3), 1, 2)], num_rows=2, capacity=16, max_block=2)
    >>> for start in (0, 2, 4):
    ...     cache, _ = cache.begin(jnp.array([[start, start + 1], [start, -1]]))
    >>> print(jaxkv.show(cache))
    1 layer Window(size=3, sinks=0): slots by row
      row 0   4 5 2 3   lost 0-1
      row 1   4 . 2 .   lost 0
    <BLANKLINE>
      # held   . empty
    """
    if not _concrete(cache.lengths):
        raise ValueError("show draws a cache outside of jit; this one is traced or abstract, print it instead")
    known = range(cache.num_rows)
    chosen = list(known if rows is None else rows)
    for row in chosen:
        if row not in known:
            raise ValueError(f"show: there is no row {row}; the cache has rows 0 to {cache.num_rows - 1}")
    panels = []
    for number, group in enumerate(cache.bookkeeping):
        layers = sum(layer.num_kept for layer in cache.layers if layer.group == number)
        title = f"{layers} layer{'s' * (layers > 1)} {group.reach}"
        held = np.asarray(group.held)
        sinks = group.reach.sinks if hasattr(group.reach, "sinks") else 0
        strips = [Strip(f"row {row}", _slots(held[row], sinks), _lost(cache, group, row)) for row in chosen]
        panels.append(Panel(f"{title}: slots by row", tuple(strips)))
        if group.pages is not None:
            panels += _pool(title, group.pages, chosen)
    return Picture(tuple(panels))


def show_mask(step: Any, layer: Any, row: int = 0, tokens: Sequence[str] | None = None) -> Picture:
    """Draws the mask of one batch row: a line for each query, a column for each token that the layer holds.

    Args:
      step: from `Cache.begin`, outside of jit.
      layer: a layer of the cache; its reach decides.
      row: which batch row.
      tokens: the texts of the row's tokens by position, drawn beside the positions.

    Returns:
      A `Picture`, see `show`.

    Raises:
      ValueError: for a step that is traced, or a batch row that there isn't.

    >>> cache = jaxkv.Cache.init([jaxkv.LayerSpec(jaxkv.Window(2), 1, 2)], num_rows=1, capacity=16)
    >>> cache, step = cache.begin(jnp.array([[0, 1, 2]]))
    >>> print(jaxkv.show_mask(step, cache.layers[0]))
    Window(size=2, sinks=0): batch row 0, a line per query
          0 1 2
      0   1 . .
      1   1 1 .
      2   . 1 1
    <BLANKLINE>
      1 visible   . not visible
    """
    if not _concrete(step.positions):
        raise ValueError("show_mask draws a step outside of jit; this one is traced")
    if not 0 <= row < step.positions.shape[0]:
        raise ValueError(f"show_mask: there is no batch row {row}; the step has 0 to {step.positions.shape[0] - 1}")
    layer.check_step(step)
    group = step.groups[layer.group]
    *_, mask = layer.get(step)
    see = np.asarray(mask)[row, 0]  # [T, S]
    held, queries = np.asarray(group.kv_positions)[row], np.asarray(step.positions)[row]
    slots = [slot for slot in np.argsort(held, kind="stable").tolist() if held[slot] != EMPTY]

    def name(position: int) -> str:
        return f"{position} {tokens[position]}" if tokens is not None and position < len(tokens) else str(position)

    strips = []
    for t in np.flatnonzero(queries != EMPTY).tolist():
        cells = [
            Cell("seen" if see[t, s] else "hidden", title=f"query {name(queries[t])}, key {name(held[s])}")
            for s in slots
        ]
        strips.append(Strip(name(int(queries[t])), tuple(cells)))
    title = f"{layer.spec.reach}: batch row {row}, a line per query"
    return Picture((Panel(title, tuple(strips), tuple(name(int(held[s])) for s in slots)),))


def show_step(step: Any) -> Picture:
    """Draws where the tokens of one call lie: per group and batch row the slots, with those written in this call."""
    panels = []
    for number, group in enumerate(step.groups):
        if group is None:
            continue
        new = np.asarray(group.slots) if group.slots is not None else np.zeros((step.positions.shape[0], 0), int)
        strips = [
            Strip(f"batch row {row}", _slots(held, 0, new[row]))
            for row, held in enumerate(np.asarray(group.kv_positions))
        ]
        panels.append(Panel(f"group {number}: slots by batch row", tuple(strips)))
    return Picture(tuple(panels))


def html(node: Any, draw: Any) -> str:
    """Returns what a notebook shows of a cache or step: its picture, or its repr if it is traced or abstract."""
    arrays = [x for x in jax.tree.leaves(node) if not isinstance(x, int)]
    if all(_concrete(x) and not (isinstance(x, jax.Array) and x.is_deleted()) for x in arrays):
        return draw(node)._repr_html_()
    return f"<pre>{escape(repr(node))}</pre>"


def _lost(cache: Any, group: Any, row: int) -> str:
    """Returns which positions of a row a ring has overwritten, as a note; those past its end were never there."""
    if not hasattr(group, "lost"):
        return ""
    low, high = np.asarray(group.lost)[row].tolist()
    high = min(high, int(cache.lengths[row]))
    return "" if low >= high else f"lost {low}" if high == low + 1 else f"lost {low}-{high - 1}"


def _concrete(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray) and not isinstance(x, jax.core.Tracer)


def _slots(positions: np.ndarray, sinks: int, new: Sequence[int] = ()) -> tuple[Cell, ...]:
    """Returns a strip of cells for slots with these positions, EMPTY where nothing lies; `new` slots are marked."""
    each = -(-positions.size // _MOST)
    cells = []
    for start in range(0, positions.size, each):
        part = positions[start : start + each]
        there = np.sort(part[part != EMPTY])
        where = f"slot {start}" if each == 1 else f"slots {start}-{start + part.size - 1}"
        kind = "free" if there.size == 0 else "sink" if there[-1] < sinks else "held"
        if np.isin(np.arange(start, start + part.size), new).any():
            kind = "new"
        text = str(there[0]) if each == 1 and there.size else ""
        cells.append(Cell(kind, text, f"{where}: {f'positions {runs(there)}' if there.size else 'empty'}"))
    return tuple(cells)


def _pool(title: str, pool: Any, rows: Sequence[int]) -> list[Panel]:
    table, refs = np.asarray(pool.table), np.asarray(pool.refs)
    strips = []
    for row in rows:
        pages = [page for page in table[row].tolist() if page < refs.size]
        strips.append(Strip(f"row {row}", tuple(_page(page, refs) for page in pages[:_MOST])))
    whole = tuple(_page(page, refs) for page in range(min(refs.size, 8 * _MOST)))
    lines = tuple(Strip("pool" if i == 0 else "", whole[i : i + _MOST]) for i in range(0, len(whole), _MOST))
    free = int((refs == 0).sum())
    return [Panel(f"{title}: pages by row", tuple(strips)), Panel(f"{title}: {free} of {refs.size} pages free", lines)]


def _page(page: int, refs: np.ndarray) -> Cell:
    kind = "free" if refs[page] == 0 else "held" if refs[page] == 1 else "shared"
    return Cell(kind, str(page), f"page {page}: rows that have it: {refs[page]}")
