"""What goes wrong between a disk tier and the system: counted, said once, and writing tried less and less often."""

from __future__ import annotations

from jaxkv.logs import log
from jaxkv.memo.catalog import Counts

_SKIP_MOST = 1024  # calls


class Troubles:
    """Failures of one tier. No clock is needed: the calls between two tries are counted, and doubled."""

    def __init__(self, directory: str, counts: Counts) -> None:
        self._directory, self._counts = directory, counts
        self._failures = self._skip = 0
        self._said: set[str] = set()

    def failed(self, doing: str, error: Exception) -> None:
        self._counts.errors += 1
        if doing == "writing":
            self._failures += 1
            self._skip = min(2**self._failures - 1, _SKIP_MOST)
        self.say(doing, f"{doing} failed: {error}; going on without")

    def say(self, what: str, message: str) -> None:
        """Warns, once for each kind of trouble."""
        if what not in self._said:
            self._said.add(what)
            log.warning("%s: %s (said once)", self._directory, message)

    def may_write(self) -> bool:
        """Whether this call should try to write."""
        if self._skip:
            self._skip -= 1
            return False
        return True

    def wrote(self) -> None:
        self._failures = 0
