"""Memory of a cache before anything is allocated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from jaxkv.cache.arguments import FAR, checked_size
from jaxkv.cache.build import checked_specs, shardings
from jaxkv.cache.cache import Cache
from jaxkv.cache.rows import Rows
from jaxkv.cache.spec import LayerSpec
from jaxkv.sizes import format_bytes, parse_bytes


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Exact bytes of a cache. `str(plan)` is a small table.

    Attributes:
      nbytes: all buffers and bookkeeping, over all devices, replicated parts once.
      nbytes_per_device: what one device holds; equal to nbytes without a sharding.
      bytes_per_token: what one more token of one sequence takes in the layers whose slots are as many as the capacity;
        rings, recurrent states and an encoder's output have a fixed size and add nothing.
      groups: per group (reach, number of layers that keep something, slots per sequence, bytes, why a ring is as long
        as it is, and how many pages there are).
    """

    nbytes: int
    nbytes_per_device: int
    bytes_per_token: int
    groups: tuple[tuple[Any, int, int, int, str], ...]

    def __str__(self) -> str:
        lines = [
            f"{count} layer{'s' * (count > 1)} {reach}: {slots} slots per sequence{why}, {format_bytes(size)}"
            for reach, count, slots, size, why in self.groups
        ]
        lines.append(
            f"in all {format_bytes(self.nbytes)}, {format_bytes(self.nbytes_per_device)} per device, "
            f"{format_bytes(self.bytes_per_token)} per token"
        )
        return "\n".join(lines)


def plan_memory(
    specs: Sequence[LayerSpec], num_rows: int, capacity: int, *, sharding: Any = None, **options: Any
) -> MemoryPlan:
    """Returns what `Cache.init` with the same arguments would allocate, from shapes alone.

    Args:
      specs: one LayerSpec per layer.
      num_rows: sequences.
      capacity: tokens per sequence.
      sharding: None, or a NamedSharding, as for `Cache.init`.
      **options: storage, layout, max_block, slack, stacked, as for `Cache.init`.

    Raises:
      ValueError: as `Cache.init`.

    >>> from jaxkv import Full, LayerSpec, plan_memory
    >>> plan_memory([LayerSpec(Full(), num_kv_heads=8, head_dim=128)] * 32, num_rows=1, capacity=4096).bytes_per_token
    262144
    """
    cache = jax.eval_shape(lambda: Cache.init(specs, num_rows, capacity, **options))
    places = None if sharding is None else shardings(cache, sharding)
    groups = []
    for number, group in enumerate(cache.bookkeeping):
        layers = [layer for layer in cache.layers if layer.group == number]
        count = sum(layer.num_kept for layer in layers)
        why = group.why + ("" if group.pages is None else cache.layout.describe(group.pages))
        groups.append((group.reach, count, group.num_slots, _nbytes((layers, group)), why))
    grows = [not group.wraps for group in cache.groups] + [False] * (len(cache.bookkeeping) - len(cache.groups))
    growing = [layer for layer in cache.layers if grows[layer.group]]
    # A buffer [R or P, K, V or page_size, X], of a stack [L, ...], has so many slots.
    per_token = sum(_nbytes(x) // (x.shape[-4] * x.shape[-2]) for x in jax.tree.leaves([y.buffers for y in growing]))
    return MemoryPlan(cache.nbytes, _nbytes(cache, places), per_token, tuple(groups))


def max_capacity(
    specs: Sequence[LayerSpec],
    nbytes: int | str,
    num_rows: int = 1,
    *,
    most: int = FAR,
    layout: Any = Rows(),
    **options: Any,
) -> int:
    """Returns the largest capacity whose cache fits into so many bytes per device: `plan_memory` the other way round.

    Args:
      specs: one LayerSpec per layer.
      nbytes: of one device, or a text such as "16GiB".
      num_rows: sequences.
      most: no larger one is looked for. A cache of windows alone takes as many bytes at any capacity.
      layout: as for `Cache.init`; the pages of a pool stay as many as they are. Or a function of the capacity that
        returns one, for a pool that grows with it.
      **options: storage, max_block, slack, stacked, sharding, as for `plan_memory`.

    Returns:
      Tokens per sequence, at most `most`; 0 if no capacity fits.

    Raises:
      ValueError: as `Cache.init`, and for a size that is not a valid one.

    >>> from jaxkv import Full, Int8, LayerSpec, max_capacity
    >>> specs = [LayerSpec(Full(), num_kv_heads=8, head_dim=128)] * 32
    >>> max_capacity(specs, "16GiB", num_rows=8), max_capacity(specs, "16GiB", num_rows=8, storage=Int8())
    (8128, 31744)
    """
    nbytes, most = parse_bytes(nbytes), checked_size("max_capacity", "most", most, 1)
    # Smaller ones than these aren't caches: all is sinks, or less than a page.
    layout_at = layout if callable(layout) else lambda capacity: layout
    least = max(layout_at(1).page_size, *(spec.reach.sinks + 1 for spec in checked_specs(specs)))

    def fits(capacity: int) -> bool:
        plan = plan_memory(specs, num_rows, capacity, layout=layout_at(capacity), **options)
        return plan.nbytes_per_device <= nbytes

    if most < least or not fits(least):
        return 0
    if fits(most):
        return most
    low, high = least, 2 * least  # low fits
    while high < most and fits(high):
        low, high = high, 2 * high
    high = min(high, most)  # and high doesn't
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _nbytes(tree: Any, places: Any = None) -> int:
    leaves = jax.tree.leaves(tree)
    shapes = [x.shape for x in leaves]
    if places is not None:
        shapes = [place.shard_shape(x.shape) for x, place in zip(leaves, jax.tree.leaves(places), strict=True)]
    return sum(math.prod(shape) * x.dtype.itemsize for x, shape in zip(leaves, shapes, strict=True))
