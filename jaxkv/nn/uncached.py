"""`self_attend` and `cross_attend`: the same attention without a cache, the form for training."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxkv.cache.arguments import chosen
from jaxkv.cache.spec import EMPTY, Cross, Full, LayerSpec, Reach
from jaxkv.cache.step import GroupStep, Step
from jaxkv.nn import call, dropout


def self_attend(
    q: Any,
    k: Any,
    v: Any,
    *,
    reach: Reach = Full(),
    positions: Any = None,
    spans: Any = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Any = None,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    broadcast_dropout: bool = True,
    select: Any = None,
    implementation: str = "auto",
) -> Any:
    """Returns attention of a block of tokens over itself, without a cache: the form for training.

    The same rule and the same arithmetic as `attend` after a `put` into an empty cache.

    Args:
      q: queries [B, T, N, H], any floating dtype.
      k: keys [B, T, K, H]; N is a multiple of K.
      v: values [B, T, K, Hv].
      reach: which past tokens a query may see.
      positions: int32 [B, T], EMPTY (-1) for padding; None means 0, 1, 2, ... in every row.
      spans: None, or int32 [B, T]: tokens with the same span other than 0 see each other in both directions.
      scale, softcap, sink_logits, implementation: as in `attend`.
      dropout_rate: share of the attention weights left out at random, at least 0, below 1; the others grow by
        1 / (1 - dropout_rate).
      dropout_key: the PRNG key that chooses them; not needed at a rate of 0.
      broadcast_dropout: whether all rows and heads leave out the same, as by default in Flax.
      select: None, or int [B, T, n], the tokens of the block that each query reads, as in `attend`; without dropout.

    Returns:
      [B, T, N, Hv] in q's dtype.

    Raises:
      ValueError: while tracing, for shapes or dtypes that don't fit together, as in `attend`, and for a dropout_rate
        without a key.

    >>> x = jnp.ones((1, 3, 2, 4))
    >>> self_attend(x, x, x, reach=jaxkv.Window(2)).shape
    (1, 3, 2, 4)
    """
    if isinstance(reach, Cross):
        raise ValueError(f"reach={reach} is for an encoder's output; attend over that with cross_attend")
    batch, length = _check_fresh(k, v)
    in_order = positions is None
    if in_order:
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    if positions.shape != (batch, length) or not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(f"positions must be int32 [B, T] = {(batch, length)}, got {positions.dtype}{positions.shape}")
    positions = jnp.maximum(positions.astype(jnp.int32), EMPTY)
    group = GroupStep(
        slots=None,
        kv_positions=positions,
        kv_spans=spans,
        filled=jnp.full((batch,), length, jnp.int32),
        pages=None,
        slot_is_position=in_order,
    )
    rest = {"scale": scale, "softcap": softcap, "sink_logits": sink_logits, "implementation": implementation}
    chance = dropout_rate, dropout_key, broadcast_dropout
    if select is not None:
        if dropout_rate:
            raise ValueError(f"select with dropout_rate={dropout_rate}: chosen tokens are read without dropout; give 0")
        rest["select"] = chosen(select, (batch, length))
    return _attend(q, k, v, reach, positions, spans, group, chance, rest)


def cross_attend(
    q: Any,
    k: Any,
    v: Any,
    *,
    lengths: Any = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Any = None,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    broadcast_dropout: bool = True,
    implementation: str = "auto",
) -> Any:
    """Returns attention of queries over an encoder's output, without a cache: the form for training.

    Every query sees all keys of its batch row, whatever its place. The same arithmetic as `attend` over a Cross layer.

    Args:
      q: queries [B, T, N, H], any floating dtype.
      k: keys [B, S, K, H]; N is a multiple of K.
      v: values [B, S, K, Hv].
      lengths: int [B], how many keys of each row are real; None means all. Queries of a row without any get zeros.
      scale, softcap, sink_logits, implementation: as in `attend`.
      dropout_rate, dropout_key, broadcast_dropout: as in `self_attend`.

    Returns:
      [B, T, N, Hv] in q's dtype.

    Raises:
      ValueError: while tracing, for shapes or dtypes that don't fit together, as in `attend`, and for a dropout_rate
        without a key.

    >>> k = jnp.zeros((1, 3, 1, 2))
    >>> v = jnp.array([1.0, 3.0, 9.0]).reshape(1, 3, 1, 1)
    >>> cross_attend(jnp.ones((1, 1, 1, 2)), k, v, lengths=jnp.array([2])).item()
    2.0
    """
    batch, size = _check_fresh(k, v)
    lengths = jnp.full((batch,), size, jnp.int32) if lengths is None else jnp.asarray(lengths)
    if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(f"lengths must be int [B] = {(batch,)}, got {lengths.dtype}{lengths.shape}")
    lengths = jnp.clip(lengths.astype(jnp.int32), 0, size)
    slots = jnp.arange(size, dtype=jnp.int32)[None, :]
    group = GroupStep(
        slots=None,
        kv_positions=jnp.where(slots < lengths[:, None], slots, EMPTY),
        kv_spans=None,
        filled=lengths,
        pages=None,
        slot_is_position=False,
    )
    positions = jnp.zeros((batch, *jnp.shape(q)[1:2]), jnp.int32)
    rest = {"scale": scale, "softcap": softcap, "sink_logits": sink_logits, "implementation": implementation}
    chance = dropout_rate, dropout_key, broadcast_dropout
    return _attend(q, k, v, Cross(max(size, 1)), positions, None, group, chance, rest)


def _check_fresh(k: Any, v: Any) -> tuple[int, int]:
    if getattr(k, "ndim", None) != 4 or getattr(v, "ndim", None) != 4 or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k {jnp.shape(k)} and v {jnp.shape(v)} must be [B, T, K, H] and [B, T, K, Hv]")
    return k.shape[0], k.shape[1]


def _attend(
    q: Any, k: Any, v: Any, reach: Reach, positions: Any, spans: Any, group: GroupStep, chance: Any, rest: Any
) -> Any:
    """Returns attention over k [B, S, K, H] and v, which `group` describes, of queries at positions [B, T]."""
    batch, num_slots, num_kv_heads, head_dim = k.shape
    spec = LayerSpec(reach, num_kv_heads, head_dim, v.shape[3])
    fresh = _Fresh(k.swapaxes(1, 2), v.swapaxes(1, 2), spec, 0, num_slots)
    rows = jnp.arange(batch, dtype=jnp.int32)
    step = Step(positions, rows, jnp.ones((batch,), bool), spans, (group,), whole=True)
    return call.run(q, fresh, step, **rest, chance=dropout.Chance(*chance))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Fresh:
    """The keys and values of one call, read as a Layer is read."""

    k: Any  # [B, K, T, H]
    v: Any  # [B, K, T, Hv]
    spec: LayerSpec = dataclasses.field(metadata={"static": True})
    group: int = dataclasses.field(metadata={"static": True})
    num_slots: int = dataclasses.field(metadata={"static": True})

    def pieces(self, step: Step, start: Any, size: int) -> tuple[Any, Any]:
        k, v = self.read(step, start, size)
        return ((k, None),), ((v, None),)

    def read(self, step: Step, start: Any, size: int) -> tuple[Any, Any]:
        k, v = (x if step.whole else jnp.take(x, step.rows, axis=0, mode="clip") for x in (self.k, self.v))
        if size == self.num_slots:
            return k, v
        return lax.dynamic_slice_in_dim(k, start, size, 2), lax.dynamic_slice_in_dim(v, start, size, 2)

    def read_at(self, step: Step, slots: Any) -> tuple[Any, Any]:
        """Returns what `Layer.read_at` does."""
        k, v = (jnp.take_along_axis(x, slots[:, None, :, None], 2).swapaxes(1, 2) for x in (self.k, self.v))
        return k, v
