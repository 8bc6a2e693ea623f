"""Random programs of cache operations, run on a `jaxkv.Cache` and on the `Oracle`, compared after every operation.

A program is a list of operations, plain frozen dataclasses whose `repr` can be pasted back into Python. Operations are
drawn one by one, since what is interesting next depends on how long the sequences are; shapes are never drawn, so that
every operation compiles once per kind of cache.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.cache.cache import Cache
from jaxkv.cache.pages import Pages
from jaxkv.cache.spec import Cross, LayerSpec, Recurrent
from jaxkv.cache.state_layer import StateLayer
from jaxkv.cache.storage import Dense
from jaxkv.nn.attend import attend
from jaxkv.testing import states
from jaxkv.testing.oracle import EMPTY, Oracle
from jaxkv.testing.pages import assert_only_written, assert_pages_sound, assert_unchanged

Choose = Callable[[int, int], int]  # (least, most) -> a whole number between them, both included

# ---------------------------------------------------------------- operations


@dataclasses.dataclass(frozen=True)
class Begin:
    """One forward pass: begin, and in every layer put, get and attend."""

    positions: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...] | None = None
    spans: tuple[tuple[int, ...], ...] | None = None


@dataclasses.dataclass(frozen=True)
class Grow:
    """One forward pass of a tree of tokens for each row, and `commit` of a path: see `Cache.begin`."""

    positions: tuple[tuple[int, ...], ...]
    parents: tuple[tuple[int, ...], ...]
    path: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class BeginCross:
    """`cache.begin_cross(lengths, rows)`, and in every Cross layer put."""

    lengths: tuple[int, ...]
    rows: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Remove:
    """`cache.remove(row, begin, end)`."""

    row: int
    begin: int
    end: int | None = None


@dataclasses.dataclass(frozen=True)
class Rewind:
    """`cache.rewind(lengths)`."""

    lengths: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class CopyPrefix:
    """`cache.copy_prefix(src, dst, length)`."""

    src: int
    dst: int
    length: int


@dataclasses.dataclass(frozen=True)
class Take:
    """`cache.take(rows)`."""

    rows: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Reset:
    """`cache.reset(mask)`."""

    mask: tuple[bool, ...]


@dataclasses.dataclass(frozen=True)
class Retry:
    """`cache.retry(mask)`."""

    mask: tuple[bool, ...]


@dataclasses.dataclass(frozen=True)
class Keep:
    """`cache.keep(mask)` with a mask that is False at these positions of each row, and True elsewhere."""

    forgets: tuple[tuple[int, ...], ...]

    def mask(self, capacity: int) -> np.ndarray:
        """Returns the mask: bool [R, capacity]."""
        mask = np.ones((len(self.forgets), capacity), bool)
        for row, positions in zip(mask, self.forgets, strict=True):
            row[list(positions)] = False
        return mask


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """`cache.checkpoint(rows)`."""

    rows: tuple[int, ...]


Operation = Begin | Grow | BeginCross | Remove | Rewind | CopyPrefix | Take | Reset | Retry | Keep | Checkpoint


def random_operation(
    oracle: Oracle, choose: Choose, *, max_block: int, shift: bool = True, trees: bool = False
) -> Operation:
    """Returns an operation that makes sense, or nearly, for what the oracle holds.

    Mostly tokens in order, a block or a single one per row; also flat batches, blocks of named rows, padding anywhere,
    gaps, positions again, repeated positions, spans, rows that don't exist, and everything that forgets or moves.

    Args:
      oracle: tells how long the sequences are.
      choose: draws whole numbers; `lambda a, b: data.draw(st.integers(a, b))` makes it a Hypothesis strategy.
      max_block: longest block of one call.
      shift: whether to remove from the middle, which needs keys that can be re-rotated.
      trees: whether trees of tokens are drawn, too.
    """
    num_rows = oracle.num_rows

    def chance(percent: int) -> bool:
        return choose(1, 100) > 100 - percent  # the simplest choice, 1, is no

    def near(length: int) -> int:
        return choose(0, length + 2)

    kind = choose(0, 16)
    if not all(oracle.ok) and chance(40):  # or most of a program would be spent on sequences that take nothing
        full = [n >= oracle.capacity - max_block for n in oracle.lengths]
        dry = any(pool.num_free < num_rows for pool in oracle.pools.values())
        if dry and chance(50):
            full[choose(0, num_rows - 1)] = True
        if any(full) and chance(50):
            return Reset(tuple(full))
        return Retry(tuple(not ok for ok in oracle.ok))
    if oracle.cross is not None and chance(12):
        size = oracle.cross.size
        rows = None if chance(50) else tuple(choose(-1 if chance(10) else 0, num_rows - 1) for _ in range(2))
        count = num_rows if rows is None else 2
        return BeginCross(tuple(choose(-1, size + 1 if chance(10) else size) for _ in range(count)), rows)
    if oracle.recurrent and chance(8):
        return Checkpoint(tuple(choose(-1 if chance(10) else 0, num_rows - 1) for _ in range(2)))
    if trees and chance(25):
        return _random_tree(oracle, choose, chance, min(max_block, 4))
    if kind < 10:
        if kind < 4:
            shape, rows = (num_rows, max_block), None
        elif kind < 7:
            shape, rows = (num_rows, 1), None
        else:  # a flat batch, or blocks of some sequences
            shape = (num_rows + 2, 1) if kind < 9 else (3, 2)
            stray = 1 if chance(10) else 0
            rows = tuple(choose(-stray, num_rows - 1 + stray) for _ in range(shape[0]))
        return _random_begin(oracle, choose, chance, shape, rows)
    row = choose(0, num_rows - 1)
    if kind == 10:
        lengths = tuple(max(0, n - choose(0, 4)) if chance(70) else 10**6 for n in oracle.lengths)
        return Rewind(lengths)
    if kind == 11:
        return Take(tuple(choose(-1 if chance(10) else 0, num_rows - 1) for _ in range(num_rows)))
    if kind == 12:
        return CopyPrefix(row, choose(0, num_rows - 1), near(oracle.lengths[row]))
    if kind == 13:
        return Remove(row, near(oracle.lengths[row]), near(oracle.lengths[row]) if shift else None)
    if kind == 14:
        return Remove(row, near(oracle.lengths[row]))
    if kind == 15:
        return Keep(tuple(_some_positions(n, choose, chance) for n in oracle.lengths))
    mask = tuple(chance(30) for _ in range(num_rows))
    return Retry(mask) if chance(40) else Reset(mask)


def _some_positions(length: int, choose: Choose, chance: Any) -> tuple[int, ...]:
    """Returns some of the first `length` positions: mostly none or a stretch, or here and there."""
    if not length or chance(40):
        return ()
    if chance(50):
        return tuple(p for p in range(length) if chance(30))
    begin = choose(0, length - 1)
    return tuple(range(begin, choose(begin, length - 1) + 1))


def _random_begin(oracle: Oracle, choose: Choose, chance: Any, shape: tuple[int, int], rows: Any) -> Begin:
    batch, length = shape
    following = list(oracle.lengths)
    positions = np.full(shape, EMPTY)
    for b in range(batch):
        row = b if rows is None else rows[b]
        if chance(15):
            continue
        if not 0 <= row < oracle.num_rows:
            positions[b] = [choose(-1, 4) for _ in range(length)]
            continue
        if chance(8):
            following[row] = max(0, following[row] + choose(-3, 3))
        dense = chance(50)
        for t in range(length):
            if dense or chance(60):
                positions[b, t] = following[row]
                following[row] += 1
        if length > 1 and chance(5):
            positions[b] = positions[b, ::-1]
        if chance(2):
            positions[b, 0] = positions[b, -1]  # comes twice, unless it is padding
    spans = None
    if chance(25):
        spans = tuple(tuple(choose(0, 2) for _ in range(length)) for _ in range(batch))
    return Begin(tuple(tuple(int(p) for p in row) for row in positions), rows, spans)


def _random_tree(oracle: Oracle, choose: Choose, chance: Any, most: int) -> Grow:
    positions, parents, path = (np.full((oracle.num_rows, most), EMPTY) for _ in range(3))
    for row, length in enumerate(oracle.lengths):
        size = choose(0, most)
        positions[row, :size] = length + np.arange(size)
        parents[row, :size] = [choose(-1, t - 1) for t in range(size)]
        branch = [choose(0, size - 1)] if size else []
        while branch and parents[row, branch[0]] >= 0:
            branch.insert(0, int(parents[row, branch[0]]))
        branch = branch[: choose(0, most)]
        path[row, : len(branch)] = branch
        if size and chance(8):
            parents[row, choose(0, size - 1)] = choose(0, most)  # may point forward
        if chance(8):
            path[row, choose(0, most - 1)] = choose(-1, most)  # may be no branch
        if size and chance(4):
            positions[row, 0] += choose(-1, 1)  # may not go on from the length
    return Grow(*(tuple(tuple(int(x) for x in row) for row in array) for array in (positions, parents, path)))


# ---------------------------------------------------------------- running


def _call(name: str, cache: Cache, *args: Any) -> Any:
    return getattr(cache, name)(*args)


def input_sizes(spec: Any) -> tuple[int, int, int]:
    """Returns heads K, and the sizes H and Hv of what `forward` takes as keys and values of a layer."""
    if isinstance(spec.reach, Recurrent):
        return states.input_sizes(spec.reach)
    return spec.num_kv_heads, spec.head_dim, spec.value_dim


@functools.partial(jax.jit, static_argnames="num_heads")
def forward(
    cache: Cache,
    positions: Any,
    rows: Any,
    spans: Any,
    ks: Any,
    vs: Any,
    wheres: Any = None,
    parents: Any = None,
    path: Any = None,
    *,
    num_heads: int,
) -> Any:
    """Returns what one forward pass through all layers gives: the way a model uses a cache, without a model.

    Args:
      cache: any cache.
      positions, rows, spans: as `Cache.begin` takes them.
      ks, vs: for each layer, stacked ones too, keys [B, T, K, H] and values [B, T, K, Hv]; Cross layers and those
        that share don't put them.
      wheres: for each layer, stacked ones too, what `put` takes as `where`; None for none.
      parents, path: of a tree of tokens, as `Cache.begin` and `Cache.commit` take them; None: no tree.
      num_heads: query heads per kv head; the keys themselves are the queries, head h of them times h + 1.

    Returns:
      The cache, the step's positions, the step's ok, and per layer (slot positions, k, v, mask, attended). Of a
      recurrent layer (positions of the last tokens, states, tails, no mask, read), see `jaxkv.testing.states`.
    """
    cache, step = cache.begin(positions, rows, spans, parents)
    ks, vs, seen = list(ks), list(vs), []
    layers: list[Any] = []
    wheres = [None] * len(ks) if wheres is None else list(wheres)
    old: tuple[Any, ...] = cache.layers
    for layer in old:
        stacked = layer.num_stacked is not None
        for i in range(layer.num_stacked or 1):
            k, v, where = ks.pop(0), vs.pop(0), wheres.pop(0)
            layer = layer.at(i) if stacked else layer
            if isinstance(layer, StateLayer):
                layer, out = states.run(layer, step, k, v)
                out = jnp.concatenate([out * (h + 1) for h in range(num_heads)], 2)
                last, *arrays = states.contents(layer, step)
                unseen = jnp.zeros((*step.positions.shape[:1], 1, step.positions.shape[1], last.shape[1]), bool)
                seen.append((last, *arrays, unseen, out))
                continue
            read = layer
            if layer.spec.shares is not None:
                read = layers[layer.spec.shares]
            elif not isinstance(layer.spec.reach, Cross):
                layer = read = layer.put(step, k, None if layer.spec.v_in_k else v, where, side_copies(layer.spec, v))
            q = jnp.stack([k.astype(jnp.float32) * (h + 1) for h in range(num_heads)], 3)
            q = q.reshape(*k.shape[:2], -1, k.shape[3])  # [B, T, K * num_heads, H]
            seen.append((step.groups[layer.group].kv_positions, *read.get(step), attend(q, read, step)))
        layers.append(layer.at(None) if stacked else layer)
    cache = cache.with_layers(layers)
    return cache if path is None else cache.commit(step, path), step.positions, step.ok, seen


def side_copies(spec: LayerSpec, v: Any) -> dict[str, Any]:
    """Returns what is put into a layer's side buffers here: the first heads and numbers of its values.

    A buffer of the values' sizes, storage and no rotary then holds what `Layer.v` holds, whatever happens.
    """
    return {name: v[:, :, : side.num_heads, : side.size] for name, side in spec.side_buffers}


@jax.jit
def encode(cache: Cache, lengths: Any, rows: Any, ks: Any, vs: Any, wheres: Any = None) -> Any:
    """Returns the cache after an encoder's output went into its Cross layers, and the step's ok.

    Args:
      cache: a cache with Cross layers.
      lengths, rows: as `Cache.begin_cross` takes them.
      ks, vs: for each layer, stacked ones too, keys [B, S, K, H] and values [B, S, K, Hv]; Cross layers put them.
      wheres: for each layer, stacked ones too, what `put` takes as `where`; None for none.
    """
    cache, step = cache.begin_cross(lengths, rows)
    ks, vs, layers = list(ks), list(vs), []
    wheres = [None] * len(ks) if wheres is None else list(wheres)
    for layer in cache.layers:
        stacked = layer.num_stacked is not None
        for i in range(layer.num_stacked or 1):
            k, v, where = ks.pop(0), vs.pop(0), wheres.pop(0)
            if isinstance(layer.spec.reach, Cross):
                kept_v = None if layer.spec.v_in_k else v
                layer = layer.at(i) if stacked else layer
                layer = layer.put(step, k, kept_v, where, side_copies(layer.spec, v))
        layers.append(layer.at(None) if stacked else layer)
    return cache.with_layers(layers), step.ok


# Compiled once per kind of cache, for all machines.
OPERATIONS: dict[str, Callable[..., Any]] = {
    name: jax.jit(functools.partial(_call, name))
    for name in (
        *("remove", "rewind", "copy_prefix", "take", "reset", "retry", "keep", "checkpoint"),
        *("resume_point", "can_resume"),
    )
}


@functools.partial(jax.jit, static_argnames=("rotary", "at"))
def _turn(rotary: Any, at: str, k: Any, by: Any) -> Any:
    return rotary.rotate(k, by) if at == "read" else rotary.shift(k, by)


@functools.partial(jax.jit, static_argnums=0)
def _round_trip(storage: Any, x: Any) -> Any:
    return storage.decode(storage.encode(x))


class Machine:
    """A cache and an oracle that are told the same things and must answer the same.

    Attributes:
      cache: the cache as it is now.
      oracle: the oracle as it is now.
      program: the operations so far.
      counts: how often each kind of operation was run, and how often a sequence did not fit.

    >>> spec = jaxkv.LayerSpec(jaxkv.Window(2), num_kv_heads=1, head_dim=2)
    >>> machine = Machine(jaxkv.Cache.init([spec], num_rows=1, capacity=8, max_block=4))
    >>> machine.run(Begin(positions=((0, 1, 2, -1),)))
    >>> machine.run(Remove(row=0, begin=2))
    >>> machine.oracle.lengths
    [2]
    """

    HEADS = 2  # query heads per kv head

    def __init__(self, cache: Cache):
        """Starts from an empty cache; it is not donated.

        Args:
          cache: a cache that holds nothing.

        Raises:
          ValueError: if it holds something.
        """
        if np.asarray(cache.lengths).any() or np.asarray(cache.encoder_cached).any():
            raise ValueError(
                f"the cache holds sequences of lengths {np.asarray(cache.lengths)} and encoder outputs of rows "
                f"{np.flatnonzero(cache.encoder_cached)}; give an empty one"
            )
        self.cache = cache
        self.layers: list[Any] = []  # the spec of each layer, stacked ones too, in the order of the forward pass
        for layer in cache.layers:
            self.layers += [layer.spec] * (layer.num_stacked or 1)
        self.oracle = Oracle(
            [spec.reach for spec in self.layers],
            num_rows=cache.num_rows,
            capacity=cache.capacity,
            max_block=cache.max_block,
            slack=cache.slack,
            **(dataclasses.asdict(cache.layout) if isinstance(cache.layout, Pages) else {}),
        )
        self.program: list[Operation] = []
        self.counts: collections.Counter[str] = collections.Counter()
        # By token: its position, and by layer k, v and whether it was kept.
        self._written: list[tuple[int, list[np.ndarray], list[np.ndarray], list[bool]]] = []
        self._turns = 0
        self._rounded: dict[Any, float] = {}  # the largest error of what a storage keeps, so far

    @property
    def can_shift(self) -> bool:
        """Whether keys of every layer can be re-rotated, so that tokens can be removed from the middle."""
        return all(spec.rotary is not None or isinstance(spec.reach, Cross) for spec in self.layers)

    def run(self, operation: Operation) -> None:
        """Runs one operation on both and compares everything that can be seen.

        Raises:
          AssertionError: if they differ; the message has a picture and the program so far.
        """
        self.program.append(operation)
        self.counts[type(operation).__name__] += 1
        before = self.cache
        match operation:
            case Begin() | Grow():
                self._begin(operation)
            case BeginCross():
                self._begin_cross(operation)
            case Remove(row, begin, end):
                self._change("remove", row, begin, *([] if end is None else [end]))
                self._remove(row, begin, end)
            case Rewind(lengths):
                self._change("rewind", lengths)
                self.oracle.rewind(lengths)
            case CopyPrefix(src, dst, length):
                self._change("copy_prefix", src, dst, length)
                self.oracle.copy_prefix(src, dst, length)
            case Take(rows):
                self._change("take", rows)
                self.oracle.take(rows)
            case Reset(mask):
                self._change("reset", mask)
                self.oracle.reset(mask)
            case Retry(mask):
                self._change("retry", mask)
                self.oracle.retry(mask)
            case Keep():
                kept = operation.mask(self.oracle.capacity)
                self._change("keep", kept)
                self.oracle.keep(kept)
            case Checkpoint(rows):
                self._change("checkpoint", rows)
                self.oracle.checkpoint(rows)
        self._settle()
        self._same("lengths", np.asarray(self.cache.lengths), np.array(self.oracle.lengths))
        self._same("ok", np.asarray(self.cache.ok), np.array(self.oracle.ok))
        encoded = np.array([output is not None for output in self.oracle.encoded])
        self._same("encoder_cached", np.asarray(self.cache.encoder_cached), encoded)
        self._compare_pages(before, operation)

    def compare_resume_points(self, row: int, position: int) -> None:
        """Compares `resume_point` and `can_resume`; on a row with gaps the cache may answer lower, never higher.

        Raises:
          AssertionError: if they differ.
        """
        args = self.cache, np.int32(row), np.int32(position)
        got, can = OPERATIONS["resume_point"](*args), OPERATIONS["can_resume"](*args)
        want = self.oracle.resume_point(row, position)
        lower = self.oracle.gaps[row] and got <= want and self.oracle.can_resume(row, int(got))
        if got != want and not lower:
            self._fail(f"resume_point({row}, {position}) is {got}, expected {want}")
        if bool(can) != (int(got) == position):
            self._fail(f"can_resume({row}, {position}) is {can}, but resume_point({row}, {position}) is {got}")

    def _change(self, name: str, *args: Any) -> None:
        arrays = [np.asarray(x, bool if name in ("reset", "retry", "keep") else np.int32) for x in args]
        self.cache = OPERATIONS[name](self.cache, *arrays)

    def _remove(self, row: int, begin: int, end: int | None) -> None:
        known = 0 <= row < self.oracle.num_rows
        moved = known and int(self.cache.lengths[row]) != self.oracle.lengths[row]
        self.oracle.remove(row, begin, end, held=self._held()[row] if moved else None)
        self._turns += end is not None

    # ------------------------------------------------------------ forward passes

    def _begin(self, operation: Begin | Grow) -> None:
        positions = np.array(operation.positions, np.int32)
        rows: Any = None
        spans: Any = None
        tree: tuple[Any, ...] = ()
        given: tuple[Any, ...]
        stands = positions
        if isinstance(operation, Grow):
            tree = tuple(np.array(x, np.int32) for x in (operation.parents, operation.path))
            stands, given = self._stands(positions, tree[0]), (None, None, tree[0])
        else:
            rows = None if operation.rows is None else np.array(operation.rows, np.int32)
            # One compiled form with and without spans: all 0 is causal.
            spans = np.zeros_like(positions) if operation.spans is None else np.array(operation.spans, np.int32)
            given = operation.rows, operation.spans
        bases = list(self.oracle.lengths)
        tokens, ks, vs, wheres = self._new_tokens(stands)
        cache, got_positions, ok, seen = forward(
            self.cache, positions, rows, spans, ks, vs, wheres, *tree, num_heads=self.HEADS
        )
        ok, names = np.asarray(ok), range(len(positions)) if rows is None else rows.tolist()
        wanted = [row for b, row in enumerate(names) if (positions[b] >= 0).any()]
        refused = {row for b, row in enumerate(names) if not ok[b] and row in wanted}
        try:
            want = self.oracle.begin(positions, *given, tokens=tokens, refused=refused)
        except ValueError as error:
            self._fail(f"step.ok is {ok}: {error}")
        self.counts["did not fit"] += len(refused)
        for b, row in enumerate(names):
            if ok[b] != want.ok[b]:
                self._fail(f"step.ok of batch row {b} (row {row}) is {ok[b]}, expected {want.ok[b]}")
        self._same("step.positions", np.asarray(got_positions), want.positions)
        self.cache = cache
        for i, (spec, arrays) in enumerate(zip(self.layers, seen, strict=True)):
            self._compare_layer(i, spec, [np.asarray(x) for x in arrays], want, ks[i], int(tokens[0, 0]))
        for row in range(len(positions)) if tree else ():
            if want.ok[row] and (size := int((positions[row] >= 0).sum())):
                parents, path = (x[row].tolist() for x in tree)
                self.oracle.commit(row, bases[row], parents[:size], path)

    def _stands(self, positions: np.ndarray, parents: np.ndarray) -> np.ndarray:
        """Returns where the tokens of trees stand in their branches, which is what their keys go by."""
        stands = positions.copy()
        for row, (at, above) in enumerate(zip(positions, parents, strict=True)):
            for t, parent in enumerate(above):
                sound = at[t] >= 0 and parent < t
                stands[row, t] = (
                    stands[row, parent] + 1 if sound and parent >= 0 else min(at[t], self.oracle.lengths[row])
                )
        return stands

    def _begin_cross(self, operation: BeginCross) -> None:
        lengths = np.array(operation.lengths, np.int32)
        rows = None if operation.rows is None else np.array(operation.rows, np.int32)
        size = 0 if self.oracle.cross is None else self.oracle.cross.size
        tokens, ks, vs, wheres = self._new_tokens(np.tile(np.arange(size), (len(lengths), 1)))
        self.cache, ok = encode(self.cache, lengths, rows, ks, vs, wheres)
        want = self.oracle.begin_cross(operation.lengths, operation.rows, tokens=tokens)
        self.counts["did not fit"] += int((~want).sum())
        self._same("step.ok", np.asarray(ok), want)

    def _new_tokens(self, positions: np.ndarray) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray], list[Any]]:
        """Draws keys and values of every layer, and which tokens layers with `drops` keep.

        Token n is the n-th ever written, padding included.
        """
        first = len(self._written)
        random = np.random.default_rng(first)
        ks: list[np.ndarray] = []
        vs: list[np.ndarray] = []
        wheres = [random.random(positions.shape) < 0.7 if spec.drops else None for spec in self.layers]
        for spec in self.layers:
            heads, *sizes = input_sizes(spec)
            for out, size, storage in zip((ks, vs), sizes, (spec.k_storage, spec.v_storage), strict=True):
                x = random.normal(size=(*positions.shape, heads, size))
                whole = jnp.issubdtype(storage.dtype, jnp.integer)
                out.append(np.round(4 * x).astype(storage.dtype) if whole else x.astype(np.float32))
            if spec.v_in_k:
                vs[-1] = ks[-1][..., : spec.value_dim]
        kept_vs = [self._kept(spec.v_storage, v) for spec, v in zip(self.layers, vs, strict=True)]
        kept_ks = []
        for spec, k, v in zip(self.layers, ks, kept_vs, strict=True):
            if isinstance(spec.reach, Recurrent):
                kept_ks.append(k)
                continue
            own = self._kept(spec.k_storage, spec.split(k)[1]) if spec.k_dim else k[..., :0]
            kept_ks.append(np.concatenate([v, own], -1) if spec.v_in_k else own)
        tokens = first + np.arange(positions.size).reshape(positions.shape)
        for b, t in np.ndindex(positions.shape):
            kept = [where is None or bool(where[b, t]) for where in wheres]
            self._written.append((int(positions[b, t]), [k[b, t] for k in kept_ks], [v[b, t] for v in kept_vs], kept))
        return tokens, ks, vs, wheres

    def _kept(self, storage: Any, x: np.ndarray) -> np.ndarray:
        """Returns what a storage that has codes and scales makes of x; for others the tolerance sees to it."""
        if isinstance(storage, Dense):
            return x
        kept = np.asarray(_round_trip(storage, x))
        self._rounded[storage] = max(self._rounded.get(storage, 0.0), float(np.abs(kept - x).max(initial=0)))
        return kept

    def _compare_layer(
        self, i: int, spec: Any, arrays: list[np.ndarray], want: Any, queries: np.ndarray, first: int
    ) -> None:
        """Compares what a call saw of one layer; `first` is the first token of the call."""
        slots, k, v, mask, out = arrays
        source = i if spec.shares is None else spec.shares
        name = f"layer {i} {spec.reach}"
        if isinstance(spec.reach, Recurrent):
            self._compare_states(i, spec.reach, slots, k, v, out, want)
            return
        batch, length = want.positions.shape
        places = max(self.oracle.capacity, 0 if self.oracle.cross is None else self.oracle.cross.size)
        expected = np.zeros((batch, length, places), int)
        seen = np.zeros_like(expected)
        tokens = np.full((batch, slots.shape[1]), -1)  # which token each visible slot must hold
        for b, t in np.ndindex(batch, length):
            sees = want.sees[b][t]
            if sees is not None:
                sees = {p: token for p, token in sees[spec.reach].items() if self._written[token][3][source]}
                expected[b, t, list(sees)] = 1
            visible = np.flatnonzero(mask[b, 0, t])
            if (slots[b, visible] < 0).any():
                self._fail(
                    f"layer {i} {spec.reach}: query [{b}, {t}] sees empty slots {visible[slots[b, visible] < 0]}"
                )
            np.add.at(seen, (b, t, slots[b, visible]), 1)
            if sees is not None and (seen[b, t] == expected[b, t]).all():
                tokens[b, visible] = [sees[p] for p in slots[b, visible]]
        if (expected != seen).any():
            b = int(np.argwhere(expected != seen)[0][0])
            self._fail(
                f"{name}, batch row {b}: what its queries see, over positions 0..{seen.shape[2] - 1}",
                picture(want.positions[b], expected[b], seen[b]),
            )
        used = tokens >= 0
        written = np.array([self._written[n][0] for n in tokens[used]], int)
        at = np.where(tokens[used] >= first, written, slots[used])  # in a tree a token stands where its branch puts it
        want_k, want_v = self._expected(source, spec, at, tokens[used])
        eps_k, eps_v = (_rounding(storage.dtype) for storage in (spec.k_storage, spec.v_storage))
        self._close(f"layer {i} {spec.reach}: v", v[used].astype(np.float64), want_v, 8 * eps_v, slots, used)
        most = 8 * (max(eps_k, eps_v) if spec.v_in_k else eps_k) * (1 + self._turns)
        if spec.rotary_at == "put":  # a key that is re-rotated is rounded once more
            most += 4 * self._turns * self._rounded.get(spec.k_storage, 0.0)
        self._close(f"layer {i} {spec.reach}: k", k[used].astype(np.float64), want_k, most, slots, used)
        k, v = (np.where(used[:, :, None, None], x, 0).astype(np.float64) for x in (k, v))
        attended = _attention(queries.astype(np.float64), k, v, mask, self.HEADS)
        wrong = ~np.isclose(out, attended, rtol=1e-4, atol=1e-4)  # padding too: it must give zeros
        if wrong.any():
            b, t, *_ = np.argwhere(wrong)[0]
            self._fail(
                f"{name}: attend gives query [{b}, {t}] at position {want.positions[b, t]} "
                f"{out[b, t].ravel()}, expected {attended[b, t].ravel()}"
            )

    def _compare_states(
        self, i: int, reach: Recurrent, last: np.ndarray, k: np.ndarray, v: np.ndarray, out: np.ndarray, want: Any
    ) -> None:
        for b, row in enumerate(want.rows):
            known = 0 <= row < self.oracle.num_rows
            text = self.oracle.texts[row] if known else []
            inputs = [[ks[i] for _, ks, _, _ in map(self._written.__getitem__, text)]]
            inputs.append([vs[i] for _, _, vs, _ in map(self._written.__getitem__, text)])
            for slot in np.flatnonzero(last[b] >= 0) if known else ():
                length = int(last[b, slot]) + 1
                state, tail, _ = states.expected(reach, *(x[:length] for x in inputs))
                for kind, got, wanted in (("state", k[b, slot], state), ("tail", v[b, slot], tail)):
                    same = np.allclose(got.ravel(), wanted.ravel(), rtol=1e-4, atol=1e-4)
                    if getattr(reach, kind) is not None and not same:
                        self._fail(
                            f"layer {i} {reach}: the {kind} of row {row} after {length} tokens is {got.ravel()}, "
                            f"expected {wanted.ravel()}"
                        )
            for t, p in enumerate(want.positions[b]):
                read = np.zeros(out.shape[2:])
                if p != EMPTY:
                    *_, one = states.expected(reach, *(x[: p + 1] for x in inputs))
                    read = np.concatenate([one * (h + 1) for h in range(self.HEADS)])
                if not np.allclose(out[b, t], read, rtol=1e-4, atol=1e-4):
                    self._fail(
                        f"layer {i} {reach}: query [{b}, {t}] at position {p} reads {out[b, t]}, expected {read}"
                    )

    def _expected(self, i: int, spec: Any, at: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns keys and values that tokens must have by now at these positions: as written, then re-rotated."""
        ks = np.array([self._written[n][1][i] for n in tokens]).reshape(-1, spec.num_kv_heads, spec.head_dim)
        vs = np.array([self._written[n][2][i] for n in tokens]).reshape(-1, spec.num_kv_heads, spec.value_dim)
        moved = at if spec.rotary_at == "read" else at - np.array([self._written[n][0] for n in tokens], int)
        if moved.any():  # padded to one length, so that it compiles once
            most = 8 * self.oracle.num_rows * self.oracle.capacity
            pad = lambda x: np.concatenate([x, np.zeros((most - len(x), *x.shape[1:]), x.dtype)])  # noqa: E731
            still = spec.head_dim - (spec.k_dim or spec.head_dim)  # leading numbers that are not rotated
            own = ks[..., still:]
            turned = _turn(spec.rotary, spec.rotary_at, pad(own), pad(moved.astype(np.int32))[:, None, None])
            own = np.where(moved[:, None, None] != 0, np.asarray(turned)[: len(ks)], own)
            ks = np.concatenate([ks[..., :still], own], -1)
        return ks.astype(np.float64), vs.astype(np.float64)

    # ------------------------------------------------------------ comparing

    def _settle(self) -> None:
        """Compares lengths and all that is held, and follows the cache where it may hold less."""
        for row, (length, held) in enumerate(zip(np.asarray(self.cache.lengths).tolist(), self._held(), strict=True)):
            try:
                self.oracle.settle(row, length, held)
            except ValueError as error:
                self._fail(str(error))

    def _held(self) -> list[dict[Any, list[int]]]:
        """Returns the positions that the cache holds of each row and reach."""
        rows: list[dict[Any, list[int]]] = [{} for _ in range(self.cache.num_rows)]
        for group in self.cache.bookkeeping:
            if group is self.cache.encoded:
                continue
            for row, held in zip(rows, np.asarray(group.held), strict=True):
                row[group.reach] = held[held != EMPTY].tolist()
        return rows

    def _compare_pages(self, before: Cache, operation: Operation) -> None:
        """Compares who shares which pages, and whether the operation left alone what it has no business with."""
        if not self.oracle.pools:
            return
        try:
            assert_pages_sound(self.cache)
            match operation:
                case Grow(positions):
                    assert_only_written(before, self.cache, positions)
                case Begin(positions, rows):
                    assert_only_written(before, self.cache, positions, rows)
                case BeginCross(_, rows):
                    assert_unchanged(before, self.cache, encoded=range(before.num_rows) if rows is None else rows)
                case Remove(row, begin):
                    moved = {(row, p) for p in range(max(0, begin), before.capacity)}
                    assert_unchanged(before, self.cache, written=moved)
                case Take(rows):
                    assert_unchanged(before, self.cache, sources=rows)
                case CopyPrefix(src, dst):
                    rows = tuple(src if row == dst else row for row in range(before.num_rows))
                    assert_unchanged(before, self.cache, sources=rows)
                case _:
                    assert_unchanged(before, self.cache)
        except AssertionError as error:
            self._fail(str(error))
        for book in self.cache.bookkeeping:
            if book.pages is None:
                continue
            pool = self.oracle.pools[book.reach]
            table = np.asarray(book.pages.table)
            got = [
                {i: set(np.flatnonzero(table[:, i] == page).tolist()) for i, page in enumerate(row) if page < pool.size}
                for row in table
            ]
            if got != pool.table:
                self._fail(
                    f"pages of {book.reach}, each with the rows that have it, are\n{got}\nexpected\n{pool.table}"
                )
            self._same(f"free pages of {book.reach}", np.asarray(book.pages.num_free), np.array(pool.num_free))

    def _same(self, name: str, got: np.ndarray, want: np.ndarray) -> None:
        if got.shape != want.shape or (got != want).any():
            self._fail(f"{name} is\n{got}\nexpected\n{want}")

    def _close(self, name: str, got: Any, want: Any, tolerance: float, slots: np.ndarray, used: np.ndarray) -> None:
        wrong = ~(np.abs(got - want) <= tolerance * (1 + np.abs(want)))
        if wrong.any():
            first = int(np.argwhere(wrong)[0][0])
            b, s = np.argwhere(used)[first]
            self._fail(
                f"{name} of batch row {b}, position {slots[b, s]} (slot {s}) is {got[first].ravel()}, "
                f"expected {want[first].ravel()}"
            )

    def _fail(self, what: str, *more: str) -> Any:
        lines = [f"after operation {len(self.program) - 1} cache and oracle differ: {what}", *more, "program = ["]
        lines += [f"    {operation!r}," for operation in self.program]
        raise AssertionError("\n".join([*lines, "]", f"cache: {_one_line(self.cache)}"]))


