"""The segment that a process appends to, and how its end is kept whole whatever the disk does."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jaxkv.errors import NotSupportedError
from jaxkv.memo.record import HEADER_BYTES, Header, pack_entries, pack_header

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_IOV_MAX = 1024
_CALL_MOST = 1 << 30  # bytes in one call; Linux takes at most 2 GiB


class Handle:
    """An open file. Readers leave the closing to the last reference, so that none loses it to another thread.

    Who holds a lock closes it by `close` or `with`: an exception may keep references alive for a while.
    """

    __slots__ = ("fd",)

    def __init__(self, path: str, flags: int) -> None:
        self.fd = -1
        self.fd = os.open(path, flags | os.O_CLOEXEC, 0o666)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # a default outlives the module at exit
        fd, self.fd = self.fd, -1
        if fd >= 0:
            close(fd)

    def close(self) -> None:
        self.__del__()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def need_locks() -> None:
    """Raises NotSupportedError where files can't be locked."""
    if fcntl is None:
        raise NotSupportedError(
            "the disk tier needs file locks, which this system lacks; use the memory tier alone: Memo(memory=SIZE)"
        )


def lock(handle: Handle, *, shared: bool = False) -> bool:
    """Takes the file's lock if it is free; it is given back when the last copy of the handle is closed."""
    try:
        fcntl.flock(handle.fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_live(path: str) -> bool:
    """Whether some process has this segment open for writing: it holds the file's lock, which SIGKILL releases."""
    try:
        with Handle(path, os.O_RDONLY) as handle:
            return not lock(handle, shared=True)
    except OSError:
        return False


class Writer:
    """A segment that one process appends to. It belongs to it as long as this object lives.

    The file is locked before it gets its name, so nobody ever sees it without an owner.

    Raises:
      OSError: if the files can't be made.
    """

    def __init__(self, directory: str, sequence: int) -> None:
        self.stem = f"{sequence:012d}-{secrets.token_hex(8)}"
        self.seed = int(self.stem[-16:], 16)
        self.path = os.path.join(directory, f"{self.stem}.seg")
        self.index_path = os.path.join(directory, f"{self.stem}.idx")
        self.end = 0  # bytes of whole records
        self.index_end = 0
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND
        self.file = Handle(self.path + ".tmp", flags)
        try:
            lock(self.file)
            os.rename(self.path + ".tmp", self.path)
            self.index = Handle(self.index_path, flags)
        except OSError:
            self.file.close()
            for path in (self.path + ".tmp", self.path):
                with contextlib.suppress(OSError):
                    os.unlink(path)
            raise

    def is_sound(self) -> bool:
        """Whether the file still has its name and ends where it was left: nobody removed, cut or interrupted it."""
        try:
            named, held = os.stat(self.path), os.fstat(self.file.fd)
        except OSError:
            return False
        return named.st_ino == held.st_ino and named.st_dev == held.st_dev and held.st_size == self.end

    def append(self, records: Sequence[tuple[Header, Any]]) -> tuple[list[int], OSError | None]:
        """Writes records, and returns the offsets of those that are there in full, and what went wrong if not all are.

        What was written of a record that did not fit is cut off again. After an error nothing more should be appended
        unless `is_sound()`.
        """
        pieces: list[Any] = []
        ends, end = [], self.end
        for header, payload in records:
            pieces.append(pack_header(header, self.seed))
            if header.stored:
                pieces.append(payload)
            end += HEADER_BYTES + header.stored
            ends.append(end)
        count, problem = write_all(self.file.fd, pieces)
        whole = sum(stop <= self.end + count for stop in ends)
        stops = [self.end, *ends]
        begins, self.end = stops[:whole], stops[whole]
        if problem is not None:
            with contextlib.suppress(OSError):  # else whoever reads it finds a torn end, and steps over it
                os.ftruncate(self.file.fd, self.end)
        if not whole:
            return [], problem
        headers = [header for header, _ in records[:whole]]
        entries = pack_entries([h.key for h in headers], begins, [h.stored for h in headers], self.seed)
        _, trouble = write_all(self.index.fd, [entries.tobytes()])
        if trouble is None:
            self.index_end += entries.nbytes
        else:
            with contextlib.suppress(OSError):
                os.ftruncate(self.index.fd, self.index_end)
        return begins, problem or trouble

    def close(self) -> None:
        """Gives the segment up, and its lock."""
        self.file.close()
        self.index.close()


def sync_files(paths: Iterable[str]) -> None:
    """Has the system bring files, or directories, to the disk; those that are gone are left out."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError), Handle(path, os.O_RDONLY) as handle:
            os.fsync(handle.fd)


def write_all(fd: int, pieces: Sequence[Any]) -> tuple[int, OSError | None]:
    """Writes buffers at the end of a file, and returns the bytes that got there, and the error that ended it."""
    done, first = 0, 0
    pieces = [memoryview(piece).cast("B") for piece in pieces]
    while first < len(pieces):
        last, size = first, 0
        while last < min(len(pieces), first + _IOV_MAX) and size < _CALL_MOST:
            size += len(pieces[last])
            last += 1
        try:
            count = os.writev(fd, pieces[first:last])
        except OSError as error:
            return done, error
        if count == 0:
            return done, OSError(f"nothing of {size} bytes was written")
        done += count
        while first < last and count >= len(pieces[first]):
            count -= len(pieces[first])
            first += 1
        if count:
            pieces[first] = pieces[first][count:]
    return done, None


def write_whole(path: str, data: bytes) -> None:
    """Writes a small file so that others see all of it or none."""
    temporary = f"{path}.{secrets.token_hex(8)}.tmp"
    try:
        handle = Handle(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        _, problem = write_all(handle.fd, [data])
        if problem is not None:
            raise problem
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
