"""The cache of a run, step by step: as one HTML page with a slider, or as it is now.

Which position lies in which slot is decided by `Cache.begin` alone. So a cache of the same layers, of one number each,
that is fed the same positions, is at each step what the run's own cache is, which was donated to the compiled loop.
"""

from __future__ import annotations

import dataclasses
import html
import json
import pkgutil
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxkv.cache.cache import Cache
from jaxkv.cache.look import show
from jaxkv.cache.spec import EMPTY, Chunk, Cross, Recurrent
from jaxkv.cache.storage import Dense
from jaxkv.generate.reading import blocks, last_positions
from jaxkv.picture import Picture

_PAGE = (pkgutil.get_data("jaxkv.cli", "trace.html") or b"").decode()
_MOST = 1024  # squares of a group and row; more slots share them


class Trace:
    """What lies where after each step of a run.

    Args:
      cache: of the run, before it begins.
      prompts: token numbers of each row, or None.
      texts: the tokens of each row's prompt, as text.
    """

    def __init__(self, cache: Any, prompts: Sequence[Sequence[int] | None], texts: Sequence[Sequence[str]]) -> None:
        kept = [spec for spec in cache.specs if not isinstance(spec.reach, Cross) and spec.shares is None]
        specs = [_small(spec) for spec in kept]
        options = {"max_block": cache.max_block, "slack": cache.slack, "layout": cache.layout}
        self._cache = Cache.init(specs, cache.num_rows, cache.capacity, **options)
        self._begin = jax.jit(lambda cache, positions: cache.begin(positions)[0])
        self._held = [np.asarray(group.held) for group in self._cache.bookkeeping]
        self._steps: list[dict[str, Any]] = []
        self._texts = [list(text) for text in texts]
        given = [np.asarray([] if prompt is None else prompt, np.int32) for prompt in prompts]
        last = last_positions(given)
        for _, positions, _ in blocks(given, np.zeros_like(last), last, cache.max_block):
            self._take(positions, "prefill")
        self._next = np.where([prompt.size > 0 for prompt in given], last, EMPTY).astype(np.int32)

    def step(self, new: Sequence[str | None]) -> None:
        """Notes one step: the text of each row's new token, None for rows that got none."""
        live = np.array([text is not None for text in new])
        positions = np.where(live, self._next, EMPTY).astype(np.int32)
        self._take(positions[:, None], "decode")
        self._next = np.where(live, self._next + 1, EMPTY).astype(np.int32)
        for texts, text in zip(self._texts, new, strict=True):
            if text is not None:
                texts.append(text)

    @property
    def picture(self) -> Picture:
        """The cache as it is now."""
        return show(self._cache)

    def _take(self, positions: np.ndarray, kind: str) -> None:
        self._cache = self._begin(self._cache, positions)
        written = []
        for number, group in enumerate(self._cache.bookkeeping):
            held = np.asarray(group.held)
            rows, slots = np.nonzero(held != self._held[number])
            written += [[number, *map(int, where), int(held[where])] for where in zip(rows, slots, strict=True)]
            self._held[number] = held
        queries = [int(max(row)) for row in positions]
        self._steps.append({"kind": kind, "writes": written, "queries": queries})

    def page(self, title: str) -> str:
        """Returns one self-contained HTML page with a slider over the steps."""
        groups = []
        for group in self._cache.bookkeeping:
            reach = group.reach
            states = isinstance(reach, Recurrent)
            groups.append(
                {
                    "name": "states, after so many tokens" if states else str(reach),
                    "states": states,
                    "slots": group.num_slots,
                    "each": -(-group.num_slots // _MOST),
                    "size": reach.size,
                    "sinks": reach.sinks,
                    "chunk": isinstance(reach, Chunk),
                }
            )
        data = {"groups": groups, "rows": self._cache.num_rows, "steps": self._steps, "texts": self._texts}
        # "</" would end the script, whatever stands in a text.
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/").replace("<!", "<\\!")
        return _PAGE.replace("TITLE", html.escape(title)).replace("DATA", text)


def _small(spec: Any) -> Any:
    """Returns a spec of the same bookkeeping that keeps next to nothing."""
    if isinstance(spec.reach, Recurrent):
        return dataclasses.replace(spec, reach=dataclasses.replace(spec.reach, state=(1, 1), tail=None))
    sizes = {"num_kv_heads": 1, "head_dim": 1, "value_dim": 1, "k_storage": Dense(), "v_storage": Dense()}
    return dataclasses.replace(spec, **sizes, rotary=None, rotary_at="put")
