"""The native kernel as a JAX primitive: what it computes is decided where a program is lowered.

Only there it is known for how many devices, and for what platform, a program is compiled. For CPUs it calls the
library, each device for its own rows and kv heads where XLA divides the program. Where that can't be without a gather,
and in what `jax.export` writes, it is what XLA compiles.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AxisType

from jaxkv.cache.arguments import FAR
from jaxkv.cache.layer import Layer
from jaxkv.cache.pages import Pages
from jaxkv.cache.quantized import Float8, Int4, Int8
from jaxkv.cache.rows import Rows
from jaxkv.cache.spec import EMPTY, Chunk, Cross, Full, Window
from jaxkv.cache.step import Step
from jaxkv.cache.storage import Dense
from jaxkv.native.lowering import on_one_device, primitive
from jaxkv.nn import native_calls

# Only of primitives in this set a lowering learns the mesh. It has no public name; without it nothing is divided.
_REQUIRES_DEVICES: set[Primitive] | None = getattr(
    sys.modules.get("jax._src.dispatch"), "prim_requires_devices_during_lowering", None
)
MOST_QUERIES = 16  # from 32 on XLA's matrix products are faster, for some shapes
_MOST_SIZE = 1024  # of a key and of a value: kMost in attention.h
_KINDS = ("float32", "float16", "bfloat16", "Int8", "Int4", "e4m3", "e5m2")  # Type in attention.h


def obstacle(layer: Any, step: Step, dtype: Any, *, dropout: bool) -> str | None:
    """Returns why the kernel can't attend over this layer with queries of this dtype, or None if it can."""
    if not isinstance(layer, Layer) or not isinstance(layer.layout, Rows | Pages):
        return "it reads the layers of a cache"
    spec, group = layer.spec, step.groups[layer.group]
    if type(spec.reach) not in (Full, Window, Chunk, Cross):
        return f"it knows Full, Window, Chunk and Cross, not {type(spec.reach).__name__}"
    for storage in (spec.k_storage, spec.v_storage):
        if _kind(storage) not in _KINDS:
            return f"it reads Dense of {', '.join(_KINDS[:3])}, Int8, Int4 and Float8, not {storage}"
    if max(spec.head_dim, spec.value_dim) > _MOST_SIZE:
        return f"it reads vectors of up to {_MOST_SIZE} numbers"
    if spec.rotary_at == "read":
        return "it does not rotate keys when it reads them"
    if dtype.itemsize > 4 or dropout:
        return "it computes in float32, without dropout"
    if group.pages is not None and group.kv_positions.shape[1] % group.page_size:
        return "its pages are not whole"
    return None


