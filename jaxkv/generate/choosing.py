"""What comes next, given the logits of each row, and why it may not be taken: what the compiled loops share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxkv.cache.spec import EMPTY
from jaxkv.generate.generation import FULL, INF, NAN, RUNNING, SAMPLER


def row_keys(key: Any, num_rows: int) -> Any:
    """Returns a PRNG key for each row, or None. A row's randomness depends on the key and its number, nothing else."""
    return None if key is None else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_rows, dtype=jnp.int32))


def choose(sampler: Any, keys: Any, positions: Any, logits: Any, history: Any) -> Any:
    """Returns the sampler's answer for each row, int32 [B]. A draw depends on the row's key and the position only.

    Args:
      sampler: as for `jaxkv.generate`.
      keys: PRNG keys [B], or None.
      positions: int32 [B], where the answers go.
      logits: float32 [B, V].
      history: a History of [B, ...]; None unless the sampler needs it.
    """

    def one(key: Any, position: Any, logits: Any, history: Any) -> Any:
        key = None if key is None else jax.random.fold_in(key, position)
        token = jnp.asarray(sampler(key, logits) if history is None else sampler(key, logits, history))
        if token.shape or not jnp.issubdtype(token.dtype, jnp.integer):
            raise ValueError(
                f"sampler {sampler} returned {token.dtype}{list(token.shape)} for the logits [V] of one row; it must "
                "return one token, an integer scalar"
            )
        return token.astype(jnp.int32)

    return jax.vmap(one)(keys, positions, logits, history)


def log_prob(logits: Any, tokens: Any) -> Any:
    """Returns log_softmax(logits [B, V]) of one token each, float32 [B]."""
    return jnp.take_along_axis(logits, tokens[:, None], 1)[:, 0] - jax.nn.logsumexp(logits, axis=1)


def fault(logits: Any, tokens: Any, ok: Any) -> Any:
    """Returns why the tokens chosen [B] can't be taken, int32 [B]: a reason, or RUNNING if nothing is wrong."""
    nan = jnp.isnan(logits).any(1)  # XLA's logsumexp may be finite for NaN
    inf = jnp.isinf(logits.max(1))
    unknown = (tokens < 0) | (tokens >= logits.shape[1])
    reason = jnp.full(tokens.shape, RUNNING, jnp.int32)
    for wrong, why in ((unknown, SAMPLER), (inf, INF), (nan, NAN), (~ok, FULL)):
        reason = jnp.where(wrong, why, reason)
    return reason


def ends_with(recent: Any, stops: Any) -> Any:
    """Returns bool [B]: whether the last tokens of a row, int32 [B, L], end one of the sequences, int32 [S, L]."""
    same = (stops == EMPTY)[None, :, :] | (recent[:, None, :] == stops[None, :, :])
    return same.all(2).any(1)
