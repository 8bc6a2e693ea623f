"""How the parts of a cache are printed: arrays by dtype and shape, as JAX prints them, not by content."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax


def show(node: Any) -> str:
    """Returns the repr of a dataclass with every array in it as dtype[shape].

    >>> from jaxkv.cache.group import Group
    >>> Group.init(jaxkv.Full(), num_rows=2, capacity=8, behind=4)
    Group(positions=int32[2,8], lost=int32[2,2], reach=Full(), ring=8, wraps=False)
    """
    fields = ", ".join(f"{field.name}={_short(getattr(node, field.name))}" for field in dataclasses.fields(node))
    return f"{type(node).__name__}({fields})"


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
