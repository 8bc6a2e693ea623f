"""What every test and every doctest runs under: strict JAX, several CPU devices, a compilation cache.

It stands at the root, not in tests/, because the doctests of the package run under it too.
"""

from __future__ import annotations

import gc
import itertools
import os
from importlib.metadata import version
from pathlib import Path

# Compiling is nearly all of the time that the tests take, and takes a third of it without XLA's optimizations. Tests
# whose claims are about them are marked `optimized`; the others may run with JAXKV_QUICK.
_QUICK = bool(os.environ.get("JAXKV_QUICK"))

# Before JAX is imported: XLA reads its flags once.
_FLAGS = ["--xla_force_host_platform_device_count=4"]
if _QUICK:
    # One piece per program: the tests' programs are small, and both cores have a worker already.
    _FLAGS += ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
    if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
        _FLAGS += ["--xla_cpu_use_fusion_emitters=false"]
_GIVEN = os.environ.get("XLA_FLAGS", "").split()
os.environ["XLA_FLAGS"] = " ".join(
    [*_GIVEN, *(flag for flag in _FLAGS if not any(given.startswith(flag.split("=")[0]) for given in _GIVEN))]
)

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

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


def _not_optimized(program):
    raise RuntimeError("this program was compiled with JAXKV_QUICK, without optimizations; mark the test `optimized`")


if _QUICK:
    for _name in ("as_text", "cost_analysis", "memory_analysis"):
        setattr(jax.stages.Compiled, _name, _not_optimized)


@pytest.fixture
def native_kernel():
    """Skips a test where the kernel in C++ can't be had, with the reason."""
    from jaxkv.native import library

    if library.problem():
        pytest.skip(library.problem())


def pytest_collection_finish():
    """Leaves what was imported out of every later search for garbage: it takes 0.5 s otherwise."""
    gc.collect()
    gc.freeze()


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
