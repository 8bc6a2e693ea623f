"""Cache: what a model remembers of several sequences, and every operation on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.cache.cross import Encoded
from jaxkv.cache.group import FAR, Group, resume
from jaxkv.cache.layer import Layer
from jaxkv.cache.rows import Rows
from jaxkv.cache.show import show
from jaxkv.cache.spec import EMPTY, Cross, LayerSpec
from jaxkv.cache.step import GroupStep, Step
from jaxkv.errors import CacheError, CacheFullError, NotSupportedError
from jaxkv.sizes import format_bytes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Cache:
    """Keys and values of the past tokens of several sequences, for all layers of a model. Immutable.

    Every method is pure and returns a new cache; all but `check`, `describe` and `init` run under `jit` with traced
    arguments. Donate the cache (`jax.jit(..., donate_argnames="cache")`) or carry it in a loop, and it is changed in
    place; the old value is then gone.

    Attributes:
      layers: one Layer per layer of the model; with `stacked=True` one stack per distinct LayerSpec, in order of first
        appearance, for a scan over layers: `layers[0].at(i)`. Without it a model of equal layers has as many Layers
        here, and `at` is an error.
      groups: bookkeeping, one Group per distinct reach but Cross.
      encoded: bookkeeping of the Cross layers; None if there are none.
      lengths: int32 [R], the next position of each sequence.
      ok: bool [R], False once a sequence did not fit; it takes nothing more until `retry` or `reset`.
      capacity: tokens a sequence can hold.
      max_block: most tokens of one sequence in one `begin`.
      slack: how far behind the highest position written a `rewind` of a ring may go and land exactly.
      layout: where the numbers lie.

    >>> import jax.numpy as jnp
    >>> from jaxkv import Cache, Full, LayerSpec
    >>> cache = Cache.init([LayerSpec(Full(), num_kv_heads=1, head_dim=2)], num_rows=1, capacity=8)
    >>> cache, step = cache.begin(jnp.array([[0, 1, 2]]))
    >>> layer = cache.layers[0].put(step, jnp.ones((1, 3, 1, 2)), jnp.ones((1, 3, 1, 2)))
    >>> k, v, mask = layer.get(step)
    >>> cache = cache.with_layers([layer])
    >>> cache.lengths
    Array([3], dtype=int32)
    """

    layers: tuple[Layer, ...]
    groups: tuple[Group, ...]
    encoded: Encoded | None
    lengths: Any  # int32 [R]
    ok: Any  # bool [R]
    capacity: int = dataclasses.field(metadata={"static": True})
    max_block: int = dataclasses.field(metadata={"static": True})
    slack: int = dataclasses.field(metadata={"static": True})
    layout: Any = dataclasses.field(metadata={"static": True})

    @classmethod
    def init(
        cls,
        specs: Sequence[LayerSpec],
        num_rows: int,
        capacity: int,
        *,
        layout: Any = Rows(),
        max_block: int = 512,
        slack: int = 0,
        stacked: bool = False,
        sharding: Any = None,
    ) -> Cache:
        """Returns an empty cache.

        Args:
          specs: one LayerSpec per layer of the model, in order. Cross layers may stand anywhere, or alone; all of them
            read the output of one encoder, so their reaches are equal.
          num_rows: sequences the cache holds (R).
          capacity: tokens a sequence can hold.
          layout: Rows().
          max_block: most tokens of one sequence in one `begin`; rings are this much longer than their reach. More than
            the capacity counts as the capacity.
          slack: tokens that a `rewind` may go back in a ring beyond what its queries see; speculation wants its draft
            length here.
          stacked: equal specs share one Layer with buffers [L, ...], for models that scan over their layers.
          sharding: None, or a `jax.sharding.NamedSharding` for axes (R, K, V, H) of k and v; the bookkeeping is
            replicated over its mesh.

        Raises:
          ValueError: for no layers, sizes below 1, a negative slack, a reach with as many sinks as capacity, or Cross
            layers of different sizes.
        """
        specs = tuple(specs)
        for spec in specs:
            if not isinstance(spec, LayerSpec):
                raise ValueError(f"specs holds {spec!r}; give one jaxkv.LayerSpec per layer")
        if not specs:
            raise ValueError("specs is empty; give one jaxkv.LayerSpec per layer of the model")
        for name, size, least in (
            ("num_rows", num_rows, 1),
            ("capacity", capacity, 1),
            ("max_block", max_block, 1),
            ("slack", slack, 0),
        ):
            if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < least:
                raise ValueError(f"Cache.init({name}={size!r}): {name} is a whole number of at least {least}")
        max_block = min(max_block, capacity)
        reaches = list(dict.fromkeys(spec.reach for spec in specs if not isinstance(spec.reach, Cross)))
        crosses = list(dict.fromkeys(spec.reach for spec in specs if isinstance(spec.reach, Cross)))
        if len(crosses) > 1:
            raise ValueError(
                f"{crosses[0]} and {crosses[1]} in one cache: all Cross layers read the output of one encoder; give "
                "them the larger size"
            )

        def build() -> Cache:
            groups = tuple(Group.init(reach, num_rows, capacity, max(max_block, slack)) for reach in reaches)
            encoded = Encoded.init(crosses[0], num_rows) if crosses else None

            def layer(spec: LayerSpec, num_stacked: int | None) -> Layer:
                group = [*reaches, *crosses].index(spec.reach)
                num_slots = _bookkeeping(groups, encoded)[group].num_slots
                lead = layout.lead(num_rows, spec.num_kv_heads, num_slots)
                lead = lead if num_stacked is None else (num_stacked, *lead)
                return Layer(
                    k=spec.k_storage.zeros(lead, spec.head_dim),
                    v=spec.v_storage.zeros(lead, spec.value_dim),
                    index=None,
                    group=group,
                    spec=spec,
                    layout=layout,
                    num_slots=num_slots,
                    num_stacked=num_stacked,
                )

            if stacked:
                layers = tuple(layer(spec, specs.count(spec)) for spec in dict.fromkeys(specs))
            else:
                layers = tuple(layer(spec, None) for spec in specs)
            lengths, ok = jnp.zeros((num_rows,), jnp.int32), jnp.ones((num_rows,), bool)
            return cls(layers, groups, encoded, lengths, ok, capacity, max_block, slack, layout)

        if sharding is None:
            return build()
        return jax.jit(build, out_shardings=shardings(jax.eval_shape(build), sharding))()

    @property
    def num_rows(self) -> int:
        """How many sequences the cache holds (R)."""
        return self.lengths.shape[-1]

    @property
    def specs(self) -> tuple[LayerSpec, ...]:
        """The LayerSpec of each entry of `layers`."""
        return tuple(layer.spec for layer in self.layers)

    @property
    def bookkeeping(self) -> tuple[Any, ...]:
        """What each layer's `group` counts: the groups, then that of the Cross layers."""
        return _bookkeeping(self.groups, self.encoded)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers and bookkeeping, from shapes alone."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    def with_layers(self, layers: Iterable[Layer]) -> Cache:
        """Returns this cache with the layers that a forward pass has put into.

        Raises:
          ValueError: if number or kinds of layers are not those of this cache.
        """
        layers = tuple(layers)
        if len(layers) != len(self.layers):
            raise ValueError(f"with_layers got {len(layers)} layers, the cache has {len(self.layers)}")
        for i, (new, old) in enumerate(zip(layers, self.layers, strict=True)):
            if new.spec != old.spec or new.group != old.group:
                raise ValueError(f"with_layers: layer {i} is {new.spec}, the cache has {old.spec}; keep their order")
        return dataclasses.replace(self, layers=tuple(dataclasses.replace(layer, index=None) for layer in layers))

    def begin(self, positions: Any, rows: Any = None, spans: Any = None) -> tuple[Cache, Step]:
        """Claims slots for the tokens of one forward pass, all or nothing per sequence.

        A sequence fits iff its `ok` is True, no position is at or past the capacity or comes twice, and its lowest
        query finds all it may see in every layer. One that does not fit takes nothing: its `ok` turns False, its
        queries give zeros, what it held is intact. Writing a position that is already there replaces it.

        Args:
          positions: int [B, T], position of each token in its sequence; any negative one is padding, anywhere.
          rows: int [B], which sequence each batch row continues; None: batch row b is sequence b. The same sequence may
            come several times (a flat list of tokens is a batch of T = 1). Rows outside [0, R) are padding.
          spans: int [B, T]; tokens of this call with the same span other than 0 see each other in both directions,
            within reach. None: all causal.

        Returns:
          The cache with the new bookkeeping, and the Step for the layers' put, get and attend.

        Raises:
          ValueError: while tracing, for wrong shapes or dtypes, or, if rows is None, more than max_block tokens.
          CacheError: if this cache was donated.
        """
        self._check_alive()
        positions = _integers("positions", positions)
        if positions.ndim != 2:
            raise ValueError(f"positions has shape {positions.shape}; give int [B, T], for one token each [:, None]")
        b, t = positions.shape
        num_rows = self.num_rows
        if rows is None and t > self.max_block:
            raise ValueError(
                f"a block of {t} tokens is longer than max_block {self.max_block}: feed it in pieces, or raise "
                f"max_block (up to the capacity, {self.capacity}) in Cache.init"
            )
        rows, known, whole = self._batch_rows("positions", b, rows)
        if spans is not None:
            spans = _integers("spans", spans)
            if spans.shape != (b, t):
                raise ValueError(f"spans has shape {spans.shape}, positions {positions.shape}; they must be equal")

        # Count: what each sequence brings. Index R means nowhere.
        real = (positions >= 0) & known[:, None]
        sequence = jnp.where(real, rows[:, None], num_rows)
        if whole:
            lowest = jnp.where(real, positions, FAR).min(1)
            highest = jnp.where(real, positions, EMPTY).max(1)
            count = real.sum(1, dtype=jnp.int32)
        else:
            lowest = jnp.full((num_rows,), FAR, jnp.int32).at[sequence].min(positions, mode="drop")
            highest = jnp.full((num_rows,), EMPTY, jnp.int32).at[sequence].max(positions, mode="drop")
            count = jnp.zeros((num_rows,), jnp.int32).at[sequence].add(1, mode="drop")
        dense = highest - lowest < count
        takes_part = highest >= 0

        # Serve: who fits.
        fit = self.ok & takes_part & (highest < self.capacity)
        if t > 1 or not whole:
            fit &= ~_has_twice(sequence, positions, num_rows)
        top = jnp.maximum(highest, self.lengths - 1)
        for group in self.groups:
            fit &= group.fits(lowest, highest, top, dense)
        lengths = jnp.where(fit, jnp.maximum(self.lengths, highest + 1), self.lengths)

        # Write.
        token_fits = real & fit.at[sequence].get(mode="fill", fill_value=False)
        sequence = jnp.where(token_fits, sequence, num_rows)
        clipped = jnp.clip(rows, 0, num_rows - 1)
        groups, steps = [], []
        for group in self.groups:
            slots = jnp.where(token_fits, group.slot(positions), group.num_slots)
            written = _write_rows(group.positions, sequence, slots, positions, whole)
            kv_spans = None
            if spans is not None:
                kv_spans = _write_rows(jnp.zeros_like(written), sequence, slots, spans, whole)
            filled = group.filled(lengths)
            steps.append(
                GroupStep(
                    slots=slots,
                    kv_positions=written if whole else written[clipped],
                    kv_spans=kv_spans if whole or kv_spans is None else kv_spans[clipped],
                    filled=filled if whole else filled[clipped],
                    slot_is_position=not group.wraps,
                )
            )
            lost = group.lost_by_writing(lowest, highest, dense, fit)
            groups.append(dataclasses.replace(group, positions=written, lost=lost))
        if self.encoded is not None:
            steps.append(self.encoded.step(None if whole else clipped))
        refused = takes_part & ~fit
        cache = dataclasses.replace(self, groups=tuple(groups), lengths=lengths, ok=self.ok & ~refused)
        step = Step(
            positions=jnp.where(token_fits, positions, EMPTY),
            rows=rows,
            ok=~(refused[clipped] & known),
            spans=spans,
            groups=tuple(steps),
            whole=whole,
        )
        return cache, step

    def begin_cross(self, lengths: Any, rows: Any = None) -> tuple[Cache, Step]:
        """Makes room for the encoder's output of some sequences, in place of what they had; all or nothing for each.

        Every Cross layer then puts once, with this step. From then on the queries of Cross layers see all of it, from
        every position, however the sequence is edited: it belongs to the row. A sequence fits iff its `ok` is True, its
        length is at most the size of the Cross layers, and it comes once. One that does not fit takes nothing: its `ok`
        turns False, and what it held is intact.

        Args:
          lengths: int [B], keys of the encoder's output of each batch row; what is put beyond it is padding. 0 is an
            output without keys: the row counts as encoded, and its queries get zeros. Any negative length brings
            nothing.
          rows: int [B], the sequence that each batch row belongs to; None: batch row b is sequence b. Rows outside
            [0, R) bring nothing.

        Returns:
          The cache with the new lengths, and the Step for the puts of the Cross layers.

        Raises:
          ValueError: while tracing, for wrong shapes or dtypes, or a cache without Cross layers.
          CacheError: if this cache was donated.

        >>> import jax.numpy as jnp
        >>> from jaxkv import Cache, Cross, LayerSpec
        >>> cache = Cache.init([LayerSpec(Cross(4), num_kv_heads=1, head_dim=2)], num_rows=2, capacity=8)
        >>> cache, step = cache.begin_cross(jnp.array([3, -1]))
        >>> layer = cache.layers[0].put(step, jnp.ones((2, 4, 1, 2)), jnp.ones((2, 4, 1, 2)))
        >>> cache = cache.with_layers([layer])
        >>> cache.encoder_cached.tolist()
        [True, False]
        """
        self._check_alive()
        encoded = self.encoded
        if encoded is None:
            raise ValueError(
                "begin_cross: this cache has no layer for an encoder's output; give Cache.init a "
                "LayerSpec(Cross(size), ...) for each layer that reads one"
            )
        lengths = _integers("lengths", lengths)
        if lengths.ndim != 1:
            raise ValueError(f"lengths has shape {lengths.shape}; give int [B], keys of each encoder output")
        rows, known, whole = self._batch_rows("lengths", lengths.shape[0], rows)
        num_rows = self.num_rows
        real = (lengths >= 0) & known
        sequence = jnp.where(real, rows, num_rows)
        count = jnp.zeros((num_rows,), jnp.int32).at[sequence].add(1, mode="drop")
        asked = jnp.full((num_rows,), EMPTY, jnp.int32).at[sequence].max(lengths, mode="drop")
        fit = self.ok & (count == 1) & (asked <= encoded.reach.size)
        refused = (count > 0) & ~fit
        encoded = dataclasses.replace(encoded, lengths=jnp.where(fit, asked, encoded.lengths))
        clipped = jnp.clip(rows, 0, num_rows - 1)
        positions = encoded.positions(jnp.where(real & fit[clipped], lengths, 0))
        slots = jnp.where(positions == EMPTY, encoded.num_slots, positions)
        own = dataclasses.replace(encoded.step(None if whole else clipped), slots=slots)
        step = Step(
            positions=positions,
            rows=rows,
            ok=~(refused[clipped] & known),
            spans=None,
            groups=(*(None for _ in self.groups), own),
            whole=whole,
            cross=True,
        )
        return dataclasses.replace(self, encoded=encoded, ok=self.ok & ~refused), step

    @property
    def encoder_cached(self) -> Any:
        """Whether the encoder's output of each row is there: bool [R], False everywhere without Cross layers."""
        return jnp.zeros_like(self.ok) if self.encoded is None else self.encoded.lengths >= 0

    def resume_point(self, row: Any, position: Any) -> Any:
        """Returns the largest p <= position from which a sequence can be decoded on correctly, in all layers.

        Full layers answer `position`; in a ring that has overwritten what a query there would see, the answer is lower.
        On a sequence with gaps it may be lower than necessary, never higher.

        Args:
          row: which sequence. int32 scalar, may be traced; an unknown one holds nothing.
          position: int32 scalar, in tokens.

        Returns:
          int32 scalar, at most the sequence's length.
        """
        row, known = self._row(row)
        position = jnp.clip(_integers("position", position), 0, jnp.where(known, self.lengths[row], 0))
        return self._resume(position, [group.lost[row] for group in self.groups])

    def can_resume(self, row: Any, position: Any) -> Any:
        """Returns whether decoding can go on at exactly `position`: bool scalar. See `resume_point`."""
        return self.resume_point(row, position) == position

    def rewind(self, lengths: Any) -> Cache:
        """Returns this cache with every sequence truncated, at its resume point at or below the asked length.

        Exact for Full layers, and for rings within `slack`; the new `lengths` says where each sequence landed. A
        sequence asked for its own length or more is not touched. An encoder's output stays.

        Args:
          lengths: int32 [R], in tokens.
        """
        self._check_alive()
        lengths = _integers("lengths", lengths)
        if lengths.shape != (self.num_rows,):
            raise ValueError(f"rewind: lengths has shape {lengths.shape}, the cache {self.num_rows} rows; give int [R]")
        landed = self._resume(jnp.clip(lengths, 0, self.lengths), [group.lost for group in self.groups])
        landed = jnp.where(lengths >= self.lengths, self.lengths, landed)
        return dataclasses.replace(self, groups=tuple(group.truncate(landed) for group in self.groups), lengths=landed)

    def reset(self, mask: Any) -> Cache:
        """Returns this cache without the sequences where mask (bool [R]) is True; they are empty and ok again.

        Their encoder outputs are gone too.
        """
        mask = self._mask("reset", mask)
        cache = self.rewind(jnp.where(mask, 0, FAR))
        encoded = None if self.encoded is None else self.encoded.reset(mask)
        return dataclasses.replace(cache, ok=cache.ok | mask, encoded=encoded)

    def retry(self, mask: Any) -> Cache:
        """Returns this cache with sequences that did not fit (bool [R]) ready to take tokens again."""
        return dataclasses.replace(self, ok=self.ok | self._mask("retry", mask))

    def remove(self, row: Any, begin: Any, end: Any = None) -> Cache:
        """Returns this cache without positions [begin, end) of one sequence.

        With a finite `end` the later tokens move down by `end - begin` and their keys are turned back by as much. With
        `end=None` the sequence is truncated, at the resume point at or below `begin`. Nothing changes if end <= begin,
        begin is past the length, or the row is unknown. An encoder's output stays.

        Args:
          row: which sequence. int32 scalar, may be traced.
          begin: first position forgotten, in tokens. int32 scalar.
          end: first position kept again; None forgets everything from `begin` on.

        Raises:
          NotSupportedError: while tracing, if `end` is given and a layer's keys can't be turned (`rotary=None`).
        """
        self._check_alive()
        if end is None:
            asked = jnp.where(jnp.arange(self.num_rows) == _integers("row", row), _integers("begin", begin), FAR)
            return self.rewind(asked)
        for i, spec in enumerate(self.specs):
            if spec.rotary is None and not isinstance(spec.reach, Cross):
                raise NotSupportedError(
                    f"remove with an end moves later tokens, but layer {i} has rotary=None: its keys can't turn to "
                    "their new positions; give rotary= in its LayerSpec, or end=None to truncate"
                )
        row, known = self._row(row)
        length = jnp.where(known, self.lengths[row], 0)
        begin = jnp.clip(_integers("begin", begin), 0, length)
        end = jnp.clip(_integers("end", end), begin, length)
        moves = [group.remove(row, begin, end) for group in self.groups]
        layers = []
        for layer in self.layers:
            if isinstance(layer.spec.reach, Cross):
                layers.append(layer)
                continue
            _, sources, delta = moves[layer.group]
            turn = _turn_keys(layer.spec, delta)
            layers.append(
                dataclasses.replace(
                    layer,
                    k=jax.tree.map(lambda buffer: self.layout.move(buffer, row, sources, turn), layer.k),  # noqa: B023
                    v=jax.tree.map(lambda buffer: self.layout.move(buffer, row, sources, lambda x: x), layer.v),  # noqa: B023
                )
            )
        lengths = self.lengths.at[row].add(begin - end)
        return dataclasses.replace(self, layers=tuple(layers), groups=tuple(m[0] for m in moves), lengths=lengths)

    def copy_prefix(self, src: Any, dst: Any, length: Any) -> Cache:
        """Returns this cache with row dst being the first `length` positions of row src, and ok.

        The copy ends at src's resume point at or below `length`; the new `lengths` says where. An encoder's output is
        copied whole. An unknown src holds nothing, an unknown dst changes nothing; `copy_prefix(r, r, n)` rewinds r.

        Args:
          src: int32 scalar, may be traced.
          dst: int32 scalar, may be traced.
          length: int32 scalar, in tokens.
        """
        self._check_alive()
        landed = self.resume_point(src, length)
        src, src_known = self._row(src)
        dst, known = self._row(dst)
        untouched = (src == dst) & src_known & (_integers("length", length) >= self.lengths[src])  # as rewind says
        landed = jnp.where(untouched, self.lengths[src], landed)
        dst = jnp.where(known, dst, self.num_rows)
        return dataclasses.replace(
            self,
            layers=self._map_buffers(lambda buffer: self.layout.copy(buffer, src, dst)),
            groups=tuple(group.copy_prefix(src, dst, landed) for group in self.groups),
            encoded=None if self.encoded is None else self.encoded.copy(src, src_known, dst),
            lengths=self.lengths.at[dst].set(landed, mode="drop"),
            ok=self.ok.at[dst].set(True, mode="drop"),
        )

    def take(self, rows: Any) -> Cache:
        """Returns a cache whose row r is row rows[r] of this one: beam reordering, best-of-n.

        Args:
          rows: int [R2]; R2 may differ from R, a row may come several times, one outside [0, R) gives an empty row.
        """
        self._check_alive()
        rows = _integers("rows", rows)
        if rows.ndim != 1:
            raise ValueError(f"take: rows has shape {rows.shape}; give a list of row numbers, int [R2]")
        known = (rows >= 0) & (rows < self.num_rows)
        rows = jnp.clip(rows, 0, self.num_rows - 1)
        return dataclasses.replace(
            self,
            layers=self._map_buffers(lambda buffer: self.layout.take(buffer, rows)),
            groups=tuple(group.take(rows, known) for group in self.groups),
            encoded=None if self.encoded is None else self.encoded.take(rows, known),
            lengths=jnp.where(known, self.lengths[rows], 0),
            ok=jnp.where(known, self.ok[rows], True),
        )

    def check(self) -> None:
        """Raises CacheFullError on the host if a sequence did not fit; names it, what it holds and the cure."""
        self._check_alive()
        full = np.flatnonzero(~np.asarray(self.ok))
        if full.size:
            held = ", ".join(f"{row} (holds {int(self.lengths[row])})" for row in full)
            encoder = "" if self.encoded is None else f", or its encoder's output into {self.encoded.reach}"
            raise CacheFullError(
                f"sequence {held} did not fit into capacity {self.capacity}{encoder}; what it holds is intact. Make a "
                "larger cache, remove or rewind tokens and call retry, or reset the row"
            )

    def describe(self) -> str:
        """Returns a readable account: per group its layers, reach, storage, bytes and the positions each row holds."""
        lines = [f"{self!r}"]
        for number, group in enumerate(self.bookkeeping):
            layers = [layer for layer in self.layers if layer.group == number]
            count = sum(layer.num_stacked or 1 for layer in layers)
            kept = dict.fromkeys(
                f"{s.num_kv_heads} x {s.head_dim}" + (f"/{s.value_dim}" if s.value_dim != s.head_dim else "") +
                f" k {s.k_storage} v {s.v_storage}"
                for s in (layer.spec for layer in layers)
            )  # fmt: skip
            size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((layers, group)))
            lines.append(
                f"{count} layer{'s' * (count > 1)} {group.reach}: {', '.join(kept)}, "
                f"{group.num_slots} slots, {format_bytes(size)}{_held(group)}"
            )
        return "\n".join(lines)

    def __repr__(self) -> str:
        if not hasattr(self.lengths, "shape"):  # a tree of something else, such as shardings
            return show(self)
        count = sum(layer.num_stacked or 1 for layer in self.layers)
        return (
            f"Cache(layers={count}, num_rows={self.num_rows}, capacity={self.capacity}, max_block={self.max_block}, "
            f"slack={self.slack}, layout={self.layout}, nbytes={format_bytes(self.nbytes)})"
        )

    def _batch_rows(self, name: str, b: int, rows: Any) -> tuple[Any, Any, bool]:
        """Returns int32 [B]: the sequence of each batch row; bool [B]: whether there is one; whether it is row b."""
        if rows is None:
            if b > self.num_rows:
                raise ValueError(f"{name} has {b} batch rows, the cache {self.num_rows} sequences; name them by rows=")
            return jnp.arange(b, dtype=jnp.int32), jnp.ones((b,), bool), b == self.num_rows
        rows = _integers("rows", rows)
        if rows.shape != (b,):
            raise ValueError(f"rows has shape {rows.shape}, {name} has {b} batch rows; give int [{b}]")
        return rows, (rows >= 0) & (rows < self.num_rows), False

    def _resume(self, position: Any, lost: list[Any]) -> Any:
        for _ in range(2 * len(self.groups)):  # one group's fallback may move another's
            for group, interval in zip(self.groups, lost, strict=True):
                position = resume(group.reach, interval, position)
        return position

    def _row(self, row: Any) -> tuple[Any, Any]:
        row = _integers("row", row)
        if row.ndim:
            raise ValueError(f"row has shape {row.shape}; name one sequence by an int32 scalar")
        return jnp.clip(row, 0, self.num_rows - 1), (row >= 0) & (row < self.num_rows)

    def _mask(self, name: str, mask: Any) -> Any:
        self._check_alive()
        mask = jnp.asarray(mask)
        if mask.shape != (self.num_rows,) or mask.dtype != bool:
            raise ValueError(
                f"{name}: mask is {mask.dtype}{list(mask.shape)}; give bool [{self.num_rows}], one per row"
            )
        return mask

    def _map_buffers(self, f: Any) -> tuple[Layer, ...]:
        return tuple(
            dataclasses.replace(layer, k=jax.tree.map(f, layer.k), v=jax.tree.map(f, layer.v)) for layer in self.layers
        )

    def _check_alive(self) -> None:
        for x in jax.tree.leaves(self):
            if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and x.is_deleted():
                raise CacheError(
                    "this cache was donated to a jitted function, so its memory is reused; go on with the cache that "
                    "the function returned, or don't donate it"
                )


