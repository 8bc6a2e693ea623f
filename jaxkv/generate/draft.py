"""Drafts by a smaller model of the same vocabulary."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxkv.cache.spec import EMPTY
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
      num_draft: tokens of a draft.
      form: of its cache.
    """

    forward: Any
    num_draft: int
    form: Form
    longest_pause: ClassVar[int] = 0  # its cache would lag behind

    @property
    def parents(self) -> tuple[int, ...]:
        """Of each token of a block, the one that it follows: a chain."""
        return tuple(range(-1, self.num_draft))

    def propose(self, params: Any, cache: Any, sampler: Any, keys: Any, state: Any, room: Any) -> tuple[Any, Any, Any]:
        """Returns drafts int32 [B, num_draft], bool [B]: whether there are any, and the cache with all but their last.

        Args:
          params, cache: of this model. The cache holds what the row holds, or one token less.
          sampler, keys: as for `choose`.
          state: where the rows stand.
          room: int32 [B], how many drafts are of use.
        """
        position = state.position

        def pick(i: Any, logits: Any, history: Any) -> tuple[Any, Any]:
            logits = logits.astype(jnp.float32)
            token = choose(sampler, keys, position + 1 + i, logits, history)
            token = jnp.clip(token, 0, logits.shape[1] - 1)
            return token, None if history is None else jax.vmap(History.append)(history, token)

        at = position[:, None] + jnp.array([[-1, 0]], jnp.int32)
        new = (at >= cache.lengths[:, None]) & (room > 0)[:, None]
        logits, cache = self.forward(params, last(state.text, position, 2), jnp.where(new, at, EMPTY), cache)
        token, history = pick(0, logits[:, 1], state.history)
        drafts = jnp.zeros((token.shape[0], self.num_draft), jnp.int32).at[:, 0].set(token)

        def more(carry: Any) -> Any:
            return carry[0] < jnp.minimum(room.max(), self.num_draft)

        def step(carry: Any) -> Any:
            i, token, drafts, history, cache = carry
            positions = jnp.where(i < room, position + i, EMPTY)
            logits, cache = self.forward(params, token[:, None], positions[:, None], cache)
            token, history = pick(i, logits[:, 0], history)
            return i + 1, token, drafts.at[:, i].set(token), history, cache

        *_, drafts, _, cache = jax.lax.while_loop(more, step, (jnp.int32(1), token, drafts, history, cache))
        return drafts, cache.ok, cache
