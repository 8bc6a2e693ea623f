"""What a directory of segments is called by: the names of its files, and the file that says what it is."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Callable

from jaxkv.logs import log
from jaxkv.memo.record import NAMESPACE_BYTES, segment_seed
from jaxkv.memo.segment import Handle, lock, write_whole

FORMAT = "FORMAT"
LOCK = "lock"
_NAME, _VERSION = "jaxkv-disk", 1
_OTHERS_MAY_LIE_HERE = ("lost+found",)


def is_ours(name: str) -> bool:
    """Whether a file of this name belongs to the store."""
    if name.endswith(".tmp"):
        parts = name[:-4].rsplit(".", 1)
        name = name[:-4] if parts[-1] in ("seg", "idx", "json") else parts[0]
    if name.endswith(".idx"):
        name = f"{name[:-4]}.seg"
    if segment_seed(name) or name in (FORMAT, LOCK):
        return True
    stem, _, ending = name.partition(".")
    return ending == "json" and len(stem) == 2 * NAMESPACE_BYTES and not set(stem) - set("0123456789abcdef")


def is_label(name: str) -> bool:
    """Whether a file of the store holds no records: it says what the store is, or what a namespace is."""
    return name in (FORMAT, LOCK) or (is_ours(name) and name.endswith(".json"))


def check_format(directory: str) -> bool:
    """Returns whether the directory says that it is a store; False if that is still to be written.

    Raises:
      ValueError: if it holds something else, or a store of another version.
      OSError: if it can't be read.
    """
    names = os.listdir(directory)
    if FORMAT in names:
        with open(os.path.join(directory, FORMAT), "rb") as file:
            words = file.read(256).split()
        if len(words) == 3 and _crc(b" ".join(words[:2])) == words[2]:
            if words[0].decode("utf-8", "replace") == _NAME:
                if words[1] == str(_VERSION).encode():
                    return True
                raise ValueError(
                    f"{directory} is a store of version {words[1].decode('utf-8', 'replace')}, this jaxkv reads "
                    f"version {_VERSION}; give another directory, or the jaxkv that wrote it"
                )
        else:
            log.warning("%s: the file %s is damaged", directory, FORMAT)
    others = [name for name in names if not (is_ours(name) or name.startswith(".") or name in _OTHERS_MAY_LIE_HERE)]
    if others:
        raise ValueError(
            f"{directory} holds other files than a store's ({min(others)!r} among them); give an empty directory"
        )
    return False


def write_format(directory: str) -> None:
    words = f"{_NAME} {_VERSION}".encode()
    write_whole(os.path.join(directory, FORMAT), words + b" " + _crc(words) + b"\n")


def hold(directory: str) -> Handle | None:
    """Returns the lock under which files are removed, held until it is closed; None if another process has it.

    Raises:
      OSError: if its file can't be opened.
    """
    handle = Handle(os.path.join(directory, LOCK), os.O_RDWR | os.O_CREAT)
    if lock(handle):
        return handle
    handle.close()
    return None


def _crc(data: bytes) -> bytes:
    return f"{zlib.crc32(data):08x}".encode()


def room_taken(directory: str, counts: Callable[[str], bool] = is_ours) -> int:
    """Returns the bytes of all files whose names count, as the file system says.

    Raises:
      OSError: if the directory can't be read.
    """
    total = 0
    with os.scandir(directory) as entries:
        for entry in entries:
            if counts(entry.name):
                with contextlib.suppress(FileNotFoundError):
                    total += entry.stat(follow_symlinks=False).st_size
    return total