def shardings(cache: Any, sharding: Any) -> Any:
    """Returns a tree of shardings for a cache: `sharding` (axes R, K, V, H) for buffers, replicated bookkeeping."""
    mesh, spec = sharding.mesh, sharding.spec
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    whole = jax.tree.map(lambda _: replicated, cache)

    def place(buffer: Any) -> Any:
        stack = (None,) * (len(buffer.shape) - 4)
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*stack, *spec))

    layers = tuple(
        dataclasses.replace(layer, k=jax.tree.map(place, layer.k), v=jax.tree.map(place, layer.v))
        for layer in cache.layers
    )
    return dataclasses.replace(whole, layers=layers)


def _bookkeeping(groups: tuple[Group, ...], encoded: Encoded | None) -> tuple[Any, ...]:
    return groups if encoded is None else (*groups, encoded)


def _integers(name: str, x: Any) -> Any:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} has dtype {x.dtype}; give integers, such as int32")
    return x.astype(jnp.int32)


def _has_twice(sequence: Any, positions: Any, num_rows: int) -> Any:
    """Returns which sequences bring one position twice: bool [R]. sequence, positions: int32 [B, T]."""
    order = jnp.lexsort((positions.ravel(), sequence.ravel()))
    r, p = sequence.ravel()[order], positions.ravel()[order]
    twice = (r[1:] == r[:-1]) & (p[1:] == p[:-1])
    return jnp.zeros((num_rows,), bool).at[r[1:]].max(twice, mode="drop")


