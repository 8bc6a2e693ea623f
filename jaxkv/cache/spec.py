"""What a layer keeps (LayerSpec), and which past tokens its queries may see (the reaches).

Positions are int32, absolute, counted from 0 within their own sequence; EMPTY marks padding and unused slots. A reach
says how far back a query may look, never what lies ahead: causality is added by `visible`.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
import types
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxkv.cache.arguments import checked_size
from jaxkv.cache.storage import Dense

EMPTY = -1


class Reach(abc.ABC):
    """What the reaches have in common. `size` None means no limit; `sinks` counts first tokens always seen."""

    size: int | None
    sinks: int

    @abc.abstractmethod
    def first(self, p: Any) -> Any:
        """Returns the first position, besides sinks, that a query at position p may see. int32, the shape of p."""

    @abc.abstractmethod
    def sees(self, q: Any, s: Any) -> Any:
        """Returns whether position s is within reach of a query at q, be it past or future. bool; q and s broadcast."""

    def fallback(self, lost_begin: Any, p: Any) -> Any:
        """Returns where decoding can go on if at p it can't, because positions from lost_begin on are gone."""
        return lost_begin

    def visible(self, q: Any, s: Any, same_span: Any = None) -> Any:
        """Returns which stored positions a query may see: the whole rule.

        Args:
          q: query positions, int32, EMPTY for padding.
          s: positions of the slots of the same sequence, int32, EMPTY where nothing lies. Broadcasts with q.
          same_span: bool or None; where True, query and slot see each other in both directions.

        Returns:
          bool, the broadcast shape.
        """
        past = s <= q if same_span is None else (s <= q) | same_span
        return (q != EMPTY) & (s != EMPTY) & past & self.sees(q, s)


@dataclasses.dataclass(frozen=True)
class Full(Reach):
    """Every past token is seen.

    >>> Full().sees(9, 0)
    Array(True, dtype=bool)
    """

    size = None
    sinks = 0

    def first(self, p: Any) -> Any:
        return jnp.zeros_like(p)

    def sees(self, q: Any, s: Any) -> Any:
        return jnp.ones(jnp.broadcast_shapes(jnp.shape(q), jnp.shape(s)), bool)


@dataclasses.dataclass(frozen=True)
class Window(Reach):
    """The last `size` tokens are seen, the query's own included, and always the first `sinks` tokens.

    Sizes count as Hugging Face, vLLM and llama.cpp count them; Ollama's kvcache shows one key more, so its window W is
    `Window(W + 1)` here. Sinks are those of StreamingLLM (Xiao et al. 2023).

    Args:
      size: number of keys that a query sees, not counting sinks, in tokens, at least 1.
      sinks: how many first tokens of the sequence stay visible, at least 0.

    >>> [int(s) for s in range(8) if Window(3, sinks=1).visible(6, s)]
    [0, 4, 5, 6]
    """

    size: int
    sinks: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", checked_size("Window", "size", self.size, 1))
        object.__setattr__(self, "sinks", checked_size("Window", "sinks", self.sinks, 0))

    def first(self, p: Any) -> Any:
        return jnp.maximum(p - (self.size - 1), 0)

    def sees(self, q: Any, s: Any) -> Any:
        return (s > q - self.size) | (s < self.sinks)


@dataclasses.dataclass(frozen=True)
class Chunk(Reach):
    """The tokens of the query's own chunk are seen: position s from position q iff s // size == q // size.

    Args:
      size: tokens per chunk, at least 1. Chunk boundaries are absolute positions.

    >>> [int(s) for s in range(8) if Chunk(4).visible(6, s)]
    [4, 5, 6]
    """

    size: int
    sinks = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", checked_size("Chunk", "size", self.size, 1))

    def first(self, p: Any) -> Any:
        return p // self.size * self.size

    def sees(self, q: Any, s: Any) -> Any:
        return s // self.size == q // self.size

    def fallback(self, lost_begin: Any, p: Any) -> Any:
        return jnp.maximum(lost_begin, self.first(p))


