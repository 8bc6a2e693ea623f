"""The leaves of a module: their names, what they are, and values that are put in their place."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import GetAttrKey, keystr, tree_flatten_with_path, tree_leaves_with_path, tree_map_with_path

from jaxkv.casting import unheld
from jaxkv.kinds import kind_of
from jaxkv.nn.buffers import Buffer, TransientBuffer

# Left by a forward pass, or made for the next one.
_TRANSIENT = (TransientBuffer, nnx.Intermediate, nnx.Cache)
_TRANSIENT_COLLECTION = "transient_buffers"
_COLLECTION = "buffers"
# Each holds the values of those before it.
_KINDS = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)


def named(tree: Any) -> dict[str, Any]:
    """Returns every leaf of a tree by name.

    Args:
      tree: an `nnx.State`, or nested dicts and lists.

    >>> named({"mlp": [{"kernel": 1}, {"kernel": 2}]})
    {'mlp.0.kernel': 1, 'mlp.1.kernel': 2}
    """
    return {name_of(path): leaf for path, leaf in tree_leaves_with_path(tree)}


def name_of(path: Any) -> str:
    """Returns the name of a leaf from its path in a tree, as `named` gives it."""
    # GetAttrKey("value") is how one gets into an nnx.Variable, or into a box of linen's metadata.
    return _joined(key for key in path if key != GetAttrKey("value"))


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a module; `saved` says whether a state has it, `ref` is the Ref that holds it, if one does."""

    name: str
    value: Any
    saved: bool
    is_rng: bool
    ref: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        return np.shape(self.value) + (_key_data(self.value).shape[-1:] if _is_key(self.value) else ())

    @property
    def dtype(self) -> Any:
        if _is_key(self.value):
            return _key_data(self.value).dtype
        return self.value.dtype if hasattr(self.value, "dtype") else jnp.result_type(self.value)

    @property
    def abstract(self) -> bool:
        return isinstance(self.value, jax.ShapeDtypeStruct)

    @property
    def node(self) -> Any:
        """What stands in the tree."""
        return self.value if self.ref is None else self.ref

    def filled(self, value: Any, in_place: bool) -> Any:
        """Returns what is to stand in the tree with a value; a Ref is written into, or stays and another one comes."""
        if self.ref is None:
            return value
        if not in_place:
            return jax.new_ref(value)
        self.ref[...] = value
        return self.ref

    def misfit(self, value: Any) -> str:
        """Returns why a value can't be put here, "" if it can."""
        try:
            array = as_array(value)
        except ValueError as error:
            return f"value: {self.name} is {error}"
        if isinstance(array, jax.ShapeDtypeStruct):
            return f"value: {self.name} is a jax.ShapeDtypeStruct, which has no values"
        if array.shape != self.shape:
            return f"shape: {self.name} is {array.shape}, here {self.shape}"
        lost = f"dtype: {self.name} is {array.dtype}, with values that {self.dtype} here can't hold"
        if _kind(array.dtype) > max(_kind(self.dtype), 1):
            return lost
        value = unheld(array, self.dtype)
        return "" if value is None else f"{lost}, such as {value!s}; give the module a wider dtype, or clip them"

    def like(self, value: Any) -> Any:
        """Returns a copy of an array with the dtype and the place of this one."""
        here = self.value
        if isinstance(here, np.ndarray):
            return np.array(value, here.dtype)
        with jax.enable_x64(True) if self.dtype.itemsize >= 8 else contextlib.nullcontext():
            return self._placed(value)

    def _placed(self, value: Any) -> Any:
        here = self.value
        if _is_key(here):
            value = jax.random.wrap_key_data(jnp.array(np.asarray(value)), impl=_impl(here))
        else:
            # A fresh copy, which device_put may keep: it must share no bytes with the caller or the file.
            value = np.array(value, self.dtype)
        if getattr(here, "committed", True) and getattr(here, "sharding", None) is not None:
            return jax.device_put(value, here.sharding)
        return jnp.asarray(value)


def leaves(tree: Any) -> Iterator[Leaf]:
    """Yields the leaves of what `tree_of` returned, in the order in which JAX flattens it."""
    nodes = tree_leaves_with_path(tree, is_leaf=_is_variable)
    of_nnx = isinstance(tree, nnx.State) or any(_is_variable(node) for _, node in nodes)
    for path, node in nodes:
        is_rng = isinstance(node, nnx.RngState)
        if of_nnx:
            saved = _is_variable(node) and not is_rng and not isinstance(node, _TRANSIENT)
        else:
            saved = name_of(path[:1]) != _TRANSIENT_COLLECTION
        for rest, value in tree_leaves_with_path(node):
            ref = value if isinstance(value, jax.Ref) else None
            yield Leaf(name_of((*path, *rest)), value if ref is None else ref[...], saved, is_rng, ref)


