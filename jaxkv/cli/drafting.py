"""`--speculate`: what drafts, and what came of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxkv.cache.cache import Cache
from jaxkv.cli.devices import place_of
from jaxkv.cli.options import UsageError
from jaxkv.cli.source import Source, find
from jaxkv.cli.terminal import counted

LOOKUP = "lookup"
_NUM_DRAFT = 8


@dataclasses.dataclass(frozen=True)
class Drafting:
    """What was asked for.

    Attributes:
      source: the draft model; None to look drafts up.
      model: the same, once it is loaded.
    """

    source: Source | None
    model: Any = None

    @classmethod
    def find(cls, given: str, source: Source) -> Drafting:
        """Returns it for `lookup` or a directory, with the same vocabulary as the model's.

        Raises:
          UsageError, Failure: as `find`; UsageError for another vocabulary.
        """
        if given == LOOKUP:
            return cls(None)
        draft = find(given)
        here, there = source.config.vocab_size, draft.config.vocab_size
        if here != there:
            raise UsageError(
                f"argument --speculate: {given} has a vocabulary of {there:,} tokens, {source.name} one of {here:,}; "
                "give a smaller model of the same family, or lookup"
            )
        return cls(draft)

    def load(self, dtype: str | None, num_tokens: int, *, quiet: bool, mesh: Any = None) -> Drafting:
        """Returns this with the model; the arguments are those of `Source.load`."""
        if self.source is None:
            return self
        model = self.source.load(dtype, num_tokens, storage=None, quiet=quiet, mesh=mesh)
        return dataclasses.replace(self, model=model)

    @staticmethod
    def slack(capacity: int) -> int:
        """Returns the slack of a cache from which any draft can be taken back."""
        return min(_NUM_DRAFT, capacity)

    def options(self, cache: Cache) -> dict[str, Any]:
        """Returns the arguments of `speculate` for a run with this cache."""
        num_draft = max(1, min(_NUM_DRAFT, cache.max_block - 1))
        draft = None
        if self.model is not None:
            sizes = (cache.num_rows, cache.capacity)
            small = Cache.init(self.model.specs, *sizes, slack=num_draft, sharding=place_of(self.model))
            draft = (self.model.forward, self.model.params, small)
        return {"draft": draft, "num_draft": num_draft}


def describe_drafts(results: Sequence[Any]) -> str:
    """Returns what came of the drafts of some Speculations."""
    drafted, accepted, steps, tokens = (
        sum(int(getattr(result, name).sum()) for result in results)
        for name in ("drafted", "accepted", "steps", "lengths")
    )
    gained = f"{counted(tokens, 'token')} in {counted(steps, 'step')} of the model"
    if sum(len(result.steps) for result in results) > 1:  # rows share a step
        gained = f"{tokens / max(steps, 1):.1f} tokens of a text per step of the model"
    return f"drafts: {accepted:,} of {counted(drafted, 'token')} accepted; {gained}"
