"""Attention block by block, with a running maximum and sum, forward and backward.

Milakov & Gimelshein 2018; FlashAttention, Dao et al. 2022. A block that a query may not see changes nothing in its
result, not one bit: its maximum stays, exp(0) is 1 and zeros are added. So a row's result does not depend on how much
its neighbors hold.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv.cache.spec import EMPTY
from jaxkv.cache.step import Step
from jaxkv.cache.storage import whole
from jaxkv.meshes import vary_like
from jaxkv.nn import dropout
from jaxkv.nn.native import native
from jaxkv.nn.pieces import mix, score
from jaxkv.nn.plan import Plan
from jaxkv.nn.reference import LOWEST
from jaxkv.nn.visits import EVERYTHING, Stretch, Visits, read_block


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def blockwise(plan: Plan, q: Any, sinks: Any, layer: Any, step: Step, bits: Any) -> Any:
    """Returns attention [B, K, G, T, Hv] of q [B, K, G, T, H]; sinks [K, G] or None, bits of `dropout.draw` or None."""
    return _forward(plan, q, sinks, layer, step, bits)[0]


def _forward(plan: Plan, q: Any, sinks: Any, layer: Any, step: Step, bits: Any) -> tuple[Any, Any]:
    """Returns the result, and the log of the denominator of its softmax [B, K, G, T, 1]."""
    if plan.native != "never":
        compiled, common = dataclasses.replace(plan, native="never"), None if plan.common is None else _common
        return native(compiled, q, sinks, layer, step, _forward, common, always=plan.native == "always")
    length = step.positions.shape[1]
    if length <= plan.tile:
        return _forward_tile(plan, q, sinks, layer, step, bits)

    def one(tile: Any) -> Any:
        tile_step, tile_bits, x = _tile(step, bits, *tile)
        return _forward_tile(plan, x, sinks, layer, tile_step, tile_bits)

    out, log_total = lax.map(one, _cut(plan, step, bits, q))
    return _join(out, length), _join(log_total, length)


def _common(plan: Plan, q: Any, sinks: Any, layer: Any, step: Step) -> tuple[Any, Any, Any]:
    """Returns what `_forward` does, of the slots that all rows share; and the position where each row's own begin."""
    carry, own = _begin(plan, q, sinks, layer, step)
    return *_end(q, carry), own.begin


def _forward_tile(plan: Plan, q: Any, sinks: Any, layer: Any, step: Step, bits: Any) -> tuple[Any, Any]:
    carry, own = _begin(plan, q, sinks, layer, step)
    if plan.by_row:

        def row(b: Any) -> Any:
            one_q, one = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, b, 1, 0), (q, carry))
            return _visit(plan, one_q, one, layer, step.of_row(layer.group, b), None, own)

        carry = jax.tree.map(lambda x: x[:, 0], lax.map(row, jnp.arange(q.shape[0], dtype=jnp.int32)))
    else:
        carry = _visit(plan, q, carry, layer, step, bits, own)
    return _end(q, carry)


def _begin(plan: Plan, q: Any, sinks: Any, layer: Any, step: Step) -> tuple[Any, Stretch]:
    """Returns the running maximum, sum and mix of `_visit` before what each row has of its own; and what that is."""
    lead = q.shape[:4]
    column = (*lead[:2], lead[2] * lead[3], 1)
    if sinks is None:
        top, total = jnp.full(column, LOWEST, q.dtype), jnp.zeros(column, q.dtype)
    else:
        top = _merge(jnp.broadcast_to(sinks[None, :, :, None, None], (*lead, 1)))
        total = jnp.ones(column, q.dtype)
    carry = vary_like(q, (top, total, jnp.zeros((*column[:3], layer.spec.value_dim), q.dtype)))
    own = EVERYTHING
    if plan.common is not None:
        common, own = Stretch.halves(plan, layer, step)
        together = _visit(plan.common, _together(q), jax.tree.map(_together, carry), layer, step, None, common)
        carry = jax.tree.map(functools.partial(_apart, lead[0]), together)
    return carry, own


def _end(q: Any, carry: Any) -> tuple[Any, Any]:
    lead = q.shape[:4]
    top, total, mixed = carry
    total = jnp.where(total == 0, 1, total)  # a query that sees nothing
    return (mixed / total).reshape(*lead, -1), (top + jnp.log(total)).reshape(*lead, 1)


