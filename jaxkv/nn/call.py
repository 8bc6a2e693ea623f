"""One call of attention, whatever it reads from: its checks, its scale, its heads, and the form that computes it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxkv.cache.spec import EMPTY
from jaxkv.cache.step import Step
from jaxkv.errors import NotSupportedError
from jaxkv.meshes import automatic, spec_of, vary_alike
from jaxkv.native import library
from jaxkv.nn import dropout, native
from jaxkv.nn.blockwise import blockwise
from jaxkv.nn.plan import Plan
from jaxkv.nn.reference import reference
from jaxkv.nn.selected import selected

IMPLEMENTATIONS = ("auto", "reference", "blockwise", "native")


def run(
    q: Any,
    layer: Any,
    step: Step,
    scale: Any,
    softcap: float | None,
    sink_logits: Any,
    implementation: str,
    chance: dropout.Chance = dropout.NONE,
    select: Any = None,
    most: int | None = None,
) -> Any:
    """Returns attention [B, T, N, Hv] of q [B, T, N, H] over a layer, or over what is read like one.

    Blocks are read once for up to `most` queries, if that is more than would be taken at a time otherwise.

    Raises:
      ValueError: while tracing, for what does not fit together.
    """
    _check(q, step.positions.shape, layer.spec, softcap, sink_logits, implementation)
    if not q.size or not layer.num_slots:
        return jnp.zeros((*q.shape[:3], layer.spec.value_dim), q.dtype)
    shares = step.shared is not None
    plan = Plan.choose(layer.spec, step.groups[layer.group], q.shape, softcap, chance.rate, shares=shares, most=most)
    if implementation in ("auto", "native"):
        plan = dataclasses.replace(plan, native=_native(q, layer, step, implementation, dropout=bool(chance.rate)))
    key = chance.key if chance.rate else None
    return _run(plan, implementation, chance.broadcast, q, layer, step, scale, sink_logits, key, select)


def obstacle(q: Any, layer: Any, step: Step, *, dropout: bool = False) -> str | None:
    """Returns why the kernel in C++ can't do this call, or None if it can; q has a shape [B, T, N, H] and a dtype."""
    if jax.default_backend() != "cpu":
        return f"it is for CPUs, and the default backend is {jax.default_backend()}"
    return native.obstacle(layer, step, jnp.dtype(q.dtype), dropout=dropout) or library.problem()


def _native(q: Any, layer: Any, step: Step, implementation: str, *, dropout: bool) -> str:
    """Returns the `native` of the call's plan."""
    if implementation == "auto" and q.shape[1] > native.MOST_QUERIES:
        return "never"
    reason = obstacle(q, layer, step, dropout=dropout)
    if implementation == "auto":
        return "never" if reason else "alone"
    if reason:
        raise NotSupportedError(
            f"implementation='native' can't be had for this call: {reason}; 'auto' reads it in another form"
        )
    return "always"


def _check(q: Any, positions: tuple[int, ...], spec: Any, softcap: Any, sink_logits: Any, implementation: str) -> None:
    if getattr(q, "ndim", None) != 4:
        raise ValueError(f"q has shape {jnp.shape(q)}; attend needs [B, T, N, H]")
    batch, length, num_heads, size = q.shape
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q is {q.dtype}; attend needs a floating dtype; cast it: q.astype(jnp.float32)")
    if (batch, length) != positions:
        raise ValueError(f"q has [B, T] = {(batch, length)}, the call's positions have {positions}; they must agree")
    if size != spec.head_dim:
        raise ValueError(f"q has head_dim {size}, the keys have {spec.head_dim}; project q to {spec.head_dim}")
    if num_heads % spec.num_kv_heads:
        raise ValueError(
            f"{num_heads} query heads are not a multiple of {spec.num_kv_heads} kv heads; "
            f"{num_heads - num_heads % spec.num_kv_heads or spec.num_kv_heads} would be"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap}: it bounds the scores and must be above 0; None turns it off")
    if sink_logits is not None:
        if jnp.shape(sink_logits) != (num_heads,):
            raise ValueError(f"sink_logits has shape {jnp.shape(sink_logits)}; give one per query head: ({num_heads},)")
        if not jnp.issubdtype(jnp.result_type(sink_logits), jnp.floating):
            raise ValueError(f"sink_logits is {jnp.result_type(sink_logits)}; give a floating dtype")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}; choose one of {', '.join(map(repr, IMPLEMENTATIONS))}")


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # equal layers of a model are traced once
def _run(plan: Plan, implementation: str, broadcast: bool, q: Any, *rest: Any) -> Any:
    form = functools.partial(_form, plan, reference if implementation == "reference" else blockwise, broadcast)
    return automatic(form, PartitionSpec(*spec_of(q)[:3]))(q, *rest)


def _form(
    plan: Plan,
    form: Any,
    broadcast: bool,
    q: Any,
    layer: Any,
    step: Step,
    scale: Any,
    sinks: Any,
    key: Any,
    select: Any,
) -> Any:
    batch, length, num_heads, size = q.shape
    heads = layer.spec.num_kv_heads
    dtype = q.dtype if q.dtype.itemsize > 4 else jnp.dtype("float32")
    real = (step.positions != EMPTY)[:, :, None, None]  # what padding holds must not reach a key's gradient
    x = jnp.where(real, q.astype(dtype) * jnp.asarray(size**-0.5 if scale is None else scale, dtype), 0)
    x = x.reshape(batch, length, heads, num_heads // heads, size).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    if sinks is not None:
        sinks = jnp.asarray(sinks).astype(dtype).reshape(heads, num_heads // heads)
    bits = None if key is None else dropout.draw(key, x.shape[:4], layer.num_slots, broadcast=broadcast)
    if select is not None:
        out = selected(plan, *vary_alike((x, sinks, layer, step, select)))
        return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, num_heads, -1).astype(q.dtype)
    if form is blockwise:  # it reads keys and values in the basis in which they are stored
        x = layer.spec.k_basis(x)
    out = form(plan, *vary_alike((x, sinks, layer, step, bits)))  # [B, K, G, T, Hv]
    if form is blockwise:
        out = layer.spec.v_basis(out)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, num_heads, -1).astype(q.dtype)
