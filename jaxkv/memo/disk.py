"""The memo's disk tier: payloads under 32-byte keys in a database that several processes share."""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
import os
import secrets
from collections.abc import Collection, Sequence
from typing import Any

from jaxkv.extras import need
from jaxkv.memo import database, record
from jaxkv.memo.budget import LEAST, allowed
from jaxkv.memo.current import Current
from jaxkv.memo.memory import BY_USE, POLICIES
from jaxkv.memo.record import KEY_BYTES, LARGE, NAMESPACE_BYTES, DamagedError, Record
from jaxkv.sizes import format_bytes

_BESIDE = 2 * database.PAGE_BYTES  # what a record takes at most beside its payload: pages that split
_SURE = 16  # processes that may write what was sure to fit when each measured last, before the budget is exceeded
_ORDER = {"lru": "used", "mru": "used desc", "fifo": "rowid"}


@dataclasses.dataclass(frozen=True)
class DiskStats:
    """What a disk tier holds, and what became of the calls of this process."""

    items: int = 0  # records
    nbytes: int = 0  # of all files
    budget: int | None = None  # most bytes of them
    hits: int = 0
    misses: int = 0
    written: int = 0
    evicted: int = 0  # records removed to make room
    corrupt: int = 0  # records that were found damaged
    lost: int = 0  # records whose file was gone
    replaced: int = 0  # databases that were damaged, and gave way to a new one
    busy: int = 0  # calls that gave up because another process held the database
    errors: int = 0  # calls that the operating system or the database failed


