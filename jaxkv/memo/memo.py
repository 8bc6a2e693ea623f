"""Memo: the outputs of frozen functions, per item, found again by content."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from jaxkv.memo.budget import SHARE
from jaxkv.memo.counts import MemoStats
from jaxkv.memo.disk import Disk
from jaxkv.memo.features import Features
from jaxkv.memo.hashing import Hash
from jaxkv.memo.memory import Memory
from jaxkv.memo.runner import Settings
from jaxkv.memo.staging import Staging
from jaxkv.memo.tiers import Tiers
from jaxkv.sizes import format_bytes, parse_bytes


class Memo:
    """Keeps the outputs of frozen functions per item of a batch, in memory and on disk, and finds them by content.

    Only new items are computed. The key contains the program of the function, its parameters, the
    names and values of its scalar arguments, and every byte of the item; so another checkpoint, another mode or one
    other pixel is another entry. A record on disk that is damaged or gone is computed again; a lookup never raises
    because of the disk.

    Args:
      memory: bytes to keep in memory, such as "1GiB"; None keeps nothing there.
      disk: a directory, made if it isn't there, which several processes may share; None keeps nothing on disk.
      disk_budget: bytes to keep there, 64 KiB or more, or a share such as "50%" of what is free when the directory is
        opened and what lies in it already; None means no bound.
      policy: what happens when memory is full: "keep" takes nothing more (best for epochs that visit everything in
        random order), "lru" drops the least recently used, "mru" the most recently used, "fifo" the oldest.
      disk_policy: the same for the disk; None means policy.
      hash: of items and parameters: "xxh3_128"; "blake3" or "blake2b" where others may put items into the store whom
        you don't trust; "device" hashes arrays on the accelerator.
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
        disk_budget: int | str | None = SHARE,
        policy: str = "keep",
        disk_policy: str | None = None,
        hash: str = "xxh3_128",
        compress: str | None = None,
        once: bool = False,
    ) -> None:
        if memory is None and disk is None:
            raise ValueError('a memo with neither memory nor disk keeps nothing; give memory="1GiB", disk=DIR or both')
        if disk is None and (disk_budget not in (None, SHARE) or disk_policy is not None or compress is not None):
            raise ValueError("disk_budget, disk_policy and compress are settings of a disk; give disk=DIR, too")
        self._hash = Hash(hash)
        memory_tier = None if memory is None else Memory(parse_bytes(memory), policy)
        disk_tier = None
        if disk is not None:
            disk_tier = Disk(disk, budget=disk_budget, policy=disk_policy or policy, compress=compress)
        self._tiers = Tiers(memory_tier, disk_tier, once)
        self._staging = Staging()

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
            others, to see that they depend neither on one another nor on their place; and the first batch of each
            further size once more in a batch of a size before, to see that they don't depend on that.

        Raises:
          ValueError: for functions that can't be memoized, saying why.
        """
        self._tiers.check_open()
        if isinstance(function, Features):
            raise ValueError(f"{function!r} is memoized already; wrap what it was made of")
        if not isinstance(version, str | None):
            raise ValueError(f'version is {version!r}; give a text, such as version="2"')
        settings = Settings(version, _floating(output_dtype), batch, check)
        return Features(self._tiers, self._hash, self._staging, function, params, shared, settings)

    def stats(self) -> MemoStats:
        """Returns the counts so far: items found and computed, bytes, times."""
        return self._tiers.counts.stats()

    def end_epoch(self) -> MemoStats:
        """Returns the counts since the last epoch ended, or since this memo was made.

        An epoch is what lies between two calls of this. Of a function that found nothing in an epoch that is not its
        first, the log says so, once: its items are never the same, because something changes them before they come.
        (Where no epoch ends, it says so after 100,000 items without a hit.)

        >>> memo = jaxkv.Memo(memory="1MiB")
        >>> features = memo.wrap(lambda x: x + 1)
        >>> for epoch in range(2):
        ...     for batch in np.eye(4, dtype=np.float32).reshape(2, 2, 4):
        ...         y = features(batch)
        ...     print(f"{memo.end_epoch().hit_rate:.0%}")
        0%
        100%
        """
        return self._tiers.counts.end_epoch()

    def clear(self) -> None:
        """Forgets everything, on disk too."""
        self._tiers.clear()

    def flush(self) -> None:
        """Returns when all outputs are safe from a power failure; they are always safe from a killed process."""
        if self._tiers.disk is not None:
            self._tiers.disk.flush()

    def close(self) -> None:
        """Ends the use of the directory and frees the memory; wrapped functions raise CacheError from then on."""
        self._tiers.close()

    def __reduce__(self) -> Any:
        raise TypeError(
            f"{self!r} can't be pickled: its memory belongs to this process. Give others features.source(examples), "
            "which reads the computed outputs, or let them make their own Memo for the same disk"
        )

    def __repr__(self) -> str:
        memory, disk = self._tiers.memory, self._tiers.disk
        said = [] if memory is None else [f"memory={format_bytes(memory.stats().budget)!r}"]
        said += [] if disk is None else [f"disk={disk.directory!r}"]
        return f"Memo({', '.join(said)}{', closed' * self._tiers.closed})"

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
