"""Where offloaded arrays lie: another memory of JAX, NumPy, a directory, or where they are."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import pathlib
import shutil
import tempfile
import weakref
from typing import Any

import jax
import numpy as np

from jaxkv import aligned
from jaxkv.offload.copies import copied, gather, is_plain, moved
from jaxkv.sizes import format_bytes


class InPlace:
    """Where they are."""


class Memory:
    """Another memory of the devices, by its kind, or any sharding."""

    def __init__(self, to: str | jax.sharding.Sharding) -> None:
        self.to = to
        self.kind = to if isinstance(to, str) else to.memory_kind or "device"

    def _sharding(self, x: jax.Array) -> jax.sharding.Sharding:
        return x.sharding.with_memory_kind(self.to) if isinstance(self.to, str) else self.to

    def nbytes(self, x: Any) -> int:
        if isinstance(x, np.ndarray):
            return 0  # it goes to NumPy
        sharding = self._sharding(x)
        return math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize * len(sharding.addressable_devices)

    def put(self, x: jax.Array) -> jax.Array:
        return moved(x, self._sharding(x))


class InNumPy:
    """NumPy arrays, on the host."""

    kind = "numpy"

    def nbytes(self, x: Any) -> int:
        return x.nbytes

    def put(self, x: jax.Array) -> np.ndarray:
        return gather(x, copy=True)


class File:
    """The bytes of one array on disk; the file goes when this object does."""

    def __init__(self, path: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.path, self.shape, self.dtype = path, shape, dtype
        self.nbytes = math.prod(shape) * dtype.itemsize
        # At the end of the program the whole folder goes.
        weakref.finalize(self, _unlink, path, os.getpid()).atexit = False

    def read(self) -> np.ndarray:
        array = aligned.empty(self.shape, self.dtype)
        left = array.reshape(-1).view(np.uint8).data
        with open(self.path, "rb", buffering=0) as file:
            while left and (count := file.readinto(left)):
                left = left[count:]
        if left:
            raise OSError(f"{self.path} is {len(left)} of {self.nbytes} bytes short: another program has changed it")
        return array

    def read_ahead(self) -> None:
        """Tells the system to read a file that is not in its page cache (Linux; elsewhere nothing happens)."""
        if not self.nbytes or not hasattr(os, "RWF_NOWAIT"):
            return
        with contextlib.suppress(OSError), open(self.path, "rb", buffering=0) as file:
            try:  # asking would take a fifth of the time of reading what is there already
                os.preadv(file.fileno(), [bytearray(1)], self.nbytes - 1, os.RWF_NOWAIT)
            except BlockingIOError:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


class Folder:
    """A directory of its own in one that is given; removed by `close`, and at the latest when the program ends."""

    kind = "disk"

    def __init__(self, directory: str | os.PathLike) -> None:
        parent = pathlib.Path(directory).expanduser().absolute()
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self.path = tempfile.mkdtemp(prefix="jaxkv-offload-", dir=parent)
        except OSError as error:
            raise OSError(error.errno, f"can't keep arrays in {parent}: {error.strerror}; give another `to`") from error
        self._numbers = itertools.count()
        self.close = weakref.finalize(self, _remove, self.path, os.getpid())

    def nbytes(self, x: Any) -> int:
        return x.nbytes

    def put(self, x: jax.Array) -> File:
        return self.write(gather(x, copy=False))

    def write(self, array: np.ndarray) -> File:
        new = File(os.path.join(self.path, str(next(self._numbers))), array.shape, array.dtype)  # goes if this fails
        try:
            with open(new.path, "xb") as file:
                file.write(array.reshape(-1).view(np.uint8).data)
        except OSError as error:
            text = f"can't write {format_bytes(array.nbytes)} to {self.path}: {error.strerror}; nothing was changed"
            raise OSError(error.errno, text) from error
        return new


def _unlink(path: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked process has copies of these objects, but not the files
        with contextlib.suppress(OSError):
            os.unlink(path)


def _remove(path: str, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)


Place = InPlace | Memory | InNumPy | Folder
Data = jax.Array | np.ndarray | File


def copy_to(place: Place, array: np.ndarray) -> Data:
    """Returns a copy of a NumPy array: a file if the place is a directory that can hold it, NumPy's memory if not."""
    if isinstance(place, Folder) and is_plain(array):
        return place.write(np.asarray(array, order="C"))
    return copied(array)


def held(data: Data) -> tuple[str, int]:
    """Returns the kind of memory that holds the data, and how many bytes of it, on all devices of this process."""
    if isinstance(data, File):
        return Folder.kind, data.nbytes
    if isinstance(data, np.ndarray):
        return InNumPy.kind, data.nbytes
    return data.sharding.memory_kind or "device", sum(shard.data.nbytes for shard in data.addressable_shards)


def choose(to: Any, name: str = "to") -> Place:
    """Returns the place that a user's word means.

    Raises:
      ValueError: if it means none.
      OSError: for a directory that can't be written.
    """
    if to is None:
        return InPlace()
    if isinstance(to, jax.sharding.Sharding):
        return Memory(to)
    if isinstance(to, os.PathLike) or (isinstance(to, str) and ("/" in to or os.sep in to or to == "~")):
        return Folder(to)
    kinds = [memory.kind for memory in jax.devices()[0].addressable_memories()]
    if to == "numpy":
        return InNumPy()
    if isinstance(to, str) and to in kinds:
        return Memory(to)
    raise ValueError(
        f"{name}={to!r} is not a place: use 'numpy', a memory of this device ({', '.join(map(repr, kinds))}), "
        'a Sharding, None (keep in place), or a directory, with a slash ("./activations") or as a pathlib.Path'
    )
