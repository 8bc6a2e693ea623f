"""What callers give: integers, rows and sizes, checked, and bounded where int32 ends.

Numbers saturate and never wrap: a position beyond int32 counts as the largest there is, which no capacity reaches.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FAR = 2**30  # no position, size or capacity lies above; two of them add up within int32
_INT32 = np.iinfo(np.int32)


def integers(name: str, x: Any) -> Any:
    """Returns x as int32, bounded in its own dtype before the cast.

    Raises:
      ValueError: for anything but integers.

    >>> integers("positions", [2**40, -(2**70), 3])
    Array([ 2147483647, -2147483648,           3], dtype=int32)
    """
    if not isinstance(x, jax.Array | np.ndarray | np.generic) or x.dtype == object:
        x = _listed(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} has dtype {x.dtype}; give integers, such as int32")
    info = jnp.iinfo(x.dtype)
    least, most = max(int(info.min), _INT32.min), min(int(info.max), _INT32.max)
    if isinstance(x, jax.Array):
        return (jnp.clip(x, least, most) if info.bits >= 32 else x).astype(jnp.int32)
    return jnp.asarray(np.asarray(np.clip(x, least, most), np.int32))


def _listed(x: Any) -> Any:
    """Returns an array of numbers in lists, which may be Python's of any size, or arrays."""
    if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(x)):
        return jnp.asarray(x)
    numbers = np.array(x, object)
    if all(isinstance(n, int | np.integer) and not isinstance(n, bool) for n in numbers.flat):
        return np.asarray(np.clip(numbers, _INT32.min, _INT32.max), np.int32)
    return np.asarray(x)


def checked_size(owner: str, name: str, value: Any, least: int) -> int:
    """Returns a static size as an int.

    Raises:
      ValueError: for anything but a whole number from `least` to FAR.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value <= FAR:
        at_most = f" and at most 2**30 = {FAR:,}" if isinstance(value, int | np.integer) and value > FAR else ""
        raise ValueError(f"{owner}({name}={value!r}): {name} is a whole number of at least {least}{at_most}")
    return int(value)


def chosen(select: Any, shape: tuple[int, ...]) -> Any:
    """Returns the slots that queries [B, T] read, int32 [B, T, n].

    Raises:
      ValueError: for another shape, or no integers.
    """
    select = integers("select", select)
    if select.ndim != 3 or select.shape[:2] != shape or not select.shape[2]:
        raise ValueError(
            f"select has shape {select.shape}; give the slots that each query reads, int [B, T, n] with [B, T] = "
            f"{shape}"
        )
    return select


def shared_length(n: Any, unit: int, most: int) -> Any:
    """Returns how many first positions rows share: int32 scalar, whole `unit`s, at most `most`; None for none.

    Raises:
      ValueError: for a Python number that is not such a count, and for anything but one number. What is traced is
        bounded and rounded down instead.
    """
    if isinstance(n, int | np.integer) and not isinstance(n, bool):
        if not 0 <= n <= most:
            raise ValueError(f"shared={n}: rows of {most} slots share from 0 to {most} of their first tokens")
        if n % unit:
            raise ValueError(f"shared={n} is not a multiple of the page size {unit}; {n // unit * unit} is")
        return jnp.int32(n) if n else None
    n = integers("shared", n)
    if n.ndim:
        raise ValueError(f"shared has shape {n.shape}; give one number, of all rows")
    return jnp.clip(n, 0, most) // unit * unit


def batch_rows(name: str, b: int, rows: Any, num_rows: int) -> tuple[Any, Any, bool]:
    """Returns int32 [B]: the sequence of each batch row; bool [B]: whether there is one; whether it is row b."""
    if rows is None:
        if b > num_rows:
            raise ValueError(f"{name} has {b} batch rows, the cache {num_rows} sequences; name them by rows=")
        return jnp.arange(b, dtype=jnp.int32), jnp.ones((b,), bool), b == num_rows
    rows = integers("rows", rows)
    if rows.shape != (b,):
        raise ValueError(f"rows has shape {rows.shape}, {name} has {b} batch rows; give int [{b}]")
    return rows, (rows >= 0) & (rows < num_rows), False


def one_row(row: Any, num_rows: int) -> tuple[Any, Any]:
    """Returns int32 scalar: a row that there is; bool scalar: whether it is the one that was asked for."""
    row = integers("row", row)
    if row.ndim:
        raise ValueError(f"row has shape {row.shape}; name one sequence by an int32 scalar")
    return jnp.clip(row, 0, num_rows - 1), (row >= 0) & (row < num_rows)


def row_mask(name: str, mask: Any, num_rows: int) -> Any:
    """Returns bool [R]."""
    mask = jnp.asarray(mask)
    if mask.shape != (num_rows,) or mask.dtype != bool:
        raise ValueError(f"{name}: mask is {mask.dtype}{list(mask.shape)}; give bool [{num_rows}], one per row")
    return mask
