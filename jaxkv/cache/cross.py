"""The bookkeeping of Cross layers: how much of an encoder's output each row has.

It belongs to the row, not to positions. Slot s holds key s of the output, so a length per row says all; an output is
written whole, and replaces what was there.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.cache.group import slots_for
from jaxkv.cache.show import show
from jaxkv.cache.spec import EMPTY, Cross
from jaxkv.cache.step import GroupStep


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Encoded:
    """What each row has of an encoder's output."""

    lengths: Any  # int32 [R], keys of the encoder's output; EMPTY: not encoded
    pages: Any  # where the slots lie: None on rows; a Pool on pages
    reach: Cross = dataclasses.field(metadata={"static": True})
    num_slots: int = dataclasses.field(metadata={"static": True})
    by_row, by_slot = ("lengths",), ()  # what a file has of it

    __repr__ = show

    @classmethod
    def init(cls, reach: Cross, num_rows: int, layout: Any) -> Encoded:
        """Returns that no row is encoded."""
        num_slots = layout.round_up(slots_for(reach.size))
        pages = layout.pages(reach, num_rows, num_slots, reach.size)
        return cls(jnp.full((num_rows,), EMPTY, jnp.int32), pages, reach, num_slots)

    @property
    def held(self) -> Any:
        """The places of its output that each row has, EMPTY elsewhere: int32 [R, V]; None for abstract values."""
        return self.positions(self.lengths) if isinstance(self.lengths, jax.Array | np.ndarray) else None

    @property
    def in_use(self) -> Any:
        """Which slots of each row hold something: bool [R, V]."""
        return self.positions(self.lengths) != EMPTY

    @property
    def why(self) -> str:
        """Why there are as many slots as there are: the reach says it."""
        return ""

    @property
    def filled(self) -> Any:
        """How many leading slots each row has in use: int32 [R]."""
        return jnp.maximum(self.lengths, 0)

    def positions(self, lengths: Any) -> Any:
        """Returns the slots in use by encoder outputs of these lengths [B], EMPTY for the others: int32 [B, V]."""
        slots = jnp.arange(self.num_slots, dtype=jnp.int32)[None, :]
        return jnp.where(slots < lengths[:, None], slots, EMPTY)

    def step(self, rows: Any, pages: Any) -> GroupStep:
        """Returns what queries find in these rows: int32 [B], all of them known; None for all in order."""
        lengths, filled = (x if rows is None else x[rows] for x in (self.lengths, self.filled))
        return GroupStep(
            slots=None,
            kv_positions=self.positions(lengths),
            kv_spans=None,
            filled=filled,
            pages=pages,
            slot_is_position=False,  # a query's position says nothing about the slots that it sees
        )

    def settle(
        self, by_row: dict[str, np.ndarray], by_slot: dict[str, np.ndarray], length: int
    ) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Returns what `Group.settle` does: all of an encoder's output, where it was."""
        keys = int(by_row["lengths"])
        if not EMPTY <= keys <= self.reach.size:
            raise ValueError("an encoder's output of a length that none can have")
        slots = np.arange(max(keys, 0))
        return slots, slots, by_row

    def reset(self, mask: Any) -> Encoded:
        """Returns this without the rows where mask [R] is True."""
        return dataclasses.replace(self, lengths=jnp.where(mask, EMPTY, self.lengths))

    def take(self, rows: Any, known: Any) -> Encoded:
        """Returns this with row r being row rows[r], or not encoded where not known[r]."""
        return dataclasses.replace(self, lengths=jnp.where(known, self.lengths[rows], EMPTY))

    def copy(self, src: Any, known: Any, dst: Any) -> Encoded:
        """Returns this with row src, or nothing if not known, in row dst (past the last row: nowhere)."""
        return dataclasses.replace(
            self, lengths=self.lengths.at[dst].set(jnp.where(known, self.lengths[src], EMPTY), mode="drop")
        )
