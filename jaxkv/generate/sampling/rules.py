"""Which tokens may come: parts of a sampler that name tokens."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxkv.cache.arguments import FAR
from jaxkv.cache.spec import EMPTY
from jaxkv.generate.sampling.base import Sampler, check_known, count, token_numbers


@dataclasses.dataclass(frozen=True)
class LogitBias(Sampler):
    """Adds to the logits of tokens, or of tokens that would complete a sequence: `sequence_bias` of transformers.

    >>> sampler = LogitBias({7: 2.5, (3, 4): -math.inf}) | jaxkv.sampling.Greedy()  # no 4 after a 3

    Attributes:
      bias: {token or tuple of tokens: what is added}, -inf rules it out. Kept as pairs. Several that meet add up.

    Raises:
      ValueError: for anything else.
    """

    bias: Any

    def __post_init__(self) -> None:
        pairs = self.bias.items() if isinstance(self.bias, Mapping) else self.bias
        try:
            pairs = [(token_numbers("LogitBias", "a key", sequence), value) for sequence, value in pairs]
        except TypeError:
            pairs = []
        for _, value in pairs:
            real = isinstance(value, numbers.Real) and not isinstance(value, bool)
            if not real or math.isnan(value) or value == math.inf:
                raise ValueError(
                    f"LogitBias: a bias is {value!r}, must be a finite number, or -inf to rule a token out"
                )
        if not pairs:
            raise ValueError(
                f"LogitBias: bias is {self.bias!r}, must be {{token or tuple of tokens: number}}, not empty"
            )
        object.__setattr__(self, "bias", tuple((sequence, float(value)) for sequence, value in pairs))

    @property
    def needs_history(self) -> bool:
        return any(len(sequence) > 1 for sequence, _ in self.bias)

    def adjust(self, logits: Any, history: Any) -> Any:
        sequences = [sequence for sequence, _ in self.bias]
        check_known(self, (token for sequence in sequences for token in sequence), logits.shape[0])
        added: Any = np.array([value for _, value in self.bias], np.float32)
        if self.needs_history:
            longest = max(map(len, sequences)) - 1
            # What stands before the last token, EMPTY (anything) in front of it.
            before = np.array([[EMPTY] * (longest + 1 - len(s)) + list(s[:-1]) for s in sequences], np.int32)
            fits = ((before == EMPTY) | (before == history.last(longest)[None, :])).all(1)
            added = jnp.where(fits, added, 0.0)
        last = np.array([sequence[-1] for sequence in sequences], np.int32)
        return logits + jnp.zeros_like(logits).at[last].add(added)


@dataclasses.dataclass(frozen=True)
class Suppress(Sampler):
    """Rules tokens out: always, or only at the beginning of the generated text.

    `Suppress(tokens)` is `suppress_tokens` of transformers, with `new=1` its `begin_suppress_tokens`; with the stop
    tokens, `new=n` is `min_new_tokens` and `length=n` is `min_length`.

    Attributes:
      tokens: one or several.
      new: only while fewer than so many tokens were generated.
      length: only while the row, prompt included, has fewer than so many tokens.

    Raises:
      ValueError: for anything else.
    """

    tokens: Any
    new: int | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", token_numbers("Suppress", "tokens", self.tokens))
        for name in ("new", "length"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, count("Suppress", name, getattr(self, name)))

    @property
    def needs_history(self) -> bool:
        return self.new is not None or self.length is not None

    def adjust(self, logits: Any, history: Any) -> Any:
        check_known(self, self.tokens, logits.shape[0])
        suppressed = logits.at[np.array(self.tokens, np.int32)].set(-jnp.inf)
        if self.new is not None:
            suppressed = jnp.where(history.num_generated < self.new, suppressed, logits)
        if self.length is not None:
            suppressed = jnp.where(history.length < self.length, suppressed, logits)
        return suppressed


@dataclasses.dataclass(frozen=True)
class Allow(Sampler):
    """Only these tokens may come.

    Attributes:
      tokens: one or several.

    Raises:
      ValueError: for anything else.
    """

    tokens: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", token_numbers("Allow", "tokens", self.tokens))

    def adjust(self, logits: Any, history: Any) -> Any:
        check_known(self, self.tokens, logits.shape[0])
        allowed = np.isin(np.arange(logits.shape[0]), self.tokens)
        return jnp.where(allowed, logits, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class Force(Sampler):
    """At some positions only these tokens may come: `forced_bos_token_id` and `forced_eos_token_id` of transformers.

    >>> sampler = Force({1: 7, -1: (2, 3)}) | jaxkv.sampling.Greedy()  # 7 second in the row, 2 or 3 as its last token

    Attributes:
      tokens: {position: token, or several}, counted from the start of the row, prompt included; a negative one from
        the row's limit. A position in the prompt changes nothing. Kept as pairs.

    Raises:
      ValueError: for anything else.
    """

    tokens: Any

    def __post_init__(self) -> None:
        given = self.tokens
        pairs = list(given.items()) if isinstance(given, Mapping) else list(given) if isinstance(given, tuple) else []
        if not pairs or not all(isinstance(at, int) and not isinstance(at, bool) for at, _ in pairs):
            raise ValueError(f"Force: tokens is {given!r}, must be {{position: token}}, not empty")
        pairs = [(min(max(at, -FAR), FAR), token_numbers("Force", f"tokens[{at}]", value)) for at, value in pairs]
        object.__setattr__(self, "tokens", tuple(pairs))

    @property
    def needs_history(self) -> bool:
        return True

    def adjust(self, logits: Any, history: Any) -> Any:
        for at, tokens in self.tokens:
            check_known(self, tokens, logits.shape[0])
            allowed = np.isin(np.arange(logits.shape[0]), tokens)
            # As in transformers: whatever was ruled out before, a forced token comes.
            forced = jnp.where(allowed, jnp.zeros_like(logits), -jnp.inf)
            here = history.length == (at if at >= 0 else history.limit + at)
            logits = jnp.where(here, forced, logits)
        return logits
