"""Named arrays in safetensors files, read tensor by tensor through a memory map.

The format is a length, a header in JSON, and the bytes (https://huggingface.co/docs/safetensors). It is read and
written here without the `safetensors` package, whose NumPy side can't read float8 and writes arrays wrongly that are
not contiguous.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

# The format's names of dtypes, and NumPy's (with those that JAX adds to it).
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
_CODES = {name: code for code, name in DTYPES.items()}


class File(Mapping[str, np.ndarray]):
    """A safetensors file: a mapping from names to read-only arrays, whose bytes are read when they are touched.

    Args:
      path: the file.

    Attributes:
      metadata: the strings that were written beside the tensors.

    Raises:
      OSError: if it can't be opened.
      ValueError: if it is no safetensors file, is cut short, or has a dtype that isn't known here.

    >>> import os, tempfile
    >>> from jaxkv import safetensors
    >>> path = os.path.join(tempfile.mkdtemp(), "some.safetensors")
    >>> safetensors.write(path, {"scale": np.arange(3.0)})
    >>> safetensors.File(path)["scale"]
    array([0., 1., 2.])
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise ValueError(f"{self.path} ({size:,} bytes) is no safetensors file, or is cut short")
            text = file.read(length)
        self._start = start = 8 + length
        self._bytes = np.memmap(self.path, np.uint8, "r", start) if size > start else np.zeros(0, np.uint8)
        try:
            header = json.loads(text)
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            self._entries = {}
            for name, entry in header.items():
                begin, end = map(int, entry["data_offsets"])
                self._entries[name] = entry["dtype"], tuple(map(int, entry["shape"])), begin, end
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is no safetensors file: its header can't be read") from error
        for name, (code, shape, begin, end) in self._entries.items():
            if code not in DTYPES:
                raise ValueError(f"{self.path}: {name} has dtype {code}; known are {', '.join(DTYPES)}")
            need = math.prod(shape) * jnp.dtype(DTYPES[code]).itemsize
            if not 0 <= begin <= end <= len(self._bytes) or end - begin != need:
                raise ValueError(
                    f"{self.path}: {name} {shape} needs {need:,} bytes and has [{begin:,}, {end:,}) of "
                    f"{len(self._bytes):,}; the file is damaged or cut short, fetch it again"
                )

    def __getitem__(self, name: str) -> np.ndarray:
        code, shape, begin, end = self._entries[name]
        return np.asarray(self._bytes[begin:end]).view(jnp.dtype(DTYPES[code])).reshape(shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        return self._entries[name][1]

    def kind(self, name: str) -> Any:
        """Returns the dtype of a tensor."""
        return jnp.dtype(DTYPES[self._entries[name][0]])

    def offset(self, name: str) -> int:
        """Returns where in the file the bytes of a tensor begin."""
        return self._start + self._entries[name][2]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def write(path: str | os.PathLike[str], tensors: Mapping[str, Any], *, dtype: Any = None, metadata: Any = None) -> None:
    """Writes arrays as safetensors: all of them or, if anything goes wrong, nothing.

    Args:
      path: the file, replaced if it is there.
      tensors: arrays by name, fetched from their device one by one.
      dtype: floating arrays are cast to it; None keeps their own.
      metadata: strings by name, put into the header.

    Raises:
      ValueError: for a dtype that safetensors doesn't know, or that is not floating, and for metadata that is no text.
      OSError: if there is no such folder, or the path is one.
    """
    dtype = None if dtype is None else _floating(dtype)
    header: dict[str, Any] = {"__metadata__": _texts(metadata)} if metadata is not None and metadata != {} else {}
    dtypes = {}
    for name, tensor in tensors.items():
        cast = dtype is not None and jnp.issubdtype(tensor.dtype, jnp.floating)
        dtypes[name] = jnp.dtype(dtype if cast else tensor.dtype)
        if dtypes[name].name not in _CODES:
            raise ValueError(f"{name} is {dtypes[name].name}; safetensors knows {', '.join(_CODES)}")
    # The largest items first, so that each lies at a multiple of its size.
    names = sorted(tensors, key=lambda name: (-dtypes[name].itemsize, name))
    end = 0
    for name in names:
        shape = list(tensors[name].shape)
        begin, end = end, end + math.prod(shape) * dtypes[name].itemsize
        header[name] = {"dtype": _CODES[dtypes[name].name], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if Path(path).is_dir():
        raise IsADirectoryError(errno.EISDIR, "this is a folder; give the name of a file", os.fspath(path))
    folder = Path(path).parent
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder to save into; make it first", str(folder))
    partial = Path(f"{os.fspath(path)}.partial")
    try:
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                file.write(np.asarray(tensors[name]).astype(dtypes[name]).tobytes())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _floating(dtype: Any) -> Any:
    """Returns the dtype that a user's word means.

    Raises:
      ValueError: if it is none that floating arrays can be written as.
    """
    try:
        found = jnp.dtype(dtype)
        if found.name in _CODES and jnp.issubdtype(found, jnp.floating):
            return found
    except TypeError:
        pass
    floating = [name for name in _CODES if "float" in name]
    raise ValueError(f"dtype={dtype!r}: floating arrays can be written as {', '.join(floating)}; None keeps their own")


def _texts(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, Mapping):
        raise ValueError(f'metadata={metadata!r}: give strings by name, {{"step": "3"}}')
    for name, value in metadata.items():
        for text in (name, value):
            if not isinstance(text, str):
                raise ValueError(
                    f"metadata: {name!r}: {value!r} has a {type(text).__name__}, and safetensors takes strings alone; "
                    f"give str({text!r})"
                )
    return dict(metadata)
