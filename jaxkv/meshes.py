"""What the types of arrays say of meshes: the axes they vary over inside `shard_map`, and which axes are Explicit."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def vary_alike(tree: Any) -> Any:
    """Returns the tree with all arrays varying over the mesh axes that one of them varies over.

    Inside `jax.shard_map` a loop's carry keeps its type: what starts replicated may not become different from device to
    device. Elsewhere nothing changes.
    """
    axes = frozenset[str]().union(*(_varying(x) for x in jax.tree.leaves(tree)))
    return _vary(tree, axes)


def vary_like(x: Any, tree: Any) -> Any:
    """Returns the tree with its arrays varying over the mesh axes that x varies over."""
    return _vary(tree, _varying(x))


def _vary(tree: Any, axes: frozenset[str]) -> Any:
    def one(x: Any) -> Any:
        missing = tuple(sorted(axes - _varying(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(one, tree)


def _varying(x: Any) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


def explicit_mesh(tree: Any) -> Any:
    """Returns the mesh with Explicit axes that an array of the tree lies on, or None."""
    for x in jax.tree.leaves(tree):
        mesh = jax.typeof(x).sharding.mesh
        if AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def spec_of(x: Any) -> tuple[Any, ...]:
    """Returns the Explicit mesh axes of each of an array's axes, None where there are none."""
    spec = tuple(jax.typeof(x).sharding.spec)
    return spec + (None,) * (jax.typeof(x).ndim - len(spec))


def like(tree: Any) -> Any:
    """Returns the PartitionSpecs of a tree's arrays, in their place."""
    return jax.tree.map(lambda x: PartitionSpec(*spec_of(x)), tree)


def rows_of(x: Any) -> PartitionSpec:
    """Returns the PartitionSpec of an array with x's first axis, whose other axes are not sharded."""
    return PartitionSpec(*spec_of(x)[:1])


def constrain(x: Any, place: NamedSharding) -> Any:
    """Returns x where `place` says, while tracing, whatever the kinds of the mesh's axes."""
    mesh, types = place.mesh, place.mesh.axis_types
    if AxisType.Explicit in types:
        x = jax.sharding.reshard(x, NamedSharding(mesh, _only(AxisType.Explicit, place)))
    if AxisType.Auto in types:
        x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, _only(AxisType.Auto, place)))
    return x


def _only(kind: AxisType, place: NamedSharding) -> PartitionSpec:
    """Returns the PartitionSpec of `place` without the mesh axes of other kinds."""
    kinds = dict(zip(place.mesh.axis_names, place.mesh.axis_types, strict=True))

    def one(names: Any) -> tuple[str, ...]:
        names = names if isinstance(names, tuple) else (names,) if names else ()
        return tuple(name for name in names if kinds[name] == kind)

    return PartitionSpec(*map(one, place.spec))


def beside(params: Any, tree: Any) -> Any:
    """Returns the tree's arrays on every device of the mesh that an array of params lies on, if they lie on no mesh.

    A program wants all of its arrays on the same mesh, and so does a loop in which some of them come from others.
    """
    mesh = next((place.mesh for place in map(_place, jax.tree.leaves(params)) if place), None)
    if mesh is None or any(map(_place, jax.tree.leaves(tree))):
        return tree
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def _place(x: Any) -> NamedSharding | None:
    place = getattr(x, "sharding", None)
    return place if isinstance(place, NamedSharding) else None


def resized(x: Any, axis: int, size: int) -> PartitionSpec:
    """Returns the PartitionSpec of an array if one axis had another size: mesh axes that don't divide it drop out."""
    spec, mesh = list(spec_of(x)), jax.typeof(x).sharding.mesh
    names = spec[axis] if isinstance(spec[axis], tuple) else [spec[axis]] if spec[axis] else []
    if size % math.prod(mesh.shape[name] for name in names):
        spec[axis] = None
    return PartitionSpec(*spec)


