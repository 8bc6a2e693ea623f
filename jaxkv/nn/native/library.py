"""The compiled kernel: found or built, checked, and only then given to XLA.

Whatever is wrong with it (no compiler, a directory that can't be written, a damaged file, one for another machine or
another JAX, a wrong sum) costs one line in the log, and attention runs as XLA compiles it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import struct
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import jax

from jaxkv.logs import log

TARGET = "jaxkv_attention"  # by which a compiled program calls the kernel; jax.export wants it named
_SOURCES = Path(__file__).parent
_FLAGS = (  # and those of _target
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-w",
)
# What /proc/cpuinfo calls the instructions of each set.
_SETS: dict[str, set[str]] = {"plain": set(), "AVX2": {"avx2", "fma", "f16c"}}
_SETS["AVX-512"] = {*_SETS["AVX2"], "avx512f", "avx512bw", "avx512dq", "avx512vl"}
_OFF = ("0", "false", "off", "no")
_MAGIC = b"jaxkv-library-1:"  # at the end of a library that was built here, and behind it the SHA-256 of all before
_MACHINES = {"x86_64": 62, "amd64": 62, "aarch64": 183, "arm64": 183}  # e_machine of an ELF file
_LOCK, _LIBRARIES = threading.Lock(), list[ctypes.CDLL]()  # the one that XLA knows


class Unusable(Exception):
    """Why there is no library."""


@functools.cache
def problem() -> str | None:
    """Returns None if XLA can call the kernel in this process, else why it can't. The first call builds it if needed.

    `JAXKV_NATIVE` in the environment: 0 switches it off, plain, AVX2 or AVX-512 builds it with these instructions.
    """
    try:
        if _asked() in _OFF:
            raise Unusable("JAXKV_NATIVE=0 switches it off")
        if platform.system() != "Linux" or platform.machine().lower() not in _MACHINES:
            raise Unusable(f"it is not built for {platform.system()} on {platform.machine()}")
        library = load(built())
        with _LOCK:
            if not _LIBRARIES:  # once in a process
                jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(library.jaxkv_attention), platform="cpu")
                _LIBRARIES.append(library)
    except (Unusable, OSError, AttributeError, RuntimeError) as error:
        switched = "JAXKV_NATIVE" in str(error)
        (log.debug if switched else log.info)("attention runs as XLA compiles it, without the native kernel: %s", error)
        return str(error)
    return None


def _asked() -> str:
    return os.environ.get("JAXKV_NATIVE", "").lower()


def instruction_set() -> str:
    """Returns the name of the instructions that the kernel uses on this machine; `problem()` must be None."""
    return list(_SETS)[_LIBRARIES[0].jaxkv_isa() - 1]


def where() -> Path:
    """Returns the file of the library, be it there or not."""
    return _cache() / f"attention-{_key(_compiler())}.so"


def built() -> Path:
    """Returns the library in the user's cache directory, after building it if it is not there, or damaged.

    Raises:
      Unusable: if it can't be built, or not be kept.
    """
    import fcntl  # not on every platform

    compiler = _compiler()
    path = _cache() / f"attention-{_key(compiler)}.so"
    if _is_sound(path):
        return path
    if compiler is None:
        raise Unusable("there is no C++ compiler (g++ or clang++)")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            with contextlib.suppress(OSError):  # where files can't be locked, several may build
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_sound(path):
                _build(compiler, path)
    except OSError as error:
        raise Unusable(f"its directory can't be written: {error}") from error
    return path


def _build(compiler: str, path: Path) -> None:
    # Under a name of its own, and then renamed: whoever looks finds all of it or nothing.
    handle, name = tempfile.mkstemp(prefix=path.stem, suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        _compile(compiler, Path(name))
        content = Path(name).read_bytes()
        Path(name).write_bytes(content + _MAGIC + hashlib.sha256(content).digest())
        os.replace(name, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(name)


def _compile(compiler: str, to: Path) -> None:
    log.info("building the native attention kernel once, with %s", compiler)
    begin = time.monotonic()
    command = [
        compiler,
        *_FLAGS,
        *_target(),
        f"-I{jax.ffi.include_dir()}",
        str(_SOURCES / "attention.cc"),
        "-o",
        str(to),
    ]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.SubprocessError) as error:
        raise Unusable(f"{compiler} failed: {error}") from error
    if done.returncode:
        raise Unusable(f"{compiler} failed: {done.stderr.strip()[-500:]}")
    log.info("built the native attention kernel in %.1f s", time.monotonic() - begin)


def _target() -> tuple[str, ...]:
    """Returns the flag that names the instruction set to compile: one takes a third of the time of all."""
    here: set[str] = set()
    with contextlib.suppress(OSError):
        flags = re.search(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        here = set(flags.group(1).split()) if flags else set()
    usable = [n for n, wanted in enumerate(_SETS.values()) if wanted <= here]
    asked = [n for n in usable if list(_SETS)[n].lower() == _asked()]
    return (f"-DJAXKV_SETS={1 << (asked or usable)[-1]}",)


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    return next((path for name in (named, "g++", "clang++", "c++") if name and (path := shutil.which(name))), None)


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return Path(base).expanduser() / "jaxkv" / "native"


def _key(compiler: str | None) -> str:
    """Returns what the name of a library depends on: its sources, XLA's headers, the machine, how it is built."""
    found = hashlib.sha256(repr((_FLAGS, _target(), platform.machine(), compiler)).encode())
    headers = Path(jax.ffi.include_dir()).rglob("*.h")
    for path in sorted([*_SOURCES.glob("*.h"), *_SOURCES.glob("*.cc"), *headers]):
        found.update(path.read_bytes())
    return found.hexdigest()[:20]


def _is_sound(path: Path) -> bool:
    """Returns whether a library that was built here is there, and as it was."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    size = len(_MAGIC) + 32
    body, mark, digest = content[:-size], content[-size:-32], content[-32:]
    return mark == _MAGIC and hashlib.sha256(body).digest() == digest


def _check_header(path: Path) -> None:
    """Raises Unusable unless the file is a library for this machine."""
    with path.open("rb") as file:
        head = file.read(20)
    wanted = _MACHINES[platform.machine().lower()]
    if len(head) < 20 or head[:6] != b"\x7fELF\x02\x01" or struct.unpack_from("<HH", head, 16) != (3, wanted):
        raise Unusable(f"{path} is not a library for {platform.machine()}")


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
    _check_header(path)
    library = ctypes.CDLL(str(path))
    made_for, here = library.jaxkv_api_version(), _api_version()
    # Registering a newer one would take JAX's whole CPU backend down.
    if made_for // 1000 != here // 1000 or made_for > here:
        raise Unusable(f"{path} is for another jaxlib, with version {made_for} of XLA's interface; here it is {here}")
    wrong = library.jaxkv_self_test()
    if wrong:
        raise Unusable(f"{path} gives wrong sums here (case {wrong})")
    return library
