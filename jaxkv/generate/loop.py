"""The generation loop: reads prompts in blocks, then decodes in one compiled while_loop. The model is a function.

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

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.cache.cache import Cache
from jaxkv.cache.spec import EMPTY
from jaxkv.generate import checks
from jaxkv.generate.sampling import Greedy
from jaxkv.meshes import constrain

_REASONS = ("running", "stop", "full", "nan", "idle")  # by number, as the loop keeps them; "length" is told on the host
_RUNNING, _STOP, _FULL, _NAN, _IDLE = range(5)
_SMALLEST_BLOCK = 32  # every block reads all weights of the model, so a smaller one costs about as much


@dataclasses.dataclass(frozen=True, eq=False)
class Generation:
    """What came out, one row per row of the cache.

    Attributes:
      tokens: int32 [B, N], EMPTY (-1) after a row's end; N is max_new_tokens, but at most the cache's capacity + 1.
        A stop token is among them.
      lengths: int32 [B], how many tokens each row has.
      log_probs: float32 [B, N], of the tokens under the model's own distribution, log_softmax of the logits in float32
        before the sampler changed them; 0 after a row's end.
      reasons: why each row ended. "stop": a stop token; "length": max_new_tokens; "full": the next token did not fit
        into the cache; "nan": the model's logits are NaN, so there is no next token; "idle": no prompt; "running": a
        stream has not got to the row's end yet.
      cache: goes on from here. It holds prompt and tokens but for the last token of each row. A "nan" row holds that
        one too. A "full" row holds what it held and has `ok` False: it takes nothing more until `cache.retry` or
        `cache.reset`.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    log_probs: np.ndarray
    reasons: tuple[str, ...]
    cache: Cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    token: Any  # int32 [B], last token of each row, not yet in the cache
    position: Any  # int32 [B], where it goes
    reason: Any  # int32 [B], index into _REASONS
    count: Any  # int32 scalar, steps so far
    tokens: Any  # int32 [B, capacity + 1]
    log_probs: Any  # float32 [B, capacity + 1]
    seen: Any  # bool [B, V], tokens in prompt and generated; None unless the sampler needs it


class _Form(NamedTuple):
    """How the flat tuples of arrays that the compiled functions take and return are a cache or a state.

    Flat, because building trees costs the host more time per token than all else here does; and see `Stream._set`.
    """

    kind: Any  # the tree
    places: tuple[Any, ...] | None  # the sharding of each leaf, if they lie on a mesh

    @classmethod
    def of(cls, tree: Any) -> _Form:
        places = tuple(leaf.sharding for leaf in jax.tree.leaves(tree))
        on_mesh = all(isinstance(place, jax.sharding.NamedSharding) for place in places)
        return cls(jax.tree.structure(tree), places if on_mesh else None)

    def build(self, leaves: Any) -> Any:
        return self.kind.unflatten(leaves)

    def flatten(self, tree: Any) -> tuple[Any, ...]:
        leaves = tuple(jax.tree.leaves(tree))
        if self.places is None:
            return leaves
        # Left alone, XLA shards what was replicated, and the next call is compiled anew.
        return tuple(map(constrain, leaves, self.places))


@functools.lru_cache(maxsize=None)  # jit keeps a program for each of them as well
@dataclasses.dataclass(frozen=True, eq=False)
class _Fixed:
    """What a program is compiled for. Made once for equal parts: jit then compares and hashes it by identity."""

    forward: Any
    sampler: Any
    cache: _Form
    state: _Form | None


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _prefill(fixed: Any, params: Any, tokens: Any, positions: Any, cache: Any) -> tuple[Any]:
    # The logits are unused: XLA drops the output head.
    _, after = fixed.forward(params, tokens, positions, fixed.cache.build(cache))
    return (fixed.cache.flatten(after),)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(4, 5))
