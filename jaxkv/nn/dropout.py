"""Dropout of attention weights without an array of queries times slots.

Each query and each slot draws one number; whether a weight is kept is a hash of the two. So every form, forward and
backward, whatever its tiles and blocks, finds the same mask again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def check_rate(rate: Any) -> None:
    """Raises ValueError unless rate is a number from 0 to below 1, known while tracing."""
    if isinstance(rate, jax.core.Tracer) or not 0 <= rate < 1:
        raise ValueError(f"dropout_rate={rate}: give a number from 0 to below 1, the share of weights left out")


@dataclasses.dataclass(frozen=True)
class Chance:
    """The dropout of a call.

    Args:
      rate: the share of the weights that is left out.
      key: the PRNG key that chooses them; None at a rate of 0.
      broadcast: whether all rows and heads share one mask.

    Raises:
      ValueError: for a rate outside [0, 1), or above 0 without a key.
    """

    rate: float = 0.0
    key: Any = None
    broadcast: bool = True

    def __post_init__(self) -> None:
        check_rate(self.rate)
        if self.rate and self.key is None:
            raise ValueError(
                f"dropout_rate={self.rate} needs dropout_key, a PRNG key such as jax.random.key(0); 0 needs none"
            )


NONE = Chance()


def draw(key: Any, lead: tuple[int, ...], num_slots: int, *, broadcast: bool) -> tuple[Any, Any]:
    """Returns the numbers that the mask is made of: of the queries uint32 [B, K, G, T, 1], of the slots uint32 [S].

    Args:
      key: a PRNG key.
      lead: [B, K, G, T].
      num_slots: S.
      broadcast: whether all rows and heads share one mask; B, K and G of the result are then 1.
    """
    of_queries, of_slots = jax.random.split(key)
    shape = (1, 1, 1, lead[3], 1) if broadcast else (*lead, 1)
    return jax.random.bits(of_queries, shape, "uint32"), jax.random.bits(of_slots, (num_slots,), "uint32")


def kept(queries: Any, slots: Any, rate: float) -> Any:
    """Returns which weights stay: bool, the broadcast shape of queries [..., T, 1] and slots [S]."""
    x = _mix(queries ^ slots.reshape((1,) * (queries.ndim - 1) + (-1,)))
    return _mix(x + queries) >= np.uint32(min(round(rate * 2**32), 2**32 - 1))


def _mix(x: Any) -> Any:
    """The finalizer of MurmurHash3 (Appleby): a bit of x changes each bit of the result half the time. uint32."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def scale(p: Any, keep: Any, rate: float) -> Any:
    """Returns weights p where they are kept, made larger so that their expected value stays."""
    return jnp.where(keep, p / (1 - rate), 0)


def key_of_call(module: Any, layer: Any, deterministic: bool | None, draw: Callable[[], Any]) -> Any:
    """Returns a key for the dropout of a module's call, from `draw`, or None for no dropout.

    Raises:
      ValueError: if a layer was given to train with, or nobody says whether there is dropout.
    """
    if layer is not None:
        if deterministic is False:
            raise ValueError(
                "deterministic=False, and a layer was given; with a cache there is no dropout: train without one, "
                "attn(x, deterministic=False)"
            )
        return None
    if not module.dropout_rate:
        return None
    deterministic = module.deterministic if deterministic is None else deterministic
    if deterministic is None:
        raise ValueError(
            f"dropout_rate={module.dropout_rate}, and it is not known whether to apply it; give deterministic=False "
            "(training) or True (evaluation), to the call or to the module"
        )
    return None if deterministic else draw()


def draw_nnx(module: Any, rngs: Any) -> Any:
    """Returns a key for dropout: from the call's rngs, or the module's own."""
    rngs = module.rngs if rngs is None else rngs
    if rngs is None:
        raise ValueError(
            f"dropout_rate={module.dropout_rate}, and the module keeps no random stream (keep_rngs=False); give the "
            "call one: attn(x, rngs=nnx.Rngs(dropout=0))"
        )
    return rngs.dropout() if isinstance(rngs, nnx.Rngs) else rngs()


def draw_linen(module: Any, key: Any) -> Any:
    """Returns a key for dropout: that of the call, or one of the stream "dropout"."""
    return module.make_rng("dropout") if key is None else key
