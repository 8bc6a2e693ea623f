"""The files of a checkpoint directory: JSON, and tensors in one safetensors file or several."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxkv import safetensors, whole

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def read_json(path: Path, *, needed: bool = True) -> dict[str, Any]:
    """Returns the object in a file; if it isn't there and not needed, an empty one.

    Raises:
      FileNotFoundError: if it isn't there and needed.
      ValueError: if it is no JSON object.
    """
    if not path.is_file():
        if not needed:
            return {}
        raise FileNotFoundError(
            f"there is no {path}; give a directory as Hugging Face publishes them, with config.json and safetensors"
        )
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{path} holds a {type(parsed).__name__}, must be an object")
    return parsed


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an object into a file, whole or not at all."""
    with whole.written(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


class Files(Mapping[str, np.ndarray]):
    """The tensors of a directory, in one safetensors file or several: a mapping from names to read-only arrays.

    Args:
      directory: with model.safetensors, or model.safetensors.index.json and what it names.

    Raises:
      OSError: if there is neither, or a file that the index names is missing.
      ValueError: for files that are damaged.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self._file_of: dict[str, safetensors.File] = {}
        if (self.directory / INDEX).exists():
            names = dict.fromkeys(read_json(self.directory / INDEX).get("weight_map", {}).values())
            missing = sorted(name for name in names if not (self.directory / name).exists())
            if missing or not names:
                raise FileNotFoundError(
                    f"{self.directory / INDEX} names {len(names)} files, of which {', '.join(missing) or 'all'} are "
                    "not there; fetch the rest of the checkpoint"
                )
        elif (self.directory / SINGLE).exists():
            names = {SINGLE: None}
        else:
            others = sorted(path.name for path in self.directory.glob("*") if path.suffix in (".bin", ".pt", ".gguf"))
            found = f"; {', '.join(others)} can't be read, convert the checkpoint to safetensors" if others else ""
            raise FileNotFoundError(f"{self.directory} holds neither {SINGLE} nor {INDEX}{found}")
        for name in names:
            file = safetensors.File(self.directory / name)
            self._file_of.update(dict.fromkeys(file, file))

    def __getitem__(self, name: str) -> np.ndarray:
        return self._file_of[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        return self._file_of[name].shape(name)

    def kind(self, name: str) -> Any:
        """Returns the dtype of a tensor."""
        return self._file_of[name].kind(name)

    @property
    def dtypes(self) -> dict[str, int]:
        """How many parameters there are of each dtype."""
        counts: dict[str, int] = {}
        for name, file in self._file_of.items():
            kind = file.kind(name).name
            counts[kind] = counts.get(kind, 0) + math.prod(file.shape(name))
        return counts

    @property
    def dtype(self) -> Any:
        """The floating dtype of most parameters; float32 if there is none."""
        floating = {name: n for name, n in self.dtypes.items() if is_floating(jnp.dtype(name))}
        return jnp.dtype(max(floating, key=lambda name: floating[name], default="float32"))


def is_floating(kind: Any) -> bool:
    """Returns whether a dtype is one that parameters have; those of one byte are quantized."""
    return jnp.issubdtype(kind, jnp.floating) and kind.itemsize > 1
