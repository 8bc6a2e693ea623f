"""128 bits of a content: every byte of it counts, never a sample.

- xxh3_128 (https://xxhash.com) is the default. It reads at the speed of memory, and is made for accidents, not for
  enemies: whoever wants two contents with one digest can make them. Rows of at most 1 KiB go to blake2b, which costs
  nothing at that length.
- blake3 and blake2b are cryptographic: for stores that are shared with, or fed by, people who are not trusted.
- device reads data where they lie: on an accelerator nothing is fetched to be hashed. The digest is the same wherever
  it is computed, by XLA or by NumPy, but on a CPU it is the slowest of all.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.extras import need

SIZE = 16  # bytes of a digest
HASHES = ("xxh3_128", "blake3", "blake2b", "device")
_SHORT = 1024
_LANES = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)  # the first digits of pi


class Hash:
    """A hash by its name.

    Args:
      name: one of `HASHES`.

    Raises:
      ValueError: for another name.
      ImportError: naming the extra, if its package is missing.

    >>> Hash("blake2b").digest(b"some").hex()
    'd27bbfa9b3d867d2cfac7c8e59e651bc'
    """

    def __init__(self, name: str) -> None:
        if name not in HASHES:
            raise ValueError(f"hash is {name!r}, must be one of {', '.join(HASHES)}")
        self.name = name
        self.digest: Callable[[Any], bytes] = _whole(name)
        self._parts: Callable[[], Any] = _in_parts(name)

    def __reduce__(self) -> Any:
        return Hash, (self.name,)

    @property
    def on_device(self) -> bool:
        """Whether arrays are hashed where they lie."""
        return self.name == "device"

    def rows(self, columns: Sequence[Any]) -> list[bytes]:
        """Returns one digest per row over what all columns have in it.

        Args:
          columns: arrays [B, ...], one at least; NumPy's, or, if the hash is `on_device`, also JAX's.
        """
        if self.on_device:
            lanes = [(_lanes_on_device if isinstance(column, jax.Array) else _lanes)(column) for column in columns]
            table = np.concatenate([np.asarray(part) for part in lanes], axis=1)
            return [_blake2b(row).digest() for row in table]
        size = sum(column[0].nbytes for column in columns) if len(columns[0]) else 0
        if len(columns) == 1:
            digest = _blake2b_digest if size <= _SHORT else self.digest
            return [digest(row) for row in _rows(columns[0])]
        new = _blake2b if size <= _SHORT else self._parts
        digests = []
        for parts in zip(*map(_rows, columns), strict=True):
            state = new()
            for part in parts:
                state.update(part)
            digests.append(state.digest())
        return digests


def _rows(column: np.ndarray) -> Iterable[np.ndarray]:
    """Returns the bytes of each row; copied one by one if they don't lie together: a row fits into a cache."""
    return as_bytes(column) if column.flags.c_contiguous else (as_bytes(row[None])[0] for row in column)


def as_bytes(array: np.ndarray) -> np.ndarray:
    """Returns the bytes of an array [B, ...] as uint8 [B, n]: a view where that is possible."""
    array = np.ascontiguousarray(array)
    return array.reshape(len(array), -1 if array.size else 0).view(np.uint8)


def _whole(name: str) -> Callable[[Any], bytes]:
    if name == "xxh3_128":
        return need("xxhash", "a memo", "memo").xxh3_128_digest
    if name == "blake3":
        blake3 = need("blake3", "a memo", "memo").blake3
        return lambda data: blake3(data).digest(length=SIZE)
    return _blake2b_digest


def _in_parts(name: str) -> Callable[[], Any]:
    if name == "xxh3_128":
        return need("xxhash", "a memo", "memo").xxh3_128
    if name == "blake3":
        return _Blake3
    return _blake2b


_blake2b = functools.partial(hashlib.blake2b, digest_size=SIZE)


def _blake2b_digest(data: Any) -> bytes:
    return _blake2b(data).digest()


class _Blake3:
    def __init__(self) -> None:
        self._state = need("blake3", "a memo", "memo").blake3()
        self.update = self._state.update

    def digest(self) -> bytes:
        return self._state.digest(length=SIZE)


# The device hash: each word of 32 bits is mixed with its place in the row, by four different keys, and the four sums
# over the row are the digest. Sums don't depend on the order in which a device adds.


def _mix(x: Any) -> Any:
    """The finalizer of MurmurHash3: a bijection of 32-bit words in which every bit depends on every other."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def _sums(words: Any, places: Any, xp: Any) -> Any:
    """Returns uint32 [B, 4] of words uint32 [B, n] and their places uint32 [n]."""
    keys = (_mix(places * np.uint32(0x9E3779B1) + np.uint32(lane)) for lane in _LANES)
    return xp.stack([xp.sum(_mix(words ^ key[None]), axis=1, dtype=np.uint32) for key in keys], axis=1)


@jax.jit
def _lanes_on_device(array: Any) -> Any:
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = jnp.stack([array.real, array.imag], axis=-1)
    if array.dtype.name == "float4_e2m1fn":
        array = jax.lax.bitcast_convert_type(array, jnp.uint4)
    if array.dtype == jnp.bool_ or array.dtype.name in ("int4", "uint4", "int2", "uint2"):
        array = array.astype(jnp.uint8)
    bits = array.dtype.itemsize * 8
    words = jax.lax.bitcast_convert_type(array, jnp.uint32 if bits >= 32 else f"uint{bits}").astype(jnp.uint32)
    words = words.reshape(len(array), -1 if array.size else 0)
    return _sums(words, jnp.arange(words.shape[1], dtype=jnp.uint32), jnp)


def _lanes(array: np.ndarray) -> np.ndarray:
    array = np.ascontiguousarray(array)
    if array.dtype.name in ("int4", "uint4", "int2", "uint2"):
        array = array.astype(np.uint8)
    words = array.reshape(len(array), -1 if array.size else 0)
    words = words.view(np.uint32 if array.dtype.itemsize >= 4 else f"uint{8 * array.dtype.itemsize}").astype(np.uint32)
    return _sums(words, np.arange(words.shape[1], dtype=np.uint32), np)
