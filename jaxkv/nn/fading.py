"""A memory of keys by values that fades: what gated delta and Mamba-2 have in common.

    S_t = exp(g_t) S_(t-1) + k_t w_t^T,    o_t = S_t^T q_t

What a token writes, w_t, is its value; or, by the delta rule, how much its value differs from what its key finds. Many
tokens are computed in chunks, one after the other, within which all are computed at once: Dao & Gu 2024,
https://arxiv.org/abs/2405.21060, and for the delta rule by the WY form of Yang et al. 2024,
https://arxiv.org/abs/2406.06484.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.interpreters import mlir

from jaxkv.meshes import vary_alike
from jaxkv.native import library
from jaxkv.native.library import MEMORY
from jaxkv.native.lowering import on_one_device, primitive

CHUNK = 64  # tokens that are computed at once, a power of two


def fading_memory(q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any, counts: Any = None) -> tuple[Any, Any]:
    """Returns what the tokens read, [B, T, H, V], and the states after `counts` of them, [B, M, H, K, V].

    On one CPU the native library goes from token to token, with the state in the nearest cache. Elsewhere, in what
    `jax.export` writes, and in derivatives it is XLA's chunks; a single token takes one step.

    Args:
      q, k: [B, T, H, K], float32.
      v: [B, T, H, V], float32; without beta 0 for a token that is none.
      g: [B, T, H], the logarithm of how much of the state stays, 0 for a token that is none.
      beta: [B, T, H], for the delta rule, how much of the difference is written, 0 for a token that is none; None: the
        value is written.
      state: [B, H, K, V] before.
      counts: int32 [B, M], where M = 1 all tokens but those that are none; None for no states.
    """
    operands = [x for x in (q, k, v, g, state, beta, counts) if x is not None]
    y, *states = _remembered((beta is not None, counts is not None), *vary_alike(tuple(operands)))
    return y, (states[0] if states else None)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _remembered(has: tuple[bool, bool], *operands: Any) -> list[Any]:
    return memory_p.bind(*operands, has=has)


@_remembered.defjvp
def _derivative(has: tuple[bool, bool], primals: Any, tangents: Any) -> Any:
    return jax.jvp(functools.partial(_as_xla, has=has), primals, tangents)


def _named(operands: Any, has: tuple[bool, bool]) -> tuple[Any, ...]:
    """Returns q, k, v, g, state, and beta and counts or None."""
    rest = list(operands[5:])
    return (*operands[:5], *(rest.pop(0) if there else None for there in has))


def _shapes(*operands: Any, has: tuple[bool, bool]) -> list[Any]:
    _, _, v, _, state, _, counts = _named(operands, has)
    if counts is None:
        return [v]
    return [v, state.update(shape=(*counts.shape, *state.shape[1:]))]


def _as_library(*operands: Any, has: tuple[bool, bool]) -> list[Any]:
    q, k, v, g, state, beta, counts = _named(operands, has)
    kept = jnp.zeros((q.shape[0], 0), jnp.int32) if counts is None else counts
    given = (q, k, v, g, g if beta is None else beta, state, kept)
    results = [jax.typeof(v), jax.typeof(state).update(shape=(*kept.shape, *state.shape[1:]))]
    return list(jax.ffi.ffi_call(MEMORY, results)(*given, corrects=np.int64(has[0])))[: 1 + has[1]]


def _batched(operands: Any, axes: Any, *, has: tuple[bool, bool]) -> Any:
    results = jax.vmap(functools.partial(_as_xla, has=has), in_axes=tuple(axes))(*operands)
    return results, [0] * len(results)


def _lower(ctx: Any, *operands: Any, has: tuple[bool, bool]) -> Any:
    native = on_one_device(ctx.module_context) and library.problem() is None
    form = functools.partial(_as_library if native else _as_xla, has=has)
    return mlir.lower_fun(form, multiple_results=True)(ctx, *operands)


def _as_xla(*operands: Any, has: tuple[bool, bool]) -> list[Any]:
    y, states = _in_chunks(*_named(operands, has))
    return [y] if states is None else [y, states]


memory_p = primitive(MEMORY, _shapes, _batched, _lower, _as_xla)


def _in_chunks(q: Any, k: Any, v: Any, g: Any, state: Any, beta: Any, counts: Any) -> tuple[Any, Any]:
    """Does what `fading_memory` does, as XLA compiles it."""
    length = q.shape[1]
    if length == 1:
        q, k, v, g = (x[:, 0] for x in (q, k, v, g))
        state = state * jnp.exp(g)[:, :, None, None]
        if beta is not None:
            v = (v - jnp.einsum("bhkv,bhk->bhv", state, k)) * beta[:, 0, :, None]
        state = state + k[:, :, :, None] * v[:, :, None]
        return jnp.einsum("bhkv,bhk->bhv", state, q)[:, None], None if counts is None else state[:, None]

    chunk = min(CHUNK, 1 << (length - 1).bit_length())
    pad = -length % chunk

    def chunks(x: Any) -> Any:  # [N, B, H, Q, ...]
        x = jnp.pad(x, ((0, 0), (0, pad), *((0, 0),) * (x.ndim - 2)))
        x = x.reshape(x.shape[0], -1, chunk, *x.shape[2:])
        return jnp.moveaxis(jnp.moveaxis(x, 3, 2), 1, 0)

    q, k, v, g = map(chunks, (q, k, v, g))
    g = jnp.cumsum(g, -1)
    below = jnp.tri(chunk, dtype=bool)
    fade = jnp.exp(jnp.where(below, g[..., :, None] - g[..., None, :], -jnp.inf))  # from one token to a later one
    erased = None
    if beta is not None:
        v, erased = _corrected(k, v, g, chunks(beta), fade)
    seen = jnp.einsum("nbhqk,nbhsk->nbhqs", q, k) * fade

    def one(state: Any, x: Any) -> Any:
        q, k, v, g, erased, seen = x
        new = v if erased is None else v - erased @ state
        y = (q * jnp.exp(g)[..., None]) @ state + seen @ new
        kept = k * jnp.exp(g[..., -1:] - g)[..., None]
        after = state * jnp.exp(g[..., -1])[..., None, None] + jnp.einsum("bhqk,bhqv->bhkv", kept, new)
        return after, (y, state, new)

    last, (y, before, new) = lax.scan(one, state, (q, k, v, g, erased, seen))
    y = jnp.moveaxis(jnp.moveaxis(y, 0, 1), 2, 3).reshape(y.shape[1], -1, *y.shape[2::2])[:, :length]
    if counts is None or counts.shape[1] == 1:
        return y, None if counts is None else last[:, None]

    def after_some(count: Any, k: Any, g: Any, before: Any, new: Any) -> Any:
        number = jnp.minimum(count // chunk, k.shape[0] - 1)
        k, g, before, new = (x[number] for x in (k, g, before, new))  # of one row: [H, Q, ...]
        inside = jnp.arange(chunk, dtype=jnp.int32) < count - number * chunk
        faded = jnp.where(inside, g, 0).min(-1)  # g falls
        kept = k * jnp.where(inside, jnp.exp(jnp.where(inside, faded[:, None] - g, 0)), 0)[..., None]
        return before * jnp.exp(faded)[:, None, None] + jnp.einsum("hqk,hqv->hkv", kept, new)

    some = jax.vmap(after_some, (0, None, None, None, None))  # over counts
    return y, jax.vmap(some, (0, 1, 1, 1, 1))(counts, k, g, before, new)


def _corrected(k: Any, v: Any, g: Any, beta: Any, fade: Any) -> tuple[Any, Any]:
    """Returns what each token of a chunk writes by the delta rule, as x - y S of the state S before the chunk.

    Token i writes beta_i (v_i - what its key finds), of which a part was written by the tokens before it in the chunk:
    a triangular system.

    Args:
      k: [..., Q, K].
      v: [..., Q, V].
      g: [..., Q], summed up from the chunk's beginning.
      beta: [..., Q].
      fade: [..., Q, Q], from one token to a later one.

    Returns:
      x [..., Q, V] and y [..., Q, K].
    """
    before = jnp.tri(k.shape[-2], k=-1, dtype=bool)
    found = jnp.where(before, jnp.einsum("nbhqk,nbhsk->nbhqs", k * beta[..., None], k) * fade, 0)
    inverse = _inverse(found)
    return inverse @ (v * beta[..., None]), inverse @ (k * (beta * jnp.exp(g))[..., None])


def _inverse(below: Any) -> Any:
    """Returns the inverse of 1 + below, which is strictly lower triangular, [..., Q, Q], where Q is a power of two.

    By halves, all of them at once: quicker than `triangular_solve` on a CPU, and as exact. The product of
    1 - below, 1 + below^2, 1 + below^4, ... would be the same, but has no correct digit where keys are much alike.
    """
    size = below.shape[-1]
    if size == 1:
        return jnp.ones_like(below)
    half = size // 2
    first, last = _inverse(jnp.stack([below[..., :half, :half], below[..., half:, half:]]))
    corner = -last @ (below[..., half:, :half] @ first)
    upper = jnp.concatenate([first, jnp.zeros_like(first)], -1)
    return jnp.concatenate([upper, jnp.concatenate([corner, last], -1)], -2)
