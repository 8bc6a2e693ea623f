"""Which blocks of slots the queries of a call see, and what such a block holds."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv.cache.spec import EMPTY
from jaxkv.cache.step import Step
from jaxkv.nn.plan import Plan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visits:
    """The blocks to visit: `start(i)` for i in [begin, end), in the order of the slots."""

    begin: Any  # int32 scalar
    end: Any  # int32 scalar
    last: Any  # int32 scalar: no query sees a slot from here on; None if the blocks are listed
    blocks: Any  # int32 [n], the numbers of the blocks that are seen, in front; None: block i is number i
    size: int = dataclasses.field(metadata={"static": True})  # slots of a block

    @classmethod
    def of(cls, plan: Plan, layer: Any, step: Step) -> Visits:
        """Returns the blocks that hold everything the queries of this step may see."""
        group, size = step.groups[layer.group], plan.block
        real = step.positions != EMPTY
        if plan.listed:
            blocks = _seen(plan, layer.num_slots, step, group, real)
            return cls(jnp.int32(0), (blocks < blocks.size).sum(dtype=jnp.int32), None, blocks, size)
        last = jnp.where(real.any(1), group.filled, 0).max()
        first = jnp.int32(0)
        if group.slot_is_position:
            if step.spans is None:
                last = jnp.minimum(last, step.positions.max() + 1)
            if plan.reach.sinks == 0:
                lows = jnp.where(real, plan.reach.first(step.depths), layer.num_slots)
                first = jnp.minimum(lows.min(), last)
        return cls(first // size, (last + size - 1) // size, last, None, size)

    def start(self, i: Any) -> Any:
        """Returns the first slot of visit i. int32 scalar."""
        if self.blocks is not None:
            i = lax.dynamic_index_in_dim(self.blocks, i, keepdims=False)
        return i * self.size


def _seen(plan: Plan, num_slots: int, step: Step, group: Any, real: Any) -> Any:
    """Returns the numbers of the blocks with a slot that a query may see, ascending; behind them the count of blocks.

    A row's slots are seen from the first position that one of its queries sees up to the last query, and sinks.
    """
    count = -(-num_slots // plan.block)
    low = jnp.where(real, plan.reach.first(step.depths), jnp.iinfo(jnp.int32).max).min(1)[:, None]
    seen = (group.kv_positions >= low) | ((group.kv_positions < plan.reach.sinks) & real.any(1)[:, None])
    seen &= group.kv_positions != EMPTY
    if step.spans is None:
        seen &= group.kv_positions <= step.positions.max(1)[:, None]
    seen = jnp.pad(seen.any(0), (0, count * plan.block - num_slots)).reshape(count, plan.block).any(1)
    return jnp.sort(jnp.where(seen, jnp.arange(count, dtype=jnp.int32), count))


def read_block(plan: Plan, layer: Any, step: Step, start: Any, size: int, dtype: Any) -> tuple[Any, Any, Any, Any]:
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
    if layer.spec.drops:
        see &= layer.stored(step, at, size)[:, None]
    used = see.any(1)[:, None, :, None]
    # NaN in a slot that nobody may see must not meet a product, not even with a weight of 0.
    k, v = (jnp.where(used, x.astype(dtype), 0) for x in layer.read(step, at, size))
    return k, v, see[:, None, None], at
