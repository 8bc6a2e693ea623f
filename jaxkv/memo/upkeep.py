"""Looking at a disk tier and shrinking it, while others use it: what is behind `jaxkv memo`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxkv.errors import CacheError, NotSupportedError
from jaxkv.memo import segment as segments
from jaxkv.memo.catalog import FORMAT, LOCK, check_format, is_ours, record_bytes
from jaxkv.memo.record import (
    HEADER_BYTES,
    Contents,
    Header,
    digest,
    read_at,
    read_contents,
    segment_seed,
    unpack_header,
)
from jaxkv.memo.segment import Handle, Writer, is_live, lock

_NAMESPACE_BYTES = 16
_READ_BYTES = 1 << 24
Progress = Callable[[int, int], None]  # bytes done, bytes in all


def _no_progress(done: int, total: int) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Namespace:
    """The outputs of one function, as `describe` told, and what they take."""

    key: bytes
    about: dict[str, Any]  # empty if it was never described
    items: int
    nbytes: int  # of their records and index entries


@dataclasses.dataclass(frozen=True)
class Survey:
    """What lies in a directory."""

    namespaces: tuple[Namespace, ...]
    nbytes: int  # of all files
    segments: int
    writers: int  # segments that a process is writing to
    items: int
    copies: int  # bytes of records that another one with the same key has replaced
    damaged: int  # bytes of segments that are no records
    strays: int  # bytes of files that belong to nothing


@dataclasses.dataclass(frozen=True)
class Damage:
    path: str
    offset: int
    key: bytes | None  # None: no record can be made out there
    what: str


@dataclasses.dataclass(frozen=True)
class Verified:
    records: int  # that are whole
    nbytes: int  # read
    damages: tuple[Damage, ...]


@dataclasses.dataclass(frozen=True)
class Removed:
    before: int  # bytes of all files
    after: int
    items: int  # records that went and were whole
    damaged: int  # records and stretches that were not
    live: int  # segments left alone because a process is writing to them


@dataclasses.dataclass(frozen=True)
class _Part:
    """One segment as it lies there."""

    stem: str
    path: str
    seed: int
    live: bool
    size: int  # of the segment
    nbytes: int  # with its index
    used: int  # time of the last use in ns
    contents: Contents


def survey(directory: str) -> Survey:
    """Returns what lies in a store, without reading payloads.

    Raises:
      ValueError: if the directory is no store.
    """
    _check(directory)
    counts: dict[bytes, list[int]] = {}
    seen: set[bytes] = set()
    copies = damaged = writers = 0
    parts = list(_parts(directory))
    for part in reversed(parts):
        writers += part.live
        held = 0
        for key, stored in zip(part.contents.keys[::-1], part.contents.stored[::-1].tolist(), strict=True):
            held += HEADER_BYTES + stored
            if key in seen:
                copies += record_bytes(stored)
                continue
            seen.add(key)
            count = counts.setdefault(key[:_NAMESPACE_BYTES], [0, 0])
            count[0] += 1
            count[1] += record_bytes(stored)
        damaged += 0 if part.live else part.size - held
    described = _described(directory)
    namespaces = tuple(
        Namespace(key, described.get(key, {}), *counts.get(key, (0, 0))) for key in sorted({*counts, *described})
    )
    return Survey(
        namespaces=namespaces,
        nbytes=_nbytes(directory),
        segments=len(parts),
        writers=writers,
        items=len(seen),
        copies=copies,
        damaged=damaged,
        strays=sum(size for _, size in _strays(directory)),
    )


def verify(directory: str, progress: Progress = _no_progress) -> Verified:
    """Reads every record and returns which are damaged.

    Raises:
      ValueError: if the directory is no store.
    """
    _check(directory)
    parts = list(_parts(directory))
    total, done, whole = sum(part.size for part in parts), 0, 0
    damages: list[Damage] = []
    for part in parts:
        at = 0
        for row, record in _records(part, range(len(part.contents.keys))):
            offset, stored = int(part.contents.offsets[row]), int(part.contents.stored[row])
            if offset > at and not part.live:
                damages.append(Damage(part.path, at, None, f"{offset - at} bytes are no record"))
            at = offset + HEADER_BYTES + stored
            if record is None:
                damages.append(Damage(part.path, offset, part.contents.keys[row], "damaged record"))
            else:
                whole += 1
            progress(done + at, total)
        if at < part.size and not part.live:
            damages.append(Damage(part.path, at, None, f"{part.size - at} bytes are no record"))
        if part.contents.lost:
            damages.append(Damage(part.path, part.size, None, f"cut off: {part.contents.lost} records are missing"))
        done += part.size
        progress(done, total)
    return Verified(whole, total, tuple(damages))


def prune(
    directory: str,
    *,
    size: int | None = None,
    namespaces: Sequence[bytes] = (),
    damaged: bool = False,
    progress: Progress = _no_progress,
) -> Removed:
    """Shrinks a store that others may be using; segments that a process is writing to are left alone.

    What stays of a segment is written to a new one, and brought to the disk, before the old one is removed: killed in
    between, nothing is lost. Replaced copies of records go, too.

    Args:
      directory: of the store.
      size: at most so many bytes stay; the records least recently used go first.
      namespaces: all records of these go.
      damaged: every record is read, and what is damaged or belongs to nothing goes.
      progress: told (bytes done, bytes in all).

    Raises:
      ValueError: if the directory is no store.
      CacheError: if another process is removing files just now.
      OSError: if files can't be written or removed.
    """
    _check(directory)
    with Handle(os.path.join(directory, LOCK), os.O_RDWR | os.O_CREAT) as handle:
        if not lock(handle):
            raise CacheError(f"another process is removing files of {directory} just now; try again when it is done")
        return remove(directory, handle, size=size, namespaces=namespaces, damaged=damaged, progress=progress)


def remove(
    directory: str,
    held: Handle,
    *,
    size: int | None = None,
    namespaces: Sequence[bytes] = (),
    damaged: bool = False,
    progress: Progress = _no_progress,
) -> Removed:
    """`prune` for who holds the directory's lock already: `held`."""
    del held
    before, gone = _nbytes(directory), set(namespaces)
    if damaged:
        for path, _ in list(_strays(directory)):
            _unlink(path)
    parts = sorted(_parts(directory), key=lambda part: (part.live, part.used, part.stem))
    total = sum(part.size for part in parts if not part.live)
    room = None if size is None else size - (before - sum(part.nbytes for part in parts if not part.live))
    seen: set[bytes] = set()
    touched = set(gone)
    items = broken = done = 0
    for part in reversed(parts):  # what was used last is seen first, and kept
        keys, stored = part.contents.keys, part.contents.stored.tolist()
        if part.live:
            seen.update(keys)
            continue
        intact = {row for row, record in _records(part, range(len(keys))) if record} if damaged else None
        wanted = []
        for row in reversed(range(len(keys))):
            namespace = keys[row][:_NAMESPACE_BYTES]
            if intact is not None and row not in intact:
                broken += 1
                continue
            if keys[row] in seen:
                continue
            fits = room is None or record_bytes(stored[row]) <= room
            if fits and namespace not in gone:
                room = None if room is None else room - record_bytes(stored[row])
                seen.add(keys[row])
                wanted.append(row)
            else:
                items += 1
                touched.add(namespace)
        damages = part.contents.damaged + part.contents.lost
        broken += damages
        if len(wanted) < len(keys) or damages:
            broken += _rewrite(directory, part, wanted[::-1])
        done += part.size
        progress(done, total)
    left = {key[:_NAMESPACE_BYTES] for key in seen}
    for namespace in touched - left:
        _unlink(os.path.join(directory, f"{namespace.hex()}.json"))
    return Removed(before, _nbytes(directory), items, broken, sum(part.live for part in parts))


