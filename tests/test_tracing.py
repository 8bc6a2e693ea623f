"""Whether JAX is tracing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxkv.tracing import is_tracing

IMPORTED_BY_A_TRACED_FUNCTION = """
import jax
import jax.numpy as jnp

@jax.jit
def first(x):
    import jaxkv
    try:
        jaxkv.load_state_dict({"w": x}, {"w": [1.0]})
    except jaxkv.CacheError:
        return x

first(jnp.zeros(1))
import jaxkv

print(jaxkv.load_state_dict({"w": jnp.zeros(1)}, {"w": [1.0]}).variables["w"])
print(jaxkv.get_store())
with jaxkv.Offload(to="numpy") as offload:
    print(offload.append({"w": jnp.zeros(1)}))
"""


def test_it_may_be_imported_for_the_first_time_by_a_traced_function():
    command = [sys.executable, "-c", IMPORTED_BY_A_TRACED_FUNCTION]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.stdout.split("\n") == ["[1.]", "Store()", "0", ""], done.stderr


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.grad, lambda f: jax.jit(jax.vmap(f))])
def test_under_a_transform_it_traces_and_outside_it_does_not(transform):
    seen = []

    def function(x):
        seen.append(is_tracing())
        return x

    transform(function)(1.0 if transform is jax.grad else jnp.ones(2))
    assert all(seen) and seen and not is_tracing()
    with jax.enable_x64(True), jax.set_mesh(jax.make_mesh((1,), ("x",))), jax.disable_jit():
        assert not is_tracing()
