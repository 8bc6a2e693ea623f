"""The library that is built at first use, by the machine's own compiler, into the user's cache directory."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from jaxkv.logs import log
from jaxkv.native import sealed
from jaxkv.native.sealed import SOURCES, Unusable

# What /proc/cpuinfo calls the instructions of each set.
SETS: dict[str, set[str]] = {"plain": set(), "AVX2": {"avx2", "fma", "f16c"}}
SETS["AVX-512"] = {*SETS["AVX2"], "avx512f", "avx512bw", "avx512dq", "avx512vl"}
_PATIENCE = 300  # seconds, for a compiler that takes 10
_FAILED_FOR = 24 * 3600  # seconds before a compiler that failed is tried again


def asked() -> str:
    """Returns what `JAXKV_NATIVE` in the environment says, in lower case."""
    return os.environ.get("JAXKV_NATIVE", "").lower()


def built() -> Path:
    """Returns the library in the user's cache directory, after building it if it is not there, or damaged.

    Raises:
      Unusable: if it can't be built, or not be kept.
    """
    compiler, path = _compiler(), where()
    if _is_sound(path):
        return path
    if compiler is None:
        raise Unusable("there is no C++ compiler (g++ or clang++)")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.with_suffix(".lock")):
            if not _is_sound(path):
                _build(compiler, path)
    except OSError as error:
        raise Unusable(f"its directory can't be written: {error}") from error
    return path


def where() -> Path:
    """Returns the file of the library that is built here, be it there or not.

    Raises:
      Unusable: if this user has no directory for it.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    try:
        return Path(base).expanduser() / "jaxkv" / "native" / f"kernels-{_key(_compiler())}.so"
    except RuntimeError as error:
        raise Unusable(f"there is no directory to keep it in; set XDG_CACHE_HOME: {error}") from error


def _is_sound(path: Path) -> bool:
    try:
        sealed.check(path)
    except Unusable:
        return False
    return True


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Waits until no other process holds this file, or for so long that it can't be building any more."""
    import fcntl  # not on every platform

    with path.open("w") as lock:
        until = time.monotonic() + _PATIENCE
        while time.monotonic() < until:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:  # files can't be locked here: several processes may build, each its own
                break
        yield


def _build(compiler: str, path: Path) -> None:
    failed = path.with_suffix(".failed")
    with contextlib.suppress(OSError):
        if 0 <= time.time() - failed.stat().st_mtime < _FAILED_FOR:
            raise Unusable(f"{failed.read_text()}; delete {failed} to try again before tomorrow")
    # Under a name of its own, and then renamed: whoever looks finds all of it or nothing.
    handle, name = tempfile.mkstemp(prefix=path.stem, suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        _compile(compiler, Path(name))
        sealed.seal(Path(name))
        os.replace(name, path)
    except Unusable as error:  # the next processes don't wait for the same
        failed.write_text(str(error))
        raise
    finally:
        with contextlib.suppress(OSError):
            os.unlink(name)


def _compile(compiler: str, to: Path) -> None:
    log.info("building the native kernels once, with %s", compiler)
    begin = time.monotonic()
    command = [
        compiler,
        f"@{SOURCES / 'flags.txt'}",
        *_target(),
        f"-I{jax.ffi.include_dir()}",
        *map(str, sorted(SOURCES.glob("*.cc"))),
        "-o",
        str(to),
    ]
    with tempfile.TemporaryFile() as said:
        try:  # in a session of its own: with a compiler that hangs, what it started ends too
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
            )
        except OSError as error:
            raise Unusable(f"{compiler} failed: {error}") from error
        try:
            status = process.wait(_PATIENCE)
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise Unusable(f"{compiler} failed: it had not ended after {_PATIENCE} s") from error
            raise
        said.seek(0)
        text = said.read().decode(errors="replace").strip()
    if status:
        raise Unusable(f"{compiler} failed: {text[-500:] or f'it ended with status {status}'}")
    log.info("built the native kernels in %.1f s", time.monotonic() - begin)


def _target() -> tuple[str, ...]:
    """Returns the flag that names the instruction set to compile: one takes less time than all."""
    here: set[str] = set()
    with contextlib.suppress(OSError):
        flags = re.search(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        here = set(flags.group(1).split()) if flags else set()
    usable = [n for n, wanted in enumerate(SETS.values()) if wanted <= here]
    named = [n for n in usable if list(SETS)[n].lower() == asked()]
    return (f"-DJAXKV_SETS={1 << (named or usable)[-1]}",)


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    return next((path for name in (named, "g++", "clang++", "c++") if name and (path := shutil.which(name))), None)


def _key(compiler: str | None) -> str:
    """Returns what the name of a library depends on: its sources, XLA's headers, the machine, how it is built."""
    found = hashlib.sha256(repr((sealed.sources(), _target(), platform.machine(), compiler)).encode())
    for path in sorted(Path(jax.ffi.include_dir()).rglob("*.h")):
        found.update(path.read_bytes())
    return found.hexdigest()[:20]
