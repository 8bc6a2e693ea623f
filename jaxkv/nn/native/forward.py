"""The native kernel as a JAX primitive: what it computes is decided where a program is lowered.

Only there it is known for how many devices, and for what platform, a program is compiled: on one CPU, or inside of
`jax.shard_map`, it calls the library, elsewhere it does what XLA compiles. Where tracing is all there is (`jax.vmap`),
it is XLA's form too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jaxkv.cache.arguments import FAR
from jaxkv.cache.layer import Layer
from jaxkv.cache.pages import Pages
from jaxkv.cache.quantized import Float8
from jaxkv.cache.rows import Rows
from jaxkv.cache.spec import EMPTY, Chunk, Cross
from jaxkv.cache.step import Step
from jaxkv.cache.storage import Dense
from jaxkv.nn.native import library

MOST_QUERIES = 16  # in a longer block XLA's matrix products are the faster form
_MOST_SIZE = 1024  # of a key and of a value: kMost in attention.h
_KINDS = ("float32", "float16", "bfloat16", "Int8", "Int4", "e4m3", "e5m2")  # Type in attention.h


def obstacle(layer: Any, step: Step, dtype: Any, *, dropout: bool) -> str | None:
    """Returns why the kernel can't attend over this layer with queries of this dtype, or None if it can."""
    if not isinstance(layer, Layer) or not isinstance(layer.layout, Rows | Pages):
        return "it reads the layers of a cache"
    spec, group = layer.spec, step.groups[layer.group]
    for storage in (spec.k_storage, spec.v_storage):
        if _kind(storage) not in _KINDS:
            return f"it reads Dense of {', '.join(_KINDS[:3])}, Int8, Int4 and Float8, not {storage}"
    if max(spec.head_dim, spec.value_dim) > _MOST_SIZE:
        return f"it reads vectors of up to {_MOST_SIZE} numbers"
    if spec.rotary_at == "read":
        return "it does not rotate keys when it reads them"
    if step.shared is not None:
        return "it does not read once what rows share"
    if dtype.itemsize > 4 or dropout:
        return "it computes in float32, without dropout"
    if group.pages is not None and group.kv_positions.shape[1] % group.page_size:
        return "its pages are not whole"
    return None


