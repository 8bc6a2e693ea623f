"""The oracle's pools: who shares which page, counted with sets."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


class CountedPool:
    """A pool of pages that is too simple to be wrong: a page is the set of the rows that have it.

    `table[row]` holds the row's pages by index, which is slot // page_size; a page that is shared is one set in several
    tables. Pages have no numbers and no contents here.

    >>> pool = CountedPool(size=2, num_rows=2)
    >>> pool.own(0, [0])
    >>> pool.copy(0, 1)
    >>> pool.table[1], pool.num_free, pool.lacking(1, [0, 1])
    ({0: {0, 1}}, 1, [0, 1])
    """

    def __init__(self, size: int, num_rows: int):
        self.size = size
        self.table: list[dict[int, set[int]]] = [{} for _ in range(num_rows)]

    @property
    def num_free(self) -> int:
        """How many pages no row has."""
        return self.size - len({id(page) for held in self.table for page in held.values()})

    def lacking(self, row: int, indices: Iterable[int]) -> list[int]:
        """Returns where `row` needs a new page before it writes: where it has none, or another row has it too."""
        return [i for i in indices if len(self.table[row].get(i, ())) != 1]

    def own(self, row: int, indices: Iterable[int]) -> None:
        """Gives `row` a page of its own wherever it lacks one; the other sharers keep the old page."""
        for i in self.lacking(row, indices):
            self.table[row].get(i, set()).discard(row)
            self.table[row][i] = {row}

    def keep(self, row: int, indices: Collection[int]) -> None:
        """Gives back the pages of `row` that are not at these indices."""
        for i in [i for i in self.table[row] if i not in indices]:
            self.table[row].pop(i).discard(row)

    def copy(self, src: int, dst: int) -> None:
        """Lets row `dst` share all pages of `src`, in place of its own."""
        self.keep(dst, ())
        for i, page in self.table[src].items():
            page.add(dst)
            self.table[dst][i] = page

    def take(self, rows: Sequence[int]) -> None:
        """Makes row r what row rows[r] was; an unknown one has no pages."""
        old = self.table
        new: dict[int, set[int]] = {}
        self.table = [{} for _ in rows]
        for r, row in enumerate(rows):
            for i, page in old[row].items() if 0 <= row < len(old) else ():
                self.table[r][i] = new.setdefault(id(page), set())
                self.table[r][i].add(r)
