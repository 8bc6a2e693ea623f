"""Values as they were at one time, and whether they are still the same."""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxkv.memo.hashing import Hash

_SIMPLE = (bool, int, float, complex, str, bytes)


class Snapshot:
    """Values that are the same while they are identical, and those that change in place (NumPy's, sets) of one content.

    Args:
      values: the leaves of a pytree.
      structure: of it.
    """

    def __init__(self, values: Sequence[Any], structure: Any) -> None:
        self.values = values
        self._structure = structure
        self._arrays = {i: _content(value) for i, value in enumerate(values) if isinstance(value, np.ndarray | set)}

    def holds(self, values: Sequence[Any], structure: Any) -> bool:
        """Returns whether these are the same values, unchanged. (Called before each lookup: is_ and map are quick.)"""
        if len(values) != len(self.values) or not _equal(structure, self._structure):
            return False
        same = all(map(operator.is_, values, self.values)) or all(map(_is_same, values, self.values))
        return same and all(_content(values[i]) == content for i, content in self._arrays.items())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Snapshot) or len(self.values) != len(other.values):
            return False
        pairs = enumerate(zip(self.values, other.values, strict=True))
        alike = all(_is_same(mine, its) or (i in self._arrays and i in other._arrays) for i, (mine, its) in pairs)
        return alike and self._arrays == other._arrays and _equal(self._structure, other._structure)

    __hash__ = None  # type: ignore[assignment]


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple[list[Any], Any]:
    """Returns the leaves of a pytree, and a structure that can be compared."""
    try:
        return jax.tree.flatten(tree, is_leaf)
    except (TypeError, ValueError):  # dicts whose keys can't be sorted
        leaves: list[Any] = []
        return leaves, _take_apart(tree, leaves, is_leaf)


def _is_same(a: Any, b: Any) -> bool:
    """Returns whether these are one object, or equal numbers, strings or code that were set anew."""
    if a is b or type(a) is not type(b):
        return a is b
    return repr(a) == repr(b) if type(a) in _SIMPLE else type(a) is types.CodeType and a == b  # repr: -0.0, NaN


def _content(array: np.ndarray | set[Any]) -> Any:
    if isinstance(array, set):
        return frozenset(array)
    kind = f"{array.dtype.name}{array.shape}".encode()
    return kind + (array.tobytes() if array.dtype.hasobject else _hash().rows([array[None]])[0])


@functools.cache
def _hash() -> Hash:
    try:
        return Hash("xxh3_128")
    except ImportError:
        return Hash("blake2b")


def _take_apart(value: Any, leaves: list[Any], is_leaf: Callable[[Any], bool] | None) -> Any:
    if type(value) in (list, tuple):
        return type(value), [_take_apart(part, leaves, is_leaf) for part in value]
    if type(value) is dict:
        return list(value), [_take_apart(part, leaves, is_leaf) for part in value.values()]
    try:
        parts, structure = jax.tree.flatten(value, is_leaf)
    except (TypeError, ValueError):
        parts, structure = [value], None
    leaves += parts
    return structure


def _equal(structure: Any, other: Any) -> bool:
    try:
        return bool(structure == other)
    except (TypeError, ValueError):  # arrays in the static part of somebody's pytree: nobody can say
        return False
