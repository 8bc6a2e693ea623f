"""A recurrent layer that is too simple to be wrong, to test the cache with: sums that fade, and the last inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from jaxkv.cache.spec import EMPTY, Recurrent
from jaxkv.meshes import automatic, like, spec_of

FADE = 0.5  # what is left of a state after a token


def input_sizes(reach: Recurrent) -> tuple[int, int, int]:
    """Returns heads K, and how many numbers H of a head go into its state and Hv into its tail.

    >>> input_sizes(jaxkv.Recurrent(state=(2, 3, 4), tail=(10, 2)))
    (2, 12, 5)
    """
    heads = 1 if reach.state is None else reach.state[0]
    size = 1 if reach.state is None else math.prod(reach.state[1:])
    channels = heads if reach.tail is None else reach.tail[0]
    if channels % heads:
        raise ValueError(f"{reach}: its {channels} channels can't be shared by {heads} heads")
    return heads, size, channels // heads


def run(layer: Any, step: Any, k: Any, v: Any) -> tuple[Any, Any]:
    """Returns the layer after a call, and what each token of it reads, [B, T, K, Hv]: all inputs of v that the tail
    still has, the newest counting most, times the sum of the state.

    Args:
      layer: a StateLayer.
      step: of the call.
      k, v: inputs [B, T, K, H] and [B, T, K, Hv], of which the state and the tail are made.
    """
    return automatic(_run, (like(layer), PartitionSpec(*spec_of(k)[:3])))(layer, step, k, v)


def _run(layer: Any, step: Any, k: Any, v: Any) -> tuple[Any, Any]:
    own, reach = step.groups[layer.group], layer.spec.reach
    tail, state = layer.read(step)
    b, t = step.positions.shape

    def packed(x: Any) -> Any:
        return jnp.take_along_axis(x.astype(jnp.float32), own.order[:, :, None, None], 1)

    def one(carry: Any, x: Any) -> Any:
        tail, state = carry
        if state is not None:
            state = state * FADE + x[0].reshape(state.shape)
        if tail is not None:
            tail = jnp.concatenate([tail[:, :, 1:], x[1].reshape(b, -1, 1)], 2)
        return (tail, state), (tail, state)

    k, v = packed(k), packed(v)
    _, after = lax.scan(one, (tail, state), (jnp.moveaxis(k, 1, 0), jnp.moveaxis(v, 1, 0)))

    def at_counts(first: Any, rest: Any) -> Any:
        if first is None:
            return None
        each = jnp.concatenate([first[:, None], jnp.moveaxis(rest, 0, 1)], 1)
        index = own.counts.reshape(*own.counts.shape, *(1,) * (each.ndim - 2))
        return jnp.take_along_axis(each, index, 1)

    layer = layer.put(step, at_counts(tail, after[0]), at_counts(state, after[1]))
    read = jnp.ones((b, t, k.shape[2], v.shape[3]), jnp.float32)
    if reach.tail is not None:
        weights = 1 / jnp.arange(reach.tail[1], 0, -1, dtype=jnp.float32)
        read *= jnp.moveaxis(after[0], 0, 1).reshape(*read.shape, -1) @ weights
    if reach.state is not None:
        read *= jnp.moveaxis(after[1], 0, 1).reshape(b, t, k.shape[2], -1).sum(-1)[..., None]
    read = jnp.take_along_axis(read, own.place[:, :, None, None], 1)
    return layer, jnp.where((step.positions == EMPTY)[:, :, None, None], 0, read)


def expected(reach: Recurrent, ks: Sequence[Any], vs: Sequence[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the state [K, H], the tail [channels, width] and what the last token reads [K, Hv], in NumPy.

    ks, vs: the inputs [K, H] and [K, Hv] of all tokens of the text, at least one.
    """
    heads, size, values = input_sizes(reach)
    width = 1 if reach.tail is None else reach.tail[1]
    state, tail = np.zeros((heads, size)), np.zeros((heads * values, width))
    for k, v in zip(ks, vs, strict=True):
        state = state * FADE + np.asarray(k, np.float64)
        tail = np.concatenate([tail[:, 1:], np.reshape(np.asarray(v, np.float64), (-1, 1))], 1)
    read = np.ones((heads, values))
    if reach.tail is not None:
        read = read * (tail @ (1 / np.arange(width, 0, -1))).reshape(heads, values)
    if reach.state is not None:
        read = read * state.sum(1)[:, None]
    return state, tail, read


def contents(layer: Any, step: Any) -> tuple[Any, Any, Any]:
    """Returns all states of the call's rows: the position of the last token that each took in, int32 [B, C], EMPTY for
    none; the states [B, C, K, H]; the tails [B, C, K, Hv * width]."""
    return automatic(_contents, PartitionSpec())(layer, step)


def _contents(layer: Any, step: Any) -> tuple[Any, Any, Any]:
    own = step.groups[layer.group]
    slots = jnp.broadcast_to(jnp.arange(layer.num_slots, dtype=jnp.int32), own.kv_positions.shape)
    heads, size, values = input_sizes(layer.spec.reach)

    def all_slots(buffer: Any, each: int) -> Any:
        if buffer is None:
            return jnp.zeros((*slots.shape, heads, each), jnp.float32)
        x = layer.layout.gather(buffer, layer.index, step, layer.group, slots)
        return jnp.where((own.kv_positions == EMPTY)[:, :, None, None], 0, x.reshape(*slots.shape, heads, -1))

    last = jnp.where(own.kv_positions == EMPTY, EMPTY, own.kv_positions - 1)
    return last, all_slots(layer.state, size), all_slots(layer.tail, values)
