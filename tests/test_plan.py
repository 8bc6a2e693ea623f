"""plan_memory says beforehand what Cache.init takes."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxkv import Cache, Dense, Full, Int8, LayerSpec, Pages, Window, max_capacity, plan_memory

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


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"storage": Int8(), "stacked": True},
        {"layout": Pages(40, 16), "max_block": 8, "slack": 4},
        {"max_block": 100},
    ],
    ids=str,
)
def test_the_largest_capacity_fits_and_one_more_token_does_not(options):
    for planned in (100, 333):
        nbytes = plan_memory(SPECS, 3, planned, **options).nbytes + 7
        capacity = max_capacity(SPECS, nbytes, 3, **options)
        assert capacity >= planned
        small, large = (Cache.init(SPECS, 3, n, **options) for n in (capacity, capacity + 1))
        taken = [sum(x.nbytes for x in jax.tree.leaves(cache)) for cache in (small, large)]
        assert taken[0] <= nbytes < taken[1]


def test_the_largest_capacity_is_that_of_one_device():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("heads",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "heads"))
    alone, two = max_capacity(SPECS, "1MB", 3), max_capacity(SPECS, "1MB", 3, sharding=sharding)
    assert plan_memory(SPECS, 3, two, sharding=sharding).nbytes_per_device <= 1_000_000
    assert plan_memory(SPECS, 3, two + 1, sharding=sharding).nbytes_per_device > 1_000_000
    assert 1.8 * alone < two


def test_a_capacity_has_its_ends():
    windows = SPECS[:2]
    assert max_capacity(windows, "1GB", 3) == 2**30 and max_capacity(windows, "1GB", 3, most=77) == 77
    assert max_capacity(SPECS, 100, 3) == max_capacity(SPECS, "1GB", most=2) == 0
    with pytest.raises(ValueError, match="'lots' is not a size"):
        max_capacity(SPECS, "lots")
