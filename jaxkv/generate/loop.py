"""The compiled loop: one `while_loop` that decodes all rows until each has ended. The model is a function."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv.cache.spec import EMPTY
from jaxkv.generate.generation import FULL, INF, LENGTH, NAN, RUNNING, SAMPLER, STOP
from jaxkv.generate.history import History


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
      Leaves of the cache, leaves of the state, and what the host looks at after each step in one array, int32 [4, B]:
      the tokens of this call's last step (EMPTY if there was none), the bits of their log-probabilities, the reasons,
      and the steps so far.
    """
    forward, sampler = fixed.forward, fixed.sampler
    cache, state = fixed.cache.build(cache), fixed.state.build(state)
    before = state.count
    rows = jnp.arange(state.token.shape[0], dtype=jnp.int32)
    # A row's randomness depends on the key, its number and the position, on nothing else.
    row_keys = None if key is None else jax.vmap(jax.random.fold_in, (None, 0))(key, rows)

    def choose(key: Any, position: Any, logits: Any, history: Any) -> Any:
        key = None if key is None else jax.random.fold_in(key, position)
        token = jnp.asarray(sampler(key, logits) if history is None else sampler(key, logits, history))
        if token.shape or not jnp.issubdtype(token.dtype, jnp.integer):
            raise ValueError(
                f"sampler {sampler} returned {token.dtype}{list(token.shape)} for the logits [V] of one row; it must "
                "return one token, an integer scalar"
            )
        return token.astype(jnp.int32)

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
        chosen = jax.vmap(choose)(row_keys, state.position + 1, logits, state.history)
        log_probs = jnp.take_along_axis(logits, chosen[:, None], 1)[:, 0] - jax.nn.logsumexp(logits, axis=1)
        nan = jnp.isnan(logits).any(1)  # XLA's logsumexp may be finite for NaN
        inf = jnp.isinf(logits.max(1))
        known = (chosen >= 0) & (chosen < logits.shape[1])
        fits = live & cache.ok & ~nan & ~inf & known
        count = state.count + 1
        tokens = _write_column(state.tokens, jnp.where(fits, chosen, EMPTY), state.count)
        stopped = fits & _ends_with(tokens, count, stops)
        ended = jnp.where(stopped, STOP, jnp.where(count >= limits, LENGTH, RUNNING))
        for wrong, reason in ((~known, SAMPLER), (inf, INF), (nan, NAN), (~cache.ok, FULL)):
            ended = jnp.where(wrong, reason, ended)
        history = state.history
        if history is not None:
            history = jax.vmap(History.append)(history, jnp.where(fits, chosen, EMPTY))
        state = State(
            token=jnp.where(live & (fits | ~known), chosen, state.token),  # one that is not known is told by its name
            position=jnp.where(fits, state.position + 1, state.position),
            reason=jnp.where(live, ended, state.reason),
            count=count,
            tokens=tokens,
            log_probs=_write_column(state.log_probs, jnp.where(fits, log_probs, 0.0), state.count),
            history=history,
        )
        return cache, state

    cache, state = jax.lax.while_loop(unfinished, step, (cache, state))
    newest = jnp.where(state.count > before, _column(state.tokens, state.count - 1), EMPTY)
    log_probs = jax.lax.bitcast_convert_type(_column(state.log_probs, state.count - 1), jnp.int32)
    newest = jnp.stack([newest, log_probs, state.reason, jnp.broadcast_to(state.count, newest.shape)])
    return fixed.cache.flatten(cache), fixed.state.flatten(state), newest


def _ends_with(tokens: Any, count: Any, stops: Any) -> Any:
    """Returns bool [B]: whether the first `count` tokens of a row end with one of the sequences."""
    at = count - stops.shape[1] + jnp.arange(stops.shape[1], dtype=jnp.int32)
    recent = jnp.where(at >= 0, jnp.take(tokens, jnp.maximum(at, 0), axis=1, mode="clip"), EMPTY)
    same = (stops == EMPTY)[None, :, :] | (recent[:, None, :] == stops[None, :, :])
    return same.all(2).any(1)


def _write_column(buffer: Any, column: Any, i: Any) -> Any:
    return jax.lax.dynamic_update_slice_in_dim(buffer, column[:, None], i, axis=1)


def _column(buffer: Any, i: Any) -> Any:
    return jax.lax.dynamic_index_in_dim(buffer, i, axis=1, keepdims=False)
