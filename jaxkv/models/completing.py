"""How a run of `Model.generate` begins: from what is asked to a stream of texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxkv.cache.arguments import checked_size
from jaxkv.cache.cache import Cache
from jaxkv.generate import stream, stream_speculation
from jaxkv.generate.checks import check_alive
from jaxkv.kinds import kind_of
from jaxkv.models.asked import Asked, Request, understand
from jaxkv.models.choices import Choices
from jaxkv.models.completion import Completion, TextStream, rewound
from jaxkv.models.encoder_decoder import EncoderDecoder


def start(
    model: Any,
    asked: Asked,
    *,
    stop_strings: Any,
    seed: Any,
    key: Any,
    num_samples: Any,
    speculate: Any,
    num_draft: Any,
) -> TextStream:
    """Returns the texts to come. For the arguments see `Model.generate`."""
    if isinstance(asked.cache, Choices):
        asked = dataclasses.replace(asked, cache=asked.cache.best)
    request = understand(model, asked)
    strings = _stop_strings(model, request.tokenizer, stop_strings)
    copies = _copies(num_samples, request)
    # A draft that is not taken is taken back; a recurrent layer has the state before it only within slack.
    slack = 0 if speculate is None else checked_size("generate", "num_draft", num_draft, 1)
    cache = heard(model, asked, _cache(model, asked.cache, request, sum(copies), slack))
    how, more = _how(speculate, num_draft, cache)
    more |= {"key": key_of(seed) if key is None else key, "num_samples": copies}
    steps = request.run(how, model, cache, **more)

    def each(values: Sequence[Any]) -> list[Any]:
        return [value for value, count in zip(values, copies, strict=True) for _ in range(count)]

    return TextStream(
        steps,
        each(request.prompts),
        one=request.one and sum(copies) == 1,
        tokenizer=request.tokenizer,
        joined=each(request.joined),
        stop_tokens=request.single_stops,
        stop_strings=strings,
    )


def _copies(num_samples: Any, request: Request) -> list[int]:
    """Returns how many texts of each prompt there are to be; one where a row stays idle."""
    whole = isinstance(num_samples, int | np.integer) and not isinstance(num_samples, bool)
    if not whole or num_samples < 1:
        raise ValueError(f"num_samples is {num_samples!r}; give a whole number, 1 or more")
    return [1 if row is None else int(num_samples) for row in request.rows]


def _how(speculate: Any, num_draft: Any, cache: Any) -> tuple[Any, dict[str, Any]]:
    """Returns what decodes, and its further arguments."""
    if speculate is None:
        return stream, {}
    if isinstance(speculate, str) and speculate == "lookup":
        return stream_speculation, {"num_draft": num_draft}
    if not hasattr(speculate, "init_cache"):
        what = repr(speculate) if isinstance(speculate, str) else kind_of(speculate)
        raise ValueError(f'speculate is {what}; give "lookup", or a small Model with the same tokenizer, which drafts')
    if not isinstance(cache, Cache):
        return stream, {}  # which says what is wrong with it
    small = speculate.init_cache(cache.num_rows, cache.capacity, slack=num_draft)
    return stream_speculation, {"num_draft": num_draft, "draft": (speculate.forward, speculate.params, small)}


def key_of(seed: Any) -> Any:
    """Returns the PRNG key of a seed."""
    if not isinstance(seed, int | np.integer) or not 0 <= seed < 1 << 32:  # JAX reads 32 bits
        raise ValueError(f"seed is {seed!r}; give a whole number from 0 to {(1 << 32) - 1}")
    return jax.random.key(seed)


def _stop_strings(model: Any, tokenizer: Any, given: Any) -> tuple[str, ...]:
    given = model.generation.stop_strings if given is None else given
    strings = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Iterable) else (None,)
    if not all(isinstance(text, str) and text for text in strings):
        raise ValueError(f"stop_strings is {given!r}; give a string or several, none of them empty")
    if strings and tokenizer is None:
        raise ValueError("stop_strings need a tokenizer, and this model came without one; give stop_tokens")
    return strings


def _cache(model: Any, given: Any, request: Request, num_rows: int, slack: int) -> Any:
    """Returns the cache to decode with, which holds what it can of the rows."""
    rows = request.rows
    if given is None:
        return model.init_cache(num_rows, request.capacity(model.context), slack=slack)
    if isinstance(given, Completion):
        if given.cache is None:
            raise ValueError(
                f"cache is the result of a run that failed, and its cache is lost: leave it out ({given.error})"
            )
        if num_rows != len(rows):
            raise ValueError("several samples can't go on from a result; give each its prompt, and num_samples=1")
        if len(given.prompts) != len(rows):
            raise ValueError(f"{len(rows)} prompts for a cache of {len(given.prompts)} rows; give one per row")
        check_alive(jax.tree.leaves(given.cache))
        same = [_num_equal(held, row) for held, row in zip(given.history, rows, strict=True)]
        return rewound(given.cache, jnp.asarray(np.array(same, np.int32)))
    check_alive(jax.tree.leaves(given))
    if isinstance(given, Cache) and any(
        row is not prompt and held
        for row, prompt, held in zip(rows, request.given, np.asarray(given.lengths).tolist(), strict=False)
    ):
        raise ValueError(
            "the cache already holds tokens, and they may belong to other texts; give the whole "
            "result of the earlier call, cache=result, or prompts of tokens"
        )
    return given


def _num_equal(held: Sequence[int], row: Any) -> int:
    """Returns how many of the tokens that are held stay: those that the row begins with, but never all of the row."""
    if row is None:
        return len(held)
    # The last one is read again even if it is held: the first new token comes from it.
    new = np.asarray(row).tolist()[:-1]
    return next((i for i, (a, b) in enumerate(zip(held, new, strict=False)) if a != b), min(len(held), len(new)))


def heard(model: Any, asked: Asked, cache: Any) -> Any:
    """Returns the cache with what an encoder-decoder is given to hear, if it is."""
    if asked.features is None:
        return cache
    return _hear(model.module, cache, asked.features, asked.feature_lengths)


_hear = nnx.jit(EncoderDecoder.encode_into, donate_argnums=1)
