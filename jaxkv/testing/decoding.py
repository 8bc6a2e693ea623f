"""`assert_cache_correct`: whether a model that decodes with a cache says what it says without one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.cache.cache import Cache
from jaxkv.kinds import kind_of
from jaxkv.testing.oracle import EMPTY
from jaxkv.testing.programs import OPERATIONS


def assert_cache_correct(
    forward: Callable[..., Any],
    params: Any,
    cache: Cache,
    *,
    vocab_size: int | None = None,
    tokens: Any = None,
    uncached: Callable[..., Any] | None = None,
    ways: Iterable[str] | None = None,
    atol: float = 1e-4,
    rtol: float = 1e-4,
    seed: int = 0,
) -> dict[str, float]:
    """Checks that a model's cached decoding gives the logits of its uncached one, however the tokens are fed.

    The same sequences go in as one block, in blocks of `max_block`, token by token, with padding on the right, on the
    left and in the middle, raggedly, row by row, one row in a cache of its own, after a rejected draft and `rewind`,
    after `copy_prefix`, `take` and `reset`. What it finds: positions that start over with each block, masks that don't
    ask the step, a reach in the spec that is not the model's, a cache that is not handed on, rows that mix.

    Args:
      forward: the model as `jaxkv.generate` takes it, `forward(params, tokens, positions, cache) -> (logits, cache)`,
        with tokens and positions int32 [B, T] (EMPTY, with token 0, for padding) and logits [B, T, V]. It is jitted.
      params: what `forward` and `uncached` take first.
      cache: an empty cache such as the model uses; not donated. A `max_block` well below the number of tokens, and
        rings shorter than it, make the check sharp: `Cache.init(specs, num_rows=3, capacity=64, max_block=8)`.
      vocab_size: tokens are drawn from [0, vocab_size); not needed with `tokens`.
      tokens: int [num_rows, L], L <= capacity; None draws min(capacity, 64) tokens for each row. Take more for a model
        with a longer window.
      uncached: `uncached(params, tokens) -> logits [B, L, V]`, the model as it is trained. None: `forward` itself, fed
        everything as one block; then a fault that shows in one block too, as a wrong window, is not found.
      ways: which of `WAYS_OF_FEEDING` to try; None tries all. Each block size compiles once.
      atol: tolerance of a logit; float32 models differ by about 1e-5, for bfloat16 take 0.1 or so.
      rtol: the same in proportion to the logit.
      seed: of the tokens and of the ways to feed them.

    Returns:
      The largest difference of each way of feeding.

    Raises:
      AssertionError: if a way gives other logits; says which, where first, by how much.
      ValueError: for a cache that is not empty, tokens that don't fit it, or an unknown way.

    >>> def forward(params, tokens, positions, cache):
    ...     cache, step = cache.begin(positions)
    ...     x = params[tokens][:, :, None]
    ...     layer = cache.layers[0].put(step, x, x)
    ...     y = jaxkv.attend(x, layer, step)[:, :, 0]
    ...     return y @ params.T, cache.with_layers([layer])
    >>> spec = jaxkv.LayerSpec(jaxkv.Full(), num_kv_heads=1, head_dim=8)
    >>> cache = jaxkv.Cache.init([spec], num_rows=2, capacity=8, max_block=4)
    >>> found = assert_cache_correct(forward, jax.random.normal(jax.random.key(0), (10, 8)), cache, vocab_size=10)
    >>> found["token by token"] < 1e-4
    True
    """
    random = np.random.default_rng(seed)
    if np.asarray(cache.lengths).any():
        raise ValueError(f"the cache holds sequences of lengths {np.asarray(cache.lengths)}; give an empty one")
    if tokens is None:
        if vocab_size is None:
            raise ValueError("give vocab_size, or tokens")
        tokens = random.integers(0, vocab_size, (cache.num_rows, min(cache.capacity, 64)))
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.shape[0] != cache.num_rows or not 0 < tokens.shape[1] <= cache.capacity:
        raise ValueError(
            f"tokens has shape {tokens.shape}, the cache {cache.num_rows} rows of capacity {cache.capacity}; give int "
            f"[{cache.num_rows}, L] with L at most {cache.capacity}"
        )
    ways = WAYS_OF_FEEDING if ways is None else tuple(ways)
    if unknown := set(ways) - set(WAYS_OF_FEEDING):
        raise ValueError(f"unknown ways of feeding {sorted(unknown)}; there are {', '.join(WAYS_OF_FEEDING)}")
    forward = jax.jit(forward)
    half = _half(tokens)
    shared = np.concatenate([np.repeat(tokens[:1, :half], cache.num_rows, 0), tokens[:, half:]], 1)

    def reference(tokens: np.ndarray) -> np.ndarray:
        if uncached is not None:
            logits = np.asarray(uncached(params, jnp.asarray(tokens, jnp.int32)), np.float32)
            if logits.shape[:2] != tokens.shape:
                raise ValueError(
                    f"uncached gives logits {logits.shape} for tokens {tokens.shape}; they must be [B, L, V]"
                )
            return logits
        return _feed(_in_one_block, forward, params, _like(cache, max_block=tokens.shape[1]), tokens, random)

    wanted = reference(tokens)
    wanted_shared = reference(shared) if "copy_prefix of row 0" in ways else wanted
    results: list[_Result] = []
    for name in ways:
        way = _WAYS[name]
        of_shared = way is _copied_prefix
        start, feed_tokens, want = cache, tokens, wanted
        if way is _in_one_block:
            start = _like(cache, max_block=tokens.shape[1])
        elif way is _own_cache:
            start, feed_tokens, want = _like(cache, num_rows=1), tokens[:1], wanted[:1]
        elif of_shared:
            feed_tokens, want = shared, wanted_shared
        try:
            got = _feed(way, forward, params, start, feed_tokens, random)
        except _DidNotFit as error:
            results.append(_Result(name, np.inf, None, str(error)))
            continue
        off = np.abs(got - want).max(-1)
        right = (np.abs(got - want) <= atol + rtol * np.abs(want)).all(-1)  # NaN is wrong
        largest = float(np.where(np.isnan(off), np.inf, off).max())
        results.append(_Result(name, largest, None if right.all() else ~right, "", off))
    if any(result.failed for result in results):
        raise AssertionError(_report(results, atol, rtol))
    return {result.name: result.largest for result in results}


# ---------------------------------------------------------------- ways of feeding


class _DidNotFit(Exception):
    """A sequence that must fit did not."""


@dataclasses.dataclass
class _Feeder:
    """Feeds stretches of known sequences through a model, and keeps the logits of every position."""

    forward: Any
    params: Any
    cache: Cache
    tokens: np.ndarray  # [R, L]
    random: np.random.Generator
    logits: np.ndarray | None = None  # [R, L, V], NaN where nothing was fed yet

    @property
    def block(self) -> int:
        return self.cache.max_block

    @property
    def rows(self) -> np.ndarray:
        return np.arange(len(self.tokens))

    @property
    def lengths(self) -> np.ndarray:
        return np.asarray(self.cache.lengths)

    def feed(self, positions: np.ndarray, tokens: np.ndarray | None = None) -> None:
        """Feeds one block, int [R, T]; tokens other than the sequences' own leave no logits."""
        own = tokens is None
        real = positions != EMPTY
        if tokens is None:
            tokens = np.where(real, np.take_along_axis(self.tokens, np.maximum(positions, 0), 1), 0)
        before = self.cache
        logits, self.cache = self.forward(
            self.params, jnp.asarray(tokens, jnp.int32), jnp.asarray(positions, jnp.int32), before
        )
        self._check_handed_on(before, real)
        logits = np.asarray(logits, np.float32)
        if logits.ndim != 3 or logits.shape[:2] != positions.shape:
            raise AssertionError(f"forward gives logits {logits.shape} for tokens {positions.shape}; give [B, T, V]")
        if not own:
            return
        if self.logits is None:
            self.logits = np.full((*self.tokens.shape, logits.shape[2]), np.nan, np.float32)
        for row in self.rows:
            self.logits[row, positions[row, real[row]]] = logits[row, real[row]]

    def next_positions(self, counts: np.ndarray, length: int, place: Callable[[int], Any]) -> np.ndarray:
        """Returns int [R, length]: the next counts[row] positions of each row, at columns place(count)."""
        positions = np.full((len(self.tokens), length), EMPTY)
        for row, start in enumerate(self.lengths):
            count = min(int(counts[row]), length, self.tokens.shape[1] - int(start))
            if count > 0:
                positions[row, place(count)] = np.arange(start, start + count)
        return positions

    def feed_until(self, until: Any, length: int, count: int | None = None, place: Any = None) -> None:
        """Feeds blocks of `length` with `count` tokens each, until rows hold `until` tokens (int, or one per row)."""
        place = place or (lambda n: slice(0, n))
        while (self.lengths < until).any():
            counts = np.minimum(np.full(len(self.tokens), count or length), until - self.lengths)
            self.feed(self.next_positions(counts, length, place))

    def _check_handed_on(self, before: Cache, real: np.ndarray) -> None:
        if not isinstance(self.cache, Cache):
            raise AssertionError(f"forward must return (logits, cache), the second is {kind_of(self.cache)}")
        if str(jax.tree.structure(self.cache)) != str(jax.tree.structure(before)):
            raise AssertionError(
                f"forward must return the kind of cache it was given, {before!r}, but gave {self.cache!r}; every call "
                "would compile anew"
            )
        if not real.any():
            return
        if not np.asarray(self.cache.ok).all():
            row = int(np.flatnonzero(~np.asarray(self.cache.ok))[0])
            raise _DidNotFit(f"row {row} holds {self.lengths[row]} tokens and does not fit: cache.ok is False")
        if (self.lengths == np.asarray(before.lengths)).all() and (np.asarray(before.lengths) == 0).any():
            raise AssertionError(
                "the cache that forward returned holds no token more than the one it was given: it must go on with "
                "what begin() returned, `cache, step = cache.begin(positions)`"
            )
        for i, layer in enumerate(self.cache.layers):
            if layer.num_kept and not any(np.asarray(leaf).any() for leaf in jax.tree.leaves((layer.k, layer.v))):
                raise AssertionError(
                    f"nothing was ever put into layer {i} of the cache that forward returned: each layer must go on "
                    "with what put() returned, `layer = cache.layers[i].put(step, k, v)`, and the pass end with "
                    "`cache = cache.with_layers(layers)`"
                )


