"""What function is this? The function that is memoized, what it depends on, and a digest of all that.

A function is its program (StableHLO, with the constants that are baked into it), the arrays it reads besides its
arguments (parameters: path, dtype, shape and bytes), and what it was told (names and values of scalar arguments). What
can change between two calls is looked at before each: parameters, the state and the flags of an nnx module, and what a
plain function captures from around it.
"""

from __future__ import annotations

import enum
import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from jaxkv.kinds import kind_of
from jaxkv.memo.captured import captured
from jaxkv.memo.hashing import Hash
from jaxkv.memo.program import digest_of, paths_of
from jaxkv.memo.snapshot import Snapshot, flatten

_LINEN_KEYWORDS = ("rngs", "method", "mutable", "capture_intermediates")  # of apply itself, not of the module
_APPLY = "<apply>"  # the name under which they go


def _anything(*args: Any, **kwargs: Any) -> None: ...


_ANY = inspect.signature(_anything)


class Function:
    """A function, an nnx module, or a method of one, with everything it depends on besides its arguments.

    Args:
      target: a pure function, an nnx module or its method, or `apply` of a linen module.
      params: what a function is given before its arguments: pytrees of arrays.
      shared: names of arguments whose arrays belong to all items.

    Attributes:
      name: what people call it.
      shared: names of arguments whose arrays belong to all items.
      groups: names under which `bind` puts several arguments: those of `**kwargs`, and of linen's apply itself.

    Raises:
      ValueError: for functions that can't be memoized, saying why.
    """

    def __init__(self, target: Any, params: tuple[Any, ...], shared: Collection[str] = ()) -> None:
        while isinstance(target, jax.stages.Wrapped) and hasattr(target, "__wrapped__"):
            target = target.__wrapped__  # it is jitted anyway, with scalars as constants
        self._module, self._call = _module_of(target)
        if self._module is not None and params:
            raise ValueError(
                f"{type(self._module).__name__} is an nnx module and holds its own parameters; wrap it without others"
            )
        if self._module is None and (not callable(target) or inspect.iscoroutinefunction(target)):
            kind = "coroutine" if callable(target) else type(target).__name__
            raise ValueError(f"a {kind} can't be called by JAX; wrap a function or a Flax module")
        if inspect.isfunction(target) and next(iter(inspect.signature(target).parameters), None) == "self":
            raise ValueError(
                f"{target.__qualname__} is a method without its object; wrap it where that is: memo.wrap(it.method)"
            )
        if isinstance(target, linen.Module):
            raise ValueError(
                f"{type(target).__name__} is a linen module without parameters: memo.wrap(module.apply, variables)"
            )
        self._params = params
        self.name = _name(target)
        self._linen = isinstance(getattr(target, "__self__", None), linen.Module) and target.__name__ == "apply"
        self._signature = self._find_signature()
        names = self._signature.parameters
        unknown = [name for name in shared if name not in names and name not in _LINEN_KEYWORDS]
        if unknown and not any(p.kind is p.VAR_KEYWORD for p in names.values()):
            raise ValueError(f"shared names {', '.join(unknown)}; the arguments of {self.name} are {', '.join(names)}")
        self.shared = frozenset([*shared, *(["rngs"] if self._linen else [])])
        self.groups = frozenset([_APPLY, *(p.name for p in names.values() if p.kind is p.VAR_KEYWORD)])
        self._target = target
        self._captured: list[Callable[[], Any]] = []
        self._reached: list[nnx.Pytree] = []
        self._variables: list[nnx.Variable[Any]] = []
        self._fields: list[dict[str, Any]] = []
        self._containers: list[Any] = []
        self.rewatch()
        for value in [*self._flatten_captured(_is_module)[0], *self._reached] if self._module is None else ():
            if _is_module(value):
                raise ValueError(
                    f"{self.name} reads the nnx module {type(value).__name__} from outside, whose changes it would not "
                    "see; wrap the module itself: memo.wrap(module), or a method of it"
                )

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Returns the arguments by the names that the function gives them, with its simple defaults.

        Raises:
          TypeError: as a call of the function would.
        """
        own = {name: kwargs[name] for name in _LINEN_KEYWORDS if self._linen and name in kwargs}
        signature = self._signature_of(own)
        bound = signature.bind(*args, **{name: value for name, value in kwargs.items() if name not in own})
        last = len(bound.args)  # a positional-only argument can't be given where one before it is not
        defaults = {
            p.name: p.default
            for i, p in enumerate(signature.parameters.values())
            if p.name not in bound.arguments and (p.kind is not p.POSITIONAL_ONLY or i < last)
        }
        simple = {name: value for name, value in defaults.items() if value is None or is_static(value)}
        return simple | bound.arguments | ({_APPLY: own} if own else {})

    def call(self, static: Any, arrays: Any, named: dict[str, Any]) -> Any:
        """Returns the function's output, from what `read` returned and arguments as `bind` named them.

        A default isn't handed over: jax.vmap would take it for an array.
        """
        signature = self._signature_of(named.get(_APPLY, {}))
        if not any(named.get(p.name) for p in signature.parameters.values() if p.kind is p.VAR_POSITIONAL):
            defaults = {p.name: p.default for p in signature.parameters.values() if p.kind is not p.POSITIONAL_ONLY}
            named = {name: value for name, value in named.items() if value is not defaults.get(name, _anything)}
        bound = inspect.BoundArguments(signature, OrderedDict(named))
        args, kwargs = bound.args, bound.kwargs | named.get(_APPLY, {})
        if self._module is None:
            return self._call(*arrays, *args, **kwargs)
        before = dict(jax.tree_util.tree_leaves_with_path(arrays))  # the module may hold the very Variables
        module = nnx.merge(static, arrays)
        out = self._call(module, *args, **kwargs)
        changed = _changed(before, nnx.state(module))
        if changed:
            raise ValueError(
                f"{self.name} changes {', '.join(changed[:4])}{', ...' if changed[4:] else ''} while it runs, so its "
                "output is not a function of its input; call module.eval() first (BatchNorm, Dropout), or wrap a pure "
                "part of it (without nnx.jit and nnx.remat, which set all that they are given)"
            )
        return out

    def read(self) -> tuple[Any, Snapshot, Any]:
        """Returns what it depends on, as it is now: (a module's graphdef; what lies around it; a pytree of arrays)."""
        around = Snapshot(*self._flatten_captured())
        static, arrays = (None, self._params) if self._module is None else nnx.split(self._module)
        # Containers of our own: those of the user, and the Variables of a module, are set in place.
        return static, around, jax.tree.map(lambda leaf: leaf, arrays)

    def watch(self) -> tuple[list[Any], Any]:
        """Returns (values, their structure), of which something is another if anything has changed."""
        if self._module is None:
            return flatten((self._params, [read() for read in self._captured]))
        values, structure = self._flatten_captured()
        values += [variable.get_raw_value() for variable in self._variables]
        for fields in self._fields:
            values += fields.values()
        return values, structure

    def _flatten_captured(self, is_leaf: Callable[[Any], bool] | None = None) -> tuple[list[Any], Any]:
        return flatten((self._containers, [read() for read in self._captured]), is_leaf)

    def rewatch(self) -> None:
        """Looks up again what is to be watched: a part that was put in or taken out has changed its owner's fields."""
        if self._module is None:
            self._captured, self._reached = captured(self._target)
        else:
            nodes = [node for _, node in nnx.iter_graph(self._module)]
            self._variables = [node for node in nodes if isinstance(node, nnx.Variable)]
            owners = [node for node in nodes if isinstance(node, nnx.Pytree)]
            self._fields = [vars(node) for node in owners]
            self._captured, _ = captured(self._call, owners)
            held = [value for fields in self._fields for value in fields.values()]
            held += [variable.get_raw_value() for variable in self._variables]
            self._containers = [value for value in held if isinstance(value, list | tuple | dict | set)]

    def _find_signature(self) -> inspect.Signature:
        """Returns the signature of a call without the parameters."""
        if self._linen:
            return _signature(type(self._call.__self__).__call__, 1)  # type: ignore[attr-defined]
        return _signature(self._call, len(self._params) + (self._module is not None))

    def _signature_of(self, own: dict[str, Any]) -> inspect.Signature:
        """Returns the signature of a call: of another method if linen's apply was told one."""
        method = own.get("method")
        if not isinstance(method, str):  # None, or what is refused later
            return self._signature
        return _signature(getattr(type(self._call.__self__), method, None), 1)  # type: ignore[attr-defined]


class State:
    """What a function depends on besides its arguments, as it was at one time.

    Args:
      function: which.
      old: an earlier state, whose digests are taken over for arrays that are still the same.

    Attributes:
      seen: what `Function.watch` said.
      static: the graphdef of a module.
      around: what a function captures from around it.
      arrays: a pytree of the arrays it reads.

    Raises:
      ValueError: for parameters that are not arrays.
    """

    def __init__(self, function: Function, old: State | None = None) -> None:
        function.rewatch()
        self.seen = Snapshot(*function.watch())
        self.static, self.around, self.arrays = function.read()
        self._leaves = jax.tree.leaves(self.arrays)
        for path, leaf in zip(paths_of(self.arrays), self._leaves, strict=True):
            if not isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex):
                raise ValueError(
                    f"parameter {path} of {function.name} is {kind_of(leaf)}; parameters are pytrees of "
                    "arrays, bind anything else with functools.partial"
                )
        self._digests: list[str | None] = [None] * len(self._leaves)
        if old is not None and len(old._leaves) == len(self._leaves):
            self._digests = [
                None if leaf is not before or isinstance(leaf, np.ndarray) else known
                for leaf, before, known in zip(self._leaves, old._leaves, old._digests, strict=True)
            ]

    def check_there(self, name: str) -> None:
        """Raises ValueError if an array was deleted, by donation too: hits would still answer, and misses fail."""
        if not any(map(_is_deleted, self._leaves)) and not any(map(_is_deleted, self.around.values)):
            return
        gone = [path for path, leaf in zip(paths_of(self.arrays), self._leaves, strict=True) if _is_deleted(leaf)]
        what = f"parameter {gone[0]} of {name}" if gone else f"an array that {name} captures"
        raise ValueError(
            f"{what} was deleted, or donated to another function (donate_argnums); give the memo arrays of its own: "
            "memo.wrap(f, jax.tree.map(jnp.copy, params)), or memo.wrap(nnx.clone(module))"
        )

    def one_program(self, other: State) -> bool:
        """Returns whether what was traced for one state serves the other."""
        mine, its = (
            (s.static, s.around, jax.tree.structure(s.arrays), list(map(_kind, s._leaves))) for s in (self, other)
        )
        return mine == its

    def digest(self, index: int, hashing: Hash) -> str:
        """Returns dtype, shape and content of one of the arrays; each is read once, however many states hold it."""
        known = self._digests[index]
        if known is None:
            known = self._digests[index] = digest_of(self._leaves[index], hashing)
        return known


