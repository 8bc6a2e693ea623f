"""What one forward pass tells the layers: positions, and where its tokens lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from jaxkv.cache.look import html, show_step
from jaxkv.cache.show import show
from jaxkv.cache.spec import Cross, Reach


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class GroupStep:
    """Where the tokens of one call lie in the layers of one group, and what lies beside them."""

    slots: Any  # int32 [B, T]; num_slots: nowhere; None: nothing is put in this call
    kv_positions: Any  # int32 [B, V], after the call's own tokens; EMPTY where nothing lies
    kv_spans: Any  # int32 [B, V], 0: none; None if the call, or what lies there, has no spans
    filled: Any  # int32 [B]; slots from here on are empty
    pages: Any  # where the slots lie: None on rows; a PageStep on pages
    slot_is_position: bool = dataclasses.field(metadata={"static": True})

    __repr__ = show

    @property
    def page_size(self) -> int:
        """How many slots lie together, wherever the others are: stretches of whole pages are read fastest."""
        return 1 if self.pages is None else self.kv_positions.shape[-1] // self.pages.table.shape[-1]

    def copied(self) -> GroupStep:
        """Returns this for writes after the pages that several rows have were copied."""
        return self if self.pages is None else dataclasses.replace(self, pages=self.pages.copied())

    def of_row(self, one: Callable[[Any], Any]) -> GroupStep:
        """Returns this for one batch row; `one` cuts it out of an array [B, ...] or None."""
        return dataclasses.replace(
            self,
            slots=one(self.slots),
            kv_positions=one(self.kv_positions),
            kv_spans=one(self.kv_spans),
            filled=one(self.filled),
            pages=None if self.pages is None else self.pages.of_row(one),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Step:
    """Positions and addresses of one forward pass, made by `Cache.begin`; lives as long as the trace it was made in.

    One made by `Cache.begin_cross` serves to put an encoder's output; its positions [B, V] are places in that output.
    """

    positions: Any  # int32 [B, T]; EMPTY: padding, or a token of a sequence that did not fit
    rows: Any  # int32 [B], the sequence that each batch row continues
    ok: Any  # bool [B], False where the sequence did not fit in this call
    spans: Any  # int32 [B, T], 0: causal; None: all causal
    groups: tuple[Any, ...]  # GroupSteps; None: layers that have no part in the call
    whole: bool = dataclasses.field(metadata={"static": True})  # batch row b is sequence b
    cross: bool = dataclasses.field(default=False, metadata={"static": True})  # made by begin_cross
    shared: Any = None  # int32 scalar: the first positions, so many, are alike in all rows; None: not promised
    tree: Any = None  # a Tree, if the call's tokens are one

    __repr__ = show

    def _repr_html_(self) -> str:
        return html(self, show_step)

    @property
    def depths(self) -> Any:
        """Where each token stands in its text, int32 [B, T]: its position, or in a tree the one in its branch.

        What rotates queries and keys, or adds learned positions, goes by it.
        """
        return self.positions if self.tree is None else self.tree.depths(self.positions)

    def visible(self, reach: Reach, kv_positions: Any, kv_spans: Any) -> Any:
        """Returns which of some slots, by their positions and spans, the queries of this call may see.

        Args:
          reach: of the layer.
          kv_positions: int32 [B, S].
          kv_spans: int32 [B, S], or None; not looked at if the call has no spans.

        Returns:
          bool [B, T, S].
        """
        if self.tree is not None and not isinstance(reach, Cross):  # places in an encoder's output are no tokens
            return self.tree.visible(reach, self.positions, kv_positions)
        same_span = None
        if self.spans is not None and kv_spans is not None:
            same_span = (self.spans[:, :, None] == kv_spans[:, None, :]) & (self.spans[:, :, None] != 0)
        return reach.visible(self.positions[:, :, None], kv_positions[:, None, :], same_span)

    def of_row(self, group: int, b: Any) -> Step:
        """Returns the step of batch row b (int32 scalar, may be traced) alone, to read the layers of one group."""

        def one(x: Any) -> Any:
            return None if x is None else lax.dynamic_slice_in_dim(x, b, 1, 0)

        return dataclasses.replace(
            self,
            positions=one(self.positions),
            rows=one(self.rows),
            ok=one(self.ok),
            spans=one(self.spans),
            groups=(*self.groups[:group], self.groups[group].of_row(one), *self.groups[group + 1 :]),
            whole=False,
            tree=None if self.tree is None else self.tree.of_row(one),
        )
