"""One call of a memoized function: which arguments are items, which belong to all of them, which are settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.errors import NotSupportedError
from jaxkv.kinds import kind_of
from jaxkv.memo.function import is_static, say_static


@dataclasses.dataclass(frozen=True)
class Form:
    """What calls must have in common to be answered by one program.

    Attributes:
      treedef: of the arguments by name.
      leaves: for each leaf ("item", dtype, shape without the batch axis), ("shared", dtype, shape) or ("static", text).
    """

    treedef: Any
    leaves: tuple[tuple[Any, ...], ...]

    def __str__(self) -> str:
        # With shapes, because classes may look at those of what they hold.
        shapes = [jax.ShapeDtypeStruct(leaf[2] if len(leaf) > 2 else (), np.float32) for leaf in self.leaves]
        named = jax.tree.unflatten(self.treedef, shapes)
        paths = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in _with_paths(named)]
        return ", ".join(f"{path}: {_said(leaf)}" for path, leaf in zip(paths, self.leaves, strict=True))


def _said(leaf: tuple[Any, ...]) -> str:
    if leaf[0] == "static":
        return leaf[1].partition(":")[2]
    return f"{leaf[1]}[{','.join(map(str, leaf[2]))}]" + (" (shared)" if leaf[0] == "shared" else "")


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of one call.

    Attributes:
      form: what they look like.
      size: how many items B.
      columns: arrays [B, ...], what each item has of its own.
      shared: arrays that belong to all items.
      statics: the other leaves.
    """

    form: Form
    size: int
    columns: tuple[Any, ...]
    shared: tuple[Any, ...]
    statics: tuple[Any, ...]

    @classmethod
    def read(cls, named: dict[str, Any], shared: Collection[str], groups: Collection[str]) -> Call:
        """Returns the call with these arguments by name.

        Args:
          named: pytrees by the name of the argument.
          shared: names of arguments whose arrays belong to all items.
          groups: names under which there are several arguments by their own names.

        Raises:
          NotSupportedError: while JAX traces.
          ValueError: for arguments that can't be part of a key, and arrays that don't have one batch axis.
        """
        leaves, treedef = jax.tree.flatten(named)
        parts: dict[str, list[Any]] = {"item": [], "shared": [], "static": []}
        kinds: list[tuple[Any, ...]] = []
        names = list(_names(named, groups)) if shared else ()
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, jax.core.Tracer):
                raise NotSupportedError(
                    "a memo looks values up, and here they are not known yet: jit, grad, vmap or scan is tracing. Call "
                    "the memoized function outside and pass its result in"
                )
            if isinstance(leaf, np.ndarray | jax.Array):
                array = _checked(leaf, named, i)
                if array.ndim == 0 or (shared and names[i] in shared):
                    weak = ("weak",) if getattr(array, "weak_type", False) else ()  # promotes another way
                    kinds.append(("shared", array.dtype.name, array.shape, *weak))
                    parts["shared"].append(array)
                else:
                    kinds.append(("item", array.dtype.name, array.shape[1:]))
                    parts["item"].append(array)
            elif isinstance(leaf, np.bool_ | np.character):
                kinds.append(("static", say_static(leaf.item())))
                parts["static"].append(leaf.item())
            elif isinstance(leaf, np.generic):
                kinds.append(("shared", leaf.dtype.name, ()))
                parts["shared"].append(np.asarray(leaf))
            elif is_static(leaf):
                kinds.append(("static", say_static(leaf)))
                parts["static"].append(leaf)
            else:
                raise ValueError(
                    f"{_path(named, i)} is {kind_of(leaf)}; arguments are arrays of NumPy or JAX with the "
                    "items along the first axis, scalars, strings, enums and dtypes; "
                    + (
                        "give np.asarray of it"
                        if hasattr(leaf, "__array__")
                        else "bind anything else before wrapping: functools.partial(f, setting=...)"
                    )
                )
        sizes = {len(column) for column in parts["item"]}
        if len(sizes) != 1:
            raise ValueError(_sizes(named, kinds, leaves))
        return cls(
            Form(treedef, tuple(kinds)),
            sizes.pop(),
            tuple(parts["item"]),
            tuple(parts["shared"]),
            tuple(parts["static"]),
        )


def arguments(form: Form, columns: Sequence[Any], shared: Sequence[Any], statics: Sequence[Any]) -> dict[str, Any]:
    """Returns the arguments by name, put together again from their parts."""
    parts = {"item": iter(columns), "shared": iter(shared), "static": iter(statics)}
    return jax.tree.unflatten(form.treedef, [next(parts[leaf[0]]) for leaf in form.leaves])


def _names(named: dict[str, Any], groups: Collection[str]) -> Iterator[str]:
    """Yields for each leaf the name of the argument it belongs to. (JAX sorts what is in a dict.)"""
    for group in sorted(named):
        values = named[group] if group in groups else {group: named[group]}
        for name in sorted(values):
            yield from [name] * len(jax.tree.leaves(values[name]))


def _checked(array: Any, named: Any, index: int) -> Any:
    if isinstance(array, jax.Array):
        if not array.is_fully_addressable:
            raise NotSupportedError(
                f"{_path(named, index)} lies on devices of several processes; give each process its part of the batch"
            )
        if array.ndim and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            raise ValueError(f"{_path(named, index)} are PRNG keys; give their jax.random.key_data")
        return array
    if isinstance(array, np.ma.MaskedArray):
        raise ValueError(f"{_path(named, index)} is a masked array, which JAX can't compute with; give array.filled()")
    if array.dtype.kind in "OSUMm" or array.dtype.names:
        raise ValueError(f"{_path(named, index)} is an array of {array.dtype}, which JAX can't compute with")
    return native(array)


def native(array: np.ndarray) -> np.ndarray:
    """Returns an array in this machine's byte order, in which items are hashed."""
    return np.asarray(array, array.dtype.newbyteorder("="))


def _with_paths(tree: Any) -> list[Any]:
    return jax.tree_util.tree_leaves_with_path(tree)


def _path(named: Any, index: int) -> str:
    return jax.tree_util.keystr(_with_paths(named)[index][0], simple=True, separator=".")


def _sizes(named: Any, kinds: Sequence[Any], leaves: Sequence[Any]) -> str:
    shapes = [f"{_path(named, i)} {leaves[i].shape}" for i, kind in enumerate(kinds) if kind[0] == "item"]
    if not shapes:
        return "no argument has items: give at least one array whose first axis is the batch"
    return (
        f"the arrays must have one batch axis, and have {', '.join(shapes)}; name arguments that belong to all items: "
        'memo.wrap(f, shared=("mask",))'
    )
