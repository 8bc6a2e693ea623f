"""plan_memory says beforehand what Cache.init takes."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxkv import Cache, Dense, Full, LayerSpec, Window, plan_memory

SPECS = [LayerSpec(Window(8, sinks=2), 2, 4, v_storage=Dense("float16"))] * 2 + [LayerSpec(Full(), 4, 8, value_dim=2)]


@pytest.mark.parametrize("stacked", [False, True])
def test_the_plan_is_what_is_allocated(stacked):
    options = {"max_block": 16, "slack": 4, "stacked": stacked}
    plan = plan_memory(SPECS, 3, 200, **options)
    cache = Cache.init(SPECS, 3, 200, **options)
    assert plan.nbytes == plan.nbytes_per_device == cache.nbytes == sum(x.nbytes for x in jax.tree.leaves(cache))
    assert plan.bytes_per_token == 4 * (8 + 2) * 4  # the full layer alone grows
    assert "2 layers Window(size=8, sinks=2): 25 slots per sequence" in str(plan)


def test_the_plan_knows_what_one_device_holds():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("heads",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "heads"))
    plan = plan_memory(SPECS, 3, 200, sharding=sharding)
    cache = Cache.init(SPECS, 3, 200, sharding=sharding)
    one = jax.devices()[0]
    held = [s.data.nbytes for x in jax.tree.leaves(cache) for s in x.addressable_shards if s.device == one]
    assert plan.nbytes_per_device == sum(held)
    assert plan.nbytes_per_device < plan.nbytes == cache.nbytes


def test_a_terabyte_is_planned_without_being_allocated():
    plan = plan_memory([LayerSpec(Full(), 8, 128)] * 80, num_rows=64, capacity=131_072)
    assert plan.nbytes > 2**40
    assert "TiB" in str(plan)
