"""Memo: the outputs of frozen functions, per item, found again by content."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from jaxkv.errors import CacheError
from jaxkv.memo.disk import Disk, DiskStats
from jaxkv.memo.features import Features
from jaxkv.memo.forking import Lock
from jaxkv.memo.hashing import Hash
from jaxkv.memo.memory import Memory, MemoryStats
from jaxkv.memo.once import Once
from jaxkv.memo.runner import Settings
from jaxkv.memo.staging import Staging
from jaxkv.sizes import format_bytes, parse_bytes


@dataclasses.dataclass(frozen=True)
class MemoStats:
    """What a memo was asked for and did, since it was made.

    Attributes:
      calls: of all functions.
      items: in these calls.
      hits: items that were found.
      misses: items that were not; those that occur twice in a call are counted twice.
      computed: items that went through the function.
      memory, disk: of the tiers, None where there is none.
    """

    calls: int
    items: int
    hits: int
    misses: int
    computed: int
    memory: MemoryStats | None
    disk: DiskStats | None

    @property
    def hit_rate(self) -> float:
        """Hits per item, 0 before the first."""
        return self.hits / self.items if self.items else 0.0

    def __str__(self) -> str:
        parts = [f"{self.items:,} items in {self.calls:,} calls, {self.hit_rate:.1%} found, {self.computed:,} computed"]
        for name, tier in (("memory", self.memory), ("disk", self.disk)):
            if tier is not None:
                parts.append(f"{tier.items:,} in {format_bytes(tier.nbytes)} of {name}")
        if self.memory is not None and self.memory.refused:
            parts[1] += f" (full: {self.memory.refused:,} more had no place in {format_bytes(self.memory.budget)})"
        return "; ".join(parts)


class Memo:
    """Keeps the outputs of frozen functions per item of a batch, in memory and on disk, and finds them by content.

    Only items that were never seen are computed. What the key holds: the program of the function, its parameters, the
    names and values of its scalar arguments, and every byte of the item; so another checkpoint, another mode or one
    other pixel is another entry. A record on disk that is damaged or gone is computed again; a lookup never raises
    because of the disk.

    Args:
      memory: bytes to keep in memory, such as "1GiB"; None keeps nothing there.
      disk: a directory, made if it isn't there, which several processes may share; None keeps nothing on disk.
      disk_budget: bytes to keep there; None means no bound.
      policy: what happens when memory is full: "keep" takes nothing more (best for epochs that visit everything in
        random order), "lru" drops what was used longest ago, "mru" what was used last, "fifo" what came first.
      disk_policy: the same for the disk, where whole segments of records go; None means policy.
      hash: of items and parameters: "xxh3_128"; "blake3" or "blake2b" where others may put items into the store whom
        you don't trust; "device" reads arrays where they lie, on an accelerator.
      compress: None, or "zstd" for records on disk.
      once: whether calls of several threads for one item wait for the first of them instead of each computing it.

    Raises:
      ValueError: for arguments that don't fit, and a directory that holds something else.
      ImportError: if the extra jaxkv[memo] is missing.

    >>> memo = jaxkv.Memo(memory="1MiB")
    >>> @memo
    ... def squares(x):
    ...     return x * x
    >>> squares(jnp.array([1.0, 2.0, 3.0]))
    Array([1., 4., 9.], dtype=float32)
    >>> squares(jnp.array([3.0, 4.0]))                                         # 3 is known
    Array([ 9., 16.], dtype=float32)
    >>> memo.stats().hits, memo.stats().computed
    (1, 4)
    """

    def __init__(
        self,
        memory: int | str | None = "1GiB",
        disk: Any = None,
        *,
        disk_budget: int | str | None = None,
        policy: str = "keep",
        disk_policy: str | None = None,
        hash: str = "xxh3_128",
        compress: str | None = None,
        once: bool = False,
    ) -> None:
        if memory is None and disk is None:
            raise ValueError('a memo with neither memory nor disk keeps nothing; give memory="1GiB", disk=DIR or both')
        if disk is None and (disk_budget is not None or disk_policy is not None or compress is not None):
            raise ValueError("disk_budget, disk_policy and compress are said about a disk; give disk=DIR as well")
        self.hash = Hash(hash)
        self.memory = None if memory is None else Memory(parse_bytes(memory), policy)
        budget = None if disk_budget is None else parse_bytes(disk_budget)
        self.disk = (
            None
            if disk is None
            else Disk(disk, budget=budget, policy=policy if disk_policy is None else disk_policy, compress=compress)
        )
        self.staging = Staging()
        self._once = Once() if once else None
        self._lock = Lock()
        self._counts = [0, 0, 0, 0, 0]
        self._closed = False

    def __call__(self, function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
        """The decorator: `@memo`, or `@memo(version="2")` with the options of `wrap`."""
        return functools.partial(self.wrap, **options) if function is None else self.wrap(function, **options)

    def wrap(
        self,
        function: Any,
        *params: Any,
        version: str | None = None,
        shared: Sequence[str] = (),
        output_dtype: Any = None,
        batch: str = "bucket",
        check: bool = True,
    ) -> Features:
        """Returns a function that computes only what this memo doesn't hold.

        Args:
          function: pure, or an nnx module in evaluation mode, or a method of one, or `apply` of a linen module. Row i
            of what comes out may depend on row i of what goes in, and on nothing else.
          *params: pytrees that the function gets before its other arguments, such as the variables of a linen module.
          version: any text that is part of the key; needed where the function calls back into Python.
          shared: names of arguments whose arrays belong to all items, such as a mask.
          output_dtype: floating outputs are cast to it, when they are computed: hits and misses are the same.
          batch: "bucket" computes the missing items alone, padded to a power of two, which rounds otherwise than other
            batch sizes do. "full" computes the call's whole batch if anything is missing: a call on an empty memo gives
            bitwise what the function gives.
          check: whether the first batch that is computed is computed twice more with its rows at other places among
            others, to see that they depend neither on one another nor on their place.

        Raises:
          ValueError: for what can't be memoized, saying why.
        """
        self._check_open()
        if isinstance(function, Features):
            raise ValueError(f"{function!r} is memoized already; wrap what it was made of")
        return Features(self, function, params, shared, Settings(version, _floating(output_dtype), batch, check))

    def _check_open(self) -> None:
        if self._closed:
            raise CacheError("this memo is closed; make another one (what is on disk is still there)")

    @property
    def tiers(self) -> list[Any]:
        """Where payloads are kept, the fastest first."""
        return [tier for tier in (self.memory, self.disk) if tier is not None]

    def read(self, keys: Sequence[bytes], nbytes: int) -> dict[bytes, Any]:
        """Returns the payloads that are there, by key; those from disk are put into memory."""
        self._check_open()
        found: dict[bytes, Any] = {}
        if self.memory is not None:
            payloads = self.memory.read(keys)
            if None not in payloads:
                return dict(zip(keys, payloads, strict=True))
            found = {key: payload for key, payload in zip(keys, payloads, strict=True) if payload is not None}
        if self.disk is not None:
            rest = [key for key in keys if key not in found]
            read = {key: got for key, got in zip(rest, self.disk.read(rest, nbytes), strict=True) if got is not None}
            if self.memory is not None and read:
                self.memory.write(list(read), list(read.values()))
            found |= read
        return found

    def fill(
        self, keys: Sequence[bytes], nbytes: int, compute: Callable[[Sequence[bytes]], dict[bytes, bytes]]
    ) -> dict[bytes, Any]:
        """Returns the payloads of keys that were not found, computed and kept."""

        def kept(keys: Sequence[bytes]) -> dict[bytes, Any]:
            payloads = compute(keys) if keys else {}
            for tier in self.tiers if payloads else ():
                tier.write(list(payloads), list(payloads.values()))
            return payloads

        if self._once is None:
            return kept(keys)
        return self._once.fill(keys, lambda keys: self.read(keys, nbytes), kept)

    def count(self, *counts: int) -> None:
        """Adds to calls, items, hits, misses and computed."""
        with self._lock:
            self._counts = [have + more for have, more in zip(self._counts, counts, strict=True)]

    def stats(self) -> MemoStats:
        """Returns what was asked for and done so far."""
        memory = None if self.memory is None else self.memory.stats()
        with self._lock:
            calls, items, hits, misses, computed = self._counts
        return MemoStats(calls, items, hits, misses, computed, memory, None if self.disk is None else self.disk.stats())

    def clear(self) -> None:
        """Forgets everything, on disk too."""
        for tier in self.tiers:
            tier.clear()

    def flush(self) -> None:
        """Returns when what was computed is safe from a loss of power; from a killed process it always is."""
        if self.disk is not None:
            self.disk.flush()

    def close(self) -> None:
        """Ends the use of the directory and frees the memory; wrapped functions raise CacheError from then on."""
        self._closed = True
        if self.memory is not None:
            self.memory.clear()
        if self.disk is not None:
            self.disk.close()

    def __repr__(self) -> str:
        memory = "" if self.memory is None else format_bytes(self.memory.stats().budget)
        disk = "" if self.disk is None else str(self.disk.directory)
        said = [f"{name}={value!r}" for name, value in (("memory", memory), ("disk", disk)) if value]
        return f"Memo({', '.join(said)}{', closed' * self._closed})"

    def __enter__(self) -> Memo:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _floating(dtype: Any) -> Any:
    """Returns a dtype that floating outputs can be cast to."""
    if dtype is None:
        return None
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise ValueError(f"output_dtype is {dtype!r}, must be floating: float32, bfloat16, float16, float8_e4m3fn, ...")
    return found
