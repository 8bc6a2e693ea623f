"""Locks and forks: a child process has none of its parent's threads, but all of their locks."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable

_all: weakref.WeakSet[Lock] = weakref.WeakSet()
_held: list[Lock] = []
_forking = threading.RLock()  # two threads that fork at once would wait for each other's locks


class Lock:
    """A lock that is free in a forked child, and what it guards not half changed: a fork waits for whoever holds it.

    Args:
      forked: a method that is called in the child, as soon as the lock is free.

    >>> with Lock():
    ...     pass
    """

    def __init__(self, forked: Callable[[], None] | None = None) -> None:
        self._lock, self._depth = threading.RLock(), 0
        self._forked = None if forked is None else weakref.WeakMethod(forked)
        _all.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()
        self._depth += 1

    def taken(self) -> bool:
        """Enters it if nobody else is inside, and returns whether."""
        if free := self._lock.acquire(blocking=False):
            self._depth += 1
        return free

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        self._lock.release()

    def _in_child(self) -> None:
        inside = self._depth - 1  # where the thread that forks holds it itself
        self._lock, self._depth = threading.RLock(), 0
        for _ in range(inside):
            self.__enter__()
        forked = None if self._forked is None else self._forked()
        if forked is not None:
            forked()


def _before() -> None:
    _forking.acquire()
    locks = list(_all)
    while len(_held) < len(locks):
        lock = locks[len(_held)]
        if lock.taken():
            _held.append(lock)
            continue
        while _held:  # who holds that one may wait for one of these
            _held.pop().__exit__()
        with lock:
            locks.sort(key=lambda other: other is not lock)


def _in_parent() -> None:
    while _held:
        _held.pop().__exit__()
    _forking.release()


def _in_child() -> None:
    while _held:
        _held.pop()._in_child()
    _forking.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