def run_program(
    cache: Cache, source: int | Iterable[Operation] | Choose, *, num_operations: int = 40, trees: bool = False
) -> collections.Counter[str]:
    """Runs a random or a given program on a cache and on the oracle, and compares them after every operation.

    Operations are compiled once per kind of cache and stay compiled, so many short programs cost little.

    Args:
      cache: an empty cache; any specs, layout and sizes. It is not donated.
      source: the seed of a random program; or the operations themselves, to run a reported program again; or a
        function that draws a whole number between two others, such as
        `lambda least, most: data.draw(st.integers(least, most))` with Hypothesis.
      num_operations: how many operations to draw.
      trees: whether to draw trees of tokens, too: a program more to compile.

    Returns:
      How often each kind of operation was run.

    Raises:
      AssertionError: at the first difference, with a picture of what is seen and what should be, the program up to
        there, and the seed.

    >>> spec = jaxkv.LayerSpec(jaxkv.Full(), num_kv_heads=1, head_dim=2)
    >>> cache = jaxkv.Cache.init([spec], num_rows=1, capacity=8, max_block=4)
    >>> run_program(cache, [Begin(((0, 1, 2, -1),)), Rewind((1,))])["Begin"]
    1
    """
    machine = Machine(cache)
    if isinstance(source, Iterable):
        for operation in source:
            machine.run(operation)
        return machine.counts
    choose: Choose
    if callable(source):
        choose = source
    else:
        random = np.random.default_rng(source)
        choose = lambda least, most: int(random.integers(least, most + 1))  # noqa: E731
    try:
        for _ in range(num_operations):
            block = machine.cache.max_block
            kinds = {"shift": machine.can_shift, "trees": trees}
            machine.run(random_operation(machine.oracle, choose, max_block=block, **kinds))
            row = choose(0, machine.oracle.num_rows - 1)
            machine.compare_resume_points(row, choose(0, machine.oracle.lengths[row] + 1))
    except AssertionError as error:
        raise AssertionError(f"{error}\nsource: {source!r}") from None
    return machine.counts


