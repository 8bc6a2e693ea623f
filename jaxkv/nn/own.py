"""A cache that a single module makes and keeps for itself, as Flax's attention does.

For quick use of one module. A model does better with one cache for all its layers, given to the call.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jaxkv.cache.cache import Cache
from jaxkv.cache.spec import LayerSpec


def empty(spec: LayerSpec, num_rows: int, capacity: int, **options: Any) -> Cache:
    """Returns an empty cache of one layer.

    Args:
      spec: what the layer keeps.
      num_rows, capacity, **options: of `Cache.init`. `max_block` is by default the capacity where no token is ever
        dropped, so that prompts of any length can be read at once.

    Raises:
      ValueError: if the layer reads another one's keys and values.

    >>> empty(jaxkv.LayerSpec(jaxkv.Full(), 1, 4), 2, 32).max_block
    32
    """
    if spec.shares is not None:
        raise ValueError(
            f"this module shares layer {spec.shares}, so it has no cache of its own: make one for all layers"
        )
    if spec.reach.size is None and options.get("max_block") is None:
        options["max_block"] = capacity
    return Cache.init([spec], num_rows, capacity, **options)


def begin(cache: Cache, x: Any, positions: Any, spans: Any) -> tuple[Cache, Any]:
    """Returns (cache, step) for x [B, T, D] in a module's own cache; positions None continues every row.

    Raises:
      ValueError: while tracing, for a batch of another size than the cache, or spans where a state is kept.
    """
    if x.ndim != 3 or x.shape[0] != cache.num_rows:
        raise ValueError(
            f"x has shape {x.shape}, the module's own cache has {cache.num_rows} rows; give x [B, T, D] with as "
            "many batch rows, or make a cache of that size"
        )
    if spans is not None and cache.recurrent:
        raise ValueError(f"spans were given to a layer of {cache.recurrent[0].reach}: it reads its tokens one by one")
    if positions is None:
        positions = cache.lengths[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)[None, :]
    return cache.begin(positions, spans=spans)
