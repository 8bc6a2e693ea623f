"""What a row holds so far, for the parts of a sampler that read it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.cache.spec import EMPTY


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
    """The tokens of one row, prompt and generated. A pytree; `in_prompt` and `counts` save counting them at each step.

    Attributes:
      tokens: int32 [N], by position, EMPTY (-1) behind them.
      length: int32 scalar, how many there are.
      prompt_length: int32 scalar, how many of them are the prompt.
      limit: int32 scalar, how many there may be at the end.
      in_prompt: bool [V], which tokens are in the prompt.
      counts: int32 [V], how often each token was generated.

    >>> history = History.of([3, 1, 3, 3], vocab_size=4, prompt_length=2)
    >>> history.counts.tolist(), history.seen.tolist(), int(history.num_generated)
    ([0, 0, 0, 2], [False, True, False, True], 2)
    """

    tokens: Any
    length: Any
    prompt_length: Any
    limit: Any
    in_prompt: Any
    counts: Any

    @classmethod
    def of(
        cls,
        tokens: Any,
        vocab_size: int,
        *,
        prompt_length: int | None = None,
        size: int | None = None,
        limit: int | None = None,
    ) -> History:
        """Returns the history of one row, in NumPy.

        Args:
          tokens: prompt and generated, a sequence of ints.
          vocab_size: V.
          prompt_length: how many of them are the prompt; None: all.
          size: room for so many tokens (N); None: as many as there are.
          limit: how many tokens there may be at the end, the prompt included; None: no limit.
        """
        row = np.asarray(tokens, np.int32)
        prompt_length = row.size if prompt_length is None else prompt_length
        padding = (row.size if size is None else size) - row.size
        prompt, generated = row[:prompt_length], row[prompt_length:]
        in_prompt = np.zeros(vocab_size, bool)
        in_prompt[prompt] = True
        return cls(
            tokens=np.pad(row, (0, padding), constant_values=EMPTY),
            length=np.int32(row.size),
            prompt_length=np.int32(prompt_length),
            limit=np.int32(np.iinfo(np.int32).max if limit is None else limit),
            in_prompt=in_prompt,
            counts=np.bincount(generated, minlength=vocab_size).astype(np.int32),
        )

    @property
    def seen(self) -> Any:
        """Which tokens the row holds, prompt and generated: bool [V]."""
        return self.in_prompt | (self.counts > 0)

    @property
    def num_generated(self) -> Any:
        """How many tokens came after the prompt: int32 scalar."""
        return self.length - self.prompt_length

    def last(self, n: int) -> Any:
        """Returns the last n tokens, int32 [n], EMPTY in front of the first one of the row."""
        at = self.length - n + jnp.arange(n, dtype=jnp.int32)
        return jnp.where(at >= 0, jnp.take(self.tokens, jnp.maximum(at, 0), mode="clip"), EMPTY)

    def append(self, token: Any) -> History:
        """Returns this history and one more generated token; EMPTY changes nothing."""
        here = token >= 0
        nowhere = jnp.int32(max(self.tokens.shape[-1], self.counts.shape[-1]))
        return dataclasses.replace(
            self,
            tokens=self.tokens.at[jnp.where(here, self.length, nowhere)].set(token, mode="drop"),
            length=jnp.where(here, self.length + 1, self.length),
            counts=self.counts.at[jnp.where(here, token, nowhere)].add(1, mode="drop"),
        )
