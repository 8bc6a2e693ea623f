"""What `Cache.load` does: rows of a file take their places in a cache.

All is checked, and worked out on the host, before the first number goes into a buffer: from then on nothing can fail.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.cache.arguments import FAR
from jaxkv.cache.group import Group
from jaxkv.cache.snapshot import (
    Part,
    Snapshot,
    check_here,
    checked_rows,
    described,
    leaves,
    one_by_one,
    padded,
    parts,
    with_parts,
)
from jaxkv.cache.spec import EMPTY
from jaxkv.errors import CacheFullError
from jaxkv.meshes import automatic, like

_BLOCK = 2048  # tokens that go to the device at a time


@dataclasses.dataclass(frozen=True)
class _Move:
    """Which tokens of a saved row a row takes, in the layers of one group, and where they go."""

    row: int  # of the file
    count: int  # how many tokens that row has
    tokens: np.ndarray  # int [n], which of them, in the order of their positions
    lead: np.ndarray  # int [n], where they go: rows or pages
    slots: np.ndarray  # int [n]


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
        of = "without a fingerprint" if file.fingerprint is None else f"of a model with fingerprint {file.fingerprint!r}"
        raise ValueError(f"{file.path} was saved {of}, and this one has {fingerprint!r}; its rows can't go on here")
    taken = checked_rows("load: saved", saved, file.num_rows)
    if rows is None and len(taken) > cache.num_rows:
        raise ValueError(
            f"{file.path} has {len(taken)} rows, this cache {cache.num_rows}; name those to be taken by saved=, or make "
            "a cache of more rows"
        )
    rows = np.arange(len(taken)) if rows is None else checked_rows("load: rows", rows, cache.num_rows)
    if len(rows) != len(taken):
        raise ValueError(f"load: {len(taken)} saved rows for the {len(rows)} rows {rows.tolist()}; give as many")
    sources = _sources(file, cache)
    need = int(file.lengths[taken].max())
    if need > cache.capacity:
        raise CacheFullError(
            f"{file.path} has a row of {need} tokens, this cache a capacity of {cache.capacity}; nothing was changed. "
            f"Make one of at least {need}"
        )

    changes, moves = _bookkeeping(file, cache, rows, taken)
    where = list(zip(sources, one_by_one(cache), strict=True))
    names = []
    for number, (entry, _) in where:
        for name, part in parts(cache.layers[entry]).items():
            form = _Form.of(file, number, name, part)
            for move in moves[cache.layers[entry].group]:
                names += form.expect(file, move)
    file.check(names)

    layers = list(cache.layers)
    for number, (entry, index) in where:
        stored = {}
        for name, part in parts(layers[entry]).items():
            form = _Form.of(file, number, name, part)
            buffers = part.stored
            for move in moves[layers[entry].group]:
                for block in form.blocks(file, move, buffers):
                    at = None if index is None else np.int32(index)
                    buffers = _write(buffers, at, *block, source=form.storage, target=part.storage, size=part.size)
            stored[name] = jax.tree.map(_placed, buffers, part.stored)
        layers[entry] = with_parts(layers[entry], stored)
    return dataclasses.replace(cache, layers=tuple(layers), **changes)


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


def _bookkeeping(file: Snapshot, cache: Any, rows: Any, taken: Any) -> tuple[dict[str, Any], list[list[_Move]]]:
    """Returns what changes of the cache beside its layers, by field; and per book the moves of its layers' tokens."""
    moves: list[list[_Move]] = []

    def moved(group: Any, tokens: list[tuple[int, Any, Any]]) -> Any:
        """Returns the book of pages with these tokens of the rows: (how many there are, which are taken, slots)."""
        held = np.zeros((len(rows), group.num_slots), bool)
        for i, (_, _, slots) in enumerate(tokens):
            held[i, slots] = True
        pages = cache.layout.refill(group.pages, rows, held)
        table = cache.layout.table(pages)
        places = [cache.layout.places(table, np.full(t[2].shape, row), t[2]) for row, t in zip(rows, tokens, strict=True)]
        moves.append([_Move(int(r), t[0], t[1], *at) for r, t, at in zip(taken, tokens, places, strict=True)])
        return jax.tree.map(_like, pages, group.pages)

    groups = []
    for group in cache.groups:
        if repr(group.reach) not in file.groups:
            raise file.foreign(f"it has no group of {group.reach}")
        source = file.groups.index(repr(group.reach))
        positions, lost = np.array(group.positions), np.array(group.lost)
        saved = file.array(f"groups.{source}.lost", np.int32, (file.num_rows, 2))
        tokens = []
        for row, r in zip(rows, taken, strict=True):
            there = file.array(f"rows.{r}.groups.{source}.positions", np.int32, (None,))
            if not (np.diff(there, prepend=EMPTY) > 0).all() or (there >= file.lengths[r]).any():
                raise file.foreign(f"row {r} has positions that are not in order, or beyond its length")
            if not ((saved[r] >= 0) & (saved[r] <= FAR)).all():
                raise file.foreign(f"row {r} has lost positions that there can't be")
            kept, lost[row] = _room(group, there, saved[r])
            slots = group.slot(there[kept])
            positions[row] = EMPTY
            positions[row, slots] = there[kept]
            tokens.append((there.size, kept, slots))
        pages = moved(group, tokens)
        places = _like(positions, group.positions), _like(lost, group.lost)
        groups.append(dataclasses.replace(group, positions=places[0], lost=places[1], pages=pages))
    lengths, ok = np.array(cache.lengths), np.array(cache.ok)
    lengths[rows], ok[rows] = file.lengths[taken], file.array("ok", bool, (file.num_rows,))[taken]
    changes = {"groups": tuple(groups), "lengths": _like(lengths, cache.lengths), "ok": _like(ok, cache.ok)}
    if cache.encoded is not None:
        encoded = np.array(cache.encoded.lengths)
        saved = file.array("encoded", np.int32, (file.num_rows,))[taken]
        if not ((saved >= EMPTY) & (saved <= cache.encoded.reach.size)).all():
            raise file.foreign("an encoder's output has a length that none can have")
        encoded[rows] = saved
        slots = [np.arange(max(n, 0)) for n in saved]
        pages = moved(cache.encoded, [(x.size, x, x) for x in slots])
        at = _like(encoded, cache.encoded.lengths)
        changes["encoded"] = dataclasses.replace(cache.encoded, lengths=at, pages=pages)
    return changes, moves