def _rewrite(directory: str, part: _Part, rows: Sequence[int]) -> int:
    """Puts some records of a segment into its place, and returns how many turned out to be damaged."""
    writer: Writer | None = None
    batch: list[tuple[Header, Any]] = []
    broken = size = 0

    def flush() -> None:
        nonlocal writer, batch, size
        if writer is None:
            writer = Writer(directory, segment_seed(f"{part.stem}.seg")[0])  # type: ignore[index]
            with contextlib.suppress(OSError, OverflowError):
                os.utime(writer.index_path, ns=(part.used, part.used))
        _, problem = writer.append(batch)
        if problem is not None:
            raise problem
        batch, size = [], 0

    try:
        for _, record in _records(part, rows):
            if record is None:
                broken += 1
                continue
            batch.append(record)
            size += HEADER_BYTES + record[0].stored
            if size >= _READ_BYTES:
                flush()
        if batch:
            flush()
        if writer is not None:
            writer.sync()
            os.utime(writer.index_path, ns=(part.used, part.used))
    except OSError:
        if writer is not None:
            _unlink(writer.index_path)
            _unlink(writer.path)
        raise
    finally:
        if writer is not None:
            writer.close()
    _unlink(f"{part.path[:-4]}.idx")
    _unlink(part.path)
    return broken


