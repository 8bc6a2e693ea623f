"""How `Model.beam_search` and `Model.best_of` run: from what is asked to texts, in a pool of pages that they share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxkv.cache.cache import Cache
from jaxkv.cache.pages import Pages
from jaxkv.generate import Candidates
from jaxkv.models.asked import Asked, Request, understand
from jaxkv.models.choices import Choices
from jaxkv.models.completing import heard

_PAGE_SIZE = 16
_MAX_BLOCK = 512  # the most that Cache.init chooses


def choose(model: Any, asked: Asked, copies: Any, search: Callable[..., Candidates]) -> Choices:
    """Returns the texts that a search finds.

    Args:
      model: a Model.
      asked: of it.
      copies: rows of each prompt.
      search: what does it, a function of forward, params, prompts, cache, and options.
    """
    request, cache = understand(model, asked), asked.cache
    if cache is None:
        cache = _cache(model, request, copies)
    found = request.run(search, model, heard(model, asked, cache))
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
    capacity = request.capacity(model.context)
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
