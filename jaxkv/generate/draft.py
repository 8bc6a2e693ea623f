"""Drafts by a smaller model of the same vocabulary."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxkv.cache.arguments import FAR
from jaxkv.cache.spec import EMPTY
from jaxkv.generate.branches import Branches
from jaxkv.generate.choosing import choose
from jaxkv.generate.history import History
from jaxkv.generate.lookup import last
from jaxkv.generate.programs import Form


@dataclasses.dataclass(frozen=True)
class Small:
    """A model that drafts. Frozen and hashable: a static argument.

    It draws with the same keys as the model that checks: two draws from like distributions then mostly agree (Daliri et
    al. 2024, "Coupling without Communication and Drafter-Invariant Speculative Decoding").

    Attributes:
      forward: as for `jaxkv.generate`.
      branches: form of a draft.
      form: of its cache.
    """

    forward: Any
    branches: Branches
    form: Form
    pauses: ClassVar[tuple[int, int]] = (0, 0)  # its cache would lag behind

    @property
    def behind(self) -> int:
        """How many tokens its cache may lack of what a row holds: the last of a chain, a branch of a tree."""
        return 1 if self.branches.is_chain else len(self.branches.widths)

    @property
    def block(self) -> int:
        """Tokens of its longest block."""
        return max(self.behind + 1, 1 if self.branches.is_chain else self.branches.size - 1 - self.branches.levels[-1])

    def propose(self, params: Any, cache: Any, sampler: Any, keys: Any, state: Any, room: Any) -> tuple[Any, Any, Any]:
        """Returns drafts int32 [B, T - 1], which of them there are, bool [B, T - 1], and the cache.

        Args:
          params, cache: of this model. The cache holds what the row holds, or up to `behind` tokens less.
          sampler, keys: as for `choose`.
          state: where the rows stand.
          room: int32 [B], how many levels of drafts are of use.
        """
        at = state.position[:, None] + jnp.arange(-self.behind, 1, dtype=jnp.int32)[None]
        new = (at >= cache.lengths[:, None]) & (room > 0)[:, None]
        tokens = last(state.text, state.position, self.behind + 1)
        logits, cache = self.forward(params, jnp.maximum(tokens, 0), jnp.where(new, at, EMPTY), cache)
        draw = self._chain if self.branches.is_chain else self._tree
        drafts, cache = draw(params, cache, sampler, keys, state, room, logits[:, -1].astype(jnp.float32))
        return drafts, jnp.broadcast_to(cache.ok[:, None], drafts.shape), cache

    def _chain(
        self, params: Any, cache: Any, sampler: Any, keys: Any, state: Any, room: Any, logits: Any
    ) -> tuple[Any, Any]:
        num_draft = len(self.branches.widths)

        def pick(i: Any, logits: Any, history: Any) -> tuple[Any, Any]:
            token = choose(sampler, keys, state.position + 1 + i, logits, history)
            token = jnp.clip(token, 0, logits.shape[1] - 1)
            return token, None if history is None else jax.vmap(History.append)(history, token)

        def more(carry: Any) -> Any:
            return carry[0] < jnp.minimum(room.max(), num_draft)

        def step(carry: Any) -> Any:
            i, token, drafts, history, cache = carry
            positions = jnp.where(i < room, state.position + i, EMPTY)
            logits, cache = self.forward(params, token[:, None], positions[:, None], cache)
            token, history = pick(i, logits[:, 0].astype(jnp.float32), history)
            return i + 1, token, drafts.at[:, i].set(token), history, cache

        token, history = pick(0, logits, state.history)
        drafts = jnp.zeros((token.shape[0], num_draft), jnp.int32).at[:, 0].set(token)
        *_, drafts, _, cache = jax.lax.while_loop(more, step, (jnp.int32(1), token, drafts, history, cache))
        return drafts, cache

    def _tree(
        self, params: Any, cache: Any, sampler: Any, keys: Any, state: Any, room: Any, logits: Any
    ) -> tuple[Any, Any]:
        """Each level has what is drawn after each token of the level above, and what is most likely besides."""
        rows, branches, base = logits.shape[0], self.branches, state.position + 1
        parents = jnp.asarray(branches.parents[1:] - 1)[None]  # the row's last token is held
        drafts = jnp.zeros((rows, 0), jnp.int32)
        logits = logits[:, None]  # [B, tokens of a level, V]
        for depth, width in enumerate(branches.widths):
            drawn = jax.vmap(choose, (None, None, None, 1, None), 1)(sampler, keys, base + depth, logits, state.history)
            drawn = jnp.clip(drawn, 0, logits.shape[2] - 1)
            first = jnp.arange(logits.shape[2], dtype=jnp.int32)[None, None] == drawn[:, :, None]
            _, tokens = jax.lax.top_k(jnp.where(first, jnp.inf, logits), width)
            drafts = jnp.concatenate([drafts, tokens.reshape(rows, -1).astype(jnp.int32)], 1)
            if depth + 1 == len(branches.widths):
                break
            # All levels so far once more: a call knows the parents of its own tokens only.
            at = base[:, None] + jnp.arange(drafts.shape[1], dtype=jnp.int32)[None]
            there = (room > depth + 1)[:, None] & (at < cache.capacity)
            above = jnp.broadcast_to(parents[:, : drafts.shape[1]], drafts.shape)
            positions = jnp.where(there, at, EMPTY)
            logits, cache = self.forward(params, drafts, positions, cache, parents=above)
            logits = logits[:, -branches.levels[depth + 1] :].astype(jnp.float32)
            cache = cache.rewind(jnp.where(room > depth + 1, base, FAR))
        return drafts, cache
