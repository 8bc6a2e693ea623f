"""How a cache and its parts are shown: arrays by dtype and shape, as JAX prints them; what rows hold, by positions."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxkv.cache.spec import Recurrent
from jaxkv.sizes import format_bytes


def show(node: Any) -> str:
    """Returns the repr of a dataclass with every array in it as dtype[shape].

    >>> from jaxkv.cache.group import Group
    >>> Group.init(jaxkv.Full(), num_rows=2, capacity=8, behind=4, layout=jaxkv.Rows())
    Group(positions=int32[2,8], lost=int32[2,2], pages=None, reach=Full(), ring=8, wraps=False)
    """
    fields = ", ".join(f"{field.name}={_short(getattr(node, field.name))}" for field in dataclasses.fields(node))
    return f"{type(node).__name__}({fields})"


def headline(cache: Any) -> str:
    """Returns the repr of a Cache."""
    if not hasattr(cache.lengths, "shape"):  # a tree of something else, such as shardings
        return show(cache)
    count = sum(layer.num_stacked or 1 for layer in cache.layers)
    return (
        f"Cache(layers={count}, num_rows={cache.num_rows}, capacity={cache.capacity}, max_block={cache.max_block}, "
        f"slack={cache.slack}, layout={cache.layout}, nbytes={format_bytes(cache.nbytes)})"
    )


def describe(cache: Any) -> str:
    """Returns what `Cache.describe` says."""
    lines = [repr(cache)]
    for number, group in enumerate(cache.bookkeeping):
        layers = [layer for layer in cache.layers if layer.group == number]
        count = sum(layer.num_kept for layer in layers)
        sharing = sum(not layer.num_kept for layer in layers)
        kept = dict.fromkeys(_kept(layer.spec) + _spread(layer) for layer in layers if layer.num_kept)
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((layers, group)))
        pages = "" if group.pages is None else cache.layout.describe(group.pages)
        lines.append(
            f"{count} layer{'s' * (count > 1)} {group.reach}: {', '.join(kept)}, "
            f"{f'read by {sharing} more, ' * bool(sharing)}"
            f"{group.num_slots} slots{group.why}{pages}, {format_bytes(size)}"
        )
        texts = _states(group.held) if isinstance(group.reach, Recurrent) else _held(group.held)
        lines += [f"  row {row}: {text}" for row, text in enumerate(texts)]
    return "\n".join(lines)


def _kept(spec: Any) -> str:
    """Returns what a layer keeps of each token, or of all of them together."""
    if isinstance(spec.reach, Recurrent):
        return f"{spec.reach.num_numbers} numbers float32 a state"
    value = f"/{spec.value_dim}" if spec.value_dim != spec.head_dim else ""
    heads = f"{spec.num_kv_heads} x {spec.head_dim}{value}"
    storages = f"{spec.v_storage}" if spec.k_dim == 0 else f"k {spec.k_storage} v {spec.v_storage}"
    sides = "".join(f" {name} {side.num_heads} x {side.size} {side.storage}" for name, side in spec.side_buffers)
    return f"{heads} {storages}{' v in k' * spec.v_in_k}{sides}"


def _spread(layer: Any) -> str:
    """Returns over how many devices the layer's buffers are divided, and along what; nothing for one device."""
    buffer = max(jax.tree.leaves(layer.buffers), key=lambda x: x.size)
    known = isinstance(buffer, jax.Array) and not isinstance(buffer, jax.core.Tracer)
    place = buffer.sharding if known else None
    if not isinstance(place, NamedSharding) or place.mesh.size == 1:
        return ""
    spec = (*place.spec, *[None] * buffer.ndim)[buffer.ndim - 4 : buffer.ndim]
    counts = [math.prod(place.mesh.shape[name] for name in jax.tree.leaves(names)) for names in spec]
    names = "rows" if layer.num_slots == buffer.shape[-2] else "pages", "heads", "slots", "numbers"
    split = " and ".join(f"{name} by {count}" for name, count in zip(names, counts, strict=True) if count > 1)
    return f" divided over {place.mesh.size} devices ({split})" if split else f" whole on {place.mesh.size} devices"


def _held(positions: Any) -> list[str]:
    """Returns the positions [R, V] that each row holds as runs, "0-9, 12"; nothing for abstract values."""
    if isinstance(positions, jax.core.Tracer) or not isinstance(positions, jax.Array | np.ndarray):
        return []
    texts = []
    for slots in np.asarray(positions):
        held = np.sort(slots[slots >= 0])
        runs = np.split(held, np.flatnonzero(np.diff(held) != 1) + 1) if held.size else []
        texts.append(", ".join(f"{run[0]}" if run.size == 1 else f"{run[0]}-{run[-1]}" for run in runs) or "empty")
    return texts


def _states(positions: Any) -> list[str]:
    """Returns where each row stands and goes back to, by the positions [R, C] of its states; as `_held`."""
    if isinstance(positions, jax.core.Tracer) or not isinstance(positions, jax.Array | np.ndarray):
        return []
    texts = []
    for slots in np.asarray(positions):
        *back, here = ["0", *map(str, np.sort(slots[slots >= 0]))]
        texts.append(f"stands at {here}, goes back to {', '.join(back)}" if back else "empty")
    return texts


def _short(x: Any) -> str:
    def one(leaf: Any) -> Any:
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
            return _Text(f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]")
        return leaf

    if dataclasses.is_dataclass(x):
        return repr(x)
    return repr(jax.tree.map(one, x, is_leaf=dataclasses.is_dataclass))


class _Text(str):
    """Text that is its own repr."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)
