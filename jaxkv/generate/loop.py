"""The compiled loop: one `while_loop` that decodes all rows until each has ended. The model is a function."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.cache.spec import EMPTY
from jaxkv.generate.call import Call
from jaxkv.generate.choosing import choose, ends_with, fault, log_prob, row_keys
from jaxkv.generate.generation import LENGTH, RUNNING, SAMPLER, STOP, Generation
from jaxkv.generate.history import History
from jaxkv.generate.news import news
from jaxkv.generate.programs import Fixed, Form


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What the loop carries beside the cache."""

    token: Any  # int32 [B], last token of each row, not yet in the cache
    position: Any  # int32 [B], where it goes
    reason: Any  # int32 [B], index into REASONS
    count: Any  # int32 scalar, steps so far
    tokens: Any  # int32 [B, capacity + 1]
    log_probs: Any  # float32 [B, capacity + 1]
    history: Any  # a History of [B, ...]; None unless the sampler needs it


@dataclasses.dataclass(frozen=True, eq=False)
class Plain:
    """The loop of `generate`, as a `Stream` runs it.

    Attributes:
      call: what is asked.
    """

    call: Call

    width = 1  # tokens that a step brings to a row
    kind = Generation

    @property
    def caches(self) -> tuple[tuple[Any, Any, Any, Any], ...]:
        """Forward, params, cache and what that holds of the texts [P], for each model that reads them."""
        return ((self.call.forward, self.call.params, self.call.cache, self.call.held),)

    def begin(self) -> State:
        """Returns the state before the first step, in NumPy."""
        call = self.call
        shape = (len(call.prompts), call.most)  # whatever the limit is, so that it is compiled once
        return State(
            token=call.tokens,
            position=call.last,
            reason=call.reasons,
            count=np.int32(0),
            tokens=np.full(shape, EMPTY, np.int32),
            log_probs=np.zeros(shape, np.float32),
            history=call.history,
        )

    def bound(self, cache: Form, state: Form) -> functools.partial[Any]:
        """Returns `decode` but for the leaves and when to stop."""
        call = self.call
        fixed = Fixed(call.forward, call.sampler, cache, state)
        return functools.partial(
            decode, fixed, call.params, jnp.asarray(call.stops), jnp.asarray(call.limits), call.key
        )

    def written(self, state: State) -> tuple[np.ndarray, np.ndarray]:
        """Returns the new tokens of each row and their log-probabilities, [B, N] each, N the highest limit."""
        most = int(self.call.limits.max())
        return np.array(state.tokens)[:, :most], np.array(state.log_probs)[:, :most]

    def counted(self, counts: np.ndarray) -> dict[str, Any]:
        """Returns further fields of the result, from `News.counts`."""
        return {}


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(5, 6))
def decode(
    fixed: Any, params: Any, stops: Any, limits: Any, key: Any, cache: Any, state: Any, until: Any
) -> tuple[Any, Any, Any]:
    """Returns cache and state after `until` steps, or fewer if every row has ended, and the newest tokens.

    Args:
      fixed: what it is compiled for.
      params: of the model.
      stops: int32 [S, L], sequences that end a row: EMPTY in front of shorter ones stands for anything.
      limits: int32 [B], most new tokens of each row.
      key: PRNG key or None.
      cache, state: their leaves.
      until: int32 scalar.

    Returns:
      Leaves of the cache, leaves of the state, and the `news` of this call's last step, EMPTY if there was none.
    """
    forward, sampler = fixed.forward, fixed.sampler
    cache, state = fixed.cache.build(cache), fixed.state.build(state)
    before = state.count
    keys = row_keys(key, state.token.shape[0])

    def unfinished(carry: tuple[Any, State]) -> Any:
        _, state = carry
        running, broken = (state.reason == RUNNING).any(), (state.reason == SAMPLER).any()
        return (state.count < until) & running & ~broken

    def step(carry: tuple[Any, State]) -> tuple[Any, State]:
        cache, state = carry
        live = state.reason == RUNNING
        positions = jnp.where(live, state.position, EMPTY)
        logits, cache = forward(params, state.token[:, None], positions[:, None], cache)
        logits = logits[:, 0].astype(jnp.float32)
        chosen = choose(sampler, keys, state.position + 1, logits, state.history)
        wrong = fault(logits, chosen, cache.ok)
        fits = live & (wrong == RUNNING)
        count = state.count + 1
        tokens = _write_column(state.tokens, jnp.where(fits, chosen, EMPTY), state.count)
        stopped = ends_with(_last_columns(tokens, count, stops.shape[1]), stops)
        ended = jnp.where(stopped, STOP, jnp.where(count >= limits, LENGTH, RUNNING))
        ended = jnp.where(wrong == RUNNING, ended, wrong)
        history = state.history
        if history is not None:
            history = jax.vmap(History.append)(history, jnp.where(fits, chosen, EMPTY))
        state = State(
            token=jnp.where(live & (fits | (wrong == SAMPLER)), chosen, state.token),  # an unknown one is told by name
            position=jnp.where(fits, state.position + 1, state.position),
            reason=jnp.where(live, ended, state.reason),
            count=count,
            tokens=tokens,
            log_probs=_write_column(state.log_probs, jnp.where(fits, log_prob(logits, chosen), 0.0), state.count),
            history=history,
        )
        return cache, state

    cache, state = jax.lax.while_loop(unfinished, step, (cache, state))
    newest = jnp.where(state.count > before, _column(state.tokens, state.count - 1), EMPTY)
    steps = jnp.broadcast_to(state.count, newest.shape)
    told = news(newest[:, None], _column(state.log_probs, state.count - 1)[:, None], state.reason, steps)
    return fixed.cache.flatten(cache), fixed.state.flatten(state), told


def _last_columns(tokens: Any, count: Any, n: int) -> Any:
    """Returns columns [count - n, count) of tokens, int32 [B, n], EMPTY in front of the first."""
    at = count - n + jnp.arange(n, dtype=jnp.int32)
    return jnp.where(at >= 0, jnp.take(tokens, jnp.maximum(at, 0), axis=1, mode="clip"), EMPTY)


def _write_column(buffer: Any, column: Any, i: Any) -> Any:
    return jax.lax.dynamic_update_slice_in_dim(buffer, column[:, None], i, axis=1)


def _column(buffer: Any, i: Any) -> Any:
    return jax.lax.dynamic_index_in_dim(buffer, i, axis=1, keepdims=False)
