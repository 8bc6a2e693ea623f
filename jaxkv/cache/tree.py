"""Token trees: the tokens of one call are several continuations of a row at once, of which one branch is then kept.

The tokens lie at consecutive positions behind what the row holds, as those of any call do: their addresses. Where a
token stands in its branch is its depth, which rotary, learned positions and reaches go by. A query sees what the row
held, and its ancestors.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxkv.cache import edit
from jaxkv.cache.arguments import FAR, integers
from jaxkv.cache.layer import Layer
from jaxkv.cache.show import show
from jaxkv.cache.spec import EMPTY, Cross, Reach
from jaxkv.cache.step import GroupStep, Step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Tree:
    """Who follows whom among the tokens of one call."""

    base: Any  # int32 [B], the length of each row before the call
    depth: Any  # int32 [B, T], the position of each token in its branch; EMPTY: padding
    ancestors: Any  # bool [B, T, T], whether the second token is on the way to the first, itself included

    __repr__ = show

    @classmethod
    def of(cls, positions: Any, parents: Any, base: Any) -> tuple[Tree, Any]:
        """Returns the tree, and bool [B]: whether there is one.

        Args:
          positions: int32 [B, T], negative for padding.
          parents: int32 [B, T], the column of each token's parent; negative for tokens that follow the row.
          base: int32 [B], the length of each row.
        """
        column = jnp.arange(positions.shape[1], dtype=jnp.int32)[None]
        real = positions >= 0
        in_front = column < real.sum(1, dtype=jnp.int32)[:, None]
        sound = (real == in_front) & (~real | ((positions == base[:, None] + column) & (parents < column)))
        parents = jnp.where(real, parents, EMPTY)
        up = (column[:, :, None] == column[:, None, :]) | (parents[:, :, None] == column[:, None, :])
        ancestors = up.astype(jnp.float32)
        for _ in range((positions.shape[1] - 1).bit_length()):  # each product doubles how far up they reach
            ancestors = jnp.minimum(jnp.einsum("bts,bsu->btu", ancestors, ancestors), 1)
        depth = base[:, None] + ancestors.sum(2).astype(jnp.int32) - 1
        return cls(base, jnp.where(real, depth, EMPTY), ancestors > 0), sound.all(1)

    def depths(self, positions: Any) -> Any:
        """Returns the depth of the tokens of the call that lie at `positions` [B, T], EMPTY for padding."""
        at = jnp.maximum(positions - self.base[:, None], 0)
        return jnp.where(positions == EMPTY, EMPTY, jnp.take_along_axis(self.depth, at, 1, mode="clip"))

    def visible(self, reach: Reach, positions: Any, kv_positions: Any) -> Any:
        """Returns which slots [B, S], by their positions, the tokens of the call at positions [B, T] see: [B, T, S]."""
        queries, at = self._columns(positions), self._columns(kv_positions)
        on_branch = jax.vmap(lambda ancestors, q, s: ancestors[q][:, s])(self.ancestors, queries, at)
        see = reach.visible(self.depths(positions)[:, :, None], self.kv_depths(kv_positions)[:, None, :])
        return see & (on_branch | (kv_positions < self.base[:, None])[:, None, :])

    def kv_depths(self, kv_positions: Any) -> Any:
        """Returns where the tokens at these positions [B, S] stand: the depth of the call's, the position of others."""
        own = jnp.take_along_axis(self.depth, self._columns(kv_positions), 1)
        return jnp.where(kv_positions >= self.base[:, None], own, kv_positions)

    def _columns(self, positions: Any) -> Any:
        return jnp.clip(positions - self.base[:, None], 0, self.depth.shape[1] - 1)

    def branch(self, path: Any) -> Any:
        """Returns how many columns of path [B, D] are a branch from the root level down: int32 [B]."""
        last = self.depth.shape[1] - 1
        at = jnp.clip(path, 0, last)
        level = jnp.arange(path.shape[1], dtype=jnp.int32)[None]
        there = (path >= 0) & (path <= last)
        there &= jnp.take_along_axis(self.depth, at, 1) == self.base[:, None] + level
        above = jnp.pad(at[:, :-1], ((0, 0), (1, 0)))
        child = jax.vmap(lambda ancestors, low, high: ancestors[low, high])(self.ancestors, at, above)
        return jnp.cumprod(there & (child | (level == 0)), 1, dtype=jnp.int32).sum(1, dtype=jnp.int32)

    def of_row(self, one: Any) -> Tree:
        """Returns this for one batch row; `one` cuts it out of an array [B, ...]."""
        return Tree(one(self.base), one(self.depth), one(self.ancestors))


