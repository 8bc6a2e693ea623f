"""The form of a draft: a chain of tokens, or a tree of which each level has so many continuations per token."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Branches:
    """Level by level, the tokens of a block: first the row's last token, then the draft. Static.

    Attributes:
      widths: how many tokens follow each of the level above.

    >>> branches = Branches((2, 1))
    >>> branches.parents.tolist(), branches.depths.tolist()
    ([-1, 0, 0, 1, 2], [0, 1, 1, 2, 2])
    """

    widths: tuple[int, ...]

    @property
    def is_chain(self) -> bool:
        return set(self.widths) == {1}

    @functools.cached_property
    def levels(self) -> tuple[int, ...]:
        """How many tokens each level has; of the first, the row's last token, 1."""
        return tuple(math.prod(self.widths[:i]) for i in range(len(self.widths) + 1))

    @functools.cached_property
    def parents(self) -> np.ndarray:
        """The number of the token that each follows, int32 [T]; -1 for the first."""
        parents, begin = [np.array([-1])], 0
        for size, width in zip(self.levels, self.widths, strict=False):
            parents.append(begin + np.repeat(np.arange(size), width))
            begin += size
        return np.concatenate(parents).astype(np.int32)

    @functools.cached_property
    def depths(self) -> np.ndarray:
        """The level of each token, int32 [T]."""
        return np.repeat(np.arange(len(self.levels)), self.levels).astype(np.int32)

    @property
    def size(self) -> int:
        """Tokens of a block (T)."""
        return sum(self.levels)