def picture(positions: np.ndarray, expected: np.ndarray, seen: np.ndarray) -> str:
    """Returns two masks [T, S] side by side as 0 and 1, a line per query that is not padding."""
    width = max(expected.shape[1], len("expected"))
    lines = [f"  {'':7}{'expected':{width}}  seen"]
    for p, *masks in zip(positions, expected, seen, strict=True):
        left, right = ("".join(str(int(x)) for x in mask) for mask in masks)
        if p != EMPTY or right.strip("0"):
            lines.append(f"  q={p:<4} {left:{width}}  {right}" + ("" if left == right else "  <-"))
    return "\n".join(lines)


def _attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, num_heads: int) -> np.ndarray:
    """Softmax attention in float64; q [B, T, K, H] is what `forward` makes its queries of. Returns [B, T, N, Hv]."""
    batch, length, heads, size = q.shape
    q = np.stack([q * (h + 1) for h in range(num_heads)], 3)
    scores = np.einsum("btkgh,bskh->btkgs", q, k) / np.sqrt(size)
    scores = np.where(mask[:, 0, :, None, None, :], scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    p = np.exp(scores - np.where(np.isfinite(top), top, 0))
    p /= np.maximum(p.sum(-1, keepdims=True), 1e-300)
    return np.einsum("btkgs,bskh->btkgh", p, v).reshape(batch, length, heads * num_heads, -1)


def _rounding(dtype: Any) -> float:
    return 0.0 if jnp.issubdtype(dtype, jnp.integer) else float(jnp.finfo(dtype).eps)


def _one_line(cache: Cache) -> str:
    specs = ", ".join(
        repr(layer.spec) + (f" x {layer.num_stacked}" if layer.num_stacked else "") for layer in cache.layers
    )
    return (
        f"[{specs}], num_rows={cache.num_rows}, capacity={cache.capacity}, max_block={cache.max_block}, "
        f"slack={cache.slack}, layout={cache.layout!r}"
    )
