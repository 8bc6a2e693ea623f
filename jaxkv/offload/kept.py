"""One array off the accelerator, and how it comes back as it was."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import threading
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.errors import CacheError
from jaxkv.offload.copies import copied, moved
from jaxkv.offload.places import Data, File, InPlace, Place, held

# Devices whose memory is the host's: fetching is a copy by the same cores, there is nothing that could overlap.
NEAR = {"cpu"}


class Tally:
    """Bytes per kind of memory. What is freed, by any thread and anywhere, is put aside until the next call."""

    def __init__(self) -> None:
        self._bytes: collections.Counter[str] = collections.Counter()
        self._freed: collections.deque[tuple[str, int]] = collections.deque()
        self._lock = threading.Lock()

    def add(self, kind: str, nbytes: int) -> None:
        with self._lock:
            self._settle()
            self._bytes[kind] += nbytes

    def free(self, kind: str, nbytes: int) -> None:
        self._freed.append((kind, nbytes))  # no lock: the garbage collector may call this while it is held

    def now(self) -> dict[str, int]:
        with self._lock:
            self._settle()
            return {kind: count for kind, count in sorted(self._bytes.items()) if count}

    def _settle(self) -> None:
        while self._freed:
            kind, nbytes = self._freed.popleft()
            self._bytes[kind] -= nbytes


@dataclasses.dataclass(frozen=True)
class Home:
    """What an array of JAX was apart from its values.

    Attributes:
      aval: shape, dtype and weak type, of the data of a typed PRNG key.
      sharding: where it lay.
      committed: whether it had been put there on purpose.
      impl: of a typed PRNG key; None for other arrays.
    """

    aval: Any
    sharding: jax.sharding.Sharding
    committed: bool
    impl: Any = None

    @property
    def is_near(self) -> bool:
        devices: Any = self.sharding.device_set
        return all(device.platform in NEAR for device in devices)

    def bring(self, data: Data) -> jax.Array:
        """Returns the array with these data, where it was."""
        if isinstance(data, File):
            data = data.read()
        elif isinstance(data, np.ndarray) and self.is_near:
            data = copied(data)  # which device_put takes over: may_alias=False would not keep it from taking ours
        wide = jax.enable_x64(True) if data.dtype.itemsize >= 8 else contextlib.nullcontext()
        with wide:
            put: Any = moved if isinstance(data, jax.Array) else jax.device_put
            x = put(data, self.sharding)
            if x.committed != self.committed or x.weak_type != self.aval.weak_type:
                parts = [shard.data for shard in x.addressable_shards]
                x = type(x)(self.aval, x.sharding, parts, committed=self.committed)
        return x if self.impl is None else jax.random.wrap_key_data(x, impl=self.impl)


class Kept:
    """One leaf, off the accelerator. Batches share it; it frees what it holds when the last reference goes.

    Attributes:
      data: what holds the values.
      home: what they come back as; None for a NumPy leaf, and for an array of JAX that was left in place.
    """

    def __init__(self, data: Data, home: Home | None, tally: Tally) -> None:
        self.data, self.home = data, home
        self._held, self._tally = held(data), tally
        self._lock = threading.Lock()
        self._alive: weakref.ref | None = None
        tally.add(*self._held)

    def __del__(self) -> None:
        if hasattr(self, "_held"):
            self._tally.free(*self._held)

    @classmethod
    def of(cls, x: jax.Array, place: Place, tally: Tally) -> Kept:
        """Returns an array of JAX, kept in a place."""
        if isinstance(place, InPlace):
            return cls(x, None, tally)
        impl = None
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, impl = jax.random.key_data(x), jax.random.key_impl(x)
        return cls(place.put(x), Home(x.aval, x.sharding, x.committed, impl), tally)

    @property
    def overlaps(self) -> bool:
        """Whether fetching can go on while something else runs: a copy to an accelerator, or reading from a disk."""
        return isinstance(self.data, File) or (self.home is not None and not self.home.is_near)

    def fetch(self) -> Any:
        """Returns the leaf: a NumPy leaf as a new copy, an array of JAX as the one that is still alive, if one is."""
        if self.home is None:
            return self._fetch_plain()
        with self._lock:
            x = self._alive() if self._alive is not None else None
            if x is None or x.is_deleted():
                x = self.home.bring(self.data)
                self._alive = weakref.ref(x)
            return x

    def _fetch_plain(self) -> Any:
        if isinstance(self.data, File):
            return self.data.read()
        if isinstance(self.data, np.ndarray):
            return copied(self.data)
        if self.data.is_deleted():
            raise CacheError(
                f"{self.data.dtype}{self.data.shape} was deleted or donated after it had been stored, and to=None "
                "keeps no copy; give another `to`, or don't donate it"
            )
        return self.data


class Sources:
    """Finds the Kept of an array of JAX by identity, while both are alive."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref, weakref.ref]] = {}

    def find(self, x: jax.Array) -> Kept | None:
        source, kept = self._known.get(id(x), (None, None))
        return kept() if source is not None and kept is not None and source() is x else None

    def remember(self, x: jax.Array, kept: Kept) -> None:
        known, number = self._known, id(x)

        def forget(source: weakref.ref) -> None:  # before the number can be another array's
            if known.get(number, (None,))[0] is source:
                known.pop(number, None)

        known[number] = weakref.ref(x, forget), weakref.ref(kept)
