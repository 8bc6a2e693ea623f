"""The option --storage: names of storages to what the specs of a cache want."""

from __future__ import annotations

from typing import Any

from jaxkv.cache.quantized import Float8, Int4, Int8
from jaxkv.cache.storage import Dense

_STORAGES = {"int8": Int8(), "int4": Int4(), "float8": Float8()}


def storages(text: str | None) -> tuple[Any, Any] | None:
    """Returns how keys and how values are kept, None for as the model computes.

    Args:
      text: one name, or two with a comma between, which `options` has checked.

    >>> storages("int8,int4")
    (Int8(rotate=True), Int4(group=8, rotate=True))
    """
    if text is None:
        return None
    chosen = [_STORAGES.get(name) or Dense(name) for name in text.split(",")]
    return chosen[0], chosen[-1]
