"""Attention as one product over all slots: builds the whole [T, S] mask, and is obviously right."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxkv.cache.step import Step
from jaxkv.nn import dropout
from jaxkv.nn.plan import Plan

LOWEST = float(jnp.finfo(jnp.float32).min)  # finite, so that exp(-inf - lowest) is 0 and not NaN


def reference(plan: Plan, q: Any, sinks: Any, layer: Any, step: Step, bits: Any) -> Any:
    """Returns attention [B, K, G, T, Hv] of q [B, K, G, T, H]; sinks [K, G] or None, bits of `dropout.draw` or None."""
    group = step.groups[layer.group]
    see = step.visible(plan.reach, group.kv_positions, group.kv_spans)  # [B, T, S]
    if layer.spec.drops:
        see &= layer.stored(step, 0, layer.num_slots)[:, None]
    used = see.any(1)[:, None, :, None]
    k, v = (jnp.where(used, x.astype(q.dtype), 0) for x in layer.read(step, 0, layer.num_slots))
    see = see[:, None, None]
    scores = plan.cap(jnp.einsum("bkgth,bksh->bkgts", q, k))
    scores = jnp.where(see, scores, -jnp.inf)
    top = scores.max(-1, keepdims=True, initial=LOWEST)
    if sinks is not None:
        top = jnp.maximum(top, sinks[None, :, :, None, None])
    top = lax.stop_gradient(top)
    p = jnp.exp(scores - top)
    total = p.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks[None, :, :, None, None] - top)
    if bits is not None:
        queries, slots = bits
        p = dropout.scale(p, dropout.kept(queries, slots, plan.dropout_rate), plan.dropout_rate)
    return jnp.einsum("bkgts,bksh->bkgth", p, v) / jnp.where(total == 0, 1, total)
