"""What a compiled loop tells the host after each step. In one array, since every look at the device costs."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def news(tokens: Any, log_probs: Any, reasons: Any, steps: Any, *counts: Any) -> Any:
    """Returns int32 [2 * N + 2 + C, B], from which a `News` is made.

    Args:
      tokens: int32 [B, N], of the last step, in front; EMPTY behind them.
      log_probs: float32 [B, N], of these.
      reasons: int32 [B], indices into REASONS.
      steps: int32 [B], how many each row took part in.
      *counts: C further int32 [B].
    """
    bits = jax.lax.bitcast_convert_type(log_probs, jnp.int32)
    return jnp.concatenate([tokens.T, bits.T, jnp.stack([reasons, steps, *counts])])


@dataclasses.dataclass(frozen=True)
class News:
    """The same on the host.

    Attributes:
      array: int32 [2 * N + 2 + C, B].
      width: N, how many tokens a step can bring to a row.
    """

    array: np.ndarray
    width: int

    @property
    def tokens(self) -> np.ndarray:
        """The tokens of the last step, int32 [B, N]."""
        return self.array[: self.width].T

    @property
    def log_probs(self) -> np.ndarray:
        """Of these tokens, float32 [B, N]."""
        return self.array[self.width : 2 * self.width].T.view(np.float32)

    @property
    def reasons(self) -> np.ndarray:
        """Why each row has ended, int32 [B]."""
        return self.array[2 * self.width]

    @property
    def count(self) -> int:
        """Steps so far."""
        return int(self.counts[0].max(initial=0))

    @property
    def counts(self) -> np.ndarray:
        """Steps of each row, and what else the loop counts, int32 [1 + C, B]."""
        return self.array[2 * self.width + 1 :]

    def ending(self, rows: np.ndarray, reason: int) -> News:
        """Returns these with another reason for rows, bool [B]."""
        array = self.array.copy()
        array[2 * self.width] = np.where(rows, reason, self.reasons)
        return News(array, self.width)
