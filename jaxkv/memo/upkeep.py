"""Looking at a disk tier, and shrinking it, while others use it: what is behind `jaxkv memo`."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

from jaxkv.errors import CacheError
from jaxkv.memo import database
from jaxkv.memo.database import Database
from jaxkv.memo.record import LARGE, NAMESPACE_BYTES, DamagedError, Record, unpack

_WAIT = 10.0  # seconds
_READ_AT_ONCE = 64  # rows: meanwhile nobody can write
Progress = Callable[[int, int], None]  # bytes done, bytes in all


class Namespace(NamedTuple):
    """The outputs of one function, as `describe` told, and what they take."""

    key: bytes
    items: int
    nbytes: int  # of their payloads, as they lie there
    used: int  # when one was last written, or read where the policy asks for it; in ns
    about: bytes | None  # JSON, if nobody has changed it


class Survey(NamedTuple):
    """What lies in a directory."""

    namespaces: list[Namespace]  # last used first
    nbytes: int  # of all files
    strays: int  # bytes of files that belong to nothing


def survey(directory: str) -> Survey:
    """Returns what lies in a store, without reading payloads.

    Raises:
      ValueError: if the directory is not a store.
      CacheError: if its database is damaged, or held by another process.
    """
    with _opened(directory) as db:
        groups = f"select substr(key, 1, {NAMESPACE_BYTES}) as name, count(*), cast(total(stored) as int), "
        groups += "max(ifnull(cast(used as int), 0)) from items where typeof(key) = 'blob' group by name"
        groups = f"({groups}) left join labels on name = namespace"
        spaces = [Namespace._make([*row[:4], row[5]]) for row in db.execute(f"select * from {groups} order by 4 desc")]
        strays = sum(size for _, size in _strays(db))
        return Survey(spaces, db.room_taken() + strays, strays)


def verify(directory: str, progress: Progress) -> tuple[int, list[str]]:
    """Reads every record, and returns how many are whole, and what is damaged. Raises as `survey`."""
    with _opened(directory) as db:
        rows = [(number, what) for number, what, _ in _read_all(db, progress)]
        said = [f"record {number:,}: {what}" for number, what in rows if what]
        checked = [text.decode() for (text,) in db.execute("pragma integrity_check(20)") if text != b"ok"]
        return len(rows) - len(said), said + checked


def prune(
    directory: str, size: int | None, namespaces: Collection[bytes], damaged: bool, progress: Progress
) -> tuple[int, int]:
    """Shrinks a store that others may be using; ended at any time, what is left is whole. Raises as `survey`.

    Returns how many records went that were whole, and how many that were damaged.

    Args:
      size: at most so many bytes stay, None for any; the records least recently used go first.
      namespaces: all records of these go.
      damaged: whether every record is read, and what is damaged or belongs to nothing goes.
    """
    items = broken = 0
    with contextlib.suppress(_ClearedError), _opened(directory) as db:
        if damaged:
            for number, what, payload in _read_all(db, progress):
                broken += len(db.remove_unchanged({number: payload})) if what else 0
            with db.transaction():  # in which whoever wrote a file looks whether it is still there
                database.unlink([stray for stray, _ in _strays(db)])
        items += db.remove_namespaces(namespaces)
        items += 0 if size is None else db.in_steps(db.make_room, size, "used")
    return items, broken


class _ClearedError(CacheError):
    """Another process has cleared the store while it was looked at."""


@contextlib.contextmanager
def _opened(directory: str) -> Iterator[Database]:
    try:
        path = database.path_of(directory, database.numbers(directory)[-1])
        with contextlib.closing(Database(path, _WAIT)) as db:
            yield db
    except (IndexError, FileNotFoundError, NotADirectoryError) as error:
        what = "it holds no store of a memo" if isinstance(error, IndexError) else os.strerror(error.errno or 0)
        raise ValueError(f"{directory!r}: {what}; give the disk= directory of a memo") from error
    except sqlite3.Error as error:
        if not os.path.exists(path):
            raise _ClearedError(f"{directory} was cleared by another process meanwhile; try again") from error
        cure = "the next program that uses it goes on with a new one, and what can be read of this one"
        if database.code_of(error) in database.BUSY:
            cure = "try again when the program that writes to it is done"
        raise CacheError(f"the database of {directory}: {error}; {cure}") from error


def _read_all(db: Database, progress: Progress) -> Iterator[tuple[int, str, Any]]:
    """Yields each row's number, what is wrong with it, and its payload."""
    size, total, number, done = db.room_taken(), db.tell(database.COUNT), -(1 << 62), 0
    select = f"{database.SELECT} where rowid > ? order by rowid limit {_READ_AT_ONCE}"
    while rows := db.execute(select, (number,)).fetchall():
        if rows[-1][0] <= number:
            raise sqlite3.DatabaseError("rows are out of order")
        for number, *fields in rows:
            try:
                unpack(Record(*fields), db.folder)
                yield number, "", fields[-1]
            except (DamagedError, OSError) as error:
                if db.tell(f"{database.COUNT} where {database.UNCHANGED}", (number, fields[-1])):  # else it is gone
                    yield number, str(error) or "damaged", fields[-1]
        progress(size * (done := done + len(rows)) // max(total, done), size)


def _strays(db: Database) -> list[tuple[str, int]]:
    """Returns files, and their bytes, that killed processes left and nobody will ever finish."""
    known = {name for (name,) in db.execute(f"select payload from items where stored >= {LARGE}")}
    paths, found = database.lower(db.folder.removesuffix("-files")), []
    for folder in (db.folder, *paths):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            paths += [os.path.join(folder, name) for name in os.listdir(folder) if os.fsencode(name) not in known]
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # writers finish theirs at any time
            found.append((path, os.stat(path).st_size))
    return found
