"""Iterating over batches, the next ones already on their way."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import jax

from jaxkv.errors import CacheError
from jaxkv.offload.kept import Kept
from jaxkv.offload.places import File

THREAD_NAME = "jaxkv-offload"


def iterate(
    count: Callable[[], int], look: Callable[[int], list[Kept]], fetch: Callable[[int], Any], prefetch: int
) -> Generator[Any, None, None]:
    """Yields fetch(0), fetch(1) and so on.

    What is fetched ahead are arrays, held so that the fetch at their batch's turn finds them alive. So that fetch
    sees all that has changed meanwhile, and raises what is to be raised at the batch that it belongs to.

    Args:
      count: how many batches there are now.
      look: the leaves of one batch that will be wanted.
      fetch: of one batch.
      prefetch: how many batches to fetch ahead.
    """
    total = count()
    ahead: collections.deque[_Ahead] = collections.deque()
    with contextlib.ExitStack() as stack:
        stack.callback(ahead.clear)
        workers: list[ThreadPoolExecutor] = []

        def worker() -> ThreadPoolExecutor:
            if not workers:
                workers.append(ThreadPoolExecutor(1, thread_name_prefix=THREAD_NAME))
                # Not waited for: the garbage collector may close this iterator in the worker itself.
                stack.callback(workers[0].shutdown, wait=False, cancel_futures=True)
            return workers[0]

        for i in range(total):
            if ahead:
                ahead[0].arrive()
            # In a list, so that the batch is the caller's alone while it is out.
            batch = [fetch(i)]
            if ahead:
                ahead.popleft()
            while len(ahead) < min(prefetch, total - 1 - i):
                ahead.append(_Ahead(look(i + 1 + len(ahead)), worker))
            yield batch.pop()
            if count() != total:
                raise CacheError(f"a batch was appended while iterating over {total}; append before or after the loop")


class _Ahead:
    """The arrays of one batch, on their way."""

    def __init__(self, leaves: list[Kept], worker: Callable[[], ThreadPoolExecutor]) -> None:
        self._arrays: list[Any] = []
        self._future: Future | None = None
        far = [kept for kept in leaves if kept.home is not None and not kept.home.is_near]
        for kept in leaves:
            if isinstance(kept.data, File):
                kept.data.read_ahead()
        if not far:
            return  # the same cores would do the same work, only earlier
        if all(isinstance(kept.data, jax.Array) for kept in far):
            self._arrays = _fetch(far)  # returns at once: JAX copies while other things run
        else:
            self._future = worker().submit(_fetch, far)

    def arrive(self) -> None:
        if self._future is not None:
            wait([self._future])


def _fetch(leaves: list[Kept]) -> list[Any]:
    arrays = []
    # Tried again, and raised, when it is the batch's turn.
    with contextlib.suppress(OSError, RuntimeError, MemoryError, ValueError, CacheError):
        for kept in leaves:
            arrays.append(kept.fetch())
    return arrays
