"""The budget of a disk tier: what finds place, and what goes for it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import Any

from jaxkv.memo.catalog import Catalog, Counts, record_bytes
from jaxkv.memo.layout import hold, is_label
from jaxkv.memo.memory import BY_USE
from jaxkv.memo.record import NAMESPACE_BYTES, Header
from jaxkv.memo.segment import Handle
from jaxkv.memo.trouble import Troubles
from jaxkv.sizes import format_bytes

_LABELS_SHARE = 8


class Room:
    """What a tier's files may take. Its methods are called under the tier's lock.

    Args:
      budget: most bytes of all files together; None sets no limit.
      policy: what happens when it is reached; see `Disk`.
      catalog, counts, troubles: of the tier.
    """

    def __init__(self, budget: int | None, policy: str, catalog: Catalog, counts: Counts, troubles: Troubles) -> None:
        self._budget, self._policy = budget, policy
        self._catalog, self._counts, self._troubles = catalog, counts, troubles
        self._stamp = 0
        self.by_use = policy in BY_USE

    def has(self, nbytes: int) -> bool:
        """Whether so much more fits."""
        return self._budget is None or self._catalog.nbytes + nbytes <= self._budget

    def admit(
        self, records: list[tuple[Header, Any]], own: str, give_up: Callable[[], None]
    ) -> list[tuple[Header, Any]]:
        """Returns the records that there is room for, having made room if the policy is to.

        Args:
          records: that are to be written.
          own: the segment that this process writes to; it goes last.
          give_up: called before it does.
        """
        if self._budget is None:
            return records
        most = self._budget - self._catalog.small_bytes
        sizes = [size for header, _ in records if (size := record_bytes(header.stored)) <= most]
        if self._policy != "keep" and not self.has(sum(sizes)):
            self._make(min(sum(sizes), most), own, give_up)
        left, admitted = self._budget - self._catalog.nbytes, []
        for record in records:
            size = record_bytes(record[0].stored)
            if size <= left:
                left -= size
                admitted.append(record)
            elif size > most or self._policy == "keep":
                self._refused(size, most)
        return admitted

    def _refused(self, size: int, most: int) -> None:
        budget, of = format_bytes(self._budget or 0), format_bytes(size)
        if size > most:
            what = f"a record of {of} is larger than the budget of {budget} allows, and is not kept"
            cure = f"give a disk_budget of {size + self._catalog.small_bytes:,} bytes or more"
        else:
            what = f"the budget of {budget} is full, and a record of {of} is not kept"
            cure = 'give a larger disk_budget or disk_policy="lru", or make room by jaxkv memo prune'
        self._troubles.say("budget", f"{what}; {cure}")

    def _make(self, need: int, own: str, give_up: Callable[[], None]) -> None:
        """Removes segments that nobody writes to until there is room; at last what this process wrote itself."""
        handle = self.hold()
        if handle is None:
            return
        with handle:
            self._catalog.refresh(force=True)
            self._remove_labels()
            order = {}
            for stem, segment in self._catalog.segments.items():
                if not segment.live:
                    order[stem] = (self._used(stem) if self._policy != "fifo" else 0, segment.sequence, stem)
            for stem in [*sorted(order, key=order.__getitem__, reverse=self._policy == "mru"), own]:
                if self.has(need):
                    return
                if stem == own:
                    give_up()
                self._counts.evicted += self.remove(stem)

    def _remove_labels(self) -> None:
        """Removes what is said of namespaces without records, once that takes a good part of the budget."""
        if self._budget is None or self._catalog.small_bytes * _LABELS_SHARE <= self._budget:
            return
        kept = {key[:NAMESPACE_BYTES].hex() for key in self._catalog.places}
        try:
            for name in os.listdir(self._catalog.directory):
                if is_label(name) and name.endswith(".json") and name.removesuffix(".json") not in kept:
                    os.unlink(self._catalog.path(name))
        except OSError as error:
            self._troubles.failed("removing", error)
        self._catalog.refresh(force=True)

    def remove(self, stem: str) -> int:
        """Removes a segment's files, and returns how many records are no longer known."""
        for ending in ("idx", "seg"):  # the index first: killed in between, nothing is left that nobody owns
            try:
                os.unlink(self._catalog.path(f"{stem}.{ending}"))
            except FileNotFoundError:
                continue
            except OSError as error:
                self._troubles.failed("removing", error)
                return 0
        return self._catalog.drop(stem)

    def hold(self) -> Handle | None:
        """Returns the directory's lock, None if another process removes something just now."""
        try:
            return hold(self._catalog.directory)
        except OSError as error:
            self._troubles.failed("locking", error)
            return None

    def _used(self, stem: str) -> int:
        """When a segment was last used, in nanoseconds; a wrong clock changes the order of eviction, no more."""
        try:
            return os.stat(self._catalog.path(f"{stem}.idx")).st_mtime_ns
        except OSError:
            return 0

    def touch(self, stems: set[str]) -> None:
        """Writes down that segments were used just now, where the policy asks for it."""
        if not self.by_use:
            return
        self._stamp = max(self._stamp + 1000, time.time_ns())
        for stem in stems:
            with contextlib.suppress(OSError, OverflowError):
                os.utime(self._catalog.path(f"{stem}.idx"), ns=(self._stamp, self._stamp))
