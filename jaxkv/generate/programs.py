"""What compiled functions take and return: flat tuples of arrays, and what they are compiled for."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax

from jaxkv.meshes import constrain


class Form(NamedTuple):
    """How the flat tuples of arrays that the compiled functions take and return are a cache or a state.

    Flat, because building trees costs the host more time per token than all else here does; and see `Stream._set`.
    """

    kind: Any  # the tree
    places: tuple[Any, ...] | None  # the sharding of each leaf, if they lie on a mesh

    @classmethod
    def of(cls, tree: Any) -> Form:
        places = tuple(leaf.sharding for leaf in jax.tree.leaves(tree))
        on_mesh = all(isinstance(place, jax.sharding.NamedSharding) for place in places)
        return cls(jax.tree.structure(tree), places if on_mesh else None)

    def build(self, leaves: Any) -> Any:
        return self.kind.unflatten(leaves)

    def flatten(self, tree: Any) -> tuple[Any, ...]:
        leaves = tuple(jax.tree.leaves(tree))
        if self.places is None:
            return leaves
        # Left alone, XLA shards what was replicated, and the next call is compiled anew.
        return tuple(map(constrain, leaves, self.places))


@functools.lru_cache(maxsize=None)  # jit keeps a program for each of them as well
@dataclasses.dataclass(frozen=True, eq=False)
class Fixed:
    """What a program is compiled for. Made once for equal parts: jit then compares and hashes it by identity."""

    forward: Any
    sampler: Any
    cache: Form
    state: Form | None
