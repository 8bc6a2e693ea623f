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


def pages_for(specs: Sequence[Any], texts: Sequence[tuple[int, int, int]], capacity: int) -> Pages:
    """Returns a pool in which these texts always fit, if those of one prompt share it.

    Args:
      specs: of the model's layers.
      texts: for each prompt its tokens, the most new tokens that follow it, and how many texts there are of it.
      capacity: of the cache, in tokens.

    >>> spec = jaxkv.LayerSpec(jaxkv.Full(), num_kv_heads=1, head_dim=4)
    >>> pages_for([spec], [(1024, 32, 32)], capacity=2048)  # 63 pages for all, 3 for each
    Pages(num_pages=159, page_size=16)
    """
    size = min(_PAGE_SIZE, capacity)
    # What a ring writes may begin and end within a page, and so does the ring.
    spare = any(spec.reach.size is not None for spec in specs)
    num_pages = 0
    for length, limit, copies in texts:
        whole = -(-min(length + limit, capacity) // size)
        shared = max(length - 1, 0) // size  # each text writes the prompt's last token anew
        own = min(whole - shared + 2 * spare, whole)
        num_pages += min(shared + copies * own, copies * whole)
    return Pages(max(num_pages, -(-min(capacity, _MAX_BLOCK) // size)), size)


def _cache(model: Any, request: Request, copies: Any) -> Cache:
    whole = isinstance(copies, int | np.integer) and copies > 0
    copies = int(copies) if whole else 1  # the search says what is wrong with it
    capacity = request.capacity(model.context)
    lengths = [len(prompt) for prompt in request.prompts]
    texts = [(length, limit, copies) for length, limit in zip(lengths, request.limits.tolist(), strict=True)]
    pages = pages_for(model.specs, texts, capacity)
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
