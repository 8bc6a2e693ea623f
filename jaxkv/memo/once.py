"""Computing a value once, for all threads that want it at the same time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any

from jaxkv.memo.forking import Lock


class Once:
    """What is being computed just now, by key."""

    def __init__(self) -> None:
        self._futures: dict[bytes, Future[Any]] = {}
        self._lock = Lock(self._forked)

    def fill(
        self,
        keys: Sequence[bytes],
        find: Callable[[Sequence[bytes]], dict[bytes, Any]],
        compute: Callable[[Sequence[bytes]], dict[bytes, Any]],
    ) -> dict[bytes, Any]:
        """Returns the value of each key: found, computed here, or computed by a thread that came first.

        A thread computes its own before it waits for those of others, so two never wait for one another. If the other
        one fails, what it left is computed by one of those that waited.
        """
        mine: list[bytes] = []
        others: list[tuple[bytes, Future[Any]]] = []
        values: dict[bytes, Any] = {}
        try:
            with self._lock:
                for key in keys:
                    if key in self._futures:
                        others.append((key, self._futures[key]))
                    else:
                        mine.append(key)  # before the others can see it: an interrupt may come anywhere
                        self._futures[key] = Future()
            values = find(mine)  # whoever computed it may have finished since this thread looked
            values |= compute([key for key in mine if key not in values])
        finally:
            with self._lock:
                futures = {key: self._futures.pop(key, None) for key in mine}
            for key, future in futures.items():
                if future is not None and key in values:
                    future.set_result(values[key])
                elif future is not None:
                    future.cancel()
        failed = []
        for key, future in others:
            try:
                values[key] = future.result()
            except CancelledError:
                failed.append(key)
        return values | (self.fill(failed, find, compute) if failed else {})

    def _forked(self) -> None:
        """Waits for nobody any more: in a forked child the threads that compute are not there."""
        self._futures = {}