def checked_parents(parents: Any, positions: Any) -> Any:
    """Returns parents as int32 [B, T].

    Raises:
      ValueError: for another shape, and, where the values are known, a parent that does not come before its child.
    """
    parents = integers("parents", parents)
    if parents.shape != positions.shape:
        raise ValueError(f"parents has shape {parents.shape}, positions {positions.shape}; they must be equal")
    if not any(isinstance(x, jax.core.Tracer) for x in (parents, positions)):
        column = np.arange(parents.shape[1])
        late = (np.asarray(parents) >= column) & (np.asarray(positions) >= 0)
        for b, t in np.argwhere(late)[:1]:
            raise ValueError(
                f"parents[{b}, {t}] is {int(parents[b, t])}: the parent of token {t} comes before it, so give 0 to "
                f"{t - 1}, or -1 for one that follows what the row holds"
                if t
                else f"parents[{b}, 0] is {int(parents[b, 0])}: before the first token there is none; give -1, it "
                "follows what the row holds"
            )
    return parents


def commit(cache: Any, tree: Tree, rows: Any, known: Any, took: Any, path: Any, *, whole: bool) -> Any:
    """Returns `Cache.commit`.

    Args:
      cache: a Cache.
      tree: of the call.
      rows: int32 [B].
      known: bool [B], whether there is such a row.
      took: bool [B], whether the row took the call's tokens.
      path: int32 [B, D].
      whole: whether batch row b is sequence b, for all sequences.
    """
    num_rows = cache.num_rows
    at = jnp.clip(rows, 0, num_rows - 1)
    size = (tree.depth != EMPTY).sum(1, dtype=jnp.int32)
    there = took & known & (cache.lengths[at] == tree.base + size)  # else the row was edited since
    length = jnp.where(there, tree.branch(path), 0)
    level = jnp.arange(path.shape[1], dtype=jnp.int32)[None]
    moves = (level < length[:, None]) & (path != level)
    base = tree.base[:, None]
    # A fork since then may share the pages that are written.
    sequence = jnp.where(moves, rows[:, None], num_rows)
    wanted = [group.slot(base + level) for group in cache.groups]
    books = [group.pages for group in cache.groups]
    fit, claimed = cache.layout.claim(books, [sequence] * len(books), wanted, jnp.ones_like(cache.ok))
    fits = fit[at] | ~moves.any(1)
    length, moves = jnp.where(fits, length, 0), moves & fits[:, None]
    only = None if whole else at
    sources, steps, groups = [], [], []
    for group, (pages, copies), to in zip(cache.groups, claimed, wanted, strict=True):
        sources.append(group.slot(base + jnp.maximum(path, 0)))
        slots, place = jnp.where(moves, to, group.num_slots), cache.layout.step(pages, only, copies)
        steps.append(GroupStep(slots, None, None, None, place, not group.wraps))
        groups.append(dataclasses.replace(group, pages=pages))
    step = Step(positions=path, rows=rows, ok=took, spans=None, groups=tuple(steps), whole=whole)
    owned = dataclasses.replace(step, groups=tuple(part.copied() for part in steps))

    def moved(layer: Layer) -> Layer:
        if isinstance(layer.spec.reach, Cross):
            return layer

        def move(index: Any, buffer: Any) -> Any:
            # Keys are rotated by depth already, and the branch is as deep as its tokens then lie.
            buffer = layer.layout.own(buffer, index, step, layer.group)
            x = layer.layout.gather(buffer, index, step, layer.group, sources[layer.group])
            return layer.layout.write(buffer, index, owned, layer.group, lax.optimization_barrier(x))

        def one(buffer: Any) -> Any:
            if layer.num_stacked is None:
                return move(None, buffer)
            return lax.fori_loop(0, layer.num_stacked, move, buffer)

        return layer.with_buffers(jax.tree.map(one, layer.buffers))

    kept = jnp.full((num_rows,), FAR, jnp.int32)
    kept = kept.at[jnp.where(there, rows, num_rows)].set(tree.base + length, mode="drop")
    lost = took & known & ((cache.lengths[at] > tree.base) & ~there | ~fits)
    ok = cache.ok.at[jnp.where(lost, rows, num_rows)].set(False, mode="drop")
    layers = tuple(map(moved, cache.layers))
    return edit.rewind(dataclasses.replace(cache, layers=layers, groups=tuple(groups), ok=ok), kept)
