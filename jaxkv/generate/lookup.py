"""Drafts without a draft model: a text often goes on as it did before (prompt lookup).

The last tokens of a row are looked for in what stands before them, prompt and generated, and what followed there is the
draft. After Saxena 2023, "Prompt Lookup Decoding". A draft that would reach past the end of the text goes on with
itself: of what repeats with a period, the whole rest is found by its last occurrence.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxkv.cache.spec import EMPTY
from jaxkv.generate.branches import Branches
from jaxkv.generate.programs import Form


@dataclasses.dataclass(frozen=True)
class Lookup:
    """How drafts are looked up. Frozen and hashable: a static argument.

    Attributes:
      branches: form of a draft.
      min_ngram, max_ngram: at least so many last tokens are found again; the place where more are, up to max_ngram, is
        taken first, and of equal ones the latest.
    """

    branches: Branches
    min_ngram: int
    max_ngram: int
    form: ClassVar[Form] = Form.of(None)  # there is no cache
    pauses: ClassVar[tuple[int, int]] = (1, 32)  # after bad drafts, at least and at most, in guesses that were right

    def propose(self, params: Any, cache: None, sampler: Any, keys: Any, state: Any, room: Any) -> tuple[Any, ...]:
        """Returns drafts int32 [B, T - 1], which of them there are, bool [B, T - 1], and no cache: see `Small`."""
        context = last(state.text, state.position, self.max_ngram)
        find = self._chain if self.branches.is_chain else self._tree
        return *find(state.text, state.position, context), None

    def _chain(self, text: Any, position: Any, context: Any) -> tuple[Any, Any]:
        after, found = latest(matches(text, position, context), self.min_ngram)
        i = jnp.arange(len(self.branches.widths), dtype=jnp.int32)[None]
        period = jnp.maximum(position + 1 - after, 1)[:, None]
        drafts = jnp.take_along_axis(text, after[:, None] + i % period, 1)
        return drafts, jnp.broadcast_to(found[:, None], drafts.shape)

    def _tree(self, text: Any, position: Any, context: Any) -> tuple[Any, Any]:
        """What followed in the best places, each token once; each branch is then looked up on its own."""
        context, there = context[:, None], jnp.ones((text.shape[0], 1), bool)  # [B, nodes, n], [B, nodes]
        drafts, found = [], []
        for width in self.branches.widths:
            count = jax.vmap(matches, (None, None, 1), 1)(text, position, context)  # [B, nodes, N]
            tokens, good = [], []
            for _ in range(width):
                after, enough = jax.vmap(latest, (1, None), 1)(count, self.min_ngram)
                token = jnp.take_along_axis(text, after, 1)
                tokens.append(token)
                good.append(enough & there)
                count = jnp.where(text[:, None] == token[:, :, None], 0, count)
            token, there = (jnp.stack(x, 2).reshape(text.shape[0], -1) for x in (tokens, good))
            context = jnp.concatenate([jnp.repeat(context, width, 1)[:, :, 1:], token[:, :, None]], 2)
            drafts.append(token)
            found.append(there)
        return jnp.concatenate(drafts, 1), jnp.concatenate(found, 1)


def last(text: Any, position: Any, n: int) -> Any:
    """Returns the last n tokens of each row, int32 [B, n], EMPTY in front of the first."""
    at = position[:, None] + jnp.arange(1 - n, 1, dtype=jnp.int32)[None]
    return jnp.where(at >= 0, jnp.take_along_axis(text, jnp.maximum(at, 0), 1), EMPTY)


def matches(text: Any, position: Any, context: Any) -> Any:
    """Returns how many last tokens of `context` [B, n] also stand right before each place of the text, int32 [B, N].

    0 at places past the last token: nothing follows there.
    """
    n = context.shape[1]
    padded = jnp.pad(text, ((0, 0), (n, 0)), constant_values=EMPTY)  # what stands i before place p is at p + n - i
    same = jnp.arange(text.shape[1], dtype=jnp.int32)[None] <= position[:, None]
    count = jnp.zeros(text.shape, jnp.int32)
    for i in range(1, n + 1):
        there = padded[:, n - i : padded.shape[1] - i]
        same &= (there == context[:, n - i, None]) & (there != EMPTY)
        count += same.astype(jnp.int32)
    return count


def latest(count: Any, least: int) -> tuple[Any, Any]:
    """Returns the last place with the highest count, int32 [B], and bool [B]: whether that is `least` or more."""
    best = count.max(1)
    places = jnp.arange(count.shape[1], dtype=jnp.int32)[None]
    place = jnp.where(count == best[:, None], places, 0).max(1)
    return place, best >= least
