"""Making a cache: what is asked for, checked; its parts, empty; and where they are placed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from jaxkv.cache.arguments import checked_size
from jaxkv.cache.cross import Encoded
from jaxkv.cache.group import READ_BLOCK, Group
from jaxkv.cache.layer import Layer
from jaxkv.cache.recurrent import States
from jaxkv.cache.spec import Cross, LayerSpec, Reach, Recurrent
from jaxkv.cache.state_layer import StateLayer

_LONGEST_BLOCK = 512  # by default; longer ones make a prompt hardly faster


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a cache, as they are kept."""

    num_rows: int
    capacity: int
    max_block: int
    slack: int

    @classmethod
    def of(
        cls, specs: Sequence[LayerSpec], num_rows: Any, capacity: Any, max_block: Any, slack: Any, layout: Any
    ) -> Sizes:
        """Returns them checked, with the default of max_block."""
        num_rows = checked_size("Cache.init", "num_rows", num_rows, 1)
        capacity = checked_size("Cache.init", "capacity", capacity, 1)
        slack = checked_size("Cache.init", "slack", slack, 0)
        if max_block is None:
            max_block = min(default_block([spec.reach for spec in specs], capacity), layout.most(capacity))
        max_block = checked_size("Cache.init", "max_block", max_block, 1)
        return cls(num_rows, capacity, min(max_block, capacity), slack)


def default_block(reaches: Iterable[Reach], capacity: int) -> int:
    """Returns how many tokens of one sequence a `begin` takes unless the user says it.

    A ring is this much longer than its reach. As long as the shortest reach that wraps, it doubles the ring at most.

    >>> import jaxkv
    >>> default_block([jaxkv.Full(), jaxkv.Window(128)], 4096), default_block([jaxkv.Full()], 4096)
    (128, 512)
    """
    wrapping = [
        reach.size
        for reach in reaches
        if reach.size is not None and reach.size < capacity and not isinstance(reach, Cross)
    ]
    shortest = min([_LONGEST_BLOCK, *wrapping])
    return max(READ_BLOCK, 1 << (shortest.bit_length() - 1))


def checked_specs(specs: Any) -> tuple[LayerSpec, ...]:
    """Returns the specs of all layers.

    Raises:
      ValueError: for anything else, with what to give instead.
    """
    kind = type(specs).__name__
    if isinstance(specs, LayerSpec):
        raise ValueError(f"Cache.init got one {specs}; give one per layer, in a list: Cache.init([spec] * num_layers)")
    if hasattr(specs, "specs"):
        call = "()" if callable(specs.specs) else ""
        raise ValueError(f"Cache.init got a {kind}; give the specs of its layers: Cache.init(model.specs{call}, ...)")
    if hasattr(specs, "layer_spec"):
        raise ValueError(f"Cache.init got a {kind}; give its spec, in a list: Cache.init([layer.layer_spec()], ...)")
    if not isinstance(specs, Iterable):
        raise ValueError(
            f"Cache.init got a {kind}; give a list with one jaxkv.LayerSpec per layer of the model, such as "
            "[block.attention.layer_spec() for block in model.blocks] of jaxkv's attention modules"
        )
    specs = tuple(specs)
    for spec in specs:
        if not isinstance(spec, LayerSpec):
            given = f"a {type(spec).__name__}" if callable(spec) else repr(spec)
            instead = "its layer_spec()" if hasattr(spec, "layer_spec") else "one jaxkv.LayerSpec per layer"
            raise ValueError(f"specs holds {given}; give {instead}")
    if not specs:
        raise ValueError("specs is empty; give one jaxkv.LayerSpec per layer of the model")
    for i, spec in enumerate(specs):
        if spec.shares is not None:
            _check_shared(specs, i, spec.shares)
    crosses = list(dict.fromkeys(spec.reach for spec in specs if isinstance(spec.reach, Cross)))
    if len(crosses) > 1:
        raise ValueError(
            f"{crosses[0]} and {crosses[1]} in one cache: all Cross layers read the output of one encoder; give "
            "them the larger size"
        )
    return specs


def _check_shared(specs: tuple[LayerSpec, ...], i: int, shares: int) -> None:
    """Raises ValueError unless layer i can read what layer `shares` keeps."""
    if shares >= i:
        which = "itself" if shares == i else "a later layer"
        raise ValueError(f"layer {i} shares layer {shares}, {which}; give the number of a layer before it")
    source = specs[shares]
    if source.shares is not None:
        raise ValueError(
            f"layer {i} shares layer {shares}, which shares layer {source.shares}; give shares={source.shares}"
        )
    for field in dataclasses.fields(source):
        mine, its = getattr(specs[i], field.name), getattr(source, field.name)
        if field.name != "shares" and mine != its:
            raise ValueError(
                f"layer {i} shares layer {shares}, but has {field.name}={mine}, and that layer {its}; it reads "
                "what lies there, so make them equal"
            )