def _kind(leaf: Any) -> tuple[Any, ...]:
    python = type(leaf) if isinstance(leaf, bool | int | float | complex) else None
    return python, np.shape(leaf), jnp.result_type(leaf), getattr(leaf, "weak_type", False)


def _is_deleted(value: Any) -> bool:
    return isinstance(value, jax.Array) and value.is_deleted()


def _is_module(value: Any) -> bool:
    return isinstance(value, nnx.Module)


def _signature(target: Any, skip: int) -> inspect.Signature:
    """Returns the signature of a function without its first parameters."""
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return _ANY
    parameters = list(signature.parameters.values())
    positional = [p for p in parameters[:skip] if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < skip:  # *args takes them
        return _ANY
    return signature.replace(parameters=parameters[skip:])


def is_static(value: Any) -> bool:
    """Returns whether an argument is part of the key by its value: scalars of Python, strings, enums, dtypes."""
    if isinstance(value, bool | int | float | complex | str | bytes | enum.Enum | np.dtype):
        return True
    return isinstance(value, type(jnp.float32)) or (isinstance(value, type) and issubclass(value, np.generic))


def say_static(value: Any) -> str:
    """Returns a static argument as text, the same in every process."""
    if isinstance(value, np.dtype | type(jnp.float32) | type):
        return f"dtype:{jnp.dtype(value).name}"
    if isinstance(value, enum.Enum):
        of = f"={value.value!r}" if is_static(value.value) and not isinstance(value.value, enum.Enum) else ""
        return f"{type(value).__module__}.{type(value).__qualname__}:{value.name}{of}"
    return f"{type(value).__name__}:{value!r}"


def _module_of(target: Any) -> tuple[nnx.Module | None, Callable[..., Any]]:
    """Returns (an nnx module or None, what is called: with the module first where there is one)."""
    if isinstance(target, nnx.Module):
        return target, type(target).__call__
    owner = getattr(target, "__self__", None)
    if isinstance(owner, nnx.Module) and hasattr(target, "__func__"):
        return owner, target.__func__
    return None, target


def _name(target: Any) -> str:
    owner = getattr(target, "__self__", None)
    if isinstance(owner, linen.Module | nnx.Module):
        return (
            type(owner).__name__
            if target.__name__ in ("apply", "__call__")
            else f"{type(owner).__name__}.{target.__name__}"
        )
    if isinstance(target, functools.partial):
        return _name(target.func)
    return getattr(target, "__qualname__", None) or type(target).__name__


def _changed(before: dict[Any, Any], after: Any) -> list[str]:
    """Returns the names of Variables that were set, by the identity of what they hold."""
    new = jax.tree_util.tree_leaves_with_path(after)
    changed = [path for path, leaf in new if before.get(path) is not leaf]
    return [jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value") for path in changed]