def _write_rows(target: Any, sequence: Any, slots: Any, values: Any, whole: bool) -> Any:
    """Returns target [R, V] with values [B, T] at (sequence, slots); either index past its end means nowhere."""
    if whole:
        return jax.vmap(lambda row, s, x: row.at[s].set(x, mode="drop"))(target, slots, values)
    return target.at[sequence, slots].set(values, mode="drop")


def _turn_keys(spec: LayerSpec, delta: Any) -> Any:
    """Returns the function that turns stored keys [..., V, H] by delta [V]."""

    def turn(stored: Any) -> Any:
        k = spec.k_storage.decode(stored)
        by = delta.reshape((1,) * (k.ndim - 2) + (-1, 1))
        by = jnp.broadcast_to(by, (*k.shape[:-1], 1))
        return jnp.where(by != 0, spec.k_storage.encode(spec.rotary.shift(k, by)), stored)

    return turn


def _held(group: Any) -> str:
    """Returns a text of the positions each row holds, empty for abstract values."""
    known = group.lengths if isinstance(group, Encoded) else group.positions
    if isinstance(known, jax.core.Tracer) or not isinstance(known, jax.Array | np.ndarray):
        return ""
    positions = group.positions(known) if isinstance(group, Encoded) else known
    lines = []
    for row, slots in enumerate(np.asarray(positions)):
        held = np.sort(slots[slots != EMPTY])
        runs = np.split(held, np.flatnonzero(np.diff(held) != 1) + 1) if held.size else []
        text = ", ".join(f"{run[0]}" if run.size == 1 else f"{run[0]}-{run[-1]}" for run in runs)
        lines.append(f"\n  row {row}: {text or 'empty'}")
    return "".join(lines)