def _records(part: _Part, rows: Sequence[int]) -> Iterator[tuple[int, tuple[Header, Any] | None]]:
    """Yields each row with its header and payload, None if they are damaged."""
    keys, offsets, stored = part.contents.keys, part.contents.offsets.tolist(), part.contents.stored.tolist()
    handle = Handle(part.path, os.O_RDONLY)
    window, start = memoryview(b""), 0
    for row in rows:
        begin, end = offsets[row], offsets[row] + HEADER_BYTES + stored[row]
        if end > start + len(window) or begin < start:
            window, start = memoryview(read_at(handle.fd, max(end - begin, _READ_BYTES), begin)), begin
        data = window[begin - start : end - start]
        header, payload = unpack_header(data, part.seed), data[HEADER_BYTES:]
        whole = header is not None and (header.key, header.stored) == (keys[row], len(payload))
        if header is not None and whole and digest(payload) == header.check:
            yield row, (header, payload)
        else:
            yield row, None


def _check(directory: str) -> None:
    if segments.fcntl is None:
        raise NotSupportedError("the disk tier needs file locks, which this system lacks")
    if not os.path.isdir(directory):
        raise ValueError(f"{directory} is no directory; give one that a memo keeps its files in")
    names = os.listdir(directory)
    if FORMAT not in names and not any(map(segment_seed, names)):
        raise ValueError(f"{directory} is no store of a memo; give the directory that was named as disk=")
    check_format(directory)


def _parts(directory: str) -> Iterator[_Part]:
    """Yields the segments in order of their numbers."""
    for name in sorted(os.listdir(directory)):
        found = segment_seed(name)
        if found is None:
            continue
        path = os.path.join(directory, name)
        with contextlib.suppress(FileNotFoundError):  # removed just now
            live = is_live(path)
            contents = read_contents(path, found[1], search=not live)
            size, index, used = os.stat(path).st_size, 0, os.stat(path).st_mtime_ns
            with contextlib.suppress(FileNotFoundError):
                about = os.stat(f"{path[:-4]}.idx")
                index, used = about.st_size, about.st_mtime_ns
            yield _Part(name[:-4], path, found[1], live, size, size + index, used, contents)


def _described(directory: str) -> dict[bytes, dict[str, Any]]:
    described = {}
    for name in os.listdir(directory):
        if is_ours(name) and name.endswith(".json"):
            try:
                with open(os.path.join(directory, name), "rb") as file:
                    about = json.load(file)
            except (OSError, ValueError, RecursionError):
                about = {}
            described[bytes.fromhex(name[:-5])] = about if isinstance(about, dict) else {}
    return described


def _strays(directory: str) -> Iterator[tuple[str, int]]:
    """Yields files, and their bytes, that killed processes left and nobody will ever finish."""
    names = set(os.listdir(directory))
    for name in sorted(names):
        path = os.path.join(directory, name)
        unfinished = is_ours(name) and name.endswith(".tmp") and not is_live(path)
        alone = is_ours(name) and name.endswith(".idx") and f"{name[:-4]}.seg" not in names
        if unfinished or alone:
            with contextlib.suppress(FileNotFoundError):
                yield path, os.stat(path).st_size


def _nbytes(directory: str) -> int:
    total = 0
    with os.scandir(directory) as entries:
        for entry in entries:
            if is_ours(entry.name):
                with contextlib.suppress(FileNotFoundError):
                    total += entry.stat(follow_symlinks=False).st_size
    return total


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
