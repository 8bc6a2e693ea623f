"""The database of the disk tier: one file of SQLite with a table of records, and a folder for those that are large.

Its journal is one that rolls back (`truncate`). A write-ahead log is mapped into memory: whoever cuts it off kills its
readers by SIGBUS. Nothing rests on the database being whole: who reads a record holds it against its checksum, and a
database that turns out to be damaged gives way to the next one, with a higher number.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shlex
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any
from urllib.parse import quote

from jaxkv.memo.record import KEY_BYTES, LARGE, NAMESPACE_BYTES, path_of_file

try:
    import sqlite3
except ImportError as error:
    what, cure = "this Python was built without sqlite3, which a Memo needs", "with SQLite's headers (libsqlite3-dev)"
    raise ImportError(f"{what}; use a Python that has it, or build this one again {cure}") from error

VERSION = 1
PAGE_BYTES = 4096
LEAST_BYTES = 8 * PAGE_BYTES  # what an empty one takes
OF_NAMESPACE = f"key between :space and cast(:space || x'{'ff' * (KEY_BYTES - NAMESPACE_BYTES)}' as blob)"
_UNLABEL = f"delete from labels where namespace = :space and not exists (select 1 from items where {OF_NAMESPACE})"
UNCHANGED = "rowid = ? and cast(payload as blob) is cast(? as blob)"  # others remove rows, and use numbers again
KEYS = f"select rowid, key, case when stored >= {LARGE} then payload end from items"  # with the names of files
SELECT = "select rowid, key, raw, stored, hash, payload from items"  # as in a Record
INSERT = "insert or ignore into items values (?, ?, ?, ?, ?, ?)"
_CHECKED = """(instr({}about, cast('"checked": true' as blob)) > 0)"""
CHECKED = f"select count(*) from labels where namespace = ? and {_CHECKED.format('')}"
LABEL = "insert into labels values (?, ?) on conflict do update set about = excluded.about where "
LABEL += f"{_CHECKED.format('excluded.')} > {_CHECKED.format('labels.')}"
COUNT = "select count(*) from items"
BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
UNLINKED = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)  # if it isn't there
_ODD = (sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_ERROR)  # the last one: a table isn't there
DAMAGED = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_FORMAT, *_ODD)
_NAME = re.compile(r"memo-v(\d+)-(\d{6})\.db(|-journal|-files)")  # the version here, where no flipped bit changes it
_MARK = 0x6A6B766D  # "jkvm"
_PREPARE = """pragma mmap_size=0; pragma synchronous=off; pragma journal_mode=truncate; pragma secure_delete=off;
pragma cache_size=-1024; pragma trusted_schema=off"""
_CREATE = f"""; pragma page_size={PAGE_BYTES}; pragma auto_vacuum=full; begin immediate;
create table if not exists items (key blob unique, raw, stored, hash blob, used, payload blob);
create index if not exists used on items (used);
create index if not exists large on items (stored) where stored >= {LARGE};
create table if not exists labels (namespace blob primary key, about blob);
pragma application_id={_MARK}; commit"""
_ASKED_AT_ONCE, _REMOVED_AT_ONCE = 500, 200  # SQLite may be built for 999 values in a statement


def code_of(error: BaseException) -> int:
    """Returns what went wrong, as SQLite numbers it; 0 for errors of others."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def path_of(directory: str, number: int) -> str:
    return os.path.join(directory, f"memo-v{VERSION}-{number:06d}.db")


def numbers(directory: str) -> list[int]:
    """Returns the numbers of a directory's databases, the last one in use; raises ValueError if it holds others."""
    names = sorted(os.listdir(directory))
    ours = [match for match in map(_NAME.fullmatch, names) if match]
    others = [name for name in names if not name.startswith(".") and name != "lost+found"]
    if "FORMAT" in names or any(name.endswith(".seg") for name in names):
        what = "holds what an earlier jaxkv kept, which this one does not read; give another directory, or remove it: "
        raise ValueError(f"{directory} {what}rm -r {shlex.quote(directory)}")
    if version := next((match[1] for match in ours if int(match[1]) != VERSION), None):
        raise ValueError(f"{directory} is a store of version {version}; this jaxkv reads {VERSION}; give another one")
    if others and not ours:
        raise ValueError(f"{directory} holds other files, such as {others[0]!r}; give an empty directory")
    return sorted(int(match[2]) for match in ours if not match[3])


