"""The sizes that the blockwise form is compiled for."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv.cache.spec import Cross, LayerSpec, Reach
from jaxkv.cache.step import GroupStep


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a call is cut into pieces. Frozen and hashable: a static argument."""

    reach: Reach
    softcap: float | None
    dropout_rate: float
    tile: int  # queries at a time
    block: int  # slots at a time
    tails: tuple[int, ...]  # sizes the last block may have; empty: it is as long as the others
    listed: bool  # the blocks to visit are listed; False: they are those between two bounds
    by_row: bool  # one sequence after the other, each as far as it is filled
    common: Plan | None = None  # for the slots that all rows share, read once; None: each row reads its own
    native: str = "never"  # whether the kernel in C++ reads: "alone": where each device runs a whole program; "always"

    @classmethod
    def choose(
        cls,
        spec: LayerSpec,
        group: GroupStep,
        q_shape: tuple[int, ...],
        softcap: float | None = None,
        dropout_rate: float = 0.0,
        *,
        shares: bool = False,
        most: int | None = None,
    ) -> Plan:
        """Returns the sizes that were fastest on a CPU of two cores (benchmarks/decode.py).

        Args:
          spec: of the layer.
          group: where its keys lie.
          q_shape: [B, T, N, H] of the queries, none of them 0.
          softcap, dropout_rate: of the call.
          shares: whether the rows have their first slots in common.
          most: None, or how many queries are taken at a time where that is more: for blocks that cost much to read.
        """
        batch, length, num_heads, size = q_shape
        num_slots = group.kv_positions.shape[1]
        by_row = batch > 1 and length <= 16 and not dropout_rate and pays_by_row(spec)
        heads = spec.num_kv_heads * (1 if by_row else batch)
        # Where slot = position, two bounds say which blocks are seen. Elsewhere a look at the positions does.
        listed = not group.slot_is_position and not isinstance(spec.reach, Cross)
        if length <= 16:  # decoding: one block of keys fills the fast cache, and its scores don't fill another
            queries = num_heads * length * (1 if by_row else batch)
            tile, block = length, _power(min(2**19 // (heads * spec.head_dim), 2**18 // queries), 64, 1024)
            if listed and spec.reach.size is not None:  # a window begins and ends within a block
                block = min(block, _power(spec.reach.size // 8, 64, 1024))
        else:  # the scores of one tile against one block do
            scores = 3 * 2**18 // (heads * (num_heads // spec.num_kv_heads))
            tile = block = _power(math.isqrt(scores), 64, 256)
            if most is not None and min(most, length) > tile:
                tile, block = min(most, length), _power(scores // min(most, length), 64, 256)

        def whole(size: int) -> int:  # pages, at least one
            return max(size // group.page_size, 1) * group.page_size

        tile, block = min(tile, length), min(whole(block), num_slots)
        listed = listed and block < num_slots
        tails: tuple[int, ...] = ()
        # Only where no neighbor has a say in it: a row's result must not depend on what the others hold.
        if length <= 16 and (batch == 1 or by_row) and block > 64 and not listed:
            tails = tuple(sorted({whole(64 * 2**i) for i in range(8) if whole(64 * 2**i) < block} | {block}))
        softcap = None if softcap is None else float(softcap)
        common = None
        if shares and batch > 1:  # then the queries of all rows are those of one
            common = cls.choose(spec, group, (1, length, batch * num_heads, size), softcap, most=most)
        return cls(spec.reach, softcap, float(dropout_rate), tile, block, tails, listed, by_row, common)

    def cap(self, scores: Any) -> Any:
        """Returns the scores within the soft cap."""
        return scores if self.softcap is None else self.softcap * jnp.tanh(scores / self.softcap)


def pays_by_row(spec: LayerSpec) -> bool:
    """Returns whether to visit one sequence after the other: on a CPU, if one alone is enough work.

    Accelerators want all at once, and several devices may share the rows.
    """
    return jax.default_backend() == "cpu" and jax.device_count() == 1 and spec.num_kv_heads * spec.head_dim >= 256


def _power(x: int, least: int, most: int) -> int:
    """Returns the largest power of two that is at most x, between two others."""
    return min(max(2 ** (max(x, 1).bit_length() - 1), least), most)
