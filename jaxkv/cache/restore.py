"""What `Cache.load` does: rows of a file take their places in a cache.

All is checked, and worked out on the host, before the first number goes into a buffer: from then on nothing can fail.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxkv import aligned
from jaxkv.cache.snapshot import (
    Part,
    Snapshot,
    check_here,
    checked_rows,
    described,
    layout_of,
    leaves,
    one_by_one,
    padded,
    parts,
    with_parts,
)
from jaxkv.cache.spec import EMPTY
from jaxkv.errors import CacheFullError
from jaxkv.meshes import automatic, like

_BLOCK = 2048  # tokens that go to a device at a time


@dataclasses.dataclass(frozen=True)
class _Move:
    """Which tokens of a saved row a row takes, in the layers of one group, and where they go."""

    row: int  # of the file
    count: int  # how many tokens that row has
    tokens: np.ndarray  # int [n], which of them, in the order of their positions
    slots: np.ndarray  # int [n], the row's slots that they go to
    unit: int  # slots that lie together are written together
    units: np.ndarray  # int [m], those that tokens go to, each `unit` slots
    lead: np.ndarray  # int [m], where these lie: rows or pages
    start: np.ndarray  # int [m], the first slot there

    @functools.cached_property
    def stretches(self) -> list[tuple[int, slice, slice | None]]:
        """Slots that lie together: where they lie, and which tokens go there, None for none; the same for all layers.

        All slots of the units are in one, in turn.
        """
        token = np.full(len(self.units) * self.unit, -1)
        token[np.searchsorted(self.units, self.slots // self.unit) * self.unit + self.slots % self.unit] = self.tokens
        lead = np.repeat(self.lead, self.unit)
        slot = (self.start[:, None] + np.arange(self.unit)).reshape(-1)
        goes_on = (np.diff(lead) == 0) & (np.diff(slot) == 1)
        goes_on &= np.where(token[:-1] < 0, token[1:] < 0, np.diff(token) == 1)
        cuts = [0, *(np.flatnonzero(~goes_on) + 1).tolist(), len(token)] if len(token) else []
        found = []
        for begin, end in itertools.pairwise(cuts):
            there, first = int(slot[begin]), int(token[begin])
            tokens = None if first < 0 else slice(first, first + end - begin)
            found.append((int(lead[begin]), slice(there, there + end - begin), tokens))
        return found

    @functools.cached_property
    def blocks(self) -> list[_Block]:
        """The units in turn, as many as go to the device at a time; the same for all layers of the group."""
        which, most, blocks = np.searchsorted(self.units, self.slots // self.unit), max(_BLOCK // self.unit, 1), []
        for begin in range(0, len(self.units), most):
            count = min(most, len(self.units) - begin)
            lead, start = (np.zeros(padded(count), np.int32) for _ in range(2))
            lead[:count], start[:count] = (x[begin : begin + count] for x in (self.lead, self.start))
            here = np.flatnonzero((which >= begin) & (which < begin + count))
            target = (which[here] - begin) * self.unit + self.slots[here] % self.unit
            blocks.append(_Block(lead, start, np.int32(count), self.tokens[here], target, padded(count) * self.unit))
        return blocks


@dataclasses.dataclass(frozen=True)
class _Block:
    """Some units of slots, of which a power of two is written."""

    lead: np.ndarray  # int32 [m]
    start: np.ndarray  # int32 [m]
    count: np.int32  # how many of the m units there are
    source: np.ndarray  # int [n], which tokens of the row
    target: np.ndarray  # int [n], where in the units they go
    size: int  # slots of the m units


def load(
    cache: Any,
    path: str | os.PathLike[str] | Snapshot,
    rows: Sequence[int] | None,
    saved: Sequence[int] | None,
    fingerprint: str | None,
) -> Any:
    """Does what `Cache.load` says."""
    check_here(cache, "load")
    file = path if isinstance(path, Snapshot) else Snapshot(path)
    if fingerprint is not None and fingerprint != file.fingerprint:
        has = "no fingerprint" if file.fingerprint is None else f"the fingerprint {file.fingerprint!r}"
        raise ValueError(
            f"{file.path} has {has}, this model {fingerprint!r}: what other weights made of a text can't go on here"
        )
    taken = checked_rows("load: saved", saved, file.num_rows)
    if rows is None and len(taken) > cache.num_rows:
        raise ValueError(
            f"{file.path} has {len(taken)} rows, this cache {cache.num_rows}; name those to be taken by saved=, or "
            "make a cache of more rows"
        )
    into = np.arange(len(taken)) if rows is None else checked_rows("load: rows", rows, cache.num_rows)
    if len(into) != len(taken):
        raise ValueError(f"load: {len(taken)} saved rows for the {len(into)} rows {into.tolist()}; give as many")
    sources = _sources(file, cache)
    need = int(file.lengths[taken].max())
    if need > cache.capacity:
        raise CacheFullError(
            f"{file.path} has a row of {need} tokens, this cache a capacity of {cache.capacity}; nothing was changed. "
            f"Make one of at least {need}"
        )

    books, moves = _bookkeeping(file, cache, into, taken)
    lengths, ok = np.array(cache.lengths), np.array(cache.ok)
    lengths[into], ok[into] = file.lengths[taken], file.array("ok", bool, (file.num_rows,))[taken]
    puts = [
        (entry, index, name, _Form.of(file, number, name, part))
        for number, (entry, index) in zip(sources, one_by_one(cache), strict=True)
        for name, part in parts(cache.layers[entry]).items()
    ]
    groups = [layer.group for layer in cache.layers]
    file.check([x for entry, _, _, form in puts for move in moves[groups[entry]] for x in form.expect(file, move)])

    stored = _taken_over([{name: part.stored for name, part in parts(layer).items()} for layer in cache.layers])
    computed = {(entry, name) for entry, _, name, form in puts if form.converts}  # the whole stack, if one layer is
    for entry, index, name, form in puts:
        buffers = stored[entry][name]
        for move in moves[groups[entry]]:
            if (entry, name) not in computed and all(map(_in_memory, jax.tree.leaves(buffers))):
                for buffer, array in zip(jax.tree.leaves(buffers), form.arrays(file, move), strict=True):
                    _fill(buffer, index, array, move.stretches)
            else:
                at = None if index is None else np.int32(index)
                for block in form.blocks(file, move):
                    buffers = _write(buffers, at, *block, source=form.storage, target=form.target, size=form.size)
        stored[entry][name] = buffers
    layers = [
        with_parts(layer, {name: jax.tree.map(_placed, mine[name], part.stored) for name, part in parts(layer).items()})
        for layer, mine in zip(cache.layers, stored, strict=True)
    ]
    num_groups, num_books = len(cache.groups), len(cache.groups) + len(cache.recurrent)
    return dataclasses.replace(
        cache,
        layers=tuple(layers),
        groups=tuple(books[:num_groups]),
        recurrent=tuple(books[num_groups:num_books]),
        encoded=None if cache.encoded is None else books[-1],
        lengths=_like(lengths, cache.lengths),
        ok=_like(ok, cache.ok),
    )


def _sources(file: Snapshot, cache: Any) -> list[int]:
    """Returns the number of the file's layer that each layer of the cache goes on from.

    A stack has lost in which order its layers and those of others came, but not that of its own.

    Raises:
      ValueError: if they are not the layers of one model.
    """
    mine = [(entry, described(cache.layers[entry].spec)) for entry, _ in one_by_one(cache)]
    theirs = [(layer["entry"], layer["spec"]) for layer in file.layers]
    if len(mine) != len(theirs):
        raise ValueError(f"{file.path} has {len(theirs)} layers, this cache {len(mine)}; it is of another model")
    in_stacks = any(layer.num_stacked is not None for layer in cache.layers)
    if not (in_stacks or file.stacked):
        for number, ((_, spec), (_, saved)) in enumerate(zip(mine, theirs, strict=True)):
            _check_alike(file, number, spec, saved)
        return list(range(len(mine)))
    sources = [-1] * len(mine)
    for spec in (spec for _, spec in mine):
        ours = [i for i, (_, other) in enumerate(mine) if other == spec]
        found = [i for i, (_, other) in enumerate(theirs) if other == spec]
        if len(found) != len(ours):
            raise ValueError(
                f"{file.path} has {len(found)} layers with {spec}, this cache {len(ours)}; it is of another model"
            )
        cuts = [[side[i][0] for i in which] for side, which in ((mine, ours), (theirs, found))]
        several = [stacked and len(set(cut)) > 1 for stacked, cut in zip((in_stacks, file.stacked), cuts, strict=True)]
        if any(several) and not (all(several) and _runs(cuts[0]) == _runs(cuts[1])):
            raise ValueError(
                f"{file.path}: layers that differ only in how they keep numbers lie in several stacks, and nobody can "
                "tell their order; load it into a cache whose layers are stacked and stored as the saved ones"
            )
        for one, other in zip(ours, found, strict=True):
            sources[one] = other
    return sources


def _runs(entries: list[int]) -> list[int]:
    return [entries.count(entry) for entry in dict.fromkeys(entries)]


def _check_alike(file: Snapshot, number: int, spec: dict[str, str], saved: dict[str, str]) -> None:
    for name in spec | saved:
        if spec.get(name) != saved.get(name):
            raise ValueError(
                f"{file.path}: layer {number} has {name}={saved.get(name)}, in this cache {name}={spec.get(name)}; it "
                "is of another model"
            )


def _bookkeeping(file: Snapshot, cache: Any, rows: Any, taken: Any) -> tuple[Any, list[list[_Move]]]:
    """Returns the books with what the rows have of the file's; and per book the moves of its layers' tokens."""
    books: list[Any] = []
    moves: list[list[_Move]] = []
    for book in cache.bookkeeping:
        if repr(book.reach) not in file.groups:
            raise file.foreign(f"it has no group of {book.reach}")
        prefix = f"groups.{file.groups.index(repr(book.reach))}"
        by_row, by_slot = (
            {name: np.array(getattr(book, name)) for name in names} for names in (book.by_row, book.by_slot)
        )
        saved = {
            name: file.array(f"{prefix}.{name}", x.dtype, (file.num_rows, *x.shape[1:])) for name, x in by_row.items()
        }
        held, settled = np.zeros((len(rows), book.num_slots), bool), []
        for i, (row, r) in enumerate(zip(rows, taken, strict=True)):
            there, count = {}, None
            for name, x in by_slot.items():
                there[name] = file.array(f"rows.{r}.{prefix}.{name}", x.dtype, (count,))
                count = there[name].size
            try:
                kept, slots, of_row = book.settle({n: x[r] for n, x in saved.items()}, there, int(file.lengths[r]))
            except ValueError as error:
                raise file.foreign(f"row {r} has {error}") from error
            for name, x in by_row.items():
                x[row] = of_row[name]
            for name, x in by_slot.items():
                x[row] = EMPTY
                x[row, slots] = there[name][kept]
            held[i, slots] = True
            settled.append((int(r), slots.size if count is None else count, kept, slots))
        layout = layout_of(cache, book)
        pages = layout.refill(book.pages, rows, held)
        table, unit = layout.table(pages), layout.unit(book.num_slots)
        moves.append([])
        for row, (r, count, kept, slots) in zip(rows, settled, strict=True):
            units = np.unique(slots // unit)
            at = layout.places(table, np.full(units.shape, row), units * unit)
            moves[-1].append(_Move(r, count, kept, slots, unit, units, *at))
        changed = {name: _like(x, getattr(book, name)) for name, x in (by_row | by_slot).items()}
        if pages is not None:
            changed["pages"] = jax.tree.map(_like, pages, book.pages)
        books.append(dataclasses.replace(book, **changed))
    return books, moves


@dataclasses.dataclass(frozen=True)
class _Form:
    """How a layer of the file has one part of its tokens."""

    prefix: str  # of the names of arrays, with a place for the row
    storage: Any
    tree: Any  # what its storage allocates for one token: a pytree of [K, 1, h]
    target: Any  # the storage of the cache
    size: int  # of a vector

    @classmethod
    def of(cls, file: Snapshot, number: int, name: str, part: Part) -> _Form:
        """Returns it for a layer's part that goes into one of the cache.

        Raises:
          ValueError: if it can't.
        """
        storage = file.storage(number, f"{name}_storage", part)
        tree = _of_token(storage, part.num_heads, part.size)
        if storage != part.storage:
            try:
                _check_converts(storage, part.storage, part.num_heads, part.size)
            except ValueError as error:
                raise ValueError(f"{file.path}: {name} of layer {number} was kept by {storage}: {error}") from error
        return cls(f"rows.{{}}.layers.{number}.{name}", storage, tree, part.storage, part.size)

    @property
    def converts(self) -> bool:
        """Whether the cache has another storage."""
        return bool(self.storage != self.target)

    def names(self, row: int) -> dict[str, Any]:
        """Returns the names of the arrays of one row, and what one token has in each."""
        return leaves(self.prefix.format(row), self.tree)

    def expect(self, file: Snapshot, move: _Move) -> list[str]:
        """Returns the names of the arrays that a row's tokens are in.

        Raises:
          ValueError: if one isn't there, or has another dtype or shape.
        """
        names = self.names(move.row)
        for name, one in names.items():
            file.expect(name, one.dtype, (one.shape[0], move.count, one.shape[2]))
        return list(names)

    def blocks(self, file: Snapshot, move: _Move) -> Iterator[tuple[Any, Any, Any, Any]]:
        """Yields where some units of slots go, and what lies in them, until all are told.

        Where no token lies in a unit there are zeros: the row has nothing else there.

        Yields:
          lead int32 [m], start int32 [m], how many of the m units there are, pieces [K, m * unit, h].
        """
        arrays = self.arrays(file, move)
        for block in move.blocks:
            pieces = [_filled_up(array, block) for array in arrays]
            tree = jax.tree.unflatten(jax.tree.structure(self.tree), pieces)
            yield block.lead, block.start, block.count, tree

    def arrays(self, file: Snapshot, move: _Move) -> list[np.ndarray]:
        """Returns what the file has of the row, each [K, n, h], in the order of the leaves."""
        return [file.numbers(name, one.dtype) for name, one in self.names(move.row).items()]


@functools.lru_cache(256)  # tracing takes longer than reading what a layer keeps
def _of_token(storage: Any, num_heads: int, size: int) -> Any:
    """Returns what a storage allocates for one token: a pytree of [K, 1, h]."""
    return jax.eval_shape(lambda: storage.zeros((num_heads, 1), size))


@functools.lru_cache(256)
def _check_converts(source: Any, target: Any, num_heads: int, size: int) -> None:
    """Raises ValueError unless what one storage keeps can be put into another."""
    convert = functools.partial(_converted, source=source, target=target, size=size)
    jax.eval_shape(convert, _of_token(source, num_heads, size))


def _filled_up(array: np.ndarray, block: _Block) -> np.ndarray:
    """Returns some tokens of an array [K, n, h] in their places, 0 in others: [K, size, h]."""
    filled = aligned.empty((array.shape[0], block.size, array.shape[2]), array.dtype)
    filled[...] = 0
    filled[:, block.target] = array[:, block.source]
    return filled


def _in_memory(buffer: Any) -> bool:
    """Returns whether a buffer lies in memory that this process can write to, in one piece."""
    devices = buffer.devices()
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


def _taken_over(tree: Any) -> Any:
    """Returns a tree whose buffers in memory nobody else has, so that they can be written in place.

    XLA gives a donated buffer's memory away once nothing reads it any more, and where somebody still holds it, a copy.
    """
    buffers, structure = jax.tree.flatten(tree)
    by_device: dict[Any, list[int]] = {}
    for i, buffer in enumerate(buffers):
        if _in_memory(buffer):
            by_device.setdefault(next(iter(buffer.devices())), []).append(i)
    for places in by_device.values():
        for i, new in zip(places, jax.block_until_ready(_handed_on([buffers[i] for i in places])), strict=True):
            buffers[i] = new
    return jax.tree.unflatten(structure, buffers)


@functools.partial(jax.jit, donate_argnums=0)
def _handed_on(buffers: Any) -> Any:
    return buffers


def _fill(buffer: Any, index: int | None, array: np.ndarray, stretches: list[tuple[int, slice, slice | None]]) -> None:
    """Writes a row's tokens, [K, n, h], into a buffer in memory that nobody else has: nothing is compiled for it."""
    if not buffer.size:
        return
    memory = (ctypes.c_uint8 * buffer.nbytes).from_address(buffer.unsafe_buffer_pointer())
    there = np.frombuffer(memory, np.uint8).view(buffer.dtype).reshape(buffer.shape)
    there = there if index is None else there[index]
    for lead, slots, tokens in stretches:
        there[lead, :, slots] = 0 if tokens is None else array[:, tokens]