def automatic(function: Callable[..., Any], specs: Any) -> Callable[..., Any]:
    """Returns the function run as on Auto axes, where XLA chooses the shardings in between.

    Where no argument lies on a mesh with Explicit axes the function runs as it is; outside of `jit` as one compiled
    program, if it is one that a later call can find again: a function of a module, or a `partial` of one.

    Args:
      function: of arrays and pytrees of arrays.
      specs: of its results, a tree of PartitionSpecs, or the beginning of one.
    """

    def call(*args: Any) -> Any:
        mesh = explicit_mesh(args)
        traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(args))
        if mesh is None:
            return (function if traced else _compiled(function))(*args)
        places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        axes = tuple(
            name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit
        )
        run = jax.sharding.auto_axes(function, axes=axes, out_sharding=places)
        return run(*args) if traced else jax.jit(run)(*args)

    return call


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function as a program that is compiled once, or as it is where it was made for this call alone."""
    part = function if isinstance(function, functools.partial) else functools.partial(function)
    if part.args or part.func.__closure__ is not None:
        return function
    return _program(part.func, tuple(part.keywords.items()))


@functools.cache
def _program(function: Callable[..., Any], keywords: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    part = functools.partial(function, **dict(keywords))

    @jax.jit
    def changed(*args: Any) -> _Changed:
        given = {id(x): i for i, x in enumerate(jax.tree.leaves(args))}
        leaves, tree = jax.tree.flatten(part(*args))
        sources = tuple(given.get(id(x)) for x in leaves)
        return _Changed([x for x, source in zip(leaves, sources, strict=True) if source is None], tree, sources)

    def call(*args: Any) -> Any:
        result, given = changed(*args), jax.tree.leaves(args)
        new = iter(result.leaves)
        return jax.tree.unflatten(result.tree, [next(new) if i is None else given[i] for i in result.sources])

    return call


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Changed:
    """What a program gives, less the arguments that it passes through: `jit` would copy them, such as a whole cache."""

    leaves: list[Any]
    tree: Any = dataclasses.field(metadata={"static": True})
    sources: tuple[int | None, ...] = dataclasses.field(metadata={"static": True})  # which argument; None: a new array


def dot_general(lhs: Any, rhs: Any, dimension_numbers: Any, *, out_sharding: Any = None, **options: Any) -> Any:
    """Returns `jax.lax.dot_general`, also where an axis that is summed over is split over Explicit mesh axes.

    JAX then asks for the sharding of the result: it is that of the axes that are left.
    """

    def product(lhs: Any, rhs: Any, out_sharding: Any = None) -> Any:
        return jax.lax.dot_general(lhs, rhs, dimension_numbers, out_sharding=out_sharding, **options)

    if out_sharding is not None:
        return product(lhs, rhs, out_sharding)
    (summed, others_summed), (batch, others_batch) = dimension_numbers
    gone = {*summed, *batch}, {*others_summed, *others_batch}
    left, right = ([n for i, n in enumerate(spec_of(x)) if i not in g] for x, g in zip((lhs, rhs), gone, strict=True))
    return automatic(product, PartitionSpec(*(spec_of(lhs)[i] for i in batch), *left, *right))(lhs, rhs)


def forward(
    function: Callable[..., Any], params: Any, tokens: Any, positions: Any, cache: Any, parents: Any = None
) -> Any:
    """Returns function(params, tokens, positions, cache), a model's (logits, cache), also on a mesh with Explicit axes.

    There the logits are sharded over rows as the tokens are, and the cache stays as it is. Of a tree of tokens the
    function gets `parents` too, by name.
    """

    def call(params: Any, tokens: Any, positions: Any, cache: Any, *parents: Any) -> Any:
        return function(params, tokens, positions, cache, **dict(zip(("parents",), parents, strict=False)))

    args = (params, tokens, positions, cache, *(() if parents is None else (parents,)))
    return call(*args) if explicit_mesh(args) is None else automatic(call, (rows_of(tokens), like(cache)))(*args)
