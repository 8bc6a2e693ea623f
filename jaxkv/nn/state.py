"""What a module holds, by name: as a dict, into a module again, and in a file."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxkv import safetensors
from jaxkv.errors import CacheError
from jaxkv.kinds import kind_of
from jaxkv.logs import log
from jaxkv.nn.leaves import Leaf, as_array, empty, is_module, leaves, tied, tree_of, with_room
from jaxkv.tracing import is_tracing

_MAKE_NNX = "nnx.update(module, jax.jit(lambda: nnx.state(make_module(), nnx.Not(nnx.Param)))())"
_MAKE_LINEN = 'variables |= jax.jit(lambda: {"transient_buffers": model.init(key, x)["transient_buffers"]})()'


def state_dict(module: Any, *, rngs: bool = False) -> dict[str, Any]:
    """Returns the arrays of a module by name.

    Names are paths joined by dots, "layers.0.mlp.up.kernel"; those of linen variables begin with the collection,
    "params.Dense_0.kernel". PRNG keys come as their key data.

    Args:
      module: an `nnx` module or `nnx.State`, of which all Variables are taken but TransientBuffer, Cache and
        Intermediate (a plain array attribute is no Variable); or linen variables, any nested dicts and lists of
        arrays, of which everything is taken but the collection "transient_buffers".
      rngs: whether the random streams of an nnx module (`nnx.RngState`, such as dropout has) are taken too. They say
        where a run is, not what the model is, so they are left out as a rule.

    Returns:
      The arrays themselves, not copies: `jax.Array`, or NumPy where the module holds NumPy. Of a Ref, what it holds.

    Raises:
      ValueError: if two leaves have the same name, for a leaf that is not an array or is masked, and for what holds
        none: a class, a linen module without its variables.

    >>> from flax import nnx
    >>> {name: x.shape for name, x in jaxkv.state_dict(nnx.Linear(2, 3, rngs=nnx.Rngs(0))).items()}
    {'bias': (3,), 'kernel': (2, 3)}
    >>> jaxkv.state_dict({"params": {"scale": jnp.ones(1)}, "buffers": {"steps": [jnp.zeros(1), jnp.ones(1)]}}).keys()
    dict_keys(['buffers.steps.0', 'buffers.steps.1', 'params.scale'])
    """
    found: dict[str, Any] = {}
    for leaf in _distinct(leaf for leaf in leaves(tree_of(module)) if leaf.saved or (rngs and leaf.is_rng)):
        try:
            found[leaf.name] = as_array(leaf.value)
        except ValueError as error:
            raise ValueError(f"{leaf.name} is {error}") from error
    return found


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What `load_state_dict` did. Unpacks as `missing, unexpected`, as PyTorch's does.

    Attributes:
      variables: the tree with the new values; an nnx module given was changed, and is here as well.
      missing: names of the module that were not in the state.
      unexpected: names of the state that the module doesn't have.
      mismatched: names whose arrays have other shapes in the state, and were left as they are.
    """

    variables: Any = dataclasses.field(repr=False)
    missing: list[str]
    unexpected: list[str]
    mismatched: list[str] = dataclasses.field(default_factory=list)

    def __iter__(self) -> Iterator[list[str]]:
        return iter((self.missing, self.unexpected))


def load_state_dict(module: Any, state: Mapping[str, Any], *, strict: bool = True, mismatched: str = "error") -> Loaded:
    """Puts arrays by name into a module: all of them, or nothing if something doesn't fit.

    Values are copied, cast to the dtype that is there and put where it is: the sharding stays. A Variable that an nnx
    module has under several names may be in the state under each, with equal values. A Buffer of None (in linen, None
    in the collection "buffers") is filled if the state has its name, with the dtype there, and not missed if not.

    Args:
      module: an `nnx` module, changed in place; or linen variables or an `nnx.State`, which stay as they are: take
        `.variables` of the result. Leaves may be `jax.ShapeDtypeStruct`, those that a state has not excepted.
      state: arrays by name, JAX's or NumPy's, as `state_dict` gives them. Random streams are loaded if they are there,
        and not missed if they aren't.
      strict: whether missing and unexpected names are errors. Without it a state that has no name of the module is
        warned of.
      mismatched: what happens to arrays of another shape: "error", or "skip" leaves those of the module as they are,
        with a warning that names them.

    Returns:
      A Loaded: `.variables`, `.missing`, `.unexpected`, `.mismatched`; unpacks as `missing, unexpected`.

    Raises:
      ValueError: naming all that does not fit: arrays of another shape, values that the dtype can't hold (it may round
        them), abstract leaves that no state has and, if strict, what is missing or unexpected; and for two leaves of
        one name.
      CacheError: while tracing.

    >>> from flax import nnx
    >>> model = nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0))
    >>> missing, unexpected = jaxkv.load_state_dict(model, {"kernel": np.eye(2)})
    >>> model.kernel[0].tolist()
    [1.0, 0.0]
    >>> jaxkv.load_state_dict({"params": {"scale": jnp.zeros(2)}}, {"params.scale": [1, 2]}).variables
    {'params': {'scale': Array([1., 2.], dtype=float32)}}
    """
    return _load(module, state, {}, strict, mismatched)


