"""Which tensors of a checkpoint's files are which params: found by the family's table, or all that doesn't fit is said.

Beside what the table says, files may hold one of two tied tensors or both, experts in four bits, and what is computed
here anyway, which is compared before it is passed over.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.models import mxfp4
from jaxkv.models.families.table import POSITIONS, Family, Ignored, Tensor
from jaxkv.models.files import Files, is_floating

_TABLE, _HEAD = ("embed.embedding",), ("head.kernel",)
_MOST_LINES = 100  # of an error


@dataclasses.dataclass(frozen=True)
class Place:
    """Where in the files a param lies.

    Attributes:
      tensor: the family's entry.
      names: of the file's tensors: one, or blocks and scales, or one for each expert.
      stretch: of its joined axis; None: it is the param's alone.
      nbytes: how many of them are read.
    """

    tensor: Tensor
    names: tuple[str, ...]
    stretch: slice | None
    nbytes: int

    def read(self, files: Files, like: Any, sharding: Any) -> jax.Array:
        """Returns the param: of like's shape, and like's dtype but for scales that become one larger."""
        dtype = jnp.dtype("float32") if self.tensor.form == "minus_one" else like.dtype
        if sharding is not None:
            param = jax.make_array_from_callback(
                like.shape, sharding, lambda index: self._part(files, like.shape, dtype, index).astype(dtype)
            )
        else:
            x = self._part(files, like.shape, dtype, (slice(None),))
            # Turned round on the way, then cast, by XLA, which is faster than NumPy at both. What needs neither would
            # stay part of the file, and change with it.
            as_it_is = x.dtype == dtype and x.flags.c_contiguous and not x.flags.writeable
            param = jax.device_put(np.array(x) if as_it_is else x)
            param = param if param.dtype == dtype else _cast(param, dtype)
        return param + 1 if self.tensor.form == "minus_one" else param

    def _part(self, files: Files, shape: tuple[int, ...], dtype: Any, index: Any) -> np.ndarray:
        """Returns a part of the param; a view of the file, if it lies there as one tensor that is not packed."""
        stretch = slice(None) if self.stretch is None else self.stretch
        at = (slice(None),) * (self.tensor.joined_axis % len(self.tensor.file_shape(shape))) + (stretch,)
        if self.tensor.is_each:
            experts, *rest = index
            x = _stacked([files[name] for name in self.names[experts]], dtype)
            return self.tensor.decode(x[at], (len(x), *shape[1:]))[:, *rest]
        if len(self.names) > 1:
            experts, *rest = index
            blocks, scales = (files[name].view(np.uint8)[experts][:, stretch] for name in self.names)
            return mxfp4.unpack(blocks, scales, dtype)[:, *rest]
        return self.tensor.decode(files[self.names[0]][at], shape)[index]


def _stacked(arrays: list[np.ndarray], dtype: Any) -> np.ndarray:
    """Returns arrays of one shape as one; those of several dtypes in the given one."""
    dtypes = {array.dtype for array in arrays}
    stack = np.empty((len(arrays), *arrays[0].shape), dtypes.pop() if len(dtypes) == 1 else dtype)
    for place, array in zip(stack, arrays, strict=True):
        place[...] = array
    return stack


_cast = jax.jit(lambda x, dtype: x.astype(dtype), static_argnums=1)


def entries(
    tensors: Iterable[Tensor], params: Mapping[str, Any]
) -> Iterator[tuple[Tensor, tuple[str, ...], tuple[str, ...]]]:
    """Yields (tensor, its names in the file, names of its params) for all that a model with these params has.

    Args:
      tensors: of a family's table.
      params: arrays or their shapes by name.
    """
    numbers = sorted({int(number) for name in params for number in re.findall(r"\.(\d+)\.", name)})
    for tensor in tensors:
        for number in numbers if "{}" in tensor.file else [0]:
            names = tuple(name.format(number) for name in tensor.params)
            if names[0] not in params:
                continue
            if tensor.is_each:
                experts = range(params[names[0]].shape[0])
                yield tensor, tuple(tensor.file.format(number, expert) for expert in experts), names
            else:
                yield tensor, (tensor.file.format(number),), names


class Contents:
    """The tensors of a checkpoint by the names in the family's table.

    Args:
      family: whose table it is.
      files: where they lie.

    Raises:
      ValueError: if two tensors have one name there.
    """

    def __init__(self, family: Family, files: Files) -> None:
        self.family, self.files = family, files
        self._names: dict[str, str] = {}  # those in the table, and those in the files
        for name in files:
            known = family.known_as(name)
            if known in self._names:
                raise ValueError(
                    f"{files.directory} holds {_shown(self._names[known])} and {_shown(name)}, which are the same "
                    "tensor by its name; delete one"
                )
            self._names[known] = name
        self._ignored = (*family.ignored, POSITIONS)
        ends = {tensor.params: tensor.file for tensor in family.tensors if tensor.params in (_TABLE, _HEAD)}
        self._table, self._head = ends.get(_TABLE), ends.get(_HEAD)

    def is_tied(self, dtype: Any) -> bool:
        """Returns whether embedding and head may share a table: there is but one, or both are the same in a dtype.

        As transformers has it, whatever config.json says of a file that holds two.
        """
        table, head = (self._names.get(name or "") for name in (self._table, self._head))
        return table is None or head is None or _equal(self.files[table], self.files[head], dtype)

    def places(self, params: Mapping[str, Any]) -> dict[str, Place]:
        """Returns where each param lies.

        Args:
          params: arrays or their shapes by name.

        Raises:
          ValueError: with all that doesn't fit.
        """
        files = self.files
        found: dict[str, Place] = {}
        is_tied = _HEAD[0] not in params
        expected: set[str | None] = {self._head} if is_tied else set()
        problems: list[str] = []
        for tensor, file, names in self._entries(params):
            shapes = [params[name].shape for name in names]
            want = self._wanted(tensor, file, tensor.joined_shape(shapes), is_tied)
            expected.update(want)
            packed = not tensor.is_each and len(want) > 1
            wrong = [line for item in want.items() if (line := self._wrong(*item, is_packed=packed))]
            if wrong:
                problems += wrong
                continue
            own = tuple(self._names[name] for name in want)
            size, whole = sum(map(files.nbytes, own)), sum(map(math.prod, shapes))
            for number, (name, shape) in enumerate(zip(names, shapes, strict=True)):
                nbytes = size * math.prod(shape) // max(whole, 1)
                found[name] = Place(tensor, own, tensor.stretch(number, shapes), nbytes)
        for known, name in self._names.items():
            if known not in expected and not any(re.fullmatch(ignored.pattern, known) for ignored in self._ignored):
                problems.append(f"unknown: {_shown(name)} {files.shape(name)!s:.200}")
        if problems:
            left = len(problems) - _MOST_LINES
            lines = problems[:_MOST_LINES] + ([f"and {left:,} more"] if left > 0 else [])
            beside = "".join(f" ({note})" for note in files.notes)
            raise ValueError(f"{files.directory} does not fit its config.json{beside}:\n  " + "\n  ".join(lines))
        if lost := set(params) - set(found):
            raise ValueError(f"the family's table has no tensor for {', '.join(sorted(lost))}")
        return found

    def _entries(self, params: Mapping[str, Any]) -> list[tuple[Tensor, tuple[str, ...], tuple[str, ...]]]:
        """Returns the entries by which these params are read: another one where the files have that alone."""
        chosen = {name: entry for entry in entries(self.family.tensors, params) for name in entry[2]}
        for entry in entries(self.family.others, params):
            usual = [chosen[name][1][0] for name in entry[2]]
            if entry[1][0] in self._names and not any(name in self._names for name in usual):
                chosen |= dict.fromkeys(entry[2], entry)
        return list(dict.fromkeys(chosen.values()))

    def _wanted(
        self, tensor: Tensor, names: tuple[str, ...], shape: tuple[int, ...], is_tied: bool
    ) -> dict[str, tuple[int, ...]]:
        """Returns which tensors hold one of the table, and their shapes."""
        if tensor.is_each:
            return dict.fromkeys(names, shape[1:])
        (file,) = names
        if file not in self._names:
            if tensor.packed and f"{file}_blocks" in self._names and shape[1] % mxfp4.BLOCK == 0:
                blocks, scales = mxfp4.packed_shapes(shape)
                return {f"{file}_blocks": blocks, f"{file}_scales": scales}
            if is_tied and file == self._table and self._head in self._names:
                return {self._head: shape}
        return {file: shape}

    def _wrong(self, file: str, want: tuple[int, ...], is_packed: bool) -> str | None:
        if file not in self._names:
            cure = ""
            if file == self._head:
                cure = '; if it is the table of the embedding, set "tie_word_embeddings": true in config.json'
            return f"missing: {file} {want}{cure}"
        name = self._names[file]
        if self.files.shape(name) != want:
            return f"shape: {file} is {self.files.shape(name)} in the file, {want} in the model"
        kind = self.files.kind(name)
        if is_packed:
            fits = kind.name in ("uint8", "float8_e8m0fnu")
            return None if fits else f"kind: {file} is {kind.name}; of MXFP4 it is uint8"
        return None if is_floating(kind) else f"kind: {file} is {kind.name}; quantized weights can't be read"

    def notes(self, config: Any) -> Iterator[str]:
        """Yields a line for whatever is passed over and holds something else than what is computed in its place."""
        for ignored in self._ignored:
            found = {known: match for known in self._names if (match := re.fullmatch(ignored.pattern, known))}
            odd = [known for known, match in found.items() if not self._agrees(ignored, config, known, match)]
            if odd:
                more = f" and {len(odd) - 1:,} like it" if len(odd) > 1 else ""
                yield f"{_shown(self._names[odd[0]])}{more}: {ignored.note}"

    def _agrees(self, ignored: Ignored, config: Any, known: str, match: re.Match[str]) -> bool:
        layer, array = int(next(iter(match.groups()), None) or 0), self.files[self._names[known]]
        return array.dtype.kind != "c" and ignored.agrees is not None and ignored.agrees(config, layer, array)


def _equal(one: np.ndarray, other: np.ndarray, dtype: Any) -> bool:
    """Returns whether two tensors are the same once they have a dtype, without a copy of either."""
    if one.shape != other.shape:
        return False
    one, other = one.reshape(-1), other.reshape(-1)
    for begin in range(0, one.size, 1 << 22):
        x, y = (array[begin : begin + (1 << 22)] for array in (one, other))
        if x.dtype == y.dtype and np.array_equal(x.view(np.uint8), y.view(np.uint8)):
            continue
        with np.errstate(over="ignore"):
            if not np.array_equal(x.astype(dtype), y.astype(dtype)):
                return False
    return True


def _shown(name: str) -> str:
    """Returns a name from a file as it may be printed, whoever wrote it."""
    name = name if name.isprintable() else ascii(name)
    return name if len(name) <= 200 else f"{name[:200]}..."
