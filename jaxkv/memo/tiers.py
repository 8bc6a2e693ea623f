"""Where a memo keeps what was computed: memory before disk."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from jaxkv.errors import CacheError
from jaxkv.memo.counts import Counts
from jaxkv.memo.disk import Disk
from jaxkv.memo.forking import Lock
from jaxkv.memo.memory import Memory
from jaxkv.memo.once import Once


class Tiers:
    """Payloads by key, in memory, on disk, or both.

    Args:
      memory, disk: the tiers, None where there is none.
      once: whether threads that want one payload at the same time wait for the first of them.

    Attributes:
      counts: what was asked for.
      checked: namespaces whose functions were found to be row by row.
    """

    def __init__(self, memory: Memory | None, disk: Disk | None, once: bool) -> None:
        self.memory, self.disk = memory, disk
        self._once = Once() if once else None
        self._keeping = Lock()
        self.counts = Counts(memory, disk)
        self.checked: set[bytes] = set()
        self.closed = False

    @property
    def each(self) -> list[Any]:
        """The tiers there are, the fastest first."""
        return [tier for tier in (self.memory, self.disk) if tier is not None]

    def check_open(self) -> None:
        """Raises CacheError after `close`."""
        if self.closed:
            raise CacheError("this memo is closed; make another one (what is on disk is still there)")

    def is_checked(self, namespace: bytes) -> bool:
        """Returns whether the function of a namespace was checked, here or by another process."""
        if namespace not in self.checked and self.disk is not None and self.disk.is_checked(namespace):
            self.checked.add(namespace)
        return namespace in self.checked

    def read(self, keys: Sequence[bytes], nbytes: int) -> dict[bytes, Any]:
        """Returns the payloads that are there, by key; those from disk are put into memory."""
        self.check_open()
        found: dict[bytes, Any] = {}
        if self.memory is not None:
            payloads = self.memory.read(keys)
            if None not in payloads:
                return dict(zip(keys, payloads, strict=True))
            found = {key: payload for key, payload in zip(keys, payloads, strict=True) if payload is not None}
        if self.disk is not None:
            rest = [key for key in keys if key not in found]
            read = {key: got for key, got in zip(rest, self.disk.read(rest, nbytes), strict=True) if got is not None}
            if self.memory is not None and read:
                self.memory.write(list(read), list(read.values()))
            found |= read
        return found

    def fill(
        self, keys: Sequence[bytes], nbytes: int, compute: Callable[[Sequence[bytes]], dict[bytes, bytes]]
    ) -> dict[bytes, Any]:
        """Returns the payloads of keys that were not found, computed and kept."""

        def kept(keys: Sequence[bytes]) -> dict[bytes, Any]:
            payloads = compute(keys) if keys else {}
            with self._keeping:
                for tier in self.each if payloads and not self.closed else ():
                    tier.write(list(payloads), list(payloads.values()))
            return payloads

        if self._once is None:
            return kept(keys)
        return self._once.fill(keys, lambda keys: self.read(keys, nbytes), kept)

    def clear(self, namespaces: Collection[bytes] | None = None) -> None:
        """Forgets everything, or all keys of some namespaces."""
        self.check_open()
        for tier in self.each:
            tier.clear(namespaces)

    def close(self) -> None:
        """Frees the memory and ends the use of the directory."""
        with self._keeping:  # a call that is under way keeps what it computes before, or not at all
            self.closed = True
            if self.memory is not None:
                self.memory.clear()
            if self.disk is not None:
                self.disk.close()
