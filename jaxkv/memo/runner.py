"""Computing the items that are missing."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.memo.call import Call, Form, arguments
from jaxkv.memo.entry import Entry, Output, digest
from jaxkv.memo.function import Function, State
from jaxkv.memo.hashing import Hash
from jaxkv.memo.program import Program, paths_of
from jaxkv.memo.staging import Staging

BATCHES = ("bucket", "full")
_FEW = 0.01  # part of the values that may differ by more than rounding does as a rule
_TRACED = 2  # items in the trace that names the function: with 1, an output that has lost its batch axis would not show
_TRIED = 16  # devices: a mesh of any number of them up to that is found


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `Memo.wrap` was told; see there."""

    version: str | None
    output_dtype: Any
    batch: str
    check: bool


class Runner:
    """Computes a function for items of one form.

    Args:
      function: which.
      state: what it depends on now.
      call: with arguments of the form.
      settings: how.
      hashing: of parameters.
      staging: memory for batches.

    Attributes:
      state: what the function depends on.
      checked: whether its rows were found not to depend on one another.
      entry: where its outputs are kept.

    Raises:
      ValueError: for outputs that don't have the items along their first axis.
    """

    def __init__(
        self, function: Function, state: State, call: Call, settings: Settings, hashing: Hash, staging: Staging
    ) -> None:
        form, statics = call.form, call.statics

        def run(arrays: Any, columns: Any, shared: Any) -> Any:
            out = function.call(state.static, arrays, arguments(form, columns, shared, statics))
            if settings.output_dtype is None:
                return out
            return jax.tree.map(lambda leaf: _cast(leaf, settings.output_dtype), out)

        def trace(size: int, state: State, shared: Any) -> Program:
            columns = tuple(
                jax.ShapeDtypeStruct((size, *leaf[2]), jax.dtypes.canonicalize_dtype(leaf[1]))
                for leaf in form.leaves
                if leaf[0] == "item"
            )
            return Program(run, state.arrays, (columns, shared), settings.version)

        try:
            traced, self._program = _first_that_fits(lambda size: trace(size, state, call.shared), call.size)
        except Exception as error:
            error.add_note(
                f"jaxkv: {function.name} was traced for {_TRACED} items of {form}. It must be made of JAX's functions; "
                'arrays that belong to all items are named: memo.wrap(f, shared=("mask",))'
            )
            raise
        self._trace = functools.partial(trace, traced)
        self._unit = traced if self._program.is_split else 1  # batches are multiples of it
        self._name = function.name
        self._settings = settings
        self._hash = hashing
        self._staging = staging
        self._run = jax.jit(run)
        outputs = tuple(
            Output(path, leaf.dtype, leaf.shape[1:])
            for path, leaf in zip(paths_of(self._program.out), self._outputs(self._program.out, traced), strict=True)
        )
        if not outputs:
            raise ValueError(f"{self._name} gives no arrays, so there is nothing to keep")
        template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), self._program.out)
        self._refusals: list[str] = []  # why it can't be memoized after all
        self._largest = 0
        self._sizes: set[int] = set()
        self.checked = False
        self._lone: tuple[np.ndarray, ...] | None = None  # the row of a batch that had no other
        self.state = state
        self.entry = Entry(form, self._namespace(state, form), template, outputs)

    def check_found(self, call: Call, rows: Sequence[int]) -> bool:
        """Checks the function with items of a call that were found, and returns whether it is checked.

        One item alone says nothing: it waits for the second one that is different, found or computed.
        """
        with self._staging.held():
            for row in rows:
                if self._settings.check and not self.checked:
                    one = np.array([row])
                    columns = [self._staging.take(slot, column, one) for slot, column in enumerate(call.columns)]
                    self._check_alone(tuple(np.array(column) for column in columns), call.shared)
        return self.checked

    def check(self) -> None:
        """Raises what was found to be wrong with the function: from then on, what is kept of it isn't given either."""
        if self._refusals:
            raise ValueError(self._refusals[0])

    def _refuse(self, why: str) -> NoReturn:
        self._refusals.append(why)
        raise ValueError(why)

    def updated(self, state: State) -> Runner:
        """Returns one for other parameters of the same shapes, which needn't be traced or compiled again."""
        new = copy.copy(self)  # calls that are under way go on with what they began with
        new.state = state
        new.entry = dataclasses.replace(self.entry, namespace=self._namespace(state, self.entry.form))
        return new

    def _namespace(self, state: State, form: Form) -> bytes:
        params = [
            [path, state.digest(index, self._hash)]
            for index, (path, used) in enumerate(zip(paths_of(state.arrays), self._program.used, strict=True))
            if used
        ]
        return digest(
            {
                "format": "jaxkv memo 1",
                "hash": self._hash.name,
                "program": self._program.text,
                "params": params,
                "arguments": [str(form), *map(str, form.leaves)],
                "batch": self._settings.batch,
                "version": self._settings.version,
            }
        )

    def __call__(self, call: Call, rows: Sequence[int]) -> list[bytes]:
        """Returns the bytes of the outputs of some rows of a call."""
        if self._settings.batch == "full":
            arrays = self._compute(call, None, call.size)
            return self.entry.payloads([array[np.asarray(rows)] for array in arrays])
        # A power of two, but no larger than the largest batch seen: ceil(log2(B)) + 1 programs for batches of up to B.
        self._largest = max(self._largest, call.size)
        size = -(-min(1 << (len(rows) - 1).bit_length(), self._largest) // self._unit) * self._unit
        index = np.asarray([*rows, *[rows[-1]] * (size - len(rows))])
        arrays = self._compute(call, None if np.array_equal(index, np.arange(call.size)) else index, size)
        return self.entry.payloads([array[: len(rows)] for array in arrays])

    def _compute(self, call: Call, index: np.ndarray | None, size: int) -> list[np.ndarray]:
        """Returns the outputs for some rows of a call, or for all of them."""
        with self._staging.held():
            columns = tuple(self._staging.take(slot, column, index) for slot, column in enumerate(call.columns))
            try:
                out = self._run(self.state.arrays, columns, call.shared)
                arrays = [np.asarray(leaf) for leaf in self._outputs(out, size)]  # waits: the columns have been read
            except BaseException:
                self._staging.clear()
                raise
            is_new = size not in self._sizes
            if is_new and self._trace(self.state, call.shared).text != self._program.text:  # as JAX has, just now
                self._refuse(
                    f"{self._name} is another function than when it was traced first: it reads something that has "
                    "changed and that a memo doesn't watch (an object's fields, a file, a clock, random numbers of "
                    "NumPy); pass that as an argument, and wrap the function again"
                )
            if self._settings.check and not self.checked:
                self._check_rows(columns, call.shared, arrays)
            if is_new and self._sizes and self._settings.check:
                self._check_size(columns, call.shared, arrays)
            self._sizes.add(size)
        return arrays

    def _outputs(self, out: Any, size: int) -> list[Any]:
        for path, leaf in jax.tree_util.tree_leaves_with_path(out):
            if leaf.ndim == 0 or leaf.shape[0] != size:
                raise ValueError(
                    f"output{jax.tree_util.keystr(path)} of {self._name} has shape {leaf.shape} for {size} items; "
                    "every output must have the items along its first axis"
                )
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                raise ValueError(
                    f"output{jax.tree_util.keystr(path)} of {self._name} are PRNG keys; give their key_data"
                )
        return jax.tree.leaves(out)

    def _check_rows(self, columns: Sequence[Any], shared: Sequence[Any], arrays: Sequence[np.ndarray]) -> None:
        """Raises if rows come out otherwise at other places among others: first one half of them, then the other."""
        size = len(columns[0])
        for kept in np.array_split(np.random.default_rng(0).permutation(size), 2):
            index = np.resize(np.roll(kept, 1), size)
            mixed = _rows(columns, index)
            if _same(mixed, columns):  # the rows are alike: they tell beside another one
                self._check_alone(_rows(columns, index[:1]), shared)
                return
            again = jax.tree.leaves(self._run(self.state.arrays, mixed, shared))
            for output, array, other in zip(self.entry.outputs, arrays, again, strict=True):
                if not _alike(array[index], np.asarray(other)):
                    self._refuse(
                        f"output{output.path} of {self._name} depends on the other rows of the batch, or on its place "
                        f"among them, so it can't be kept per item. {size} items of {self.entry.form} were given: does "
                        'an array belong to all items (shared=("mask",)), or have no batch axis? Is BatchNorm or '
                        "Dropout in training mode? If rows only round differently: memo.wrap(..., check=False)"
                    )
        self.checked, self._lone = True, None

    def _check_alone(self, row: tuple[np.ndarray, ...], shared: Sequence[Any]) -> None:
        """Checks rows that came without any other, once there are two of them."""
        if self._lone is None or _same(self._lone, row):
            self._lone = row
            return
        index = np.resize(np.arange(2), max(2, self._unit))
        pair = tuple(np.concatenate(parts)[index] for parts in zip(self._lone, row, strict=True))
        out = self._run(self.state.arrays, pair, shared)
        self._check_rows(pair, shared, [np.asarray(leaf) for leaf in self._outputs(out, len(index))])

    def _check_size(self, columns: Sequence[Any], shared: Sequence[Any], arrays: Sequence[np.ndarray]) -> None:
        """Raises if most values come out otherwise in a batch of a size that there was before.

        Most, because other programs round otherwise, and what is chosen by a rounded value jumps.
        """
        size, before = len(columns[0]), max(self._sizes)
        index = np.resize(np.arange(size), before)
        again = jax.tree.leaves(self._run(self.state.arrays, _rows(columns, index), shared))
        for output, array, other in zip(self.entry.outputs, arrays, map(np.asarray, again), strict=True):
            if not jnp.issubdtype(array.dtype, jnp.inexact):
                continue
            present = (array[index] != 0) | (other != 0)
            if 2 * np.count_nonzero(_unlike(array[index], other, per_value=True)) > np.count_nonzero(present):
                self._refuse(
                    f"output{output.path} of {self._name} depends on the size of the batch, so it can't be kept per "
                    f"item: a batch of {before} gives other values than one of {size}. Divide by a constant instead; "
                    "clear() of the wrapped function removes its old outputs"
                )


def _first_that_fits(trace: Callable[[int], Program], size: int) -> tuple[int, Program]:
    """Returns how many items a function is traced for to be named, and its program.

    A function that splits its batch over devices takes no fewer items than those. The name must not depend on the size
    of the first call, so that is tried last.
    """
    try:
        return _TRACED, trace(_TRACED)
    except Exception:
        devices = jax.device_count()
        powers = (1 << power for power in range(2, max(size, devices).bit_length() + 1))
        for count in dict.fromkeys((*powers, *range(3, min(devices, _TRIED) + 1), devices, size)):
            with contextlib.suppress(Exception):
                program = trace(count)
                if program.is_split:
                    return count, program
        raise


def _same(rows: Sequence[Any], others: Sequence[Any]) -> bool:
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(rows, others, strict=True)]
    return all(np.array_equal(a, b) or a.tobytes() == b.tobytes() for a, b in pairs)  # a NaN is alike itself