def _load(module: Any, state: Any, tied_names: Mapping[str, str], strict: bool, mismatched: str) -> Loaded:
    """Does what `load_state_dict` does; `tied_names` are further ones of arrays of the state."""
    _check_not_tracing("load_state_dict")
    if mismatched not in ("error", "skip"):
        raise ValueError(f"mismatched is {mismatched!r}, must be 'error' or 'skip'")
    tree = tree_of(module)
    _check_state(state)
    here = {leaf.name for leaf in leaves(tree) if leaf.saved or leaf.is_rng} | empty(tree)
    ties = tied(module, here)
    given, problems = _untied(_named_as_here(state, tied_names, here | ties.keys()), ties)
    tree = with_room(tree, given)
    all_leaves = _distinct(leaves(tree))
    known = {leaf.name: leaf for leaf in all_leaves if leaf.saved or leaf.is_rng}
    others = [name for name, value in given.items() if name in known and _has_other_shape(known[name], value)]
    skipped = others if mismatched == "skip" else []
    absent = [leaf for leaf in all_leaves if leaf.saved and leaf.name not in given]
    unexpected = [name for name in given if name not in known]
    found = {name: value for name, value in given.items() if name in known and name not in skipped}
    problems += filter(None, (known[name].misfit(value) for name, value in found.items()))
    problems += _left_abstract(leaf for leaf in all_leaves if not leaf.saved and leaf.name not in found)
    if strict:
        problems += [f"missing: {leaf.name} {leaf.shape}" for leaf in absent]
        problems += [f"unexpected: {name} {np.shape(given[name])}" for name in unexpected]
    if problems:
        cure = "; strict=False leaves names that are missing or unexpected aside" if strict else ""
        cure += '; mismatched="skip" leaves arrays of other shapes as they are' if others and not skipped else ""
        raise ValueError(f"the state does not fit the module{cure}:\n  " + "\n  ".join(problems))
    if skipped:
        said = ", ".join(f"{name} is {np.shape(given[name])}, here {known[name].shape}" for name in skipped)
        log.warning("left as they are, because they have other shapes in the state: %s", said)
    elif given and known and not found:
        names = next(iter(given)), next(iter(known))
        log.warning("nothing was loaded: the state has names such as %s, the module such as %s", *names)

    values = {name: known[name].like(as_array(value)) for name, value in found.items()}
    in_place = is_module(module)
    new = [leaf.filled(values[leaf.name], in_place) if leaf.name in values else leaf.node for leaf in all_leaves]
    tree = jax.tree.unflatten(jax.tree.structure(tree), new)
    if in_place:
        nnx.update(module, tree)
        tree = module
    return Loaded(tree, [leaf.name for leaf in absent], unexpected, skipped)


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
      path: the file, replaced if it is there; "~" is the home directory, and links are followed.
      module: as for `state_dict`.
      dtype: floating arrays are cast to it; None keeps their own.
      metadata: strings by name, put into the header.
      rngs: as for `state_dict`.

    Raises:
      ValueError: as `state_dict`; for a dtype that is not floating, that safetensors doesn't know or that can't hold
        the values, metadata that is not text, a leaf named "__metadata__", and abstract arrays.
      OSError: if there is no such folder, or it can't be written.
      CacheError: while tracing.

    >>> import os, tempfile
    >>> path = os.path.join(tempfile.mkdtemp(), "mask.safetensors")
    >>> jaxkv.save_state(path, {"buffers": {"mask": jnp.ones((2, 2), jnp.bfloat16).T}})
    >>> jaxkv.load_state(path)["buffers.mask"].dtype
    dtype(bfloat16)
    """
    _check_path(path, "save_state")
    _check_not_tracing("save_state")
    state = state_dict(module, rngs=rngs)
    for name, value in state.items():
        if isinstance(value, jax.ShapeDtypeStruct):
            raise ValueError(f"{name} is a jax.ShapeDtypeStruct, which has no values to save; load into it first")
    safetensors.write(path, state, dtype=dtype, metadata=metadata)


def load_state(
    path: str | os.PathLike[str], module: Any = None, *, strict: bool = True, mismatched: str = "error"
) -> Any:
    """Reads a safetensors file into a module, or, without one, as arrays by name.

    Names that stand only in the file's metadata, as PyTorch's `save_model` writes further names of tied weights, are
    names of the same array; a module that has one of them need not have the others.

    Args:
      path: the file; "~" is the home directory.
      module: as for `load_state_dict`; None returns the arrays of the file.
      strict, mismatched: as for `load_state_dict`.

    Returns:
      With a module what `load_state_dict` returns. Without one a dict of read-only NumPy arrays by name, whose bytes
      are read when they are touched.

    Raises:
      OSError: if the file can't be opened.
      ValueError: if it is not a safetensors file, or damaged, or a tensor that is asked for has a dtype that isn't
        known here; and as `load_state_dict`, naming the file.
    """
    _check_path(path, "load_state")
    file = safetensors.File(path)
    if module is None:
        arrays = dict(file)
        return arrays | {other: arrays[name] for other, name in file.tied.items()}
    try:
        state = {name: file[name] if file.is_known(name) else _Unknown(file, name) for name in file}
        return _load(module, state, file.tied, strict, mismatched)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error


class _Unknown:
    """A tensor that can't be read, which nobody may have asked for."""

    def __init__(self, file: safetensors.File, name: str) -> None:
        self.shape = file.shape(name)
        self._read = functools.partial(file.__getitem__, name)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self._read()


