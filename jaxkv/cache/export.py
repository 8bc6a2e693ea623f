"""Caches in programs that `jax.export` writes to a file: their static parts as JSON.

Reading runs no code of the file's choosing: it names kinds of objects, and only those that were declared `exportable`
are made, from plain fields.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, TypeVar

import jax.export
import numpy as np

from jaxkv.cache.cache import Cache
from jaxkv.cache.cross import Encoded
from jaxkv.cache.group import Group
from jaxkv.cache.layer import Layer
from jaxkv.cache.pages import Pages, PageStep
from jaxkv.cache.pool import Pool
from jaxkv.cache.quantized import Float8, Int4, Int8
from jaxkv.cache.rows import Rows
from jaxkv.cache.spec import Chunk, Cross, Full, LayerSpec, SideBuffer, Window
from jaxkv.cache.step import GroupStep, Step
from jaxkv.cache.storage import Dense
from jaxkv.cache.tree import Tree

_KIND = "kind"
_kinds: dict[str, type] = {}

Kind = TypeVar("Kind", bound=type)


def exportable(kind: Kind) -> Kind:
    """Declares a frozen dataclass as a part of LayerSpecs that `jax.export` can write: a rotary of your own.

    Its fields are numbers, texts, None, dtypes, tuples of these, or exportable themselves. The process that reads the
    program declares it too, by importing the module that does.

    Raises:
      ValueError: if it is not a frozen dataclass.

    >>> import dataclasses
    >>> @jaxkv.exportable
    ... @dataclasses.dataclass(frozen=True)
    ... class Mirrored:
    ...     def shift(self, k, delta):
    ...         return -k
    """
    if not dataclasses.is_dataclass(kind) or not kind.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise ValueError(f"exportable({kind!r}): give a frozen dataclass")
    _kinds[_name(kind)] = kind
    return kind


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _plain(x: Any) -> Any:
    if isinstance(x, np.generic):
        x = x.item()
    if x is None or isinstance(x, bool | int | float | str):
        return x
    if isinstance(x, tuple | list):
        return [_plain(item) for item in x]
    if isinstance(x, np.dtype):
        return {_KIND: "dtype", "name": x.name}
    kind: Any = type(x)
    if kind not in _kinds.values():
        raise ValueError(
            f"jax.export can't write {x!r}, which this cache's layers have: declare its class, a frozen dataclass, "
            "with @jaxkv.exportable"
        )
    fields = {f.name: _plain(getattr(x, f.name)) for f in dataclasses.fields(kind) if f.init}
    return {_KIND: _name(kind), **fields}


def _object(x: Any) -> Any:
    if isinstance(x, list):
        return tuple(_object(item) for item in x)
    if not isinstance(x, dict):
        return x
    kind, fields = x[_KIND], {name: _object(value) for name, value in x.items() if name != _KIND}
    if kind == "dtype":
        return jax.numpy.dtype(fields["name"])
    if kind not in _kinds:
        raise ValueError(f"the program has a cache with a {kind}; import the module that declares it exportable first")
    return _kinds[kind](**fields)


for _part in (Full, Window, Chunk, Cross, LayerSpec, SideBuffer, Dense, Int8, Int4, Float8, Rows, Pages):
    exportable(_part)

for _node in (Cache, Layer, Group, Encoded, Pool, Step, GroupStep, PageStep, Tree):
    jax.export.register_pytree_node_serialization(
        _node,
        serialized_name=f"jaxkv.{_node.__name__}",
        serialize_auxdata=lambda static: json.dumps(_plain(static)).encode(),
        deserialize_auxdata=lambda text: _object(json.loads(text.decode())),
    )
