"""`--devices N`: one model over several devices, its heads, MLPs and vocabulary divided."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxkv.cli.options import UsageError
from jaxkv.models import Model, tensor_parallel

_AXIS = "model"


def mesh_of(count: int | None) -> Mesh | None:
    """Returns a mesh of so many local devices; None for one.

    Raises:
      UsageError: if there are fewer.
    """
    devices = jax.local_devices()
    if count is None or count == 1:
        return None
    if count > len(devices):
        cure = ""
        if devices[0].platform == "cpu":
            cure = f"; XLA_FLAGS=--xla_force_host_platform_device_count={count} in the environment divides a CPU"
        raise UsageError(f"argument --devices: {count} are asked for, and JAX has {len(devices)} here{cure}")
    return jax.make_mesh((count,), (_AXIS,), axis_types=(AxisType.Auto,), devices=devices[:count])


def divided(model: Model, mesh: Mesh) -> Model:
    """Returns the model with its parameters over a mesh."""
    place = tensor_parallel(mesh)

    def put(path: Any, x: Any) -> Any:
        return jax.device_put(x, place(".".join(str(part.key) for part in path), x.shape))

    return dataclasses.replace(model, params=jax.tree_util.tree_map_with_path(put, model.params))


def place_of(model: Model) -> NamedSharding | None:
    """Returns where a cache of this model is to lie: its heads over the model's mesh."""
    places = (x.sharding for x in jax.tree.leaves(model.params))
    mesh = next((place.mesh for place in places if isinstance(place, NamedSharding)), None)
    return None if mesh is None else NamedSharding(mesh, PartitionSpec(None, _AXIS))


def describe_devices(model: Model) -> str:
    """Returns over how many devices the model and its cache are divided; nothing for one."""
    place = place_of(model)
    if place is None:
        return ""
    size = place.mesh.size
    heads = [spec.num_kv_heads for spec in model.specs if spec.num_kv_heads is not None]
    whole = sum(count % size != 0 for count in heads)
    cache = f"; each has all that {whole} of {len(heads)} attention layers keep, as {size} doesn't divide their heads"
    return f"model over {size} devices{cache * bool(whole)}"
