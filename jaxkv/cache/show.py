"""How a cache and its parts are shown: arrays by dtype and shape, as JAX prints them; what rows hold, by positions."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

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
        kept = dict.fromkeys(
            f"{s.num_kv_heads} x {s.head_dim}" + (f"/{s.value_dim}" if s.value_dim != s.head_dim else "") +
            (f" {s.v_storage}" if s.k_dim == 0 else f" k {s.k_storage} v {s.v_storage}") + " v in k" * s.v_in_k +
            "".join(f" {name} {side.num_heads} x {side.size} {side.storage}" for name, side in s.side_buffers)
            for s in (layer.spec for layer in layers if layer.num_kept)
        )  # fmt: skip
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((layers, group)))
        lines.append(
            f"{count} layer{'s' * (count > 1)} {group.reach}: {', '.join(kept)}, "
            f"{f'read by {sharing} more, ' * bool(sharing)}"
            f"{group.num_slots} slots{group.why}{cache.layout.describe(group.pages)}, {format_bytes(size)}"
        )
        lines += [f"  row {row}: {text}" for row, text in enumerate(_held(group.held))]
    return "\n".join(lines)


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
