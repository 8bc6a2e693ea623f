"""The compiled kernels: found or built, checked, and only then given to XLA.

Whatever is wrong with them (no compiler, a directory that can't be written, a damaged file, one for another machine or
another JAX, a wrong sum) costs one line in the log, and everything runs as XLA compiles it.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import platform
import re
import threading
from pathlib import Path

import jax

from jaxkv.logs import log
from jaxkv.native import build, sealed
from jaxkv.native.build import asked
from jaxkv.native.sealed import Unusable

# By these names a compiled program calls the handlers; jax.export wants that of attention named.
TARGETS = ATTENTION, PRODUCT, GROUPS, ROWS, MEMORY = (
    "jaxkv_attention",
    "jaxkv_product",
    "jaxkv_groups",
    "jaxkv_rows",
    "jaxkv_memory",
)
_PARTS = "attention", "products", "moves of rows", "memories"  # in the order of their self-tests: kParts in library.cc
WHEEL = "jaxkv-cpu"  # the package of a library that need not be built; its sources are in native/
_OFF = ("0", "false", "off", "no")
_LOCK, _LIBRARIES = threading.Lock(), list[ctypes.CDLL]()  # the one that XLA knows
_PROBLEMS = (Unusable, OSError, AttributeError, RuntimeError, ValueError)


@functools.cache
def problem() -> str | None:
    """Returns None if XLA can call the kernel in this process, else why it can't. The first call builds it if needed.

    `JAXKV_NATIVE` in the environment: 0 switches it off; of plain, AVX2 and AVX-512 it uses these instructions.
    """
    try:
        if asked() in _OFF:
            raise Unusable("JAXKV_NATIVE=0 switches it off")
        if platform.system() != "Linux" or platform.machine().lower() not in sealed.MACHINES:
            raise Unusable(f"it is not built for {platform.system()} on {platform.machine()}")
        with _LOCK:
            if not _LIBRARIES:  # once in a process
                library = _wheel()[0] or load(build.built())
                for target in TARGETS:
                    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
                _LIBRARIES.append(library)
            _LIBRARIES[0].jaxkv_use(_wanted())
    except _PROBLEMS as error:
        switched = "JAXKV_NATIVE" in str(error)
        (log.debug if switched else log.info)(
            "attention, products and moves of rows run as XLA compiles them, without the native kernels: %s", error
        )
        return str(error)
    return None


def instruction_set() -> str:
    """Returns the name of the instructions that the kernel uses on this machine; `problem()` must be None."""
    return list(build.SETS)[_LIBRARIES[0].jaxkv_use(_wanted()) - 1]


def origin() -> str:
    """Returns where the library comes from, in words; `problem()` must be None."""
    path = Path(_LIBRARIES[0]._name)
    if path != in_wheel():
        return f"built here, {path}"
    return f"from {WHEEL} {importlib.metadata.version(WHEEL)}, {path}"


def in_wheel() -> Path | None:
    """Returns the library that the package jaxkv-cpu brings, or None if that is not installed."""
    spec = importlib.util.find_spec(WHEEL.replace("-", "_"))
    folders = spec.submodule_search_locations if spec else None
    return Path(folders[0], "kernels.so") if folders else None


def wheel_problem() -> str | None:
    """Returns why the library of jaxkv-cpu is left alone; None if it is not, or if nobody asks for one."""
    return None if asked() in _OFF else _wheel()[1]


@functools.cache
def _wheel() -> tuple[ctypes.CDLL | None, str | None]:
    """Returns the library of jaxkv-cpu, or why it is not used; neither if that is not installed."""
    path = in_wheel()
    if path is None:
        return None, None
    try:
        sealed.check(path)
        return load(path), None
    except _PROBLEMS as error:
        log.info("the library of %s is left alone: %s", WHEEL, error)
        return None, str(error)


def _wanted() -> int:
    """Returns the number of the instruction set that `JAXKV_NATIVE` names, or 0: the best that there is."""
    names = [name.lower() for name in build.SETS]
    return names.index(asked()) + 1 if asked() in names else 0


def _api_version() -> int:
    """Returns the version of XLA's interface that this jaxlib has: major * 1000 + minor."""
    text = (Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h").read_text()
    numbers = [re.search(rf"#define XLA_FFI_API_{part} (\d+)", text) for part in ("MAJOR", "MINOR")]
    if not all(numbers):
        raise Unusable("this jaxlib does not say which version of XLA's interface it has")
    major, minor = (int(found.group(1)) for found in numbers if found)
    return major * 1000 + minor


def load(path: Path) -> ctypes.CDLL:
    """Returns the library of a file, of which XLA has not been told.

    Raises:
      Unusable: if it is not for this machine or this jaxlib, or computes something wrong.
    """
    with path.open("rb") as file:
        sealed.check_header(path, file.read(20))
    library = ctypes.CDLL(str(path))
    made_for, here = library.jaxkv_api_version(), _api_version()
    # Registering a newer one would take JAX's whole CPU backend down.
    if made_for // 1000 != here // 1000 or made_for > here:
        raise Unusable(f"{path} is for another jaxlib, with version {made_for} of XLA's interface; here it is {here}")
    wrong = library.jaxkv_self_test()
    if wrong < 0:
        raise Unusable(f"{path} has no instructions that this machine has")
    if wrong:
        part, instructions, case = _PARTS[wrong // 100 - 1], list(build.SETS)[wrong // 10 % 10 - 1], wrong % 10
        raise Unusable(f"{path} gives wrong sums here: {part} with {instructions} instructions, case {case}")
    return library
