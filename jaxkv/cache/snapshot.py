"""What rows hold, in a file: written by `Cache.save`, read by `Cache.load`.

Of each row the tokens lie in the order of their positions, whatever the slots and the layout they came from, so that
any cache of the same layers takes them. The file is safetensors with checksums. Its metadata "jaxkv" says in JSON what
the layers are; the arrays are

- `lengths` int32 [N] and `ok` bool [N], of each saved row;
- `groups.G.lost` int32 [N, 2] and, for each row, `rows.R.groups.G.positions` int32 [n], of each reach; for Cross
  `groups.G.lengths` int32 [N]: what the bookkeeping says of rows and of slots;
- `rows.R.layers.L.k` [K, n, H], `.v`, and what else a layer keeps of its tokens, as it is stored;
- `logits` [N, V], if they were given.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from jaxkv import safetensors
from jaxkv.cache.arguments import FAR
from jaxkv.cache.layer import Layer
from jaxkv.cache.plain import exportable, made_of, plain
from jaxkv.cache.quantized import Float8, Int4, Int8
from jaxkv.cache.rows import Rows
from jaxkv.cache.state_layer import StateLayer
from jaxkv.cache.storage import Dense
from jaxkv.errors import NotSupportedError
from jaxkv.kinds import kind_of
from jaxkv.meshes import automatic

FORMAT = 1
_VERSION = importlib.import_module("jaxkv").__version__  # type checkers would take an import for a circle
_HEADER = "jaxkv"
_STORAGE = "_storage"  # how the fields of a LayerSpec end that say how numbers are kept

for _storage in (Dense, Int8, Int4, Float8):
    exportable(_storage)


@dataclasses.dataclass(frozen=True)
class Part:
    """What a layer keeps of each of its tokens under one name."""

    stored: Any  # a pytree of arrays [A, K, S, h], of a stack [L, A, K, S, h]
    num_heads: int
    size: int
    storage: Any


def parts(layer: Layer | StateLayer) -> dict[str, Part]:
    """Returns what a layer, or a stack, keeps in each slot, by name: all arrays of it that go to a file."""
    if isinstance(layer, StateLayer):
        buffers = {"tail": layer.tail, "state": layer.state}
        return {n: Part(x, x.shape[-3], x.shape[-1], Dense()) for n, x in buffers.items() if x is not None}
    spec = layer.spec
    found = {  # of the names of the spec's fields k_storage and v_storage, and others
        "k": Part(layer.k, spec.num_kv_heads, spec.k_dim, spec.k_storage),
        "v": Part(layer.v, spec.num_kv_heads, spec.value_dim, spec.v_storage),
    }
    found |= {name: Part(stored, *spec.sides[name]) for name, stored in layer.sides.items()}
    return {name: part for name, part in found.items() if part.stored is not None}


def with_parts(layer: Layer | StateLayer, stored: Mapping[str, Any]) -> Any:
    """Returns the layer with other arrays of all its `parts`."""
    if isinstance(layer, StateLayer):
        return layer.with_buffers((stored.get("tail"), stored.get("state")))
    return layer.with_buffers((stored.get("k"), stored.get("v"), {name: stored[name] for name in layer.sides}))


def leaves(name: str, stored: Any) -> dict[str, Any]:
    """Returns the arrays of what is stored under a name, by names such as k, or k.codes and k.scales."""
    paths, _ = jax.tree_util.tree_flatten_with_path(stored)
    return {".".join([name, *(str(key.key) for key in path)]): x for path, x in paths}


def one_by_one(cache: Any) -> list[tuple[int, int | None]]:
    """Returns the layers of a cache, those of a stack after one another: their entry of `layers`, and which of it."""
    counts = [layer.num_stacked for layer in cache.layers]
    return [(i, j) for i, n in enumerate(counts) for j in (range(n) if n is not None else (None,))]


def layout_of(cache: Any, book: Any) -> Any:
    """Returns where the slots of the layers of one book lie."""
    return Rows() if book.pages is None else cache.layout


def described(spec: Any) -> dict[str, str]:
    """Returns what must be the same of two layers for one to go on from what the other had: texts by field."""
    fields = {field.name: repr(getattr(spec, field.name)) for field in dataclasses.fields(spec)}
    return {name: text for name, text in fields.items() if not name.endswith(_STORAGE)}


def save(
    cache: Any,
    path: str | os.PathLike[str],
    rows: Sequence[int] | None,
    fingerprint: str | None,
    logits: Any,
    metadata: Mapping[str, str] | None,
) -> None:
    """Does what `Cache.save` says."""
    check_here(cache, "save")
    chosen = checked_rows("save: rows", rows, cache.num_rows)
    if fingerprint is not None and not isinstance(fingerprint, str):
        raise ValueError(f"save: fingerprint is {kind_of(fingerprint)}; give a text that tells your model from others")
    tensors: dict[str, Any] = {
        "lengths": np.asarray(cache.lengths)[chosen],
        "ok": np.asarray(cache.ok)[chosen],
    }
    if logits is not None:
        if logits.ndim != 2 or logits.shape[0] != len(chosen):
            raise ValueError(
                f"save: logits has shape {logits.shape}; give [N, V] = [{len(chosen)}, V], of the saved rows"
            )
        tensors["logits"] = logits
    places: list[list[Any]] = []  # per book and saved row: where in a buffer its tokens lie
    for number, book in enumerate(cache.bookkeeping):
        held, layout = np.asarray(book.held), layout_of(cache, book)
        for name in book.by_row:
            tensors[f"groups.{number}.{name}"] = np.asarray(getattr(book, name))[chosen]
        by_slot = {name: np.asarray(getattr(book, name)) for name in book.by_slot}
        places.append([])
        for i, row in enumerate(chosen):
            order = np.argsort(held[row], kind="stable")
            slots = order[np.searchsorted(held[row], 0, sorter=order) :]
            for name, x in by_slot.items():
                tensors[f"rows.{i}.groups.{number}.{name}"] = x[row, slots]
            places[-1].append(layout.places(layout.table(book.pages), np.full(slots.shape, row), slots))
    for number, (entry, index) in enumerate(one_by_one(cache)):
        layer = cache.layers[entry]
        for name, part in parts(layer).items():
            for leaf, buffer in leaves(name, part.stored).items():
                for i in range(len(chosen)):
                    tensors[f"rows.{i}.layers.{number}.{leaf}"] = _Taken(buffer, index, *places[layer.group][i])
    text = json.dumps(_header(cache, fingerprint, metadata), separators=(",", ":"))
    safetensors.write(path, tensors, metadata={_HEADER: text}, checked=True)


def _header(cache: Any, fingerprint: str | None, metadata: Any) -> dict[str, Any]:
    layers = []
    for entry, _ in one_by_one(cache):
        spec = cache.layers[entry].spec
        texts = described(spec)
        unnamed = next((text for text in texts.values() if " at 0x" in text), None)
        if unnamed is not None:
            raise ValueError(
                f"save: nobody can tell by {unnamed} whether another cache has the same; make it a frozen dataclass"
            )
        storages = {f.name: plain(getattr(spec, f.name)) for f in dataclasses.fields(spec) if f.name.endswith(_STORAGE)}
        layers.append({"entry": entry, "spec": texts, **storages})
    return {
        "format": FORMAT,
        "jaxkv": _VERSION,
        "fingerprint": fingerprint,
        "stacked": any(layer.num_stacked is not None for layer in cache.layers),
        "groups": [repr(book.reach) for book in cache.bookkeeping],
        "layers": layers,
        "metadata": safetensors.texts(metadata or {}),
    }


@dataclasses.dataclass(frozen=True)
class _Taken:
    """What a buffer has of a row's tokens, [K, n, h]: an array for NumPy, which is made when it is asked for."""

    buffer: Any
    index: int | None
    lead: Any  # int [n], rows or pages
    slots: Any  # int [n]

    @property
    def dtype(self) -> Any:
        return self.buffer.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.buffer.shape[-3], len(self.slots), self.buffer.shape[-1]

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        device = next(iter(self.buffer.devices()))
        if device.platform != "cpu" or len(self.buffer.devices()) > 1:
            return self._fetched()
        x = np.asarray(self.buffer)  # the memory itself
        x = x if self.index is None else x[self.index]
        apart = np.flatnonzero((np.diff(self.slots) != 1) | (np.diff(self.lead) != 0)) + 1
        out = np.empty(self.shape, x.dtype)
        for begin, end in itertools.pairwise([0, *apart.tolist(), len(self.slots)]):
            if begin < end:
                start = self.slots[begin]
                out[:, begin:end] = x[self.lead[begin], :, start : start + end - begin]
        return out

    def _fetched(self) -> np.ndarray:
        """Returns it from another device, where only these tokens are gathered."""
        count = len(self.slots)
        lead, slots = (np.pad(x, (0, padded(count) - count)).astype(np.int32) for x in (self.lead, self.slots))
        index = None if self.index is None else np.int32(self.index)
        return np.asarray(_gather(self.buffer, index, lead, slots))[:, :count]


