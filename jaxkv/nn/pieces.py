"""Products with keys and values as they are stored, in pieces: never with a copy of them in full precision.

A storage says in which pieces its vectors lie, one after another along head_dim, and by which factor the numbers of a
piece are multiplied (`Dense.pieces`). A factor per slot goes to the scores, or to the weights, of which there are fewer
than numbers.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

Pieces = tuple[tuple[Any, Any], ...]  # (numbers [B, K, S, h], factor [B, K, S, 1] or None)


def masked(pieces: Pieces, used: Any, dtype: Any) -> Pieces:
    """Returns the pieces in a dtype to compute in, 0 in the slots where `used` [B, 1, S, 1] is False.

    NaN in a slot that nobody may see must not meet a product, not even with a weight of 0.
    """
    return tuple(
        (jnp.where(used, numbers.astype(dtype), 0), None)
        if factor is None
        else (numbers.astype(dtype), jnp.where(used, factor.astype(dtype), 0))
        for numbers, factor in pieces
    )


def score(q: Any, k: Pieces, *, keys_first: bool) -> Any:
    """Returns the products of q [B, K, R, H] with all keys: [B, K, R, S]."""
    total, begin = None, 0
    for numbers, factor in k:
        end = begin + numbers.shape[-1]
        part = q if len(k) == 1 else q[..., begin:end]
        if keys_first:
            scores = jnp.einsum("bksh,bkrh->bksr", numbers, part).swapaxes(2, 3)
        else:
            scores = jnp.einsum("bkrh,bksh->bkrs", part, numbers)
        scores = scores if factor is None else scores * factor.swapaxes(2, 3)
        total, begin = scores if total is None else total + scores, end
    return total


def mix(p: Any, v: Pieces) -> Any:
    """Returns the sums of all values by the weights p [B, K, R, S]: [B, K, R, Hv]."""
    sums = [
        jnp.einsum("bkrs,bksh->bkrh", p if factor is None else p * factor.swapaxes(2, 3), numbers)
        for numbers, factor in v
    ]
    return sums[0] if len(sums) == 1 else jnp.concatenate(sums, -1)