def _rows(columns: Sequence[Any], index: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(column)[index] for column in columns)


def _cast(leaf: Any, dtype: Any) -> Any:
    return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _alike(a: np.ndarray, b: np.ndarray) -> bool:
    """Returns whether two arrays [B, ...] are the same but for rounding: a program may add rows in another order.

    Rounding shows in nothing that is large among all values, and in few that are large among their like: a constant of
    -1e9 in one place of each row must not hide what differs in the others.
    """
    if a.tobytes() == b.tobytes():
        return True
    if a.dtype == bool:
        return False
    if not jnp.issubdtype(a.dtype, jnp.inexact):  # what was rounded to whole numbers may have lain on an edge
        return float(np.mean(a != b)) <= _FEW and bool(np.all((a == b) | (a == b + 1) | (a + 1 == b)))
    return not np.any(_unlike(a, b)) and float(np.mean(_unlike(a, b, per_value=True))) <= _FEW


def _unlike(a: np.ndarray, b: np.ndarray, *, per_value: bool = False) -> np.ndarray:
    """Returns where two floating arrays [B, ...] differ by more than rounding.

    Args:
      a, b: the arrays.
      per_value: whether the measure is the largest of each value over the rows, and not the largest of all values.
    """
    tolerance = float(jnp.finfo(a.dtype).eps) ** 0.5
    wide = np.complex128 if jnp.issubdtype(a.dtype, jnp.complexfloating) else np.float64
    a, b = a.astype(wide), b.astype(wide)
    axis = 0 if per_value else None
    scale = np.max(np.abs(a), axis=axis, keepdims=True, initial=0, where=np.isfinite(a))
    return ~np.isclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
