"""What `beam_search` and `best_of` give: several texts for each prompt, the best first."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxkv.cache.cache import Cache


@dataclasses.dataclass(frozen=True, eq=False)
class Candidates:
    """Texts for P prompts, n for each, the best first.

    Attributes:
      tokens: int32 [P, n, N], EMPTY (-1) after a text's end. A stop token is among them.
      lengths: int32 [P, n], how many tokens each text has.
      log_probs: float32 [P, n, N], of the tokens under the model's own distribution; 0 after a text's end.
      scores: float32 [P, n], what they are ranked by; -inf where there is no text.
      reasons: why each text ended, as in `jaxkv.Generation`. What ended by "stop" or "length" comes before all else.
        "none": there are not so many different texts; it has no tokens.
      cache: row i holds prompt i and its best text but for that text's last token: go on from there. After `best_of`
        row j * P + i holds text j of prompt i; after `beam_search` the other rows of the beams are empty.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    log_probs: np.ndarray
    scores: np.ndarray
    reasons: tuple[tuple[str, ...], ...]
    cache: Any


def check_copies(name: str, value: Any, prompts: Any, cache: Any) -> int:
    """Returns how many rows each prompt takes, the argument `name`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} is {value!r}; give a whole number, 1 or more")
    if isinstance(prompts, str | bytes) or not isinstance(cache, Cache):
        return int(value)  # `checks.check_call` says what is wrong
    if not hasattr(prompts, "__len__"):
        raise ValueError(f"prompts is {prompts!r}; give a list of token lists, such as [[1, 2, 3]]")
    if not len(prompts):
        raise ValueError("there are no prompts; give a list of token lists, such as [[1, 2, 3]]")
    needed = len(prompts) * int(value)
    if needed > cache.num_rows:
        raise ValueError(
            f"{name}={value} takes {needed} rows for {len(prompts)} prompt{'s' if len(prompts) > 1 else ''}, and the "
            f"cache has {cache.num_rows}; make it with num_rows={needed}, or give fewer of either"
        )
    return int(value)


def padded(prompts: Any, cache: Any) -> Any:
    """Returns the prompts, and None for all other rows of the cache."""
    if isinstance(prompts, str | bytes) or not isinstance(cache, Cache):
        return prompts
    return [*prompts, *[None] * (cache.num_rows - len(prompts))]


def prepared(cache: Cache, texts: Sequence[np.ndarray], copies: int) -> Cache:
    """Returns a cache in which the rows of further copies are empty; those of a single text share what they begin with.

    Args:
      cache: its memory is shared with the result.
      texts: P prompts, those of the first rows.
      copies: how many rows there are to be of each.
    """
    num_texts, rows = len(texts), np.arange(cache.num_rows)
    others = (rows >= num_texts) & (rows < num_texts * copies)
    if (others & ((np.asarray(cache.lengths) > 0) | ~np.asarray(cache.ok))).any():
        cache = cache.reset(others)
    if num_texts == 1 and copies > 1 and cache.shared is None:
        length = max(texts[0].size - 1, 0)  # the last token is fed to each of them
        cache = cache.sharing(length - length % cache.layout.page_size)
    return cache
