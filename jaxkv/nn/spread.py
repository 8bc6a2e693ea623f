"""Calls of an nnx module whose arrays lie on a mesh with Explicit axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import nnx

from jaxkv.meshes import automatic, explicit_mesh


def spread(call: Callable[..., Any], specs: Any, module: nnx.Module, *args: Any) -> Any:
    """Returns call(module, *args); where axes are Explicit it runs as on Auto ones.

    Flax's layers don't say how what they compute is sharded, and Explicit axes want it said.

    Args:
      call: of the module, which it leaves as it is, and of arrays, pytrees and None.
      specs: of the results, a tree of PartitionSpecs or the beginning of one.
      module: the module.
      args: further arguments.
    """
    graphdef, state = nnx.split(module)
    params = nnx.to_pure_dict(state)
    if explicit_mesh((params, args)) is None:
        return call(module, *args)
    return automatic(lambda params, *args: call(nnx.merge(graphdef, params), *args), specs)(params, *args)
