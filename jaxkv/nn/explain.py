"""Which form of attention a call takes, and whether this jaxlib computes a known sum right."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.cache.layer import Layer
from jaxkv.cache.step import Step
from jaxkv.native import library
from jaxkv.nn import call, native


def explain_attend(q: Any, layer: Layer, step: Step) -> str:
    """Returns which form `attend(q, layer, step)` takes, and why: "native: ..." or "blockwise: ...".

    `implementation="native"` takes the native kernel wherever it can be had.

    Args:
      q: the queries [B, T, N, H], or a `jax.ShapeDtypeStruct` of them.
      layer: a layer of a cache.
      step: from the `Cache.begin` of this forward pass.

    Returns:
      One line of text.

    >>> spec = jaxkv.LayerSpec(jaxkv.Full(), 1, 8, rotary=jaxkv.Rotary(), rotary_at="read")
    >>> cache, step = jaxkv.Cache.init([spec], 1, capacity=64).begin(jnp.array([[0]]))
    >>> explain_attend(jnp.ones((1, 1, 1, 8)), cache.layers[0], step)
    "blockwise: the native kernel can't be had: it does not rotate keys when it reads them"
    """
    length = q.shape[1]
    if length > native.MOST_QUERIES:
        return f"blockwise: of {length} tokens per row XLA's matrix products are faster than the native kernel"
    reason = call.obstacle(q, layer, step)
    if reason:
        return f"blockwise: the native kernel can't be had: {reason}"
    where = "also under vmap, in shard_map, and on a mesh for rows and kv heads; blockwise in exported programs"
    return f"native: {library.instruction_set()} instructions, {where}"


def wrong_sum() -> float | None:
    """Returns by how much this jaxlib's CPU backend is off in a sum that some releases compute wrong; None: it isn't.

    They multiply by a broadcast number within a fusion of a product and a sum. jaxkv's own programs were not met by it,
    but a model's may be.
    """
    x = np.random.default_rng(0).normal(size=(4, 64, 64)).astype(np.float32)
    program = jax.jit(lambda x, c: (jnp.matmul(x, jnp.broadcast_to(c, x.shape)) * x).sum(-1))
    args = jax.device_put((x, np.float32(0.5)), jax.local_devices(backend="cpu")[0])
    want = (np.matmul(x.astype(np.float64), np.full(x.shape, 0.5)) * x).sum(-1)
    error = np.abs(np.asarray(program(*args)) - want).max() / np.abs(want).max()
    return None if error < 1e-3 else float(error)  # NaN is wrong too