def _visit(plan: Plan, q: Any, carry: Any, layer: Any, step: Step, bits: Any, stretch: Stretch) -> Any:
    """Returns the running maximum, sum [B, K, G * T, 1] and mix [B, K, G * T, Hv] after the blocks of a stretch."""
    lead = q.shape[:4]

    def visit(start: Any, size: int, carry: Any) -> Any:
        top, total, mixed = carry
        k, v, see, at = read_block(plan, layer, step, start, size, q.dtype, stretch)
        scores = _scores(plan, q, k, see)
        new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
        p, keep = jnp.exp(scores - new_top), jnp.exp(top - new_top)
        mixed = mixed * keep + mix(_drop(plan, bits, p, lead, at), v)
        return new_top, total * keep + p.sum(-1, keepdims=True), mixed

    visits, size = Visits.of(plan, layer, step, stretch), plan.block
    if not plan.tails:
        return lax.fori_loop(visits.begin, visits.end, lambda i, c: visit(visits.start(i), size, c), carry)
    full = jnp.maximum(visits.last - 1, 0) // size
    carry = lax.fori_loop(visits.begin, full, lambda i, c: visit(visits.start(i), size, c), carry)
    which = sum((visits.last - full * size > tail).astype(jnp.int32) for tail in plan.tails[:-1])
    branches = [lambda c, tail=tail: visit(visits.start(full), tail, c) for tail in plan.tails]
    return lax.switch(which, branches, carry)


def _forward_and_saved(plan: Plan, q: Any, sinks: Any, layer: Any, step: Step, bits: Any) -> Any:
    out, log_total = _forward(plan, q, sinks, layer, step, bits)
    return out, (q, sinks, layer, step, bits, out, log_total)


def _backward(plan: Plan, saved: Any, d_out: Any) -> Any:
    """The same loop once more: p from the saved log of the denominator (FlashAttention, algorithm 4)."""
    q, sinks, layer, step, bits, out, log_total = saved
    length, num_slots = step.positions.shape[1], layer.num_slots
    d_out = jnp.where((step.positions != EMPTY)[:, None, None, :, None], d_out, 0)
    mean = (d_out * out).sum(-1, keepdims=True)  # of the weights' gradients, over the weights

    def visit(visits: Any, tile: Any, i: Any, carry: Any) -> Any:
        tile_step, tile_bits, q, d_out, log_total, mean = tile
        d_q, d_k, d_v = carry
        k, v, see, at = read_block(plan, layer, tile_step, visits.start(i), plan.block, q.dtype)
        scores = _scores(plan, q, k, see)
        k, v = whole(k), whole(v)
        p = jnp.exp(scores - _merge(log_total))
        drop = functools.partial(_drop, plan, tile_bits, lead=q.shape[:4], at=at)
        d_scores = p * (drop(jnp.einsum("bkrh,bksh->bkrs", _merge(d_out), v)) - _merge(mean))
        if plan.softcap is not None:
            d_scores = d_scores * (1 - jnp.where(p > 0, scores / plan.softcap, 0) ** 2)
        d_q = d_q + jnp.einsum("bkrs,bksh->bkrh", d_scores, k)
        d_k = _add(d_k, jnp.einsum("bkrs,bkrh->bksh", d_scores, _merge(q)), at)
        return d_q, d_k, _add(d_v, jnp.einsum("bkrs,bkrh->bksh", drop(p), _merge(d_out)), at)

    def one(carry: Any, tile: Any) -> Any:
        tile = _tile(step, bits, *tile)
        visits = Visits.of(plan, layer, tile[0])
        d_q = vary_like(q, jnp.zeros_like(_merge(tile[2])))
        d_q, *carry = lax.fori_loop(visits.begin, visits.end, functools.partial(visit, visits, tile), (d_q, *carry))
        return tuple(carry), d_q.reshape(tile[2].shape)

    slots = (*q.shape[:2], num_slots)
    carry = vary_like(q, tuple(jnp.zeros((*slots, x.shape[4]), q.dtype) for x in (q, out)))
    tiles = q, d_out, log_total, mean
    if length <= plan.tile:
        queries = None if bits is None else bits[0]
        carry, d_q = one(carry, (step.positions, step.spans, queries, *tiles))
    else:
        carry, d_q = lax.scan(one, carry, _cut(plan, step, bits, *tiles))
        d_q = _join(d_q, length)

    d_sinks = None
    if sinks is not None:
        d_sinks = -(jnp.exp(sinks[None, :, :, None, None] - log_total) * mean).sum((0, 3, 4))
    kept, pull = jax.vjp(lambda layer: tuple(whole(x) for x in layer.pieces(step, 0, num_slots)), layer)
    (d_layer,) = pull(tuple(x.astype(y.dtype) for x, y in zip(carry, kept, strict=True)))
    return d_q, d_sinks, d_layer, None, None


