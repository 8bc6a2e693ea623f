"""The bookkeeping of recurrent layers: after which tokens of each row a state is kept, and in which slot it lies.

A row has a few slots, each with one state: the one it stands at, those of the last `slack` tokens, and beside these the
newest `keep` checkpoints. A state that is to stay is not copied: the next one is written elsewhere. So forgetting moves
integers only, and a decode step that keeps nothing writes its state where it read it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.cache.arguments import FAR
from jaxkv.cache.show import show
from jaxkv.cache.spec import EMPTY, Recurrent

_PASSING, _END, _ASKED = range(3)  # why a state is kept: not at all, a block ends there, or it was asked for


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class StateStep:
    """Which states the layers of one group read and write in one call. They see a row's tokens packed: without padding.

    `order` and `place` pack and unpack them: x[b, order[b]] has the row's tokens in front, and of what is computed of
    them y[b, place[b]] has each in its column.
    """

    source: Any  # int32 [B], the slot of the state that the row goes on from; num_slots: zeros, the row is empty
    slots: Any  # int32 [B, M], where the states of this call go; num_slots: nowhere
    counts: Any  # int32 [B, M], after how many of the row's tokens of this call each of them is taken
    order: Any  # int32 [B, T]
    place: Any  # int32 [B, T]
    kv_positions: Any  # int32 [B, C], after how many tokens of the row each slot's state is taken, after the call

    __repr__ = show


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class States:
    """Which states the rows have, in the layers of one reach."""

    positions: Any  # int32 [R, C], after how many tokens of the row; EMPTY: no state
    kept: Any  # int32 [R, C], why it is kept
    reach: Recurrent = dataclasses.field(metadata={"static": True})
    slack: int = dataclasses.field(metadata={"static": True})
    pages = None  # states belong to rows, in every layout
    by_row, by_slot = (), ("positions", "kept")  # what a file has of it

    __repr__ = show

    @classmethod
    def init(cls, reach: Recurrent, num_rows: int, slack: int) -> States:
        """Returns that every row is empty."""
        shape = num_rows, 1 + slack + reach.keep
        return cls(jnp.full(shape, EMPTY, jnp.int32), jnp.full(shape, _PASSING, jnp.int32), reach, slack)

    @property
    def num_slots(self) -> int:
        return self.positions.shape[-1]

    @property
    def held(self) -> Any:
        """After how many tokens each row has a state, EMPTY elsewhere: int32 [R, C]."""
        return self.positions

    @property
    def in_use(self) -> Any:
        """Which slots of each row hold something: bool [R, C]."""
        return self.positions != EMPTY

    @property
    def why(self) -> str:
        """Why there are as many slots as there are."""
        slack = f" + {self.slack} of slack" if self.slack else ""
        return f" (the row's own{slack} + {self.reach.keep} checkpoints; a row goes back to these)"

    def advance(self, before: Any, after: Any, most: int) -> tuple[States, Any, Any, Any]:
        """Takes note of the states of one call.

        Args:
          before, after: int32 [R], the lengths of the rows; equal where a row takes nothing.
          most: tokens of a row in the call, at most.

        Returns:
          The bookkeeping after the call; int32 [R]: the slot of the state before; int32 [R, M] each: where the states
          of the call go, num_slots for nowhere, and after how many of its tokens they are taken.
        """
        end, begin = after[:, None], before[:, None]
        recent = min(self.slack, most - 1)
        new = end - jnp.arange(recent + 1, dtype=jnp.int32)[None]
        new = jnp.where(new > begin, new, EMPTY)
        asked = jnp.zeros_like(new, bool)
        if (every := self.reach.every) is not None:
            number = jnp.arange(min(self.reach.keep, -(-(most - 1) // every)), dtype=jnp.int32)[None]
            regular = ((end - recent - 1) // every - number) * every
            new = jnp.concatenate([new, jnp.where(regular > begin, regular, EMPTY)], 1)
            asked = new % every == 0
        block = (end - begin) > 1
        kept = jnp.where(asked, _ASKED, jnp.where((new == end) & block, _END, _PASSING))

        at_begin = self.positions == begin
        goes_on = (self.kept == _END) & at_begin & block  # what seemed the end of a prompt was not
        old = jnp.where(goes_on, _PASSING, self.kept)
        worth = jnp.where(old == _PASSING, EMPTY, self.positions)
        worth = jnp.where(self.positions >= end - self.slack, FAR + self.positions, worth)
        worth = jnp.where(self.positions == EMPTY, EMPTY - 1, worth)
        written = new != EMPTY
        rank = jnp.maximum(jnp.cumsum(written, 1, dtype=jnp.int32) - 1, 0)
        slots = jnp.take_along_axis(jnp.argsort(worth, 1).astype(jnp.int32), rank, 1)
        slots = jnp.where(written, slots, self.num_slots)
        write = jax.vmap(lambda row, s, x: row.at[s].set(x, mode="drop"))
        positions, kept = write(self.positions, slots, new), write(old, slots, kept)
        older = (kept != _PASSING) & (positions != EMPTY) & (positions < end - self.slack)
        newer = (older[:, None, :] & (positions[:, None, :] > positions[:, :, None])).sum(2, dtype=jnp.int32)
        stays = (positions >= end - self.slack) | (older & (newer < self.reach.keep))
        states = dataclasses.replace(self, positions=jnp.where(stays, positions, EMPTY), kept=kept)
        return states, self._slot(before), slots, jnp.where(written, new - begin, 0)

    def settle(
        self, by_row: dict[str, np.ndarray], by_slot: dict[str, np.ndarray], length: int
    ) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Returns what `Group.settle` does: the state a row stands at, those of `slack`, and the newest checkpoints."""
        positions, kept = by_slot["positions"], by_slot["kept"]
        if not (np.diff(positions, prepend=0) > 0).all() or positions[-1:].tolist() != [length][: min(length, 1)]:
            raise ValueError("states that are not in order, or none after its last token")
        recent = positions >= length - self.slack
        older = np.flatnonzero(~recent & (kept != _PASSING))
        taken = np.append(older[max(older.size - self.reach.keep, 0) :], np.flatnonzero(recent))
        return taken, np.arange(taken.size), by_row

    def _slot(self, lengths: Any) -> Any:
        """Returns the slot of the state that each row stands at: int32 [R], num_slots for an empty row."""
        here = self.positions == lengths[:, None]
        return jnp.where(here.any(1), here.argmax(1).astype(jnp.int32), self.num_slots)

    def checkpoint(self, lengths: Any, mask: Any) -> States:
        """Returns this with the states that rows [R] where mask stand at kept."""
        here = (self.positions == lengths[:, None]) & mask[:, None]
        return dataclasses.replace(self, kept=jnp.where(here, _ASKED, self.kept))

    def truncate(self, lengths: Any) -> States:
        """Returns this without the states after more than lengths [R] tokens."""
        return dataclasses.replace(self, positions=jnp.where(self.positions <= lengths[:, None], self.positions, EMPTY))

    def take(self, rows: Any, known: Any) -> States:
        """Returns this with row r being row rows[r], or empty where not known[r]."""
        positions = jnp.where(known[:, None], self.positions[rows], EMPTY)
        return dataclasses.replace(self, positions=positions, kept=self.kept[rows])

    def copy_prefix(self, src: Any, dst: Any, length: Any) -> States:
        """Returns this with the states of row src after at most `length` tokens in row dst (past the last: nowhere)."""
        positions = jnp.where(self.positions[src] <= length, self.positions[src], EMPTY)
        return dataclasses.replace(
            self,
            positions=self.positions.at[dst].set(positions, mode="drop"),
            kept=self.kept.at[dst].set(self.kept[src], mode="drop"),
        )


def goes_on(positions: Any, real: Any, lengths: Any) -> Any:
    """Returns which batch rows bring the positions [B, T] from their lengths [B] on, one after the other: bool [B]."""
    wanted = lengths[:, None] + jnp.cumsum(real, 1, dtype=jnp.int32) - 1
    return (~real | (positions == wanted)).all(1)


def packing(real: Any) -> tuple[Any, Any]:
    """Returns the columns of real tokens in order, then the others; and where each column lies then: int32 [B, T]."""
    order = jnp.argsort(~real, 1, stable=True).astype(jnp.int32)
    return order, jnp.argsort(order, 1).astype(jnp.int32)


def common(positions: Sequence[Any]) -> Any:
    """Returns after how many tokens all of several groups have a state, of [..., C] each: int32, EMPTY for none."""
    first, *others = positions
    for other in others:
        first = jnp.where((first[..., :, None] == other[..., None, :]).any(-1), first, EMPTY)
    return first
