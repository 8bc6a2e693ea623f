"""Against repetition: parts of a sampler that make what a row holds already less likely."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxkv.generate.sampling.base import Sampler, count, number


class _OfHistory(Sampler):
    @property
    def needs_history(self) -> bool:
        return True


@dataclasses.dataclass(frozen=True)
class RepetitionPenalty(_OfHistory):
    """Makes tokens of the prompt and of the generated text less likely: logits l > 0 become l / r, others l * r.

    From Keskar et al. 2019, "CTRL: A Conditional Transformer Language Model", with the sign rule of Hugging Face
    transformers. It goes first in a chain: it acts on the model's own logits.

    Attributes:
      r: above 0; 1 changes nothing, below 1 favors repetition.

    Raises:
      ValueError: for any other `r`.
    """

    r: float

    def __post_init__(self) -> None:
        r = number("RepetitionPenalty", "r", self.r, "above 0 (1 changes nothing)", lambda r: r > 0)
        object.__setattr__(self, "r", r)

    def adjust(self, logits: Any, history: Any) -> Any:
        return jnp.where(history.seen, jnp.where(logits > 0, logits / self.r, logits * self.r), logits)


@dataclasses.dataclass(frozen=True)
class FrequencyPenalty(_OfHistory):
    """Takes `f` from a token's logit for each time that it was generated, as OpenAI's API does; the prompt is free.

    Attributes:
      f: usually -2 to 2; 0 changes nothing, below 0 favors repetition.

    Raises:
      ValueError: if `f` is not a finite number.
    """

    f: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "f", number("FrequencyPenalty", "f", self.f, "a finite number", lambda f: True))

    def adjust(self, logits: Any, history: Any) -> Any:
        return logits - self.f * history.counts.astype(logits.dtype)


@dataclasses.dataclass(frozen=True)
class PresencePenalty(_OfHistory):
    """Takes `p` from the logit of each token that was generated, once, as OpenAI's API does; the prompt is free.

    Attributes:
      p: usually -2 to 2; 0 changes nothing, below 0 favors repetition.

    Raises:
      ValueError: if `p` is not a finite number.
    """

    p: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "p", number("PresencePenalty", "p", self.p, "a finite number", lambda p: True))

    def adjust(self, logits: Any, history: Any) -> Any:
        return jnp.where(history.counts > 0, logits - self.p, logits)


@dataclasses.dataclass(frozen=True)
class NoRepeat(_OfHistory):
    """No sequence of `n` tokens occurs twice in a text, prompt included: `no_repeat_ngram_size` of transformers.

    Attributes:
      n: 1 and above.

    Raises:
      ValueError: for any other `n`.
    """

    n: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", count("NoRepeat", "n", self.n))

    def adjust(self, logits: Any, history: Any) -> Any:
        tokens, before = history.tokens, self.n - 1
        num_starts = tokens.shape[0] - before
        if num_starts < 1:
            return logits
        recent = history.last(before)
        same = jnp.arange(before, tokens.shape[0], dtype=jnp.int32) < history.length
        for i in range(before):
            same &= tokens[i : i + num_starts] == recent[i]
        followed = jnp.where(same, tokens[before:], logits.shape[0])  # the latter is nowhere
        return logits.at[followed].set(-jnp.inf, mode="drop")