def tree_of(module: Any) -> Any:
    """Returns the tree that has a module's leaves.

    Raises:
      ValueError: for what can have none.
    """
    if isinstance(module, flax.linen.Module):
        raise ValueError(f"{type(module).__name__} is a linen module, which holds nothing; give its variables")
    if is_module(module):
        return nnx.state(module)
    if module is None or _is_variable(module) or jax.tree_util.all_leaves([module]):
        what = f"the class {module.__name__}" if isinstance(module, type) else kind_of(module)
        raise ValueError(f"{what} has no arrays with names; give an nnx module, an nnx.State or linen variables")
    return module


def empty(tree: Any) -> set[str]:
    """Returns the names of buffers that hold None."""
    nodes = tree_leaves_with_path(tree, is_leaf=_is_node)
    return {name_of(path) for path, node in nodes if _is_empty(path, node)}


def with_room(tree: Any, state: Mapping[str, Any]) -> Any:
    """Returns the tree with abstract arrays, of the state's shapes and dtypes, in buffers that hold None."""

    def room(path: Any, node: Any) -> Any:
        if not _is_empty(path, node) or name_of(path) not in state:
            return node
        try:
            array = as_array(state[name_of(path)])
        except ValueError:
            return node
        abstract = jax.ShapeDtypeStruct(array.shape, jax.dtypes.canonicalize_dtype(array.dtype))
        return node.replace(abstract) if _is_variable(node) else abstract

    return tree_map_with_path(room, tree, is_leaf=_is_node)


def tied(module: Any, known: Collection[str]) -> dict[str, str]:
    """Returns the further names of Variables that an nnx module has under several: each with the known one."""
    names = collections.defaultdict(list)
    for path, variable in _ways(module) if is_module(module) else ():
        names[id(variable)].append(_joined(path))
    return {other: name for ways in names.values() for name in ways if name in known for other in ways if other != name}


def _ways(node: Any, path: tuple = (), above: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """Yields every way to a Variable, and it; not around a cycle again."""
    if _is_variable(node):
        yield path, node
    elif id(node) not in above:
        itself = iter([True])  # is asked about first; what is in it is not looked into
        for key, child in tree_flatten_with_path(node, is_leaf=lambda _: not next(itself, False))[0]:
            if key:
                yield from _ways(child, path + key, (*above, id(node)))


def _joined(path: Any) -> str:
    return ".".join(keystr((key,), simple=True) for key in path)


def is_module(x: Any) -> bool:
    """Whether x is an nnx module, or holds some."""

    def one(node: Any) -> bool:
        return isinstance(node, nnx.Pytree) and not _is_variable(node)

    return any(map(one, jax.tree.leaves(x, is_leaf=one)))


def as_array(x: Any) -> Any:
    """Returns an array as it can be saved: of keys, their data.

    Raises:
      ValueError: if it is none, saying what it is.
    """
    if isinstance(x, jax.Ref):
        x = x[...]
    elif _is_variable(x):
        x = x.get_value()
    if _is_key(x):
        return _key_data(x)
    if isinstance(x, np.ma.MaskedArray):
        raise ValueError("a masked array, whose mask would be lost; give array.filled()")
    try:
        array = x if isinstance(getattr(x, "dtype", None), np.dtype) else np.asarray(x)
    except (TypeError, ValueError, RuntimeError) as error:  # such as PyTorch's, of bfloat16 and of gradients
        raise ValueError(f"a {type(x).__name__} that NumPy can't read: {error}") from error
    if not any(jnp.issubdtype(array.dtype, kind) for kind in _KINDS):
        raise ValueError(f"a {type(x).__name__}, which is not an array")
    return array


def _kind(dtype: Any) -> int:
    return max(i for i, kind in enumerate(_KINDS) if jnp.issubdtype(dtype, kind))


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _is_node(x: Any) -> bool:
    return x is None or _is_variable(x)


def _is_empty(path: Any, node: Any) -> bool:
    if _is_variable(node):
        return isinstance(node, Buffer) and not isinstance(node, _TRANSIENT) and node.get_value() is None
    return node is None and name_of(path[:1]) == _COLLECTION


def _is_key(x: Any) -> bool:
    return isinstance(x, (jax.Array, jax.ShapeDtypeStruct)) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _key_data(x: Any) -> Any:
    return jax.eval_shape(jax.random.key_data, x) if isinstance(x, jax.ShapeDtypeStruct) else jax.random.key_data(x)


def _impl(key: Any) -> Any:
    """Returns the algorithm of a key, of a `jax.ShapeDtypeStruct` too: while tracing JAX says it."""
    found: list[Any] = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), key)
    return found[0]
