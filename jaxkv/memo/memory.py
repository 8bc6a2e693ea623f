"""The tier in memory: payloads by key, up to a budget of bytes."""

from __future__ import annotations

import dataclasses
import sys
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Any

from jaxkv.logs import log
from jaxkv.memo.forking import Lock
from jaxkv.memo.record import NAMESPACE_BYTES
from jaxkv.sizes import format_bytes

POLICIES = ("keep", "lru", "mru", "fifo")
BY_USE = ("lru", "mru")  # those for which it matters when something was used
_ENTRY = 120  # bytes that an entry takes in an ordered dict, beside key and payload (measured with tracemalloc)


@dataclasses.dataclass(frozen=True)
class MemoryStats:
    """What the tier in memory holds and did.

    Attributes:
      items: payloads held.
      nbytes: what they take, keys and the table included.
      budget: what they may take at most.
      hits, misses: payloads asked for that were there, and that were not.
      evicted: payloads that gave way to others.
      refused: how often a payload was not taken: too large, or no place under "keep".
    """

    items: int
    nbytes: int
    budget: int
    hits: int
    misses: int
    evicted: int
    refused: int


class Memory:
    """Payloads by key. Each method takes a lock for as long as a dict takes.

    Args:
      budget: bytes.
      policy: what happens when it is full. "keep": what is there stays, what is new is not taken (best for epochs that
        visit everything in random order); "lru": the one used longest ago goes; "mru": the one used last goes; "fifo":
        the oldest goes.
    """

    def __init__(self, budget: int, policy: str = "keep") -> None:
        if policy not in POLICIES:
            raise ValueError(f"policy is {policy!r}, must be one of {', '.join(POLICIES)}")
        self._budget = budget
        self._policy = policy
        self._payloads: OrderedDict[bytes, bytes] = OrderedDict()
        self._nbytes = self._hits = self._misses = self._evicted = self._refused = 0
        self._lock = Lock()

    def read(self, keys: Sequence[bytes], nbytes: int | None = None) -> list[bytes | None]:
        """Returns the payload of each key, None where there is none. (How long they are matters to the disk only.)"""
        with self._lock:
            found = [self._payloads.get(key) for key in keys]
            hits = len(found) - found.count(None)
            self._hits += hits
            self._misses += len(found) - hits
            if self._policy in BY_USE:
                for key, payload in zip(keys, found, strict=True):
                    if payload is not None:
                        self._payloads.move_to_end(key)
            return found

    def write(self, keys: Sequence[bytes], payloads: Sequence[Any]) -> None:
        """Takes payloads, as far as the policy finds place for them."""
        with self._lock:
            for key, payload in zip(keys, payloads, strict=True):
                if key not in self._payloads:
                    self._take(key, payload)

    def _take(self, key: bytes, payload: Any) -> None:
        size = _size(key, payload)
        if size > self._budget or (self._policy == "keep" and self._nbytes + size > self._budget):
            self._refused += 1
            if self._refused == 1:
                log.warning(
                    f"memory={format_bytes(self._budget)} of a memo is full after {len(self._payloads):,} outputs of "
                    f"{format_bytes(size)}, with what the table takes; more are not kept there: give it more"
                )
            return
        while self._nbytes + size > self._budget:
            self._nbytes -= _size(*self._payloads.popitem(last=self._policy == "mru"))
            self._evicted += 1
        self._payloads[key] = bytes(payload)  # a view would keep alive whatever it looks into
        self._nbytes += size

    def clear(self, namespaces: Collection[bytes] | None = None) -> None:
        """Forgets everything, or all keys that begin with one of some namespaces."""
        with self._lock:
            gone = [key for key in self._payloads if namespaces is None or key[:NAMESPACE_BYTES] in namespaces]
            for key in gone:
                self._nbytes -= _size(key, self._payloads.pop(key))

    def stats(self) -> MemoryStats:
        with self._lock:
            counts = self._hits, self._misses, self._evicted, self._refused
            return MemoryStats(len(self._payloads), self._nbytes, self._budget, *counts)


def _size(key: bytes, payload: Any) -> int:
    return sys.getsizeof(key) + sys.getsizeof(b"") + len(payload) + _ENTRY
