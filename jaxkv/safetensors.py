"""Named arrays in safetensors files, read tensor by tensor through a memory map.

The format is a length, a header in JSON, and the bytes (https://huggingface.co/docs/safetensors). It is read and
written here without the `safetensors` package, whose NumPy side can't read float8 and writes arrays wrongly that are
not contiguous.
"""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import reprlib
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxkv import regular, whole
from jaxkv.casting import unheld

# The format's names of dtypes, and NumPy's (with those that JAX adds to it). The rest, F4, F6_E2M3 and F6_E3M2, have
# items of less than a byte.
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
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
_METADATA = "__metadata__"
_CHECKSUMS = "jaxkv.checksums"
_SUMMED = 1 << 14  # bytes that a checksum sums at a time
_LINE = 64  # bytes of a cache line
MOST_HEADER = 100_000_000  # bytes, as the safetensors package has it


class File(Mapping[str, np.ndarray]):
    """A safetensors file: a mapping from names to read-only arrays, whose bytes are read when they are touched.

    A tensor whose dtype isn't known here is an error when it is asked for.

    Args:
      path: the file; "~" is the home directory.

    Attributes:
      metadata: the strings that were written beside the tensors.

    Raises:
      OSError: if it can't be opened.
      ValueError: if it is not a regular file, or no safetensors file, or is cut short or damaged.

    >>> import os, tempfile
    >>> from jaxkv import safetensors
    >>> path = os.path.join(tempfile.mkdtemp(), "some.safetensors")
    >>> safetensors.write(path, {"scale": np.arange(3.0)})
    >>> safetensors.File(path)["scale"]
    array([0., 1., 2.])
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(os.path.expanduser(path))
        file, size = regular.opened(self.path)
        with file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, MOST_HEADER):
                raise ValueError(
                    f"{self.path} ({size:,} bytes) is not a safetensors file, or cut short: by its first eight bytes "
                    f"its header has {length:,} bytes (at most {MOST_HEADER:,}); fetch it again"
                )
            text = file.read(length)
            self._start = start = 8 + length
            self._bytes = np.asarray(np.memmap(file, np.uint8, "r", start) if size > start else np.zeros(0, np.uint8))
        try:
            self.metadata, self._entries = _parsed(text, len(self._bytes))
            self._checksums = self.metadata.pop(_CHECKSUMS, None)
            self._header = text if self._checksums is not None else b""
        except (ValueError, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{self.path} is not a safetensors file, or damaged or cut short, then fetch it again: {error}"
            ) from error

    def __getitem__(self, name: str) -> np.ndarray:
        _, shape, begin, end = self._entries[name]
        return self._bytes[begin:end].view(self.kind(name)).reshape(shape)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    @property
    def tied(self) -> dict[str, str]:
        """Further names of tensors, each with the one there is: PyTorch's `save_model` has them in the metadata."""
        return {name: there for name, there in self.metadata.items() if there in self and name not in self}

    def is_known(self, name: str) -> bool:
        """Returns whether the dtype of a tensor is known here, so that it can be read."""
        return self._entries[name][0] in DTYPES

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        return self._entries[name][1]

    def kind(self, name: str) -> Any:
        """Returns the dtype of a tensor."""
        code = self._entries[name][0]
        if code not in DTYPES:
            raise ValueError(f"{self.path}: {name} has dtype {code}; known are {', '.join(DTYPES)}")
        return jnp.dtype(DTYPES[code])

    def check(self, names: Iterable[str] = ()) -> None:
        """Holds the header, and tensors, against the checksums that `write(..., checked=True)` put into the file.

        Raises:
          ValueError: naming what is damaged; or if the file has no checksums.
        """
        expected = self._expected
        for name in names:
            _, _, begin, end = self._entries[name]
            if _checksum(self._bytes[begin:end]) != expected[name]:
                raise ValueError(
                    f"{self.path} is damaged: the numbers of {name} are not those that were written; take a copy of it"
                )

    @functools.cached_property
    def _expected(self) -> dict[str, str]:
        """The checksum of each tensor, by a header that is what was written."""
        sums, names = self._checksums, sorted(self._entries)
        if sums is None:
            raise ValueError(f"{self.path} has no checksums; it was written by something else")
        if len(sums) != 8 * (1 + len(names)) or _header_sum(self._header, sums) != sums[:8]:
            raise ValueError(f"{self.path} is damaged: its header is not what was written; take a copy of it")
        return {name: sums[8 * i : 8 * i + 8] for i, name in enumerate(names, 1)}

    def offset(self, name: str) -> int:
        """Returns where in the file the bytes of a tensor begin."""
        return self._start + self._entries[name][2]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    *,
    dtype: Any = None,
    exact: Collection[str] = (),
    metadata: Any = None,
    checked: bool = False,
) -> None:
    """Writes arrays as safetensors: all of them or, if anything goes wrong, nothing.

    Args:
      path: the file, replaced if it is there; "~" is the home directory, and links are followed.
      tensors: arrays by name, fetched from their device one by one; or what NumPy makes arrays of, with a shape and a
        dtype.
      dtype: floating arrays are cast to it; None keeps their own.
      exact: names of arrays that keep their own nevertheless.
      metadata: strings by name, put into the header.
      checked: whether checksums are put beside them, for `File.check`.

    Raises:
      ValueError: for a dtype that safetensors doesn't know, or that is not floating, or can't hold the values; for
        metadata that is not text, and for an array that is named "__metadata__".
      OSError: if there is no such folder, or the path is one.
    """
    dtype = None if dtype is None else _floating(dtype)
    header: dict[str, Any] = {_METADATA: texts(metadata)} if metadata is not None and metadata != {} else {}
    if _METADATA in tensors:
        raise ValueError(f"safetensors has the name {_METADATA} for itself; give that array another")
    dtypes = {}
    for name, tensor in tensors.items():
        cast = dtype is not None and name not in exact and jnp.issubdtype(tensor.dtype, jnp.floating)
        kind = jnp.dtype(dtype if cast else tensor.dtype).name
        if kind not in _CODES:
            raise ValueError(f"{name} is {kind}; safetensors knows {', '.join(_CODES)}")
        dtypes[name] = jnp.dtype(kind)  # by its name: little-endian, as the format is
    sizes = {name: math.prod(tensors[name].shape) * dtypes[name].itemsize for name in tensors}
    # Whole cache lines, at which XLA reads a mapped file in place; then the largest items first, so that each lies at a
    # multiple of its size.
    names = sorted(tensors, key=lambda name: (sizes[name] % _LINE != 0, -dtypes[name].itemsize, name))
    placeholder = "0" * 8 * (1 + len(names)) if checked else ""
    if checked:
        header = {_METADATA: {_CHECKSUMS: placeholder, **header.get(_METADATA, {})}}
    end = 0
    for name in names:
        shape = list(tensors[name].shape)
        begin, end = end, end + sizes[name]
        header[name] = {"dtype": _CODES[dtypes[name].name], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _LINE)
    target = Path(os.path.realpath(os.path.expanduser(path)))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "this is a folder; give the name of a file", os.fspath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder to save into; make it first", str(target.parent))
    with whole.written(target) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        sums = {}
        for name in names:
            array = np.asarray(tensors[name])
            lost = unheld(array, dtypes[name])
            if lost is not None:
                raise ValueError(
                    f"{name} has {lost!s}, which {dtypes[name]} can't hold; give a wider dtype, or clip it"
                )
            content = np.ascontiguousarray(array, dtypes[name]).reshape(-1).view(np.uint8)
            file.write(content.data)
            if checked:
                sums[name] = _checksum(content)
        if checked:
            file.seek(8 + text.index(placeholder.encode()))
            file.write((_header_sum(text, placeholder) + "".join(sums[name] for name in sorted(sums))).encode())