def _decode(fixed: Any, params: Any, stops: Any, key: Any, cache: Any, state: Any, until: Any) -> tuple[Any, Any, Any]:
    """Returns cache and state after `until` steps, or fewer if every row has ended, and the newest tokens, int32 [B].

    The newest tokens are those of the last step of this call, EMPTY if there was none.
    """
    forward, sampler = fixed.forward, fixed.sampler
    cache, state = fixed.cache.build(cache), fixed.state.build(state)
    before = state.count
    rows = jnp.arange(state.token.shape[0], dtype=jnp.int32)
    # A row's randomness depends on the key, its number and the position, on nothing else.
    row_keys = None if key is None else jax.vmap(jax.random.fold_in, (None, 0))(key, rows)

    def choose(key: Any, position: Any, logits: Any, seen: Any) -> Any:
        key = None if key is None else jax.random.fold_in(key, position)
        token = jnp.asarray(sampler(key, logits) if seen is None else sampler(key, logits, seen))
        if token.shape or not jnp.issubdtype(token.dtype, jnp.integer):
            raise ValueError(
                f"sampler {sampler} returned {token.dtype}{list(token.shape)} for the logits [V] of one row; it must "
                "return one token, an integer scalar"
            )
        return token.astype(jnp.int32)

    def unfinished(carry: tuple[Any, _State]) -> Any:
        _, state = carry
        return (state.count < until) & (state.reason == _RUNNING).any()

    def step(carry: tuple[Any, _State]) -> tuple[Any, _State]:
        cache, state = carry
        live = state.reason == _RUNNING
        positions = jnp.where(live, state.position, EMPTY)
        logits, cache = forward(params, state.token[:, None], positions[:, None], cache)
        logits = logits[:, 0].astype(jnp.float32)
        chosen = jax.vmap(choose)(row_keys, state.position + 1, logits, state.seen)
        log_probs = jnp.take_along_axis(logits, chosen[:, None], 1)[:, 0] - jax.nn.logsumexp(logits, axis=1)
        nan = jnp.isnan(logits).any(1)  # XLA's logsumexp may be finite for NaN
        fits = live & cache.ok & ~nan
        stopped = fits & (chosen[:, None] == stops[None, :]).any(1)
        ended = jnp.where(cache.ok, jnp.where(nan, _NAN, jnp.where(stopped, _STOP, _RUNNING)), _FULL)
        reason = jnp.where(live, ended, state.reason)
        seen = state.seen
        if seen is not None:
            vocabulary = jnp.arange(seen.shape[1], dtype=jnp.int32)
            seen = seen | (fits[:, None] & (chosen[:, None] == vocabulary[None, :]))
        state = _State(
            token=jnp.where(fits, chosen, state.token),
            position=jnp.where(fits, state.position + 1, state.position),
            reason=reason,
            count=state.count + 1,
            tokens=_write_column(state.tokens, jnp.where(fits, chosen, EMPTY), state.count),
            log_probs=_write_column(state.log_probs, jnp.where(fits, log_probs, 0.0), state.count),
            seen=seen,
        )
        return cache, state

    cache, state = jax.lax.while_loop(unfinished, step, (cache, state))
    newest = jax.lax.dynamic_index_in_dim(state.tokens, state.count - 1, axis=1, keepdims=False)
    newest = jnp.where(state.count > before, newest, EMPTY)
    return fixed.cache.flatten(cache), fixed.state.flatten(state), newest


def _write_column(buffer: Any, column: Any, i: Any) -> Any:
    return jax.lax.dynamic_update_slice_in_dim(buffer, column[:, None], i, axis=1)