def stored_as(specs: Iterable[LayerSpec], storage: Any) -> tuple[LayerSpec, ...]:
    """Returns the specs with their numbers kept in another way.

    Args:
      specs: one LayerSpec per layer.
      storage: a storage for all keys and values, or a pair: of keys, of values; None: as the specs say. Recurrent
        layers have neither.

    Raises:
      ValueError: if it can't hold the vectors of a layer.

    >>> import jaxkv
    >>> spec = jaxkv.LayerSpec(jaxkv.Full(), num_kv_heads=1, head_dim=32)
    >>> stored_as([spec], (jaxkv.Int8(), jaxkv.Int4()))[0].v_storage
    Int4(group=8, rotate=True)
    """
    if storage is None:
        return tuple(specs)
    k, v = storage if isinstance(storage, tuple) and len(storage) == 2 else (storage, storage)
    return tuple(
        spec if isinstance(spec.reach, Recurrent) else dataclasses.replace(spec, k_storage=k, v_storage=v)
        for spec in specs
    )


def parts(specs: tuple[LayerSpec, ...], sizes: Sizes, layout: Any, stacked: bool) -> tuple[Any, Any, Any, Any]:
    """Returns the layers, the groups, the bookkeeping of recurrent layers, that of Cross layers or None, all empty."""
    distinct = list(dict.fromkeys(spec.reach for spec in specs))
    crosses = [reach for reach in distinct if isinstance(reach, Cross)]
    recurrent = [reach for reach in distinct if isinstance(reach, Recurrent)]
    reaches = [reach for reach in distinct if reach not in (*crosses, *recurrent)]
    behind = max(sizes.max_block, sizes.slack)
    groups = tuple(Group.init(reach, sizes.num_rows, sizes.capacity, behind, layout) for reach in reaches)
    encoded = Encoded.init(crosses[0], sizes.num_rows, layout) if crosses else None
    states = tuple(States.init(reach, sizes.num_rows, sizes.slack) for reach in recurrent)
    books: list[Any] = [*groups, *states, encoded]

    def layer(spec: LayerSpec, num_stacked: int | None) -> Layer | StateLayer:
        group = [*reaches, *recurrent, *crosses].index(spec.reach)
        num_slots = books[group].num_slots
        if isinstance(spec.reach, Recurrent):
            return StateLayer.init(spec, group, sizes.num_rows, num_slots, num_stacked)

        def buffer(heads: int, size: int, storage: Any) -> Any:
            if spec.shares is not None:
                return None
            lead = layout.lead(books[group].pages, sizes.num_rows, heads, num_slots)
            return storage.zeros(lead if num_stacked is None else (num_stacked, *lead), size)

        return Layer(
            k=buffer(spec.num_kv_heads, spec.k_dim, spec.k_storage) if spec.k_dim else None,
            v=buffer(spec.num_kv_heads, spec.value_dim, spec.v_storage),
            sides={} if spec.shares is not None else {name: buffer(*side) for name, side in spec.sides.items()},
            index=None,
            group=group,
            spec=spec,
            layout=layout,
            num_slots=num_slots,
            num_stacked=num_stacked,
        )

    if stacked:
        if any(spec.shares is not None for spec in specs):
            raise ValueError(
                "stacked=True lays equal layers into one stack, in which a layer that shares has no place; leave the "
                "specs with shares out, and let their layers read stack.at(i) of the layer that they share"
            )
        return tuple(layer(spec, specs.count(spec)) for spec in dict.fromkeys(specs)), groups, states, encoded
    return tuple(layer(spec, None) for spec in specs), groups, states, encoded


def shardings(cache: Any, sharding: Any) -> Any:
    """Returns a tree of shardings for a cache: `sharding` (axes R, K, V, H) for buffers, replicated bookkeeping.

    Mesh axes that don't divide a buffer's heads or numbers, such as the one head of latents or a scale, are left out
    for it: every device has all of those. States are divided over rows and heads; their slots and numbers aren't.
    """
    mesh, spec = sharding.mesh, sharding.spec
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    whole = jax.tree.map(lambda _: replicated, cache)

    rows, heads, slots, numbers = (*spec, None, None, None, None)[:4]

    def divides(names: Any, count: int) -> bool:
        return count % math.prod(mesh.shape[name] for name in jax.tree.leaves(names)) == 0

    def placed(buffers: Any, rows: Any, heads: Any = None, slots: Any = None, numbers: Any = None) -> Any:
        def place(buffer: Any) -> Any:
            *stack, _, num_heads, _, size = buffer.shape
            split = heads if divides(heads, num_heads) else None, slots, numbers if divides(numbers, size) else None
            names = (*[None] * len(stack), rows, *split)[: len(stack) + len(spec)]
            return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*names))

        return jax.tree.map(place, buffers)

    def of_layer(layer: Any) -> Any:
        if isinstance(layer, StateLayer):
            return layer.with_buffers((placed(layer.tail, rows), placed(layer.state, rows, heads)))
        kept = placed((layer.k, layer.v), rows, heads, slots, numbers)
        return layer.with_buffers((*kept, placed(layer.sides, rows, None, slots)))

    return dataclasses.replace(whole, layers=tuple(map(of_layer, cache.layers)))


def place(build: Any, sharding: Any) -> Any:
    """Returns the cache that `build` makes, each device making its part."""
    if sharding is None:
        return build()
    places = shardings(jax.eval_shape(build), sharding)
    # The second does nothing but under `jax_disable_jit`, which makes jit forget where things go.
    return jax.device_put(jax.jit(build, out_shardings=places)(), places)
