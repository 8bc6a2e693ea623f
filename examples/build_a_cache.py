"""Builds a KV cache in five steps, each checked against the one before, from concatenation to what jaxkv does.

    python examples/build_a_cache.py

One attention layer, one head. Step 1 is right and slow. Each further step takes away one thing that is wrong with the
step before: growing shapes, one length for all rows, memory of the whole past, time for the whole capacity.
"""

from __future__ import annotations

import argparse
import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

import jaxkv

ROWS, LENGTH, CAPACITY, SIZE, WINDOW, BLOCK = 2, 9, 64, 8, 4, 16
EMPTY = -1


def attention(q, k, v, mask):
    """Plain attention: q [B, T, H], k, v [B, S, H], mask bool [B, T, S]; a query that sees nothing gets zeros."""
    scores = jnp.where(mask, jnp.einsum("bth,bsh->bts", q, k) * SIZE**-0.5, -jnp.inf)
    top = jnp.maximum(scores.max(-1, keepdims=True), jnp.finfo(q.dtype).min)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    return jnp.einsum("bts,bsh->bth", weights / jnp.where(total == 0, 1, total), v)


# Step 1. Concatenate. The state is two arrays that grow: every length is another program.


def step1(cache, positions, q, k, v):
    if cache is not None:
        k, v = jnp.concatenate([cache[0], k], 1), jnp.concatenate([cache[1], v], 1)
    mask = jnp.arange(k.shape[1])[None, None, :] <= positions[:, :, None]
    return (k, v), attention(q, k, v, mask)


# Step 2. Buffers of a fixed size, and one length. One program; XLA writes in place if the cache is donated. But
# `dynamic_update_slice` moves a block that does not fit back, over the last tokens, and says nothing.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fixed:
    k: jax.Array  # [B, S, H]
    v: jax.Array
    length: jax.Array  # int32 scalar: the same for all rows


def step2(cache, positions, q, k, v):
    if cache is None:
        zeros = jnp.zeros((ROWS, CAPACITY, SIZE))
        cache = Fixed(zeros, zeros, jnp.int32(0))
    k = lax.dynamic_update_slice_in_dim(cache.k, k, cache.length, 1)
    v = lax.dynamic_update_slice_in_dim(cache.v, v, cache.length, 1)
    mask = jnp.arange(CAPACITY)[None, None, :] <= positions[:, :, None]
    return Fixed(k, v, cache.length + positions.shape[1]), attention(q, k, v, mask)


# Step 3. Positions say everything. Each row has its own, padding is -1, and the cache remembers which position lies in
# which slot. Rows of different lengths share a batch; a token past the end is dropped, not written over another.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Positioned:
    k: jax.Array  # [B, S, H]
    v: jax.Array
    positions: jax.Array  # int32 [B, S], EMPTY where nothing lies


def write(buffer, slots, x):
    """Returns the buffer [B, S, ...] with x [B, T, ...] at slots [B, T]; a slot past the end is nowhere."""
    return jax.vmap(lambda row, s, y: row.at[s].set(y, mode="drop"))(buffer, slots, x)


def visible(positions, held):
    """Returns bool [B, T, S]: causal, and neither padding nor an empty slot."""
    return (held[:, None, :] != EMPTY) & (held[:, None, :] <= positions[:, :, None])


def step3(cache, positions, q, k, v):
    if cache is None:
        zeros = jnp.zeros((ROWS, CAPACITY, SIZE))
        cache = Positioned(zeros, zeros, jnp.full((ROWS, CAPACITY), EMPTY))
    slots = jnp.where(positions == EMPTY, CAPACITY, positions)
    cache = Positioned(write(cache.k, slots, k), write(cache.v, slots, v), write(cache.positions, slots, positions))
    return cache, attention(q, cache.k, cache.v, visible(positions, cache.positions))


# Step 4. A window layer sees the last WINDOW tokens, so it needs no more slots than the window and one block: a ring.
# Only the slot rule changes. The mask does not: it asks positions, and never cares where a token lies.


def step4(cache, positions, q, k, v, ring=WINDOW - 1 + LENGTH):
    if cache is None:
        zeros = jnp.zeros((ROWS, ring, SIZE))
        cache = Positioned(zeros, zeros, jnp.full((ROWS, ring), EMPTY))
    slots = jnp.where(positions == EMPTY, ring, positions % ring)
    cache = Positioned(write(cache.k, slots, k), write(cache.v, slots, v), write(cache.positions, slots, positions))
    near = cache.positions[:, None, :] > positions[:, :, None] - WINDOW
    return cache, attention(q, cache.k, cache.v, visible(positions, cache.positions) & near)


