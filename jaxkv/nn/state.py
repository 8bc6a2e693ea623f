"""What a module holds, by name: as a dict, into a module again, and in a file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import GetAttrKey, tree_leaves_with_path

from jaxkv import safetensors
from jaxkv.nn.buffers import TransientBuffer

# Left by a forward pass, or made for the next one.
_TRANSIENT = (TransientBuffer, nnx.Intermediate, nnx.Cache)
_TRANSIENT_COLLECTION = "transient_buffers"


def state_dict(module: Any, *, rngs: bool = False) -> dict[str, Any]:
    """Returns what a module holds, by name.

    Names are paths joined by dots, "layers.0.mlp.up.kernel"; those of linen variables begin with the collection,
    "params.Dense_0.kernel". PRNG keys come as their key data.

    Args:
      module: an `nnx` module or `nnx.State`, of which all Variables are taken but TransientBuffer, Cache and
        Intermediate (a plain array attribute is no Variable); or linen variables, any nested dicts and lists of
        arrays, of which everything is taken but the collection "transient_buffers".
      rngs: whether the random streams of an nnx module (`nnx.RngState`, such as dropout has) are taken too. They say
        where a run is, not what the model is, so they are left out as a rule.

    Returns:
      The arrays themselves, not copies: `jax.Array`, or NumPy where the module holds NumPy.

    Raises:
      ValueError: if two leaves have the same name, or for a linen module without its variables.

    >>> from flax import nnx
    >>> {name: x.shape for name, x in jaxkv.state_dict(nnx.Linear(2, 3, rngs=nnx.Rngs(0))).items()}
    {'bias': (3,), 'kernel': (2, 3)}
    >>> jaxkv.state_dict({"params": {"scale": jnp.ones(1)}, "buffers": {"steps": [jnp.zeros(1), jnp.ones(1)]}}).keys()
    dict_keys(['buffers.steps.0', 'buffers.steps.1', 'params.scale'])
    """
    found: dict[str, Any] = {}
    for leaf in _leaves(_tree(module)):
        if leaf.saved or (rngs and leaf.is_rng):
            if leaf.name in found:
                raise ValueError(f"two leaves are named {leaf.name}; rename one, names are the paths joined by dots")
            found[leaf.name] = _data(leaf.value)
    return found


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What `load_state_dict` did. Unpacks as `missing, unexpected`, as PyTorch's does.

    Attributes:
      variables: the tree with the new values; an nnx module given was changed, and is here as well.
      missing: names of the module that were not in the state.
      unexpected: names of the state that the module doesn't have.
    """

    variables: Any = dataclasses.field(repr=False)
    missing: list[str]
    unexpected: list[str]

    def __iter__(self) -> Iterator[list[str]]:
        return iter((self.missing, self.unexpected))


def load_state_dict(module: Any, state: Mapping[str, Any], *, strict: bool = True) -> Loaded:
    """Puts arrays by name into a module: all of them, or nothing if something doesn't fit.

    Values are copied, cast to the dtype that is there and put where it is: the sharding stays.

    Args:
      module: an `nnx` module, changed in place; or linen variables or an `nnx.State`, which stay as they are: take
        `.variables` of the result. Leaves may be `jax.ShapeDtypeStruct`.
      state: arrays by name, JAX's or NumPy's, as `state_dict` gives them. Random streams are loaded if they are there,
        and not missed if they aren't.
      strict: whether missing and unexpected names are errors.

    Returns:
      A Loaded: `.variables`, `.missing`, `.unexpected`; unpacks as `missing, unexpected`.

    Raises:
      ValueError: naming every array of another shape and, if strict, all that is missing or unexpected.

    >>> from flax import nnx
    >>> model = nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0))
    >>> missing, unexpected = jaxkv.load_state_dict(model, {"kernel": np.eye(2)})
    >>> model.kernel[0].tolist()
    [1.0, 0.0]
    >>> jaxkv.load_state_dict({"params": {"scale": jnp.zeros(2)}}, {"params.scale": [1, 2]}).variables
    {'params': {'scale': Array([1., 2.], dtype=float32)}}
    """
    tree = _tree(module)
    leaves = list(_leaves(tree))
    known = {leaf.name for leaf in leaves if leaf.saved or leaf.is_rng}
    absent = [leaf for leaf in leaves if leaf.saved and leaf.name not in state]
    unexpected = [name for name in state if name not in known]
    given = {name: _data(state[name]) for name in known if name in state}
    problems = []
    for leaf in leaves:
        if leaf.name in given and given[leaf.name].shape != leaf.shape:
            problems.append(f"shape: {leaf.name} is {given[leaf.name].shape}, here {leaf.shape}")
    if strict:
        problems += [f"missing: {leaf.name} {leaf.shape}" for leaf in absent]
        problems += [f"unexpected: {name} {np.shape(_data(state[name]))}" for name in unexpected]
    if problems:
        cure = "; strict=False leaves names that are missing or unexpected aside" if strict else ""
        raise ValueError(f"the state does not fit the module{cure}:\n  " + "\n  ".join(problems))

    new = [_like(given[leaf.name], leaf.value) if leaf.name in given else leaf.value for leaf in leaves]
    tree = jax.tree.unflatten(jax.tree.structure(tree), new)
    if _is_module(module):
        nnx.update(module, tree)
        tree = module
    return Loaded(tree, [leaf.name for leaf in absent], unexpected)


