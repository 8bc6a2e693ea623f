"""Cache: what a model remembers of several sequences, and every operation on it."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxkv.cache import edit, restore, snapshot
from jaxkv.cache.arguments import FAR, batch_rows, integers, one_row, row_mask, shared_length
from jaxkv.cache.build import Sizes, checked_specs, parts, place, stored_as
from jaxkv.cache.claim import claim, claim_cross
from jaxkv.cache.cross import Encoded
from jaxkv.cache.group import Group
from jaxkv.cache.layer import Layer
from jaxkv.cache.look import html, show
from jaxkv.cache.pages import Pages
from jaxkv.cache.recurrent import States
from jaxkv.cache.rows import Rows
from jaxkv.cache.show import describe, headline
from jaxkv.cache.snapshot import Snapshot
from jaxkv.cache.spec import EMPTY, Cross, LayerSpec, Recurrent
from jaxkv.cache.state_layer import StateLayer
from jaxkv.cache.step import Step
from jaxkv.cache.tree import checked_parents, commit
from jaxkv.errors import CacheError, CacheFullError, NotSupportedError
from jaxkv.meshes import automatic, beside, like, resized


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Cache:
    """Keys and values of the past tokens of several sequences, for all layers of a model. Immutable.

    Every method is pure and returns a new cache; all but `check`, `describe`, `init`, `load` and `save` run under `jit`
    with traced arguments. Donate the cache (`jax.jit(..., donate_argnames="cache")`) or carry it in a loop, and it is
    changed in place; the old value is then gone.

    Attributes:
      layers: one Layer per layer of the model; with `stacked=True` one stack per distinct LayerSpec, in order of first
        appearance, for a scan over layers: `layers[0].at(i)`. Without it a model of equal layers has as many Layers
        here, and `at` is an error. The Layer of a spec with `shares` is empty: read that of the layer that it shares.
        A StateLayer for a layer that is Recurrent.
      groups: bookkeeping, one Group per distinct reach but Cross and Recurrent.
      encoded: bookkeeping of the Cross layers; None if there are none.
      lengths: int32 [R], the next position of each sequence.
      ok: bool [R], False once a sequence did not fit; it takes nothing more until `retry` or `reset`.
      capacity: tokens a sequence can hold.
      max_block: most tokens of one sequence in one `begin`.
      slack: how far behind the highest position written a `rewind` of a ring may go and land exactly.
      layout: where the numbers lie.
      shared: how many first tokens all rows have in common, by `sharing`; None if that was not declared.
      recurrent: bookkeeping, one States per distinct Recurrent.

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

    layers: tuple[Layer, ...]  # StateLayers among them; typed as what most of them are
    groups: tuple[Group, ...]
    encoded: Encoded | None
    lengths: Any  # int32 [R]
    ok: Any  # bool [R]
    capacity: int = dataclasses.field(metadata={"static": True})
    max_block: int = dataclasses.field(metadata={"static": True})
    slack: int = dataclasses.field(metadata={"static": True})
    layout: Any = dataclasses.field(metadata={"static": True})
    shared: Any = None  # int32 scalar, see `sharing`; None: nothing is declared
    recurrent: tuple[States, ...] = ()

    @classmethod
    def init(
        cls,
        specs: Sequence[LayerSpec],
        num_rows: int,
        capacity: int,
        *,
        storage: Any = None,
        layout: Any = Rows(),
        max_block: int | None = None,
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
          storage: how keys and values are kept in all layers, such as Int8(), or a pair (of keys, of values); None: as
            each LayerSpec says. Recurrent layers have neither; their states are float32.
          layout: `Rows()`, one stretch of slots for each sequence; or `Pages(num_pages, page_size)`, a pool that all
            sequences share.
          max_block: most tokens of one sequence in one `begin`; rings are this much longer than their reach. More than
            the capacity counts as the capacity. None chooses: as many as the shortest reach that wraps, as a power of
            two from 64 to 512, and no more than a pool of pages can hold.
          slack: tokens that a `rewind` may go back in a ring beyond what its queries see; speculation wants its draft
            length here.
          stacked: equal specs share one Layer with buffers [L, ...], for models that scan over their layers.
          sharding: None, or a `jax.sharding.NamedSharding` for axes (R, K, V, H) of k and v; on pages (None, K, None,
            H), as the pool is that of all rows. The bookkeeping is replicated over its mesh, as are the heads that an
            axis does not divide.

        Raises:
          ValueError: for no layers, a model instead of its specs, sizes below 1 or above 2**30, a negative slack, a
            reach with as many sinks as capacity, or Cross layers of different sizes; for a layer that shares itself, a
            later one, one that shares too, or one of another kind, or any with stacked=True; for pages larger than the
            capacity, a pool that can't hold max_block tokens, or one divided over rows.
        """
        specs = stored_as(checked_specs(specs), storage)
        if not isinstance(layout, Rows | Pages):
            raise ValueError(f"Cache.init(layout={layout!r}): give Rows() or Pages(num_pages, page_size)")
        sizes = Sizes.of(specs, num_rows, capacity, max_block, slack, layout)
        layout.check(sizes.capacity, sizes.max_block, sharding)

        def build() -> Cache:
            lengths, ok = jnp.zeros((sizes.num_rows,), jnp.int32), jnp.ones((sizes.num_rows,), bool)
            layers, groups, recurrent, encoded = parts(specs, sizes, layout, stacked)
            own = layers, groups, encoded, lengths, ok, sizes.capacity, sizes.max_block, sizes.slack, layout
            return cls(*own, recurrent=recurrent)

        return place(build, sharding)

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
        """What each layer's `group` counts: the groups, those of recurrent layers, then that of the Cross layers."""
        return (*self.groups, *self.recurrent, *(() if self.encoded is None else (self.encoded,)))

    @property
    def num_free(self) -> Any:
        """How many pages each group has left: int32 [G], in the order of `bookkeeping`; int32 [0] on rows."""
        free = [group.pages.num_free for group in self.bookkeeping if group.pages is not None]
        return jnp.stack(free) if free else jnp.zeros((0,), jnp.int32)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers and bookkeeping, from shapes alone."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    def with_layers(self, layers: Iterable[Layer]) -> Cache:
        """Returns this cache with the layers that a forward pass has put into.

        What stands in the place of a layer that shares another's keys and values is passed over.

        Raises:
          ValueError: if number or kinds of layers are not those of this cache.
        """
        layers = tuple(layers)
        if len(layers) != len(self.layers):
            raise ValueError(f"with_layers got {len(layers)} layers, the cache has {len(self.layers)}")
        for i, (new, old) in enumerate(zip(layers, self.layers, strict=True)):
            if not old.num_kept:
                continue
            if not isinstance(new, Layer | StateLayer):
                raise ValueError(f"with_layers: layer {i} is of type {type(new).__name__}; give what its put returned")
            if new.spec != old.spec or new.group != old.group:
                raise ValueError(f"with_layers: layer {i} is {new.spec}, the cache has {old.spec}; keep their order")
        kept = [
            dataclasses.replace(new, index=None) if old.num_kept else old
            for new, old in zip(layers, self.layers, strict=True)
        ]
        return dataclasses.replace(self, layers=tuple(kept))

    def begin(self, positions: Any, rows: Any = None, spans: Any = None, parents: Any = None) -> tuple[Cache, Step]:
        """Claims slots for the tokens of one forward pass, all or nothing per sequence.

        A sequence fits iff its `ok` is True, no position is at or past the capacity or comes twice, and its lowest
        query finds all it may see in every layer. On pages there must also be enough of them for what it writes to,
        where it has none of its own; sequences are served in the order of rows. One that does not fit takes nothing:
        its `ok` turns False, its queries give zeros, what it held is intact. Writing a position that is already there
        replaces it.

        In a cache with Recurrent layers a sequence must go on where it stands: it comes in one batch row, and its
        positions are those from its length on, one after the other.

        Args:
          positions: int [B, T], position of each token in its sequence; any negative one is padding, anywhere.
          rows: int [B], which sequence each batch row continues; None: batch row b is sequence b. The same sequence may
            come several times (a flat list of tokens is a batch of T = 1). Rows outside [0, R) are padding.
          spans: int [B, T]; tokens of this call with the same span other than 0 see each other in both directions,
            within reach. None: all causal.
          parents: int [B, T], for a tree of tokens: which token of the call each one follows, by its column; a negative
            one follows what the row holds. A token comes after its parent; the positions are consecutive from the row's
            length on, padding comes last. A token sees what the row holds and its ancestors, and stands where its
            branch puts it, at `step.depths`. Then `commit` keeps one branch. None: each follows all before it.

        Returns:
          The cache with the new bookkeeping, and the Step for the layers' put, get and attend.

        Raises:
          ValueError: while tracing, for wrong shapes or dtypes, parents together with spans, or, if rows is None, more
            than max_block tokens; outside of jit, for a parent that does not come before its child (else that row does
            not fit).
          NotSupportedError: while tracing, for parents in a cache with Recurrent layers.
          CacheError: if this cache was donated.
        """
        self._check_alive()
        positions = integers("positions", positions)
        if positions.ndim != 2:
            raise ValueError(f"positions has shape {positions.shape}; give int [B, T], for one token each [:, None]")
        b, t = positions.shape
        if rows is None and t > self.max_block:
            raise ValueError(
                f"a block of {t} tokens is longer than max_block {self.max_block}: feed it in pieces, or raise "
                f"max_block (up to the capacity, {self.capacity}) in Cache.init"
            )
        rows, known, whole = batch_rows("positions", b, rows, self.num_rows)
        if spans is not None:
            spans = integers("spans", spans)
            if spans.shape != (b, t):
                raise ValueError(f"spans has shape {spans.shape}, positions {positions.shape}; they must be equal")
        if parents is not None:
            if spans is not None:
                raise ValueError(
                    "begin got parents and spans; the tokens of a tree see their ancestors and nothing else"
                )
            if self.recurrent:
                raise NotSupportedError(
                    f"begin got parents, and this cache has layers of {self.recurrent[0].reach}: a state is that of "
                    "one text, not of several branches; draft one text at a time (speculate(tree=None)), with a slack "
                    "of its length"
                )
            parents = checked_parents(parents, positions)
        run = automatic(functools.partial(claim, whole=whole), (like(self), PartitionSpec()))
        return run(self, positions, rows, known, spans, parents)

    def commit(self, step: Step, path: Any) -> Cache:
        """Returns this cache with one branch of the tree of tokens that `step` began, per row, and nothing else of it.

        The keys and values of the branch move up to the row's length, where their depths put them; a ring keeps what it
        may need again as for any block. A row can't fail unless it was edited since `begin`. Forked on pages, it needs
        pages of its own for what moves: without them it is as it was before `begin`, and its `ok` turns False. A row
        that is of another length than `begin` made it stays as it is, and its `ok` turns False too, unless it holds
        nothing of the tree any more. After `take`, row r is asked for the branch of its own tree: give trees of one
        form then.

        Args:
          step: of `begin(positions, parents=)`, after all layers have put.
          path: int [B, D], the columns of the branch's tokens from one that follows the row down, each the child of the
            one before; what comes after a number that isn't (such as -1, for shorter ones) is dropped.

        Raises:
          ValueError: while tracing, for a step without parents or a path of another shape.
          CacheError: if this cache was donated.

        >>> import jax.numpy as jnp
        >>> from jaxkv import Cache, Full, LayerSpec
        >>> cache = Cache.init([LayerSpec(Full(), num_kv_heads=1, head_dim=1)], num_rows=1, capacity=8)
        >>> cache, step = cache.begin(jnp.array([[0, 1, 2, 3]]), parents=jnp.array([[-1, 0, 0, 2]]))
        >>> step.depths
        Array([[0, 1, 1, 2]], dtype=int32)
        >>> x = jnp.array([10.0, 11.0, 12.0, 13.0]).reshape(1, 4, 1, 1)
        >>> cache = cache.with_layers([cache.layers[0].put(step, x, x)])
        >>> cache = cache.commit(step, jnp.array([[0, 2, 3, -1]]))
        >>> cache.lengths, cache.layers[0].k[0, 0, :3, 0]
        (Array([3], dtype=int32), Array([10., 12., 13.], dtype=float32))
        """
        self._check_alive()
        if step.tree is None:
            raise ValueError("commit: this step has no tree; give the one of cache.begin(positions, parents=parents)")
        path = integers("path", path)
        if path.ndim != 2 or path.shape[0] != step.positions.shape[0]:
            raise ValueError(f"commit: path has shape {path.shape}; give int [{step.positions.shape[0]}, D], -1 padded")
        known = (step.rows >= 0) & (step.rows < self.num_rows)
        took = (step.positions != EMPTY).any(1)
        run = automatic(functools.partial(commit, whole=step.whole), like(self))
        return run(self, step.tree, step.rows, known, took, path)

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
        if self.encoded is None:
            raise ValueError(
                "begin_cross: this cache has no layer for an encoder's output; give Cache.init a "
                "LayerSpec(Cross(size), ...) for each layer that reads one"
            )
        lengths = integers("lengths", lengths)
        if lengths.ndim != 1:
            raise ValueError(f"lengths has shape {lengths.shape}; give int [B], keys of each encoder output")
        rows, known, whole = batch_rows("lengths", lengths.shape[0], rows, self.num_rows)
        run = automatic(functools.partial(claim_cross, whole=whole), (like(self), PartitionSpec()))
        return run(self, lengths, rows, known)

    def sharing(self, n: Any) -> Cache:
        """Returns this cache, declaring that all rows hold the same tokens in their first n positions.

        `attend` then reads those once for all rows of a call, not once for each: many samples of one prompt cost little
        more attention than one. Every `begin` passes this on to its layers, so a model needs no change. It must be true
        of the rows with tokens in the call, in all layers: of keys, values and positions, and of an encoder's output
        where n > 0. `copy_prefix` and `take` make such rows. During the prefill of these tokens only those before the
        block are read once. Nothing checks the declaration: rows that differ, such as one that was reset and continues
        with another text, read one another's keys. `jaxkv.testing.assert_shared` compares them.

        Args:
          n: number of tokens, on Pages a multiple of the page size; or an int32 scalar, which may be traced and is
            rounded down to whole pages. 0 ends the sharing.

        Raises:
          ValueError: for a number below 0, above the capacity, or that is not a multiple of the page size.

        >>> import jax.numpy as jnp
        >>> from jaxkv import Cache, Full, LayerSpec
        >>> cache = Cache.init([LayerSpec(Full(), num_kv_heads=1, head_dim=2)], num_rows=4, capacity=8)
        >>> cache, _ = cache.begin(jnp.tile(jnp.arange(5), (4, 1)))  # and every layer puts the same for all rows
        >>> _, step = cache.sharing(5).begin(jnp.full((4, 1), 5))
        >>> step.shared
        Array(5, dtype=int32)
        """
        shared = shared_length(n, self.layout.page_size, self.capacity)
        return dataclasses.replace(self, shared=beside(self.lengths, shared))

    @property
    def encoder_cached(self) -> Any:
        """Whether the encoder's output of each row is there: bool [R], False everywhere without Cross layers."""
        return jnp.zeros_like(self.ok) if self.encoded is None else self.encoded.lengths >= 0

    def resume_point(self, row: Any, position: Any) -> Any:
        """Returns the largest p <= position from which a sequence can be decoded on correctly, in all layers.

        Full layers answer `position`; in a ring that has overwritten what a query there would see, the answer is lower.
        On a sequence with gaps it may be lower than necessary, never higher. Recurrent layers answer where they have a
        state: at a checkpoint, within `slack`, or 0. `describe()` names the checkpoints.

        Args:
          row: which sequence. int32 scalar, may be traced; an unknown one holds nothing.
          position: int32 scalar, in tokens.

        Returns:
          int32 scalar, at most the sequence's length.
        """
        row, known = one_row(row, self.num_rows)
        run = automatic(edit.resume_point, PartitionSpec())
        return run(self, row, known, integers("position", position))

    def can_resume(self, row: Any, position: Any) -> Any:
        """Returns whether decoding can go on at exactly `position`: bool scalar. See `resume_point`."""
        return self.resume_point(row, position) == position

    def rewind(self, lengths: Any) -> Cache:
        """Returns this cache with every sequence truncated, at its resume point at or below the asked length.

        Exact for Full layers, and for rings and recurrent states within `slack`; the new `lengths` says where each
        sequence landed. A sequence asked for its own length or more is not touched. An encoder's output stays.

        Args:
          lengths: int32 [R], in tokens.
        """
        self._check_alive()
        lengths = integers("lengths", lengths)
        if lengths.shape != (self.num_rows,):
            raise ValueError(f"rewind: lengths has shape {lengths.shape}, the cache {self.num_rows} rows; give int [R]")
        return automatic(edit.rewind, like(self))(self, lengths)

    def reset(self, mask: Any) -> Cache:
        """Returns this cache without the sequences where mask (bool [R]) is True; they are empty and ok again.

        Their encoder outputs are gone too.
        """
        self._check_alive()
        return automatic(edit.reset, like(self))(self, row_mask("reset", mask, self.num_rows))

    def retry(self, mask: Any) -> Cache:
        """Returns this cache with sequences that did not fit (bool [R]) ready to take tokens again."""
        self._check_alive()
        return dataclasses.replace(self, ok=self.ok | row_mask("retry", mask, self.num_rows))

    def checkpoint(self, rows: Any = None) -> Cache:
        """Returns this cache with the states at which rows stand kept as checkpoints, to which they can go back.

        For Recurrent layers; others can go back anyway. It moves integers only. The newest `Recurrent.keep` checkpoints
        of a row stay.

        Args:
          rows: int [B], which sequences; unknown ones are passed over. None: all.

        >>> spec = jaxkv.LayerSpec(jaxkv.Recurrent(tail=(4, 2), every=None))
        >>> cache = jaxkv.Cache.init([spec], num_rows=1, capacity=16)
        >>> for start in (0, 4, 8):
        ...     cache, _ = cache.begin(start + jnp.arange(4)[None])
        ...     cache = cache.checkpoint() if start == 0 else cache
        >>> cache.resume_point(0, 11), cache.rewind([5]).lengths
        (Array(4, dtype=int32), Array([4], dtype=int32))
        """
        self._check_alive()
        rows = jnp.arange(self.num_rows, dtype=jnp.int32) if rows is None else integers("rows", rows)
        if rows.ndim != 1:
            raise ValueError(f"checkpoint: rows has shape {rows.shape}; give a list of row numbers, int [B]")
        return automatic(edit.checkpoint, like(self))(self, rows)

    def keep(self, mask: Any) -> Cache:
        """Returns this cache without the tokens that a mask doesn't name: for eviction by rules of your own.

        Positions and lengths stay what they were, and nothing counts as lost: what is forgotten is just not seen any
        more, in all layers but Cross and Recurrent. Pages without a token are free again. Several such masks add up.

        Args:
          mask: bool [R, capacity], by position; what it says of positions that a row doesn't hold is not looked at.

        >>> cache = jaxkv.Cache.init([jaxkv.LayerSpec(jaxkv.Full(), 1, 2)], 1, 8)
        >>> cache, step = cache.begin([[0, 1, 2]])
        >>> cache = cache.keep(jnp.arange(8)[None] != 1)
        >>> cache.groups[0].positions[0, :4].tolist(), cache.lengths.tolist()
        ([0, -1, 2, -1], [3])
        """
        self._check_alive()
        mask = jnp.asarray(mask)
        if mask.shape != (self.num_rows, self.capacity) or mask.dtype != bool:
            raise ValueError(
                f"keep: mask is {mask.dtype}{list(mask.shape)}; give bool [R, capacity] = "
                f"{[self.num_rows, self.capacity]}"
            )
        return automatic(edit.keep, like(self))(self, mask)

    def remove(self, row: Any, begin: Any, end: Any = None) -> Cache:
        """Returns this cache without positions [begin, end) of one sequence.

        With a finite `end` the later tokens move down by `end - begin` and their keys are re-rotated by as much. With
        `end=None` the sequence is truncated, at the resume point at or below `begin`. Nothing changes if end <= begin,
        begin is past the length, or the row is unknown. An encoder's output stays.

        On pages, tokens that move need pages of the row's own. Where there are too few nothing changes but `ok` of the
        row, which turns False; truncating always works.

        Args:
          row: which sequence. int32 scalar, may be traced.
          begin: first position forgotten, in tokens. int32 scalar.
          end: first position kept again; None forgets everything from `begin` on.

        Raises:
          NotSupportedError: while tracing, if `end` is given and a layer's keys can't be re-rotated (`rotary=None`), or
            a layer is Recurrent: what its state took in can't be taken out.
        """
        self._check_alive()
        if end is None:
            here = jnp.arange(self.num_rows, dtype=jnp.int32) == integers("row", row)
            return self.rewind(jnp.where(here, integers("begin", begin), FAR))
        for i, spec in enumerate(self.specs):
            if isinstance(spec.reach, Recurrent):
                raise NotSupportedError(
                    f"remove with an end takes tokens out of the middle, but layer {i} is of {spec.reach}: its state "
                    "has taken them in, and later ones after them; give end=None to truncate, and feed the rest again"
                )
            if spec.rotary is None and not isinstance(spec.reach, Cross):
                raise NotSupportedError(
                    f"remove with an end moves later tokens, but layer {i} has rotary=None: its keys can't be "
                    "re-rotated to their new positions; give rotary= in its LayerSpec, or end=None to truncate"
                )
        row, known = one_row(row, self.num_rows)
        return automatic(edit.remove, like(self))(self, row, known, integers("begin", begin), integers("end", end))

    def copy_prefix(self, src: Any, dst: Any, length: Any) -> Cache:
        """Returns this cache with row dst being the first `length` positions of row src, and ok.

        Costs what is copied, whatever the capacity, where the cache is donated or the carry of a loop. On pages only
        integers move, and the two rows share what they have in common.

        The copy ends at src's resume point at or below `length`; the new `lengths` says where. An encoder's output is
        copied whole. An unknown src holds nothing, an unknown dst changes nothing; `copy_prefix(r, r, n)` rewinds r.

        Args:
          src: int32 scalar, may be traced.
          dst: int32 scalar, may be traced.
          length: int32 scalar, in tokens.
        """
        self._check_alive()
        src, src_known = one_row(src, self.num_rows)
        dst, dst_known = one_row(dst, self.num_rows)
        run = automatic(edit.copy_prefix, like(self))
        return run(self, src, src_known, dst, dst_known, integers("length", length))

    def take(self, rows: Any) -> Cache:
        """Returns a cache whose row r is row rows[r] of this one: beam reordering, best-of-n.

        As many rows as before cost what the longest of them holds, whatever the capacity, where the cache is donated or
        the carry of a loop. Another number of rows makes new buffers. On pages only integers move: the pool stays as
        large as it is, and rows that come several times share it.

        Args:
          rows: int [R2]; R2 may differ from R, a row may come several times, one outside [0, R) gives an empty row.
        """
        self._check_alive()
        rows = integers("rows", rows)
        if rows.ndim != 1:
            raise ValueError(f"take: rows has shape {rows.shape}; give a list of row numbers, int [R2]")
        places = like(self)
        if rows.shape[0] != self.num_rows:
            buffers = jax.tree.map(lambda x: resized(x, x.ndim - 4, rows.shape[0]), self.layers)
            places = dataclasses.replace(places, layers=buffers)
        return automatic(edit.take, places)(self, rows)

    def save(
        self,
        path: str | os.PathLike[str],
        rows: Sequence[int] | None = None,
        *,
        fingerprint: str | None = None,
        logits: Any = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Writes what rows hold into a file, from which `load` goes on, in this process or another, as if nothing were.

        Of each row the file has the tokens in the order of their positions, as they are stored, its length, and what
        its rings have lost; not what the cache could hold. It is safetensors with checksums, and is written whole or
        not at all: the disk may be full, and what was there under that name stays. Rows that share pages are written
        each by itself.

        Args:
          path: the file, replaced if it is there; "~" is the home directory.
          rows: which rows, int [N]; None: all.
          fingerprint: a text that tells the model, with its weights, from all others; `load` compares it.
          logits: [N, V], what the model said comes next in each row, for who goes on without reading a token again.
          metadata: strings by name, to come back with the rows.

        Raises:
          ValueError: for rows that there aren't, while tracing, and for specs that no other cache could be compared
            with.
          NotSupportedError: if parts of the cache lie on devices of other processes.
          OSError: if the file can't be written.
          CacheError: if this cache was donated.

        >>> import os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "rows.safetensors")
        >>> spec = jaxkv.LayerSpec(jaxkv.Full(), num_kv_heads=1, head_dim=2)
        >>> cache = jaxkv.Cache.init([spec], num_rows=2, capacity=8)
        >>> cache, step = cache.begin(jnp.array([[0, 1, 2], [0, 1, -1]]))
        >>> x = jnp.ones((2, 3, 1, 2))
        >>> cache = cache.with_layers([cache.layers[0].put(step, x, x)])
        >>> cache.save(path, rows=[1])
        >>> jaxkv.Cache.init([spec], num_rows=1, capacity=4).load(path).lengths
        Array([2], dtype=int32)
        """
        self._check_alive()
        snapshot.save(self, path, rows, fingerprint, logits, metadata)

    def load(
        self,
        path: str | os.PathLike[str] | Snapshot,
        rows: Sequence[int] | None = None,
        *,
        saved: Sequence[int] | None = None,
        fingerprint: str | None = None,
    ) -> Cache:
        """Returns this cache with rows that `save` wrote, in place of what these rows held.

        Capacity, layout, storage, sharding and number of rows are this cache's own, whatever they were where the rows
        come from; its layers must be of the same kinds. Numbers kept by the same storage come back bit for bit, others
        are decoded and encoded. A ring that is shorter than the saved one keeps what it has room for.

        This cache is donated, as `generate` donates its: go on with the one that is returned. If anything is wrong with
        the file nothing has changed yet, and this one lives on.

        Args:
          path: the file, or a `jaxkv.Snapshot` of it.
          rows: int [N], the rows that take them; None: the first ones.
          saved: int [N], which of the file's rows; None: all.
          fingerprint: of the model, as `save` got it; None: it is not compared.

        Raises:
          OSError: if the file can't be opened.
          ValueError: if it is damaged, cut short, not one of `save`, of a newer version, of another model by its
            fingerprint or its layers; for rows that there aren't.
          CacheFullError: if the capacity is too small, or pages are too few; it says how much is needed.
          CacheError: if this cache was donated.
        """
        self._check_alive()
        return restore.load(self, path, rows, saved, fingerprint)

    def check(self) -> None:
        """Raises CacheFullError on the host if a sequence did not fit; names it, its tokens and the cure."""
        self._check_alive()
        full = np.flatnonzero(~np.asarray(self.ok))
        if full.size:
            held = ", ".join(f"{row} (holds {int(self.lengths[row])})" for row in full)
            encoder = "" if self.encoded is None else f", or its encoder's output into {self.encoded.reach}"
            pools = "".join(
                f", or into the pages of {group.reach}: a pool of {group.pages.num_pages} pages has "
                f"{int(group.pages.num_free)} left"
                for group in self.groups
                if group.pages is not None
            )
            raise CacheFullError(
                f"sequence {held} did not fit into capacity {self.capacity}{encoder}{pools}; what it holds is intact. "
                f"Make a larger cache{' or pool' * bool(pools)}, remove or rewind tokens and call retry, or reset the "
                "row"
            )

    def describe(self) -> str:
        """Returns a readable account: per group its layers, reach, storage, slots and why there are as many, how many
        pages are used, shared and free, bytes, and the positions each row holds."""
        self._check_alive()
        return describe(self)

    def __repr__(self) -> str:
        return headline(self)

    def _repr_html_(self) -> str:
        return html(self, show)

    def _check_alive(self) -> None:
        for x in jax.tree.leaves(self):
            if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and x.is_deleted():
                raise CacheError(
                    "this cache was donated to a jitted function, so its memory is reused; continue with the cache "
                    "that the function returned, or don't donate it"
                )