@dataclasses.dataclass(frozen=True)
class Cross(Reach):
    """All of an encoder's output is seen, from every position of the row that it belongs to.

    Keys and values are written once per row by `Cache.begin_cross` and `Layer.put`; their positions are their places in
    the encoder's output and are compared with no query's.

    Args:
      size: most keys that an encoder's output has, at least 1.

    >>> [int(s) for s in range(4) if Cross(4).visible(0, s)]
    [0, 1, 2, 3]
    """

    size: int
    sinks = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", checked_size("Cross", "size", self.size, 1))

    def first(self, p: Any) -> Any:
        return jnp.zeros_like(p)

    def sees(self, q: Any, s: Any) -> Any:
        return jnp.ones(jnp.broadcast_shapes(jnp.shape(q), jnp.shape(s)), bool)

    def visible(self, q: Any, s: Any, same_span: Any = None) -> Any:
        return (q != EMPTY) & (s != EMPTY)


@dataclasses.dataclass(frozen=True)
class Recurrent(Reach):
    """No past token is seen: the layer keeps a state, which each token changes, and the last inputs of a convolution.

    What a state has forgotten can't be got back, so a row keeps some earlier states beside the one it stands at, its
    checkpoints: at every `every` tokens, at the end of a block of several tokens that no other block follows (a
    prompt), and where `Cache.checkpoint` asks for one. `rewind` and what else goes back lands on one of them, or on the
    empty row. With `slack` in the cache, the states of the last `slack` tokens are there too.

    Args:
      state: the shape of the state, heads first, or None for none. It is kept in float32.
      tail: channels of a convolution, and how many of its last inputs are kept (kernel size - 1); None for none. It is
        kept in float32.
      every: tokens from one checkpoint to the next, at least 1; None for no such checkpoints.
      keep: how many checkpoints a row keeps at least, 0 or more; the newest stay.

    Raises:
      ValueError: for neither state nor tail, and sizes below 1.

    >>> Recurrent(state=(4, 8, 16), tail=(96, 3)).num_numbers
    800
    """

    state: tuple[int, ...] | None = None
    tail: tuple[int, int] | None = None
    every: int | None = 512
    keep: int = 3
    size = None
    sinks = 0

    def __post_init__(self) -> None:
        if self.state is None and self.tail is None:
            raise ValueError(
                "Recurrent(): give the shape of the state, that of the tail, or both; such as tail=(64, 3)"
            )
        for name in ("state", "tail"):
            shape = getattr(self, name)
            if shape is not None:
                if not isinstance(shape, tuple | list) or not shape or (name == "tail" and len(shape) != 2):
                    one = "(channels, kernel size - 1)" if name == "tail" else "(heads, key size, value size)"
                    raise ValueError(f"Recurrent({name}={shape!r}): give a shape such as {one}")
                shape = tuple(checked_size("Recurrent", name, size, 1) for size in shape)
                object.__setattr__(self, name, shape)
        if self.every is not None:
            object.__setattr__(self, "every", checked_size("Recurrent", "every", self.every, 1))
        object.__setattr__(self, "keep", checked_size("Recurrent", "keep", self.keep, 0))

    @property
    def num_numbers(self) -> int:
        """How many numbers one state and its tail are."""
        return sum(math.prod(shape) for shape in (self.state, self.tail) if shape is not None)

    def first(self, p: Any) -> Any:
        return p

    def sees(self, q: Any, s: Any) -> Any:
        return jnp.zeros(jnp.broadcast_shapes(jnp.shape(q), jnp.shape(s)), bool)


