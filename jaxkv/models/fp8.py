"""FP8 in blocks: E4M3 numbers of which each block of rows and columns shares a scale, as DeepSeek-V3 is published.

A weight `X` [..., N, D] lies beside `X_scale_inv` [..., N / block, D / block], rounded up, by which it is multiplied.
The last blocks may be smaller. DeepSeek-AI 2024, https://arxiv.org/abs/2412.19437, section 3.3.2.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxkv.errors import NotSupportedError
from jaxkv.models.files import Files, is_floating

METHOD = "fp8"
_BLOCK = (128, 128)  # where config.json says nothing
_SCALE = "_scale_inv"


def block_of(quantization: Mapping[str, Any] | None, where: str = "config.json") -> tuple[int, int] | None:
    """Returns the rows and columns of a block by "quantization_config", None if that is not FP8.

    Raises:
      NotSupportedError: for one scale for a whole weight.
      ValueError: for anything else that is not two sizes.

    >>> block_of({"quant_method": "fp8", "weight_block_size": [128, 64]})
    (128, 64)
    """
    if not quantization or quantization.get("quant_method") != METHOD:
        return None
    block = quantization.get("weight_block_size", _BLOCK)
    if block is None:
        raise NotSupportedError(
            f'{where} has "quantization_config" with "weight_block_size": null, one scale for a whole weight; only '
            "blocks can be read; fetch the model in bfloat16 or float16, or save it dequantized"
        )
    given = block if isinstance(block, list | tuple) else []
    sizes = [size for size in given if isinstance(size, int) and not isinstance(size, bool) and size > 0]
    if len(given) != 2 or len(sizes) != 2:
        raise ValueError(f'{where} has "weight_block_size": {block!r}; it must be two sizes, such as [128, 128]')
    return sizes[0], sizes[1]


class ScaledFiles(Files):
    """The tensors of a directory, those in FP8 multiplied by their scales when they are read, as float32.

    Args:
      directory: as for Files.
      block: rows and columns of a block.

    Raises:
      OSError, ValueError: as Files; for scales that don't fit their weight, naming both.
    """

    def __init__(self, directory: str | os.PathLike[str], block: tuple[int, int]) -> None:
        super().__init__(directory)
        self._block, self._scale_of = block, dict[str, str]()
        scales = {name: f"{name}{_SCALE}" for name in self._file_of if f"{name}{_SCALE}" in self._file_of}
        for name, scale in scales.items():
            *lead, rows, columns = (0, 0, *self.shape(name))[-max(2, len(self.shape(name))) :]
            want = (*lead, -(-rows // block[0]), -(-columns // block[1]))
            kinds = super().kind(name).name, super().kind(scale)
            if self.shape(scale) != want:
                raise ValueError(
                    f"{self.directory}: {scale} is {self.shape(scale)}; for a weight {self.shape(name)} in blocks of "
                    f"{block} it must be {want}"
                )
            if kinds[0] != "float8_e4m3fn" or not (is_floating(kinds[1]) or kinds[1].name == "float8_e8m0fnu"):
                raise ValueError(
                    f"{self.directory}: {name} is {kinds[0]} and {scale} {kinds[1].name}; in FP8 they are "
                    "float8_e4m3fn and float32"
                )
        self._scale_of = scales

    def __getitem__(self, name: str) -> np.ndarray:
        x = super().__getitem__(name)
        if name not in self._scale_of:
            return x
        scales = super().__getitem__(self._scale_of[name]).astype(np.float32)
        rows, columns = self._block
        numbers = x.astype(np.float32)
        for i in range(scales.shape[-2]):  # a strip of blocks at a time: scales never take as much room as numbers
            strip = numbers[..., i * rows : (i + 1) * rows, :]
            strip *= np.repeat(scales[..., i : i + 1, :], columns, -1)[..., : x.shape[-1]]
        return numbers

    def __iter__(self) -> Iterator[str]:
        hidden = set(self._scale_of.values())
        return (name for name in super().__iter__() if name not in hidden)

    def __len__(self) -> int:
        return super().__len__() - len(self._scale_of)

    def kind(self, name: str) -> Any:
        """Returns the dtype in which a tensor is read."""
        return np.dtype(np.float32) if name in self._scale_of else super().kind(name)

    def nbytes(self, name: str) -> int:
        """Returns how many bytes of the files a tensor takes, its scales included."""
        own = [name, self._scale_of[name]] if name in self._scale_of else [name]
        return sum(math.prod(self.shape(each)) * super(ScaledFiles, self).kind(each).itemsize for each in own)