class Stream:
    """Tokens as they come: an iterator over int32 [B], the next token of each row, EMPTY (-1) for rows that have ended.

    Made by `stream`. Nothing is computed before the first `next`. It may be left at any time, by `break` or Ctrl-C:
    `result` is what there is so far, and iterating can go on later.
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
    ) -> None:
        checks.check_cache(cache)
        cache = jax.tree.map(jnp.asarray, cache)
        held = np.array(cache.lengths)
        vocab_size = checks.check_forward(forward, params, cache)
        self._prompts = checks.check_prompts(prompts, held, cache.capacity, vocab_size)
        most = cache.capacity + 1  # the last one is what does not fit any more
        self._limit = min(checks.check_max_new_tokens(max_new_tokens), most)
        stops = checks.check_stop_tokens(stop_tokens, vocab_size)
        key = checks.check_sampler(sampler, key)
        self._last = np.array([max(prompt.size - 1, 0) for prompt in self._prompts], np.int32)
        self._read = np.minimum(held, self._last)  # how much of each prompt the cache holds

        shape = (cache.num_rows, most)  # whatever the limit is, so that it is compiled once
        seen = None
        if getattr(sampler, "needs_seen", False):
            seen = np.zeros((cache.num_rows, vocab_size), bool)
            for row, prompt in enumerate(self._prompts):
                seen[row, prompt] = True
        state = _State(
            token=np.array([prompt[-1] if prompt.size else 0 for prompt in self._prompts], np.int32),
            position=self._last,
            reason=np.array([_RUNNING if prompt.size else _IDLE for prompt in self._prompts], np.int32),
            count=np.int32(0),
            tokens=np.full(shape, EMPTY, np.int32),
            log_probs=np.zeros(shape, np.float32),
            seen=seen,
        )
        state = jax.tree.map(jnp.array, state)
        on_mesh = cache.lengths.sharding
        if isinstance(on_mesh, jax.sharding.NamedSharding):
            state = jax.device_put(state, jax.sharding.NamedSharding(on_mesh.mesh, jax.sharding.PartitionSpec()))
        self._forms = _Form.of(cache), _Form.of(state)
        self._cache, self._state = (tuple(jax.tree.leaves(tree)) for tree in (cache, state))
        self._prefill = functools.partial(_prefill, _Fixed(forward, None, self._forms[0], None), params)
        self._decode = functools.partial(_decode, _Fixed(forward, sampler, *self._forms), params, stops, key)
        # A forward or a sampler that fails in the loop fails here, before the cache is donated.
        _decode.eval_shape(*self._decode.args, self._cache, self._state, np.int32(0))
        self._block = 1 << (cache.max_block.bit_length() - 1)
        self._checked = False  # whether the lengths of the cache were looked at

    _cache: tuple[Any, ...]
    _state: tuple[Any, ...]
    _newest: Any  # int32 [B]

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> np.ndarray:
        state = self._forms[1].build(self._state)
        count, reason = jax.device_get((state.count, state.reason))
        if count >= self._limit or (reason != _RUNNING).all():
            raise StopIteration
        tokens = np.array(self._advance(count + 1))
        if (tokens == EMPTY).all():  # the rows that were left have ended without a token
            raise StopIteration
        return tokens

    @property
    def result(self) -> Generation:
        """The Generation so far. Its cache is donated when the iteration goes on."""
        cache, state = self._forms[0].build(self._cache), self._forms[1].build(self._state)
        limit = self._limit
        tokens, log_probs = np.array(state.tokens)[:, :limit], np.array(state.log_probs)[:, :limit]
        still = "length" if int(state.count) >= limit else "running"
        return Generation(
            tokens=tokens,
            lengths=(tokens != EMPTY).sum(1, dtype=np.int32),
            log_probs=log_probs,
            reasons=tuple(still if i == _RUNNING else _REASONS[i] for i in np.array(state.reason)),
            cache=cache,
        )

    def _advance(self, until: int) -> Any:
        """Decodes up to `until` tokens per row, reading the prompts first, and returns the newest, int32 [B]."""
        checks.check_alive(self._cache)
        for size, taken in _schedule(self._last - self._read, self._block):
            tokens = np.zeros((taken.size, size), np.int32)
            positions = np.full((taken.size, size), EMPTY, np.int32)
            for row, (start, n) in enumerate(zip(self._read, taken, strict=True)):
                tokens[row, :n] = self._prompts[row][start : start + n]
                positions[row, :n] = np.arange(start, start + n)
            self._set(("_cache",), self._prefill, tokens, positions, self._cache)
            self._read = self._read + taken
        limit = np.int32(min(until, self._limit))
        self._set(("_cache", "_state", "_newest"), self._decode, self._cache, self._state, limit)
        if not self._checked:  # once: a look at the lengths waits for the device
            cache, state = self._forms[0].build(self._cache), self._forms[1].build(self._state)
            lengths, position = jax.device_get((cache.lengths, state.position))
            checks.check_lengths(lengths, np.where(position > self._last, position, 0))
            self._checked = True
        return self._newest

    def _set(self, names: tuple[str, ...], function: Callable[..., Any], *args: Any) -> None:
        # Runs the function and keeps its results in one call into C. Python looks for Ctrl-C between byte codes: in two
        # statements, or with trees to build, it would mostly strike in between, and what was donated would be lost.
        results = itertools.chain.from_iterable(map(function, *([arg] for arg in args)))
        vars(self).update(zip(names, results, strict=True))


def stream(
    forward: Callable[..., Any],
    params: Any,
    prompts: Sequence[Any],
    cache: Cache,
    *,
    max_new_tokens: int,
    sampler: Callable[..., Any] = Greedy(),
    stop_tokens: Sequence[int] | int = (),
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
    max_new_tokens: int,
    sampler: Callable[..., Any] = Greedy(),
    stop_tokens: Sequence[int] | int = (),
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
        `jaxkv.nnx.functional` returns. Give the same object each time: a new lambda is compiled anew.
      params: pytree of arrays, handed to forward.
      prompts: one per row of the cache, each the whole history of that row: a sequence of token numbers. The first
        `cache.lengths[row]` of them are taken as read. What you put there yourself need not be tokens (the embeddings
        of an image): give any token at each of its places. None leaves a row idle.
      cache: holds the beginning of each prompt, or nothing. It is donated, and is gone after the call: go on with
        `result.cache`.
      max_new_tokens: most tokens per row, 1 or more.
      sampler: from `jaxkv.sampling`, or a hashable `sample(key, logits) -> token`, called per row with a PRNG key and
        float32 logits [V], returning an integer scalar. The key comes from `key`, the row and the position.
      stop_tokens: a row ends after one of these.
      key: PRNG key, from `jax.random.key(seed)`; needed unless the sampler is greedy.

    Returns:
      A Generation.

    Raises:
      ValueError: before anything is touched, for arguments that don't fit: number of prompts, empty prompts, prompts
        longer than the capacity or not longer than what the row holds, tokens outside the vocabulary, a missing key,
        a forward that returns the cache as it was. If its own `jit` hides that, the error comes at the end, or with a
        stream's first token.
      CacheError: if the cache was donated before.
    """
    options = {"max_new_tokens": max_new_tokens, "sampler": sampler, "stop_tokens": stop_tokens, "key": key}
    run = Stream(forward, params, prompts, cache, **options)
    run._advance(run._limit)
    return run.result


def _schedule(left: np.ndarray, block: int) -> Iterator[tuple[int, np.ndarray]]:
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