def _half(tokens: np.ndarray) -> int:
    return tokens.shape[1] // 2


def _in_one_block(f: _Feeder) -> None:
    f.feed_until(f.tokens.shape[1], f.tokens.shape[1])


def _in_blocks(f: _Feeder) -> None:
    f.feed_until(f.tokens.shape[1], f.block)


def _token_by_token(f: _Feeder) -> None:
    f.feed_until(f.tokens.shape[1], 1)


def _padded_right(f: _Feeder) -> None:
    f.feed_until(f.tokens.shape[1], f.block, max(1, f.block * 2 // 3))


def _padded_left(f: _Feeder) -> None:
    f.feed_until(f.tokens.shape[1], f.block, max(1, f.block * 2 // 3), lambda n: slice(f.block - n, f.block))


def _padded_in_the_middle(f: _Feeder) -> None:
    def place(n: int) -> np.ndarray:
        return np.sort(f.random.permutation(f.block)[:n])

    f.feed_until(f.tokens.shape[1], f.block, max(1, f.block * 2 // 3), place)


def _ragged(f: _Feeder) -> None:
    def place(n: int) -> np.ndarray:
        return np.sort(f.random.permutation(f.block)[:n])

    while (f.lengths < f.tokens.shape[1]).any():
        f.feed(f.next_positions(f.random.integers(0, f.block + 1, len(f.tokens)), f.block, place))


def _row_by_row(f: _Feeder) -> None:
    for row in f.rows:
        f.feed_until(np.where(f.rows == row, f.tokens.shape[1], f.lengths), f.block)


def _own_cache(f: _Feeder) -> None:
    f.feed_until(f.tokens.shape[1], f.block)


def _rejected_draft(f: _Feeder) -> None:
    while (f.lengths < f.tokens.shape[1]).any():
        f.feed(f.next_positions(np.full(len(f.tokens), f.block), f.block, lambda n: slice(0, n)))
        accepted = f.lengths
        draft = f.next_positions(np.full(len(f.tokens), f.block), f.block, lambda n: slice(0, n))
        if (draft == EMPTY).all():
            return
        other = np.take_along_axis(f.tokens[:, ::-1], np.maximum(draft, 0), 1)
        f.feed(draft, np.where(draft != EMPTY, other, 0))
        # Where a ring lands lower, what is missing is fed again.
        f.cache = OPERATIONS["rewind"](f.cache, jnp.asarray(accepted, jnp.int32))
        f.feed_until(np.minimum(accepted + 1, f.tokens.shape[1]), f.block)


def _copied_prefix(f: _Feeder) -> None:
    half = _half(f.tokens)
    f.feed_until(np.where(f.rows == 0, half, 0), f.block)
    for row in f.rows[1:]:
        f.cache = OPERATIONS["copy_prefix"](f.cache, jnp.int32(0), jnp.int32(row), jnp.int32(half))
    logits = f.logits
    if logits is not None:
        logits[1:, :half] = logits[0, :half]  # they were not fed again: that is the point
    _in_blocks(f)


def _reordered_rows(f: _Feeder) -> None:
    f.feed_until(_half(f.tokens), f.block)
    back = f.rows[::-1].copy()
    f.cache = OPERATIONS["take"](f.cache, jnp.asarray(back, jnp.int32))
    f.tokens = f.tokens[back]
    f.logits = None if f.logits is None else f.logits[back]
    _in_blocks(f)
    f.logits = None if f.logits is None else f.logits[back]


def _used_before(f: _Feeder) -> None:
    f.tokens = f.tokens[:, ::-1]
    _in_blocks(f)
    f.tokens, f.logits = f.tokens[:, ::-1], None
    f.cache = OPERATIONS["reset"](f.cache, jnp.ones((len(f.tokens),), bool))
    _in_blocks(f)


_WAYS: dict[str, Callable[[_Feeder], None]] = {
    "in one block": _in_one_block,
    "in blocks of max_block": _in_blocks,
    "token by token": _token_by_token,
    "padding on the right": _padded_right,
    "padding on the left": _padded_left,
    "padding in the middle": _padded_in_the_middle,
    "ragged": _ragged,
    "row by row": _row_by_row,
    "row 0 in a cache of its own": _own_cache,
    "rejected draft, then rewind": _rejected_draft,
    "copy_prefix of row 0": _copied_prefix,
    "rows reordered by take": _reordered_rows,
    "rows used before, then reset": _used_before,
}

WAYS_OF_FEEDING = tuple(_WAYS)


def _feed(
    way: Callable[[_Feeder], None], forward: Any, params: Any, cache: Cache, tokens: np.ndarray, random: Any
) -> np.ndarray:
    feeder = _Feeder(forward, params, cache, tokens, random)
    way(feeder)
    if feeder.logits is None:
        raise AssertionError("no token was fed")
    return feeder.logits


def _like(cache: Cache, *, num_rows: int | None = None, max_block: int | None = None) -> Cache:
    """Returns an empty cache of the same kind."""
    return Cache.init(
        [layer.spec for layer in cache.layers for _ in range(layer.num_stacked or 1)],
        num_rows=num_rows or cache.num_rows,
        capacity=cache.capacity,
        layout=cache.layout,
        max_block=max_block or cache.max_block,
        slack=cache.slack,
        stacked=cache.layers[0].num_stacked is not None,
    )


# ---------------------------------------------------------------- report


@dataclasses.dataclass
class _Result:
    name: str
    largest: float
    wrong: np.ndarray | None  # bool [R, L]
    note: str
    off: np.ndarray | None = None  # [R, L]

    @property
    def failed(self) -> bool:
        return self.wrong is not None or bool(self.note)

    def line(self) -> str:
        if self.note:
            return f"  {self.name:28}  WRONG  {self.note}"
        if self.wrong is None or self.off is None:
            return f"  {self.name:28}  right  largest difference {self.largest:.2g}"
        row, position = self._first()
        return (
            f"  {self.name:28}  WRONG  first at position {position} of row {row}, off by "
            f"{self.off[row, position]:.2g}; {self.wrong.sum()} of {self.wrong.size} positions, at most "
            f"{self.largest:.2g}"
        )

    def picture(self) -> Iterator[str]:
        if self.wrong is not None:
            for row, wrong in enumerate(self.wrong):
                yield f"  row {row}  {''.join(str(int(x)) for x in wrong)}"

    def _first(self) -> tuple[int, int]:
        wrong = np.argwhere(np.asarray(self.wrong))
        row, position = wrong[np.argmin(wrong[:, 1])]
        return int(row), int(position)


def _report(results: list[_Result], atol: float, rtol: float) -> str:
    lines = [f"cached decoding differs from uncached decoding (tolerance {atol:g} + {rtol:g} * |logit|), fed:"]
    lines += [result.line() for result in results]
    failed = next((result for result in results if result.wrong is not None), None)
    if failed is not None:
        lines += [f"wrong positions when fed {failed.name}, over positions 0..{failed.wrong.shape[1] - 1}:"]  # type: ignore[union-attr]
        lines += failed.picture()
    return "\n".join(lines)