@jax.jit
def _gather(buffer: Any, index: Any, lead: Any, slots: Any) -> Any:
    def gather(buffer: Any, index: Any, lead: Any, slots: Any) -> Any:
        at = (lead, slice(None), slots) if index is None else (index, lead, slice(None), slots)
        return buffer.at[at].get(mode="clip").swapaxes(0, 1)

    return automatic(gather, PartitionSpec())(buffer, index, lead, slots)


def padded(count: int) -> int:
    """Returns a number from `count` on of which there are few, so that few programs are compiled: a power of two."""
    return 1 << max(count - 1, 0).bit_length()


class Snapshot:
    """A file that `Cache.save` wrote, opened: what is in it, before a cache takes it.

    Args:
      path: the file; "~" is the home directory.

    Attributes:
      path: the file.
      num_rows: how many rows were saved (N).
      lengths: int32 [N], the next position of each.
      capacity: the least that a cache can have which is to hold all of them.
      fingerprint: of the model, as whoever saved it said; None if nobody did.
      logits: [N, V] that were saved with the rows; None if there were none.
      metadata: strings that were saved with them.
      version: of the jaxkv that wrote it.

    Raises:
      OSError: if it can't be opened.
      ValueError: if it is not a regular file, not one of these, damaged or cut short, or of a newer version.

    >>> import os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "rows.safetensors")
    >>> cache = jaxkv.Cache.init([jaxkv.LayerSpec(jaxkv.Full(), 1, 2)], num_rows=2, capacity=8)
    >>> cache.save(path, rows=[0], fingerprint="my model")
    >>> snapshot = jaxkv.Snapshot(path)
    >>> snapshot.num_rows, snapshot.lengths.tolist(), snapshot.fingerprint
    (1, [0], 'my model')
    """

    version: str
    fingerprint: str | None
    metadata: dict[str, str]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = safetensors.File(path)
        self.path = self._file.path
        if _HEADER not in self._file.metadata:
            raise ValueError(f"{self.path} is a safetensors file, but not one that Cache.save wrote")
        self._file.check()
        try:
            header = json.loads(self._file.metadata[_HEADER])
        except (ValueError, RecursionError) as error:
            raise self.foreign(f"its header is not JSON: {error}") from error
        match header:
            case {"format": int(number), "jaxkv": str(version)} if number != FORMAT:
                raise ValueError(
                    f"{self.path} was written by jaxkv {version} in format {number}; jaxkv {_VERSION} reads "
                    f"format {FORMAT}; update jaxkv"
                )
            case {
                "format": int(),
                "jaxkv": str(version),
                "fingerprint": None | str(),
                "stacked": bool(),
                "groups": [*groups],
                "layers": [_, *_] as layers,
                "metadata": {**metadata},
            } if all(isinstance(x, str) for x in (*groups, *metadata.values())) and all(map(_is_layer, layers)):
                self.version, self.fingerprint = version, header["fingerprint"]
                self.metadata = dict(header["metadata"])
                self.layers, self.stacked, self.groups = layers, header["stacked"], groups
            case _:
                raise self.foreign("its header says other things than Cache.save does")
        self.lengths = self.array("lengths", np.int32, (None,))
        self.num_rows = len(self.lengths)
        if not self.num_rows or not ((self.lengths >= 0) & (self.lengths <= FAR)).all():
            raise self.foreign("it has no rows, or one of a length that none can have")

    @property
    def capacity(self) -> int:
        return int(self.lengths.max(initial=1))

    @functools.cached_property
    def logits(self) -> np.ndarray | None:
        if "logits" not in self._file:
            return None
        self._file.check(["logits"])
        return np.array(self._file["logits"])

    def __repr__(self) -> str:
        return (
            f"Snapshot({str(self.path)!r}: rows of {', '.join(map(str, self.lengths))} tokens, {len(self.layers)} "
            f"layers, fingerprint={self.fingerprint!r}, jaxkv {self.version})"
        )

    def array(self, name: str, dtype: Any, shape: tuple[int | None, ...]) -> np.ndarray:
        """Returns an array, whose bytes are those written, with this dtype and shape; None is any size.

        Raises:
          ValueError: if it has others, is damaged, or isn't there.
        """
        self.expect(name, dtype, shape)
        self._file.check([name])
        return self._file[name]

    def expect(self, name: str, dtype: Any, shape: tuple[int | None, ...]) -> None:
        """Raises ValueError unless there is such an array, of this dtype and shape; None is any size."""
        if name not in self._file:
            raise self.foreign(f"it has no {name}")
        found = self._file.shape(name)
        alike = len(found) == len(shape) and all(want in (None, n) for n, want in zip(found, shape, strict=True))
        if not alike or not _same_bits(self._file.kind(name), np.dtype(dtype)):
            raise self.foreign(
                f"{name} is {self._file.kind(name)}{list(found)}, must be {np.dtype(dtype)}{list(shape)}"
            )

    def numbers(self, name: str, dtype: Any) -> np.ndarray:
        """Returns an array that was expected and checked, of a dtype with the same bits."""
        return self._file[name].view(dtype)

    def check(self, names: Sequence[str]) -> None:
        """Raises ValueError if the bytes of these arrays are not those written."""
        self._file.check(names)

    def storage(self, layer: int, name: str, part: Part) -> Any:
        """Returns how a layer kept its numbers, by the name of the LayerSpec's field; as `part` does if there is none.

        Raises:
          ValueError: if it can't have kept the vectors of `part` so.
        """
        if name not in self.layers[layer]:
            return part.storage
        try:
            storage = made_of(self.layers[layer][name])
            if not hasattr(storage, "zeros"):
                raise ValueError(f"{storage!r} is not a storage")
            storage.check(part.size)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise self.foreign(f"{name} of layer {layer}: {error}") from error
        return storage

    def foreign(self, what: str) -> ValueError:
        return ValueError(f"{self.path} is not what Cache.save writes: {what}")


