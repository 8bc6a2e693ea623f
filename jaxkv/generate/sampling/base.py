"""What all samplers share: they adjust the logits of one row, then choose."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.cache.arguments import FAR
from jaxkv.cache.spec import EMPTY
from jaxkv.generate.history import History


class Sampler:
    """The base of all samplers.

    To write one that composes with the others, derive a frozen dataclass and override `adjust`:

    >>> @dataclasses.dataclass(frozen=True)
    ... class Ban(Sampler):
    ...     token: int
    ...
    ...     def adjust(self, logits, history):
    ...         return logits.at[self.token].set(-jnp.inf)
    >>> int((Ban(2) | jaxkv.sampling.Greedy())(None, jnp.array([0.0, 1.0, 2.0])))
    1
    """

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken; else one is drawn."""
        return False

    @property
    def needs_key(self) -> bool:
        """Whether a PRNG key is needed."""
        return not self.greedy

    @property
    def needs_history(self) -> bool:
        """Whether `adjust` reads the row's tokens."""
        return False

    def adjust(self, logits: Any, history: Any) -> Any:
        """Returns the logits to choose from.

        Args:
          logits: of one row, float32 [V].
          history: a `History`, the row's prompt and what was generated; None unless `needs_history`.
        """
        return logits

    def __call__(self, key: Any, logits: Any, history: History | None = None) -> Any:
        """Returns the next token of one row, an int32 scalar; EMPTY (-1) if `adjust` ruled out all of them.

        The most likely token for greedy samplers (of equal ones the lowest number), else a draw from
        softmax(adjusted logits).

        Args:
          key: PRNG key of this row and position; greedy samplers don't read it.
          logits: of one row, float32 [V].
          history: what the row holds, see `adjust`.
        """
        if self.needs_history and history is None:
            raise ValueError(f"{self} reads what the row holds: give history, a jaxkv.sampling.History")
        logits = self.adjust(logits, history)
        token = jnp.argmax(logits) if self.greedy else jax.random.categorical(key, logits)
        return jnp.where(logits[token] == -jnp.inf, EMPTY, token.astype(jnp.int32))

    def __or__(self, other: Sampler) -> Chain:
        if not isinstance(other, Sampler):
            return NotImplemented
        return Chain((self, other))


@dataclasses.dataclass(frozen=True)
class Chain(Sampler):
    """Several samplers after one another: `Chain((a, b, c)) == a | b | c`.

    Each part adjusts the logits of the one before it. If one of them is greedy, the most likely token is taken.

    Attributes:
      parts: the samplers, applied from first to last; chains among them are unfolded.

    Raises:
      ValueError: for no parts, or one that isn't a Sampler.
    """

    parts: tuple[Sampler, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.parts, tuple | list):
            raise ValueError(f"Chain: give a tuple of samplers, Chain((a, b)), not {self.parts!r}")
        flat: list[Sampler] = []
        for part in self.parts:
            if not isinstance(part, Sampler):
                raise ValueError(
                    f"Chain: {part!r} can't be chained; parts are samplers like Temperature(0.8), or your own class "
                    "derived from jaxkv.sampling.Sampler with an adjust method"
                )
            flat.extend(part.parts if isinstance(part, Chain) else (part,))
        if not flat:
            raise ValueError("Chain: no parts given; give at least one, for instance Chain((Temperature(0.8),))")
        object.__setattr__(self, "parts", tuple(flat))

    @property
    def greedy(self) -> bool:
        return any(part.greedy for part in self.parts)

    @property
    def needs_history(self) -> bool:
        return any(part.needs_history for part in self.parts)

    def adjust(self, logits: Any, history: Any) -> Any:
        for part in self.parts:
            logits = part.adjust(logits, history)
        return logits


def number(sampler: str, name: str, value: Any, possible: str, good: Callable[[float], bool]) -> float:
    """Returns a plain float, so that 0.8 and np.float64(0.8) are the same static fact."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or not good(float(value)):
        raise ValueError(f"{sampler}: {name} is {value!r}, must be {possible}")
    return float(value)


def count(sampler: str, name: str, value: Any) -> int:
    """Returns a whole number, 1 and above; FAR for all that lie beyond it."""
    if isinstance(value, int | np.integer) and value > FAR:
        return FAR
    return int(number(sampler, name, value, "a whole number, 1 and above", lambda n: n >= 1 and n == int(n)))


def token_numbers(sampler: str, name: str, value: Any) -> tuple[int, ...]:
    """Returns token numbers, one or several, as a tuple of ints."""
    tokens = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str | bytes) else (value,)
    good = all(isinstance(token, int | np.integer) and not isinstance(token, bool) and token >= 0 for token in tokens)
    if not tokens or not good:
        raise ValueError(f"{sampler}: {name} is {value!r}, must be token numbers, 0 and above, at least one")
    return tuple(map(int, tokens))


def check_known(sampler: Sampler, tokens: Iterable[int], vocab_size: int) -> None:
    """Raises ValueError, while tracing, if a token is outside the vocabulary."""
    highest = max(tokens)
    if highest >= vocab_size:
        raise ValueError(
            f"{type(sampler).__name__} names token {highest}, outside the model's vocabulary of {vocab_size} (0 to "
            f"{vocab_size - 1})"
        )
