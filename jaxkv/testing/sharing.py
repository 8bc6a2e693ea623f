"""`assert_shared`: whether rows hold the same, as `Cache.sharing` and `attend(shared=)` were promised."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxkv.cache.cache import Cache
from jaxkv.cache.layer import Layer
from jaxkv.cache.spec import Cross
from jaxkv.testing.oracle import EMPTY


def assert_shared(cache: Cache, n: Any = None, *, rows: Any = None, atol: float = 1e-5, rtol: float = 1e-5) -> None:
    """Checks on the host that rows hold the same in their first n positions: keys, values and positions of all layers.

    Of a ring, what it still holds of them; of an encoder's output, all. Copies both off the device: for tests.

    Args:
      cache: the cache before a forward pass.
      n: tokens; None means what `cache.sharing` was told.
      rows: int [R2], the rows to compare, those that the passes bring tokens for; None means all that hold something.
      atol, rtol: tolerance of keys and values. Rows that were computed one by one differ by rounding.

    Raises:
      AssertionError: if rows differ, or one holds less than n tokens; says which, in which layer, at which position.

    >>> cache = jaxkv.Cache.init([jaxkv.LayerSpec(jaxkv.Full(), num_kv_heads=1, head_dim=2)], num_rows=2, capacity=8)
    >>> cache, _ = cache.begin(jnp.arange(5)[None], rows=[0])
    >>> assert_shared(cache.copy_prefix(0, 1, 5).sharing(5))
    """
    n = int(np.asarray((0 if cache.shared is None else cache.shared) if n is None else n))
    lengths = np.asarray(cache.lengths)
    rows = np.flatnonzero(lengths) if rows is None else np.asarray(rows)
    if not n or not rows.size:
        return
    for row in rows:
        if lengths[row] < n:
            raise AssertionError(f"row {row} holds {lengths[row]} tokens, fewer than the {n} that it is to share")
    # A call without tokens: it changes nothing, and its step reads the rows as they are.
    _, step = cache.begin(jnp.full((rows.size, 1), EMPTY, jnp.int32), rows=rows)
    for name, layer in _layers(cache):
        at = np.asarray(step.groups[layer.group].kv_positions)
        if isinstance(layer.spec.reach, Cross):
            at, what = np.where(at == EMPTY, EMPTY, at), "place"
            held = at
        else:
            held, what = np.where(at < n, at, EMPTY), "position"
        wraps = not (step.groups[layer.group].slot_is_position or isinstance(layer.spec.reach, Cross))
        arrays = [np.asarray(x) for x in layer.get(step)[:2]]  # [B, S, K, H]
        for b in range(1, rows.size):
            there = (held[0] == held[b]) & (held[b] != EMPTY)
            if not wraps and (differ := held[0] != held[b]).any():
                s = int(np.flatnonzero(differ)[0])
                raise AssertionError(
                    f"{name}: at {what} {s} row {rows[0] if held[b, s] == EMPTY else rows[b]} holds something and row "
                    f"{rows[b] if held[b, s] == EMPTY else rows[0]} nothing, though they share the first {n} tokens"
                )
            for kind, x in zip(("keys", "values"), arrays, strict=True):
                one, other = (x[i][there].astype(np.float64) for i in (0, b))
                wrong = ~np.isclose(one, other, atol=atol, rtol=rtol, equal_nan=True).all((1, 2))
                if wrong.any():
                    raise AssertionError(
                        f"{name}: rows {rows[0]} and {rows[b]} have other {kind} at {what} "
                        f"{held[0][there][wrong].min()}, though they share the first {n} tokens"
                    )


def _layers(cache: Cache) -> Iterator[tuple[str, Any]]:
    """Yields every layer that keeps keys and values, by name; those of stacks one by one."""
    layers: tuple[Any, ...] = cache.layers
    for i, layer in enumerate(layers):
        if not isinstance(layer, Layer) or not layer.num_kept:
            continue
        if layer.num_stacked is None:
            yield f"layer {i}", layer
        else:
            yield from ((f"layer {j} of stack {i}", layer.at(j)) for j in range(layer.num_stacked))
