"""The database that a process uses just now: opened when it is needed, exchanged when it is damaged or gone."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections import Counter
from collections.abc import Callable
from typing import Any

from jaxkv.logs import log
from jaxkv.memo import database
from jaxkv.memo.database import Database
from jaxkv.memo.forking import Lock

_WAIT = 0.1  # seconds that a call waits for other processes: one that is stopped must not hold up all
_unused: list[Any] = []  # connections of a parent process, which a child can neither use nor close


class Current:
    """The database of a directory, made if it isn't there; and what goes wrong with it: counted, said, and got over."""

    _db: Database | None = None

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.lock = Lock()  # held while the database is used: a fork waits for it, and cuts no transaction in two
        self.counts: Counter[str] = Counter()
        self._said: set[str] = set()
        self._path, self.folder, self._identity, self._pid = "", "", (0, 0), os.getpid()
        self.do("opening", lambda db: None, None, create=True)

    def do(self, doing: str, work: Callable[[Database], Any], otherwise: Any, *, create: bool = False) -> Any:
        """Returns what `work` does with the database; `otherwise` if there is none, or it fails."""
        with self.lock:
            for again in (True, False):  # with the next database, or a new connection
                try:
                    db = self._connected(create)
                    return otherwise if db is None else work(db)
                except (sqlite3.Error, OSError, MemoryError, ValueError) as error:
                    if doing == "opening" and isinstance(error, ValueError):
                        raise
                    if not self.failed(doing, error, again):
                        break
            return otherwise

    def _connected(self, create: bool) -> Database | None:
        """Returns the connection to the database in use; None if there is none."""
        if self._pid != os.getpid():
            _unused.append(self._db)
            self._db, self._pid = None, os.getpid()
        if self._db is not None:
            with contextlib.suppress(FileNotFoundError):
                if database.identity(self._path) == self._identity:
                    return self._db
            self.close()
        try:
            if create:
                os.makedirs(self.directory, exist_ok=True)
            found = database.numbers(self.directory)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(f"{self.directory} is not a directory; give one, or a name that is free") from error
        except FileNotFoundError:
            found = []
        return self._open(max(found, default=1), not found) if found or create else None

    def _open(self, number: int, create: bool) -> Database:
        self._path = database.path_of(self.directory, number)
        self._db = db = Database(self._path, _WAIT, create=create)
        self._identity, self.folder = database.identity(self._path), db.folder
        return db

    def close(self) -> None:
        """Lets go of the database; it is opened again when it is needed."""
        if self._db is not None:
            self._db.close()
        self._db = None

    def exchange(self, *, rescue: bool) -> None:
        """Goes on with the database that others have gone on with, or with a new one, into which the old is rescued."""
        old, last = self._path, max(database.numbers(self.directory), default=0)
        self.close()
        if rescue and database.path_of(self.directory, last) > old:
            return
        db = self._open(last + 1, True)
        try:
            if rescue:
                db.rescue(old)
        finally:  # what can't be rescued would only take room
            database.unlink(database.lower(self._path))

    def failed(self, doing: str, error: Exception, again: bool = True) -> bool:
        """Counts what went wrong, and returns whether it is worth another try at once."""
        with self.lock:
            if database.code_of(error) in database.BUSY:
                self.counts["busy"] += 1
                return False
            gone = FileNotFoundError, FileExistsError  # the latter of a folder that is removed while it is made
            unlinked = database.code_of(error) in database.UNLINKED or isinstance(error, gone)
            if unlinked and not os.path.exists(self._path) and (again or os.path.exists(self.directory)):
                return True  # others have cleared it in the meantime: that is no error
            if database.code_of(error) in database.DAMAGED:
                self.counts["replaced"] += 1
                self.say("database", f"the database is damaged ({error}); a new one takes over what can be read of it")
                try:
                    self.exchange(rescue=True)
                    return True
                except (sqlite3.Error, OSError, ValueError) as another:
                    error = another
            if isinstance(error, sqlite3.Error):
                self.close()
            if again and database.code_of(error) == sqlite3.SQLITE_READONLY:
                return True  # others may write again: not who opened it before
            self.counts["errors"] += 1
            self.say(doing, f"{doing} failed: {error}; going on without")
            return False

    def say(self, what: str, message: str) -> None:
        """Warns, once for each kind of trouble."""
        if what not in self._said:
            self._said.add(what)
            log.warning("%s: %s (said once)", self.directory, message)
