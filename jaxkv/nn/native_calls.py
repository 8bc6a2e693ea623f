"""The call of the library: for one batch, for several at once (`jax.vmap`), and divided over devices.

Its operands are, in this order:
- q [B, K, G, T, H];
- buffers as they lie, [A, K, S, X] or in a stack [L, A, K, S, X];
- the number of the layer in the stack, [];
- arrays of the batch, [B, ...]: first `rows`, which of A each batch row reads; last the table of pages, which of A each
  of its pages is;
- sink logits [K, G].
What a call does not have is an array of no elements.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import ArrayMapping, SdyShardingRule, custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from jaxkv.native.library import ATTENTION

_NO_MESH = jax.sharding.AbstractMesh((), ())


def alone(size: int, *operands: Any, **attributes: Any) -> list[Any]:
    """Returns attention [B, K, G, T, size] and the log of its denominator [B, K, G, T]."""
    aval = jax.typeof(operands[0])
    results = [aval.update(shape=(*aval.shape[:4], size)), aval.update(shape=aval.shape[:4])]
    return list(jax.ffi.ffi_call(ATTENTION, results)(*operands, **attributes))


def together(size: int, *operands: Any, **attributes: Any) -> list[Any]:
    """Returns what `alone` does, and under `jax.vmap` calls the library once for all: their rows are one batch."""

    @custom_vmap
    def call(*operands: Any) -> Any:
        return alone(size, *operands, **attributes)

    @call.def_vmap
    def rule(count: int, mapped: list[bool], *operands: Any) -> Any:
        if mapped[-1]:  # the library has one set of sink logits for all rows
            many = [_spread(count, x, is_mapped) for x, is_mapped in zip(operands, mapped, strict=True)]
            return jax.lax.map(lambda one: together(size, *one, **attributes), many), [True, True]
        results = together(size, *_one_batch(count, mapped, operands), **attributes)
        return [x.reshape(count, -1, *x.shape[1:]) for x in results], [True, True]

    return call(*operands)


def _spread(count: int, x: Any, mapped: bool) -> Any:
    return x if mapped else jnp.broadcast_to(x, (count, *x.shape))


def _one_batch(count: int, mapped: list[bool], operands: Any) -> list[Any]:
    """Returns operands of one call for those of `count`: where mapped, arrays have a first axis of so many."""
    ranks = [x.ndim - is_mapped for x, is_mapped in zip(operands, mapped, strict=True)]
    number = ranks.index(0)  # of the layer
    place, table = number + 1, len(operands) - 2

    def spread(i: int) -> Any:
        return _spread(count, operands[i], mapped[i])

    stacked, own = ranks[1] == 5, any(mapped[1:number])
    lead = operands[1].shape[mapped[1] :][: 1 + stacked]
    layers, lanes = lead[0] if stacked else 1, lead[-1]
    first = jnp.clip(spread(number), 0, layers - 1) + layers * jnp.arange(count, dtype=jnp.int32) * int(own)
    first = (first * lanes)[:, None]  # of A, where those of one of the calls begin

    result = list(operands)
    for i in range(1, number):
        if operands[i].size:
            x = spread(i) if own else operands[i]
            result[i] = x if x.ndim == 4 else x.reshape(-1, *x.shape[-3:])
    result[number] = jnp.int32(0)
    for i in (0, *range(place, table + 1)):
        if operands[i].size:
            x = spread(i)
            if i == place:
                x = jnp.clip(x, 0, lanes - 1) + first
            if i == table:
                x = jnp.where((x >= 0) & (x < lanes), x + first[..., None], -1)
            result[i] = x.reshape(-1, *x.shape[2:])
    return result


def divided(size: int, *operands: Any, **attributes: Any) -> list[Any]:
    """Returns what `alone` does; XLA may divide the call over devices, by batch rows and by kv heads.

    Batch row b has to be row b of the buffers.
    """
    given = [i for i, x in enumerate(operands) if x.size]
    axes, kinds = [_axes(i, operands) for i in given], [(x.shape, x.dtype) for x in operands]

    def part(*some: Any) -> Any:
        with jax.sharding.use_abstract_mesh(_NO_MESH):  # XLA asks for it while the user's mesh is set
            of_device = dict(zip(given, some, strict=True))
            every = [of_device[i] if i in of_device else jnp.zeros(*kind) for i, kind in enumerate(kinds)]
            number = [x.ndim for x in every].index(0)
            every[number + 1] = jnp.arange(every[0].shape[0], dtype=jnp.int32)
            return tuple(alone(size, *every, **attributes))

    call = custom_partitioning(part)
    call.def_partition(
        partition=functools.partial(_partition, part, axes),
        infer_sharding_from_operands=lambda mesh, args, results: _places(args[0], axes)[1],
        sharding_rule=_rule(axes),
    )
    return list(call(*(operands[i] for i in given)))


_RESULTS = ("bk...", "bk..")


def _axes(i: int, operands: Any) -> str:
    """Returns a letter for each axis of an operand: b batch rows, k kv heads, or . for others."""
    rank = operands[i].ndim
    if i == 0:
        return "bk..."
    if i == len(operands) - 1:
        return "k."
    if rank >= 4:
        return "bk..".rjust(rank, ".")
    return "b".ljust(rank, ".") if rank else ""


def _rule(axes: list[str]) -> SdyShardingRule:
    names: list[str] = []

    def mapping(letters: str) -> ArrayMapping:
        dims = []
        for letter in letters:
            if letter == ".":  # an axis that no device may have a part of
                names.append(f"u{len(names)}")
            dims.append(names[-1] if letter == "." else letter)
        return ArrayMapping(*dims)

    operands = tuple(map(mapping, axes))
    results = tuple(map(mapping, _RESULTS))
    return SdyShardingRule(operands, results, need_replication_factors=tuple(names))


def _places(q: Any, axes: list[str]) -> tuple[Any, Any]:
    """Returns shardings of the operands and of the results, by that of q."""
    mesh, spec = q.sharding.mesh, (*q.sharding.spec, None, None)
    chosen = dict(zip("bk", spec, strict=False))

    def place(letters: str) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*(chosen.get(letter) for letter in letters)))

    return tuple(map(place, axes)), tuple(map(place, _RESULTS))


def _partition(part: Callable[..., Any], axes: list[str], mesh: Any, args: Any, results: Any) -> Any:
    operands, out = _places(args[0], axes)
    return mesh, part, out, operands
