"""What every test and every doctest runs under: strict JAX, several CPU devices, a compilation cache.

It stands at the root, not in tests/, because the doctests of the package run under it too.
"""

from __future__ import annotations

import gc
import itertools
import os
from pathlib import Path

# Before JAX is imported: the number of devices is read once.
_DEVICES = "--xla_force_host_platform_device_count"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=4".strip()

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compiling is nearly all of the time that the tests take.
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


# They need the libraries that made the golden files; and what only type checkers read.
collect_ignore_glob = ["tests/golden/make_*.py", "tests/public_types.py"]


@pytest.fixture(autouse=True, scope="session")
def _doctest_names(doctest_namespace):
    """The names every doctest may use without importing them."""
    import jax.numpy as jnp
    import numpy as np

    import jaxkv

    doctest_namespace.update(jax=jax, jnp=jnp, np=np, jaxkv=jaxkv)


_MAPPINGS = Path("/proc/self/maps")
_done = itertools.count(1)


def pytest_runtest_teardown():
    """Lets go of compiled programs before there are too many.

    Each takes some mappings of memory, of which Linux allows a process 65,530 (vm.max_map_count). jaxlib does not say
    that it got none: it dies, in the middle of a compilation.
    """
    if next(_done) % 10 == 0 and _MAPPINGS.exists() and _MAPPINGS.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
        gc.collect()
