"""Several texts for each prompt, the best first: what `Model.beam_search` and `Model.best_of` give."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxkv.cache.cache import Cache
from jaxkv.cache.pages import Pages
from jaxkv.generate import Candidates
from jaxkv.models.completing import Request, capacity_for, hear, understand
from jaxkv.models.completion import Completion

_PAGE_SIZE = 16
_MAX_BLOCK = 512  # the most that Cache.init chooses


@dataclasses.dataclass(frozen=True, eq=False)
class Choices:
    """Several texts for each of P prompts, the best first.

    Attributes:
      texts: the generated texts, n per prompt, without stop tokens; None if the model has no tokenizer.
      tokens, lengths, log_probs, scores, reasons, cache: see `jaxkv.Candidates`.
      prompts: the tokens of each prompt; none for an idle row.
    """

    texts: tuple[tuple[str, ...], ...] | None
    tokens: np.ndarray
    lengths: np.ndarray
    log_probs: np.ndarray
    scores: np.ndarray
    reasons: tuple[tuple[str, ...], ...]
    prompts: tuple[tuple[int, ...], ...]
    cache: Any

    @property
    def best(self) -> Completion:
        """The best text of each prompt, as `Model.generate` returns it: to go on from, with `cache=`.

        Its cache has a row per prompt. On Pages it shares the memory of this one; on Rows it is a copy of them.
        """
        return self._best(self.cache.take(np.arange(len(self.prompts))))

    @property
    def text(self) -> str:
        """The best text, where there is one prompt.

        Raises:
          ValueError: if there are several, or no texts.
        """
        return self._best(None).text  # also after the cache was given on

    def _best(self, cache: Any) -> Completion:
        return Completion(
            texts=None if self.texts is None else tuple(texts[0] for texts in self.texts),
            tokens=self.tokens[:, 0],
            lengths=self.lengths[:, 0],
            log_probs=self.log_probs[:, 0],
            reasons=tuple(reasons[0] for reasons in self.reasons),
            prompts=self.prompts,
            cache=cache,
        )


def choose(
    model: Any,
    prompts: Any,
    copies: Any,
    search: Callable[..., Candidates],
    *,
    cache: Cache | None,
    features: Any,
    feature_lengths: Any,
    **asked: Any,
) -> Choices:
    """Returns the texts that a search finds.

    Args:
      model: a Model.
      prompts, cache, features, feature_lengths: see `Model.beam_search`.
      copies: rows of each prompt.
      search: what does it, a function of forward, params, prompts, cache, and options.
      asked: see `completing.understand`.
    """
    request = understand(model, prompts, cache=cache, features=features, **asked)
    if cache is None:
        cache = _cache(model, request, copies)
    if features is not None:
        cache = hear(model.module, cache, features, feature_lengths)
    found = search(
        model.forward,
        model.params,
        request.rows,
        cache,
        max_new_tokens=request.limits.tolist(),
        sampler=request.sampler,
        stop_tokens=request.stop_tokens,
    )
    fields = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    texts = None if request.tokenizer is None else tuple(_texts(request, i, row) for i, row in enumerate(found.tokens))
    return Choices(texts=texts, prompts=tuple(tuple(map(int, prompt)) for prompt in request.prompts), **fields)


def pages_for(lengths: Sequence[int], limits: Sequence[int], copies: int, capacity: int) -> Pages:
    """Returns a pool in which so many copies of each prompt always fit, if they share it.

    Args:
      lengths: tokens of each prompt.
      limits: the most new tokens of each.
      copies: of each prompt.
      capacity: of the cache, in tokens.
    """
    size = min(_PAGE_SIZE, capacity)
    once = sum(-(-length // size) for length in lengths)
    each = sum(-(-limit // size) + 1 for limit in limits)  # the last page of the prompt is not shared
    return Pages(max(once + copies * each, -(-min(capacity, _MAX_BLOCK) // size)), size)


def _cache(model: Any, request: Request, copies: Any) -> Cache:
    whole = isinstance(copies, int | np.integer) and copies > 0
    copies = int(copies) if whole else 1  # the search says what is wrong with it
    capacity = capacity_for(model, request.rows, request.limits)
    pages = pages_for([len(prompt) for prompt in request.prompts], request.limits.tolist(), copies, capacity)
    return model.init_cache(copies * len(request.rows), capacity, layout=pages)


def _texts(request: Request, i: int, tokens: np.ndarray) -> tuple[str, ...]:
    """Returns the texts of prompt i; tokens int32 [n, N]."""
    stops, texts = set(request.single_stops), []
    for row in tokens.tolist():
        decoder = request.tokenizer.stream()
        if request.joined[i]:
            decoder.take(request.prompts[i])
        texts.append(decoder.take([token for token in row if token >= 0 and token not in stops]) + decoder.end())
    return tuple(texts)
