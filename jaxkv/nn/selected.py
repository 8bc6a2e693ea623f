"""Attention over chosen slots: each query reads its own, and no others.

DeepSeek-AI 2025, "DeepSeek-V3.2", https://arxiv.org/abs/2512.02556: an indexer scores all tokens by one small vector of
each, and attention reads the best of them.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxkv.cache.step import Step
from jaxkv.nn.plan import Plan
from jaxkv.nn.reference import LOWEST

_AT_ONCE = 4096  # keys of a row that are read together


def selected(plan: Plan, q: Any, sinks: Any, layer: Any, step: Step, slots: Any) -> Any:
    """Returns attention [B, K, G, T, Hv] of q [B, K, G, T, H] over slots int32 [B, T, n]; sinks [K, G] or None.

    Reverse mode goes through the gather: what was read of a key twice adds up.
    """
    group = step.groups[layer.group]
    see = step.visible(plan.reach, group.kv_positions, group.kv_spans)  # [B, T, S]
    if layer.spec.drops:
        see &= layer.stored(step, 0, layer.num_slots)[:, None]
    there = (slots >= 0) & (slots < layer.num_slots)
    slots = jnp.clip(slots, 0, layer.num_slots - 1)
    see = there & jnp.take_along_axis(see, slots, 2)
    batch, _, num = slots.shape

    def one(query: Any) -> Any:
        q, slots, see = query  # [B, K, G, H], [B, n], [B, n]
        used = see[:, :, None, None]
        k, v = (jnp.where(used, x.astype(q.dtype), 0) for x in layer.read_at(step, slots))  # [B, n, K, H]
        scores = plan.cap(jnp.einsum("bkgh,bskh->bkgs", q, k))
        scores = jnp.where(see[:, None, None], scores, -jnp.inf)
        top = scores.max(-1, keepdims=True, initial=LOWEST)
        if sinks is not None:
            top = jnp.maximum(top, sinks[None, :, :, None])
        top = lax.stop_gradient(top)
        p = jnp.exp(scores - top)
        total = p.sum(-1, keepdims=True)
        if sinks is not None:
            total = total + jnp.exp(sinks[None, :, :, None] - top)
        return jnp.einsum("bkgs,bskh->bkgh", p, v) / jnp.where(total == 0, 1, total)

    queries = jnp.moveaxis(q, 3, 0), slots.swapaxes(0, 1), see.swapaxes(0, 1)
    if slots.shape[1] == 1:
        return jnp.moveaxis(one([x[0] for x in queries])[None], 0, 3)
    return jnp.moveaxis(lax.map(one, queries, batch_size=max(1, _AT_ONCE // num)), 0, 3)
