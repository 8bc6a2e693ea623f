"""Which blocks of slots the queries of a call see, and what such a block holds."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv.cache.arguments import FAR
from jaxkv.cache.spec import EMPTY, Cross
from jaxkv.cache.step import Step
from jaxkv.nn.pieces import masked
from jaxkv.nn.plan import Plan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stretch:
    """The positions that one pass over the slots is about: begin <= position < end."""

    begin: Any = None  # int32 scalar; None: from the first on
    end: Any = None  # int32 scalar; None: to the last
    source: Step | None = None  # of the one row that is read for all; None: each row is read for itself

    @classmethod
    def halves(cls, plan: Plan, layer: Any, step: Step) -> tuple[Stretch, Stretch]:
        """Returns what is read once for all rows, of one that has it all, and what each row has of its own."""
        page = step.groups[layer.group].page_size
        lowest = jnp.where(step.positions == EMPTY, FAR, step.positions).min(1)
        # A row that has not come so far yet holds what lies before its first query.
        shared = jnp.minimum(step.shared, lowest.min() // page * page)
        if isinstance(plan.reach, Cross):  # rows that share tokens share all of an encoder's output
            shared = jnp.where(shared > 0, layer.num_slots, 0)
        # The row furthest behind: what any query sees below `shared`, a ring still has there.
        source = step.of_row(layer.group, lowest.argmin().astype(jnp.int32))
        return cls(end=shared, source=source), cls(begin=shared)

    def hide(self, positions: Any) -> Any:
        """Returns the positions, EMPTY where they are not in the stretch. int32."""
        if self.begin is not None:
            positions = jnp.where(positions < self.begin, EMPTY, positions)
        if self.end is not None:
            positions = jnp.where(positions < self.end, positions, EMPTY)
        return positions


EVERYTHING = Stretch()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visits:
    """The blocks to visit: `start(i)` for i in [begin, end), in the order of the slots."""

    begin: Any  # int32 scalar
    end: Any  # int32 scalar
    origin: Any  # int32 scalar: where block 0 begins
    last: Any  # int32 scalar: no query sees a slot this far behind the origin or further; None if the blocks are listed
    blocks: Any  # int32 [n], the numbers of the blocks that are seen, in front; None: block i is number i
    size: int = dataclasses.field(metadata={"static": True})  # slots of a block

    @classmethod
    def of(cls, plan: Plan, layer: Any, step: Step, stretch: Stretch = EVERYTHING) -> Visits:
        """Returns the blocks that hold everything the queries of this step may see of the stretch."""
        group, size = step.groups[layer.group], plan.block
        real = step.positions != EMPTY
        if plan.listed:
            blocks = _seen(plan, layer.num_slots, step, group, real, stretch)
            return cls(jnp.int32(0), (blocks < blocks.size).sum(dtype=jnp.int32), 0, None, blocks, size)
        last = jnp.where(real.any(1), group.filled, 0).max()
        first = jnp.int32(0)
        origin: Any = 0
        if stretch.end is not None:
            last = jnp.minimum(last, stretch.end)  # no position lies in a slot of a higher number
        if group.slot_is_position:
            if step.spans is None:
                last = jnp.minimum(last, step.positions.max() + 1)
            if plan.reach.sinks == 0:
                lows = jnp.where(real, plan.reach.first(step.depths), layer.num_slots)
                first = jnp.minimum(lows.min(), last)
        if stretch.begin is not None and (group.slot_is_position or isinstance(plan.reach, Cross)):
            origin = stretch.begin
            first, last = jnp.maximum(first - origin, 0), jnp.maximum(last - origin, 0)
        return cls(first // size, (last + size - 1) // size, origin, last, None, size)

    def start(self, i: Any) -> Any:
        """Returns the first slot of visit i. int32 scalar."""
        if self.blocks is not None:
            i = lax.dynamic_index_in_dim(self.blocks, i, keepdims=False)
        return self.origin + i * self.size


def _seen(plan: Plan, num_slots: int, step: Step, group: Any, real: Any, stretch: Stretch) -> Any:
    """Returns the numbers of the blocks with a slot that a query may see, ascending; behind them the count of blocks.

    A row's slots are seen from the first position that one of its queries sees up to the last query, and sinks.
    """
    count = -(-num_slots // plan.block)
    positions = stretch.hide(group.kv_positions)
    low = jnp.where(real, plan.reach.first(step.depths), jnp.iinfo(jnp.int32).max).min(1)[:, None]
    stands = positions if step.tree is None else step.tree.kv_depths(positions)
    seen = (stands >= low) | ((stands < plan.reach.sinks) & real.any(1)[:, None])
    seen &= positions != EMPTY
    if step.spans is None:
        seen &= positions <= step.positions.max(1)[:, None]
    seen = jnp.pad(seen.any(0), (0, count * plan.block - num_slots)).reshape(count, plan.block).any(1)
    return jnp.sort(jnp.where(seen, jnp.arange(count, dtype=jnp.int32), count))


def read_block(
    plan: Plan, layer: Any, step: Step, start: Any, size: int, dtype: Any, stretch: Stretch = EVERYTHING
) -> tuple[Any, Any, Any, Any]:
    """Returns k, v in pieces [B, K, size, h], bool [B, T, size], and the first slot, of the block from `start` on.

    The last block ends with the buffer: it starts earlier than asked, and what it has of the block before is hidden.
    Of a stretch with a source B is 1 in k and v.
    """
    group = step.groups[layer.group]
    at = jnp.minimum(start, layer.num_slots - size)
    positions = stretch.hide(lax.dynamic_slice_in_dim(group.kv_positions, at, size, 1))
    if layer.num_slots % size or plan.block % size or stretch.begin is not None:
        again = jnp.arange(size, dtype=jnp.int32) < start - at
        positions = jnp.where(again[None], EMPTY, positions)
    spans = None if group.kv_spans is None else lax.dynamic_slice_in_dim(group.kv_spans, at, size, 1)
    see = step.visible(plan.reach, positions, spans)
    if layer.spec.drops:
        see &= layer.stored(step, at, size)[:, None]
    used = see.any(1)[:, None, :, None]
    if stretch.source is not None:
        step, used = stretch.source, used.any(0, keepdims=True)
    k, v = (masked(x, used, dtype) for x in layer.pieces(step, at, size))
    return k, v, see, at