def _room(group: Group, positions: Any, lost: Any) -> tuple[Any, Any]:
    """Returns which of a row's positions int32 [n], in order, a group has slots for: int [k]; and what it then lost."""
    sinks = group.reach.sinks
    gone = int(positions[-1]) + 1 - group.ring if positions.size else 0  # later ones lie in the slots of those below
    if gone <= sinks:
        return np.arange(positions.size), lost
    kept = np.flatnonzero((positions < sinks) | (positions >= gone))
    if lost[0] >= lost[1]:
        return kept, np.array([sinks, gone], np.int32)
    return kept, np.array([min(lost[0], sinks), max(lost[1], gone)], np.int32)


@dataclasses.dataclass(frozen=True)
class _Form:
    """How a layer of the file has one part of its tokens."""

    prefix: str  # of the names of arrays, with a place for the row
    storage: Any
    tree: Any  # what its storage allocates for one token: a pytree of [K, 1, h]

    @classmethod
    def of(cls, file: Snapshot, number: int, name: str, part: Part) -> _Form:
        """Returns it for a layer's part that goes into one of the cache.

        Raises:
          ValueError: if it can't.
        """
        storage = file.storage(number, f"{name}_storage", part)
        tree = jax.eval_shape(functools.partial(storage.zeros, (part.num_heads, 1), part.size))
        if storage != part.storage:
            try:
                jax.eval_shape(functools.partial(_converted, source=storage, target=part.storage, size=part.size), tree)
            except ValueError as error:
                raise ValueError(f"{file.path}: {name} of layer {number} was kept by {storage}: {error}") from error
        return cls(f"rows.{{}}.layers.{number}.{name}", storage, tree)

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

    def blocks(self, file: Snapshot, move: _Move, buffers: Any) -> Iterator[tuple[Any, Any, Any]]:
        """Yields where some tokens go and what they are, block by block: lead int32 [n], slots int32 [n], pieces.

        n is one of few numbers; what is added to make it so goes nowhere, a place past the end.
        """
        nowhere = jax.tree.leaves(buffers)[0].shape[-4]
        arrays = [file.numbers(name, one.dtype) for name, one in self.names(move.row).items()]
        for begin in range(0, len(move.tokens), _BLOCK):
            tokens = move.tokens[begin : begin + _BLOCK]
            n = padded(len(tokens))
            lead, slots = nowhere + np.arange(n, dtype=np.int32), np.zeros(n, np.int32)
            lead[: len(tokens)] = move.lead[begin : begin + _BLOCK]
            slots[: len(tokens)] = move.slots[begin : begin + _BLOCK]
            together = int(tokens[-1]) - int(tokens[0]) + 1 == len(tokens)
            which = slice(int(tokens[0]), int(tokens[-1]) + 1) if together else tokens
            pieces = []
            for array in arrays:
                piece = array[:, which]
                if n > len(tokens):
                    piece = np.concatenate([piece, np.zeros((len(piece), n - len(tokens), piece.shape[2]), piece.dtype)], 1)
                pieces.append(piece)
            yield lead, slots, jax.tree.unflatten(jax.tree.structure(self.tree), pieces)


@functools.partial(jax.jit, static_argnames=("source", "target", "size"), donate_argnums=0)
def _write(
    buffers: Any, index: Any, lead: Any, slots: Any, pieces: Any, *, source: Any, target: Any, size: int
) -> Any:
    """Returns the buffers with pieces [K, n, h] of n tokens at (lead, slots); nowhere where `lead` is past the end."""

    def write(buffers: Any, index: Any, lead: Any, slots: Any, pieces: Any) -> Any:
        if source != target:
            pieces = _converted(pieces, source=source, target=target, size=size)
        at = (lead, slice(None), slots) if index is None else (index, lead, slice(None), slots)
        return jax.tree.map(
            lambda buffer, x: buffer.at[at].set(x.swapaxes(0, 1), mode="drop", unique_indices=True), buffers, pieces
        )

    return automatic(write, like(buffers))(buffers, index, lead, slots, pieces)


def _converted(pieces: Any, *, source: Any, target: Any, size: int) -> Any:
    """Returns what one storage keeps as another does: [K, n, h] each."""
    return target.encode(source.decode(pieces)[..., :size])


def _like(x: np.ndarray, old: Any) -> Any:
    """Returns an array from the host where another lies."""
    x = np.asarray(x)
    return jax.device_put(x, old.sharding) if old.committed else jnp.asarray(x)


def _placed(new: Any, old: Any) -> Any:
    return jax.device_put(new, old.sharding) if old.committed else new
