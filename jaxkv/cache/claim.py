"""Claiming: which slots the tokens of one forward pass get, all or nothing per sequence.

Count what each sequence brings, serve those that fit, only then write: nothing is half done.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv.cache.arguments import FAR
from jaxkv.cache.recurrent import StateStep, goes_on, packing
from jaxkv.cache.spec import EMPTY
from jaxkv.cache.step import GroupStep, Step
from jaxkv.cache.tree import Tree


def claim(
    cache: Any, positions: Any, rows: Any, known: Any, spans: Any, parents: Any, *, whole: bool
) -> tuple[Any, Step]:
    """Returns (cache, step) of `Cache.begin`.

    Args:
      cache: a Cache.
      positions: int32 [B, T], negative for padding.
      rows: int32 [B].
      known: bool [B], whether there is such a row.
      spans, parents: int32 [B, T] or None.
      whole: whether batch row b is sequence b, for all sequences.
    """
    num_rows = cache.num_rows
    real = (positions >= 0) & known[:, None]
    sequence = jnp.where(real, rows[:, None], num_rows)  # R means nowhere
    lowest, highest, count = _brought(sequence, positions, real, num_rows, whole)
    dense = highest - lowest < count
    takes_part = highest >= 0

    fit = cache.ok & takes_part & (highest < cache.capacity)
    if positions.shape[1] > 1 or not whole:
        fit &= ~_has_twice(sequence, positions, num_rows)
    at = None if whole else jnp.clip(rows, 0, num_rows - 1)
    tree = None
    if parents is not None:
        tree, sound = Tree.of(jnp.where(real, positions, EMPTY), parents, _of_rows(cache.lengths, at))
        fit = fit.at[jnp.where(sound | ~known, num_rows, rows)].set(False, mode="drop")
    if cache.recurrent:
        fit &= _go_on(positions, real, rows, _of_rows(cache.lengths, at), num_rows)
    top = jnp.maximum(highest, cache.lengths - 1)
    for group in cache.groups:
        fit &= group.fits(lowest, highest, top, dense)
    fitting = jnp.where(fit.at[sequence].get(mode="fill", fill_value=False), sequence, num_rows)
    books = [group.pages for group in cache.groups]
    wanted = [group.slot(positions) for group in cache.groups]
    fit, claimed = cache.layout.claim(books, [fitting] * len(books), wanted, fit)
    lengths = jnp.where(fit, jnp.maximum(cache.lengths, highest + 1), cache.lengths)

    token_fits = real & fit.at[sequence].get(mode="fill", fill_value=False)
    sequence = jnp.where(token_fits, sequence, num_rows)
    groups: list[Any] = []
    steps: list[Any] = []
    for group, (pages, copies) in zip(cache.groups, claimed, strict=True):
        slots = jnp.where(token_fits, group.slot(positions), group.num_slots)
        written = _write_rows(group.positions, sequence, slots, positions, whole)
        kv_spans = None if spans is None else _write_rows(jnp.zeros_like(written), sequence, slots, spans, whole)
        steps.append(
            GroupStep(
                slots=slots,
                kv_positions=_of_rows(written, at),
                kv_spans=None if kv_spans is None else _of_rows(kv_spans, at),
                filled=_of_rows(group.filled(lengths), at),
                pages=cache.layout.step(pages, at, copies),
                slot_is_position=not group.wraps,
            )
        )
        lost = group.lost_by_writing(lowest, highest, dense, fit)
        groups.append(dataclasses.replace(group, positions=written, lost=lost, pages=pages))
    recurrent = []
    order, place = packing(token_fits) if cache.recurrent else (None, None)
    for states in cache.recurrent:
        advanced, source, slots, counts = states.advance(cache.lengths, lengths, positions.shape[1])
        slots = jnp.where(token_fits.any(1)[:, None], _of_rows(slots, at), states.num_slots)
        of_rows = [_of_rows(x, at) for x in (source, counts, advanced.positions)]
        steps.append(StateStep(of_rows[0], slots, of_rows[1], order, place, of_rows[2]))
        recurrent.append(advanced)
    if cache.encoded is not None:
        steps.append(cache.encoded.step(at, cache.layout.step(cache.encoded.pages, at)))
    refused = takes_part & ~fit
    step = Step(
        positions=jnp.where(token_fits, positions, EMPTY),
        rows=rows,
        ok=~(_of_rows(refused, at) & known),
        spans=spans,
        groups=tuple(steps),
        whole=whole,
        shared=cache.shared,
        tree=tree,
    )
    cache = dataclasses.replace(cache, groups=tuple(groups), recurrent=tuple(recurrent), lengths=lengths)
    return dataclasses.replace(cache, ok=cache.ok & ~refused), step


def claim_cross(cache: Any, lengths: Any, rows: Any, known: Any, *, whole: bool) -> tuple[Any, Step]:
    """Returns (cache, step) of `Cache.begin_cross`; lengths int32 [B], the rest as for `claim`."""
    encoded, num_rows = cache.encoded, cache.num_rows
    real = (lengths >= 0) & known
    sequence = jnp.where(real, rows, num_rows)
    _, asked, count = _brought(sequence[:, None], lengths[:, None], real[:, None], num_rows, whole)
    fit = cache.ok & (count == 1) & (asked <= encoded.reach.size)
    at = None if whole else jnp.clip(rows, 0, num_rows - 1)
    positions = encoded.positions(jnp.where(real & _of_rows(fit, at), lengths, 0))
    sequence = jnp.where(positions == EMPTY, num_rows, rows[:, None])
    fit, [(pages, copies)] = cache.layout.claim([encoded.pages], [sequence], [positions], fit)
    positions = jnp.where(_of_rows(fit, at)[:, None], positions, EMPTY)
    refused = (count > 0) & ~fit
    encoded = dataclasses.replace(encoded, lengths=jnp.where(fit, asked, encoded.lengths))
    pages = cache.layout.keep(pages, encoded.in_use)
    encoded = dataclasses.replace(encoded, pages=pages)
    slots = jnp.where(positions == EMPTY, encoded.num_slots, positions)
    step = Step(
        positions=positions,
        rows=rows,
        ok=~(_of_rows(refused, at) & known),
        spans=None,
        groups=(
            *(None for _ in (*cache.groups, *cache.recurrent)),
            dataclasses.replace(encoded.step(at, cache.layout.step(pages, at, copies)), slots=slots),
        ),
        whole=whole,
        cross=True,
    )
    return dataclasses.replace(cache, encoded=encoded, ok=cache.ok & ~refused), step


def _go_on(positions: Any, real: Any, rows: Any, lengths: Any, num_rows: int) -> Any:
    """Returns which sequences come in one batch row, their positions being those from their length on: bool [R].

    lengths: int32 [B]. Sequences that don't come count as going on.
    """
    sequence = jnp.where(real.any(1), rows, num_rows)
    once = jnp.zeros((num_rows,), jnp.int32).at[sequence].add(1, mode="drop") <= 1
    return once.at[sequence].min(goes_on(positions, real, lengths), mode="drop")


def _of_rows(x: Any, rows: Any) -> Any:
    """Returns x [R, ...] of these rows, all of them known; of all in order for None."""
    return x if rows is None else x[rows]


def _brought(sequence: Any, numbers: Any, real: Any, num_rows: int, whole: bool) -> tuple[Any, Any, Any]:
    """Returns what each sequence brings, int32 [R] each: the lowest number (FAR: none), the highest, and how many."""
    if whole:
        lowest = jnp.where(real, numbers, FAR).min(1, initial=FAR)
        highest = jnp.where(real, numbers, EMPTY).max(1, initial=EMPTY)
        return lowest, highest, real.sum(1, dtype=jnp.int32)
    lowest = jnp.full((num_rows,), FAR, jnp.int32).at[sequence].min(numbers, mode="drop")
    highest = jnp.full((num_rows,), EMPTY, jnp.int32).at[sequence].max(numbers, mode="drop")
    return lowest, highest, jnp.zeros((num_rows,), jnp.int32).at[sequence].add(1, mode="drop")


def _has_twice(sequence: Any, positions: Any, num_rows: int) -> Any:
    """Returns which sequences bring one position twice: bool [R]. sequence, positions: int32 [B, T]."""
    order = jnp.lexsort((positions.ravel(), sequence.ravel()))
    r, p = sequence.ravel()[order], positions.ravel()[order]
    twice = (r[1:] == r[:-1]) & (p[1:] == p[:-1])
    return jnp.zeros((num_rows,), bool).at[r[1:]].max(twice, mode="drop")


def _write_rows(target: Any, sequence: Any, slots: Any, values: Any, whole: bool) -> Any:
    """Returns target [R, V] with values [B, T] at (sequence, slots); either index past its end means nowhere."""
    if whole:
        return jax.vmap(lambda row, s, x: row.at[s].set(x, mode="drop"))(target, slots, values)
    return target.at[sequence, slots].set(values, mode="drop")
