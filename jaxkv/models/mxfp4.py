"""MXFP4: numbers of four bits, 32 of which share a scale, as gpt-oss is published.

The format is that of the Open Compute Project's Microscaling specification 1.0: E2M1 numbers, and scales that are
powers of two (E8M0). https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

BLOCK = 32  # numbers that share a scale
_AT_ONCE = 1 << 16  # numbers that are unpacked at once: as float32 they stay near the processor
_HALVES = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.float32)  # twice the magnitude of each number: 0 to 6
_DOUBLED = np.concatenate([_HALVES, -_HALVES])
# The two numbers of each byte, the low nibble first, as one item: they are looked up together.
_PAIRS = np.stack([np.tile(_DOUBLED, 16), np.repeat(_DOUBLED, 16)], axis=-1).view(np.uint64)[:, 0]
# Half of 2**(byte - 127), to go with what is doubled: so the largest scale, 2**128, has its place in float32. In the
# specification it stands for NaN; transformers computes with it.
_SCALES = np.ldexp(np.float32(1), np.arange(256) - 128)


def packed_shapes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shapes of the blocks and of the scales of a tensor [E, D, N], D a multiple of 32."""
    experts, inner, outer = shape
    scales = (experts, outer, inner // BLOCK)
    return (*scales, BLOCK // 2), scales


def unpack(blocks: np.ndarray, scales: np.ndarray, dtype: Any) -> np.ndarray:
    """Returns the numbers [E, G * 32, N] of a tensor. Every number is exact in float32 and bfloat16.

    Args:
      blocks: uint8 [E, N, G, 16], two numbers a byte.
      scales: uint8 [E, N, G]; s stands for 2**(s - 127).
      dtype: of the result.

    >>> unpack(np.full((1, 1, 1, 16), 0x21, np.uint8), np.full((1, 1, 1), 128, np.uint8), np.float32)[0, :3, 0]
    array([1., 2., 1.], dtype=float32)
    """
    experts, outer, groups, _ = blocks.shape
    numbers = np.empty((experts, groups * BLOCK, outer), dtype)
    step = max(1, _AT_ONCE // max(1, groups * BLOCK))
    with np.errstate(over="ignore"):  # what a dtype can't hold becomes inf, as everywhere in loading
        for expert, begin in itertools.product(range(experts), range(0, outer, step)):
            rows = expert, slice(begin, begin + step)
            part = _PAIRS.take(blocks[rows]).view(np.float32)  # [n, G, 32]
            part *= _SCALES.take(scales[rows])[..., None]
            numbers[expert, :, rows[1]] = part.reshape(-1, groups * BLOCK).T
    return numbers
