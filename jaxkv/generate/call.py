"""What is asked of a loop over the rows of a cache, checked: prompts, limits, a sampler. And who begins like whom."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxkv.cache.cache import Cache
from jaxkv.cache.spec import EMPTY
from jaxkv.generate import checks
from jaxkv.generate.generation import IDLE, RUNNING
from jaxkv.generate.history import History
from jaxkv.generate.reading import last_positions


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """What is asked of a loop.

    Attributes:
      forward, params, sampler: as for `jaxkv.generate`.
      cache: of R rows, in JAX's arrays.
      texts: the prompts that are read, text i into row i, int32 arrays, empty for idle rows.
      held: int [P], how many tokens of each text its row holds.
      forks: arguments of `reading.fork`, if rows go on from the texts of others. None: each goes on from its own.
      prompts: of all rows.
      limits: int32 [R], the most new tokens of each.
      stops: int32 [S, L], see `checks.check_stop_tokens`.
      key: a typed PRNG key, or None.
      vocab_size: V.
    """

    forward: Any
    params: Any
    sampler: Any
    cache: Cache
    texts: list[np.ndarray]
    held: np.ndarray
    forks: tuple[Any, ...] | None
    prompts: list[np.ndarray]
    limits: np.ndarray
    stops: np.ndarray
    key: Any
    vocab_size: int

    @classmethod
    def of(
        cls,
        forward: Callable[..., Any],
        params: Any,
        prompts: Sequence[Any],
        cache: Cache,
        *,
        max_new_tokens: Any,
        sampler: Any,
        stop_tokens: Any,
        key: Any,
        num_samples: Any = 1,
    ) -> Call:
        """Returns what is asked for. For the arguments see `jaxkv.generate`.

        Raises:
          ValueError, CacheError: as `jaxkv.generate`.
        """
        copies = _copies(num_samples, prompts)
        if copies is not None and isinstance(cache, Cache):
            prompts = _padded(prompts, copies, cache.num_rows)
        cache, texts, held, vocab_size = checks.check_call(forward, params, prompts, cache)
        limits = checks.check_max_new_tokens(max_new_tokens, len(texts) if copies is None else copies.size)
        forks, everyone = None, texts
        if copies is not None:
            of = np.repeat(np.arange(copies.size, dtype=np.int32), copies)
            everyone, limits, texts = [texts[i] for i in of], limits[of], texts[: copies.size]
            while len(texts) > 1 and not texts[-1].size:  # rows behind the last text stay as they are
                texts.pop()
            own = np.arange(cache.num_rows, dtype=np.int32)
            idle, behind = np.array([not prompt.size for prompt in everyone]), own >= len(texts)
            sources = np.where(idle, np.where(behind, own, cache.num_rows), of).astype(np.int32)
            last = np.where(idle, EMPTY, last_positions(everyone)).astype(np.int32)
            number = np.where(idle, 0, np.concatenate([np.arange(n, dtype=np.int32) for n in copies]))
            rank = np.argsort(np.lexsort((own, number, idle))).astype(np.int32)
            forks = sources, last, rank, np.int32((~idle & (number == 0)).sum())
            others = behind & ~idle
            if (others & ((held > 0) | ~np.asarray(cache.ok))).any():
                cache = cache.reset(others)
        return cls(
            forward=forward,
            params=params,
            sampler=sampler,
            cache=cache,
            texts=texts,
            held=held[: len(texts)],
            forks=forks,
            prompts=everyone,
            limits=np.minimum(limits, cache.capacity + 1),
            stops=checks.check_stop_tokens(stop_tokens, vocab_size),
            key=checks.check_sampler(sampler, key, vocab_size),
            vocab_size=vocab_size,
        )

    @property
    def most(self) -> int:
        """The most tokens of a row's text: the last one is what does not fit any more."""
        return self.cache.capacity + 1

    @property
    def last(self) -> np.ndarray:
        """The position of the last token of each row's prompt, int32 [R]."""
        return last_positions(self.prompts)

    @property
    def tokens(self) -> np.ndarray:
        """The last token of each row's prompt, int32 [R]; 0 without one."""
        return np.array([prompt[-1] if prompt.size else 0 for prompt in self.prompts], np.int32)

    @property
    def reasons(self) -> np.ndarray:
        """Where the rows stand before the first step, int32 [R]."""
        return np.array([RUNNING if prompt.size else IDLE for prompt in self.prompts], np.int32)

    @property
    def history(self) -> History | None:
        """What the rows hold, [R, ...] in NumPy; None unless the sampler needs it."""
        if not getattr(self.sampler, "needs_history", False):
            return None
        rows = [
            History.of(prompt, self.vocab_size, size=self.most, limit=prompt.size + limit)
            for prompt, limit in zip(self.prompts, self.limits, strict=True)
        ]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


def _copies(num_samples: Any, prompts: Any) -> np.ndarray | None:
    """Returns in how many rows each prompt goes on, int [P]; None: each in its own."""
    try:
        counts = np.asarray(num_samples)
        sound = counts.ndim <= 1 and counts.dtype.kind in "iu" and bool((counts >= 1).all())
    except ValueError:
        sound = False
    if not sound:
        raise ValueError(f"num_samples is {num_samples!r}; give a whole number, 1 or more, or one per prompt")
    if (counts == 1).all() or isinstance(prompts, str | bytes) or not hasattr(prompts, "__len__") or not len(prompts):
        return None  # `checks.check_call` says what is wrong with the prompts
    if counts.ndim == 1 and counts.size != len(prompts):
        raise ValueError(
            f"num_samples has {counts.size} numbers for {len(prompts)} prompts; give one, or one per prompt"
        )
    return np.broadcast_to(counts, (len(prompts),))


def _padded(prompts: Sequence[Any], copies: np.ndarray, num_rows: int) -> Sequence[Any]:
    """Returns the prompts, and None for the rows that are not read into."""
    if copies.sum() != num_rows:
        raise ValueError(
            f"num_samples asks for {copies.sum()} rows, and the cache has {num_rows}; make it with "
            f"num_rows={copies.sum()}, or give None for rows that are to stay idle"
        )
    return [*prompts, *[None] * (num_rows - len(prompts))]
