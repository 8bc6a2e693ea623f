"""What a plain function takes from around it: closures, globals, bound arguments, the fields of its object."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

from flax import linen


def captured(target: Any, seen: set[int] | None = None) -> Iterator[Callable[[], Any]]:
    """Yields readers of what a function takes from around it: closures, globals, bound arguments, its object's fields.

    Functions that it calls are followed, so that a helper that is defined anew is noticed as well.
    """
    seen = set() if seen is None else seen
    if id(target) in seen:
        return
    seen.add(id(target))
    if isinstance(target, functools.partial):
        yield lambda: (target.args, target.keywords)
        yield from captured(target.func, seen)
    elif inspect.ismethod(target):
        yield lambda: _fields(target.__self__)
        yield from captured(target.__func__, seen)
    elif isinstance(target, types.FunctionType):
        code, scope = target.__code__, target.__globals__
        readers = [functools.partial(_cell, cell) for cell in target.__closure__ or ()]
        readers += [functools.partial(scope.get, name) for name in _global_names(code) if name in scope]
        for read in readers:
            value = read()
            if isinstance(value, types.ModuleType | type | types.BuiltinFunctionType):
                continue
            yield read
            if callable(value) and _is_plain(value):
                yield from captured(value, seen)
        yield lambda: (target.__defaults__, target.__kwdefaults__)
    elif hasattr(target, "__wrapped__"):
        yield from captured(target.__wrapped__, seen)
    elif callable(target) and not isinstance(target, type | types.BuiltinFunctionType) and _is_plain(type(target)):
        yield lambda: _fields(target)
        yield from captured(type(target).__call__, seen)


def _is_plain(value: Any) -> bool:
    """Returns whether a function is somebody's own code: that of JAX, Flax and NumPy doesn't change."""
    module = getattr(value, "__module__", None) or type(value).__module__
    return module.split(".")[0] not in ("jax", "jaxlib", "flax", "numpy", "optax", "builtins", "functools")


def _global_names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:  # functions defined within it
        if isinstance(constant, types.CodeType):
            yield from _global_names(constant)


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _fields(owner: Any) -> Any:
    return None if isinstance(owner, linen.Module) else getattr(owner, "__dict__", None)
