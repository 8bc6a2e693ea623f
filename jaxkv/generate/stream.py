"""`generate` and `stream`: prefill in blocks, then one compiled loop decodes.

>>> table = jnp.eye(5)[(jnp.arange(5) + 1) % 5]             # a "model": after token n comes n + 1
>>> spec = jaxkv.LayerSpec(jaxkv.Full(), num_kv_heads=1, head_dim=1)
>>> def forward(params, tokens, positions, cache):
...     cache, step = cache.begin(positions)
...     x = jnp.ones((*tokens.shape, 1, 1))                  # a real model: projections, then layer.put and attend
...     layers = [layer.put(step, x, x) for layer in cache.layers]
...     return params[tokens], cache.with_layers(layers)
>>> cache = jaxkv.Cache.init([spec], num_rows=2, capacity=16)
>>> result = generate(forward, table, [[0, 1], [2]], cache, max_new_tokens=3, stop_tokens=[0])
>>> result.tokens
array([[2, 3, 4],
       [3, 4, 0]], dtype=int32)
>>> result.reasons
('length', 'stop')

The next turn goes on from `result.cache`, with the whole conversation as prompt; what is held is not read again:

>>> turn = generate(forward, table, [[0, 1, 2, 3, 4, 3, 3], None], result.cache, max_new_tokens=2)
>>> turn.tokens, turn.reasons
(array([[ 4,  0], [-1, -1]], dtype=int32), ('length', 'idle'))
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.cache.cache import Cache
from jaxkv.cache.spec import EMPTY
from jaxkv.errors import CacheError
from jaxkv.generate import checks
from jaxkv.generate.generation import IDLE, REASONS, RUNNING, SAMPLER, STOP, Generation
from jaxkv.generate.history import History
from jaxkv.generate.loop import State, decode
from jaxkv.generate.programs import Fixed, Form
from jaxkv.generate.reading import blocks, last_positions, read_block, take_rows
from jaxkv.generate.sampling import Greedy
from jaxkv.meshes import beside


class Stream:
    """Tokens as they come: an iterator over int32 [B], the next token of each row, EMPTY (-1) for rows that have ended.

    Made by `stream`. Nothing is computed before the first `next`. It may be left at any time, by `break` or Ctrl-C:
    `result` has the tokens so far, and you may continue iterating later. One thread at a time.
    """

    def __init__(
        self,
        forward: Any,
        params: Any,
        prompts: Any,
        cache: Cache,
        *,
        max_new_tokens: Any,
        sampler: Any,
        stop_tokens: Any,
        key: Any,
        forks: tuple[int, int] | None = None,
    ) -> None:
        """See `stream`; forks (P, n): prompt i < P is read into row i, and goes on in rows i, P + i, 2 P + i, ..."""
        cache, texts, held, vocab_size = checks.check_call(forward, params, prompts, cache)
        self._num_read, copies = forks or (len(texts), 1)
        sources = np.arange(len(texts), dtype=np.int32)
        sources[: self._num_read * copies] = np.tile(sources[: self._num_read], copies)
        self._prompts = [texts[i] for i in sources]
        self._forked = copies == 1
        most = cache.capacity + 1  # the last one is what does not fit any more
        limits = np.minimum(checks.check_max_new_tokens(max_new_tokens, cache.num_rows), most)
        stops = checks.check_stop_tokens(stop_tokens, vocab_size)
        key = checks.check_sampler(sampler, key, vocab_size)
        self._limit = int(limits.max())
        self._sampler, self._vocab_size = sampler, vocab_size
        self._last = last_positions(self._prompts)
        self._read = np.minimum(held[sources], self._last)  # how much of each prompt the cache holds
        self._max_block = cache.max_block

        shape = (cache.num_rows, most)  # whatever the limit is, so that it is compiled once
        reason = np.array([RUNNING if prompt.size else IDLE for prompt in self._prompts], np.int32)
        history = None
        if getattr(sampler, "needs_history", False):
            rows = [
                History.of(prompt, vocab_size, size=most, limit=prompt.size + limit)
                for prompt, limit in zip(self._prompts, limits, strict=True)
            ]
            history = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
        state = State(
            token=np.array([prompt[-1] if prompt.size else 0 for prompt in self._prompts], np.int32),
            position=self._last,
            reason=reason,
            count=np.int32(0),
            tokens=np.full(shape, EMPTY, np.int32),
            log_probs=np.zeros(shape, np.float32),
            history=history,
        )
        state = beside(cache, jax.tree.map(jnp.array, state))
        self._forms = Form.of(cache), Form.of(state)
        self._cache, self._state = (tuple(jax.tree.leaves(tree)) for tree in (cache, state))
        self._read_block = functools.partial(read_block, Fixed(forward, None, self._forms[0], None), params)
        self._fork = functools.partial(take_rows, self._forms[0], sources)
        fixed = Fixed(forward, sampler, *self._forms)
        self._decode = functools.partial(decode, fixed, params, jnp.asarray(stops), jnp.asarray(limits), key)
        # A forward or a sampler that fails in the loop fails here, before the cache is donated.
        decode.eval_shape(*self._decode.args, self._cache, self._state, np.int32(0))
        self._newest = np.stack([np.full_like(reason, EMPTY), 0 * reason, reason, 0 * reason])
        self._steps = [self._newest]  # each step's, so that a loop that fails takes no token along
        self._checked = False  # whether the lengths of the cache were looked at
        self._error: str | None = None
        self._lock = threading.RLock()  # of one thread: Ctrl-C may strike before it is given back

    _cache: tuple[Any, ...]
    _state: tuple[Any, ...]
    _newest: Any  # int32 [4, B], see `decode`

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> np.ndarray:
        self._enter()
        try:
            _, _, reason, (count, *_) = self._guarded(self._look)
            if self._error is None and (reason != RUNNING).all():
                raise StopIteration
            tokens = self._advance(count + 1)
        finally:
            self._lock.release()
        if (tokens == EMPTY).all():  # the rows that were left have ended without a token
            raise StopIteration
        return tokens

    @property
    def result(self) -> Generation:
        """The Generation so far. Its cache is donated when the iteration goes on."""
        self._enter()
        try:
            with contextlib.suppress(CacheError):  # it is told by `error`
                self._guarded(self._look)
            if self._error is not None:
                return self._rest()
            cache, state = self._forms[0].build(self._cache), self._forms[1].build(self._state)
            tokens, log_probs = np.array(state.tokens)[:, : self._limit], np.array(state.log_probs)[:, : self._limit]
        finally:
            self._lock.release()
        return _generation(tokens, log_probs, tuple(REASONS[i] for i in self._steps[-1][2]), cache)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why each row has ended, "running" if it hasn't: `result.reasons`, without a look at the device."""
        return tuple(REASONS[i] for i in self._look()[2])

    def stop(self, rows: Any) -> None:
        """Ends some rows after the tokens that they have, for the reason "stop".

        Args:
          rows: bool [B]. Rows that have ended already stay as they are.

        Raises:
          ValueError: for another shape or dtype.
        """
        rows = np.asarray(rows)
        if rows.dtype != bool or rows.shape != (len(self._prompts),):
            raise ValueError(f"rows is {rows.dtype}{list(rows.shape)}; give bool [{len(self._prompts)}], one per row")
        self._enter()
        try:
            newest = self._look().copy()
            newest[2] = np.where(rows & (newest[2] == RUNNING), STOP, newest[2])
            state = self._forms[1].build(self._state)
            leaves = [
                jax.device_put(newest[2], leaf.sharding) if leaf is state.reason else leaf for leaf in self._state
            ]
            vars(self).update(_state=tuple(leaves), _newest=newest)
            self._steps[-1] = newest
        finally:
            self._lock.release()

    def run(self) -> Generation:
        """Decodes until every row has ended, without a stop at the host, and returns the Generation."""
        self._enter()
        try:
            self._advance(self._limit)
            return self.result
        finally:
            self._lock.release()

    def _enter(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise CacheError(
                "another thread is using this stream; let one thread iterate, or give each thread its own stream "
                "and cache"
            )

    def _look(self) -> np.ndarray:
        """Returns what the last step told, int32 [4, B], and keeps it."""
        newest = np.asarray(self._newest)
        if newest[3, 0] != self._steps[-1][3, 0]:
            self._steps.append(newest)
        return self._steps[-1]

    def _advance(self, until: int) -> np.ndarray:
        """Decodes up to `until` tokens per row, prefill first, and returns the newest, int32 [B]."""
        if self._error is not None:
            raise CacheError(self._error)
        checks.check_alive(self._cache)
        newest = self._guarded(lambda: self._run(until))
        if not self._checked:  # once: a look at the lengths waits for the device
            cache, state = self._forms[0].build(self._cache), self._forms[1].build(self._state)
            lengths, position = jax.device_get((cache.lengths, state.position))
            checks.check_lengths(lengths, np.where(position > self._last, position, 0))
            self._checked = True
        if (newest[2] == SAMPLER).any():
            token = self._forms[1].build(self._state).token
            checks.check_sampled(self._sampler, token, newest[2], self._vocab_size)
        return newest[0].copy()

    def _run(self, until: int) -> np.ndarray:
        n = self._num_read
        for tokens, positions, taken in blocks(self._prompts[:n], self._read[:n], self._last[:n], self._max_block):
            self._set(("_cache",), self._read_block, tokens, positions, self._cache)
            self._read = np.append(self._read[:n] + taken, self._read[n:])
        if not self._forked:
            self._set(("_cache",), self._fork, self._cache)
            self._forked = True
        limit = np.int32(min(until, self._limit))
        self._set(("_cache", "_state", "_newest"), self._decode, self._cache, self._state, limit)
        return self._look()

    def _set(self, names: tuple[str, ...], function: Callable[..., Any], *args: Any) -> None:
        # Runs the function and keeps its results in one call into C. Python looks for Ctrl-C between byte codes: in two
        # statements, or with trees to build, it would mostly strike in between, and what was donated would be lost.
        results = itertools.chain.from_iterable(map(function, *([arg] for arg in args)))
        vars(self).update(zip(names, results, strict=True))

    def _guarded(self, function: Callable[[], np.ndarray]) -> np.ndarray:
        """Returns what the function does; if it fails and takes the cache along, that is kept and told."""
        try:
            return function()
        except Exception as error:
            if self._survives():
                raise
            self._error = self._what_happened(error)
            raise CacheError(self._error) from error

    def _survives(self) -> bool:
        """Whether cache and state are there after a failure: it may have come before they were donated."""
        leaves = (*self._cache, *self._state)
        try:
            return not any(leaf.is_deleted() for leaf in leaves) and bool(jax.block_until_ready(leaves))
        except Exception:  # noqa: BLE001  (what the failed program left behind raises what failed in it)
            return False

    def _what_happened(self, error: Exception) -> str:
        num_told = len(self._steps) - 1
        kept = (
            f"stream.result has the {num_told} tokens per row that came before"
            if num_told
            else "No token had come out of it yet"
        )
        return (
            f"the compiled loop failed: {checks.cause_of(error)}. {kept}; the cache was donated to it and is lost: "
            "make a new one with Cache.init"
        )

    def _rest(self) -> Generation:
        """The Generation of a loop that failed: what came out of it before."""
        shape = (len(self._prompts), self._limit)
        tokens, log_probs = np.full(shape, EMPTY, np.int32), np.zeros(shape, np.float32)
        for newest in self._steps[1:]:
            tokens[:, newest[3, 0] - 1], log_probs[:, newest[3, 0] - 1] = newest[0], newest[1].view(np.float32)
        reasons = ("failed" if i == RUNNING else REASONS[i] for i in self._steps[-1][2])
        return _generation(tokens, log_probs, tuple(reasons), None, self._error)


def _generation(tokens: Any, log_probs: Any, reasons: Any, cache: Any, error: str | None = None) -> Generation:
    return Generation(tokens, (tokens != EMPTY).sum(1, dtype=np.int32), log_probs, reasons, cache, error)


def stream(
    forward: Callable[..., Any],
    params: Any,
    prompts: Sequence[Any],
    cache: Cache,
    *,
    max_new_tokens: int | Sequence[int],
    sampler: Callable[..., Any] = Greedy(),
    stop_tokens: Sequence[Any] | int = (),
    key: Any = None,
) -> Stream:
    """Returns an iterator over the tokens that `generate` returns, as they come. See `generate`, `Stream`.

    It runs the compiled loop of `generate`, one step at a time: the tokens are exactly the same.
    """
    options = {"max_new_tokens": max_new_tokens, "sampler": sampler, "stop_tokens": stop_tokens, "key": key}
    return Stream(forward, params, prompts, cache, **options)


def generate(
    forward: Callable[..., Any],
    params: Any,
    prompts: Sequence[Any],
    cache: Cache,
    *,
    max_new_tokens: int | Sequence[int],
    sampler: Callable[..., Any] = Greedy(),
    stop_tokens: Sequence[Any] | int = (),
    key: Any = None,
) -> Generation:
    """Continues every prompt, all rows together, and returns the tokens and the cache to go on from.

    Runs on the host, not under `jit`. The prompt but for its last token is read in blocks of powers of two up to the
    cache's `max_block`; then one compiled loop decodes until every row has ended. The loop is compiled once per
    (forward, sampler, shapes), reading once per block size, whatever prompts, limits, stop tokens and keys are.

    A row's tokens depend on its own prompt, number and key only: in batches of the same shape they are bitwise the
    same whatever its neighbors (with JAX's default PRNG). A row that was read up to a multiple of the largest block,
    here or by `copy_prefix`, goes on bitwise as if it had been read from the start.

    Args:
      forward: the model, `forward(params, tokens, positions, cache) -> (logits, cache)`. tokens and positions are
        int32 [B, T], EMPTY positions are padding; logits are [B, T, V] of any float dtype; it calls
        `cache.begin(positions)` and returns the cache it got, `with_layers`. Hashable: a plain function, or what
        `jaxkv.nnx.functional` returns. Give the same object each time: a new lambda compiles again.
      params: pytree of arrays, handed to forward.
      prompts: one per row of the cache, each the whole history of that row: a sequence of token numbers. The first
        `cache.lengths[row]` of them are taken as read. What you put there yourself need not be tokens (the embeddings
        of an image): give any token at each of its places. None leaves a row idle.
      cache: holds the beginning of each prompt, or nothing. It is donated, and is gone after the call: go on with
        `result.cache`.
      max_new_tokens: most tokens per row, 1 or more; one number, or one per row.
      sampler: from `jaxkv.sampling`, or a hashable `sample(key, logits) -> token`, called per row with a PRNG key and
        float32 logits [V], returning an integer scalar. The key comes from `key`, the row and the position.
      stop_tokens: a row ends after one of these. A token, or several that follow one another: `[0, [13, 10]]`. All of
        them must have been generated.
      key: PRNG key, from `jax.random.key(seed)`. Greedy samplers don't need it, nor does a function of your own that
        doesn't read its key: without `key` it gets None.

    Returns:
      A Generation.

    Raises:
      ValueError: before anything is touched, for arguments that don't fit: number of prompts, empty prompts, prompts
        longer than the capacity or not longer than what the row holds, tokens outside the vocabulary, a missing key,
        a forward that returns the cache as it was. If its own `jit` hides that, the error comes at the end, or with a
        stream's first token. Also for a sampler that answers with a token outside the vocabulary.
      CacheError: if the cache was donated before, or the compiled loop fails, as by an error in a callback; tokens and
        cache are then lost. (A stream keeps the tokens that came before.)
    """
    options = {"max_new_tokens": max_new_tokens, "sampler": sampler, "stop_tokens": stop_tokens, "key": key}
    return Stream(forward, params, prompts, cache, **options).run()