def _kind(storage: Any) -> str:
    """Returns the name of what the kernel knows a storage by, or one that it does not know."""
    if isinstance(storage, Dense):
        return storage.dtype.name
    return storage.format if isinstance(storage, Float8) else type(storage).__name__


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is static in a call; hashable."""

    plan: Any
    tree: Any  # of (q, sinks, layer, step)
    compiled: Callable[..., Any]  # what XLA compiles: (plan, q, sinks, layer, step, None)
    always: bool  # asked for by name: also where several devices run the program

    def as_xla(self, *leaves: Any) -> list[Any]:
        return list(self.compiled(self.plan, *jax.tree.unflatten(self.tree, leaves), None))

    def as_library(self, *leaves: Any) -> list[Any]:
        return list(_library_call(self.plan, *jax.tree.unflatten(self.tree, leaves)))


def native(
    plan: Any, q: Any, sinks: Any, layer: Any, step: Step, compiled: Callable[..., Any], *, always: bool
) -> tuple[Any, Any]:
    """Returns attention [B, K, G, T, Hv] and the log of its denominator [B, K, G, T, 1], as `compiled` does."""
    leaves, tree = jax.tree.flatten((q, sinks, layer, step))
    out, log_total = attention_p.bind(*leaves, call=_Call(plan, tree, compiled, always))
    return out, log_total


attention_p = Primitive("jaxkv_attention")
attention_p.multiple_results = True


@attention_p.def_impl
def _run(*leaves: Any, call: _Call) -> Any:
    with jax.disable_jit(False):
        return jax.jit(functools.partial(attention_p.bind, call=call))(*leaves)


@attention_p.def_abstract_eval
def _shapes(q: Any, *leaves: Any, call: _Call) -> Any:
    layer = jax.tree.unflatten(call.tree, (q, *leaves))[2]
    return [q.update(shape=(*q.shape[:4], size)) for size in (layer.spec.value_dim, 1)]


def _batched(leaves: Any, axes: Any, *, call: _Call) -> Any:
    out = jax.vmap(call.as_xla, in_axes=tuple(axes))(*leaves)
    return out, [0] * len(out)


batching.primitive_batchers[attention_p] = _batched


def _lower(ctx: Any, *leaves: Any, call: _Call) -> Any:
    form = call.as_library if call.always or _on_one_device(ctx.module_context) else call.as_xla
    return mlir.lower_fun(form, multiple_results=True)(ctx, *leaves)


def _on_one_device(module: Any) -> bool:
    """Returns whether each device runs the whole of the program that is lowered, in this process."""
    if module.lowering_parameters.for_export:
        return False  # to be run where there may be no library
    where = module.axis_context
    if isinstance(where, mlir.SPMDAxisContext):
        return where.mesh.size == 1 or set(where.manual_axes) == set(where.mesh.axis_names)
    return isinstance(where, mlir.ShardingContext) and where.num_devices == 1


mlir.register_lowering(attention_p, _lower, platform="cpu")
mlir.register_lowering(
    attention_p, lambda ctx, *leaves, call: mlir.lower_fun(call.as_xla, multiple_results=True)(ctx, *leaves)
)


def _library_call(plan: Any, q: Any, sinks: Any, layer: Layer, step: Step) -> Any:
    spec, group, reach = layer.spec, step.groups[layer.group], layer.spec.reach
    none, no_float = jnp.zeros((0,), jnp.int32), jnp.zeros((0,), jnp.float32)
    held = group.kv_positions
    if spec.drops:
        held = jnp.where(layer.stored(step, 0, layer.num_slots), held, EMPTY)
    positions, low = step.positions, reach.first(step.depths)
    spans = high = kv_spans = base = depths = none
    ancestors = jnp.zeros((0,), bool)
    if isinstance(reach, Cross):
        positions = jnp.where(positions == EMPTY, EMPTY, FAR)
    elif step.tree is not None:
        base, depths, ancestors = step.tree.base, step.tree.depth, step.tree.ancestors
    elif step.spans is not None and group.kv_spans is not None:
        spans, kv_spans = step.spans, group.kv_spans
        high = low + (reach.size - 1) if isinstance(reach, Chunk) else jnp.full_like(low, FAR)
    aval = jax.typeof(q)
    results = [aval.update(shape=(*q.shape[:4], spec.value_dim)), aval.update(shape=q.shape[:4])]
    call = jax.ffi.ffi_call(library.TARGET, results, vmap_method="sequential")
    out, log_total = call(
        q,
        *_parts(layer.k),
        *_parts(layer.v),
        jnp.int32(0) if layer.index is None else layer.index,
        step.rows,
        group.filled,
        held,
        low,
        positions,
        spans,
        kv_spans,
        high,
        base,
        depths,
        ancestors,
        none if group.pages is None else group.pages.table,
        no_float if sinks is None else sinks,
        k_type=np.int64(_KINDS.index(_kind(spec.k_storage))),
        v_type=np.int64(_KINDS.index(_kind(spec.v_storage))),
        inside=np.int64(spec.v_in_k),
        sinks=np.int64(reach.sinks),
        softcap=np.float32(plan.softcap or 0),
        in_order=np.int64(group.slot_is_position),
    )
    return out, log_total[..., None]


def _parts(stored: Any) -> tuple[Any, Any, Any]:
    """Returns codes, scales and groups, as they are: a reshape, fused with the put before, would copy the buffer."""
    parts = stored if isinstance(stored, dict) else {"codes": stored}
    nothing = jnp.zeros((0,), jnp.float32)
    codes, scales, groups = (parts.get(name) for name in ("codes", "scales", "groups"))
    return tuple(nothing if x is None else x for x in (codes, scales, groups))  # type: ignore[return-value]
