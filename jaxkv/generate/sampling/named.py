"""A sampler from the numbers that are known by the same names everywhere."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxkv.generate.sampling.base import Chain, Sampler
from jaxkv.generate.sampling.choice import MinP, Temperature, TopK, TopP
from jaxkv.generate.sampling.penalties import FrequencyPenalty, NoRepeat, PresencePenalty, RepetitionPenalty
from jaxkv.generate.sampling.rules import Allow, Force, LogitBias, Suppress


def sampler(
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    frequency_penalty: float | None = None,
    presence_penalty: float | None = None,
    no_repeat_ngram_size: int | None = None,
    logit_bias: Mapping[Any, float] | None = None,
    bad_words_ids: Sequence[Sequence[int]] | None = None,
    allowed_tokens: Sequence[int] | None = None,
    forced_tokens: Mapping[int, Any] | None = None,
    suppress_tokens: Sequence[int] | None = None,
    begin_suppress_tokens: Sequence[int] | None = None,
    min_length: int | None = None,
    min_new_tokens: int | None = None,
    stop_tokens: Sequence[int] = (),
) -> Chain:
    """Returns the sampler with these settings; None leaves a setting out.

    They work in the order of transformers: logit_bias, repetition_penalty (then frequency_ and presence_penalty, which
    it does not have), no_repeat_ngram_size, bad_words_ids, min_length, min_new_tokens, forced_tokens, suppress_tokens,
    begin_suppress_tokens, allowed_tokens, temperature, top_k, top_p, min_p.

    Args:
      temperature: 0 is greedy, None is 1.
      top_k, top_p, min_p: see `TopK`, `TopP`, `MinP`.
      repetition_penalty, frequency_penalty, presence_penalty: see `RepetitionPenalty`, `FrequencyPenalty`,
        `PresencePenalty`.
      no_repeat_ngram_size: see `NoRepeat`.
      logit_bias: see `LogitBias`.
      bad_words_ids: token sequences that are never generated; a stop token alone is not one.
      allowed_tokens: see `Allow`.
      forced_tokens: see `Force`.
      suppress_tokens, begin_suppress_tokens: never, and never as the first token generated; see `Suppress`.
      min_length, min_new_tokens: no stop token before the row has so many tokens, with and without its prompt.
      stop_tokens: what those two rule out.

    Raises:
      ValueError: for a number out of range.

    >>> sampler(temperature=0.8, top_p=0.95)
    Chain(parts=(Temperature(t=0.8), TopP(p=0.95)))
    """
    stops = tuple(stop_tokens)

    def parts() -> Iterator[Sampler]:
        if logit_bias is not None:
            yield LogitBias(logit_bias)
        if repetition_penalty is not None:
            yield RepetitionPenalty(repetition_penalty)
        if frequency_penalty is not None:
            yield FrequencyPenalty(frequency_penalty)
        if presence_penalty is not None:
            yield PresencePenalty(presence_penalty)
        if no_repeat_ngram_size is not None:
            yield NoRepeat(no_repeat_ngram_size)
        if bad_words_ids is not None:
            bad = [tuple(word) for word in bad_words_ids]
            bad = [word for word in bad if len(word) != 1 or word[0] not in stops]
            if bad:
                yield LogitBias(dict.fromkeys(bad, -math.inf))
        if min_length is not None and stops:
            yield Suppress(stops, length=min_length)
        if min_new_tokens is not None and stops:
            yield Suppress(stops, new=min_new_tokens)
        if forced_tokens is not None:
            yield Force(forced_tokens)
        if suppress_tokens is not None:
            yield Suppress(suppress_tokens)
        if begin_suppress_tokens is not None:
            yield Suppress(begin_suppress_tokens, new=1)
        if allowed_tokens is not None:
            yield Allow(allowed_tokens)
        yield Temperature(1 if temperature is None else temperature)
        if top_k is not None:
            yield TopK(top_k)
        if top_p is not None:
            yield TopP(top_p)
        if min_p is not None:
            yield MinP(min_p)

    return Chain(tuple(parts()))