class Disk:
    """Payloads of fixed meaning under 32-byte keys, kept in a directory that several processes may share.

    A reader gets what was written under the key or None; never anything else and never an exception, whatever happened
    to the files: each record is held against its key and a checksum each time it is read. What can't be written is not
    kept. `stats()` counts what was lost. What one process has written, all find.

    Args:
      directory: where the files go; made if it isn't there. It can't hold anything else.
      budget: most bytes of all files together, 64 KiB or more; or a share such as "50%" of what is free on the disk
        now, and of what lies in the directory; None sets no limit. Processes that write at the same moment may each
        exceed it by the batch they are writing.
      policy: what happens then. "keep" admits nothing more; the others remove records: "lru" the least recently used,
        "mru" the most recently used, "fifo" the oldest.
      compress: "zstd" compresses payloads that become smaller by it.

    Raises:
      ValueError: for wrong arguments, and if the directory holds something else.
    """

    def __init__(self, directory: Any, *, budget: Any = None, policy: str = "keep", compress: Any = None) -> None:
        if policy not in POLICIES:
            raise ValueError(f"policy is {policy!r}, must be one of {', '.join(POLICIES)}")
        if compress not in (None, "zstd"):
            raise ValueError(f"compress is {compress!r}, must be None or 'zstd'")
        if not isinstance(directory, str | os.PathLike) or "\0" in os.fsdecode(directory) or not os.fspath(directory):
            raise ValueError(f"disk is {directory!r}; give the path of a directory")
        self.directory = os.path.abspath(os.path.expanduser(os.fsdecode(directory)))
        self.policy, self.compress = policy, compress
        need("xxhash", "the disk tier", "memo")
        if compress is not None:
            need(*record.ZSTD)
        self._labels: dict[bytes, bytes] = {}
        self._unsynced: set[str] = set()
        self._sure = 0  # bytes that fit in any case: to measure what is taken, all large records are looked at
        self._current = Current(self.directory)
        self.budget = allowed(budget, self.directory, self.nbytes())

    def read(self, keys: Sequence[bytes], nbytes: int) -> list[Any]:
        """Returns the payload of each key, bytes-like of `nbytes` bytes; None for those that aren't there."""
        current = self._current
        folder, rows = current.do("reading", lambda db: (db.folder, db.with_keys(database.SELECT, keys)), ("", []))
        values: dict[bytes, Any] = {}
        wrong: dict[int, str] = {}
        for number, *fields in rows:
            try:
                values[fields[0]] = record.unpack(Record(*fields), folder)
            except (DamagedError, FileNotFoundError, IsADirectoryError) as error:
                wrong[number] = "corrupt" if isinstance(error, DamagedError) else "lost"
            except (OSError, MemoryError, ImportError) as error:
                current.failed("reading", error)
        if wrong:
            rows = {number: payload for number, *_, payload in rows if number in wrong}
            there = current.do("removing", operator.methodcaller("remove_unchanged", rows), ())
            wrong = {n: what for n, what in wrong.items() if n in there or what == "corrupt"}  # others may have evicted
        if wrong:
            current.say("damage", "records were damaged or lost; they count as misses")
        found = [value if (value := values.get(key)) is not None and len(value) == nbytes else None for key in keys]
        hits = sum(value is not None for value in found)
        if hits and self.policy in BY_USE:
            current.do("writing", lambda db: db.with_keys(f"update items set used = {db.now()}", list(values)), [])
        with current.lock:
            current.counts.update(wrong.values(), hits=hits, misses=len(keys) - hits)
        return found

    def write(self, keys: Sequence[bytes], payloads: Sequence[Any]) -> int:
        """Keeps payloads (bytes-like, contiguous) under their keys, unless they are there: a key has one meaning.

        Returns how many are known to be on disk now. Raises ValueError for keys that aren't 32 bytes.
        """
        if len(keys) != len(payloads) or any(len(key) != KEY_BYTES for key in keys):
            raise ValueError(f"give one payload for each key, and keys of {KEY_BYTES} bytes")
        given = dict(zip(map(bytes, keys), payloads, strict=True))
        records = [record.pack(key, payload, self.compress is not None) for key, payload in given.items()]
        self._sure -= sum(one.stored + _BESIDE for one in records)
        budget = self.budget if self._sure < 0 else None
        records = self._current.do("writing", lambda db: self._admitted(db, records, budget), [], create=True)
        there = self._keep(records, budget) if records else ()
        return sum(key in there for key in keys)

    def _admitted(self, db: database.Database, records: list[Record], budget: int | None) -> list[Record]:
        """Returns the records that surely find room, all if there is no budget: others aren't even written to files."""
        if budget is None:
            return records
        left, fit = budget - (db.room_taken() if self.policy == "keep" else database.LEAST_BYTES), []
        for one in records:
            if (size := one.stored + _BESIDE) <= left:
                fit.append(one)
                left -= size
            elif self.policy == "keep" or size > budget - database.LEAST_BYTES:
                enough = f"{max(budget, one.stored) + LEAST:,} bytes or more"
                what = f"the budget of {format_bytes(budget)} has no room for a record of {format_bytes(one.stored)}"
                cure = f'give a disk_budget of {enough}, or disk_policy="lru", or make room by jaxkv memo prune'
                self._current.say("budget", f"{what}; it is not kept: {cure}")
        return fit

    def _keep(self, records: list[Record], budget: int | None) -> Collection[bytes]:
        """Writes records, and returns the keys of those that are there; the budget is None if they surely fit."""
        rows, paths = dict[bytes, bytes | None](), set[str]()
        try:
            if any(one.stored >= LARGE for one in records):
                os.makedirs(self._current.folder, exist_ok=True)
            for i, one in enumerate(records):
                if one.stored >= LARGE:
                    paths.add(path := os.path.join(self._current.folder, secrets.token_hex(16)))
                    records[i] = record.put_aside(one, path)
            rows = dict(self._current.do("writing", lambda db: self._insert(db, records, budget), ()))
        except OSError as error:
            self._current.failed("writing", error)
        finally:
            named = paths & {record.path_of_file(name, self._current.folder) for name in rows.values()}
            database.unlink(paths - named)
            self._unsynced |= named
        return rows

    def _insert(self, db: database.Database, records: list[Record], budget: int | None) -> list[Any]:
        """Returns the keys of those that are there, and the names of their files."""
        evicted, left, count, folder = 0, 0, 1, db.folder
        with db.transaction():
            # Prune or clear may have taken a file, or this is the next database already.
            whole = [one for one in records if one.stored < LARGE or os.path.exists(f"{folder}/{one.payload.decode()}")]
            spaces = {one.key[:NAMESPACE_BYTES] for one in whole} & set(self._labels)
            db.executemany(database.LABEL, [(space, self._labels[space]) for space in spaces])
            used, order = db.now(), _ORDER.get(self.policy)
            written = db.executemany(database.INSERT, [(*one[:4], used, one.payload) for one in whole]).rowcount
            while budget is not None and (left := budget - db.room_taken()) < 0 and order and count:
                evicted += (count := db.make_room(budget, order, used))
            rows = [row[1:] for row in db.with_keys(database.KEYS, [one.key for one in records])]
        if budget is not None:
            self._sure = left // _SURE
        self._current.counts.update(written=written, evicted=evicted)
        return rows

    def describe(self, namespace: bytes, about: dict[str, Any], *, at_once: bool = False) -> None:
        """Says what a namespace is, with its next record or `at_once`; the first word stays until it is `checked`."""
        label = self._labels[namespace] = json.dumps(about).encode()
        if at_once:
            self._current.do("writing", lambda db: db.execute(database.LABEL, (namespace, label)), None)

    def is_checked(self, namespace: bytes) -> bool:
        """Returns whether anybody has described the namespace as `checked`."""
        return self._current.do("reading", lambda db: db.tell(database.CHECKED, (namespace,)) > 0, False)

    def stats(self) -> DiskStats:
        """Returns what the tier holds, and what became of the calls so far."""
        items = self._current.do("reading", lambda db: db.tell(database.COUNT), 0)
        return DiskStats(items, self.nbytes(), self.budget, **self._current.counts)

    def nbytes(self) -> int:
        """Returns the bytes of all files."""
        return self._current.do("reading", lambda db: db.room_taken(), 0)

    def flush(self) -> None:
        """Has the system bring to the disk what this process wrote."""
        new, self._unsynced = self._unsynced, set()
        self._current.do("flushing", operator.methodcaller("flush", [*new, self._current.folder, self.directory]), None)

    def clear(self, namespaces: Collection[bytes] | None = None) -> None:
        """Removes all records, or those of some namespaces."""
        if namespaces is None:
            self._current.do("clearing", lambda db: self._current.exchange(rescue=False), None)
        else:
            self._current.do("clearing", operator.methodcaller("remove_namespaces", namespaces), 0)

    def close(self) -> None:
        """Lets go of all files. The tier may be used again."""
        with self._current.lock:
            self._current.close()

    def __reduce__(self) -> Any:
        make = functools.partial(Disk, budget=self.budget, policy=self.policy, compress=self.compress)
        return make, (self.directory,)
