"""Ring: a queue whose length is data, for loops that push and pop as the values say."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv.store.stacked import check_fits, taken


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Ring:
    """A queue of up to `capacity` values of one structure. Size and place are traced: for scan, while loops and vmap.

    A compiled loop can't raise errors: pushing to a full ring and popping from an empty one change
    nothing and say `ok` False. Written in place when the ring is donated or the carry of a loop.

    >>> ring = jaxkv.Ring.init(2, like=jnp.zeros(3))
    >>> ring, ok = ring.push(jnp.ones(3))
    >>> value, ring, ok = ring.pop()
    >>> value.tolist(), bool(ok), bool(ring.empty)
    ([1.0, 1.0, 1.0], True, True)
    """

    slots: Any  # pytree of [capacity, ...]
    start: Any  # int32 [], slot of the first value
    size: Any  # int32 [], how many there are
    capacity: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def init(cls, capacity: int, like: Any) -> Ring:
        """Returns an empty ring.

        Args:
          capacity: the most values that it holds, at least 1.
          like: a value, or a pytree of `jax.ShapeDtypeStruct`: structure, shapes and dtypes of all that are pushed.

        Raises:
          ValueError: for a capacity below 1.
        """
        try:
            count = 0 if isinstance(capacity, bool) else operator.index(capacity)
        except TypeError:
            count = 0
        if count < 1:
            raise ValueError(f"Ring.init(capacity={capacity!r}): give a number of values, at least 1")

        def empty(x: Any) -> Any:
            x = x if isinstance(x, jax.ShapeDtypeStruct) else jnp.asarray(x)
            return jnp.broadcast_to(jnp.zeros_like(x), (count, *x.shape))

        zero = jnp.zeros((), jnp.int32)
        return cls(jax.tree.map(empty, like), zero, zero, count)

    @property
    def empty(self) -> Any:
        """Whether there is nothing to pop. bool []."""
        return self.size == 0

    @property
    def full(self) -> Any:
        """Whether nothing more can be pushed. bool []."""
        return self.size == self.capacity

    def push(self, value: Any) -> tuple[Ring, Any]:
        """Returns the ring with a value at its end, and whether there was room. Without room nothing changes.

        Args:
          value: of the structure, shapes and dtypes of `like`; Python numbers take the dtype, if it can hold them.

        Raises:
          ValueError: while tracing, for a value that differs from `like`, naming both, and for a number of Python or
            NumPy that would not be the same in the ring.
        """
        like = jax.tree.map(lambda slots: jax.ShapeDtypeStruct(slots.shape[1:], slots.dtype), self.slots)
        structure: Any = jax.tree.structure(value)
        if structure == jax.tree.structure(like):
            value = jax.tree.map(_taken, value, like)
        check_fits(value, like, "push: the value", "what the ring was made for")
        ok = ~self.full
        slot = (self.start + self.size) % self.capacity

        def write(slots: Any, x: Any) -> Any:
            # A full ring writes what is there already: choosing one value is cheap, choosing between two rings copies.
            return jax.lax.dynamic_update_index_in_dim(slots, jnp.where(ok, x, slots[slot]), slot, 0)

        slots = jax.tree.map(write, self.slots, value)
        return dataclasses.replace(self, slots=slots, size=self.size + ok.astype(jnp.int32)), ok

    def pop(self) -> tuple[Any, Ring, Any]:
        """Returns the first value, the ring without it, and whether there was one; if not, zeros and the same ring."""
        value, ok = self.peek()
        start = jnp.where(ok, (self.start + 1) % self.capacity, self.start)
        return value, dataclasses.replace(self, start=start, size=self.size - ok.astype(jnp.int32)), ok

    def peek(self) -> tuple[Any, Any]:
        """Returns the first value and whether there is one; if not, zeros."""
        ok = ~self.empty

        def read(slots: Any) -> Any:
            x = slots[self.start]
            return jnp.where(ok, x, jnp.zeros_like(x))

        return jax.tree.map(read, self.slots), ok


def _taken(x: Any, like: Any) -> Any:
    """Returns a value as an array; a Python number takes the dtype of `like`."""
    if hasattr(x, "dtype"):
        return taken(x, "push: the value")
    if isinstance(x, (float, complex)) and not jnp.issubdtype(like.dtype, jnp.inexact):
        raise ValueError(f"push: the value has {x!r}, what the ring was made for is {like.dtype}; round it first")
    try:
        x = float(x) if isinstance(x, int) and jnp.issubdtype(like.dtype, jnp.floating) else x
        return taken(x, "push: the value", like.dtype)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"push: the value has {x!r}, what the ring was made for is {like.dtype}") from error
