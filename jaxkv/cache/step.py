"""What one forward pass tells the layers: positions, and where its tokens lie."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GroupStep:
    """Where the tokens of one call lie in the layers of one group, and what lies beside them."""

    slots: Any  # int32 [B, T]; num_slots: nowhere
    kv_positions: Any  # int32 [B, V], after the call's own tokens; EMPTY where nothing lies
    kv_spans: Any  # int32 [B, V], 0: none; None if the call has no spans
    filled: Any  # int32 [B]; slots from here on are empty
    slot_is_position: bool = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
    """Positions and addresses of one forward pass, made by `Cache.begin`; lives as long as the trace it was made in."""

    positions: Any  # int32 [B, T]; EMPTY: padding, or a token of a sequence that did not fit
    rows: Any  # int32 [B], the sequence that each batch row continues
    ok: Any  # bool [B], False where the sequence did not fit in this call
    spans: Any  # int32 [B, T], 0: causal; None: all causal
    groups: tuple[GroupStep, ...]
    whole: bool = dataclasses.field(metadata={"static": True})  # batch row b is sequence b
