"""The oracle: what a cache has to answer, from nothing but dictionaries of tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxkv.cache.spec import Chunk, Cross, Recurrent
from jaxkv.testing.pools import CountedPool

EMPTY = -1
_PASSING, _END, _ASKED = "passing", "end of a block", "asked for"  # why there is a state


@dataclasses.dataclass(frozen=True)
class OracleStep:
    """What one call of `Oracle.begin` did.

    Attributes:
      rows: int array [B], which sequence each batch row continues.
      positions: int array [B, T], EMPTY for padding and for sequences that did not fit.
      ok: bool array [B], False where the sequence of the batch row did not fit in this call.
      sees: sees[b][t][reach] maps each position that query (b, t) sees to its token; None for padding. For Cross the
        positions are places in the encoder's output.
    """

    rows: np.ndarray
    positions: np.ndarray
    ok: np.ndarray
    sees: list[list[dict[Any, dict[int, int]] | None]]


class Oracle:
    """A cache of tokens that is too simple to be wrong, to compare a `jaxkv.Cache` with.

    It holds, for each row, the tokens it was given by position (`history`), those of the encoder's output (`encoded`)
    and, for each row and reach, those that a buffer as long as the design's ring rule still holds (`kept`). It is NumPy
    only, mutable, slow, and shares no code with the cache: visibility, ring sizes and slots are worked out here once
    more.

    On pages it counts them too (`pools`), by these rules:

    - A row has a page iff it holds a position in it; of an output of the encoder, iff a key.
    - Whoever writes needs a page for itself: a new one where it has none, or another row has it too.
    - `begin` serves rows in the order of their numbers, each as if it came alone: one that finds too few free pages in
      any pool takes nothing. So of the sharers of a page that write it in one call the last keeps it, unless one before
      it was refused and has the page still.
    - `remove` with an end writes the pages that moved tokens land in, before it gives back those that it empties.

    Of a Recurrent reach a row has states (`states`, after how many tokens: why), by these rules:

    - There is one after each of the last `slack` tokens, and after all of them.
    - Beside these the newest `keep` checkpoints stay: after every `every` tokens, at the end of a block of several
      tokens unless another such block follows at once, and where `checkpoint` was called.
    - A row goes on from the state it stands at, so its tokens come in order, in one batch row. `texts` has them.

    Args:
      reaches: the reaches of the layers; repeated ones count once.
      num_rows: how many sequences.
      capacity: tokens that a sequence can hold.
      max_block: longest block of one call.
      slack: how far behind the highest position written a rewind may go.
      num_pages: how many pages the pool of a reach without a size has; the others get what their rows need, if that is
        less, and Cross what its rows need. None: the cache is not on pages.
      page_size: tokens in a page.

    >>> from jaxkv.cache.spec import Window
    >>> oracle = Oracle([Window(2)], num_rows=1, capacity=8, max_block=2)
    >>> step = oracle.begin([[0, 1]], tokens=[[7, 8]])
    >>> step = oracle.begin([[2, EMPTY]], tokens=[[9, 0]])
    >>> step.sees[0][0][Window(2)]
    {1: 8, 2: 9}
    >>> oracle.resume_point(0, 2)
    2
    """

    def __init__(
        self,
        reaches: Iterable[Any],
        *,
        num_rows: int,
        capacity: int,
        max_block: int,
        slack: int = 0,
        num_pages: int | None = None,
        page_size: int = 1,
    ):
        reaches = dict.fromkeys(reaches)
        self.cross = next((reach for reach in reaches if isinstance(reach, Cross)), None)
        self.recurrent = tuple(reach for reach in reaches if isinstance(reach, Recurrent))
        self.reaches = tuple(reach for reach in reaches if reach != self.cross and reach not in self.recurrent)
        self.slack = slack
        self.num_rows, self.capacity = num_rows, capacity
        self.ring = {}  # how many slots besides the sinks
        for reach in self.reaches:
            ring = capacity - reach.sinks
            if (size := _size(reach)) is not None:
                ring = min(ring, size - 1 + max(min(max_block, capacity), slack))
            self.ring[reach] = ring
        self.wraps = [reach for reach in self.reaches if reach.sinks + self.ring[reach] < capacity]
        self.page_size = page_size
        self.pools: dict[Any, CountedPool] = {}
        if num_pages is not None:
            for reach in [*self.reaches, *([] if self.cross is None else [self.cross])]:
                used = reach.size if reach == self.cross else reach.sinks + self.ring[reach]
                most = num_rows * -(-used // page_size)
                size = most if reach == self.cross else num_pages if _size(reach) is None else min(num_pages, most)
                self.pools[reach] = CountedPool(size, num_rows)
        self.history: list[dict[int, int]] = [{} for _ in range(num_rows)]
        self.kept: list[dict[Any, dict[int, int]]] = [self._nothing() for _ in range(num_rows)]
        self.states: list[dict[Any, dict[int, str]]] = [self._no_states() for _ in range(num_rows)]
        self.texts: list[list[int]] = [[] for _ in range(num_rows)]  # what recurrent layers took in
        self.lengths = [0] * num_rows
        self.ok = [True] * num_rows
        self.encoded: list[list[int] | None] = [None] * num_rows  # tokens of the encoder's output
        # Of a row with gaps, one interval can't say exactly what is lost: positions were skipped or forgotten, or lost
        # ones written in part. The cache may then answer lower than it must; without rings nothing is ever lost.
        self.gaps = [False] * num_rows

    # ---------------------------------------------------------------- questions

    def slot(self, reach: Any, position: int) -> int:
        """Where a position lies in the buffers of a reach."""
        return position if position < reach.sinks else reach.sinks + (position - reach.sinks) % self.ring[reach]

    def fits(self, row: int, positions: Sequence[int]) -> bool:
        """Whether `row` can take tokens at these positions in one call, alone or as the next one that is served."""
        if not self.ok[row] or max(positions) >= self.capacity or len(set(positions)) < len(positions):
            return False
        if self.recurrent and list(positions) != [self.lengths[row] + i for i in range(len(positions))]:
            return False
        lowest, top = min(positions), max(max(positions), self.lengths[row] - 1)
        if not all(self._finds(row, p, positions) for p in positions):
            return False
        if not all(top - _first(reach, lowest) < self.ring[reach] for reach in self.wraps):
            return False
        return self._has_pages(row, dict.fromkeys(self.reaches, positions))

    def resume_point(self, row: int, position: int) -> int:
        """The largest p <= position from which `row` can go on, finding all that its queries may see."""
        position = max(0, min(position, self.lengths[row]))
        while not self._resumes(row, position):
            position -= 1
        return position

    def can_resume(self, row: int, position: int) -> bool:
        """Whether `resume_point(row, position)` is `position`."""
        return self.resume_point(row, position) == position

    def _resumes(self, row: int, position: int) -> bool:
        has_state = all(position in states for states in self.states[row].values())
        return (position == 0 or has_state) and self._finds(row, position, ())

    def _finds(self, row: int, position: int, new: Collection[int]) -> bool:
        """Whether a query finds all it may see, with the positions that come in the same call."""
        return all(
            past in self.kept[row][reach] or past in new
            for reach in self.reaches
            for past in self.history[row]
            if past < position and _reaches(reach, position, past)
        )

    def pages(self, reach: Any, positions: Iterable[int]) -> set[int]:
        """Which pages of a row these positions lie in, counted from 0."""
        return {(p if reach == self.cross else self.slot(reach, p)) // self.page_size for p in positions}

    def _has_pages(self, row: int, written: Mapping[Any, Iterable[int]]) -> bool:
        """Whether `row` gets the pages that it lacks to write these positions of each reach."""
        return all(
            len(pool.lacking(row, self.pages(reach, written.get(reach, ())))) <= pool.num_free
            for reach, pool in self.pools.items()
        )

    # ---------------------------------------------------------------- operations

    def begin(
        self,
        positions: Any,
        rows: Any = None,
        spans: Any = None,
        parents: Any = None,
        *,
        tokens: Any,
        refused: Iterable[int] = (),
    ) -> OracleStep:
        """Takes the tokens of one call.

        Args:
          positions: int [B, T], negative for padding.
          rows: int [B], which sequence each batch row continues; None for row b on batch row b.
          spans: int [B, T], tokens of one call with the same id other than 0 see each other both ways.
          parents: int [B, T], for a tree of tokens, of rows in order: the column of each one's parent, negative for one
            that follows the row. Then `commit` keeps one branch.
          tokens: int [B, T], what lies at the positions.
          refused: rows that the cache did not serve although they fit here. Only rows with gaps may be, or those
            that get some by this call.

        Returns:
          An `OracleStep`.

        Raises:
          ValueError: if a refused row has no gaps.
        """
        positions, tokens = np.asarray(positions), np.asarray(tokens)
        spans = np.zeros_like(positions) if spans is None else np.asarray(spans)
        rows = np.arange(len(positions)) if rows is None else np.asarray(rows)
        wanted: dict[int, list[tuple[int, int, int]]] = {}  # row: (position, token, span) of the whole call
        parts: dict[int, set[int]] = {}  # row: the batch rows in which it comes
        for b, row in enumerate(rows):
            for p, token, span in zip(positions[b], tokens[b], spans[b], strict=True):
                if p >= 0 and 0 <= row < self.num_rows:
                    wanted.setdefault(int(row), []).append((int(p), int(token), int(span)))
                    parts.setdefault(int(row), set()).add(b)
        served = {}
        trees = {} if parents is None else {row: self._tree(row, positions[row], parents[row]) for row in wanted}
        for row, new in sorted(wanted.items()):
            one_part = not (self.recurrent and len(parts[row]) > 1)
            fits = one_part and self.fits(row, [p for p, _, _ in new]) and trees.get(row) != []
            whole = max(p for p, _, _ in new) - min(p for p, _, _ in new) < len(new)
            if fits and row in refused and whole and not self.gaps[row]:
                raise ValueError(f"row {row} fits and has no gaps, so the cache must not refuse it")
            if fits and row not in refused:
                served[row] = {p: span for p, _, span in new}
                self._write(row, {p: token for p, token, _ in new})
            else:
                self.ok[row] = False
        fitted = np.array([int(row) in served for row in rows])
        new_positions = np.where(fitted[:, None] & (positions >= 0), positions, EMPTY)
        sees: list[list[dict[Any, dict[int, int]] | None]] = []
        for b, row in enumerate(rows):
            sees.append([])
            for t, q in enumerate(new_positions[b]):
                if q == EMPTY:
                    sees[b].append(None)
                    continue
                if trees:
                    sees[b].append(self._sees_branch(int(row), int(q), trees[int(row)]))
                    continue
                call, span = served[int(row)], int(spans[b, t])
                sees[b].append(
                    {
                        reach: {
                            p: token
                            for p, token in sorted(self.kept[row][reach].items())
                            if (p <= q or (span != 0 and call.get(p) == span)) and _reaches(reach, int(q), p)
                        }
                        for reach in self.reaches
                    }
                    | ({} if self.cross is None else {self.cross: dict(enumerate(self.encoded[row] or []))})
                )
        return OracleStep(rows, new_positions, np.array([row in served or row not in wanted for row in rows]), sees)

    def _tree(self, row: int, positions: Any, parents: Any) -> list[dict[int, int]]:
        """Returns for each token of a tree the position of each of its ancestors and where that stands; none if there
        is no such tree."""
        new, base = [int(p) for p in positions if p >= 0], self.lengths[row]
        if new != list(range(base, base + len(new))) or any(p >= 0 for p in positions[len(new) :]):
            return []
        branches: list[dict[int, int]] = []
        for t, parent in enumerate(int(parent) for parent in parents[: len(new)]):
            if parent >= t:
                return []
            above = branches[parent] if parent >= 0 else {}
            branches.append(above | {base + t: base + len(above)})
        return branches

    def _sees_branch(self, row: int, position: int, tree: list[dict[int, int]]) -> dict[Any, dict[int, int]]:
        """Returns what a token of a tree sees, by reach: what the row held, and its branch."""
        base = self.lengths[row] - len(tree)
        branch = tree[position - base]
        sees = {}
        for reach in self.reaches:
            stands = {p: p for p in self.kept[row][reach] if p < base} | branch
            seen = sorted(p for p, at in stands.items() if _reaches(reach, branch[position], at))
            sees[reach] = {p: self.kept[row][reach][p] for p in seen}
        return sees | ({} if self.cross is None else {self.cross: dict(enumerate(self.encoded[row] or []))})

    def commit(self, row: int, base: int, parents: Sequence[int], path: Sequence[int]) -> None:
        """Keeps one branch of the tree that the row took at position `base`, as far as `path` is one."""
        branch: list[int] = []
        for t in path:
            if not 0 <= t < len(parents) or max(parents[t], -1) != (branch[-1] if branch else -1):
                break
            branch.append(t)
        for held in (self.history[row], *self.kept[row].values()):
            held.update({base + i: token for i, token in enumerate([held[base + t] for t in branch])})
        self._truncate(row, self.resume_point(row, base + len(branch)))

    def begin_cross(self, lengths: Sequence[int], rows: Any = None, *, tokens: Any) -> np.ndarray:
        """Takes the encoder's output of some rows, in place of what they had.

        Args:
          lengths: int [B], negative for nothing.
          rows: int [B], which sequence each batch row belongs to; None for row b on batch row b.
          tokens: int [B, S], what lies in the outputs.

        Returns:
          bool array [B], False where the sequence of the batch row did not fit in this call.
        """
        rows = list(range(len(lengths)) if rows is None else rows)
        size = 0 if self.cross is None else self.cross.size
        bring = [row for row, length in zip(rows, lengths, strict=True) if length >= 0 and 0 <= row < self.num_rows]
        refused = set()
        for row, length, output in zip(rows, lengths, np.asarray(tokens).tolist(), strict=True):
            if row not in bring or length < 0:
                continue
            if self.ok[row] and length <= size and bring.count(row) == 1:
                self.encoded[row] = output[:length]
                if self.cross in self.pools:
                    pages = self.pages(self.cross, range(length))
                    self.pools[self.cross].keep(row, pages)
                    self.pools[self.cross].own(row, pages)
            else:
                refused.add(row)
        for row in refused:
            self.ok[row] = False
        return np.array([row not in refused for row in rows])

    def _write(self, row: int, new: Mapping[int, int]) -> None:
        for reach in self.reaches:
            if reach in self.pools:
                self.pools[reach].own(row, self.pages(reach, new))
        length = max(self.lengths[row], max(new) + 1)
        if set(new) | set(range(self.lengths[row])) != set(range(length)):
            self._leave_gaps(row)
        if self.recurrent:
            self._go_on(row, [token for _, token in sorted(new.items())])
        self.history[row].update(new)
        self.lengths[row] = length
        for reach, held in self.kept[row].items():
            overwritten = {self.slot(reach, p) for p in new}
            kept = {p: token for p, token in held.items() if self.slot(reach, p) not in overwritten}
            self.kept[row][reach] = kept | dict(new)
            if any(p not in self.kept[row][reach] for p in self.history[row] if p > min(new)):
                self._leave_gaps(row)

    def _go_on(self, row: int, tokens: Sequence[int]) -> None:
        before, after = self.lengths[row], self.lengths[row] + len(tokens)
        self.texts[row] += tokens
        for reach, states in self.states[row].items():
            if states.get(before) == _END and len(tokens) > 1:
                states[before] = _PASSING
            for p in range(before + 1, after + 1):
                regular = reach.every is not None and p % reach.every == 0
                states[p] = _ASKED if regular else _END if p == after and len(tokens) > 1 else _PASSING
            recent = [p for p in states if p >= after - self.slack]
            checkpoints = sorted(p for p, why in states.items() if why != _PASSING and p not in recent)
            stay = {*recent, *checkpoints[max(0, len(checkpoints) - reach.keep) :]}
            self.states[row][reach] = {p: why for p, why in states.items() if p in stay}

    def checkpoint(self, rows: Sequence[int]) -> None:
        """Keeps the states at which rows stand."""
        for row in rows:
            if 0 <= row < self.num_rows and self.lengths[row]:
                for states in self.states[row].values():
                    states[self.lengths[row]] = _ASKED

    def remove(
        self, row: int, begin: int, end: int | None = None, *, held: Mapping[Any, Collection[int]] | None = None
    ) -> None:
        """Forgets positions [begin, end); with an end, the later tokens move down, if there are pages for them.

        Args:
          row: which sequence; an unknown one changes nothing.
          begin, end: the positions; None truncates.
          held: what the cache then held of each reach, unless it refused. On a row with gaps it may have forgotten
            more, and then needs fewer pages.
        """
        if not 0 <= row < self.num_rows:
            return
        if end is None:
            if begin < self.lengths[row]:
                self._truncate(row, self.resume_point(row, begin))
            return
        end = min(end, self.lengths[row])
        begin = max(0, min(begin, end))
        if begin == end:
            return

        def moved(held: Mapping[int, int]) -> dict[int, int]:
            return {p if p < begin else p - (end - begin): t for p, t in sorted(held.items()) if not begin <= p < end}

        kept = {}
        for reach, tokens in self.kept[row].items():
            by_slot = {self.slot(reach, p): (p, token) for p, token in moved(tokens).items()}  # the newest stays
            kept[reach] = dict(by_slot.values())
            if held is not None and self.gaps[row]:
                kept[reach] = {p: token for p, token in kept[reach].items() if p in held[reach]}
        written = {reach: [p for p in tokens if p >= begin] for reach, tokens in kept.items()}
        if not self._has_pages(row, written):
            self.ok[row] = False
            return
        for reach, positions in written.items():
            if reach in self.pools:
                self.pools[reach].own(row, self.pages(reach, positions))
        self.history[row], self.kept[row] = moved(self.history[row]), kept
        self.lengths[row] -= end - begin
        self._release(row)

    def keep(self, mask: Any) -> None:
        """Forgets all positions but those that a mask names, bool [R, capacity]; nothing moves."""
        mask = np.asarray(mask)

        def named(row: int, held: Mapping[int, int]) -> dict[int, int]:
            return {p: token for p, token in held.items() if mask[row, p]}

        for row, history in enumerate(self.history):
            self.history[row] = named(row, history)
            self.kept[row] = {reach: named(row, held) for reach, held in self.kept[row].items()}
            if self.history[row] != history:
                self._leave_gaps(row)
            self._release(row)

    def rewind(self, lengths: Sequence[int]) -> None:
        """Truncates every row; one asked for its own length or more is not touched."""
        for row, length in enumerate(lengths):
            self.remove(row, length)

    def copy_prefix(self, src: int, dst: int, length: int) -> None:
        """Makes `dst` the first `length` positions of `src`; an unknown src holds nothing."""
        if not 0 <= dst < self.num_rows:
            return
        if src == dst:
            self.remove(src, length)
        elif not 0 <= src < self.num_rows:
            self._forget(dst)
        else:
            landed = self.resume_point(src, length)
            self._set(dst, self._get(src))
            for pool in self.pools.values():
                pool.copy(src, dst)
            self._truncate(dst, landed)
        self.ok[dst] = True

    def take(self, rows: Sequence[int]) -> None:
        """Makes row r what row rows[r] is; an unknown one is empty."""
        empty: tuple[Any, ...] = {}, self._nothing(), self._no_states(), [], 0, True, False, None
        states = [self._get(row) if 0 <= row < self.num_rows else empty for row in rows]
        for pool in self.pools.values():
            pool.take(rows)
        self.num_rows = len(rows)
        self.history, self.kept = [{} for _ in rows], [self._nothing() for _ in rows]
        self.lengths, self.ok, self.gaps = [0] * len(rows), [True] * len(rows), [False] * len(rows)
        self.states, self.texts = [self._no_states() for _ in rows], [[] for _ in rows]
        self.encoded = [None] * len(rows)
        for row, state in enumerate(states):
            self._set(row, state)

    def reset(self, mask: Sequence[bool]) -> None:
        """Forgets whole sequences."""
        for row in np.flatnonzero(mask).tolist():
            self._forget(row)
            self.ok[row] = True

    def retry(self, mask: Sequence[bool]) -> None:
        """Lets sequences that did not fit try again."""
        for row in np.flatnonzero(mask).tolist():
            self.ok[row] = True

    def settle(self, row: int, length: int, held: Mapping[Any, Collection[int]] | None = None) -> None:
        """Follows a cache that landed on a lower length, or holds less, than it must; only rows with gaps may.

        Args:
          row: which sequence.
          length: its length in the cache.
          held: the positions that the cache holds of each reach; None: what it must.

        Raises:
          ValueError: if the length is higher than it may be, or lower than it must be; if the cache holds a position
            that was overwritten or forgotten, or has lost one that wasn't.
        """
        lower = self.gaps[row] and length <= self.lengths[row] and self._resumes(row, length)
        if length != self.lengths[row] and not lower:
            raise ValueError(f"row {row} must have length {self.lengths[row]}, not {length}")
        self._truncate(row, length)
        for reach, kept in self.kept[row].items():
            there = set(kept if held is None else held[reach])
            fewer = set(kept) - there
            if there - set(kept) or (fewer and not (self.gaps[row] and reach in self.wraps)):
                raise ValueError(f"row {row} must hold positions {sorted(kept)} of {reach}, not {sorted(there)}")
            self.kept[row][reach] = {p: token for p, token in kept.items() if p in there}
        for reach, states in self.states[row].items():
            if held is not None and set(held[reach]) != set(states):
                raise ValueError(
                    f"row {row} must have states of {reach} after {sorted(states)} tokens, not {sorted(held[reach])}"
                )
        self._release(row)

    def _leave_gaps(self, row: int) -> None:
        self.gaps[row] = bool(self.wraps)

    def _forget(self, row: int) -> None:
        self.encoded[row] = None
        self._truncate(row, 0)

    def _release(self, row: int) -> None:
        """Gives back the pages in which the row holds nothing."""
        for reach, pool in self.pools.items():
            held = range(len(self.encoded[row] or [])) if reach == self.cross else self.kept[row][reach]
            pool.keep(row, self.pages(reach, held))

    def _truncate(self, row: int, length: int) -> None:
        def below(held: Mapping[int, int]) -> dict[int, int]:
            return {p: token for p, token in held.items() if p < length}

        self.history[row] = below(self.history[row])
        self.kept[row] = {reach: below(held) for reach, held in self.kept[row].items()}
        self.texts[row] = self.texts[row][:length]
        self.states[row] = {
            reach: {p: why for p, why in states.items() if p <= length} for reach, states in self.states[row].items()
        }
        self.lengths[row] = length
        self.gaps[row] &= length > 0
        self._release(row)

    def _nothing(self) -> dict[Any, dict[int, int]]:
        return {reach: {} for reach in self.reaches}

    def _no_states(self) -> dict[Any, dict[int, str]]:
        return {reach: {} for reach in self.recurrent}

    def _get(self, row: int) -> tuple[Any, ...]:
        kept, states = (
            {reach: dict(held) for reach, held in by_reach[row].items()} for by_reach in (self.kept, self.states)
        )
        rest = self.lengths[row], self.ok[row], self.gaps[row], self.encoded[row]
        return dict(self.history[row]), kept, states, list(self.texts[row]), *rest

    def _set(self, row: int, state: tuple[Any, ...]) -> None:
        history, kept, states, text, self.lengths[row], self.ok[row], self.gaps[row], self.encoded[row] = state
        self.history[row], self.kept[row] = dict(history), {reach: dict(held) for reach, held in kept.items()}
        self.states[row], self.texts[row] = {reach: dict(held) for reach, held in states.items()}, list(text)


def _size(reach: Any) -> int | None:
    return getattr(reach, "size", None)


def _first(reach: Any, position: int) -> int:
    """The lowest position, sinks apart, that a query at `position` may see."""
    size = _size(reach)
    if size is None:
        return 0
    return position // size * size if isinstance(reach, Chunk) else max(0, position - size + 1)


def _reaches(reach: Any, q: int, p: int) -> bool:
    """Whether the reach lets a query at position q see position p, whichever came first."""
    size = _size(reach)
    if size is None:
        return True
    return p // size == q // size if isinstance(reach, Chunk) else p > q - size or p < reach.sinks
