"""What data loaders read: outputs that were computed before, example by example, in any process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxkv.kinds import kind_of
from jaxkv.memo.call import Call, native
from jaxkv.memo.disk import Disk
from jaxkv.memo.entry import Entry
from jaxkv.memo.hashing import Hash

MISSING = ("raise", "none")


class Source:
    """The outputs of a memoized function for examples, as NumPy arrays: `len(source)`, `source[i]`.

    It can be pickled, used after a fork, and handed to `grain.MapDataset.source` or torch's `DataLoader`. What is only
    in memory comes along in a fork, not in a pickle: give the memo a disk for processes that are spawned. Nothing is
    computed: `features.warm(batches)` before.

    Args:
      examples, at, missing: see `Features.source`.
    """

    def __init__(self, examples: Any, at: Any, missing: str) -> None:
        if missing not in MISSING:
            raise ValueError(f"missing is {missing!r}, must be one of {', '.join(MISSING)}")
        for method in ("__len__", "__getitem__"):
            if not hasattr(examples, method):
                raise ValueError(f"examples is {kind_of(examples)} without {method}; give a sequence of examples")
        if not len(examples):
            raise ValueError("there are no examples")
        self._examples = examples
        self._at = at
        self._missing = missing

    def first(self) -> Any:
        """Returns the function's argument for the first example, as `batch` does."""
        return self.batch(self._examples[0])

    def batch(self, example: Any) -> Any:
        """Returns the function's argument for one example, as a batch of one, in the byte order that calls hash."""
        argument = part(example, self._at)
        return jax.tree.map(lambda leaf: native(np.asarray(leaf))[None], argument)

    def reading(self, tiers: Sequence[Any], hashing: Hash, entry: Entry, call: Call) -> Source:
        """Says where to read, and what the examples look like: as the one that the call was made with."""
        self._tiers = tiers
        self._hash = hashing
        self._entry = entry
        self._namespace = entry.namespace_of(call, hashing)
        self._form = _form(self.first())
        if len(self._form) != len(call.columns):
            raise ValueError("only the first argument can be of the example; the others must belong to all of them")
        return self

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: Any) -> Any:
        """Returns the output for an example, or the example with the output in its place.

        Raises:
          IndexError: beyond the end.
          KeyError: if the output isn't there, and `missing` is "raise".
          ValueError: for an example of another form than the first one.
        """
        if isinstance(index, slice):
            raise IndexError(f"a source gives one example at a time, not {index}")
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[Any]) -> list[Any]:
        """Returns what `__getitem__` does for each index, looked up at once, as torch's `DataLoader` does."""
        examples = [self._example(index) for index in indices]
        keys = [self._key(index, example) for index, example in zip(indices, examples, strict=True)]
        payloads: dict[bytes, Any] = dict.fromkeys(keys)
        for tier in self._tiers:
            asked = [key for key, payload in payloads.items() if payload is None]
            payloads.update(zip(asked, tier.read(asked, self._entry.nbytes) if asked else (), strict=True))
        found = [payloads[key] for key in keys]
        return [self._output(*each) for each in zip(indices, examples, found, strict=True)]

    def _example(self, index: Any) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self):,} examples, and {index} is none of them")
        return self._examples[index]

    def _key(self, index: Any, example: Any) -> bytes:
        batch = self.batch(example)
        if (form := _form(batch)) != self._form:
            raise ValueError(
                f"example {index} is {_said(form)}, and the first one {_said(self._form)}; make a source for each"
            )
        return self._namespace + self._hash.rows([np.asarray(leaf) for leaf in jax.tree.leaves(batch)])[0]

    def _output(self, index: Any, example: Any, payload: Any) -> Any:
        if payload is None and self._missing == "raise":
            raise KeyError(f"the output for example {index} is not there; compute it before: features.warm(batches)")
        output = None if payload is None else jax.tree.map(lambda leaf: leaf[0], self._entry.assemble([payload]))
        return output if self._at is None else _replace(example, self._at, output)

    def __getstate__(self) -> dict[str, Any]:
        disk = [tier for tier in self._tiers if isinstance(tier, Disk)]
        if not disk:
            raise TypeError(
                "a source that is only in memory can't go to another process; give the memo a directory: Memo(disk=DIR)"
            )
        return vars(self) | {"_tiers": disk}


def part(example: Any, at: Any) -> Any:
    """Returns what stands at a key or an index of an example, all of it for None.

    Raises:
      ValueError: if there is nothing.
    """
    if at is None:
        return example
    try:
        return example[at]
    except (KeyError, IndexError, TypeError) as error:
        there = list(example) if isinstance(example, Mapping) else kind_of(example)
        raise ValueError(f"at={at!r}, and what was given is {there}") from error


def _form(batch: Any) -> list[tuple[str, str, tuple[int, ...]]]:
    paths = jax.tree_util.tree_leaves_with_path(batch)
    return [(jax.tree_util.keystr(path), leaf.dtype.name, leaf.shape[1:]) for path, leaf in paths]


def _said(form: Any) -> str:
    return ", ".join(f"{path} {dtype}[{','.join(map(str, shape))}]".strip() for path, dtype, shape in form)


def _replace(example: Any, at: Any, output: Any) -> Any:
    """Returns the example with another value at one place."""
    if isinstance(example, Mapping):
        return {**example, at: output}
    items = [output if i == at % len(example) else value for i, value in enumerate(example)]
    return type(example)(*items) if hasattr(example, "_fields") else type(example)(items)