def _checksum(content: np.ndarray) -> str:
    """Returns eight digits that depend on each of some bytes, uint8 [N], and of their order in the large.

    The CRC-32 of the sums of their 64-bit words, block by block: as fast as memory, which a CRC of all is not.
    """
    whole_blocks = len(content) // _SUMMED * _SUMMED
    rest = np.zeros(_SUMMED, np.uint8)
    rest[: len(content) - whole_blocks] = content[whole_blocks:]
    blocks = content[:whole_blocks].reshape(-1, _SUMMED)
    sums = [words.view("<u8").sum(axis=-1, dtype="<u8") for words in (blocks, rest[None])]
    return f"{zlib.crc32(sums[1].tobytes(), zlib.crc32(sums[0].tobytes(), len(content) & 0xFFFFFFFF)):08x}"


def _header_sum(text: bytes, sums: str) -> str:
    """Returns the checksum of a header, whatever the checksums in it."""
    begin = text.find(sums.encode())
    blank = text[:begin] + b"0" * len(sums) + text[begin + len(sums) :]
    return f"{zlib.crc32(blank):08x}"


def _parsed(text: bytes, size: int) -> tuple[dict[str, str], dict[str, tuple[str, tuple[int, ...], int, int]]]:
    """Returns the metadata and {name: (dtype, shape, begin, end)} of a header that is followed by `size` bytes.

    Raises:
      ValueError: unless it is one, and each byte belongs to one tensor.
    """
    header = json.loads(text.decode(), object_pairs_hook=_without_repeats)
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    metadata = header.pop(_METADATA, None)
    metadata = {} if metadata is None else texts(metadata)
    entries = {}
    for name, entry in header.items():
        match entry:
            case {"dtype": str(code), "shape": [*shape], "data_offsets": [begin, end]} if all(
                type(number) is int and number >= 0 for number in (*shape, begin, end)
            ):
                entries[name] = code, tuple(shape), begin, end
            case _:
                raise ValueError(f"{name} is {reprlib.repr(entry)}")
        if code in DTYPES:
            need = np.broadcast_to(np.empty((), jnp.dtype(DTYPES[code])), shape).nbytes  # raises where NumPy can't
            if need != end - begin:
                raise ValueError(f"{name} {shape} needs {need:,} bytes and has [{begin:,}, {end:,})")
    last = 0
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if not last == begin <= end:
            raise ValueError(f"{name} has the bytes [{begin:,}, {end:,}), those before it end at {last:,}")
        last = end
    if last != size:
        raise ValueError(f"its tensors have {last:,} bytes, and there are {size:,}")
    return metadata, entries


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a name is given twice, of {reprlib.repr([name for name, _ in pairs])}")
    return found


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


def texts(metadata: Any) -> dict[str, str]:
    """Returns strings by name, as metadata must be.

    Raises:
      ValueError: if they are something else.
    """
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
