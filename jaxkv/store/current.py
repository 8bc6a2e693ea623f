"""The store in effect, for code that can't be handed one: per thread, per asyncio task, and per traced function.

A global that a jitted function reads is read once, when it is traced, and never again; one that it writes keeps tracers
that mean nothing outside. So a store belongs to the trace in which it was put in effect, and can't be reached from
another one.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

from jax.extend.core import get_opaque_trace_state

from jaxkv.errors import CacheError
from jaxkv.kinds import kind_of
from jaxkv.store.store import Store
from jaxkv.tracing import NO_TRACE


@dataclasses.dataclass(frozen=True)
class _Current:
    store: Store
    trace: Any


_EMPTY = _Current(Store(), NO_TRACE)
_CURRENT: contextvars.ContextVar[_Current | None] = contextvars.ContextVar("jaxkv.store", default=None)


def get_store() -> Store:
    """Returns the store in effect: that of the innermost `use_store`, or of `set_store`, or an empty one.

    Raises:
      CacheError: inside a function that JAX traces (jit, scan, grad, vmap), if the scope was opened outside of it.

    >>> jaxkv.get_store()
    Store()
    """
    return _reachable("get_store").store


def set_store(store: Store) -> None:
    """Puts another store in effect, until the innermost `use_store` ends; without one for good.

    Raises:
      CacheError: inside a function that JAX traces (jit, scan, grad, vmap), if the scope was opened outside of it.
    """
    current = _reachable("set_store")
    _CURRENT.set(_Current(_checked(store), current.trace))


@contextlib.contextmanager
def use_store(store: Store | None = None) -> Iterator[None]:
    """A scope with its own store; leaving it in any way restores the store before.

    Inside a jitted function the scope is opened in that function: the store comes in as an argument and goes out as a
    result.

    Args:
      store: the first store of the scope; None begins with an empty one.

    >>> def layer(x):
    ...     past, store = jaxkv.get_store().pop("past")
    ...     jaxkv.set_store(store.push("past", x))
    ...     return past + x
    >>> @jax.jit
    ... def step(store, x):
    ...     with jaxkv.use_store(store):
    ...         y = layer(layer(x))
    ...         return y, jaxkv.get_store()
    >>> y, store = step(jaxkv.Store().push("past", 1.0).push("past", 2.0), 3.0)
    >>> float(y), float(store.pop("past")[0])
    (6.0, 3.0)
    """
    token = _CURRENT.set(_Current(Store() if store is None else _checked(store), get_opaque_trace_state()))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def _reachable(what: str) -> _Current:
    current = _CURRENT.get() or _EMPTY
    if current.trace != get_opaque_trace_state():
        raise CacheError(
            f"{what}: the store in effect belongs to another trace: it was put there outside of the function that jit, "
            "scan, grad or vmap now traces (or inside one that has ended). Pass the store as an argument, open `with "
            "jaxkv.use_store(store):` inside of the function, and return jaxkv.get_store() from within"
        )
    return current


def _checked(store: Any) -> Store:
    if not isinstance(store, Store):
        raise ValueError(f"{store!r} is {kind_of(store)}; give a jaxkv.Store")
    return store
