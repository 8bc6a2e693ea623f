"""One layer's buffers: put, get, read."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from jaxkv.cache.arguments import integers
from jaxkv.cache.show import show
from jaxkv.cache.spec import EMPTY, Cross, LayerSpec
from jaxkv.cache.step import Step
from jaxkv.cache.storage import joined
from jaxkv.kinds import kind_of
from jaxkv.meshes import automatic, like, spec_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Layer:
    """Keys and values of one attention layer, or of a stack of equal layers.

    A stack holds [L, ...] buffers and is meant to be the carry of a scan over layers: `stack.at(i)` is layer i with a
    traced number, `put` returns the same kind, and `.at(None)` is the whole stack again.
    """

    # On rows A = R and S = V, on pages A = P and S = page_size. Small numbers lie as bits, H may be packed.
    k: Any  # [A, K, S, H]; stacked: [L, A, K, S, H]; H is k_dim of the spec, None where that is 0
    v: Any  # [A, K, S, Hv]; stacked: [L, A, K, S, Hv]
    index: Any  # None, or int32 scalar: which layer of a stack
    group: int = dataclasses.field(metadata={"static": True})
    spec: LayerSpec = dataclasses.field(metadata={"static": True})
    layout: Any = dataclasses.field(metadata={"static": True})
    num_slots: int = dataclasses.field(metadata={"static": True})
    num_stacked: int | None = dataclasses.field(metadata={"static": True})  # None: not a stack
    # What else is kept of each token, by name, each as k is: the sides of the spec.
    sides: dict[str, Any] = dataclasses.field(default_factory=dict)

    __repr__ = show

    def at(self, index: Any) -> Layer:
        """Returns layer `index` of a stack (int32 scalar, may be traced), or the whole stack for None.

        A scan over layers takes the stack as its carry, and the body gives it back with `.at(None)`. Without that
        `lax.scan` says that carry input and carry output differ at `index`, which is None and then an array.

        Raises:
          ValueError: if this is not a stack (the cache was made without `stacked=True`), or it has no such layer.

        >>> spec = jaxkv.LayerSpec(jaxkv.Full(), num_kv_heads=1, head_dim=2)
        >>> cache = jaxkv.Cache.init([spec] * 3, num_rows=1, capacity=8, stacked=True)
        >>> cache, step = cache.begin(jnp.array([[0]]))
        >>> def body(stack, i):
        ...     k = v = jnp.ones((1, 1, 1, 2))
        ...     layer = stack.at(i).put(step, k, v)
        ...     return layer.at(None), None
        >>> stack, _ = jax.lax.scan(body, cache.layers[0], jnp.arange(3))
        >>> cache = cache.with_layers([stack])
        """
        if self.num_stacked is None:
            raise ValueError("at() chooses a layer of a stack, but this layer is not stacked: Cache.init(stacked=True)")
        if index is None:
            return dataclasses.replace(self, index=None)
        if isinstance(index, int | np.integer) and not 0 <= index < self.num_stacked:
            raise ValueError(f"at({index}): the stack has {self.num_stacked} layers, 0 to {self.num_stacked - 1}")
        return dataclasses.replace(self, index=integers("index", index))

    @property
    def buffers(self) -> tuple[Any, Any, dict[str, Any]]:
        """All that lies where the layout says: k, v and the sides."""
        return self.k, self.v, self.sides

    def with_buffers(self, buffers: tuple[Any, Any, dict[str, Any]]) -> Layer:
        """Returns this layer with other k, v and sides."""
        k, v, sides = buffers
        return dataclasses.replace(self, k=k, v=v, sides=sides)

    def put(self, step: Step, k: Any, v: Any = None, where: Any = None) -> Layer:
        """Returns this layer with the keys and values of the call's tokens stored.

        In place when the cache is donated or the carry of a loop. Every layer puts once per `begin`; tokens of padding
        and of sequences that did not fit are not stored. A Cross layer puts once per `begin_cross`: the whole output of
        the encoder, in place of what the row had. Where a length is beyond what is given here, the missing keys and
        values are NaN (0 where the storage has no NaN), so that it shows.

        Args:
          step: from the `Cache.begin` of this forward pass; for a Cross layer, from `Cache.begin_cross`.
          k: keys [B, T, num_kv_heads, head_dim], already rotated if the model rotates keys, but not where the spec
            says rotary_at="read"; stored as the spec says. For a Cross layer T is any size up to that of its reach.
          v: values [B, T, num_kv_heads, value_dim]; None where the spec says that they are in the keys (v_in_k).
          where: bool [B, T], which of these tokens the layer keeps; the others are never seen in this layer, not even
            by themselves, as if they were padding. Their positions and their places stay taken, for the sake of layers
            that do keep them. None: all. Needs `LayerSpec(..., drops=True)`.

        Raises:
          ValueError: while tracing, for shapes other than these, naming both, a step of the other kind, or `where`
            without `drops`.
        """
        reach = self.spec.reach
        self._check_step(step, cross=isinstance(reach, Cross))
        b, t = step.positions.shape
        if isinstance(reach, Cross):
            t = min([reach.size, *jnp.shape(k)[1:2]])
        if self.spec.v_in_k and v is not None:
            raise ValueError("put: v was given, but this layer's values are in its keys (v_in_k); give put(step, k)")
        for name, x, size in (("k", k, self.spec.head_dim), ("v", v, self.spec.value_dim)):
            want = (b, t, self.spec.num_kv_heads, size)
            if x is None and name == "v" and self.spec.v_in_k:
                continue
            if x is None or x.shape != want:
                given = "is missing" if x is None else f"has shape {x.shape}"
                raise ValueError(f"put: {name} {given}, this layer and step want [B, T, K, H] = {want}")
        if where is not None:
            where = jnp.asarray(where)
            if not self.spec.drops:
                raise ValueError("put(where=) leaves tokens out, which this layer can't; give its LayerSpec drops=True")
            if where.shape != (b, t) or where.dtype != bool:
                raise ValueError(f"put: where is {where.dtype}{list(where.shape)}; give bool [B, T] = {[b, t]}")
        return automatic(_put, like(self))(self, step, k, v, where)

    def read(self, step: Step, start: Any, size: int) -> tuple[Any, Any]:
        """Returns slots [start, start + size) of the call's sequences: k [B, K, size, H], v [B, K, size, Hv].

        Keys are rotated, whenever that is; those that are rotated when they are read are float32 at least. `start` may
        be traced; the stretch must lie within num_slots. On pages a traced start is a multiple of each number that
        divides both `size` and the page size, as those of blocks of whole pages are that follow one another. What is
        read where a sequence has no token means nothing.
        """

        v = PartitionSpec(*self._axes(self.v, step))
        k = v if self.spec.v_in_k else PartitionSpec(*self._axes(self.k, step))
        return automatic(functools.partial(_read, size=size), (k, v))(self, step, start)

    def pieces(self, step: Step, start: Any, size: int) -> tuple[Any, Any]:
        """Returns what `read` does as it is stored: pieces of k and of v, see `Dense.pieces`.

        The form in which `attend` reads, block by block: each piece is (numbers [B, K, size, h], factor [B, K, size, 1]
        or None). Queries, and what is read of v, are in another basis then: see `k_basis` and `v_basis`.
        """
        k, v = _block(self, step, start, size)
        spec = self.spec
        values, size = _pieces(spec.v_storage, v, spec.value_dim), spec.k_dim or spec.head_dim
        if spec.rotary_at == "read":
            own: Any = ((_rotated(self, step, _numbers(spec.k_storage, k, size), start), None),)
        else:
            own = _pieces(spec.k_storage, k, size)
        return values + own if spec.v_in_k and spec.k_dim else own, values

    def stored(self, step: Step, start: Any, size: int) -> Any:
        """Returns which tokens in slots [start, start + size) of the call's sequences the layer keeps: bool [B, size].

        It says nothing of slots that hold no token. For layers whose spec has `drops`; start and size as for `read`.
        """
        rows = PartitionSpec(self._axes(self.sides["dropped"], step)[0])
        return automatic(functools.partial(_stored, size=size), rows)(self, step, start)

    def get(self, step: Step) -> tuple[Any, Any, Any]:
        """Returns all keys and values of the call's sequences, and who sees what: the reference form.

        It fits `jax.nn.dot_product_attention(q, k, v, mask=mask)`, which gives a query that sees nothing the mean of v;
        `attend` gives it zeros and reads only what is filled.

        Returns:
          k [B, S, K, H], v [B, S, K, Hv], 0 where no token lies, mask bool [B, 1, T, S]; S is num_slots, in slot order.
        """
        self.check_step(step)
        group = step.groups[self.group]
        empty = (group.kv_positions == EMPTY)[:, None, :, None]  # what was read there may be another row's, and a NaN
        k, v = (jnp.where(empty, 0, x) for x in self.read(step, 0, self.num_slots))
        mask = step.visible(self.spec.reach, group.kv_positions, group.kv_spans)
        if self.spec.drops:
            mask &= self.stored(step, 0, self.num_slots)[:, None]
        return k.swapaxes(1, 2), v.swapaxes(1, 2), mask[:, None]

    def _axes(self, buffers: Any, step: Step) -> tuple[Any, ...]:
        """Returns the Explicit mesh axes of [B, K, S, H] read from buffers [R, K, V, H]."""
        rows, heads, _, size = spec_of(jax.tree.leaves(buffers)[0])[-4:]
        return rows if step.whole else None, heads, None, size

    def check_step(self, step: Step) -> None:
        """Raises ValueError unless queries can read this layer with `step`: same cache, of a stack one layer chosen."""
        self._check_step(step, cross=False)

    def _check_step(self, step: Step, *, cross: bool) -> None:
        if not isinstance(step, Step):
            raise ValueError(f"step is {kind_of(step)}; give the Step that cache.begin(positions) returned")
        if step.cross and not cross:
            raise ValueError(
                "this step is of cache.begin_cross(lengths), with which Cross layers put an encoder's output and "
                f"nothing else; to use a layer of {self.spec.reach} take the step of cache.begin(positions)"
            )
        if cross and not step.cross:
            raise ValueError(
                f"put: a layer of {self.spec.reach} takes an encoder's output, with the step of "
                "cache.begin_cross(lengths); this step is of cache.begin(positions), with which the layer is only read"
            )
        slots = step.groups[self.group].kv_positions.shape[-1] if self.group < len(step.groups) else 0
        if slots != self.num_slots:
            raise ValueError(
                f"this step belongs to another cache: its group {self.group} has {slots} slots, the layer has "
                f"{self.num_slots}; use the step that begin() of the same cache returned"
            )
        if self.num_stacked is not None and self.index is None:
            raise ValueError(f"a stack of {self.num_stacked} layers was used as one layer; choose one with stack.at(i)")


def _put(layer: Layer, step: Step, k: Any, v: Any, where: Any) -> Layer:
    if layer.spec.drops:
        kept = jnp.ones(k.shape[:2], bool) if where is None else where
        dropped = jnp.pad(~kept, ((0, 0), (0, layer.spec.reach.size - k.shape[1] if step.cross else 0)))
    if layer.spec.v_in_k:
        v, k = layer.spec.split(k)
    if step.cross and k.shape[1] < layer.spec.reach.size:
        missing = step.positions[:, k.shape[1] : layer.spec.reach.size] != EMPTY
        k, v = (_fill_up(x, missing) for x in (k, v))

    def write(buffers: Any, storage: Any, x: Any) -> Any:
        return jax.tree.map(
            lambda buffer, y: layer.layout.write(buffer, layer.index, step, layer.group, y),
            buffers,
            storage.encode(x),
        )

    put = {"dropped": dropped.astype(jnp.uint8)[:, :, None, None]} if layer.spec.drops else {}
    return layer.with_buffers(
        (
            write(layer.k, layer.spec.k_storage, k) if layer.spec.k_dim else None,
            write(layer.v, layer.spec.v_storage, v),
            {name: write(layer.sides[name], layer.spec.sides[name][2], x) for name, x in put.items()},
        )
    )


def _block(layer: Layer, step: Step, start: Any, size: int) -> Any:
    """Returns what lies in slots [start, start + size), of k and of v; of v twice where a key is nothing else."""
    k, v = jax.tree.map(
        lambda buffer: layer.layout.read(buffer, layer.index, step, layer.group, start, size), (layer.k, layer.v)
    )
    return v if k is None else k, v


def _stored(layer: Layer, step: Step, start: Any, *, size: int) -> Any:
    dropped = layer.layout.read(layer.sides["dropped"], layer.index, step, layer.group, start, size)
    return dropped[:, 0, :, 0] == 0


def _read(layer: Layer, step: Step, start: Any, *, size: int) -> tuple[Any, Any]:
    k, v = _block(layer, step, start, size)
    spec = layer.spec
    own, values = _numbers(spec.k_storage, k, spec.k_dim or spec.head_dim), _numbers(spec.v_storage, v, spec.value_dim)
    if spec.rotary_at == "read":
        own = _rotated(layer, step, own, start)
    return joined(values, own) if spec.v_in_k and spec.k_dim else own, values


def _rotated(layer: Layer, step: Step, k: Any, start: Any) -> Any:
    """Returns keys [B, K, size, H] of slots from `start` on rotated to their positions: float32 or wider."""
    k = k if k.dtype.itemsize > 4 else k.astype(jnp.float32)
    there = lax.dynamic_slice_in_dim(step.groups[layer.group].kv_positions, start, k.shape[2], 1)
    if step.tree is not None:
        there = step.tree.kv_depths(there)
    return layer.spec.rotary.rotate(k, there[:, None, :, None])


def _numbers(storage: Any, stored: Any, length: int) -> Any:
    x = storage.decode(stored)
    return x if x.shape[-1] == length else x[..., :length]


def _pieces(storage: Any, stored: Any, length: int) -> Any:
    pieces = storage.pieces(stored)
    if len(pieces) > 1 or pieces[0][0].shape[-1] == length:
        return pieces
    return ((pieces[0][0][..., :length], pieces[0][1]),)


def _fill_up(x: Any, missing: Any) -> Any:
    """Returns x [B, T, K, H] made longer by the columns of bool [B, S - T], with NaN where it is True.

    What was not given must not be read as if it were. Where nothing is missing no NaN is made, which
    `jax_debug_nans` would take for a fault.
    """
    fill = jnp.zeros(missing.shape, x.dtype)
    if jnp.issubdtype(x.dtype, jnp.floating):
        fill = fill / (~missing).astype(x.dtype)
    fill = jnp.broadcast_to(fill[:, :, None, None], (*missing.shape, *x.shape[2:]))
    return jnp.concatenate([x, fill], 1)