blockwise.defvjp(_forward_and_saved, _backward)


def _scores(plan: Plan, q: Any, k: Any, see: Any) -> Any:
    """Returns float [B, K, G * T, size], -inf where a query may not see. q is [B, K, G, T, H], see [B, T, size].

    Where one row is read for all, `see` has a B of its own, that of the queries in q [1, K, B * G, T, H].
    """
    b, _, groups, _, _ = q.shape
    see = jnp.broadcast_to(see[:, None], (see.shape[0], b * groups // see.shape[0], *see.shape[1:]))
    see = see.reshape(b, 1, groups, *see.shape[2:])
    scores = score(_merge(q), k, keys_first=q.shape[3] <= 16)  # with few queries, that is quicker on a CPU
    apart = plan.cap(scores).reshape(*q.shape[:4], -1)
    return jnp.where(see, apart, -jnp.inf).reshape(scores.shape)


def _drop(plan: Plan, bits: Any, p: Any, lead: tuple[int, ...], at: Any) -> Any:
    """Returns p [B, K, G * T, size] after dropout; the block begins at slot `at`."""
    if bits is None:
        return p
    queries, slots = bits
    keep = dropout.kept(queries, lax.dynamic_slice_in_dim(slots, at, p.shape[3], 0), plan.dropout_rate)
    return dropout.scale(p, jnp.broadcast_to(keep, (*lead, p.shape[3])).reshape(p.shape), plan.dropout_rate)


def _together(x: Any) -> Any:
    """[B, K, G, T, H] -> [1, K, B * G, T, H], and [B, K, G * T, H] -> [1, K, B * G * T, H]."""
    return x.swapaxes(0, 1).reshape(1, x.shape[1], -1, *x.shape[3:])


def _apart(batch: int, x: Any) -> Any:
    """[1, K, B * G * T, H] -> [B, K, G * T, H]."""
    return x.reshape(x.shape[1], batch, -1, x.shape[3]).swapaxes(0, 1)


def _merge(x: Any) -> Any:
    """[B, K, G, T, H] -> [B, K, G * T, H]: the query rows of one kv head are one matrix."""
    return x.reshape(*x.shape[:2], -1, x.shape[4])


def _cut(plan: Plan, step: Step, bits: Any, *arrays: Any) -> tuple[Any, ...]:
    """Returns tiles, in front: of positions, spans, the queries' bits, and arrays [B, K, G, T, X]."""
    length = step.positions.shape[1]
    count = -(-length // plan.tile)

    def cut(x: Any, axis: int, fill: int) -> Any:
        if x is None:
            return None
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, count * plan.tile - length)
        x = jnp.pad(x, widths, constant_values=fill)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], count, plan.tile, *x.shape[axis + 1 :]), axis, 0)

    queries = None if bits is None else bits[0]
    return cut(step.positions, 1, EMPTY), cut(step.spans, 1, 0), *(cut(x, 3, 0) for x in (queries, *arrays))


def _tile(step: Step, bits: Any, positions: Any, spans: Any, queries: Any, *arrays: Any) -> tuple[Any, ...]:
    """Returns the step and the bits of one tile, and its arrays."""
    step = dataclasses.replace(step, positions=positions, spans=spans)
    return step, None if bits is None else (queries, bits[1]), *arrays


def _join(x: Any, length: int) -> Any:
    """[tiles, B, K, G, tile, X] -> [B, K, G, T, X]."""
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(*x.shape[:3], -1, x.shape[-1])[:, :, :, :length]


def _add(total: Any, x: Any, at: Any) -> Any:
    """Returns total [B, K, S, H] with x added to the slots from `at` on."""
    there = lax.dynamic_slice_in_dim(total, at, x.shape[2], 2)
    return lax.dynamic_update_slice_in_dim(total, there + x, at, 2)
