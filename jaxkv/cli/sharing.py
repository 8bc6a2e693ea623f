"""What texts of one prompt share: the pool of pages that they need, and the line that says what was saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxkv.cache.rows import Rows
from jaxkv.cli.prompts import Prompt
from jaxkv.cli.terminal import counted
from jaxkv.models.searching import pages_for

Batch = Sequence[tuple[Prompt, int]]  # prompts that are prefilled once each, and how many texts of each are decoded


def layout_of(layout: str | None, specs: Sequence[Any], batches: Sequence[Batch], capacity: int, ahead: int = 0) -> Any:
    """Returns how the cache is to lie.

    Args:
      layout: as asked for; None: in pages if texts of a batch share a prompt.
      specs: of the model's layers.
      batches: what is decoded together, one after the other in caches of the same form.
      capacity: of the cache, in tokens.
      ahead: tokens of a draft that may go beyond a text's end.
    """
    shares = any(copies > 1 for batch in batches for _, copies in batch)
    if (layout or ("pages" if shares else "rows")) == "rows":
        return Rows()
    pools = [
        pages_for(specs, [(len(prompt.tokens), prompt.limit + ahead, copies) for prompt, copies in batch], capacity)
        for batch in batches
    ]
    return max(pools, key=lambda pool: pool.num_pages)


def describe_prefill(batches: Sequence[Batch], layout: Any) -> str:
    """Returns how many tokens were prefilled, and what the texts shared."""
    once, each, pages = 0, 0, 0
    for prompt, copies in (pair for batch in batches for pair in batch):
        size = len(prompt.tokens)
        once, each = once + size, each + copies * size
        if copies > 1 and layout != Rows():
            pages += (size - 1) // layout.page_size
    text = f"prefilled {counted(once, 'token')}"
    least, *_, most = sorted([n for batch in batches for _, n in batch] * 2)
    if least == most > 1:
        text += f" once for {most} texts, not {most} times"
    elif each > once:
        text += f", not {each:,}: once for all texts of a prompt that are decoded together"
    if pages:
        text += f"; {counted(pages, 'page')} of {layout.page_size} shared by all"
    return text
