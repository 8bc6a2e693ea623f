"""The bookkeeping that layers of equal reach share: which position lies in which slot, and what may be gone.

Slots follow one rule: position p < sinks lies in slot p, every other one in a ring behind the sinks. A ring as long as
the capacity never wraps, so there slot = position. A ring that wraps is `reach - 1 + max(max_block, slack)` long: the
first query of the largest block still finds all it may see.

Loss is recorded as one interval per row: positions [lo, hi) may be gone, because the ring has overwritten them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.cache.arguments import FAR
from jaxkv.cache.show import show
from jaxkv.cache.spec import EMPTY, Reach

READ_BLOCK = 64  # buffers are whole multiples of it, so that attend reads whole blocks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Group:
    """Positions and loss of the layers of one reach."""

    positions: Any  # int32 [R, V], EMPTY where nothing lies
    lost: Any  # int32 [R, 2]: positions [lo, hi) may be gone; lo >= hi: nothing is
    pages: Any  # where the slots lie: None on rows; a Pool on pages
    reach: Reach = dataclasses.field(metadata={"static": True})
    ring: int = dataclasses.field(metadata={"static": True})
    wraps: bool = dataclasses.field(metadata={"static": True})
    by_row, by_slot = ("lost",), ("positions",)  # what a file has of it

    __repr__ = show

    @classmethod
    def init(cls, reach: Reach, num_rows: int, capacity: int, behind: int, layout: Any) -> Group:
        """Returns an empty group; `behind` is max(max_block, slack), in tokens."""
        if reach.sinks >= capacity:
            raise ValueError(f"{reach} keeps {reach.sinks} sinks, but the capacity is {capacity}; give fewer sinks")
        ring = capacity - reach.sinks
        if reach.size is not None:
            ring = min(ring, reach.size - 1 + behind)
        used = reach.sinks + ring
        num_slots = layout.round_up(slots_for(used))
        return cls(
            positions=jnp.full((num_rows, num_slots), EMPTY, jnp.int32),
            lost=jnp.tile(nothing_lost(), (num_rows, 1)),
            pages=layout.pages(reach, num_rows, num_slots, used),
            reach=reach,
            ring=ring,
            wraps=used < capacity,
        )

    @property
    def num_slots(self) -> int:
        return self.positions.shape[-1]

    @property
    def held(self) -> Any:
        """The positions each row holds, EMPTY elsewhere: int32 [R, V]."""
        return self.positions

    @property
    def in_use(self) -> Any:
        """Which slots of each row hold something: bool [R, V]."""
        return self.positions != EMPTY

    @property
    def why(self) -> str:
        """Why there are as many slots as there are."""
        if not self.wraps:
            return ""
        seen, sinks = self.reach.size - 1, self.reach.sinks  # type: ignore[operator]
        parts = [f"{sinks} sink{'s' * (sinks > 1)}"] * bool(sinks) + [
            f"{seen} before a query",
            f"{self.ring - seen} for a block",
        ]
        used = sinks + self.ring
        rounded = "" if self.num_slots == used else f", in whole blocks of {READ_BLOCK}"
        if self.num_slots != slots_for(used):
            rounded = ", in whole pages"
        return f" ({' + '.join(parts)}{rounded})"

    def slot(self, p: Any) -> Any:
        """Returns the slot of position p >= 0. int32, the shape of p; NumPy's for NumPy's."""
        sinks = self.reach.sinks
        return (np if isinstance(p, np.ndarray) else jnp).where(p < sinks, p, sinks + (p - sinks) % self.ring)

    def filled(self, lengths: Any) -> Any:
        """Returns how many leading slots may be in use by sequences of these lengths."""
        return jnp.minimum(lengths, self.reach.sinks + self.ring)

    def fits(self, lowest: Any, highest: Any, top: Any, dense: Any) -> Any:
        """Returns whether new queries find all they may see.

        Args:
          lowest, highest: int32 [R], the first and the last new position.
          top: int32 [R], the last position that the sequence then holds.
          dense: bool [R], whether all positions from lowest to highest are new; where they aren't, they must not lie
            around lost ones.

        Returns:
          bool [R].
        """
        if self.reach.size is None:
            return jnp.ones(lowest.shape, bool)
        lo, hi = self.lost[:, 0], self.lost[:, 1]
        found = resume(self.reach, self.lost, lowest) == lowest
        apart = (lo >= hi) | (highest <= lo) | (lowest >= hi)
        long_enough = not self.wraps or top - self.reach.first(lowest) < self.ring
        return found & (dense | apart) & long_enough  # one that doesn't wrap has lost what a loaded row had lost

    def lost_by_writing(self, lowest: Any, highest: Any, dense: Any, fit: Any) -> Any:
        """Returns `lost` after lowest..highest [R], all of it where dense, was written in the rows that fit."""
        if self.reach.size is None:
            return self.lost
        lo, hi = self.lost[:, 0], self.lost[:, 1]
        there = fit & dense & (lowest < hi)  # the block reaches into what is lost: that part is there again
        from_below = there & (lowest <= lo)
        to_the_end = there & (hi <= highest + 1)
        lo = jnp.where(from_below, jnp.maximum(lo, highest + 1), lo)
        hi = jnp.where(to_the_end, jnp.minimum(hi, lowest), hi)
        lost = cut(jnp.stack([lo, hi], -1), jnp.full_like(hi, FAR))
        gone = jnp.where(fit, highest + 1 - self.ring, 0)  # the ring has overwritten positions below
        wider = jnp.stack([jnp.minimum(lost[:, 0], self.reach.sinks), jnp.maximum(lost[:, 1], gone)], 1)
        return jnp.where((gone > self.reach.sinks)[:, None], wider, lost)

    def settle(
        self, by_row: dict[str, np.ndarray], by_slot: dict[str, np.ndarray], length: int
    ) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Returns which tokens of a saved row there is room for, and where: NumPy, for one row of one file.

        Args:
          by_row: the arrays of that name of the row: `lost` int32 [2].
          by_slot: those of its slots in use, in the order of their positions: `positions` int32 [n].
          length: of the row.

        Returns:
          Which of the slots are taken, int [k]; which of the slots here they take, int [k]; the arrays `by_row` then.

        Raises:
          ValueError: for arrays that no row has.
        """
        positions, lost = by_slot["positions"], by_row["lost"]
        if not (np.diff(positions, prepend=EMPTY) > 0).all() or (positions >= length).any():
            raise ValueError("positions that are not in order, or beyond the length")
        if not ((lost >= 0) & (lost <= FAR)).all():
            raise ValueError("lost positions that there can't be")
        sinks = self.reach.sinks
        gone = int(positions[-1]) + 1 - self.ring if positions.size else 0  # later ones take the slots of those below
        kept = np.arange(positions.size)
        if gone > sinks:
            kept = np.flatnonzero((positions < sinks) | (positions >= gone))
            low = min(lost[0], sinks) if lost[0] < lost[1] else sinks
            lost = np.array([low, max(lost[1], gone)], np.int32)
        return kept, self.slot(positions[kept]), {"lost": lost}

    def truncate(self, lengths: Any) -> Group:
        """Returns the group without positions from lengths [R] on."""
        positions = jnp.where(self.positions < lengths[:, None], self.positions, EMPTY)
        return dataclasses.replace(self, positions=positions, lost=cut(self.lost, lengths))

    def take(self, rows: Any, known: Any) -> Group:
        """Returns the group whose row r is row rows[r] of this one, or empty where not known[r]."""
        return dataclasses.replace(
            self,
            positions=jnp.where(known[:, None], self.positions[rows], EMPTY),
            lost=jnp.where(known[:, None], self.lost[rows], nothing_lost()[None]),
        )

    def copy_prefix(self, src: Any, dst: Any, length: Any) -> Group:
        """Returns the group with the first `length` positions of row src in row dst (past the last row: nowhere)."""
        positions = jnp.where(self.positions[src] < length, self.positions[src], EMPTY)
        return dataclasses.replace(
            self,
            positions=self.positions.at[dst].set(positions, mode="drop"),
            lost=self.lost.at[dst].set(cut(self.lost[src], length), mode="drop"),
        )

    def remove(self, row: Any, begin: Any, end: Any) -> tuple[Group, Any, Any]:
        """Forgets positions [begin, end) of one row and moves the later ones down.

        Returns:
          The group; int32 [V]: the slot that each slot's content comes from, V for none; int32 [V]: by how much the
          position of each slot changed (0 or begin - end).
        """
        lo, hi = self.lost[row, 0], self.lost[row, 1]
        old = self.positions[row]
        old = jnp.where((old >= lo) & (old < hi) & (begin < end), EMPTY, old)
        new = jnp.where(old < begin, old, jnp.where(old < end, EMPTY, old - (end - begin)))  # EMPTY < begin
        target = jnp.where(new == EMPTY, self.num_slots, self.slot(new))
        slots = jnp.arange(self.num_slots, dtype=jnp.int32)
        sources = jnp.full_like(slots, self.num_slots).at[target].set(slots, mode="drop")
        positions = jnp.full_like(slots, EMPTY).at[target].set(new, mode="drop")
        delta = jnp.where((sources < self.num_slots) & (positions >= begin), begin - end, 0)

        def down(x: Any) -> Any:
            return jnp.where(x <= begin, x, jnp.where(x < end, begin, x - (end - begin)))

        # Tokens that become sinks may be among the lost: the interval then begins below the sinks, and resume says so.
        # An interval that lay within what is removed is empty, and must not be widened from its old beginning.
        lost = jnp.where(lo < hi, cut(jnp.stack([down(lo), down(hi)]), jnp.int32(FAR)), self.lost[row])
        group = dataclasses.replace(
            self, positions=self.positions.at[row].set(positions), lost=self.lost.at[row].set(lost)
        )
        return group, sources, delta