@functools.partial(jax.jit, static_argnames=("source", "target", "size"), donate_argnums=0)
def _write(
    buffers: Any, index: Any, lead: Any, start: Any, count: Any, pieces: Any, *, source: Any, target: Any, size: int
) -> Any:
    """Returns the buffers with units of slots, of pieces [K, m * unit, h], at (lead, start) [m]: the first `count`."""

    def write(buffers: Any, index: Any, lead: Any, start: Any, count: Any, pieces: Any) -> Any:
        if source != target:
            pieces = _converted(pieces, source=source, target=target, size=size)
        zero, more = jnp.int32(0), () if index is None else (index,)

        def one(i: Any, buffers: Any) -> Any:
            def put(buffer: Any, x: Any) -> Any:
                unit = x.shape[1] // lead.shape[0]
                x = lax.dynamic_slice_in_dim(x, i * unit, unit, 1).reshape(*[1] * len(more), 1, -1, unit, x.shape[2])
                return lax.dynamic_update_slice(buffer, x, (*more, lead[i], zero, start[i], zero))

            return jax.tree.map(put, buffers, pieces)

        return lax.fori_loop(0, count, one, buffers)

    return automatic(write, like(buffers))(buffers, index, lead, start, count, pieces)


def _converted(pieces: Any, *, source: Any, target: Any, size: int) -> Any:
    """Returns what one storage keeps as another does: [K, n, h] each."""
    return target.encode(source.decode(pieces)[..., :size])


def _like(x: np.ndarray, old: Any) -> Any:
    """Returns an array from the host where another lies."""
    x = np.asarray(x)
    return jax.device_put(x, old.sharding) if old.committed else jax.device_put(x)


def _placed(new: Any, old: Any) -> Any:
    return jax.device_put(new, old.sharding) if old.committed else new
