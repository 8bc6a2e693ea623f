"""A function traced for arguments of certain shapes: what it is, as a digest, and what comes out of it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxkv.errors import NotSupportedError
from jaxkv.memo.hashing import Hash

_ADDRESS = re.compile(r"0x[0-9a-f]+")
_DEFINED = re.compile(r'func\.func (?:\w+ )?@([\w$.-]+|"[^"]*")')
_SYMBOL = re.compile(r'@([\w$.-]+|"[^"]*")')


class Program:
    """A function traced for arguments of certain shapes: what it is, and what comes out.

    Args:
      function: called as function(params, *arguments).
      params: pytree of arrays.
      arguments: pytrees of arrays or of ShapeDtypeStruct.
      version: what the user says about it; needed where it calls back into Python.

    Attributes:
      out: pytree of ShapeDtypeStruct.
      text: digest of the program, in hex.
      used: for each leaf of params whether the program reads it.
      is_split: whether it splits arrays over devices itself.

    Raises:
      NotSupportedError: if it calls back into Python, and there is no version.
    """

    def __init__(
        self, function: Callable[..., Any], params: Any, arguments: Sequence[Any], version: str | None
    ) -> None:
        def memoized(*args: Any) -> Any:  # the name stands in the program: it must not be the user's
            return function(*args)

        traced = jax.jit(memoized).trace(*jax.tree.map(_unplaced, (params, *arguments)))
        self.out = traced.out_info
        primitives = {eqn.primitive.name for eqn in _equations(traced.jaxpr.jaxpr)}
        self.is_split = "shard_map" in primitives
        callbacks = sorted(name for name in primitives if "callback" in name or name == "debug_print")
        if callbacks and version is None:
            raise NotSupportedError(
                f"the function calls back into Python ({', '.join(callbacks)}), whose code a memo can't check for "
                'changes; give version="1", and another version whenever the Python code changes'
            )
        digest = hashlib.blake2b(digest_size=16)
        # Lowered, a callback is a number of this process; before that, it is a name, an address and what it is given.
        text = _ADDRESS.sub("", str(traced.jaxpr)) if callbacks else _unnamed(traced.lower().as_text())
        digest.update(text.encode())
        hashing = Hash("blake2b")
        for constant in _constants(traced.jaxpr):
            digest.update(digest_of(constant, hashing).encode())
        self.text = digest.hexdigest()
        jaxpr = traced.jaxpr.jaxpr
        read = {id(var) for eqn in jaxpr.eqns for var in eqn.invars} | {id(var) for var in jaxpr.outvars}
        self.used = [id(var) in read for var in jaxpr.invars[: len(jax.tree.leaves(params))]]


def _unplaced(leaf: Any) -> Any:
    """Returns an array without its place: the program is the same wherever the parameters lie."""
    if not isinstance(leaf, jax.Array):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=getattr(leaf, "weak_type", False))


def _unnamed(text: str) -> str:
    """Returns a lowered program with numbers for the names of its functions, which are those of jitted helpers."""
    numbers = {name: f"@{number}" for number, name in enumerate(dict.fromkeys(_DEFINED.findall(text)))}
    return _SYMBOL.sub(lambda symbol: numbers.get(symbol[1], symbol[0]), text)


def digest_of(array: Any, hashing: Hash) -> str:
    """Returns dtype, shape and content of an array or a scalar, as text."""
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        name = f"key<{jax.random.key_impl(array)}>"
        array = jax.random.key_data(array)
    else:
        array = array if isinstance(array, jax.Array) else np.asarray(array)
        name = array.dtype.name
    if not hashing.on_device:
        array = np.asarray(array)  # before an axis is added, for which JAX would compile a program per shape, and copy
    return f"{name}{list(array.shape)}:{hashing.rows([array[None]])[0].hex()}"


def paths_of(tree: Any) -> list[str]:
    """Returns where each leaf of a pytree stands in it."""
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _equations(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in _inner(eqn):
            yield from _equations(inner.jaxpr if isinstance(inner, core.ClosedJaxpr) else inner)


def _constants(closed: Any) -> Iterator[Any]:
    """Yields the arrays that are baked into a program (with jax_use_simplified_jaxpr_constants its text lacks them)."""
    if isinstance(closed, core.ClosedJaxpr):
        yield from closed.consts
    for eqn in (closed.jaxpr if isinstance(closed, core.ClosedJaxpr) else closed).eqns:
        yield from (var.val for var in eqn.invars if isinstance(var, core.Literal))
        for inner in _inner(eqn):
            yield from _constants(inner)


def _inner(eqn: Any) -> Iterator[Any]:
    """Yields the programs within an equation: bodies of jit, scan, cond, while and the like."""
    for value in eqn.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, core.ClosedJaxpr | core.Jaxpr):
                yield part
