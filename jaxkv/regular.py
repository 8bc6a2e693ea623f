"""Files that are opened to be read: regular ones of a size that they can have, whoever they come from."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

_POINTER = b"version https://git-lfs.github.com/spec/"


def opened(path: str | os.PathLike[str]) -> tuple[BinaryIO, int]:
    """Returns a file, opened to be read, and its size in bytes. Links are followed.

    Anything else that a path can lead to is refused before it is opened: to open a pipe waits for somebody who writes
    into it, and to open a device may do anything.

    Raises:
      FileNotFoundError: if there is no such file.
      OSError: if it can't be opened.
      ValueError: if it is not a regular file, naming what it is; or stands for one, as in a clone without Git LFS.
    """
    path = Path(path)
    try:
        found = path.stat()
    except FileNotFoundError:
        if not path.is_symlink():
            raise
        raise FileNotFoundError(
            errno.ENOENT, f"this link leads to {os.readlink(path)}, which is not there; fetch the file again", str(path)
        ) from None
    except (NotADirectoryError, UnicodeEncodeError) as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), ascii(os.fspath(path))) from error
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is {_kind(found.st_mode)}, not a file; put the file there")
    file = path.open("rb")
    if file.peek(len(_POINTER)).startswith(_POINTER):
        file.close()
        raise ValueError(f"{path} is a pointer of Git LFS, not the file itself; fetch that: git lfs pull")
    return file, found.st_size


def read(path: str | os.PathLike[str], most: int) -> bytes:
    """Returns the content of a file of at most so many bytes.

    Raises:
      OSError, ValueError: as `opened`; and ValueError if it is larger.
    """
    file, size = opened(path)
    with file:
        if size > most:
            raise ValueError(
                f"{path} has {size:,} bytes, and such a file has at most {most:,}; it is damaged or another one, fetch "
                "it again"
            )
        return file.read(most)


def _kind(mode: int) -> str:
    kinds = {
        stat.S_ISDIR: "a directory",
        stat.S_ISFIFO: "a named pipe",
        stat.S_ISSOCK: "a socket",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
    }
    return next((name for test, name in kinds.items() if test(mode)), "something else")
