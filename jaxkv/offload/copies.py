"""Copies of arrays that share no memory with what they were made of."""

from __future__ import annotations

import jax
import numpy as np

from jaxkv import aligned
from jaxkv.errors import CacheError


def gather(x: jax.Array, copy: bool) -> np.ndarray:
    """Returns the values of an array, from all devices; without `copy` it may be the array's own memory."""
    if not x.is_fully_addressable:
        raise CacheError(
            f"{x.dtype}{x.shape} lies on devices of other processes too, so it can't go to NumPy or to a directory; "
            'to="pinned_host" keeps each part with its process'
        )
    shards = [shard for shard in x.addressable_shards if shard.replica_id == 0]
    if len(shards) == 1 and not copy:
        return np.asarray(shards[0].data)
    whole = aligned.empty(x.shape, x.dtype)
    for shard in shards:
        whole[shard.index] = np.asarray(shard.data)
    return whole


def copied(array: np.ndarray) -> np.ndarray:
    """Returns a copy in memory of its own. Subclasses and arrays of objects copy themselves."""
    if not is_plain(array):
        return array.copy()
    new = aligned.empty(array.shape, array.dtype)
    new[...] = array
    return new


def is_plain(array: np.ndarray) -> bool:
    """Whether dtype, shape and bytes are all there is to an array."""
    return type(array) is np.ndarray and not array.dtype.hasobject and array.dtype.itemsize > 0


def moved(x: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
    """Returns a copy of an array under a sharding; what shared its memory would go with it when it is donated."""
    kind = sharding.memory_kind
    same_memory = x.sharding.memory_kind == kind
    if not same_memory and kind is not None and len(x.sharding.device_set) > 1:
        between = x.sharding.with_memory_kind(kind)
        if between != sharding:  # JAX fails to change the memory and the devices at once
            return jax.device_put(jax.device_put(x, between), sharding)
    new = jax.device_put(x, sharding, may_alias=False)
    if not same_memory or x.sharding.device_set.isdisjoint(sharding.device_set):
        return new
    # Where the devices are others, JAX still takes over the parts that lie where they are to be.
    theirs = {shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards}
    parts = [shard.data for shard in new.addressable_shards]
    if theirs.isdisjoint(part.unsafe_buffer_pointer() for part in parts):
        return new
    own = [
        jax.device_put(part, part.sharding, may_alias=False) if part.unsafe_buffer_pointer() in theirs else part
        for part in parts
    ]
    return type(new)(new.aval, sharding, own, committed=True)
