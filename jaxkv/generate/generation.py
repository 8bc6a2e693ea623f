"""What `generate` and a `Stream` give."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

# By number, as the compiled loop keeps them.
REASONS = ("running", "stop", "length", "full", "nan", "inf", "sampler", "idle")
RUNNING, STOP, LENGTH, FULL, NAN, INF, SAMPLER, IDLE = range(len(REASONS))


@dataclasses.dataclass(frozen=True, eq=False)
class Generation:
    """What came out, one row per row of the cache.

    Attributes:
      tokens: int32 [B, N], EMPTY (-1) after a row's end; N is max_new_tokens, but at most the cache's capacity + 1.
        A stop token is among them.
      lengths: int32 [B], how many tokens each row has.
      log_probs: float32 [B, N], of the tokens under the model's own distribution, log_softmax of the logits in float32
        before the sampler changed them; 0 after a row's end.
      reasons: why each row ended. "stop": a stop token or sequence; "length": max_new_tokens; "full": the next token
        did not fit into the cache; "nan": the model's logits are NaN, so there is no next token; "inf": one of them is
        +inf, or all are -inf; "idle": no prompt. Only in the result of a stream: "running", it has not got to the
        row's end yet; "sampler", the sampler's answer was not a token; "failed", the compiled loop failed, see `error`.
      cache: goes on from here. It holds prompt and tokens but for the last token of each row. A "nan" or "inf" row
        holds that one too. A "full" row holds what it held and has `ok` False: it takes nothing more until
        `cache.retry` or `cache.reset`. None if the compiled loop failed: the cache was donated to it and is lost.
      error: what happened, if the compiled loop failed; else None.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    log_probs: np.ndarray
    reasons: tuple[str, ...]
    cache: Any
    error: str | None = None


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Speculation(Generation):
    """A Generation, and what the drafts were good for.

    Attributes:
      drafted: int32 [B], tokens that were drafted for each row.
      accepted: int32 [B], those of them that the model would have chosen itself.
      steps: int32 [B], forward passes of the model that each row took part in; `generate` takes one per token.
      draft_cache: of the draft model, to go on with: it holds the beginning of what `cache` holds. None without one.
    """

    drafted: np.ndarray
    accepted: np.ndarray
    steps: np.ndarray
    draft_cache: Any = None
