"""What a function takes from around it: closures, globals, bound arguments, the fields of its object."""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flax import linen, nnx

_LIBRARIES = {"jax", "jaxlib", "jaxkv", "flax", "numpy", "optax", *sys.stdlib_module_names}
_ALWAYS = ("__call__", "__init__", "setup")  # methods that are called without their name being written


def captured(target: Any, owners: Iterable[Any] = ()) -> list[Callable[[], Any]]:
    """Returns readers of what a function takes from around it: closures, globals, bound arguments, its object's fields.

    Functions that it may call are followed, so that a helper that is defined anew is noticed as well: those that it
    names, those in lists, defaults and bound arguments, and methods, by their names alone.

    Args:
      target: the function.
      owners: objects whose methods it may call, and whose fields may hold functions.
    """
    walk = _Walk()
    walk.follow(target)
    for owner in owners:
        walk.enter(type(owner))
        walk.search(list(vars(owner).values()))
    walk.finish()
    return walk.readers


class _Walk:
    def __init__(self) -> None:
        self.readers: list[Callable[[], Any]] = []
        self._seen: dict[int, Any] = {}  # the objects, too: so that no id is given to another one
        self._classes: dict[type, None] = {}
        self._objects: list[Any] = []
        self._read_fields: set[tuple[int, str]] = set()
        self._names = set(_ALWAYS)

    def follow(self, target: Any) -> None:
        if id(target) in self._seen:
            return
        self._seen[id(target)] = target
        if isinstance(target, type):
            self.enter(target)
        elif isinstance(target, functools.partial):
            self._read(lambda: (target.args, target.keywords))
            self.follow(target.func)
        elif inspect.ismethod(target):
            owner = target.__self__
            self._read(lambda: _fields(owner))
            self.enter(owner if isinstance(owner, type) else type(owner))
            if isinstance(owner, linen.Module):
                self.search(list(vars(owner).values()))
            self.follow(target.__func__)
        elif isinstance(target, types.FunctionType):
            code, scope = target.__code__, target.__globals__
            names = set(_names_in(code))
            self._names |= names
            for cell in target.__closure__ or ():
                self._read(functools.partial(_cell, cell))
            for name in sorted(names & scope.keys()):
                self._read(functools.partial(scope.get, name))
            self._read(lambda: (target.__defaults__, target.__kwdefaults__))
        elif hasattr(target, "__wrapped__"):
            self.follow(target.__wrapped__)
        elif callable(target) and _is_plain(type(target)):
            self._read(lambda: _fields(target))
            self.enter(type(target))
            if isinstance(target, linen.Module):
                self.search(list(vars(target).values()))

    def _read(self, read: Callable[[], Any]) -> None:
        value = read()
        if isinstance(value, types.ModuleType | types.BuiltinFunctionType):
            return
        if not isinstance(value, type) or _is_plain(value):
            self.readers.append(read)
            self.search(value)

    def search(self, value: Any) -> None:
        """Follows the functions that lie in lists, tuples, dicts, and fields of objects that the code names."""
        if type(value) in (list, tuple, dict):
            if id(value) not in self._seen:
                self._seen[id(value)] = value
                for part in list(value.values()) if type(value) is dict else value:
                    self.search(part)
        elif isinstance(value, nnx.Pytree):  # those are owners
            return
        elif callable(value) and _is_plain(value):
            self.follow(value)
        elif hasattr(value, "__dict__") and _is_plain(type(value)) and id(value) not in self._seen:
            self._seen[id(value)] = value
            self._objects.append(value)
            self.enter(type(value))

    def enter(self, owner: type) -> None:
        """Counts a class among those whose methods may be called."""
        self._classes |= dict.fromkeys(base for base in owner.__mro__ if _is_plain(base))

    def finish(self) -> None:
        """Follows methods and reads fields, of which only the names are known, until nothing new turns up."""
        before = (-1, -1)
        while before != (len(self._seen), len(self._read_fields)):
            before = len(self._seen), len(self._read_fields)
            for owner in list(self._classes):
                for name in self._names & vars(owner).keys():
                    self.follow(_function(vars(owner)[name]))
            for value in list(self._objects):
                for name in self._names & vars(value).keys():
                    if (id(value), name) not in self._read_fields:
                        self._read_fields.add((id(value), name))
                        self._read(functools.partial(_field, value, name))


def _is_plain(value: Any) -> bool:
    """Returns whether a function is somebody's own code: that of JAX, Flax, NumPy and Python itself doesn't change."""
    module = getattr(value, "__module__", None) or type(value).__module__
    return str(module).split(".")[0] not in _LIBRARIES


def _names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:  # functions defined within it
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)


def _function(attribute: Any) -> Any:
    """Returns the function behind an attribute of a class."""
    if isinstance(attribute, staticmethod | classmethod):
        return attribute.__func__
    if isinstance(attribute, property):
        return attribute.fget
    return attribute.func if isinstance(attribute, functools.cached_property) else attribute


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _field(owner: Any, name: str) -> Any:
    return vars(owner).get(name)


def _fields(owner: Any) -> Any:
    if isinstance(owner, linen.Module):
        return None
    fields = getattr(owner, "__dict__", None)
    return dict(fields) if isinstance(fields, types.MappingProxyType) else fields  # a class makes a new proxy each time
