"""Activations of many batches, off the accelerator."""

from __future__ import annotations

import contextlib
import operator
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np

from jaxkv.errors import CacheError
from jaxkv.extras import need
from jaxkv.logs import log
from jaxkv.offload.ahead import iterate
from jaxkv.offload.copies import copied
from jaxkv.offload.kept import Kept, Sources, Tally
from jaxkv.offload.places import Folder, InNumPy, InPlace, choose, copy_to
from jaxkv.offload.trees import Packed, pack, unpack
from jaxkv.sizes import format_bytes, parse_bytes
from jaxkv.tracing import is_tracing

Row = dict[str, Packed]  # never changed: a batch that changes gets a new one


class Offload:
    """Batches of named values, kept off the accelerator and brought back unchanged.

    A batch is a dict from names to any pytree. Containers, dtypes, shardings and committedness come back as they were,
    typed PRNG keys too. NumPy arrays are copied when they go in and when they come out; arrays of JAX are stored once
    per store however many batches share them, and while a fetched one is alive, fetching it again gives the same one.
    All other leaves stay as they are. An operation that fails leaves the store as it was. Threads may share a store.

    Args:
      to: "pinned_host", or another kind of memory that the devices have; "numpy"; a directory, with a slash or as a
        pathlib.Path, in which a directory of its own is made and removed again; any Sharding, where all arrays of JAX
        go; None keeps them where they are, without a copy. With a kind of memory, a Sharding and None, NumPy arrays
        are kept by NumPy.
      budget: most bytes to keep in `to`, such as "8GiB"; None sets no bound.
      spill: where the rest goes: "numpy" or a directory.

    Raises:
      ValueError: for a place that there is not, or a budget that has no use.
      OSError: for a directory that can't be written.

    >>> with jaxkv.Offload(to="numpy") as store:
    ...     i = store.append({"hidden": jnp.ones((2, 3)), "step": 0})
    ...     store.fetch(i, ["hidden"])["hidden"].sum(), store.size()
    (Array(6., dtype=float32), {'numpy': 24})
    """

    def __init__(self, to: Any = "pinned_host", *, budget: int | str | None = None, spill: Any = "numpy") -> None:
        self.to = to
        self._place = choose(to)
        self._budget = None if budget is None else parse_bytes(budget)
        if budget is not None and isinstance(self._place, (Folder, InPlace)):
            raise ValueError(f"budget={budget!r} bounds memory, and to={to!r} takes none that spills; leave it out")
        self._spill = choose(spill, "spill")
        if not isinstance(self._spill, (InNumPy, Folder)):
            raise ValueError(f"spill={spill!r}: what is over the budget goes to 'numpy' or a directory")
        if budget is None and isinstance(self._spill, Folder):
            raise ValueError(f"spill={spill!r} is used with a budget only; give one, or to={spill!r}")
        if budget is not None and isinstance(self._place, InNumPy) and isinstance(self._spill, InNumPy):
            raise ValueError(f"budget={budget!r} of to='numpy' needs a directory to spill to: spill=\"./activations\"")
        self._rows: list[Row] = []
        self._sources = Sources()
        self._tally = Tally()
        self._overlaps = False  # whether anything was stored that could be fetched while something else runs
        self._underway: list[weakref.ref] = []  # copies of the last batch that was stored
        self._closed = False
        self._writing = threading.RLock()  # one batch is taken in at a time, or two threads would store a mask twice
        self._lock = threading.Lock()  # around every look at the rows, never while data move

    @classmethod
    def from_batches(
        cls,
        loader: Iterable[Mapping[str, Any]],
        to: Any = "pinned_host",
        *,
        budget: int | str | None = None,
        spill: Any = "numpy",
        device: Any = None,
        progress: bool = False,
    ) -> Offload:
        """Returns a store with the batches of a loader.

        Args:
          loader: gives dicts from names to pytrees.
          to: as for Offload, and so are budget and spill.
          device: None, or the device or sharding that NumPy arrays are to come back on, as arrays of JAX.
          progress: shows a bar, by tqdm (`pip install tqdm`).

        Raises:
          ImportError: if `progress` needs tqdm and it is not installed.
          ValueError: for a batch that is not a dict, or a device that is not one.

        >>> store = jaxkv.Offload.from_batches(({"x": np.full(3, i)} for i in range(4)), to="numpy")
        >>> len(store), store.fetch(2)
        (4, {'x': array([2, 2, 2])})
        """
        if device is not None and not isinstance(device, (jax.Device, jax.sharding.Sharding)):
            raise ValueError(
                f"device={device!r} is none: give one of jax.devices(), such as jax.devices()[0], or a Sharding; "
                "None keeps NumPy arrays NumPy"
            )
        if progress:
            bar = need("tqdm.auto", "progress=True", "memo").tqdm
            loader = bar(loader, desc="offload", unit="batch")
        store = cls(to, budget=budget, spill=spill)
        try:
            for batch in loader:
                store._add(batch, device)
        except BaseException:
            store.close()
            raise
        return store

    def append(self, batch: Mapping[str, Any]) -> int:
        """Stores a batch and returns its index.

        Args:
          batch: name -> pytree.

        Raises:
          ValueError: if it is not a dict with strings as names, or an array in it was deleted or donated.
          CacheError: while tracing, after `close`, or for NumPy or a directory if an array lies on other processes.
          OSError: if the directory can't take it.
        """
        return self._add(batch, None)

    def _add(self, batch: Mapping[str, Any], device: Any) -> int:
        with self._writing:
            row = self._pack(batch, device)
            with self._lock:
                self._check()
                self._rows.append(row)
                return len(self._rows) - 1

    def update(self, index: int, batch: Mapping[str, Any]) -> None:
        """Stores values in a batch, under new names or in place of what these names had.

        Raises:
          IndexError: if there is no such batch; and as `append`.
        """
        with self._writing:
            self._row(index)
            row = self._pack(batch, None)
            with self._lock:
                self._check()
                old, self._rows[index] = self._rows[index], self._rows[index] | row
        del old  # freed with no lock held

    def fetch(self, index: int, names: Iterable[str] | None = None, missing: str = "raise") -> dict[str, Any]:
        """Returns values of a batch, as they were stored.

        Args:
          index: which batch.
          names: which values, in this order; None for all.
          missing: "raise", or "skip" to leave out names that the batch does not have.

        Raises:
          IndexError: if there is no such batch.
          KeyError: if it has not all the names.
          CacheError: while tracing, after `close`, or for an array that was deleted and to=None.
          OSError: if another program has touched the directory.
        """
        row = self._select(index, _checked(names), missing)
        return self._unpack(row)

    def take(self, index: int, names: Iterable[str] | None = None) -> dict[str, Any]:
        """Returns values of a batch and deletes them: their memory is free when the caller lets go.

        Raises:
          As `fetch`; then nothing is deleted.
        """
        with self._lock:
            row = self._find(index, _checked(names))
            whole = self._rows[index]
            rest = self._rows[index] = {name: value for name, value in whole.items() if name not in row}
        try:
            return self._unpack(row)
        except BaseException:
            with self._lock:
                if not self._closed:
                    now = self._rows[index]
                    self._rows[index] = whole if now is rest else row | now
            raise

    def delete(self, index: int, names: Iterable[str] | None = None) -> None:
        """Deletes values of a batch; the batches after it keep their index.

        Args:
          index: which batch.
          names: which values; None for all.

        Raises:
          IndexError: if there is no such batch.
          KeyError: if it has not all the names; then nothing is deleted.
        """
        with self._lock:
            row = self._find(index, _checked(names))
            whole = self._rows[index]
            self._rows[index] = {name: value for name, value in whole.items() if name not in row}
        del whole, row  # freed with no lock held

    def iter(
        self, names: Iterable[str] | None = None, prefetch: int = 0, missing: str = "raise"
    ) -> Generator[dict[str, Any], None, None]:
        """Returns an iterator over all batches, as `fetch` gives them.

        Batches may be updated and deleted from while iterating, not appended. Closing the iterator, or leaving the
        loop, frees what was prefetched.

        Args:
          names: which values; None for all.
          prefetch: how many batches are on their way to the accelerator while one is in use. On a CPU there is nothing
            to overlap but reading from a disk, which is left to the system. The loop's variable still holds the last
            batch when the next one is asked for: `del` it at the end of the body if that memory counts.
          missing: as for `fetch`.

        Raises:
          CacheError: at the next step after a batch was appended; and as `fetch`, at the batch that is to blame.

        >>> store = jaxkv.Offload.from_batches([{"x": jnp.ones(2)}, {"x": jnp.zeros(2)}], to="numpy")
        >>> [float(batch["x"].sum()) for batch in store.iter(["x"], prefetch=1)]
        [2.0, 0.0]
        """
        wanted = _checked(names)
        if not isinstance(prefetch, int) or isinstance(prefetch, bool) or prefetch < 0:
            raise ValueError(f"prefetch={prefetch!r}: give how many batches to fetch ahead; 0 fetches none")
        _check_missing(missing)
        self._checked_length()

        def look(index: int) -> list[Kept]:
            row = self._row(index)
            return [kept for name in wanted or row if name in row for kept in row[name].kept()]

        def fetch(index: int) -> dict[str, Any]:
            return self._unpack(self._select(index, wanted, missing))

        return iterate(self._checked_length, look, fetch, prefetch if self._overlaps else 0)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.iter()

    def __len__(self) -> int:
        return self._checked_length()

    def size(self) -> dict[str, int]:
        """Returns the bytes that are stored, per kind of memory, on all devices of this process; what is shared, once.

        The kinds are those of JAX ("device", "pinned_host", ...), "numpy" and "disk".
        """
        return self._tally.now()

    def close(self) -> None:
        """Frees everything and removes the files. Batches that were fetched stay valid."""
        with self._lock:
            self._closed = True
            rows, self._rows = self._rows, []
        del rows
        for place in (self._place, self._spill):
            if isinstance(place, Folder):
                place.close()

    def __enter__(self) -> Offload:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an Offload belongs to its process, whose devices and files it holds: it can't be pickled or copied. Send "
            "what fetch returns, or make another Offload there"
        )

    def __repr__(self) -> str:
        if self._closed:
            return f"Offload(to={self.to!r}, closed)"
        with self._lock:
            names = ", ".join(dict.fromkeys(name for row in self._rows for name in row))
            count = len(self._rows)
        sizes = "".join(f", {format_bytes(size)} {kind}" for kind, size in self.size().items())
        return f"Offload(to={self.to!r}, {count} batch{'es' * (count != 1)}{f' of {names}' * bool(names)}{sizes})"

    def _check(self) -> None:
        if self._closed:
            raise CacheError("this Offload is closed; make a new one")
        if is_tracing():
            raise CacheError(
                "an Offload is used under jit, grad or vmap, where a batch would become part of the program; "
                "fetch before, and pass the arrays as arguments"
            )

    def _checked_length(self) -> int:
        with self._lock:
            self._check()
            return len(self._rows)

    def _find(self, index: int, names: list[str] | None, missing: str = "raise") -> Row:
        """The lock is held."""
        self._check()
        try:
            number = operator.index(index)
        except TypeError:
            raise IndexError(f"a batch is named by its index, not by {index!r}") from None
        count = len(self._rows)
        if not 0 <= number < count:
            raise IndexError(
                f"there is no batch {index}; {f'there are 0 to {count - 1}' if count else 'there is none'}"
            )
        row = self._rows[number]
        if names is None:
            return row
        unknown = [name for name in names if name not in row]
        if unknown and missing == "raise":
            raise KeyError(f"batch {index} has no {_listed(unknown)}; it has {_listed(row) or 'nothing'}")
        return {name: row[name] for name in names if name in row}

    def _row(self, index: int) -> Row:
        with self._lock:
            return self._find(index, None)

    def _select(self, index: int, names: list[str] | None, missing: str) -> Row:
        _check_missing(missing)
        with self._lock:
            return self._find(index, names, missing)

    def _pack(self, batch: Mapping[str, Any], device: Any) -> Row:
        self._checked_length()
        if not isinstance(batch, Mapping) or not all(isinstance(name, str) for name in batch):
            raise ValueError(f'a batch is a dict such as {{"hidden": array}}, not {_shown(batch)}')
        self._settle()
        return {name: pack(value, self._keeper(name, device)) for name, value in batch.items()}

    def _settle(self) -> None:
        """Waits for the copies of the batch before: else computations that run ahead fill the device with sources."""
        underway, self._underway = self._underway, []
        for ref in underway:
            data = ref()
            if data is not None and not data.is_deleted():
                with contextlib.suppress(RuntimeError):  # what failed is raised where it is fetched
                    data.block_until_ready()

    def _keeper(self, name: str, device: Any) -> Callable[[Any], Any]:
        def keep(leaf: Any) -> Any:
            if isinstance(leaf, jax.core.Tracer):
                raise CacheError(
                    f"{name!r} has a traced array in it; an Offload stores values, outside of jit and grad"
                )
            if isinstance(leaf, np.ndarray):
                if device is None:
                    return self._keep_numpy(leaf)
                leaf = jax.device_put(copied(leaf), device)  # it may take the memory over
            if not isinstance(leaf, jax.Array):
                return leaf
            if leaf.is_deleted():
                raise ValueError(f"{name!r} has an array {leaf.dtype}{leaf.shape} that was deleted or donated")
            kept = self._sources.find(leaf)
            if kept is None:
                kept = Kept.of(leaf, self._room(leaf), self._tally)
                self._sources.remember(leaf, kept)
                if isinstance(kept.data, jax.Array) and kept.home is not None:
                    self._underway.append(weakref.ref(kept.data))
                self._overlaps |= kept.overlaps
            return kept

        return keep

    def _keep_numpy(self, array: np.ndarray) -> Kept:
        kept = Kept(copy_to(self._room(array), array), None, self._tally)
        self._overlaps |= kept.overlaps
        return kept

    def _room(self, x: Any) -> Any:
        """Returns the place that has room for an array."""
        if self._budget is None or isinstance(self._place, (Folder, InPlace)):
            return self._place
        room = self._budget - self._tally.now().get(self._place.kind, 0)
        needed = self._place.nbytes(x)
        if needed <= room:
            return self._place
        log.debug("Offload: %s don't fit into the %s left of the budget", format_bytes(needed), format_bytes(room))
        return self._spill

    def _unpack(self, row: Row) -> dict[str, Any]:
        def fetch(kept: Kept) -> Any:
            x = kept.fetch()
            if isinstance(x, jax.Array):
                self._sources.remember(x, kept)  # stored again, as a mask is with every layer, it is found
            return x

        return {name: unpack(value, fetch) for name, value in row.items()}


def _checked(names: Iterable[str] | None) -> list[str] | None:
    if isinstance(names, str):
        raise ValueError(f"names={names!r}: give a list, [{names!r}]")
    return None if names is None else list(names)


def _check_missing(missing: str) -> None:
    if missing not in ("raise", "skip"):
        raise ValueError(f"missing={missing!r}: there are 'raise' and 'skip'")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _shown(batch: Any) -> str:
    return f"a dict with the names {_listed(batch)}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