def save_state(
    path: str | os.PathLike[str],
    module: Any,
    *,
    dtype: Any = None,
    metadata: Mapping[str, str] | None = None,
    rngs: bool = False,
) -> None:
    """Writes the `state_dict` of a module as safetensors: whole, or not at all.

    Args:
      path: the file, replaced if it is there.
      module: as for `state_dict`.
      dtype: floating arrays are cast to it; None keeps their own.
      metadata: strings by name, put into the header.
      rngs: as for `state_dict`.

    Raises:
      ValueError: as `state_dict`, or for a dtype that safetensors doesn't know.

    >>> import os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "mask.safetensors")
    >>> jaxkv.save_state(path, {"buffers": {"mask": jnp.ones((2, 2), jnp.bfloat16).T}})
    >>> jaxkv.load_state(path)["buffers.mask"].dtype
    dtype(bfloat16)
    """
    safetensors.write(path, state_dict(module, rngs=rngs), dtype=dtype, metadata=metadata)


def load_state(path: str | os.PathLike[str], module: Any = None, *, strict: bool = True) -> Any:
    """Reads a safetensors file into a module, or, without one, as arrays by name.

    Args:
      path: the file.
      module: as for `load_state_dict`; None returns what the file holds.
      strict: as for `load_state_dict`.

    Returns:
      With a module what `load_state_dict` returns. Without one `{name: array}`, read-only NumPy arrays whose bytes are
      read when they are touched.

    Raises:
      OSError: if the file can't be opened.
      ValueError: if it is no safetensors file or is damaged; and as `load_state_dict`, naming the file.
    """
    file = safetensors.File(path)
    if module is None:
        return dict(file)
    try:
        return load_state_dict(module, file, strict=strict)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error


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
    parts = [jax.tree_util.keystr((key,), simple=True) for key in path if key != GetAttrKey("value")]
    return ".".join(parts)


@dataclasses.dataclass(frozen=True)
class _Leaf:
    name: str
    value: Any
    saved: bool
    is_rng: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return np.shape(self.value) + (_key_data(self.value).shape[-1:] if _is_key(self.value) else ())


def _leaves(tree: Any) -> Iterator[_Leaf]:
    """Yields the leaves in the order in which JAX flattens the tree."""
    nodes = tree_leaves_with_path(tree, is_leaf=_is_variable)
    of_nnx = isinstance(tree, nnx.State) or any(_is_variable(node) for _, node in nodes)
    for path, node in nodes:
        is_rng = isinstance(node, nnx.RngState)
        if of_nnx:
            saved = _is_variable(node) and not is_rng and not isinstance(node, _TRANSIENT)
        else:
            saved = name_of(path[:1]) != _TRANSIENT_COLLECTION
        for rest, value in tree_leaves_with_path(node):
            yield _Leaf(name_of((*path, *rest)), value, saved, is_rng)


def _tree(module: Any) -> Any:
    if isinstance(module, flax.linen.Module):
        raise ValueError(f"{type(module).__name__} is a linen module, which holds nothing; give its variables")
    return nnx.state(module) if _is_module(module) else module


def _is_module(x: Any) -> bool:
    """Whether x is an nnx module, or holds some."""

    def one(node: Any) -> bool:
        return isinstance(node, nnx.Pytree) and not _is_variable(node)

    return any(map(one, jax.tree.leaves(x, is_leaf=one)))


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _is_key(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _key_data(x: Any) -> Any:
    return jax.eval_shape(jax.random.key_data, x) if isinstance(x, jax.ShapeDtypeStruct) else jax.random.key_data(x)


def _impl(key: Any) -> Any:
    """Returns the algorithm of a key, of a `jax.ShapeDtypeStruct` too: while tracing JAX says it."""
    found: list[Any] = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), key)
    return found[0]


def _data(x: Any) -> Any:
    """Returns an array as it can be saved."""
    if _is_key(x):
        return _key_data(x)
    return x if hasattr(x, "shape") and hasattr(x, "dtype") else np.asarray(x)


def _like(value: Any, like: Any) -> Any:
    """Returns a copy of an array with the dtype and the place of another."""
    if isinstance(like, np.ndarray):
        return np.array(value, like.dtype)
    if _is_key(like):
        value = jax.random.wrap_key_data(jnp.array(np.asarray(value)), impl=_impl(like))
    else:
        # A fresh copy, which device_put may keep: it must share no bytes with the caller or the file.
        value = np.array(value, getattr(like, "dtype", None))
    if getattr(like, "committed", True) and getattr(like, "sharding", None) is not None:
        return jax.device_put(value, like.sharding)
    return jnp.asarray(value)
