"""Shrinking a disk tier while others use it: what stays is written anew before the old files go."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Collection, Sequence
from typing import Any

from jaxkv.errors import CacheError
from jaxkv.memo.catalog import record_bytes
from jaxkv.memo.layout import hold, is_label, room_taken
from jaxkv.memo.record import HEADER_BYTES, NAMESPACE_BYTES, Header, segment_seed
from jaxkv.memo.segment import Writer, sync_files
from jaxkv.memo.upkeep import (
    BATCH_BYTES,
    Part,
    Progress,
    check_store,
    find_strays,
    kept_first,
    no_progress,
    read_parts,
    read_records,
)


@dataclasses.dataclass(frozen=True)
class Removed:
    before: int  # bytes of all files
    after: int
    labels: int  # of these, bytes that say what the store is, and what the namespaces are that stay
    items: int  # records that went and were whole
    copies: int  # records that another one with the same key had replaced
    damaged: int  # records and stretches that were not whole
    live: int  # segments left alone because a process is writing to them


def prune(
    directory: str,
    *,
    size: int | None = None,
    namespaces: Collection[bytes] = (),
    damaged: bool = False,
    progress: Progress = no_progress,
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
    check_store(directory)
    handle = hold(directory)
    if handle is None:
        raise CacheError(f"another process is removing files of {directory} just now; try again when it is done")
    with handle:
        return remove(directory, size=size, namespaces=namespaces, damaged=damaged, progress=progress)


def remove(
    directory: str,
    *,
    size: int | None = None,
    namespaces: Collection[bytes] = (),
    damaged: bool = False,
    progress: Progress = no_progress,
) -> Removed:
    """`prune` for who holds the directory's lock already."""
    before, gone = room_taken(directory), set(namespaces)
    if damaged:
        for path, _ in list(find_strays(directory)):
            _unlink(path)
    parts = kept_first(read_parts(directory))
    total = sum(part.size for part in parts if not part.live)
    room = None if size is None else size - (before - sum(part.nbytes for part in parts if not part.live))
    seen: set[bytes] = set()
    touched = set(gone)
    items = copies = broken = done = 0
    for part in parts:
        keys, stored = part.contents.keys, part.contents.stored.tolist()
        if part.live:
            seen.update(keys)
            continue
        intact = {row for row, record in read_records(part, range(len(keys))) if record} if damaged else None
        wanted = []
        for row in reversed(range(len(keys))):
            namespace = keys[row][:NAMESPACE_BYTES]
            if intact is not None and row not in intact:
                broken += 1
                continue
            if keys[row] in seen:
                copies += 1
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
        if len(wanted) < len(keys) or damages or not keys:
            broken += _rewrite(directory, part, wanted[::-1])
        done += part.size
        progress(done, total)
    left = {key[:NAMESPACE_BYTES] for key in seen}
    for namespace in touched - left:
        _unlink(os.path.join(directory, f"{namespace.hex()}.json"))
    labels = room_taken(directory, is_label)
    return Removed(before, room_taken(directory), labels, items, copies, broken, sum(part.live for part in parts))


def _rewrite(directory: str, part: Part, rows: Sequence[int]) -> int:
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
        for _, record in read_records(part, rows):
            if record is None:
                broken += 1
                continue
            batch.append(record)
            size += HEADER_BYTES + record[0].stored
            if size >= BATCH_BYTES:
                flush()
        if batch:
            flush()
        if writer is not None:
            sync_files([writer.path, writer.index_path, directory])
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


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
