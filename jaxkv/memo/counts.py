"""What a memo was asked for and did, epoch by epoch; and functions whose items are never the same twice."""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter

from jaxkv.logs import log
from jaxkv.memo.disk import Disk, DiskStats
from jaxkv.memo.forking import Lock
from jaxkv.memo.memory import Memory, MemoryStats
from jaxkv.sizes import format_bytes

MANY = 100_000  # items of which some should have come twice, where nobody says when an epoch ends


@dataclasses.dataclass(frozen=True)
class MemoStats:
    """Counts of a memo, since it was made or in one epoch.

    Attributes:
      calls: of all functions.
      items: in these calls.
      hits: items that were found.
      misses: items that were not; those that occur twice in a call are counted twice.
      computed: items that went through the function.
      grown: bytes by which the store on disk grew meanwhile, whoever wrote there; that in memory if there is no disk.
      memory, disk: of the tiers, since they were made; None where there is none.
    """

    calls: int = 0
    items: int = 0
    hits: int = 0
    misses: int = 0
    computed: int = 0
    grown: int = 0
    memory: MemoryStats | None = None
    disk: DiskStats | None = None

    @property
    def hit_rate(self) -> float:
        """Hits per item, 0 before the first."""
        return self.hits / self.items if self.items else 0.0

    def __str__(self) -> str:
        parts = [f"{self.items:,} items in {self.calls:,} calls, {self.hit_rate:.1%} found, {self.computed:,} computed"]
        for name, tier in (("memory", self.memory), ("disk", self.disk)):
            if tier is not None:
                most = "" if tier.budget is None else f", of at most {format_bytes(tier.budget)}"
                parts.append(f"{tier.items:,} in {format_bytes(tier.nbytes)} of {name}{most}")
        if self.memory is not None and self.memory.refused:
            times = f"{self.memory.refused:,} time{'s' * (self.memory.refused > 1)}"
            parts[1] += f" (full: {times} an output had no place)"
        return "; ".join(parts)


@dataclasses.dataclass(eq=False)
class Asked:
    """What one function was asked for in this epoch, and whether it was asked for anything in an epoch before."""

    name: str
    items: int = 0
    hits: int = 0
    again: bool = False
    said: bool = False


class Counts:
    """Counts of all functions and of each, since the memo was made and since the last epoch ended.

    Args:
      memory, disk: the tiers, None where there is none.
    """

    def __init__(self, memory: Memory | None, disk: Disk | None) -> None:
        self._memory, self._disk = memory, disk
        self._lock = Lock()
        self._all: Counter[str] = Counter()
        self._ended: Counter[str] = Counter()  # what they were when the last epoch ended
        self._functions: weakref.WeakSet[Asked] = weakref.WeakSet()
        self._first = self._last = 0 if disk is None else disk.nbytes()

    def of(self, name: str) -> Asked:
        """Returns the counts of one more function."""
        with self._lock:
            self._functions.add(asked := Asked(name))
        return asked

    def add(self, asked: Asked, items: int, hits: int, computed: int) -> None:
        """Counts one call."""
        with self._lock:
            self._all.update(calls=1, items=items, hits=hits, misses=items - hits, computed=computed)
            asked.items, asked.hits = asked.items + items, asked.hits + hits
        if asked.items >= MANY and not asked.hits and not asked.said:
            self._say(asked, "so far", self.stats().grown)

    def stats(self) -> MemoStats:
        """Returns what there is since the beginning."""
        with self._lock:
            return self._since(Counter(), self._first)

    def end_epoch(self) -> MemoStats:
        """Returns what there is since the last epoch ended, and says which functions found nothing again."""
        with self._lock:
            ended = self._since(self._ended, self._last)
            self._ended, self._last = self._all.copy(), self._last + ended.grown
            for asked in self._functions:
                if asked.again and asked.items and not asked.hits:
                    self._say(asked, "in this epoch", ended.grown)
                asked.again |= asked.items > 0
                asked.items = asked.hits = 0
        return ended

    def _since(self, before: Counter[str], nbytes: int) -> MemoStats:
        memory = None if self._memory is None else self._memory.stats()
        disk = None if self._disk is None else self._disk.stats()
        held = disk or memory
        return MemoStats(**(self._all - before), grown=held.nbytes - nbytes if held else 0, memory=memory, disk=disk)

    def _say(self, asked: Asked, when: str, grown: int) -> None:
        if not asked.said:
            asked.said = True
            log.warning(
                f"{asked.name}: none of {asked.items:,} items was found {when}, and the store grew by "
                f"{format_bytes(max(grown, 0))}. If these items came before, something changes them first, such as "
                "augmentation: let it come after the memo (said once)"
            )