def _kind(storage: Any) -> str:
    """Returns the name of what the kernel knows a storage by, or one that it does not know."""
    kind = type(storage)  # exactly: what is derived from it may keep its numbers otherwise
    if kind is Dense:
        return storage.dtype.name
    return storage.format if kind is Float8 else kind.__name__ if kind in (Int8, Int4) else ""


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is static in a call; hashable."""

    plan: Any
    tree: Any  # of (q, sinks, layer, step)
    compiled: Callable[..., Any]  # what XLA compiles: (plan, q, sinks, layer, step, None)
    common: Callable[..., Any] | None  # what XLA reads once for all rows: (plan, q, sinks, layer, step); None: nothing
    always: bool  # asked for by name: also where it can't be divided without a gather
    batches: tuple[tuple[int, tuple[Any, ...]], ...] = ()  # of each `jax.vmap`, the inner first: its size, and in_axes

    def as_xla(self, *leaves: Any) -> list[Any]:
        def run(*leaves: Any) -> list[Any]:
            return list(self.compiled(self.plan, *jax.tree.unflatten(self.tree, leaves), None))

        return self._mapped(run)(*leaves)

    def as_library(self, *leaves: Any) -> list[Any]:
        return self._mapped(self._calling(native_calls.together if self.batches else native_calls.alone))(*leaves)

    def divided(self, *leaves: Any) -> list[Any]:
        return self._calling(native_calls.divided)(*leaves)

    def can_be_divided(self, leaves: Any) -> bool:
        """Returns whether each device can compute its own rows and kv heads: batch row b is row b of the buffers."""
        if self.batches:
            return False
        _, _, layer, step = jax.tree.unflatten(self.tree, leaves)
        return isinstance(layer.layout, Rows) and step.whole and self.common is None

    def _calling(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*leaves: Any) -> list[Any]:
            q, sinks, layer, step = jax.tree.unflatten(self.tree, leaves)
            if self.common is None:
                return list(_library_call(call, self.plan, q, sinks, layer, step))
            *shared, begin = self.common(self.plan, q, sinks, layer, step)
            return list(_together(shared, _library_call(call, self.plan, q, None, layer, step, begin)))

        return run

    def _mapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        for size, axes in self.batches:
            function = jax.vmap(function, in_axes=axes, axis_size=size)
        return function


def native(
    plan: Any,
    q: Any,
    sinks: Any,
    layer: Any,
    step: Step,
    compiled: Callable[..., Any],
    common: Callable[..., Any] | None,
    *,
    always: bool,
) -> tuple[Any, Any]:
    """Returns attention [B, K, G, T, Hv] and the log of its denominator [B, K, G, T, 1], as `compiled` does."""
    leaves, tree = jax.tree.flatten((q, sinks, layer, step))
    call = _Call(plan, tree, compiled, common, always)
    chosen = divided_p if _on_mesh(leaves) and call.can_be_divided(leaves) else attention_p
    out, log_total = chosen.bind(*leaves, call=call)
    return out, log_total


def _on_mesh(leaves: Any) -> bool:
    """Returns whether an array lies on several devices, over which XLA divides what is done with it."""
    if _REQUIRES_DEVICES is None:
        return False
    meshes = [jax.typeof(x).sharding.mesh for x in leaves]
    return any(mesh.size > 1 and all(kind == AxisType.Auto for kind in mesh.axis_types) for mesh in meshes)


def _shapes(q: Any, *leaves: Any, call: _Call) -> Any:
    layer, shape = jax.tree.unflatten(call.tree, (q, *leaves))[2], list(q.shape)
    for _, axes in reversed(call.batches):
        if axes[0] is not None:
            shape.pop(axes[0])
    lead = (*(size for size, _ in reversed(call.batches)), *shape[:4])
    return [q.update(shape=(*lead, size)) for size in (layer.spec.value_dim, 1)]


def _batched(leaves: Any, axes: Any, *, call: _Call) -> Any:
    size = next(x.shape[axis] for x, axis in zip(leaves, axes, strict=True) if axis is not None)
    out = attention_p.bind(*leaves, call=dataclasses.replace(call, batches=(*call.batches, (size, tuple(axes)))))
    return out, [0] * len(out)


def _lower(ctx: Any, *leaves: Any, call: _Call) -> Any:
    form = call.as_library if call.always or on_one_device(ctx.module_context) else call.as_xla
    return mlir.lower_fun(form, multiple_results=True)(ctx, *leaves)


def _lower_divided(ctx: Any, *leaves: Any, call: _Call) -> Any:
    where, exported = ctx.module_context.axis_context, ctx.module_context.lowering_parameters.for_export
    if exported or not isinstance(where, mlir.ShardingContext) or where.num_devices == 1 or where.abstract_mesh is None:
        return _lower(ctx, *leaves, call=call)
    return mlir.lower_fun(call.divided, multiple_results=True)(ctx, *leaves)


def _as_xla(*leaves: Any, call: _Call) -> list[Any]:
    return call.as_xla(*leaves)


attention_p = primitive("jaxkv_attention", _shapes, _batched, _lower, _as_xla)
# XLA may divide it over the devices of a mesh.
divided_p = primitive("jaxkv_attention_divided", _shapes, _batched, _lower_divided, _as_xla)
if _REQUIRES_DEVICES is not None:
    _REQUIRES_DEVICES.add(divided_p)


def _together(*parts: Any) -> tuple[Any, Any]:
    """Returns attention over what several parts have read, each given with the log of its denominator."""
    log_total = functools.reduce(jnp.logaddexp, [log for _, log in parts])
    return sum(out * jnp.exp(log - log_total) for out, log in parts), log_total


def _library_call(
    call: Callable[..., Any], plan: Any, q: Any, sinks: Any, layer: Layer, step: Step, begin: Any = None
) -> Any:
    """Returns what `native` does, of positions from `begin` on; None: of all."""
    spec, group, reach = layer.spec, step.groups[layer.group], layer.spec.reach
    none, no_float = jnp.zeros((0,), jnp.int32), jnp.zeros((0,), jnp.float32)
    held = group.kv_positions
    if spec.drops:
        held = jnp.where(layer.stored(step, 0, layer.num_slots), held, EMPTY)
    positions, low = step.positions, reach.first(step.depths)
    spans = high = kv_spans = base = depths = none
    ancestors = jnp.zeros((0,), bool)
    if isinstance(reach, Cross):
        positions = jnp.where(positions == EMPTY, positions, FAR)
    elif step.tree is not None:
        base, depths, ancestors = step.tree.base, step.tree.depth, step.tree.ancestors
    elif step.spans is not None and group.kv_spans is not None:
        spans, kv_spans = step.spans, group.kv_spans
        high = low + (reach.size - 1) if isinstance(reach, Chunk) else jnp.full_like(low, FAR)
    if begin is not None:
        held, low = jnp.where(held < begin, EMPTY, held), jnp.maximum(low, begin)
    out, log_total = call(
        spec.value_dim,
        q,
        *_parts(layer.v),  # first, as every layer has them
        *_parts(layer.k),
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
