"""What a function takes from around it: closures, globals, bound arguments, fields of objects, classes and modules."""

from __future__ import annotations

import array
import collections
import functools
import inspect
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flax import linen, nnx

_ARRAYS = {"jax", "jaxlib", "jaxkv", "flax", "numpy", "optax"}
_LIBRARIES = {*_ARRAYS, *sys.stdlib_module_names}
# Methods that are called without their name being written, and where Python's own containers keep what they hold.
_ALWAYS = ("__call__", "__init__", "setup", "__getattr__", "__getitem__", "data")
_INSTALLED = re.compile(r"[/\\](site|dist)-packages[/\\]")
_HOLD = (dict, list, tuple, set, collections.deque)
_BYTES = (bytearray, memoryview, array.array)


def captured(target: Any, owners: Iterable[Any] = ()) -> tuple[list[Callable[[], Any]], list[nnx.Pytree]]:
    """Returns readers of what a function takes from around it, and the nnx modules that it came across.

    That is: closures, globals, bound arguments, code, and the fields of its object.

    Functions that it may call are followed, so that a helper that is defined anew is noticed as well: those that it
    names, and those in lists, defaults and bound arguments. Of other objects, classes and modules everything is read
    that has a name which occurs in the code, whatever the code does with that name.

    Args:
      target: the function.
      owners: objects whose methods it may call, and whose fields may hold functions.
    """
    owners = list(owners)
    walk = _Walk({_root(target), *(_root(type(owner)) for owner in owners)})
    walk.follow(target)
    for owner in owners:
        walk.enter(type(owner))
        walk.search(list(vars(owner).values()))
    walk.finish()
    return walk.readers, walk.modules


class _Walk:
    def __init__(self, own: set[str]) -> None:
        self._own = own  # packages that are followed although they are installed
        self.readers: list[Callable[[], Any]] = []
        self.modules: list[nnx.Pytree] = []
        self._seen: dict[int, Any] = {}  # the objects, too: so that no id is given to another one
        self._owners: dict[int, Any] = {}  # objects, classes and modules with fields
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
            self.enter(owner)
            if isinstance(owner, linen.Module):
                self.search(list(vars(owner).values()))
            self.follow(target.__func__)
        elif isinstance(target, types.FunctionType):
            self._follow_function(target)
        elif hasattr(target, "__wrapped__"):
            self.follow(target.__wrapped__)
        elif callable(target) and _is_plain(type(target)):
            self._read(lambda: _fields(target))
            self.enter(target)
            if isinstance(target, linen.Module):
                self.search(list(vars(target).values()))

    def _follow_function(self, target: types.FunctionType) -> None:
        scope = target.__globals__
        root = str(scope.get("__name__")).split(".")[0]
        if root in _LIBRARIES or (root not in self._own and _INSTALLED.search(str(scope.get("__file__")))):
            # jax.vmap(f), say: what others have written changes only in what it is given to hold.
            for cell in target.__closure__ or ():
                self.search(_cell(cell))
            return
        names = set(_names_in(target.__code__))
        self._names |= names
        for cell in target.__closure__ or ():
            self._read(functools.partial(_cell, cell))
        for name in sorted(names & scope.keys()):
            self._read(functools.partial(scope.get, name))
        for name in sorted(names & sys.modules.keys() - scope.keys()):  # imported within the function
            self.search(sys.modules[name])
        self._read(lambda: (target.__code__, target.__defaults__, target.__kwdefaults__))
        self._owners[id(target)] = target

    def _read(self, read: Callable[[], Any]) -> None:
        value = read()
        if isinstance(value, types.BuiltinFunctionType) or (
            isinstance(value, type | types.ModuleType) and not _is_plain(value)
        ):
            return
        self.readers.append(read)
        self.search(value)

    def search(self, value: Any) -> None:
        """Follows the functions that lie in lists, tuples, dicts, and fields of objects that the code names."""
        value = _function(value)
        if isinstance(value, _HOLD):
            if id(value) not in self._seen:
                self._seen[id(value)] = value
                if type(value) not in (dict, list, tuple, set):  # JAX may not know what it holds
                    self.readers.append(functools.partial(_contents, value))
                for part in _contents(value):
                    self.search(part)
            if type(value).__module__ != "builtins":
                self.enter(value)
        elif isinstance(value, _BYTES):
            self.readers.append(functools.partial(bytes, value))
        elif isinstance(value, nnx.Pytree):  # those are owners
            self.modules.append(value)
        elif callable(value):
            if _is_plain(value) or isinstance(value, types.FunctionType) or hasattr(value, "__wrapped__"):
                self.follow(value)
        elif isinstance(value, types.ModuleType):
            if _is_plain(value):
                self.enter(value)
        elif _root(type(value)) not in _ARRAYS and (hasattr(value, "__dict__") or _is_plain(type(value))):
            self.enter(value)

    def enter(self, owner: Any) -> None:
        """Counts an object, a class or a module among those whose fields may be read and whose methods be called."""
        if isinstance(owner, types.ModuleType):
            self._owners[id(owner)] = owner
            return
        kind = owner if isinstance(owner, type) else type(owner)
        if kind is not owner:
            self._owners[id(owner)] = owner
        self._owners |= {id(base): base for base in kind.__mro__ if _is_plain(base)}

    def finish(self) -> None:
        """Reads fields and follows methods, of which only the names are known, until nothing new turns up."""
        before = (-1, -1)
        while before != (len(self._seen), len(self._read_fields)):
            before = len(self._seen), len(self._read_fields)
            for number, owner in list(self._owners.items()):
                for name in sorted(self._names & _names_of(owner)):
                    if (number, name) not in self._read_fields:
                        self._read_fields.add((number, name))
                        self._read(functools.partial(_field, owner, name))


def _is_plain(value: Any) -> bool:
    """Returns whether a function, class or module is somebody's own: those of JAX, Flax, Python itself don't change."""
    return _root(value) not in _LIBRARIES


def _root(value: Any) -> str:
    module = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
    return str(module or type(value).__module__).split(".")[0]


def _contents(value: Any) -> list[Any]:
    """Returns what a container holds, whatever a class derived from it makes of that."""
    if isinstance(value, dict):
        return [*dict.keys(value), *dict.values(value)]
    return list(value)


def _names_of(owner: Any) -> set[str]:
    """Returns the names of the fields that it has, or may get in place of those of its class and their bases."""
    names = set(getattr(owner, "__dict__", ()))
    if not isinstance(owner, types.ModuleType):
        kind = owner if isinstance(owner, type) else type(owner)
        names.update(*(vars(base) for base in kind.__mro__ if _is_plain(base)))
    return names


def _names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):  # a function defined within it
            yield from _names_in(constant)
        elif isinstance(constant, str):  # what getattr is given
            yield constant


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
    """Returns what an object, class or module holds itself under a name, in its __dict__ or a slot; None if nothing."""
    fields = getattr(owner, "__dict__", {})
    if name in fields or isinstance(owner, type | types.ModuleType):
        return fields.get(name)
    slot = getattr(type(owner), name, None)
    return getattr(owner, name, None) if isinstance(slot, types.MemberDescriptorType) else None


def _fields(owner: Any) -> Any:
    if isinstance(owner, linen.Module):
        return None
    fields = getattr(owner, "__dict__", None)
    return dict(fields) if isinstance(fields, types.MappingProxyType) else fields  # a class makes a new proxy each time
