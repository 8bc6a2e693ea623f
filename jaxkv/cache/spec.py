"""What a layer keeps (LayerSpec), and which past tokens its queries may see (the reaches).

Positions are int32, absolute, counted from 0 within their own sequence; EMPTY marks padding and unused slots. A reach
says how far back a query may look, never what lies ahead: causality is added by `visible`.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import types
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
class LayerSpec:
    """What one attention layer keeps. Frozen and hashable; layers with equal reach share one bookkeeping.

    Args:
      reach: which past tokens a query may see: Full(), Window(size, sinks) or Chunk(size); Cross(size) for the keys and
        values of an encoder's output.
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

    Raises:
      ValueError: for sizes below 1, an unknown reach, a size that a storage can't hold, a rotary that is a function,
        one for Cross, or none, or one without `rotate`, where keys are to be rotated when they are read.

    >>> LayerSpec(Window(1024), num_kv_heads=4, head_dim=64).value_dim
    64
    """

    reach: Reach
    num_kv_heads: int
    head_dim: int
    value_dim: Any = None
    k_storage: Any = Dense()
    v_storage: Any = Dense()
    rotary: Any = None
    rotary_at: str = "put"
    drops: bool = False

    def __post_init__(self) -> None:
        if self.value_dim is None:
            object.__setattr__(self, "value_dim", self.head_dim)
        if not isinstance(self.reach, Reach):
            raise ValueError(f"LayerSpec(reach={self.reach!r}): give Full(), Window(size), Chunk(size) or Cross(size)")
        for name in ("num_kv_heads", "head_dim", "value_dim"):
            object.__setattr__(self, name, checked_size("LayerSpec", name, getattr(self, name), 1))
        for name, size in (("k_storage", self.head_dim), ("v_storage", self.value_dim)):
            storage = getattr(self, name)
            if isinstance(storage, type) or not hasattr(storage, "zeros"):
                raise ValueError(f"LayerSpec({name}={storage!r}): give a storage such as Dense('float32')")
            try:
                storage.check(size)
            except ValueError as error:
                raise ValueError(f"LayerSpec({name}={storage}): {error}") from error
        functions = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)
        if self.rotary is not None and (isinstance(self.rotary, functions) or not hasattr(self.rotary, "shift")):
            raise ValueError(
                f"LayerSpec(rotary={self.rotary!r}): functions compare by identity and would recompile at every call; "
                "give an object with shift(k, delta) that is a frozen dataclass, such as jaxkv.Rotary()"
            )
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
        if not isinstance(self.drops, bool):
            raise ValueError(f"LayerSpec(drops={self.drops!r}): give True or False")
        try:
            hash(self.rotary)
        except TypeError as error:
            raise ValueError(
                f"LayerSpec(rotary={self.rotary!r}) is not hashable; make it a frozen dataclass"
            ) from error

    def k_basis(self, x: Any) -> Any:
        """Returns queries [..., H] in the basis in which `Layer.pieces` has the keys."""
        return x if self.rotary_at == "read" else self.k_storage.basis(x)

    def v_basis(self, x: Any) -> Any:
        """Returns what was read [..., Hv] of `Layer.pieces` in the basis of the values that were put."""
        return self.v_storage.basis(x)

    @property
    def sides(self) -> dict[str, tuple[int, int, Any]]:
        """What is kept of each token beside its key and its value, by name: heads, size, storage."""
        return {"dropped": (1, 1, Dense("uint8"))} if self.drops else {}
