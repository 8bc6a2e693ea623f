"""Store: named values and named queues in one immutable pytree."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.tree_util import GetAttrKey

from jaxkv.kinds import kind_of

_MISSING: Any = object()


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Store:
    """Named values, and named queues out of which comes first what went in first. Every change returns a new one.

    A step takes a store and returns one; whoever keeps the old one can go back to it. Names and lengths of queues are
    structure, so a step that pushes as often as it pops compiles once. Values are any pytrees. Of their leaves arrays
    and numbers are data, traced under `jit`; all others (bool, str, None, enums) are structure: they can be asked with
    `if` while tracing, and another one compiles anew. A flag that is to be data is a `jnp.bool_`.

    A value and a queue may have the same name and never meet.

    >>> store = jaxkv.Store().set("use_cache", True).push("kv", jnp.ones(3)).push("kv", jnp.zeros(3))
    >>> kv, store = store.pop("kv")
    >>> store.push("kv", 2 * kv)
    Store(values: use_cache=True; queues: kv=[float32[3], float32[3]])
    """

    _values: Mapping[str, Any] = dataclasses.field(default_factory=dict, init=False)
    _queues: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict, init=False)

    def push(self, name: str, value: Any) -> Store:
        """Returns this store with a value at the end of a queue, which is made if there is none.

        Raises:
          ValueError: if the name is not a string, or a leaf of the value is neither an array nor hashable.
        """
        queue = self._queues.get(_checked(name), ())
        return _store(self._values, {**self._queues, name: (*queue, _frozen(name, value))})

    def pop(self, name: str) -> tuple[Any, Store]:
        """Returns the first value of a queue, and this store without it. A queue that was emptied stays.

        Raises:
          KeyError: if there is no such queue.
          IndexError: if it is empty.
        """
        if name not in self._queues:
            raise KeyError(f"pop: there is no queue {name!r}; {self._what_there_is()}")
        if not self._queues[name]:
            raise IndexError(f"pop: the queue {name!r} is empty; push as often as you pop")
        first, *rest = self._queues[name]
        return _thawed(first), _store(self._values, {**self._queues, name: tuple(rest)})

    def q_size(self, name: str) -> int | None:
        """Returns the number of values in a queue, None if there is no such queue."""
        return len(self._queues[name]) if name in self._queues else None

    def set(self, name: str, value: Any) -> Store:
        """Returns this store with a named value, in place of the one that it had.

        Raises:
          ValueError: as `push`.
        """
        return _store({**self._values, _checked(name): _frozen(name, value)}, self._queues)

    def get(self, name: str, default: Any = _MISSING) -> Any:
        """Returns a named value; if there is none, the default.

        Raises:
          KeyError: if there is neither.
        """
        if name in self._values:
            return _thawed(self._values[name])
        if default is _MISSING:
            raise KeyError(f"get: there is no value {name!r}, and no default was given; {self._what_there_is()}")
        return default

    def clear(self, name: str) -> Store:
        """Returns this store without the value and without the queue of a name.

        Raises:
          KeyError: if there is neither.
        """
        if name not in self:
            raise KeyError(f"clear: there is no {name!r}; {self._what_there_is()}")
        values, queues = dict(self._values), dict(self._queues)
        values.pop(name, None)
        queues.pop(name, None)
        return _store(values, queues)

    def clear_all(self) -> Store:
        """Returns an empty store."""
        return Store()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of values and queues, sorted."""
        return tuple(sorted({*self._values, *self._queues}))

    def __contains__(self, name: object) -> bool:
        return name in self._values or name in self._queues

    def __repr__(self) -> str:
        kinds = {"values": self._values, "queues": {name: list(queue) for name, queue in self._queues.items()}}
        shown = [
            f"{kind}: {', '.join(f'{name}={_short(held[name])}' for name in sorted(held))}"
            for kind, held in kinds.items()
            if held
        ]
        return f"Store({'; '.join(shown)})"

    def _what_there_is(self) -> str:
        values = ", ".join(sorted(self._values)) or "none"
        queues = ", ".join(f"{name} ({len(queue)})" for name, queue in sorted(self._queues.items())) or "none"
        return f"values: {values}; queues: {queues}"

    def tree_flatten_with_keys(self) -> Any:
        return ((GetAttrKey("values"), dict(self._values)), (GetAttrKey("queues"), dict(self._queues))), None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> Store:
        return _store(*children)


def _store(values: Any, queues: Any) -> Store:
    store = Store()
    object.__setattr__(store, "_values", values)
    object.__setattr__(store, "_queues", queues)
    return store


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """A leaf that is structure. The type counts: True is not 1."""

    value: Any
    kind: type


def _checked(name: Any) -> str:
    if not isinstance(name, str):
        raise ValueError(f"{name!r} is {kind_of(name)}; names in a store are strings")
    return name


def _frozen(name: str, value: Any) -> Any:
    """Returns a value as a store keeps it: not to be changed from outside, leaves that JAX can't trace as structure."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            leaf = leaf.copy()
            leaf.flags.writeable = False
        if type(leaf) in (int, float, complex) or _is_array(leaf):
            return leaf
        try:
            hash(leaf)
        except TypeError:
            kind = type(leaf).__name__
            raise ValueError(
                f"{name}: a {kind} is neither an array nor hashable; make it a tuple or a pytree"
            ) from None
        return _Static(leaf, type(leaf))

    return jax.tree.map(one, value)


def _thawed(value: Any) -> Any:
    def one(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            return leaf.view()  # of what can't be made writable through it
        return leaf.value if isinstance(leaf, _Static) else leaf

    return jax.tree.map(one, value, is_leaf=lambda leaf: isinstance(leaf, _Static))


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and hasattr(leaf, "shape")


class _Text(str):
    """Text that is its own repr."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _short(value: Any) -> str:
    """Returns the repr of a value with every array in it as dtype[shape]."""

    def one(leaf: Any) -> Any:
        return _Text(f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]") if _is_array(leaf) else leaf

    return repr(jax.tree.map(one, _thawed(value)))
