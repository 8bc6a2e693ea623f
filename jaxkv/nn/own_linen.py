"""The cache that a module of `flax.linen` keeps for itself: variable "kv" of the collection "cache"."""

from __future__ import annotations

from typing import Any

from jaxkv.cache.cache import Cache
from jaxkv.nn import own
from jaxkv.nn.arguments import check_input

# Into the docstrings of the classes.
ATTRIBUTES = """decode: whether calls read and write the module's own cache, see `jaxkv.linen.Attention`.
      cache_capacity: tokens a sequence of that cache can hold; None takes the length of the input of `init`."""


class Hidden:
    """A module's own cache during a call that reads and writes it."""

    def __init__(self, variable: Any, x: Any, positions: Any, spans: Any) -> None:
        self._variable = variable
        self._cache, self.step = own.begin(variable.value, x, positions, spans)

    @property
    def layer(self) -> Any:
        return self._cache.layers[0]

    def keep(self, layer: Any) -> None:
        """Gives the variable the cache with the call's tokens."""
        self._variable.value = self._cache.with_layers([layer])


class OwnCache:
    """A module with the attributes below, which says what it keeps by `layer_spec`."""

    decode: bool
    cache_capacity: int | None

    def _hidden(self, x: Any, layer: Any, positions: Any, spans: Any, decode: bool | None) -> Hidden | None:
        """Returns the module's own cache, begun for the tokens of x; None for a call that doesn't use it.

        `init` runs the call too: it makes the cache and leaves it empty.
        """
        if not (self.decode if decode is None else decode):
            return None
        if layer is not None:
            raise ValueError("decode=True uses the module's own cache, but a layer was given; give only one of them")
        check_input("x", x)
        module: Any = self
        variable = module.variable("cache", "kv", self._empty, x)
        return None if module.is_initializing() else Hidden(variable, x, positions, spans)

    def _empty(self, x: Any) -> Cache:
        module: Any = self
        capacity = self.cache_capacity
        if capacity is None and not module.is_initializing():
            raise ValueError(
                "decode: the module has no cache yet, and its length is not known; give cache_capacity to the "
                "module, or make the cache by init with an input of that length"
            )
        return own.empty(self._own_spec(x), x.shape[0], x.shape[1] if capacity is None else capacity)

    def _own_spec(self, x: Any) -> Any:
        module: Any = self
        return module.layer_spec()


def returned(y: Any, layer: Any, hidden: Hidden | None) -> Any:
    """Returns what a call does: y, or with a layer (y, the layer); a hidden cache keeps the layer."""
    if hidden is not None:
        hidden.keep(layer)
        return y
    return y if layer is None else (y, layer)