# Step 5. Step 3 reads all of the capacity for each token. Read blocks of slots instead, as many as are filled, with a
# running maximum and a running sum: a step then costs what is in the cache.


def step5(cache, positions, q, k, v):
    if cache is None:
        zeros = jnp.zeros((ROWS, CAPACITY, SIZE))
        cache = Positioned(zeros, zeros, jnp.full((ROWS, CAPACITY), EMPTY))
    slots = jnp.where(positions == EMPTY, CAPACITY, positions)
    cache = Positioned(write(cache.k, slots, k), write(cache.v, slots, v), write(cache.positions, slots, positions))

    def visit(i, carry):
        top, total, mix = carry
        k, v, held = (lax.dynamic_slice_in_dim(x, i * BLOCK, BLOCK, 1) for x in (cache.k, cache.v, cache.positions))
        scores = jnp.einsum("bth,bsh->bts", q, k) * SIZE**-0.5
        scores = jnp.where(visible(positions, held), scores, jnp.finfo(q.dtype).min)
        new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
        weights, keep = jnp.exp(scores - new_top) * visible(positions, held), jnp.exp(top - new_top)
        return new_top, total * keep + weights.sum(-1, keepdims=True), mix * keep + weights @ v

    zeros = jnp.zeros((*q.shape[:2], 1))
    filled = cache.positions.max() + 1
    carry = (jnp.full_like(zeros, jnp.finfo(q.dtype).min), zeros, jnp.zeros_like(q))
    _, total, mix = lax.fori_loop(0, -(-filled // BLOCK), visit, carry)
    return cache, mix / jnp.where(total == 0, 1, total)


# And jaxkv: steps 3 to 5 for all kinds of layers at once, with heads, storage, editing, and rows that do not fit.


def library(reach):
    def run(cache, positions, q, k, v):
        if cache is None:
            spec = jaxkv.LayerSpec(reach, num_kv_heads=1, head_dim=SIZE)
            cache = jaxkv.Cache.init([spec], num_rows=ROWS, capacity=CAPACITY, max_block=LENGTH)
        cache, step = cache.begin(positions)
        layer = cache.layers[0].put(step, k[:, :, None], v[:, :, None])
        return cache.with_layers([layer]), jaxkv.attend(q[:, :, None], layer, step)[:, :, 0]

    return run


def decode(step, positions, q, k, v):
    """Feeds a prompt of 5 tokens, then one token at a time; returns what attention gave: [B, T, H]."""
    cache, outputs, step = None, [], jax.jit(step)
    for begin, end in [(0, 5), *((t, t + 1) for t in range(5, LENGTH))]:
        cache, y = step(cache, positions[:, begin:end], q[:, begin:end], k[:, begin:end], v[:, begin:end])
        outputs.append(y)
    return jnp.concatenate(outputs, 1)


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    q, k, v = jax.random.normal(jax.random.key(0), (3, ROWS, LENGTH, SIZE))
    equal = jnp.tile(jnp.arange(LENGTH), (ROWS, 1))
    ragged = jnp.stack([jnp.arange(LENGTH), jnp.where(jnp.arange(LENGTH) < 3, EMPTY, jnp.arange(LENGTH) - 3)])

    def check(name, got, wanted):
        difference = float(jnp.abs(got - wanted).max())
        print(f"{name:60} largest difference {difference:.0e}")
        if difference > 1e-5:
            raise SystemExit(f"{name}: not the same")

    first = decode(step1, equal, q, k, v)
    check("2 fixed buffers, against 1 concatenation", decode(step2, equal, q, k, v), first)
    third = decode(step3, equal, q, k, v)
    check("3 positions, against 2", third, first)
    alone = decode(step3, jnp.tile(jnp.arange(LENGTH) - 3, (ROWS, 1)).clip(EMPTY), q, k, v)
    check("3 ragged rows, against the same row in another batch", decode(step3, ragged, q, k, v)[1], alone[1])
    near = equal[:, None, :] > equal[:, :, None] - WINDOW
    wanted = attention(q, k, v, visible(equal, equal) & near)
    check("4 a ring, against a mask over the whole past", decode(step4, equal, q, k, v), wanted)
    check("5 filled blocks only, against 3", decode(step5, ragged, q, k, v), decode(step3, ragged, q, k, v))
    check("jaxkv.Full(), against 5", decode(library(jaxkv.Full()), ragged, q, k, v), decode(step5, ragged, q, k, v))
    check("jaxkv.Window(4), against 4", decode(library(jaxkv.Window(WINDOW)), equal, q, k, v), wanted)


if __name__ == "__main__":
    main()
