"""StackedQueue: a queue with one value per layer, for a scan over the layers."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path

from jaxkv.casting import unheld


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class StackedQueue:
    """L values of one structure as arrays [L, ...]: `scan` pops each in turn and pushes what the body returns.

    >>> queue = jaxkv.StackedQueue.of([jnp.ones(2), jnp.zeros(2)])
    >>> total, queue = queue.scan(lambda carry, value: (carry + value.sum(), value + 1), 0.0)
    >>> float(total), [value.tolist() for value in queue.to_list()]
    (2.0, [[2.0, 2.0], [1.0, 1.0]])
    """

    stacked: Any  # pytree of [L, ...]
    size: int = dataclasses.field(metadata={"static": True})  # L; under a batch axis it can't be read off the arrays

    @classmethod
    def of(cls, values: Iterable[Any]) -> StackedQueue:
        """Returns the queue of some values, the first of which is popped first.

        Args:
          values: at least one pytree; all of the same structure, shapes and dtypes.

        Raises:
          ValueError: naming the first value that differs from value 0, and where; and for a number of Python or NumPy
            that would not be the same as an array of JAX.
        """
        values = [
            jax.tree.map(lambda x, i=i: taken(x, f"StackedQueue.of: value {i}"), value)
            for i, value in enumerate(values)
        ]
        if not values:
            raise ValueError("StackedQueue.of: there is no value; give one per layer")
        for i, value in enumerate(values[1:], 1):
            check_fits(value, values[0], f"StackedQueue.of: value {i}", "value 0")
        return cls(jax.tree.map(lambda *leaves: jnp.stack(leaves), *values), len(values))

    def to_list(self) -> list[Any]:
        """Returns the values, the first to be popped first."""
        return [jax.tree.map(operator.itemgetter(i), self.stacked) for i in range(self.size)]

    def __len__(self) -> int:
        return self.size

    def scan(
        self, f: Callable[..., tuple[Any, Any]], carry: Any, xs: Any = None, *, unroll: int = 1
    ) -> tuple[Any, StackedQueue]:
        """Returns the last carry, and the queue of what the body returned: a `jax.lax.scan` over the queue.

        Args:
          f: the body, `f(carry, value) -> (carry, new_value)`; with xs `f(carry, value, x)`. New values are all of one
            structure, which may be another than that of the old ones.
          carry: the first carry.
          xs: None, or a pytree of arrays [L, ...], such as the parameters of the layers.
          unroll: of `jax.lax.scan`.

        Raises:
          ValueError: if a leading axis of xs is not L.
        """
        for path, x in tree_leaves_with_path(xs):
            if jnp.shape(x)[:1] != (self.size,):
                where, shape = keystr(path), jnp.shape(x)
                raise ValueError(f"scan: xs{where} has shape {shape}; the queue has {self.size} values, give one each")

        def body(carry: Any, both: Any) -> tuple[Any, Any]:
            value, x = both
            return f(carry, value) if xs is None else f(carry, value, x)

        carry, pushed = jax.lax.scan(body, carry, (self.stacked, xs), length=self.size, unroll=unroll)
        return carry, StackedQueue(pushed, self.size)


def taken(x: Any, what: str, dtype: Any = None) -> jax.Array:
    """Returns a value as an array of JAX, which may have four bytes where NumPy has eight.

    Raises:
      ValueError: if it can't hold a number of Python or NumPy.
    """
    if not isinstance(x, jax.Array) and jnp.issubdtype(np.asarray(x).dtype, jnp.number):
        kind = jnp.result_type(x) if dtype is None else dtype
        lost = unheld(np.asarray(x), kind)
        if lost is not None:
            raise ValueError(f"{what} has {lost!s}, which {kind} can't hold; take a wider dtype (jax.enable_x64)")
    return jnp.asarray(x, dtype)


def check_fits(value: Any, like: Any, what: str, other: str) -> None:
    """Raises ValueError unless a value has structure, shapes and dtypes of another.

    Args:
      value: a pytree of arrays.
      like: a pytree of arrays or of `jax.ShapeDtypeStruct`.
      what: how the first is called in the message.
      other: how the second is called.
    """
    got: Any = jax.tree.structure(value)
    want: Any = jax.tree.structure(like)
    if got != want:
        raise ValueError(f"{what} has the structure {got}, {other} has {want}")
    for (path, x), y in zip(tree_leaves_with_path(value), jax.tree.leaves(like), strict=True):
        if (x.shape, x.dtype) != (y.shape, y.dtype):
            raise ValueError(f"{what}{keystr(path)} is {x.dtype}{list(x.shape)}, {other} is {y.dtype}{list(y.shape)}")