def lower(path: str) -> list[str]:
    """Returns what is left of databases with lower numbers, which nobody needs: databases before their files."""
    directory, name = os.path.split(path)
    return sorted(os.path.join(directory, one) for one in os.listdir(directory) if _NAME.fullmatch(one) and one < name)


def identity(path: str) -> tuple[int, int]:
    """Returns what tells a database from another one that took its name, which must be a file: a FIFO would wait."""
    about = os.stat(path)
    for name in (path, f"{path}-journal"):
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG((about if name == path else os.stat(name)).st_mode):
                raise ValueError(f"{name} is not a file, as a database must be; remove it, or give another directory")
    return about.st_dev, about.st_ino


def unlink(paths: Iterable[str]) -> None:
    """Removes files and folders, as far as that is possible."""
    for path in paths:
        try:
            os.unlink(path)
        except OSError:
            shutil.rmtree(path, ignore_errors=True)


class Database(sqlite3.Connection):
    """A database, opened; with `create` it is made if it isn't there.

    Raises ValueError if something else has its name, sqlite3.Error if it can't be opened.
    """

    def __init__(self, path: str, timeout: float, *, create: bool = False) -> None:
        if not sqlite3.threadsafety:
            raise ValueError("this Python's SQLite was built for one thread (SQLITE_THREADSAFE=0); use another Python")
        with contextlib.suppress(FileNotFoundError):
            identity(path)
        name = f"file:{quote(os.fsencode(path))}?mode=rw{'c' * create}"
        super().__init__(name, timeout=timeout, isolation_level=None, check_same_thread=False, uri=True)
        self.text_factory, self.folder = bytes, f"{path}-files"
        try:
            tables = {name for (name,) in self.execute("select name from sqlite_master")}
            if tables and self.tell("pragma application_id") != _MARK and not tables >= {b"items", b"labels"}:
                raise ValueError(f"{path} is a database of another program; give another directory")
            for statement in (_PREPARE if tables else _PREPARE + _CREATE).split(";"):
                self.execute(statement.strip())
        except BaseException:
            self.close()  # the error keeps it alive, and what it holds
            raise

    def __del__(self) -> None:
        with contextlib.suppress(sqlite3.Error):  # it may not even have been opened
            self.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, also where Ctrl-C comes in between. The files of rows that it removes go when it is done."""
        self._gone = list[str]()
        with self:
            self.execute("begin immediate")
            yield
            self.execute("commit")
        unlink(self._gone)

    def tell(self, what: str, values: Sequence[Any] = ()) -> int:
        """Returns the number that a statement asks for."""
        return int(self.execute(what, values).fetchone()[0] or 0)

    def room_taken(self) -> int:
        """Returns the bytes of all files, as they are after the transaction that is under way."""
        pages = self.tell("pragma page_count") - self.tell("pragma freelist_count")
        return pages * PAGE_BYTES + self.tell(f"select cast(total(stored) as int) from items where stored >= {LARGE}")

    def now(self) -> int:
        """Returns the time in ns, but after the last use: clocks are set back, and damaged rows say anything."""
        return max(time.time_ns(), self.tell(f"select cast(max(used) as int) from items where used < {1 << 62}") + 1)

    def with_keys(self, statement: str, keys: Sequence[bytes]) -> list[tuple[Any, ...]]:
        """Returns what a statement does with the rows that have these keys, in any order."""
        rows: list[tuple[Any, ...]] = []
        for first in range(0, len(keys), _ASKED_AT_ONCE):
            part = keys[first : first + _ASKED_AT_ONCE]
            rows += self.execute(f"{statement} where key in ({','.join('?' * len(part))})", part)
        return rows

    def remove(self, where: str, values: Any = ()) -> int:
        """Removes some rows, and labels without rows, in a transaction; returns how many, 0 when there are no more."""
        rows = self.execute(f"{KEYS} where {where} limit {_REMOVED_AT_ONCE}", values).fetchall()
        count = self.executemany("delete from items where rowid = ?", [row[:1] for row in rows]).rowcount
        spaces = {key[:NAMESPACE_BYTES] for _, key, _ in rows if isinstance(key, bytes)}
        self.executemany(_UNLABEL, [{"space": space} for space in spaces])
        self._gone += filter(None, (path_of_file(name, self.folder) for *_, name in rows))
        return count

    def remove_unchanged(self, rows: dict[int, Any]) -> list[int]:
        """Removes rows by number, as long as they have these payloads; returns the numbers of those it removed."""
        with self.transaction():
            return [number for number, payload in rows.items() if self.remove(UNCHANGED, (number, payload))]

    def remove_namespaces(self, namespaces: Iterable[bytes]) -> int:
        """Removes all rows of some namespaces; returns how many."""
        return sum(self.in_steps(self.remove, OF_NAMESPACE, {"space": one}) for one in namespaces)

    def make_room(self, size: int, order: str, used: int = 1 << 62) -> int:
        """Removes some rows in an order, of those used before, towards `size` bytes of all files; as `remove`."""
        over, gone = self.room_taken() - size, list[str]()
        what = f"rowid, ifnull(cast(stored as int), 0) from items where used < {used} order by {order}"
        for number, stored in self.execute(f"select {what} limit {_REMOVED_AT_ONCE}").fetchall():
            gone, over = gone + [str(number)] * (over > 0), over - stored
        return self.remove(f"rowid in ({','.join(gone)})")

    def flush(self, others: Iterable[str]) -> None:
        """Returns when it is on the disk, and other files or folders too."""
        for path in others:
            with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as stack:
                stack.callback(os.close, fd := os.open(path, os.O_RDONLY | os.O_CLOEXEC))
                os.fsync(fd)
        self.execute("pragma synchronous=full")  # opened and closed beside SQLite, its file would lose SQLite's locks
        try:
            with self.transaction():
                self.execute(f"pragma user_version={random.getrandbits(31)}")
        finally:
            self.execute("pragma synchronous=off")

    def in_steps(self, remove: Callable[..., int], *what: Any) -> int:
        """Removes some rows at a time until there are no more, so that others needn't wait; returns how many."""
        total, count = 0, 1
        while count:
            with self.transaction():
                total += (count := remove(*what))
        return total

    def rescue(self, old: str) -> None:
        """Takes over what can be read of a damaged database; what is wrong with a record shows when that is read."""
        with contextlib.suppress(OSError):
            os.rename(f"{old}-files", self.folder)
        name, wait = f"file:{quote(os.fsencode(old))}?mode=ro", self.tell("pragma busy_timeout") / 1000
        with contextlib.closing(sqlite3.connect(name, timeout=wait, uri=True)) as damaged:
            damaged.text_factory = bytes
            damaged.execute("pragma writable_schema=on")  # else nothing is read of a file that was cut off
            rows = _readable(damaged)
            while some := list(islice(rows, _REMOVED_AT_ONCE)):
                with self.transaction():
                    self.executemany(INSERT, some)


def _readable(damaged: sqlite3.Connection) -> Iterator[tuple[Any, ...]]:
    """Yields rows, and steps over what is damaged in ever larger steps."""
    select = "select key, raw, stored, hash, used, payload, rowid from items where rowid > ? order by rowid"
    number, step = 0, 1
    while number < 1 << 62:
        try:
            for *row, at in damaged.execute(select, (number,)):
                number, step = max(number, at), 1
                yield tuple(row)
            return
        except sqlite3.DatabaseError as error:
            if code_of(error) not in DAMAGED:
                raise
        number, step = number + step, 2 * step
