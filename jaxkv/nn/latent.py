"""Multi-head latent attention apart from its parameters; `jaxkv.nnx` and `jaxkv.linen` have the module.

DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1. The cache keeps one latent and one rotary key per token. The
keys and values that each head would make of a latent are not made to decode: the projection of the keys goes to the
queries instead, that of the values to what was read (section 2.1.2, "absorbed"). Many queries at once read a block of
latents faster when it is first expanded to the keys and values of all heads; no more than that block is ever expanded.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv.cache.spec import LayerSpec, Reach
from jaxkv.cache.storage import Dense
from jaxkv.nn.arguments import check_call
from jaxkv.nn.attend import attend
from jaxkv.nn.call import run
from jaxkv.nn.dropout import check_rate
from jaxkv.nn.heads import rms_norm
from jaxkv.nn.indexer import SIDE, Indexer
from jaxkv.nn.uncached import self_attend

_MOST_QUERIES = 512  # that read one expanded block
_INDEX_EPSILON = 1e-6  # of the norm of an indexer's keys
BIASES = ("query_down", "latent", "out")
OPTIONS = """num_heads: query heads N.
      in_features: size D of the input.
      out_features: size of the output; None means in_features.
      rank: size of the latent (DeepSeek: kv_lora_rank).
      rotary_dim: size of the rotary key, which all heads share (qk_rope_head_dim).
      head_dim: size of what a head makes its keys of from the latent (qk_nope_head_dim).
      value_dim: size of a head's value (v_head_dim); None means head_dim.
      query_rank: None, or the size through which queries are projected, with a norm (q_lora_rank).
      reach: which past tokens a query may see, with a cache and without: Full(), Window(size, sinks) or Chunk(size).
      rotary: None, or what rotates the rotary keys and as much of the queries, such as
        `jaxkv.Rotary(interleaved=True)`, DeepSeek's.
      scale: factor of the scores; None means (head_dim + rotary_dim) ** -0.5.
      norm_epsilon: added to the mean square of the latent's norm, and of that of queries of a `query_rank`.
      indexer: None, or `jaxkv.Indexer(...)`, which chooses the tokens that each query reads (DeepSeek-V3.2). It needs a
        query_rank.
      use_bias: True, False, or the names of the projections that have a bias, out of "query_down", "latent", "out".
      dropout_rate: share of the attention weights left out in training, at least 0, below 1. With a cache, and with an
        indexer, there is no dropout.
      broadcast_dropout: whether all rows and heads leave out the same, as in Flax.
      deterministic: True for evaluation, False for training; the call's own goes first. One of them must say it if the
        dropout_rate is above 0.
      dtype: of the computation; None infers it from input and parameters.
      param_dtype: of the parameters.
      precision: of the projections, see `jax.lax.Precision`.
      kernel_init, bias_init: initializers of the projections.
      expand_init: initializer of what makes keys and values of latents, [rank, N, head_dim + value_dim].
      implementation: of `jaxkv.attend`."""


@dataclasses.dataclass(frozen=True)
class LatentHeads:
    """The static facts of latent attention, and its way from projected q and latents to what goes into the output.

    Args:
      num_heads, rank, rotary_dim, head_dim, value_dim, reach: as for the modules.
      rotary, scale, indexer, implementation, dropout_rate, broadcast_dropout: as for the modules.

    Raises:
      ValueError: for sizes below 1, or a rotary that is none.

    >>> LatentHeads(num_heads=4, rank=16, rotary_dim=8, head_dim=8, reach=jaxkv.Full()).layer_spec().head_dim
    24
    """

    num_heads: int
    rank: int
    rotary_dim: int
    head_dim: int
    reach: Reach
    value_dim: Any = None
    rotary: Any = None
    scale: float | None = None
    indexer: Indexer | None = None
    implementation: str = "auto"
    dropout_rate: float = 0.0
    broadcast_dropout: bool = True

    def __post_init__(self) -> None:
        check_rate(self.dropout_rate)
        if self.indexer is not None and self.dropout_rate:
            raise ValueError(
                f"dropout_rate={self.dropout_rate} with an indexer: chosen tokens are read without dropout"
            )
        if self.value_dim is None:
            object.__setattr__(self, "value_dim", self.head_dim)
        for name in ("num_heads", "head_dim", "value_dim"):
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name}={size!r}: give a whole number of at least 1")
        if self.rotary is not None and not callable(getattr(self.rotary, "rotate", None)):
            raise ValueError(f"rotary={self.rotary!r} has no rotate(x, positions); give for example jaxkv.Rotary()")
        self.layer_spec()

    def layer_spec(self, k_storage: Any = None, v_storage: Any = None, dtype: Any = jnp.float32) -> LayerSpec:
        """Returns what a cache must keep for this layer; rotary keys as k_storage says, latents as v_storage does."""
        k_storage, v_storage = (Dense(dtype) if storage is None else storage for storage in (k_storage, v_storage))
        sides = {}
        if self.indexer is not None:
            sides = {SIDE: self.indexer.side_buffer(self.rotary, self.rotary_dim, dtype)}
        return LayerSpec.latent(
            self.rank,
            self.rotary_dim,
            self.reach,
            storage=v_storage,
            rotary_storage=k_storage,
            rotary=self.rotary,
            side_buffers=sides,
        )

    def attend(
        self,
        q: Any,
        latent: Any,
        rotary_key: Any,
        expand: Any,
        layer: Any,
        step: Any,
        *,
        positions: Any,
        spans: Any,
        index: Any = None,
        dropout_key: Any = None,
    ) -> tuple[Any, Any]:
        """Returns what the heads read, [B, T, N, value_dim], and the layer after its put (None without a cache).

        Args:
          q: [B, T, N, head_dim + rotary_dim], not yet rotated.
          latent: [B, T, rank], normalized.
          rotary_key: [B, T, rotary_dim], not yet rotated.
          expand: [rank, N, head_dim + value_dim], of the latent the keys and values of all heads.
          layer, step: both or neither.
          positions: int32 [B, T] or None (0, 1, 2, ...); without a layer only.
          spans: int32 [B, T] or None; without a layer only.
          index: with an indexer its queries [B, T, n, d], not yet rotated, their weights [B, T, n], its keys [B, T, d].
          dropout_key: None for no dropout; without a layer only.
        """
        there = jnp.arange(q.shape[1], dtype=jnp.int32)[None, :] if positions is None else positions
        there = (there if layer is None else step.depths)[:, :, None, None]
        latent, rotary_key = latent[:, :, None], rotary_key[:, :, None]  # [B, T, 1, rank or rotary_dim]
        q, q_rotary = q[..., : self.head_dim], self._rotate(q[..., self.head_dim :], there)
        to_keys, to_values = expand[..., : self.head_dim], expand[..., self.head_dim :]
        scale = (self.head_dim + self.rotary_dim) ** -0.5 if self.scale is None else self.scale
        rest: dict[str, Any] = {"scale": scale, "implementation": self.implementation}
        if self.indexer is not None:
            turned = self.indexer.rotary(self.rotary, self.rotary_dim)
            queries, weights, keys = index
            keys = keys[:, :, None]
            if turned is not None:
                queries, keys = turned.rotate(queries, there), turned.rotate(keys, there)
        if layer is None:
            shared = jnp.broadcast_to(self._rotate(rotary_key, there), (*q.shape[:3], self.rotary_dim))
            k, v = (jnp.einsum("btr,rnh->btnh", latent[:, :, 0], kernel) for kernel in (to_keys, to_values))
            q, k = jnp.concatenate([q, q_rotary], -1), jnp.concatenate([k, shared], -1)
            if self.indexer is not None and self.indexer.top_k < q.shape[1]:
                see = self._sees(there[:, :, 0, 0], spans, q.shape[:2])
                rest = {"scale": scale, "select": self.indexer.best(queries, weights, keys[:, :, 0], see)}
            if dropout_key is not None:
                chance = {"dropout_key": dropout_key, "broadcast_dropout": self.broadcast_dropout}
                rest |= {"dropout_rate": self.dropout_rate, **chance}
            return self_attend(q, k, v, reach=self.reach, positions=positions, spans=spans, **rest), None
        if layer.spec.rotary_at == "put":
            rotary_key = self._rotate(rotary_key, there)
        sides = None if self.indexer is None else {SIDE: keys}
        layer = layer.put(step, jnp.concatenate([latent, rotary_key], -1), sides=sides)
        if self.indexer is not None and self.indexer.top_k < layer.num_slots:
            rest = {"scale": scale, "select": self.indexer.choose(queries, weights, layer, step)}
        elif self._expands(q.shape[1]):
            expanded = Expanded(layer, expand, self)
            q = jnp.concatenate([q, q_rotary], -1)
            return run(q, expanded, step, scale, None, None, self.implementation, most=_MOST_QUERIES), layer
        q = jnp.concatenate([jnp.einsum("btnh,rnh->btnr", q, to_keys), q_rotary], -1)
        return jnp.einsum("btnr,rnh->btnh", attend(q, layer, step, **rest), to_values), layer

    def _sees(self, positions: Any, spans: Any, shape: tuple[int, ...]) -> Any:
        """Returns which tokens of a call without a cache its queries see, bool [B, T, T]."""
        positions = jnp.broadcast_to(positions, shape)
        same_span = None
        if spans is not None:
            same_span = (spans[:, :, None] == spans[:, None, :]) & (spans[:, :, None] != 0)
        return self.reach.visible(positions[:, :, None], positions[:, None, :], same_span)

    def _expands(self, length: int) -> bool:
        """Returns whether so many queries multiply less numbers if what they read is first expanded to all heads."""
        made, queries = self.head_dim + self.value_dim, min(length, _MOST_QUERIES)
        return queries * (2 * self.rank - made) > self.rank * made

    def _rotate(self, x: Any, positions: Any) -> Any:
        return x if self.rotary is None else self.rotary.rotate(x, positions)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Expanded:
    """A layer of latents, read as the keys and values that heads make of them: a block at a time, for many queries."""

    layer: Any
    expand: Any  # [rank, N, head_dim + value_dim]
    heads: LatentHeads = dataclasses.field(metadata={"static": True})

    @property
    def spec(self) -> LayerSpec:
        """What the layer would be if it kept keys and values of heads."""
        heads, kept = self.heads, self.layer.spec
        size = heads.head_dim + heads.rotary_dim
        return LayerSpec(kept.reach, heads.num_heads, size, heads.value_dim, drops=kept.drops)

    @property
    def group(self) -> int:
        return self.layer.group

    @property
    def num_slots(self) -> int:
        return self.layer.num_slots

    def pieces(self, step: Any, start: Any, size: int) -> tuple[Any, Any]:
        """Returns what `Layer.pieces` does."""
        k, v = self.read(step, start, size)
        return ((k, None),), ((v, None),)

    def read(self, step: Any, start: Any, size: int) -> tuple[Any, Any]:
        """Returns what `Layer.read` does: k [B, N, size, H], v [B, N, size, Hv]."""
        k, latent = self.layer.read(step, start, size)
        shared, latent = (x.astype(self.expand.dtype) for x in (self.layer.spec.split(k)[1], latent))
        made = jnp.einsum("bsr,rnh->bnsh", latent[:, 0], self.expand)
        shared = jnp.broadcast_to(shared, (*made.shape[:3], shared.shape[3]))
        return jnp.concatenate([made[..., : self.heads.head_dim], shared], -1), made[..., self.heads.head_dim :]

    def stored(self, step: Any, start: Any, size: int) -> Any:
        """Returns what `Layer.stored` does."""
        return self.layer.stored(step, start, size)


class LatentModule:
    """What the latent attention of `jaxkv.nnx` and that of `jaxkv.linen` say and do alike."""

    in_features: int
    dtype: Any
    param_dtype: Any
    query: Any
    query_down: Any
    query_norm: Any
    query_up: Any
    latent: Any
    latent_norm: Any
    norm_epsilon: float
    out: Any
    index_query: Any
    index_key: Any
    index_norm: Any
    index_weights: Any

    def layer_spec(self, *, k_storage: Any = None, v_storage: Any = None) -> LayerSpec:
        """Returns what a cache must keep for this module: a `LayerSpec.latent` of its sizes, reach and rotary.

        Args:
          k_storage, v_storage: how rotary keys and latents are kept; None means `Dense` of the dtype of the
            computation.

        >>> attn = jaxkv.linen.LatentAttention(num_heads=2, in_features=8, rank=6, rotary_dim=2, head_dim=4)
        >>> attn.layer_spec().value_dim
        6
        """
        return self._heads().layer_spec(k_storage, v_storage, self.param_dtype if self.dtype is None else self.dtype)

    def _heads(self) -> LatentHeads:
        raise NotImplementedError

    def _attend(self, x: Any, layer: Any, step: Any, positions: Any, spans: Any, expand: Any, dropout_key: Any) -> Any:
        """Returns (y, the layer or None); `expand` and `dropout_key` are as in `LatentHeads.attend`."""
        heads = self._heads()
        check_call(heads, x, layer, step, positions, spans)
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x has {x.shape[-1]} features, this module was made for in_features={self.in_features}")
        index = None
        if self.query is None:
            down = rms_norm(self.query_down(x), self.query_norm(), self.norm_epsilon)
            q = self.query_up(down)
            if heads.indexer is not None:
                index = self.index_query(down), self.index_weights(x), self._index_keys(x)
        else:
            q = self.query(x)
        both = self.latent(x)
        latent = rms_norm(both[..., : heads.rank], self.latent_norm(), self.norm_epsilon)
        y, layer = heads.attend(
            q,
            latent,
            both[..., heads.rank :],
            expand.astype(q.dtype),
            layer,
            step,
            positions=positions,
            spans=spans,
            index=index,
            dropout_key=dropout_key,
        )
        return self.out(y), layer

    def _index_keys(self, x: Any) -> Any:
        """Returns the indexer's keys, [B, T, d]: layer-normalized."""
        keys, (scale, bias) = self.index_key(x), self.index_norm()
        y = keys.astype(jnp.float32)
        y = rms_norm(y - y.mean(-1, keepdims=True), scale, _INDEX_EPSILON) + bias.astype(jnp.float32)[None, None]
        return y.astype(keys.dtype)


def checked_indexer(indexer: Indexer | None, query_rank: int | None) -> None:
    """Raises ValueError for an indexer that can't have queries."""
    if indexer is not None and query_rank is None:
        raise ValueError(f"indexer={indexer} makes its queries of the latent of attention's: give a query_rank")


def biased(use_bias: Any) -> frozenset[str]:
    """Returns the names of the projections that have a bias.

    Raises:
      ValueError: for a name that is not known.

    >>> sorted(biased(True))
    ['latent', 'out', 'query_down']
    """
    if isinstance(use_bias, bool):
        return frozenset(BIASES if use_bias else ())
    names = frozenset((use_bias,) if isinstance(use_bias, str) else use_bias)
    if not names <= set(BIASES):
        raise ValueError(f"use_bias={use_bias!r}: give True, False, or names out of {', '.join(BIASES)}")
    return names
