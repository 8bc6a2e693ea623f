"""Editing: forgetting, moving and copying what sequences hold."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv.cache.arguments import FAR
from jaxkv.cache.group import resume
from jaxkv.cache.layer import Layer
from jaxkv.cache.recurrent import common
from jaxkv.cache.spec import EMPTY, Cross, LayerSpec


def resume_point(cache: Any, row: Any, known: Any, position: Any) -> Any:
    """Returns `Cache.resume_point` of a row that is known."""
    position = jnp.clip(position, 0, jnp.where(known, cache.lengths[row], 0))
    lost = [group.lost[row] for group in cache.groups]
    return _resume(cache, position, lost, [states.positions[row] for states in cache.recurrent])


def rewind(cache: Any, lengths: Any) -> Any:
    """Returns `Cache.rewind`; lengths int32 [R]."""
    lost, positions = [group.lost for group in cache.groups], [states.positions for states in cache.recurrent]
    landed = _resume(cache, jnp.clip(lengths, 0, cache.lengths), lost, positions)
    landed = jnp.where(lengths >= cache.lengths, cache.lengths, landed)
    groups = [_paged(cache.layout, group.truncate(landed)) for group in cache.groups]
    recurrent = tuple(states.truncate(landed) for states in cache.recurrent)
    return dataclasses.replace(cache, groups=tuple(groups), recurrent=recurrent, lengths=landed)


def checkpoint(cache: Any, rows: Any) -> Any:
    """Returns `Cache.checkpoint`; rows int32 [B]."""
    known = (rows >= 0) & (rows < cache.num_rows)
    mask = jnp.zeros_like(cache.ok).at[jnp.where(known, rows, cache.num_rows)].set(True, mode="drop")
    recurrent = tuple(states.checkpoint(cache.lengths, mask) for states in cache.recurrent)
    return dataclasses.replace(cache, recurrent=recurrent)


def reset(cache: Any, mask: Any) -> Any:
    """Returns `Cache.reset`; mask bool [R]."""
    cache = rewind(cache, jnp.where(mask, 0, FAR))
    encoded = None if cache.encoded is None else _paged(cache.layout, cache.encoded.reset(mask))
    return dataclasses.replace(cache, ok=cache.ok | mask, encoded=encoded)


def keep(cache: Any, mask: Any) -> Any:
    """Returns `Cache.keep`; mask bool [R, capacity]."""
    groups = []
    for group in cache.groups:
        kept = jnp.take_along_axis(mask, jnp.maximum(group.positions, 0), 1)
        positions = jnp.where(kept, group.positions, EMPTY)
        groups.append(_paged(cache.layout, dataclasses.replace(group, positions=positions)))
    return dataclasses.replace(cache, groups=tuple(groups))


def remove(cache: Any, row: Any, known: Any, begin: Any, end: Any) -> Any:
    """Returns `Cache.remove` with an end; row int32, one that there is."""
    length = jnp.where(known, cache.lengths[row], 0)
    begin = jnp.clip(begin, 0, length)
    end = jnp.clip(end, begin, length)
    moves = [group.remove(row, begin, end) for group in cache.groups]
    changed = [delta != 0 for _, _, delta in moves]

    books = [group.pages for group in cache.groups]
    sequence = [jnp.where(x, row, cache.num_rows)[None] for x in changed]
    slots = [jnp.arange(x.size, dtype=jnp.int32)[None] for x in changed]
    fit, claimed = cache.layout.claim(books, sequence, slots, jnp.ones_like(cache.ok))
    fit = fit[row]
    pages = [(before, after) for before, (after, _) in zip(books, claimed, strict=True)]
    groups = []
    for group, (removed, _, _), (_, after) in zip(cache.groups, moves, pages, strict=True):
        removed = jax.tree.map(lambda new, old: jnp.where(fit, new, old), removed, group)
        groups.append(_paged(cache.layout, dataclasses.replace(removed, pages=after)))

    def moved(layer: Layer) -> Layer:
        if isinstance(layer.spec.reach, Cross) or not layer.num_kept:
            return layer
        number = layer.group
        _, sources, delta = moves[number]

        def move(buffers: Any, shift: Callable[[Any], Any]) -> Any:
            return layer.layout.move(buffers, row, sources, changed[number] & fit, pages[number], shift)

        shift = functools.partial(_shift_keys, layer.spec, delta)
        shift_side = functools.partial(_shift_side, layer.spec, delta)
        sides = {name: move(side, functools.partial(shift_side, name)) for name, side in layer.sides.items()}
        return layer.with_buffers((move(layer.k, shift), move(layer.v, lambda x: x), sides))

    return dataclasses.replace(
        cache,
        layers=tuple(moved(layer) for layer in cache.layers),
        groups=tuple(groups),
        lengths=cache.lengths.at[row].add(jnp.where(fit, begin - end, 0)),
        ok=cache.ok.at[row].min(fit),
    )


def copy_prefix(cache: Any, src: Any, src_known: Any, dst: Any, dst_known: Any, length: Any) -> Any:
    """Returns `Cache.copy_prefix`; src and dst int32, rows that there are."""
    held = jnp.where(src_known, cache.lengths[src], 0)
    landed = resume_point(cache, src, src_known, length)
    untouched = (src == dst) & src_known & (length >= held)  # as rewind says
    landed = jnp.where(untouched, held, landed)
    filled = [group.filled(held if group.wraps else landed) for group in cache.groups]
    filled += [jnp.int32(states.num_slots) for states in cache.recurrent]
    if cache.encoded is not None:
        filled.append(jnp.where(src_known, cache.encoded.filled[src], 0))
    filled = [jnp.where(dst_known, x, 0) for x in filled]
    to = jnp.where(dst_known, dst, cache.num_rows)
    rows = jnp.arange(cache.num_rows, dtype=jnp.int32).at[to].set(src, mode="drop")
    groups = [_paged(cache.layout, group.copy_prefix(src, to, landed), rows) for group in cache.groups]
    recurrent = tuple(states.copy_prefix(src, to, landed) for states in cache.recurrent)
    encoded = None
    if cache.encoded is not None:
        encoded = _paged(cache.layout, cache.encoded.copy(src, src_known, to), rows)
    return dataclasses.replace(
        cache,
        layers=_each_group(cache.layers, lambda layout, group, x: layout.copy(x, src, dst, filled[group])),
        groups=tuple(groups),
        recurrent=recurrent,
        encoded=encoded,
        lengths=cache.lengths.at[to].set(landed, mode="drop"),
        ok=cache.ok.at[to].set(True, mode="drop"),
    )


def take(cache: Any, rows: Any) -> Any:
    """Returns `Cache.take`; rows int32 [R2]."""
    known = (rows >= 0) & (rows < cache.num_rows)
    rows = jnp.clip(rows, 0, cache.num_rows - 1)
    lengths = jnp.where(known, cache.lengths[rows], 0)
    filled = [group.filled(lengths).max(initial=0) for group in cache.groups]
    filled += [jnp.int32(states.num_slots) for states in cache.recurrent]
    groups = [_paged(cache.layout, group.take(rows, known), rows) for group in cache.groups]
    recurrent = tuple(states.take(rows, known) for states in cache.recurrent)
    encoded = None
    if cache.encoded is not None:
        filled.append(jnp.where(known, cache.encoded.filled[rows], 0).max(initial=0))
        encoded = _paged(cache.layout, cache.encoded.take(rows, known), rows)
    return dataclasses.replace(
        cache,
        layers=_each_group(cache.layers, lambda layout, group, x: layout.take(x, rows, filled[group])),
        groups=tuple(groups),
        recurrent=recurrent,
        encoded=encoded,
        lengths=lengths,
        ok=jnp.where(known, cache.ok[rows], True),
    )


def _paged(layout: Any, group: Any, rows: Any = None) -> Any:
    """Returns a Group or Encoded after its rows changed, with the pages of what they now hold.

    `rows` int32 [R2] says whose pages they are that each row has now; None: its own.
    """
    return dataclasses.replace(group, pages=layout.keep(group.pages, group.in_use, rows))


def _resume(cache: Any, position: Any, lost: list[Any], states: list[Any]) -> Any:
    """Returns the largest resume point <= position [...] of all layers.

    lost: of each group, [..., 2]; states: of each group of recurrent layers, after how many tokens there is one,
    [..., C].
    """
    if states:  # each place where all of them have a state is tried, and the empty row
        places = common(states)
        lost = [interval[..., None, :] for interval in lost]
        fine = (places <= position[..., None]) & (_resume(cache, places, lost, []) == places)
        return jnp.where(fine, places, 0).max(-1, initial=0)
    for _ in range(2 * len(cache.groups)):  # one group's fallback may move another's
        for group, interval in zip(cache.groups, lost, strict=True):
            position = resume(group.reach, interval, position)
    return position


def _each_group(layers: Sequence[Any], f: Callable[[Any, int, Any], Any]) -> tuple[Any, ...]:
    """Returns the layers with f(layout, group, buffers) of the buffers of all layers of each group together."""
    changed = list(layers)
    for group in sorted({layer.group for layer in layers}):
        own = [i for i, layer in enumerate(layers) if layer.group == group]
        buffers = f(layers[own[0]].layout, group, [layers[i].buffers for i in own])
        for i, x in zip(own, buffers, strict=True):
            changed[i] = layers[i].with_buffers(x)
    return tuple(changed)


def _shift_keys(spec: LayerSpec, delta: Any, stored: Any) -> Any:
    """Returns what is stored of keys [..., V, H], a pytree, re-rotated by delta [V]."""
    if spec.rotary_at == "read":  # what is stored does not depend on where it stands
        return stored
    return _shifted(spec.k_storage, spec.rotary, spec.k_dim, delta, stored)


def _shift_side(spec: LayerSpec, delta: Any, name: str, stored: Any) -> Any:
    """Returns the same of a side buffer, if that is to be re-rotated."""
    side = dict(spec.side_buffers).get(name)
    if side is None or side.rotary is None:
        return stored
    return _shifted(side.storage, side.rotary, side.size, delta, stored)


def _shifted(storage: Any, rotary: Any, size: int, delta: Any, stored: Any) -> Any:
    x = storage.decode(stored)[..., :size]
    by = delta.reshape((1,) * (x.ndim - 2) + (-1, 1))
    by = jnp.broadcast_to(by, (*x.shape[:-1], 1))
    shifted = storage.encode(rotary.shift(x, by))
    return jax.tree.map(lambda new, old: jnp.where(by != 0, new, old), shifted, stored)
