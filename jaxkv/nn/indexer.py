"""What chooses the tokens that a query reads: a small score of each, and the best of them.

    score(t, s) = sum over heads h of  w_th  max(0, q_th . k_s)

DeepSeek-AI 2025, "DeepSeek-V3.2", https://arxiv.org/abs/2512.02556, section 2.1.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxkv.cache.arguments import checked_size
from jaxkv.cache.spec import SideBuffer
from jaxkv.cache.storage import Dense
from jaxkv.meshes import automatic, spec_of
from jaxkv.nn.rotary import Rotary

SIDE = "index"  # the side buffer of its keys


@dataclasses.dataclass(frozen=True)
class Indexer:
    """Chooses for each query the `top_k` tokens that it reads, by one small key of each token. Frozen and hashable.

    Where there are no more than `top_k` tokens, attention is what it is without an indexer.

    Args:
      num_heads: heads of its queries (DeepSeek: index_n_heads).
      head_dim: size of its queries and keys (index_head_dim).
      top_k: how many tokens a query reads (index_topk).

    Raises:
      ValueError: for sizes below 1.

    >>> jaxkv.Indexer(num_heads=64, head_dim=128, top_k=2048).top_k
    2048
    """

    num_heads: int
    head_dim: int
    top_k: int

    def __post_init__(self) -> None:
        for name in ("num_heads", "head_dim", "top_k"):
            checked_size("Indexer", name, getattr(self, name), 1)

    def side_buffer(self, rotary: Any, rotary_dim: int, dtype: Any) -> SideBuffer:
        """Returns what a cache keeps of each token for it."""
        return SideBuffer(self.head_dim, storage=Dense(dtype), rotary=self.rotary(rotary, rotary_dim))

    def rotary(self, rotary: Any, rotary_dim: int) -> Rotary | None:
        """Returns what rotates its queries and keys: their first numbers as attention's rotary keys, but in halves.

        Raises:
          ValueError: for another rotary than jaxkv.Rotary, or more numbers than there are.
        """
        if rotary is None:
            return None
        if not isinstance(rotary, Rotary):
            raise ValueError(f"indexer={self} with rotary={rotary!r}: give a jaxkv.Rotary")
        if rotary_dim > self.head_dim:
            raise ValueError(
                f"indexer={self}: {rotary_dim} numbers are rotated (rotary_dim), so its heads have as many"
            )
        return dataclasses.replace(rotary, dim=rotary_dim, interleaved=False)

    def choose(self, q: Any, weights: Any, layer: Any, step: Any) -> Any:
        """Returns the slots of a layer that the queries of a call read: int32 [B, T, top_k].

        Args:
          q: [B, T, num_heads, head_dim], rotated.
          weights: [B, T, num_heads].
          layer: that holds the keys, after its put.
          step: of the forward pass.
        """

        def run(q: Any, weights: Any, layer: Any, step: Any) -> Any:
            group = step.groups[layer.group]
            see = step.visible(layer.spec.reach, group.kv_positions, group.kv_spans)
            return self.best(q, weights, layer.read_side(SIDE, step)[:, 0], see)

        return automatic(run, PartitionSpec(*spec_of(q)[:2]))(q, weights, layer, step)

    def best(self, q: Any, weights: Any, k: Any, see: Any) -> Any:
        """Returns the places of the best of the keys k [B, S, head_dim] that each query sees, bool [B, T, S]."""
        q, weights, k = (lax.stop_gradient(x.astype(jnp.float32)) for x in (q, weights, k))

        def add(total: Any, head: Any) -> tuple[Any, None]:  # one head at a time: [B, T, S] is large as it is
            q, weight = head
            return total + weight[:, :, None] * jax.nn.relu(jnp.einsum("bth,bsh->bts", q, k)), None

        heads = jnp.moveaxis(q, 2, 0), jnp.moveaxis(weights, 2, 0)
        scores, _ = lax.scan(add, jnp.zeros(see.shape, jnp.float32), heads)
        return lax.top_k(jnp.where(see, scores, -jnp.inf), min(self.top_k, k.shape[1]))[1]
