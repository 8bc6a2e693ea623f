"""Frozen objects as JSON: the static parts of caches in files.

Reading runs no code of the file's choosing: it names kinds of objects, and only those that were declared `exportable`
are made, from plain fields.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np

_KIND = "kind"
_kinds: dict[str, type] = {}

Kind = TypeVar("Kind", bound=type)


def exportable(kind: Kind) -> Kind:
    """Declares a frozen dataclass as a part of LayerSpecs that files can hold: a rotary or a storage of your own.

    `jax.export` writes all that LayerSpecs hold, `Cache.save` the storages. Its fields are numbers, texts, None,
    dtypes, tuples of these, or exportable themselves. The process that reads the file declares it too, by importing the
    module that does.

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


def plain(x: Any) -> Any:
    """Returns an object as JSON has it.

    Raises:
      ValueError: for one of a class that was not declared.
    """
    if isinstance(x, np.generic):
        x = x.item()
    if x is None or isinstance(x, bool | int | float | str):
        return x
    if isinstance(x, tuple | list):
        return [plain(item) for item in x]
    if isinstance(x, np.dtype):
        return {_KIND: "dtype", "name": x.name}
    kind: Any = type(x)
    if kind not in _kinds.values():
        raise ValueError(
            f"{x!r}, which this cache's layers have, can't be written to a file: declare its class, a frozen "
            "dataclass, with @jaxkv.exportable"
        )
    fields = {f.name: plain(getattr(x, f.name)) for f in dataclasses.fields(kind) if f.init}
    return {_KIND: _name(kind), **fields}


def made_of(x: Any) -> Any:
    """Returns the object that `plain` wrote.

    Raises:
      ValueError: for one of a class that was not declared.
    """
    if isinstance(x, list):
        return tuple(made_of(item) for item in x)
    if not isinstance(x, dict):
        return x
    kind, fields = x[_KIND], {name: made_of(value) for name, value in x.items() if name != _KIND}
    if kind == "dtype":
        return jnp.dtype(fields["name"])
    if kind not in _kinds:
        raise ValueError(f"it has a cache with a {kind}; import the module that declares it exportable first")
    return _kinds[kind](**fields)
