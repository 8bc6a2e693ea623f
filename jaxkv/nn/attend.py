"""Attention over what a cache holds: `attend`; `self_attend` and `cross_attend` for the same without a cache.

Two forms. The reference builds the whole [T, S] mask and is obviously right. The blockwise form visits blocks of slots
with a running maximum and sum (Milakov & Gimelshein 2018; FlashAttention, Dao et al. 2022), only as many blocks as are
filled: a decode step costs what is in the cache, not what could be, and a long prompt never has a [T, S] array.

A block that a query may not see changes nothing in its result, not one bit: its maximum stays, exp(0) is 1 and zeros
are added. So a row's result does not depend on how much its neighbors hold.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv.cache.layer import Layer
from jaxkv.cache.spec import EMPTY, Cross, Full, LayerSpec, Reach
from jaxkv.cache.step import GroupStep, Step

IMPLEMENTATIONS = ("auto", "reference", "blockwise")
_LOWEST = float(jnp.finfo(jnp.float32).min)  # finite, so that exp(-inf - lowest) is 0 and not NaN


def attend(
    q: Any,
    layer: Layer,
    step: Step,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Any = None,
    implementation: str = "auto",
) -> Any:
    """Returns attention of the call's queries over what the layer holds of their sequences.

    A query sees the stored positions at or before its own that the layer's reach allows (and those of its span); one
    that sees nothing gets zeros. Scores and softmax are float32 whatever is stored. Reverse-mode differentiable in q,
    the layer's keys and values, and `sink_logits`; forward mode is not offered.

    Args:
      q: queries [B, T, N, H] of any floating dtype, already rotated if the keys are. N is a multiple of the layer's kv
        heads; query heads [i * N/K, (i + 1) * N/K) read kv head i.
      layer: a layer of the cache, after its `put`.
      step: from the `Cache.begin` of this forward pass; says where the queries stand.
      scale: factor of the scores; None means head_dim ** -0.5.
      softcap: None, or the bound c > 0 of c * tanh(scores / c) (Gemma 2).
      sink_logits: None, or learned float [N], one score per query head that joins the softmax and brings no value
        (gpt-oss).
      implementation: "auto", "reference" (plain, builds [T, S]) or "blockwise" (reads only filled blocks).

    Returns:
      [B, T, N, value_dim] in q's dtype.

    Raises:
      ValueError: while tracing, for shapes or dtypes that don't fit the layer and the step, a softcap of 0 or below, or
        an unknown implementation.

    >>> cache = jaxkv.Cache.init([jaxkv.LayerSpec(jaxkv.Full(), num_kv_heads=1, head_dim=2)], num_rows=1, capacity=4)
    >>> cache, step = cache.begin(jnp.array([[0, 1]]))
    >>> k = jnp.zeros((1, 2, 1, 2))
    >>> layer = cache.layers[0].put(step, k, jnp.array([[[[2.0, 0.0]], [[4.0, 0.0]]]]))
    >>> jaxkv.attend(k, layer, step)[0, :, 0, 0]
    Array([2., 3.], dtype=float32)
    """
    layer.check_step(step)
    spec = layer.spec
    _check(q, step.positions.shape, spec.num_kv_heads, spec.head_dim, softcap, sink_logits, implementation)
    batch, length = step.positions.shape
    if implementation == "auto":
        implementation = "blockwise"
    plan = _Plan.choose(spec, batch, length, q.shape[2] // spec.num_kv_heads, layer.num_slots, softcap)
    return _attend(q, layer, step, plan, scale, sink_logits, implementation)


def self_attend(
    q: Any,
    k: Any,
    v: Any,
    *,
    reach: Reach = Full(),
    positions: Any = None,
    spans: Any = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Any = None,
    implementation: str = "auto",
) -> Any:
    """Returns attention of a block of tokens over itself, without a cache: the form for training.

    The same rule and the same arithmetic as `attend` after a `put` into an empty cache.

    Args:
      q: queries [B, T, N, H], any floating dtype.
      k: keys [B, T, K, H]; N is a multiple of K.
      v: values [B, T, K, Hv].
      reach: which past tokens a query may see.
      positions: int32 [B, T], EMPTY (-1) for padding; None means 0, 1, 2, ... in every row.
      spans: None, or int32 [B, T]: tokens with the same span other than 0 see each other in both directions.
      scale, softcap, sink_logits, implementation: as in `attend`.

    Returns:
      [B, T, N, Hv] in q's dtype.

    Raises:
      ValueError: while tracing, for shapes or dtypes that don't fit together, as in `attend`.

    >>> x = jnp.ones((1, 3, 2, 4))
    >>> self_attend(x, x, x, reach=jaxkv.Window(2)).shape
    (1, 3, 2, 4)
    """
    if isinstance(reach, Cross):
        raise ValueError(f"reach={reach} is for an encoder's output; attend over that with cross_attend")
    batch, length = _check_fresh(k, v)
    in_order = positions is None
    if in_order:
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    if positions.shape != (batch, length) or not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(f"positions must be int32 [B, T] = {(batch, length)}, got {positions.dtype}{positions.shape}")
    positions = jnp.maximum(positions.astype(jnp.int32), EMPTY)
    group = GroupStep(
        slots=None,
        kv_positions=positions,
        kv_spans=spans,
        filled=jnp.full((batch,), length, jnp.int32),
        slot_is_position=in_order,
    )
    return _attend_fresh(q, k, v, reach, positions, spans, group, scale, softcap, sink_logits, implementation)


def cross_attend(
    q: Any,
    k: Any,
    v: Any,
    *,
    lengths: Any = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Any = None,
    implementation: str = "auto",
) -> Any:
    """Returns attention of queries over an encoder's output, without a cache: the form for training.

    Every query sees all keys of its batch row, whatever its place. The same arithmetic as `attend` over a Cross layer.

    Args:
      q: queries [B, T, N, H], any floating dtype.
      k: keys [B, S, K, H]; N is a multiple of K.
      v: values [B, S, K, Hv].
      lengths: int [B], how many keys of each row are real; None means all. Queries of a row without any get zeros.
      scale, softcap, sink_logits, implementation: as in `attend`.

    Returns:
      [B, T, N, Hv] in q's dtype.

    Raises:
      ValueError: while tracing, for shapes or dtypes that don't fit together, as in `attend`.

    >>> k = jnp.zeros((1, 3, 1, 2))
    >>> v = jnp.array([1.0, 3.0, 9.0]).reshape(1, 3, 1, 1)
    >>> cross_attend(jnp.ones((1, 1, 1, 2)), k, v, lengths=jnp.array([2])).item()
    2.0
    """
    batch, size = _check_fresh(k, v)
    lengths = jnp.full((batch,), size, jnp.int32) if lengths is None else jnp.asarray(lengths)
    if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(f"lengths must be int [B] = {(batch,)}, got {lengths.dtype}{lengths.shape}")
    lengths = jnp.clip(lengths.astype(jnp.int32), 0, size)
    slots = jnp.arange(size, dtype=jnp.int32)[None, :]
    group = GroupStep(
        slots=None,
        kv_positions=jnp.where(slots < lengths[:, None], slots, EMPTY),
        kv_spans=None,
        filled=lengths,
        slot_is_position=False,
    )
    positions = jnp.zeros((batch, *jnp.shape(q)[1:2]), jnp.int32)
    return _attend_fresh(q, k, v, Cross(size), positions, None, group, scale, softcap, sink_logits, implementation)


def _check_fresh(k: Any, v: Any) -> tuple[int, int]:
    if getattr(k, "ndim", None) != 4 or getattr(v, "ndim", None) != 4 or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k {jnp.shape(k)} and v {jnp.shape(v)} must be [B, T, K, H] and [B, T, K, Hv]")
    return k.shape[0], k.shape[1]


def _attend_fresh(
    q: Any,
    k: Any,
    v: Any,
    reach: Reach,
    positions: Any,
    spans: Any,
    group: GroupStep,
    scale: Any,
    softcap: Any,
    sink_logits: Any,
    implementation: str,
) -> Any:
    """Returns attention over k [B, S, K, H] and v, which `group` describes, of queries at positions [B, T]."""
    batch, num_slots, num_kv_heads, head_dim = k.shape
    _check(q, positions.shape, num_kv_heads, head_dim, softcap, sink_logits, implementation)
    spec = LayerSpec(reach, num_kv_heads, head_dim, v.shape[3])
    fresh = _Fresh(k.swapaxes(1, 2), v.swapaxes(1, 2), spec, 0, num_slots)
    rows = jnp.arange(batch, dtype=jnp.int32)
    step = Step(positions, rows, jnp.ones((batch,), bool), spans, (group,), whole=True)
    if implementation == "auto":
        implementation = "blockwise"
    plan = _Plan.choose(spec, batch, positions.shape[1], q.shape[2] // num_kv_heads, num_slots, softcap)
    return _attend(q, fresh, step, plan, scale, sink_logits, implementation)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Fresh:
    """The keys and values of one call, read as a Layer is read."""

    k: Any  # [B, K, T, H]
    v: Any  # [B, K, T, Hv]
    spec: LayerSpec = dataclasses.field(metadata={"static": True})
    group: int = dataclasses.field(metadata={"static": True})
    num_slots: int = dataclasses.field(metadata={"static": True})

    def read(self, step: Step, start: Any, size: int) -> tuple[Any, Any]:
        k, v = (x if step.whole else jnp.take(x, step.rows, axis=0, mode="clip") for x in (self.k, self.v))
        if size == self.num_slots:
            return k, v
        return lax.dynamic_slice_in_dim(k, start, size, 2), lax.dynamic_slice_in_dim(v, start, size, 2)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What the blockwise form is compiled for."""

    reach: Reach
    softcap: float | None
    tile: int  # queries at a time
    block: int  # slots at a time
    tails: tuple[int, ...]  # sizes the last block may have; empty: it is as long as the others
    by_row: bool  # one sequence after the other, each as far as it is filled

    @classmethod
    def choose(cls, spec: LayerSpec, batch: int, length: int, groups: int, num_slots: int, softcap: Any) -> _Plan:
        """Returns the sizes that were fastest on a CPU of two cores (benchmarks/decode.py)."""
        by_row = batch > 1 and length <= 16 and _pays_by_row(spec)
        heads = spec.num_kv_heads * (1 if by_row else batch)
        if length <= 16:  # decoding: one block of keys fills the fast cache
            tile, block = length, _power(2**19 // (heads * spec.head_dim), 64, 1024)
        else:  # the scores of one tile against one block do
            tile = block = _power(math.isqrt(3 * 2**18 // (heads * groups)), 64, 256)
        tile, block = min(tile, length), min(block, num_slots)
        tails: tuple[int, ...] = ()
        # Only where no neighbor has a say in it: a row's result must not depend on what the others hold.
        if length <= 16 and (batch == 1 or by_row) and block > 64:
            tails = (*(64 * 2**i for i in range(8) if 64 * 2**i < block), block)
        return cls(spec.reach, None if softcap is None else float(softcap), tile, block, tails, by_row)


def _pays_by_row(spec: LayerSpec) -> bool:
    """Whether to visit one sequence after the other: on a CPU, if one alone is enough work.

    Accelerators want all at once, and several devices may share the rows.
    """
    return jax.default_backend() == "cpu" and jax.device_count() == 1 and spec.num_kv_heads * spec.head_dim >= 256


def _power(x: int, least: int, most: int) -> int:
    """Returns the largest power of two that is at most x, between two others."""
    return min(max(2 ** (max(x, 1).bit_length() - 1), least), most)


def _check(
    q: Any,
    call: tuple[int, ...],
    num_kv_heads: int,
    head_dim: int,
    softcap: Any,
    sink_logits: Any,
    implementation: str,
) -> None:
    if getattr(q, "ndim", None) != 4:
        raise ValueError(f"q has shape {jnp.shape(q)}; attend wants [B, T, N, H]")
    batch, length, num_heads, size = q.shape
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q is {q.dtype}; attend wants a floating dtype, cast it: q.astype(jnp.float32)")
    if (batch, length) != tuple(call):
        raise ValueError(f"q has [B, T] = {(batch, length)}, the call's positions have {tuple(call)}; they must agree")
    if size != head_dim:
        raise ValueError(f"q has head_dim {size}, the keys have {head_dim}; project q to {head_dim}")
    if num_heads % num_kv_heads:
        raise ValueError(
            f"{num_heads} query heads are no multiple of {num_kv_heads} kv heads; "
            f"{num_heads - num_heads % num_kv_heads or num_kv_heads} would be"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap}: it bounds the scores and must be above 0; None turns it off")
    if sink_logits is not None:
        if jnp.shape(sink_logits) != (num_heads,):
            raise ValueError(f"sink_logits has shape {jnp.shape(sink_logits)}; give one per query head: ({num_heads},)")
        if not jnp.issubdtype(jnp.result_type(sink_logits), jnp.floating):
            raise ValueError(f"sink_logits is {jnp.result_type(sink_logits)}; give a floating dtype")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}; choose one of {', '.join(map(repr, IMPLEMENTATIONS))}")


@functools.partial(jax.jit, static_argnums=(3, 6))  # equal layers of a model are traced once
def _attend(q: Any, layer: Any, step: Step, plan: _Plan, scale: Any, sinks: Any, implementation: str) -> Any:
    batch, length, num_heads, size = q.shape
    heads = layer.spec.num_kv_heads
    dtype = q.dtype if q.dtype.itemsize > 4 else jnp.dtype("float32")
    real = (step.positions != EMPTY)[:, :, None, None]  # what padding holds must not reach a key's gradient
    x = jnp.where(real, q.astype(dtype) * jnp.asarray(size**-0.5 if scale is None else scale, dtype), 0)
    x = x.reshape(batch, length, heads, num_heads // heads, size).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    if sinks is not None:
        sinks = jnp.asarray(sinks).astype(dtype).reshape(heads, num_heads // heads)
    form = _reference if implementation == "reference" else _blockwise
    out = form(plan, x, sinks, layer, step)  # [B, K, G, T, Hv]
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, num_heads, -1).astype(q.dtype)


def _reference(plan: _Plan, q: Any, sinks: Any, layer: Any, step: Step) -> Any:
    group = step.groups[layer.group]
    see = step.visible(plan.reach, group.kv_positions, group.kv_spans)  # [B, T, S]
    used = see.any(1)[:, None, :, None]
    k, v = (jnp.where(used, x.astype(q.dtype), 0) for x in layer.read(step, 0, layer.num_slots))
    see = see[:, None, None]
    scores = _cap(plan, jnp.einsum("bkgth,bksh->bkgts", q, k))
    scores = jnp.where(see, scores, -jnp.inf)
    top = scores.max(-1, keepdims=True, initial=_LOWEST)
    if sinks is not None:
        top = jnp.maximum(top, sinks[None, :, :, None, None])
    top = lax.stop_gradient(top)
    p = jnp.exp(scores - top)
    total = p.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks[None, :, :, None, None] - top)
    return jnp.einsum("bkgts,bksh->bkgth", p, v) / jnp.where(total == 0, 1, total)


def _cap(plan: _Plan, scores: Any) -> Any:
    return scores if plan.softcap is None else plan.softcap * jnp.tanh(scores / plan.softcap)


def _bounds(plan: _Plan, layer: Any, step: Step) -> tuple[Any, Any]:
    """Returns the slots [first, last) that hold everything the queries of this step may see."""
    group = step.groups[layer.group]
    real = step.positions != EMPTY
    last = jnp.where(real.any(1), group.filled, 0).max()
    first = jnp.int32(0)
    if group.slot_is_position:
        if step.spans is None:
            last = jnp.minimum(last, step.positions.max() + 1)
        if plan.reach.sinks == 0:
            lows = jnp.where(real, plan.reach.first(step.positions), layer.num_slots)
            first = jnp.minimum(lows.min(), last)
    return first, last


def _block(plan: _Plan, layer: Any, step: Step, start: Any, size: int, dtype: Any) -> tuple[Any, Any, Any, Any]:
    """Returns k, v [B, K, size, H], bool [B, 1, 1, T, size], and the first slot, of the block from `start` on.

    The last block ends with the buffer: it starts earlier than asked, and what it has of the block before is hidden.
    """
    group = step.groups[layer.group]
    at = jnp.minimum(start, layer.num_slots - size)
    positions = lax.dynamic_slice_in_dim(group.kv_positions, at, size, 1)
    if layer.num_slots % size:
        again = jnp.arange(size, dtype=jnp.int32) < start - at
        positions = jnp.where(again[None], EMPTY, positions)
    spans = None if group.kv_spans is None else lax.dynamic_slice_in_dim(group.kv_spans, at, size, 1)
    see = step.visible(plan.reach, positions, spans)
    used = see.any(1)[:, None, :, None]
    # NaN in a slot that nobody may see must not meet a product, not even with a weight of 0.
    k, v = (jnp.where(used, x.astype(dtype), 0) for x in layer.read(step, at, size))
    return k, v, see[:, None, None], at


def _scores(plan: _Plan, q: Any, k: Any, see: Any) -> Any:
    """Returns float [B, K, G * T, size], -inf where a query may not see. q is [B, K, G, T, H]."""
    if q.shape[3] <= 16:  # with few queries, keys first is quicker on a CPU
        scores = jnp.einsum("bksh,bkrh->bksr", k, _merge(q)).swapaxes(2, 3)
    else:
        scores = jnp.einsum("bkrh,bksh->bkrs", _merge(q), k)
    apart = _cap(plan, scores).reshape(*q.shape[:4], -1)
    return jnp.where(see, apart, -jnp.inf).reshape(scores.shape)


def _merge(x: Any) -> Any:
    """[B, K, G, T, H] -> [B, K, G * T, H]: the query rows of one kv head are one matrix."""
    return x.reshape(*x.shape[:2], -1, x.shape[4])


def _forward_tile(plan: _Plan, q: Any, sinks: Any, layer: Any, step: Step) -> tuple[Any, Any]:
    """Returns attention [B, K, G, T, Hv] of one tile of queries, and the log of its softmax's denominator [..., 1]."""
    lead = q.shape[:4]
    column = (*lead[:2], lead[2] * lead[3], 1)
    if sinks is None:
        top, total = jnp.full(column, _LOWEST, q.dtype), jnp.zeros(column, q.dtype)
    else:
        top = _merge(jnp.broadcast_to(sinks[None, :, :, None, None], (*lead, 1)))
        total = jnp.ones(column, q.dtype)

    def visit(start: Any, size: int, carry: Any) -> Any:
        top, total, mix = carry
        k, v, see, _ = _block(plan, layer, step, start, size, q.dtype)
        scores = _scores(plan, q, k, see)
        new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
        p, keep = jnp.exp(scores - new_top), jnp.exp(top - new_top)
        mix = mix * keep + jnp.einsum("bkrs,bksh->bkrh", p, v)
        return new_top, total * keep + p.sum(-1, keepdims=True), mix

    first, last = _bounds(plan, layer, step)
    carry = top, total, jnp.zeros((*column[:3], layer.spec.value_dim), q.dtype)
    size = plan.block
    if plan.tails:
        full = jnp.maximum(last - 1, 0) // size
        carry = lax.fori_loop(first // size, full, lambda i, c: visit(i * size, size, c), carry)
        which = sum((last - full * size > tail).astype(jnp.int32) for tail in plan.tails[:-1])
        branches = [lambda c, tail=tail: visit(full * size, tail, c) for tail in plan.tails]
        carry = lax.switch(which, branches, carry)
    else:
        carry = lax.fori_loop(first // size, (last + size - 1) // size, lambda i, c: visit(i * size, size, c), carry)
    top, total, mix = carry
    total = jnp.where(total == 0, 1, total)  # a query that sees nothing
    return (mix / total).reshape(*lead, -1), (top + jnp.log(total)).reshape(*lead, 1)


def _cut(plan: _Plan, step: Step, *arrays: Any) -> tuple[Any, ...]:
    """Returns tiles, in front: of the positions and spans, and of arrays [B, K, G, T, X]."""
    length = step.positions.shape[1]
    count = -(-length // plan.tile)

    def cut(x: Any, axis: int, fill: int) -> Any:
        if x is None:
            return None
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, count * plan.tile - length)
        x = jnp.pad(x, widths, constant_values=fill)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], count, plan.tile, *x.shape[axis + 1 :]), axis, 0)

    return cut(step.positions, 1, EMPTY), cut(step.spans, 1, 0), *(cut(x, 3, 0) for x in arrays)


def _join(x: Any, length: int) -> Any:
    """[tiles, B, K, G, tile, X] -> [B, K, G, T, X]."""
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(*x.shape[:3], -1, x.shape[-1])[:, :, :, :length]


def _forward(plan: _Plan, q: Any, sinks: Any, layer: Any, step: Step) -> tuple[Any, Any]:
    batch, length = step.positions.shape
    if plan.by_row:

        def row(b: Any) -> Any:
            one = lax.dynamic_slice_in_dim(q, b, 1, 0)
            return _forward_tile(plan, one, sinks, layer, step.of_row(layer.group, b))

        out, log_total = lax.map(row, jnp.arange(batch, dtype=jnp.int32))
        return out[:, 0], log_total[:, 0]
    if length <= plan.tile:
        return _forward_tile(plan, q, sinks, layer, step)

    def one(tile: Any) -> Any:
        positions, spans, x = tile
        return _forward_tile(plan, x, sinks, layer, dataclasses.replace(step, positions=positions, spans=spans))

    out, log_total = lax.map(one, _cut(plan, step, q))
    return _join(out, length), _join(log_total, length)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(plan: _Plan, q: Any, sinks: Any, layer: Any, step: Step) -> Any:
    return _forward(plan, q, sinks, layer, step)[0]


def _blockwise_fwd(plan: _Plan, q: Any, sinks: Any, layer: Any, step: Step) -> Any:
    out, log_total = _forward(plan, q, sinks, layer, step)
    return out, (q, sinks, layer, step, out, log_total)


def _blockwise_bwd(plan: _Plan, saved: Any, d_out: Any) -> Any:
    """The same loop once more: p from the saved log of the denominator (FlashAttention, algorithm 4)."""
    q, sinks, layer, step, out, log_total = saved
    length, num_slots = step.positions.shape[1], layer.num_slots
    d_out = jnp.where((step.positions != EMPTY)[:, None, None, :, None], d_out, 0)
    drop = (d_out * out).sum(-1, keepdims=True)

    def visit(tile: Any, i: Any, carry: Any) -> Any:
        tile_step, q, d_out, log_total, drop = tile
        d_q, d_k, d_v = carry
        k, v, see, at = _block(plan, layer, tile_step, i * plan.block, plan.block, q.dtype)
        scores = _scores(plan, q, k, see)
        p = jnp.exp(scores - _merge(log_total))
        d_scores = p * (jnp.einsum("bkrh,bksh->bkrs", _merge(d_out), v) - _merge(drop))
        if plan.softcap is not None:
            d_scores = d_scores * (1 - jnp.where(p > 0, scores / plan.softcap, 0) ** 2)
        d_q = d_q + jnp.einsum("bkrs,bksh->bkrh", d_scores, k)
        d_k = _add(d_k, jnp.einsum("bkrs,bkrh->bksh", d_scores, _merge(q)), at)
        return d_q, d_k, _add(d_v, jnp.einsum("bkrs,bkrh->bksh", p, _merge(d_out)), at)

    def one(carry: Any, tile: Any) -> Any:
        positions, spans, q, *rest = tile
        tile_step = dataclasses.replace(step, positions=positions, spans=spans)
        first, last = _bounds(plan, layer, tile_step)
        loop = functools.partial(visit, (tile_step, q, *rest))
        last = (last + plan.block - 1) // plan.block
        d_q, *carry = lax.fori_loop(first // plan.block, last, loop, (jnp.zeros_like(_merge(q)), *carry))
        return tuple(carry), d_q.reshape(q.shape)

    slots = (*q.shape[:2], num_slots)
    carry = jnp.zeros((*slots, q.shape[4]), q.dtype), jnp.zeros((*slots, out.shape[4]), q.dtype)
    if length <= plan.tile:
        carry, d_q = one(carry, (step.positions, step.spans, q, d_out, log_total, drop))
    else:
        carry, d_q = lax.scan(one, carry, _cut(plan, step, q, d_out, log_total, drop))
        d_q = _join(d_q, length)

    d_sinks = None
    if sinks is not None:
        d_sinks = -(jnp.exp(sinks[None, :, :, None, None] - log_total) * drop).sum((0, 3, 4))
    kept, pull = jax.vjp(lambda layer: layer.read(step, 0, num_slots), layer)
    (d_layer,) = pull(tuple(x.astype(y.dtype) for x, y in zip(carry, kept, strict=True)))
    return d_q, d_sinks, d_layer, None


def _add(total: Any, x: Any, at: Any) -> Any:
    """Returns total [B, K, S, H] with x added to the slots from `at` on."""
    there = lax.dynamic_slice_in_dim(total, at, x.shape[2], 2)
    return lax.dynamic_update_slice_in_dim(total, there + x, at, 2)


_blockwise.defvjp(_blockwise_fwd, _blockwise_bwd)
