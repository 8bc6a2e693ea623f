"""The file of a library: its checksum, the sources it was made of, the machine it is for.

A damaged library may kill the process that loads it, so all of this is checked before.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import struct
from pathlib import Path

SOURCES = Path(__file__).parent
_MAGIC = (
    b"jaxkv-library-2:"  # behind it, in hexadecimal, the digest of the sources, and that of all bytes before _MAGIC
)
_SEAL = len(_MAGIC) + 2 * 64
MACHINES = {"x86_64": 62, "amd64": 62, "aarch64": 183, "arm64": 183}  # e_machine of an ELF file


class Unusable(Exception):
    """Why there is no library."""


@functools.cache
def sources() -> str:
    """Returns a digest of what a library is made of, sources and flags, as native/CMakeLists.txt computes it too."""
    files = [path for path in SOURCES.iterdir() if path.suffix in (".cc", ".h", ".txt")]
    lines = (f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n" for path in sorted(files))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def seal(path: Path) -> None:
    """Appends to a library what `check` wants to see."""
    content = path.read_bytes()
    path.write_bytes(content + _MAGIC + (sources() + hashlib.sha256(content).hexdigest()).encode())


def check(path: Path) -> None:
    """Checks a library without loading it.

    Raises:
      Unusable: if there is none, or it is damaged, or made of other sources, or for another machine.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Unusable(f"{path} can't be read: {error}") from error
    check_header(path, content)
    body, mark, digests = content[:-_SEAL], content[-_SEAL : -2 * 64], content[-2 * 64 :]
    if mark != _MAGIC or digests[64:] != hashlib.sha256(body).hexdigest().encode():
        raise Unusable(f"{path} is damaged: its checksum is wrong")
    if digests[:64] != sources().encode():
        raise Unusable(f"{path} was made of other sources than those of this jaxkv; install both in the same version")


def check_header(path: Path, head: bytes) -> None:
    """Raises Unusable unless a file that begins with these bytes is a library for this machine."""
    wanted = MACHINES[platform.machine().lower()]
    if len(head) < 20 or head[:6] != b"\x7fELF\x02\x01" or struct.unpack_from("<HH", head, 16) != (3, wanted):
        raise Unusable(f"{path} is not a library for {platform.machine()}")
