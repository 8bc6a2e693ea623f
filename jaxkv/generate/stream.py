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

The next turn goes on from `result.cache`, with the whole conversation as prompt; what is held is not computed again:

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
from jaxkv.generate.call import Call
from jaxkv.generate.generation import REASONS, RUNNING, SAMPLER, STOP, Generation, Speculation
from jaxkv.generate.loop import Plain
from jaxkv.generate.news import News
from jaxkv.generate.programs import Fixed, Form
from jaxkv.generate.reading import blocks, ends, fork, last_positions, mark_ends, read_block
from jaxkv.generate.sampling import Greedy
from jaxkv.meshes import beside

_ALL = np.iinfo(np.int32).max  # steps: until every row has ended


class Stream:
    """Tokens as they come: an iterator over the next token of each row, int32 [B], EMPTY (-1) for rows that have ended.

    Made by `stream`. One made by `stream_speculation` gives what each step brings, int32 [B, N]: a row's tokens stand
    in front, EMPTY behind them.

    Nothing is computed before the first `next`. It may be left at any time, by `break` or Ctrl-C: `result` has the
    tokens so far, and you may continue iterating later. One thread at a time.
    """

    def __init__(self, program: Any) -> None:
        """Takes the loop that it runs, a `loop.Plain` or a `verify.Speculative`."""
        call = program.call
        self._program, self._call = program, call
        self._last = last_positions(call.texts)
        trees: dict[str, Any] = {}
        self._unread: list[tuple[Any, ...]] = []  # a cache's name, its longest block, what reads one, how much is read
        self._unmarked: list[str] = []  # those whose recurrent layers are to keep the prompts' ends
        self._unforked: list[str] = []
        for name, (forward, params, cache, held) in zip(("_cache", "_draft"), program.caches, strict=False):
            trees[name] = cache
            if forward is not None:
                read = functools.partial(read_block, Fixed(forward, None, Form.of(cache), None), params)
                self._unread.append((name, cache.max_block, read, np.minimum(held, self._last)))
                self._unmarked += [name] if cache.recurrent else []
                self._unforked += [] if call.forks is None else [name]
        trees["_state"] = beside(call.cache, jax.tree.map(jnp.array, program.begin()))
        self._forms = {name: Form.of(tree) for name, tree in trees.items()}
        vars(self).update({name: tuple(jax.tree.leaves(tree)) for name, tree in trees.items()})
        self._advance = program.bound(*self._forms.values())
        # A forward or a sampler that fails in the loop fails here, before a cache is donated.
        self._advance.func.eval_shape(*self._advance.args, *map(vars(self).get, trees), np.int32(0))
        nothing = np.full((program.width, call.reasons.size), EMPTY, np.int32)
        zeros = np.zeros((3, call.reasons.size), np.int32)
        self._newest = np.concatenate([nothing, 0 * nothing, call.reasons[None], zeros])
        self._steps = [News(self._newest, program.width)]  # each step's, so that a loop that fails takes no token along
        self._checked = False  # whether the lengths of the cache were looked at
        self._error: str | None = None
        self._lock = threading.RLock()  # of one thread: Ctrl-C may strike before it is given back

    _cache: tuple[Any, ...]
    _state: tuple[Any, ...]
    _newest: Any  # see `news`

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> np.ndarray:
        self._enter()
        try:
            tokens = np.full((self._call.reasons.size, self._program.width), EMPTY, np.int32)
            while (tokens == EMPTY).all():  # a step may bring nothing
                told = self._guarded(self._look)
                if self._error is None and (told.reasons != RUNNING).all():
                    raise StopIteration
                tokens = self._decode(told.count + 1).tokens.copy()
        finally:
            self._lock.release()
        return tokens if self._program.kind is Speculation else tokens[:, 0]

    @property
    def result(self) -> Generation:
        """The Generation so far. Its cache is donated when the iteration goes on."""
        self._enter()
        try:
            with contextlib.suppress(CacheError):  # it is told by `error`
                self._guarded(self._look)
            if self._error is not None:
                return self._rest()
            caches = {name: form.build(getattr(self, name)) for name, form in self._forms.items()}
            tokens, log_probs = self._program.written(caches.pop("_state"))
        finally:
            self._lock.release()
        return self._generation(tokens, log_probs, tuple(REASONS[i] for i in self._steps[-1].reasons), caches)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why each row has ended, "running" if it hasn't: `result.reasons`, without a look at the device."""
        return tuple(REASONS[i] for i in self._look().reasons)

    def stop(self, rows: Any) -> None:
        """Ends some rows after the tokens that they have, for the reason "stop".

        Args:
          rows: bool [B]. Rows that have ended already stay as they are.

        Raises:
          ValueError: for another shape or dtype.
        """
        rows = np.asarray(rows)
        if rows.dtype != bool or rows.shape != self._call.reasons.shape:
            raise ValueError(
                f"rows is {rows.dtype}{list(rows.shape)}; give bool [{self._call.reasons.size}], one per row"
            )
        self._enter()
        try:
            told = self._look()
            told = told.ending(rows & (told.reasons == RUNNING), STOP)
            state = self._forms["_state"].build(self._state)
            leaves = [
                jax.device_put(told.reasons, leaf.sharding) if leaf is state.reason else leaf for leaf in self._state
            ]
            vars(self).update(_state=tuple(leaves), _newest=told.array)
            self._steps[-1] = told
        finally:
            self._lock.release()

    def run(self) -> Generation:
        """Decodes until every row has ended, without a stop at the host, and returns the Generation."""
        self._enter()
        try:
            self._decode(_ALL)
            return self.result
        finally:
            self._lock.release()

    def _enter(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise CacheError(
                "another thread is using this stream; let one thread iterate, or give each thread its own stream "
                "and cache"
            )

    def _look(self) -> News:
        """Returns what the last step told, and keeps it."""
        told = News(np.asarray(self._newest), self._program.width)
        if told.count != self._steps[-1].count:
            self._steps.append(told)
        return self._steps[-1]

    def _decode(self, until: int) -> News:
        """Decodes up to `until` steps, prefill first, and returns what the last of them told."""
        if self._error is not None:
            raise CacheError(self._error)
        for name in self._forms:
            checks.check_alive(getattr(self, name))
        told = self._guarded(lambda: self._run(until))
        if not self._checked:  # once: a look at the lengths waits for the device
            cache, state = (self._forms[name].build(getattr(self, name)) for name in ("_cache", "_state"))
            lengths, position = jax.device_get((cache.lengths, state.position))
            checks.check_lengths(lengths, np.where(position > self._call.last, position, 0))
            self._checked = True
        if (told.reasons == SAMPLER).any():
            token = self._forms["_state"].build(self._state).token
            checks.check_sampled(self._call.sampler, token, told.reasons, self._call.vocab_size)
        return told

    def _run(self, until: int) -> News:
        while self._unread:
            name, max_block, read, held = self._unread[0]
            for tokens, positions, taken in blocks(self._call.texts, held, self._last, max_block):
                self._set((name,), read, tokens, positions, getattr(self, name))
                held = held + taken
                self._unread[0] = (name, max_block, read, held)
            self._unread.pop(0)
        while self._unmarked:
            name = self._unmarked[0]
            at = ends(self._call.texts, self._call.cache.num_rows)
            self._set((name,), functools.partial(mark_ends, self._forms[name], at), getattr(self, name))
            self._unmarked.pop(0)
        while self._unforked:
            name = self._unforked[0]
            self._set((name,), functools.partial(fork, self._forms[name], *self._call.forks), getattr(self, name))
            self._unforked.pop(0)
        names = tuple(self._forms)
        self._set((*names, "_newest"), self._advance, *map(vars(self).get, names), np.int32(until))
        return self._look()

    def _set(self, names: tuple[str, ...], function: Callable[..., Any], *args: Any) -> None:
        # Runs the function and keeps its results in one call into C. Python looks for Ctrl-C between byte codes: in two
        # statements, or with trees to build, it would mostly strike in between, and what was donated would be lost.
        results = itertools.chain.from_iterable(map(function, *([arg] for arg in args)))
        vars(self).update(zip(names, results, strict=True))

    def _guarded(self, function: Callable[[], News]) -> News:
        """Returns what the function does; if it fails and takes the cache along, that is kept and told."""
        try:
            return function()
        except Exception as error:
            if self._survives():
                raise
            self._error = self._what_happened(error)
            raise CacheError(self._error) from error

    def _survives(self) -> bool:
        """Whether caches and state are there after a failure: it may have come before they were donated."""
        leaves = [getattr(self, name) for name in self._forms]
        try:
            gone = any(leaf.is_deleted() for leaf in jax.tree.leaves(leaves))
            return not gone and bool(jax.block_until_ready(leaves))
        except Exception:  # noqa: BLE001  (what the failed program left behind raises what failed in it)
            return False

    def _what_happened(self, error: Exception) -> str:
        kept = "No token had come out of it yet"
        if len(self._steps) > 1:
            kept = f"stream.result has the tokens of the {len(self._steps) - 1} steps that came before"
        return (
            f"the compiled loop failed: {checks.cause_of(error)}. {kept}; the cache was donated to it and is lost: "
            "make a new one with Cache.init"
        )

    def _rest(self) -> Generation:
        """The Generation of a loop that failed: what came out of it before."""
        shape = (self._call.reasons.size, int(self._call.limits.max()))
        tokens, log_probs = np.full(shape, EMPTY, np.int32), np.zeros(shape, np.float32)
        lengths = np.zeros(shape[0], np.int32)
        for told in self._steps[1:]:
            for row, new in enumerate(told.tokens != EMPTY):
                at = slice(lengths[row], lengths[row] + new.sum())
                tokens[row, at], log_probs[row, at] = told.tokens[row, new], told.log_probs[row, new]
            lengths += (told.tokens != EMPTY).sum(1)
        reasons = ("failed" if i == RUNNING else REASONS[i] for i in self._steps[-1].reasons)
        return self._generation(tokens, log_probs, tuple(reasons), {})

    def _generation(self, tokens: Any, log_probs: Any, reasons: Any, caches: dict[str, Any]) -> Generation:
        more = self._program.counted(self._steps[-1].counts)
        if "_draft" in caches:
            more["draft_cache"] = caches["_draft"]
        return self._program.kind(
            tokens=tokens,
            lengths=(tokens != EMPTY).sum(1, dtype=np.int32),
            log_probs=log_probs,
            reasons=reasons,
            cache=caches.get("_cache"),
            error=self._error,
            **more,
        )


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
    num_samples: int | Sequence[int] = 1,
) -> Stream:
    """Returns an iterator over the tokens that `generate` returns, as they come. See `generate`, `Stream`.

    It runs the compiled loop of `generate`, one step at a time: the tokens are exactly the same.
    """
    call = Call.of(
        forward,
        params,
        prompts,
        cache,
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        stop_tokens=stop_tokens,
        key=key,
        num_samples=num_samples,
    )
    return Stream(Plain(call))


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
    num_samples: int | Sequence[int] = 1,
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
      max_new_tokens: most tokens per row, 1 or more; one number, or one per prompt.
      sampler: from `jaxkv.sampling`, or a hashable `sample(key, logits) -> token`, called per row with a PRNG key and
        float32 logits [V], returning an integer scalar. The key comes from `key`, the row and the position.
      stop_tokens: a row ends after one of these. A token, or several that follow one another: `[0, [13, 10]]`. All of
        them must have been generated.
      key: PRNG key, from `jax.random.key(seed)`. Greedy samplers don't need it, nor does a function of your own that
        doesn't read its key: without `key` it gets None.
      num_samples: in how many rows each prompt goes on, one after the other; one number, or one per prompt. The cache
        has as many rows as that makes in all. Each prompt is prefilled once: what row i holds of prompt i is kept, and
        what other rows hold is forgotten. Then rows go on from it as from prompts of their own; on Pages, samples that
        find no page end as "full".

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
    return stream(forward, params, prompts, cache, num_samples=num_samples, **options).run()
