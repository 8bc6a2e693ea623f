"""Several texts for each prompt, the best first: what `Model.beam_search` and `Model.best_of` give."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxkv.models.completion import Completion


@dataclasses.dataclass(frozen=True, eq=False)
class Choices:
    """Several texts for each of P prompts, the best first.

    Attributes:
      texts: the generated texts, n per prompt, without stop tokens; None if the model has no tokenizer.
      tokens, lengths, log_probs, scores, reasons, cache: see `jaxkv.Candidates`.
      prompts: the tokens of each prompt; none for an idle row.
    """

    texts: tuple[tuple[str, ...], ...] | None
    tokens: np.ndarray
    lengths: np.ndarray
    log_probs: np.ndarray
    scores: np.ndarray
    reasons: tuple[tuple[str, ...], ...]
    prompts: tuple[tuple[int, ...], ...]
    cache: Any

    @property
    def best(self) -> Completion:
        """The best text of each prompt, as `Model.generate` returns it: to go on from, with `cache=`.

        Its cache has a row per prompt. On Pages it shares the memory of this one; on Rows it is a copy of them.
        """
        return self._best(self.cache.take(np.arange(len(self.prompts))))

    @property
    def text(self) -> str:
        """The best text, where there is one prompt.

        Raises:
          ValueError: if there are several, or no texts.
        """
        return self._best(None).text  # also after the cache was given on

    def _best(self, cache: Any) -> Completion:
        return Completion(
            texts=None if self.texts is None else tuple(texts[0] for texts in self.texts),
            tokens=self.tokens[:, 0],
            lengths=self.lengths[:, 0],
            log_probs=self.log_probs[:, 0],
            reasons=tuple(reasons[0] for reasons in self.reasons),
            prompts=self.prompts,
            cache=cache,
        )
