"""Prompts are read into the cache in blocks of a few sizes: `prefill`, `score`, and the beginning of `generate`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.cache.cache import Cache
from jaxkv.cache.rows import Rows
from jaxkv.cache.spec import EMPTY
from jaxkv.generate import checks
from jaxkv.generate.programs import Fixed, Form

_SMALLEST_BLOCK = 32  # every block reads all weights of the model, so a smaller one costs about as much


def prefill(forward: Callable[..., Any], params: Any, prompts: Sequence[Any], cache: Cache) -> tuple[jax.Array, Cache]:
    """Prefills prompts, and returns the logits of the next token of each.

    In the blocks of `generate`, the last token of each row by itself: the logits are those that `generate` chooses its
    first token from, to the bit. To go on with `generate`, give the prompt and at least one token more.

    Args:
      forward, params, prompts: as for `jaxkv.generate`; tokens that the cache holds are not computed again.
      cache: as for `jaxkv.generate`. It is donated.

    Returns:
      logits [B, V] of the token after each prompt, in the model's dtype; 0 for rows without a prompt, and for rows that
      did not fit, whose `cache.ok` is False. And the cache, which holds the prompts.

    Raises:
      ValueError, CacheError: as `jaxkv.generate`.

    ```python
    logits, cache = jaxkv.prefill(forward, params, [[1, 2, 3], [7]], cache)
    tokens = logits.argmax(-1)
    ```
    """
    cache, prompts, held, _ = checks.check_call(forward, params, prompts, cache)
    form = Form.of(cache)
    fixed, leaves = Fixed(forward, None, form, None), tuple(jax.tree.leaves(cache))
    last = last_positions(prompts)
    with checks.failures_told("reading the prompts"):
        for tokens, positions, _ in blocks(prompts, np.minimum(held, last), last, cache.max_block):
            (leaves,) = read_block(fixed, params, tokens, positions, leaves)
        live = np.array([prompt.size > 0 for prompt in prompts])
        tokens = np.array([[prompt[-1] if prompt.size else 0] for prompt in prompts], np.int32)
        positions = np.where(live, last, EMPTY)[:, None].astype(np.int32)
        leaves, logits = _read_last(fixed, params, tokens, positions, leaves)
        cache = form.build(leaves)
        checks.check_lengths(np.asarray(cache.lengths), np.where(live & np.asarray(cache.ok), last + 1, 0))
    return logits, cache


def score(forward: Callable[..., Any], params: Any, prompts: Sequence[Any], cache: Cache) -> tuple[np.ndarray, Cache]:
    """Returns how likely the model finds given texts, token by token.

    In the blocks of `generate`: no array of the whole text's logits exists, on the host or on the device.

    Args:
      forward, params, prompts: as for `jaxkv.generate`.
      cache: as for `jaxkv.generate`. It is donated. Tokens that it holds are not computed again.

    Returns:
      log_probs, float32 [B, N], N the length of the longest text: log_probs[b, i] is that of prompts[b][i] after
      prompts[b][:i], log_softmax in float32. 0 where it can't be told: for the first token of each row that is read
      here, those before it, after a row's end, and in rows that did not fit, whose `cache.ok` is False. And the cache,
      which holds all but the last token of each row: `generate` goes on from it.

    Raises:
      ValueError, CacheError: as `jaxkv.generate`.

    ```python
    log_probs, cache = jaxkv.score(forward, params, [[*context, *answer]], cache)
    log_prob = log_probs[0, len(context) :].sum()
    ```
    """
    cache, prompts, held, vocab_size = checks.check_call(forward, params, prompts, cache)
    form = Form.of(cache)
    fixed, leaves = Fixed(forward, None, form, None), tuple(jax.tree.leaves(cache))
    last = last_positions(prompts)
    begin = read = np.minimum(held, last)
    scored = []
    with checks.failures_told("reading the texts"):
        for tokens, positions, taken in blocks(prompts, begin, last, cache.max_block):
            targets = np.zeros_like(tokens)
            for row, (start, n) in enumerate(zip(read, taken, strict=True)):
                targets[row, :n] = prompts[row][start + 1 : start + n + 1]
            leaves, log_probs = _score_block(fixed, params, tokens, positions, targets, leaves)
            scored.append((read, taken, log_probs))
            read = read + taken
        if cache.recurrent:
            (leaves,) = mark_ends(form, ends(prompts, cache.num_rows), leaves)
        out = np.zeros((len(prompts), max(prompt.size for prompt in prompts)), np.float32)
        for starts, counts, log_probs in scored:
            values = np.asarray(log_probs)
            for row, (start, n) in enumerate(zip(starts, counts, strict=True)):
                out[row, start + 1 : start + n + 1] = values[row, :n]
        cache = form.build(leaves)
        ok = np.asarray(cache.ok)
        checks.check_lengths(np.asarray(cache.lengths), np.where(ok & (read > begin), read, 0))
    out[~ok] = 0
    return out, cache


def last_positions(prompts: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the position of each prompt's last token, int32 [B]; 0 without a prompt."""
    return np.array([max(prompt.size - 1, 0) for prompt in prompts], np.int32)