@dataclasses.dataclass(frozen=True)
class SideBuffer:
    """Something that a layer keeps of each token beside its key and its value, such as what an indexer compares.

    Args:
      size: of one vector, at least 1.
      num_heads: vectors of a token, at least 1.
      storage: how they are kept.
      rotary: None, or what re-rotates them when `Cache.remove` moves tokens, as for keys.

    Raises:
      ValueError: for sizes below 1, or a size that the storage can't hold.

    >>> SideBuffer(128, storage=Dense("float16")).num_heads
    1
    """

    size: int
    num_heads: int = 1
    storage: Any = Dense()
    rotary: Any = None

    def __post_init__(self) -> None:
        for name in ("size", "num_heads"):
            object.__setattr__(self, name, checked_size("SideBuffer", name, getattr(self, name), 1))
        check_storage("SideBuffer", "storage", self.storage, self.size)
        check_rotary("SideBuffer", self.rotary)


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What one layer keeps. Frozen and hashable; layers with equal reach share one bookkeeping.

    Args:
      reach: which past tokens a query may see: Full(), Window(size, sinks) or Chunk(size); Cross(size) for the keys and
        values of an encoder's output. Recurrent(state, tail) for a layer that keeps a state: then nothing else is said.
      num_kv_heads: heads of k and v, at least 1.
      head_dim: size of a key, at least 1.
      value_dim: size of a value; None means head_dim.
      k_storage: how keys are kept.
      v_storage: how values are kept.
      rotary: None, or a frozen, hashable object whose `shift(k, delta)` re-rotates keys to other positions
        (`jaxkv.Rotary`); `Cache.remove` needs it to move tokens. None for Cross, whose keys never move.
      rotary_at: when keys are rotated. "put": before they are put, by who puts them. "read": each time they are read,
        by `rotary.rotate(k, positions)`; what is put, and kept, is not rotated, so `Cache.remove` moves tokens without
        any rounding, at the price of angles for all keys that a step reads.
      drops: whether `Layer.put` may leave tokens out (`where=`). It costs a byte per slot.
      v_in_k: whether a key begins with its token's value, as in multi-head latent attention (`LayerSpec.latent`) and in
        layers whose keys are their values. Nothing is stored twice: the first `value_dim` numbers of a key are kept as
        v_storage says, the other `k_dim` as k_storage says; those are what `rotary` turns. Where there are no others,
        it turns the whole key, each time it is read.
      side_buffers: what else is kept of each token, by name: a mapping to `SideBuffer`s, kept as a tuple of pairs.
        `Layer.put(sides=)` writes them, `Layer.read_side` reads them.
      shares: the number of an earlier layer of the model whose keys and values this one reads; it keeps none of its own
        (Gemma 3n and 4, YOCO, cross-layer attention). All else is as that layer has it. None: it keeps its own.
      rotated: which of "k" and "v" are put, and read, in the Hadamard basis, because the projections before and after
        the cache have the rotation in them (`jaxkv.nnx.fuse`). Their storages then don't rotate. For "k" the queries
        are in that basis, too.

    Raises:
      ValueError: for sizes below 1, an unknown reach, a size that a storage can't hold, a rotary that is a function,
        one for Cross, or none, or one without `rotate`, where keys are to be rotated when they are read; for values
        that are in the keys and longer than those, or would be rotated with them.

    >>> LayerSpec(Window(1024), num_kv_heads=4, head_dim=64).value_dim
    64
    """

    reach: Reach
    num_kv_heads: Any = None
    head_dim: Any = None
    value_dim: Any = None
    k_storage: Any = Dense()
    v_storage: Any = Dense()
    rotary: Any = None
    rotary_at: str = "put"
    drops: bool = False
    v_in_k: bool = False
    side_buffers: Any = ()
    shares: int | None = None
    rotated: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.reach, Recurrent):
            self._check_recurrent()
            return
        if self.value_dim is None:
            object.__setattr__(self, "value_dim", self.head_dim)
        if not isinstance(self.reach, Reach):
            raise ValueError(
                f"LayerSpec(reach={self.reach!r}): give Full(), Window(size), Chunk(size), Cross(size) or "
                "Recurrent(state, tail)"
            )
        for name in ("num_kv_heads", "head_dim", "value_dim"):
            object.__setattr__(self, name, checked_size("LayerSpec", name, getattr(self, name), 1))
        for name in ("drops", "v_in_k"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"LayerSpec({name}={getattr(self, name)!r}): give True or False")
        if self.k_dim < 0:
            raise ValueError(
                f"LayerSpec(head_dim={self.head_dim}, value_dim={self.value_dim}, v_in_k=True): a key can't begin with "
                "a value that is longer than it; give a head_dim of at least value_dim"
            )
        self._check_rotated()
        if not self.k_dim:
            object.__setattr__(self, "k_storage", self.v_storage)
        for name, size in (("k_storage", self.k_dim or self.value_dim), ("v_storage", self.value_dim)):
            check_storage("LayerSpec", name, getattr(self, name), size)
        check_rotary("LayerSpec", self.rotary)
        if self.rotary is not None and isinstance(self.reach, Cross):
            raise ValueError(
                f"LayerSpec({self.reach}, rotary={self.rotary!r}): an encoder's keys never move; give rotary=None"
            )
        if self.rotary_at not in ("put", "read"):
            raise ValueError(f"LayerSpec(rotary_at={self.rotary_at!r}): keys are rotated when they are 'put' or 'read'")
        if self.rotary_at == "read" and not callable(getattr(self.rotary, "rotate", None)):
            raise ValueError(
                f"LayerSpec(rotary={self.rotary!r}, rotary_at='read'): nothing rotates the keys when they are read; "
                "give an object with rotate(k, positions) such as jaxkv.Rotary()"
            )
        if not self.k_dim and self.rotary is not None and self.rotary_at == "put":
            raise ValueError(
                f"LayerSpec(rotary={self.rotary!r}, v_in_k=True): the keys are the values, which would be rotated with "
                "them; give rotary_at='read'"
            )
        if self.shares is not None:
            object.__setattr__(self, "shares", checked_size("LayerSpec", "shares", self.shares, 0))
            if isinstance(self.reach, Cross):
                raise ValueError(
                    f"LayerSpec({self.reach}, shares={self.shares}): layers share keys and values of the call's "
                    "tokens; an encoder's output is put into each Cross layer"
                )
        given = self.side_buffers
        pairs = tuple(given.items() if isinstance(given, Mapping) else given)
        if not all(isinstance(name, str) and isinstance(side, SideBuffer) for name, side in pairs):
            raise ValueError(f"LayerSpec(side_buffers={given!r}): give a mapping of names to jaxkv.SideBuffer(size)")
        if "dropped" in dict(pairs):
            raise ValueError("LayerSpec(side_buffers=): 'dropped' is what drops=True keeps; choose another name")
        object.__setattr__(self, "side_buffers", pairs)

    def _check_rotated(self) -> None:
        """Raises ValueError unless `rotated` can be; takes the rotation out of the storages."""
        if not set(self.rotated) <= {"k", "v"}:
            raise ValueError(f"LayerSpec(rotated={self.rotated!r}): give names out of ('k', 'v')")
        object.__setattr__(self, "rotated", tuple(sorted(set(self.rotated))))
        if self.rotated and self.v_in_k:
            raise ValueError(f"LayerSpec(rotated={self.rotated!r}, v_in_k=True): keys and values are one vector")
        if "k" in self.rotated and self.rotary is not None:
            raise ValueError(
                f"LayerSpec(rotated={self.rotated!r}, rotary={self.rotary!r}): a rotary turns pairs of numbers, which "
                "the Hadamard basis doesn't have; leave 'k' out"
            )
        for name in self.rotated:
            storage = getattr(self, f"{name}_storage")
            if getattr(storage, "rotate", False):
                object.__setattr__(self, f"{name}_storage", dataclasses.replace(storage, rotate=False))

    def _check_recurrent(self) -> None:
        """Raises ValueError for what says something of keys and values, which a recurrent layer doesn't have."""
        for field in dataclasses.fields(self)[1:]:
            given = getattr(self, field.name)
            if given != field.default:
                cure = "its state is kept in float32" if field.name.endswith("storage") else "the reach has its sizes"
                raise ValueError(
                    f"LayerSpec(Recurrent(...), {field.name}={given!r}): a recurrent layer has no keys and values; "
                    f"leave {field.name} out, {cure}"
                )

    @classmethod
    def latent(
        cls,
        rank: int,
        rotary_dim: int,
        reach: Reach = Full(),
        *,
        storage: Any = Dense(),
        rotary_storage: Any = None,
        rotary: Any = None,
        **rest: Any,
    ) -> LayerSpec:
        """Returns what a layer of multi-head latent attention keeps: of each token one latent and one rotary key.

        All heads read the same key, the latent followed by the rotary key, and the same value, the latent (DeepSeek-V2,
        https://arxiv.org/abs/2405.04434, section 2.1, with the projections of the heads absorbed into queries and
        output). `put(step, k)` takes the key [B, T, 1, rank + rotary_dim]. Latent and rotary key are kept apart, each
        with scales of its own where a storage has them.

        Args:
          rank: size of the latent, at least 1.
          rotary_dim: size of the rotary key, at least 0.
          reach: as for LayerSpec.
          storage: how latents are kept.
          rotary_storage: how rotary keys are kept; None means as the latents.
          rotary: what rotates the rotary key, of `rotary_dim` numbers, as for LayerSpec.
          **rest: rotary_at and drops, as for LayerSpec.

        Raises:
          ValueError: as LayerSpec.

        >>> spec = LayerSpec.latent(512, 64)
        >>> jaxkv.plan_memory([spec], num_rows=1, capacity=4096).bytes_per_token
        2304
        """
        rank = checked_size("LayerSpec.latent", "rank", rank, 1)
        rotary_dim = checked_size("LayerSpec.latent", "rotary_dim", rotary_dim, 0)
        return cls(
            reach,
            num_kv_heads=1,
            head_dim=rank + rotary_dim,
            value_dim=rank,
            k_storage=storage if rotary_storage is None else rotary_storage,
            v_storage=storage,
            rotary=rotary,
            v_in_k=True,
            **rest,
        )

    @property
    def k_dim(self) -> int:
        """How many numbers of a key are kept beside its value: head_dim, less where values are in the keys."""
        return self.head_dim - self.value_dim if self.v_in_k else self.head_dim

    def split(self, k: Any) -> tuple[Any, Any]:
        """Returns keys or queries [..., H] in two: what is kept as a value, and the `k_dim` numbers beside it."""
        return k[..., : self.head_dim - self.k_dim], k[..., self.head_dim - self.k_dim :]

    def k_basis(self, x: Any) -> Any:
        """Returns queries [..., H] in the basis in which `Layer.pieces` has the keys."""
        rotated = self.rotary_at == "read"  # then it is in its own basis
        if not self.k_dim:
            return x if rotated else self.v_basis(x)
        value, own = self.split(x)
        own = own if rotated else self.k_storage.basis(own)
        return jnp.concatenate([self.v_basis(value), own], -1) if self.v_in_k else own

    def v_basis(self, x: Any) -> Any:
        """Returns what was read [..., Hv] of `Layer.pieces` in the basis of the values that were put."""
        return self.v_storage.basis(x)

    @property
    def sides(self) -> dict[str, tuple[int, int, Any]]:
        """What is kept of each token beside its key and its value, by name: heads, size, storage."""
        kept = {name: (side.num_heads, side.size, side.storage) for name, side in self.side_buffers}
        return {"dropped": (1, 1, Dense("uint8")), **kept} if self.drops else kept


def check_storage(owner: str, name: str, storage: Any, size: int) -> None:
    """Raises ValueError unless a storage can hold vectors of a size."""
    if isinstance(storage, type) or not hasattr(storage, "zeros"):
        raise ValueError(f"{owner}({name}={storage!r}): give a storage such as Dense('float32')")
    try:
        storage.check(size)
    except ValueError as error:
        raise ValueError(f"{owner}({name}={storage}): {error}") from error


def check_rotary(owner: str, rotary: Any) -> None:
    """Raises ValueError unless a rotary is None, or a hashable object with `shift`."""
    functions = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)
    if rotary is not None and (isinstance(rotary, functions) or not hasattr(rotary, "shift")):
        raise ValueError(
            f"{owner}(rotary={rotary!r}): functions compare by identity and would recompile at every call; "
            "give an object with shift(k, delta) that is a frozen dataclass, such as jaxkv.Rotary()"
        )
    try:
        hash(rotary)
    except TypeError as error:
        raise ValueError(f"{owner}(rotary={rotary!r}) is not hashable; make it a frozen dataclass") from error