def _distinct(all_leaves: Iterable[Leaf]) -> list[Leaf]:
    found: dict[str, Leaf] = {}
    for leaf in all_leaves:
        if found.setdefault(leaf.name, leaf) is not leaf:
            raise ValueError(f"two leaves are named {leaf.name}; rename one, names are the paths joined by dots")
    return list(found.values())


def _named_as_here(state: Mapping[str, Any], tied_names: Mapping[str, str], known: set[str]) -> dict[str, Any]:
    """Returns the state with arrays of several names under those that are known, or else under the first."""
    here = {other: state[name] for other, name in tied_names.items() if other in known}
    only_elsewhere = {tied_names[other] for other in here} - known
    return {name: value for name, value in state.items() if name not in only_elsewhere} | here


def _untied(state: Mapping[str, Any], other_names: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Returns the state with one name for each Variable, and what contradicts that."""
    one = {name: value for name, value in state.items() if name not in other_names}
    problems = []
    for other, name in other_names.items():
        if other in state and not _equal(one.setdefault(name, state[other]), state[other]):
            problems.append(f"tied: {other} and {name} are one array here, and differ in the state")
    return one, problems


def _has_other_shape(leaf: Leaf, value: Any) -> bool:
    try:
        return as_array(value).shape != leaf.shape
    except ValueError:
        return False  # what is wrong with it is said elsewhere


def _equal(x: Any, y: Any) -> bool:
    if x is y:
        return True
    try:
        x, y = (np.asarray(as_array(value)) for value in (x, y))
    except ValueError:
        return x is y  # what is wrong with them is said elsewhere
    return x.shape == y.shape and bool(((x == y) | ((x != x) & (y != y))).all())  # NaN too


def _left_abstract(unsaved: Iterator[Leaf]) -> list[str]:
    abstract = [leaf for leaf in unsaved if leaf.abstract]
    if not abstract:
        return []
    recipe = _MAKE_LINEN if abstract[0].name.startswith("transient_buffers.") else _MAKE_NNX
    names = ", ".join(leaf.name for leaf in abstract)
    return [f"abstract: {names}: no state has these; make them before loading: {recipe}"]


def _check_state(state: Any) -> None:
    if isinstance(state, (str, os.PathLike)):
        raise ValueError(f"the state is {state!r}; load_state(path, module) reads a file")
    if is_module(state):
        raise ValueError(f"the state is a module, {type(state).__name__}; give load_state_dict(module, state)")
    if not isinstance(state, Mapping):
        raise ValueError(f"the state is {kind_of(state)}; give arrays by name, as state_dict returns them")
    for name, value in state.items():
        if isinstance(value, Mapping):
            raise ValueError(
                f"the state looks nested: {name!r} is {kind_of(value)}. Names are joined by dots, "
                "as jaxkv.state_dict(state) gives them"
            )


def _check_path(path: Any, call: str) -> None:
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"{call}: the path is {kind_of(path)}; give {call}(path, module)")


def _check_not_tracing(call: str) -> None:
    if is_tracing():
        raise CacheError(f"{call} is used under jit, grad or vmap, where arrays have no values; call it outside")
