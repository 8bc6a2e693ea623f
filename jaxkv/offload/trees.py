"""Values with arrays somewhere inside, taken apart and put together again with their containers as they were."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx
from flax.core import FrozenDict

from jaxkv.offload.kept import Kept

# Those whose names JAX sorts.
_MAPPINGS = (dict, collections.defaultdict, FrozenDict, nnx.State)


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """A tree of JAX. Its leaves are Kept, or Opened, or what users put in that holds no array."""

    treedef: Any
    leaves: tuple[Any, ...]

    def kept(self) -> Iterator[Kept]:
        for leaf in self.leaves:
            if isinstance(leaf, Kept):
                yield leaf
            elif isinstance(leaf, Opened):
                yield from leaf.parts.kept()


@dataclasses.dataclass(frozen=True, eq=False)
class Opened:
    """A container that JAX takes for a leaf, or whose order it would lose: its parts, and what makes it of them."""

    make: Callable[[Any], Any]
    parts: Packed


def pack(value: Any, keep: Callable[[Any], Any]) -> Packed:
    """Takes a value apart; `keep` turns an array into a Kept, and returns every other leaf as it is."""
    leaves, treedef = jax.tree.flatten(value, is_leaf=lambda x: type(x) in _MAPPINGS)
    return Packed(treedef, tuple(_pack_leaf(leaf, keep) for leaf in leaves))


def unpack(packed: Packed, fetch: Callable[[Kept], Any]) -> Any:
    """Puts a value together."""
    return jax.tree.unflatten(packed.treedef, [_unpack_leaf(leaf, fetch) for leaf in packed.leaves])


def _pack_leaf(leaf: Any, keep: Callable[[Any], Any]) -> Any:
    if type(leaf) in _MAPPINGS:
        return _pack_mapping(leaf, keep)
    is_dataclass = dataclasses.is_dataclass(leaf) and not isinstance(leaf, type)
    if not is_dataclass and not isinstance(leaf, (dict, list, tuple)):
        return keep(leaf)
    reduced = leaf.__reduce_ex__(4)  # as copy.copy takes it apart
    if isinstance(reduced, str):
        return leaf
    make, args, state, items, pairs = (*reduced[:5], None, None, None)[:5]
    parts = pack([list(args), state, list(items or ()), [list(pair) for pair in pairs or ()]], keep)
    if not any(parts.kept()):
        return leaf
    return Opened(lambda given: _remake(make, *given), parts)


def _pack_mapping(leaf: Any, keep: Callable[[Any], Any]) -> Opened:
    mapping = leaf.raw_mapping if isinstance(leaf, nnx.State) else leaf  # what is in a State are plain dicts
    names = tuple(mapping)
    make: Callable[[Any], Any] = type(leaf)
    if make is collections.defaultdict:
        make = functools.partial(collections.defaultdict, leaf.default_factory)
    return Opened(lambda values: make(zip(names, values, strict=True)), pack(list(mapping.values()), keep))


def _unpack_leaf(leaf: Any, fetch: Callable[[Kept], Any]) -> Any:
    if isinstance(leaf, Kept):
        return fetch(leaf)
    if isinstance(leaf, Opened):
        return leaf.make(unpack(leaf.parts, fetch))
    return leaf


def _remake(make: Callable[..., Any], args: list, state: Any, items: list, pairs: list) -> Any:
    """What copy.copy does with the parts of an object (Python's documentation of `object.__reduce__`)."""
    new = make(*args)
    if state is not None:
        if hasattr(new, "__setstate__"):
            new.__setstate__(state)
        else:
            attributes, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
            if attributes:
                new.__dict__.update(attributes)
            for name, value in (slots or {}).items():
                object.__setattr__(new, name, value)
    if items:
        new.extend(items)
    for key, value in pairs:
        new[key] = value
    return new
