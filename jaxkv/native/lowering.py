"""Primitives whose form is chosen where a program is lowered: only there it is known what it is compiled for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir


def primitive(
    name: str,
    shapes: Callable[..., Any],
    batched: Callable[..., Any],
    for_cpus: Callable[..., Any],
    elsewhere: Callable[..., Any],
) -> Primitive:
    """Returns a primitive of several results.

    Args:
      name: of it.
      shapes: from the types of its operands and its parameters to those of its results.
      batched: its batching rule.
      for_cpus: its lowering on CPUs.
      elsewhere: what it computes on other platforms, in JAX.
    """
    made = Primitive(name)
    made.multiple_results = True
    made.def_impl(functools.partial(_run, made))
    made.def_abstract_eval(shapes)
    batching.primitive_batchers[made] = batched
    mlir.register_lowering(made, for_cpus, platform="cpu")
    mlir.register_lowering(made, mlir.lower_fun(elsewhere, multiple_results=True))
    return made


def _run(made: Primitive, *operands: Any, **parameters: Any) -> Any:
    with jax.disable_jit(False):
        return jax.jit(functools.partial(made.bind, **parameters))(*operands)


def on_one_device(module: Any) -> bool:
    """Returns whether each device runs the whole of the program that is lowered, in this process."""
    if module.lowering_parameters.for_export:
        return False  # to be run where there may be no library
    where = module.axis_context
    if isinstance(where, mlir.SPMDAxisContext):
        return where.mesh.size == 1 or set(where.manual_axes) == set(where.mesh.axis_names)
    return isinstance(where, mlir.ShardingContext) and where.num_devices == 1