def ends(prompts: Sequence[np.ndarray], num_rows: int) -> np.ndarray:
    """Returns how long each row is before its prompt's last token is read, int32 [R]; EMPTY without a prompt."""
    found = np.full(num_rows, EMPTY, np.int32)
    found[: len(prompts)] = [prompt.size - 1 for prompt in prompts]
    return found


def blocks(
    prompts: Sequence[np.ndarray], begin: np.ndarray, end: np.ndarray, max_block: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields (tokens [B, T], positions [B, T], how many of each row [B]) until all prompts are prefilled."""
    for size, taken in schedule(end - begin, 1 << (max_block.bit_length() - 1)):
        tokens = np.zeros((taken.size, size), np.int32)
        positions = np.full((taken.size, size), EMPTY, np.int32)
        for row, (start, n) in enumerate(zip(begin, taken, strict=True)):
            tokens[row, :n] = prompts[row][start : start + n]
            positions[row, :n] = np.arange(start, start + n)
        yield tokens, positions, taken
        begin = begin + taken


def schedule(left: np.ndarray, block: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (block size, tokens taken per row) until nothing is left, largest blocks first.

    What is left is padded to a block if it fills more than three quarters of it: fewer blocks read the weights of the
    model fewer times. Each row is cut by its own length: its blocks are the same whatever the other rows hold, so its
    numbers are too.
    """
    left, size = left.copy(), block
    while (left > 0).any():
        enough = 1 if size <= _SMALLEST_BLOCK else size * 3 // 4 + 1
        taken = np.where(left >= enough, np.minimum(left, size), 0)
        if taken.any():
            yield size, taken
            left -= taken
        else:
            size //= 2


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def read_block(fixed: Any, params: Any, tokens: Any, positions: Any, cache: Any) -> tuple[Any]:
    # The logits are unused: XLA drops the output head.
    _, after = fixed.forward(params, tokens, positions, fixed.cache.build(cache))
    return (fixed.cache.flatten(after),)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def mark_ends(form: Form, ends: Any, cache: Any) -> tuple[Any]:
    """Returns leaves of the cache whose recurrent layers can go back to where the rows that stand at ends [R] do."""
    cache = form.build(cache)
    rows = jnp.arange(cache.num_rows, dtype=jnp.int32)
    return (form.flatten(cache.checkpoint(jnp.where(cache.lengths == ends, rows, EMPTY))),)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def take_rows(form: Form, rows: Any, cache: Any) -> tuple[Any]:
    return (form.flatten(form.build(cache).take(rows)),)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=5)
def fork(form: Form, sources: Any, last: Any, rank: Any, least: Any, cache: Any) -> tuple[Any]:
    """Returns leaves of the cache whose rows begin as rows `sources` of it do, as many of them as there are pages for.

    Args:
      form: of the cache.
      sources: int32 [R]; R for an empty row.
      last: int32 [R], the position of the token that each row is given next; EMPTY: none.
      rank: int32 [R], in which order they are served; the rows without a token come last.
      least: int32 scalar, so many are forked in any case: one of each text.
      cache: its leaves.
    """
    cache = form.build(cache).take(sources)
    if isinstance(cache.layout, Rows):
        return (form.flatten(cache),)

    # All who share a page want one to write to, and who gets none has the old one still. So the last let go of it until
    # all others can go on.
    def crowded(carry: tuple[Cache, Any]) -> Any:
        cache, most = carry
        after, _ = cache.begin(jnp.where(rank < most, last, EMPTY)[:, None])
        return (most > least) & (cache.ok & ~after.ok).any()

    def fewer(carry: tuple[Cache, Any]) -> tuple[Cache, Any]:
        cache, most = carry
        return cache.reset(rank == most - 1), most - 1

    forked = last >= 0
    cache, most = jax.lax.while_loop(crowded, fewer, (cache, forked.sum(dtype=jnp.int32)))
    return (form.flatten(dataclasses.replace(cache, ok=cache.ok & ((rank < most) | ~forked))),)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _read_last(fixed: Any, params: Any, tokens: Any, positions: Any, cache: Any) -> tuple[Any, Any]:
    logits, after = fixed.forward(params, tokens, positions, fixed.cache.build(cache))
    there = (positions >= 0) & after.ok[:, None]
    after = after.checkpoint(jnp.where(there[:, 0], jnp.arange(after.num_rows, dtype=jnp.int32), EMPTY))
    return fixed.cache.flatten(after), jnp.where(there, logits[:, 0], 0)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=5)
def _score_block(fixed: Any, params: Any, tokens: Any, positions: Any, targets: Any, cache: Any) -> tuple[Any, Any]:
    logits, after = fixed.forward(params, tokens, positions, fixed.cache.build(cache))
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[:, :, None], 2)[:, :, 0]
    return fixed.cache.flatten(after), chosen - jax.nn.logsumexp(logits, axis=2)
