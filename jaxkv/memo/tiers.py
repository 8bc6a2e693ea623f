"""Where a memo keeps what was computed: memory before disk, with what was asked for counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

from jaxkv.errors import CacheError
from jaxkv.memo.disk import Disk, DiskStats
from jaxkv.memo.forking import Lock
from jaxkv.memo.memory import Memory, MemoryStats
from jaxkv.memo.once import Once
from jaxkv.sizes import format_bytes


@dataclasses.dataclass(frozen=True)
class MemoStats:
    """What a memo was asked for and did, since it was made.

    Attributes:
      calls: of all functions.
      items: in these calls.
      hits: items that were found.
      misses: items that were not; those that occur twice in a call are counted twice.
      computed: items that went through the function.
      memory, disk: of the tiers, None where there is none.
    """

    calls: int
    items: int
    hits: int
    misses: int
    computed: int
    memory: MemoryStats | None
    disk: DiskStats | None

    @property
    def hit_rate(self) -> float:
        """Hits per item, 0 before the first."""
        return self.hits / self.items if self.items else 0.0

    def __str__(self) -> str:
        parts = [f"{self.items:,} items in {self.calls:,} calls, {self.hit_rate:.1%} found, {self.computed:,} computed"]
        for name, tier in (("memory", self.memory), ("disk", self.disk)):
            if tier is not None:
                parts.append(f"{tier.items:,} in {format_bytes(tier.nbytes)} of {name}")
        if self.memory is not None and self.memory.refused:
            times = f"{self.memory.refused:,} time{'s' * (self.memory.refused > 1)}"
            parts[1] += f" (full: {times} an output had no place in {format_bytes(self.memory.budget)})"
        return "; ".join(parts)


class Tiers:
    """Payloads by key, in memory, on disk, or both.

    Args:
      memory, disk: the tiers, None where there is none.
      once: whether threads that want one payload at the same time wait for the first of them.
    """

    def __init__(self, memory: Memory | None, disk: Disk | None, once: bool) -> None:
        self.memory, self.disk = memory, disk
        self._once = Once() if once else None
        self._lock, self._keeping = Lock(), Lock()
        self._counts = [0, 0, 0, 0, 0]
        self.closed = False

    @property
    def each(self) -> list[Any]:
        """The tiers there are, the fastest first."""
        return [tier for tier in (self.memory, self.disk) if tier is not None]

    def check_open(self) -> None:
        """Raises CacheError after `close`."""
        if self.closed:
            raise CacheError("this memo is closed; make another one (what is on disk is still there)")

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

    def count(self, *counts: int) -> None:
        """Adds to calls, items, hits, misses and computed."""
        with self._lock:
            self._counts = [have + more for have, more in zip(self._counts, counts, strict=True)]

    def stats(self) -> MemoStats:
        """Returns what was asked for and done so far."""
        memory = None if self.memory is None else self.memory.stats()
        with self._lock:
            calls, items, hits, misses, computed = self._counts
        return MemoStats(calls, items, hits, misses, computed, memory, None if self.disk is None else self.disk.stats())

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