def slots_for(used: int) -> int:
    """Returns how many slots a buffer has of which `used` may be in use: whole read blocks."""
    return used if used <= READ_BLOCK else -(-used // READ_BLOCK) * READ_BLOCK


def nothing_lost() -> Any:
    """Returns the interval that means nothing is gone: int32 [2]."""
    return jnp.array([FAR, 0], jnp.int32)


def cut(lost: Any, length: Any) -> Any:
    """Returns the lost intervals [..., 2] of sequences cut to `length` [...]."""
    lo, hi = lost[..., 0], jnp.minimum(lost[..., 1], length)
    return jnp.where((lo < hi)[..., None], jnp.stack([lo, hi], -1), jnp.broadcast_to(nothing_lost(), lost.shape))


def resume(reach: Reach, lost: Any, p: Any) -> Any:
    """Returns the largest position <= p [...] at which a query finds all it may see below, given lost [..., 2].

    One step: falling back may land where another answer is due, so callers repeat it over all groups.
    """
    lo, hi = lost[..., 0], lost[..., 1]
    first = reach.first(p)
    nothing_missing = (lo >= hi) | (p <= lo) | ((lo >= reach.sinks) & ((first >= hi) | (first >= p)))
    return jnp.where(nothing_missing, p, reach.fallback(lo, p))
