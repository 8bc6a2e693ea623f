#!/usr/bin/env bash
# jax 0.12.0.1 (CPU, four virtual devices): a function of custom_partitioning, called in jax.sharding.auto_axes on a mesh with
# Explicit axes, compiles without that mesh in the context, and on a mesh with Auto axes always. While jax.set_mesh has set the
# Explicit mesh, the program can't run: JAX traces each device's part after `partition` has returned, finds the mesh in the
# context, and writes an annotation of shardings into the part, where nobody takes it out again. It works if the part is
# traced within jax.sharding.use_abstract_mesh of an empty mesh. With jax 0.10.2 it works as it is.
#
# Seen:  plain, not set: [1.0, 2.0, 3.0]
#        plain, set: NOT_FOUND: No registered implementation for untyped custom call to Sharding for Host
#        traced_without_a_mesh, not set: [1.0, 2.0, 3.0]
#        traced_without_a_mesh, set: [1.0, 2.0, 3.0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.12}" -m venv "$folder/venv"  # jax 0.12 wants Python 3.12
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.12.0.1 jaxlib==0.12.0.1
XLA_FLAGS=--xla_force_host_platform_device_count=4 "$folder/venv/bin/python" - <<'PYTHON'
import contextlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Explicit,))
rows = PartitionSpec("rows")


def plain(x):
    return x + jnp.arange(3, dtype=jnp.float32)


def traced_without_a_mesh(x):
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        return plain(x)


def result(part, is_set: bool) -> str:
    function = custom_partitioning(part)
    function.def_partition(
        partition=lambda mesh, args, _: (mesh, part, args[0].sharding, (args[0].sharding,)),
        infer_sharding_from_operands=lambda mesh, args, _: args[0].sharding,
        sharding_rule="i j -> i j",
    )
    x = jax.device_put(jnp.ones((4, 3)), NamedSharding(mesh, rows))
    program = jax.jit(jax.sharding.auto_axes(function, axes="rows", out_sharding=rows))
    with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
        try:
            return str(np.asarray(program(x))[0].tolist())
        except jax.errors.JaxRuntimeError as error:
            return str(error).splitlines()[0]


found = {(part.__name__, is_set): result(part, is_set) for part in (plain, traced_without_a_mesh) for is_set in (False, True)}
for (name, is_set), text in found.items():
    print(f"{name}, {'set' if is_set else 'not set'}: {text}")
right = str([1.0, 2.0, 3.0])
assert found.pop(("plain", True)).startswith("NOT_FOUND: No registered implementation for untyped custom call to Sharding")
assert set(found.values()) == {right}
PYTHON
