"""Looking at a disk tier while others use it: what is behind `jaxkv memo`, with `prune`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from jaxkv.memo.catalog import record_bytes
from jaxkv.memo.layout import FORMAT, check_format, is_ours, room_taken
from jaxkv.memo.record import (
    HEADER_BYTES,
    NAMESPACE_BYTES,
    Contents,
    Header,
    read_at,
    read_contents,
    segment_seed,
    unpack_record,
)
from jaxkv.memo.segment import Handle, is_live, need_locks

BATCH_BYTES = 1 << 24
Progress = Callable[[int, int], None]  # bytes done, bytes in all


def no_progress(done: int, total: int) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Namespace:
    """The outputs of one function, as `describe` told, and what they take."""

    key: bytes
    about: dict[str, Any]  # empty if it was never described
    items: int
    nbytes: int  # of their records and index entries
    used: int  # when its files were last written to, or used where the policy asks for it; in ns


@dataclasses.dataclass(frozen=True)
class Survey:
    """What lies in a directory."""

    namespaces: tuple[Namespace, ...]  # last used first
    nbytes: int  # of all files
    segments: int
    writers: int  # segments that a process is writing to
    items: int
    copies: int  # bytes of records that another one with the same key has replaced, where nobody is writing
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
class Part:
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
    check_store(directory)
    counts: dict[bytes, list[int]] = {}
    seen: set[bytes] = set()
    copies = damaged = writers = 0
    parts = list(read_parts(directory))
    for part in kept_first(parts):
        writers += part.live
        held = 0
        for key, stored in zip(part.contents.keys[::-1], part.contents.stored[::-1].tolist(), strict=True):
            held += HEADER_BYTES + stored
            if key in seen:
                copies += 0 if part.live else record_bytes(stored)
                continue
            seen.add(key)
            count = counts.setdefault(key[:NAMESPACE_BYTES], [0, 0, 0])
            count[0] += 1
            count[1] += record_bytes(stored)
            count[2] = max(count[2], part.used)
        damaged += 0 if part.live else part.size - held
    described = _described(directory)
    for key, (_, since) in described.items():
        counts.setdefault(key, [0, 0, since])
    namespaces = [Namespace(key, described.get(key, ({}, 0))[0], *count) for key, count in counts.items()]
    return Survey(
        # Of those in one file, what was written last comes first: so they were found above, and sorting is stable.
        namespaces=tuple(sorted(namespaces, key=lambda space: -space.used)),
        nbytes=room_taken(directory),
        segments=len(parts),
        writers=writers,
        items=len(seen),
        copies=copies,
        damaged=damaged,
        strays=sum(size for _, size in find_strays(directory)),
    )


def verify(directory: str, progress: Progress = no_progress) -> Verified:
    """Reads every record and returns which are damaged.

    Raises:
      ValueError: if the directory is no store.
    """
    check_store(directory)
    parts = list(read_parts(directory))
    total, done, whole = sum(part.size for part in parts), 0, 0
    damages: list[Damage] = []
    for part in parts:
        at = 0
        for row, record in read_records(part, range(len(part.contents.keys))):
            offset, stored = int(part.contents.offsets[row]), int(part.contents.stored[row])
            if offset > at and not part.live:
                damages.append(Damage(part.path, at, None, f"{offset - at} bytes are not a record"))
            at = offset + HEADER_BYTES + stored
            if record is None:
                damages.append(Damage(part.path, offset, part.contents.keys[row], "damaged record"))
            else:
                whole += 1
            progress(done + at, total)
        if at < part.size and not part.live:
            damages.append(Damage(part.path, at, None, f"{part.size - at} bytes are not a record"))
        if part.contents.lost:
            damages.append(Damage(part.path, part.size, None, f"cut off: {part.contents.lost} records are missing"))
        done += part.size
        progress(done, total)
    return Verified(whole, total, tuple(damages))


def read_records(part: Part, rows: Sequence[int]) -> Iterator[tuple[int, tuple[Header, Any] | None]]:
    """Yields each row with its header and payload, None if they are damaged."""
    keys, offsets, stored = part.contents.keys, part.contents.offsets.tolist(), part.contents.stored.tolist()
    handle = Handle(part.path, os.O_RDONLY)
    window, start = memoryview(b""), 0
    for row in rows:
        begin, end = offsets[row], offsets[row] + HEADER_BYTES + stored[row]
        if end > start + len(window) or begin < start:
            window, start = memoryview(read_at(handle.fd, max(end - begin, BATCH_BYTES), begin)), begin
        data = window[begin - start : end - start]
        yield row, unpack_record(data, part.seed, keys[row])


def check_store(directory: str) -> None:
    need_locks()
    cure = "give the directory that was named as disk="
    if not directory:
        raise ValueError(f"the path of the store is empty; {cure}")
    if not os.path.exists(directory):
        raise ValueError(f"{directory} does not exist; {cure}")
    if not os.path.isdir(directory):
        raise ValueError(f"{directory} is a file, no directory; {cure}")
    names = sorted(os.listdir(directory))
    if FORMAT not in names and not any(map(segment_seed, names)):
        holds = f"holds other files, such as {names[0]!r}" if names else "is empty"
        within = [path for name in names if os.path.exists(os.path.join(path := os.path.join(directory, name), FORMAT))]
        cure += f": is it {within[0]}?" if within else ""
        raise ValueError(f"{directory} is not a store of a memo, it {holds}; {cure}")
    check_format(directory)


def read_parts(directory: str) -> Iterator[Part]:
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
            yield Part(name[:-4], path, found[1], live, size, size + index, used, contents)


def kept_first(parts: Iterable[Part]) -> list[Part]:
    """Returns segments so that of two records with one key the first one stays: being written to, else last used."""
    return sorted(parts, key=lambda part: (part.live, part.used, part.stem), reverse=True)


def _described(directory: str) -> dict[bytes, tuple[dict[str, Any], int]]:
    """Returns what each namespace is said to be, and when that was written, in ns."""
    described = {}
    for name in sorted(os.listdir(directory)):
        if is_ours(name) and name.endswith(".json"):
            since = 0
            try:
                with open(os.path.join(directory, name), "rb") as file:
                    since = os.fstat(file.fileno()).st_mtime_ns
                    about = json.load(file)
            except (OSError, ValueError, RecursionError):
                about = {}
            described[bytes.fromhex(name[:-5])] = about if isinstance(about, dict) else {}, since
    return described


def find_strays(directory: str) -> Iterator[tuple[str, int]]:
    """Yields files, and their bytes, that killed processes left and nobody will ever finish."""
    names = set(os.listdir(directory))
    for name in sorted(names):
        path = os.path.join(directory, name)
        unfinished = is_ours(name) and name.endswith(".tmp") and not is_live(path)
        alone = is_ours(name) and name.endswith(".idx") and f"{name[:-4]}.seg" not in names
        if unfinished or alone:
            with contextlib.suppress(FileNotFoundError):
                yield path, os.stat(path).st_size
