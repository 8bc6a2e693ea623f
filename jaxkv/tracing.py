"""Whether JAX is tracing now."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from jax.extend.core import get_opaque_trace_state

# That of a new thread: this file may be imported for the first time by a function that JAX traces.
with ThreadPoolExecutor(1) as _thread:
    NO_TRACE = _thread.submit(get_opaque_trace_state).result()


def is_tracing() -> bool:
    """Returns whether this runs under `jit`, `grad`, `vmap` or another transform, where arrays may have no values."""
    return get_opaque_trace_state() != NO_TRACE
