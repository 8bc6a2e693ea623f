"""The memo's disk tier: payloads under 32-byte keys in append-only files that several processes share."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from jaxkv.memo.catalog import Catalog, Counts, Segment
from jaxkv.memo.forking import Lock
from jaxkv.memo.layout import check_format, room_taken, write_format
from jaxkv.memo.memory import POLICIES
from jaxkv.memo.payload import load_zstandard, pack_payload
from jaxkv.memo.prune import remove
from jaxkv.memo.reading import Place, read_places
from jaxkv.memo.record import HEADER_BYTES, KEY_BYTES, Header, checksum
from jaxkv.memo.room import Room
from jaxkv.memo.segment import Handle, Writer, need_locks, sync_files, write_whole
from jaxkv.memo.trouble import Troubles

_SEGMENT_LEAST, _SEGMENT_MOST = 1 << 16, 1 << 28
_SEGMENT_SHARE = 32  # a segment is at most this part of the budget: so much is evicted at once


@dataclasses.dataclass(frozen=True)
class DiskStats:
    """What a disk tier holds, and what became of the calls of this process."""

    items: int  # records that this process knows
    nbytes: int  # of all files, as the file system says
    hits: int
    misses: int
    written: int
    evicted: int  # records removed to make room
    corrupt: int  # records, or stretches of a file, that were found damaged
    lost: int  # records that were known and are gone: cut off, unreadable, or removed by somebody else
    errors: int  # calls to the operating system that failed


class Disk:
    """Payloads of fixed meaning under 32-byte keys, kept in a directory that several processes may share.

    A reader gets what was written under the key or None; never anything else and never an exception, whatever happened
    to the files: each record is checked against its key and a checksum each time it is read. What can't be written is
    not kept. `stats()` counts what was lost.

    Files are read by `pread`, not mapped: a mapped file that somebody cuts off kills the process by SIGBUS. Each
    process appends to a segment of its own, locked while it lives. What another process writes is found at the next
    miss. Data reaches the disk when the system sees fit, or by `flush`; a torn record is a miss.

    Args:
      directory: where the files go; made if it isn't there. It can't hold anything else.
      budget: most bytes of all files together; None sets no limit. Processes that write at the same moment may each
        exceed it by the batch they are writing.
      policy: what happens when the budget is reached. "keep" admits nothing more; "lru", "mru" and "fifo" remove whole
        segments that nobody writes to: least recently used, most recently used, oldest first.
      compress: "zstd" compresses payloads that become smaller by it.
      segment_bytes: size from which a segment is followed by the next; None: a small part of the budget.

    Raises:
      ValueError: for wrong arguments, and if the directory holds something else.
      NotSupportedError: where files can't be locked (Windows).

    >>> import tempfile
    >>> disk = Disk(tempfile.mkdtemp(), budget=1 << 20)
    >>> disk.write([b"a" * 32, b"b" * 32], [b"first", b"second"])
    2
    >>> found, missing = disk.read([b"a" * 32, b"c" * 32], 5)
    >>> bytes(found), missing
    (b'first', None)
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        budget: int | None = None,
        policy: str = "keep",
        compress: str | None = None,
        segment_bytes: int | None = None,
    ) -> None:
        need_locks()
        if policy not in POLICIES:
            raise ValueError(f"policy is {policy!r}, must be one of {', '.join(POLICIES)}")
        if compress not in (None, "zstd"):
            raise ValueError(f"compress is {compress!r}, must be None or 'zstd'")
        for name, size in (("budget", budget), ("segment_bytes", segment_bytes)):
            if size is not None and size < 1:
                raise ValueError(f"{name} is {size}; give bytes, 1 or more, or None")
        checksum(b"")
        if not os.fspath(directory):
            raise ValueError("disk is an empty path; give a directory")
        self.directory = os.path.abspath(os.path.expanduser(os.fspath(directory)))
        self.budget, self.policy, self.compress = budget, policy, compress
        share = _SEGMENT_MOST if budget is None else budget // _SEGMENT_SHARE
        self.segment_bytes = segment_bytes or min(max(share, _SEGMENT_LEAST), _SEGMENT_MOST)
        if compress is not None:
            load_zstandard()
        self._lock = Lock(self._forked)
        self._counts = Counts()
        self._catalog = Catalog(self.directory, self._counts)
        self._writer: Writer | None = None
        self._troubles = Troubles(self.directory, self._counts)
        self._unsynced: set[str] = set()  # segments
        self._room = Room(budget, policy, self._catalog, self._counts, self._troubles)
        self._prepare()
        self._catalog.refresh(force=True)

    def read(self, keys: Sequence[bytes], nbytes: int) -> list[Any]:
        """Returns the payload of each key, bytes or memoryview of `nbytes` bytes; None for those that aren't there."""
        values: list[Any] = [None] * len(keys)
        missing = self._fetch(keys, range(len(keys)), nbytes, values)
        if missing:
            with self._lock:
                self._catalog.refresh()
            self._fetch(keys, missing, nbytes, values)
        with self._lock:
            misses = sum(value is None for value in values)
            self._counts.misses += misses
            self._counts.hits += len(keys) - misses
        return values

    def _fetch(self, keys: Sequence[bytes], wanted: Iterable[int], nbytes: int, values: list[Any]) -> list[int]:
        """Puts what is known into `values`, and returns which of the wanted aren't, or not where they were."""
        places: list[Place] = []
        missing = []
        files: dict[str, Handle | None] = {}
        with self._lock:
            for i in wanted:
                found = self._catalog.find(keys[i])
                if found is not None and found[0].stem not in files:
                    files[found[0].stem] = self._open(found[0])
                if found is None or files[found[0].stem] is None:
                    missing.append(i)
                else:
                    places.append((*found, i))
        opened = {stem: handle for stem, handle in files.items() if handle is not None}
        outcome = read_places(places, opened, keys, nbytes)
        for i, value in outcome.values.items():
            values[i] = value
        if outcome.gone or outcome.damaged or (outcome.used and self._room.by_use):
            with self._lock:
                for segment, offset, _, i in outcome.gone:
                    self._counts.lost += self._catalog.forget(keys[i], segment, offset)
                for segment, offset, _, i in outcome.damaged:
                    self._counts.corrupt += self._catalog.forget(keys[i], segment, offset)
                if outcome.problem is not None:
                    self._troubles.failed("reading", outcome.problem)
                if outcome.gone or outcome.damaged:
                    self._troubles.say("damage", "records were lost or damaged; they count as misses")
                self._room.touch(outcome.used)
        return missing

    def _open(self, segment: Segment) -> Handle | None:
        try:
            return self._catalog.file(segment)
        except FileNotFoundError:  # evicted, or put together with others: the next look says where its records are
            self._catalog.look_again()
        except OSError as error:
            self._troubles.failed("reading", error)
        return None

    def write(self, keys: Sequence[bytes], payloads: Sequence[Any]) -> int:
        """Keeps payloads (bytes-like, contiguous) under their keys, and returns how many are on disk now.

        A key that is there already is not written again: a key has one meaning.

        Raises:
          ValueError: for keys that aren't 32 bytes, or another number of keys than of payloads.
        """
        if len(keys) != len(payloads) or any(len(key) != KEY_BYTES for key in keys):
            raise ValueError(f"give one payload for each key, and keys of {KEY_BYTES} bytes")
        records = {}
        for key, payload in zip(keys, payloads, strict=True):
            if key not in records and key not in self._catalog.places:
                records[bytes(key)] = pack_payload(bytes(key), payload, self.compress is not None)
        with self._lock:
            fresh = [record for key, record in records.items() if key not in self._catalog.places]
            if fresh and self._troubles.may_write():
                self._append(fresh)
            return sum(key in self._catalog.places for key in keys)

    def _append(self, records: list[tuple[Header, Any]]) -> None:
        if self.budget is not None:
            self._catalog.refresh()
        while records:
            writer = self._ready_writer()
            if writer is None:
                return
            count, size = 0, writer.end
            while count < len(records) and (count == 0 or size < self.segment_bytes):
                size += HEADER_BYTES + records[count][0].stored
                count += 1
            admitted = self._room.admit(records[:count], writer.stem, self._seal)
            records = records[count:]
            if not admitted:
                continue
            writer = self._ready_writer()  # making room may have taken it
            if writer is None:
                return
            segment = self._catalog.segments[writer.stem]
            offsets, problem = writer.append(admitted)
            headers = [header for header, _ in admitted[: len(offsets)]]
            self._catalog.add(segment, [h.key for h in headers], offsets, [h.stored for h in headers])
            self._catalog.resize(segment, writer.end, writer.index_end)
            self._counts.written += len(offsets)
            self._unsynced.add(writer.stem)
            self._room.touch({writer.stem})
            if problem is not None:
                self._troubles.failed("writing", problem)
                if len(segment.keys):
                    self._seal()
                return
            self._troubles.wrote()

    def _ready_writer(self) -> Writer | None:
        """Returns the segment to append to: a new one if the old one is full, or no longer what it was."""
        if self._writer is not None:
            if self._writer.stem not in self._catalog.segments or not self._writer.is_sound():
                self._seal()
                self._catalog.refresh(force=True)
            elif self._writer.end >= self.segment_bytes:
                self._seal()
        if self._writer is None:
            try:
                if not self._prepare():
                    return None
                self._writer = Writer(self.directory, self._catalog.next_sequence())
            except (OSError, ValueError) as error:  # ValueError: something else has taken the directory's place
                self._troubles.failed("writing", error)
                return None
            segment = self._catalog.new(self._writer.stem)
            segment.live = True
        return self._writer

    def _seal(self) -> None:
        """Gives the segment up: it stays, and is open to eviction."""
        if self._writer is not None:
            stem, end = self._writer.stem, self._writer.end
            self._writer.close()
            self._writer = None
            if stem in self._catalog.segments:
                self._catalog.segments[stem].live = False
                if end == 0:
                    self._room.remove(stem)

    def describe(self, namespace: bytes, about: Callable[[], dict[str, Any]]) -> None:
        """Writes down what a namespace is, for `jaxkv memo ls`: as JSON, unless it stands there."""
        path = self._catalog.path(f"{namespace.hex()}.json")
        if os.path.exists(path):
            return
        text = json.dumps(about(), indent=1).encode()
        try:
            with self._lock:
                if self._room.has(len(text)):
                    write_whole(path, text)
                    self._catalog.refresh(force=True)
        except OSError as error:
            self._troubles.failed("writing", error)

    def stats(self) -> DiskStats:
        """Returns what the tier holds, and what became of the calls so far."""
        with self._lock:
            self._catalog.refresh()
            try:
                nbytes = room_taken(self.directory)
            except OSError:
                nbytes = 0
            return DiskStats(items=len(self._catalog.places), nbytes=nbytes, **dataclasses.asdict(self._counts))

    def flush(self) -> None:
        """Has the system bring to the disk what this process wrote."""
        with self._lock:
            written = [self._catalog.path(f"{stem}.{ending}") for stem in self._unsynced for ending in ("seg", "idx")]
            try:
                sync_files([*written, self.directory] if written else [])
                self._unsynced.clear()
            except OSError as error:
                self._troubles.failed("flushing", error)

    def clear(self, namespaces: Collection[bytes] | None = None) -> None:
        """Removes all records, or those of some namespaces; segments that another process is writing to stay."""
        with self._lock:
            self._seal()
            handle = self._room.hold()
            if handle is None:
                self._troubles.say("clearing", "another process is removing files; nothing was cleared")
                return
            try:
                with handle:
                    if namespaces is None:
                        remove(self.directory, size=0)
                    else:
                        remove(self.directory, namespaces=namespaces)
            except (OSError, ValueError) as error:
                self._troubles.failed("clearing", error)
            before = self._counts.lost
            self._catalog.refresh(force=True)
            self._counts.lost = before

    def close(self) -> None:
        """Lets go of all files. The tier may be used again, with a new segment."""
        with self._lock:
            self._seal()
            self._catalog.close_files()

    def __reduce__(self) -> Any:
        settings = {
            "budget": self.budget,
            "policy": self.policy,
            "compress": self.compress,
            "segment_bytes": self.segment_bytes,
        }
        return _reopened, (self.directory, settings)

    def _prepare(self) -> bool:
        """Makes the directory and says what it is; whether it can be written to."""
        try:
            os.makedirs(self.directory, exist_ok=True)
            if not check_format(self.directory):
                write_format(self.directory)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(f"{self.directory} is not a directory; give one, or a name that is free") from error
        except OSError as error:
            self._troubles.failed("writing", error)
            return False
        return True

    def _forked(self) -> None:
        """In the child: the segment belongs to the parent, which goes on writing to it."""
        if self._writer is not None:
            self._catalog.disown(self._writer.stem)
            self._writer.close()  # the parent's copies stay open, and so does its lock
            self._writer = None


def _reopened(directory: str, settings: dict[str, Any]) -> Disk:
    return Disk(directory, **settings)