def _is_layer(layer: Any) -> bool:
    match layer:
        case {"entry": int(), "spec": {**texts}}:
            return all(isinstance(text, str) for text in texts.values())
    return False


def _same_bits(a: Any, b: Any) -> bool:
    """Returns whether two dtypes are the same, or one that of the bits of bfloat16, as some backends keep them."""
    return a == b or {a.name, b.name} == {"bfloat16", "uint16"}


def checked_rows(what: str, rows: Any, most: int) -> np.ndarray:
    """Returns numbers of different rows below `most`: int [N]; all for None.

    Raises:
      ValueError: for anything else.
    """
    if rows is None:
        return np.arange(most)
    found = np.asarray(rows)
    if found.ndim != 1 or not (found.size and np.issubdtype(found.dtype, np.integer)):
        raise ValueError(f"{what} is {rows!r}; give a list of row numbers, such as [0]")
    if found.min() < 0 or found.max() >= most or len(np.unique(found)) < found.size:
        raise ValueError(f"{what} is {found.tolist()}; give different rows of 0 to {most - 1}")
    return found


def check_here(cache: Any, what: str) -> None:
    """Raises unless the values of a cache are here, to be read and written by this process."""
    for x in jax.tree.leaves(cache):
        if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer):
            raise ValueError(f"{what}: this cache has no values here; call it outside of jit, with arrays in the cache")
        if not x.is_fully_addressable:
            raise NotSupportedError(f"{what}: parts of this cache lie on devices of other processes")
    if cache.lengths.ndim != 1:
        raise ValueError(f"{what}: these are several caches, as vmap makes them; take one of them")
