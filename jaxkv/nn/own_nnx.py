"""The cache that a module of `flax.nnx` keeps for itself: `init_cache` makes it, `decode` reads and writes it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from flax import nnx

from jaxkv.nn import own


class OwnCache:
    """A module that is called as (x, layer, step), and says what it keeps by `layer_spec`.

    Attributes:
      cache: its own, an `nnx.Cache` variable; None before `init_cache`.
    """

    cache: nnx.Cache | None = None

    def init_cache(self, num_rows: int, capacity: int | None = None, **options: Any) -> None:
        """Gives this module its own empty cache, which `decode` reads and writes: one `nnx.Cache` variable.

        For quick use of a single module. A model does better with one cache for all its layers, given to the call:
        then one `begin` serves them all, and the cache can be handled apart from the parameters.

        Args:
          num_rows: sequences, the batch size of `decode`.
          capacity: tokens a sequence can hold.
          **options: arguments of `layer_spec`, such as `k_storage`, and further ones of `Cache.init`. `max_block` is by
            default the capacity where no token is ever dropped, so that prompts of any length can be read at once.

        Raises:
          ValueError: for the shape of an input, as Flax's `init_cache` takes it.

        >>> from flax import nnx
        >>> attn = jaxkv.nnx.Attention(2, 8, rngs=nnx.Rngs(0))
        >>> attn.init_cache(num_rows=1, capacity=16)
        >>> attn.decode(jnp.ones((1, 3, 8))).shape, attn.decode(jnp.ones((1, 1, 8))).shape
        ((1, 3, 8), (1, 1, 8))
        >>> attn.cache.get_value().lengths
        Array([4], dtype=int32)
        """
        if capacity is None or isinstance(num_rows, Sequence):  # as Flax's is called
            raise ValueError(
                f"init_cache got num_rows={num_rows!r}, capacity={capacity!r}; unlike Flax's it takes no shape but two "
                "numbers, init_cache(num_rows, capacity): the sequences, and the tokens that each of them can hold"
            )
        layer_spec: Any = self.layer_spec  # type: ignore[attr-defined]
        kept = {name: options.pop(name) for name in inspect.signature(layer_spec).parameters if name in options}
        self.cache = nnx.Cache(own.empty(layer_spec(**kept), num_rows, capacity, **options))

    def decode(self, x: Any, positions: Any = None, *, spans: Any = None) -> Any:
        """Returns what a call does over the module's own cache, which takes the tokens of x: one, or a whole prompt.

        Args:
          x: [B, T, D], one batch row per row of the cache.
          positions: int32 [B, T], EMPTY for padding; None continues every row where it ended.
          spans: int32 [B, T]; tokens of the same span other than 0 see each other in both directions. For attention.

        Returns:
          [B, T, out_features]. Zeros before the output projection where a row did not fit any more;
          `module.cache.get_value().check()` says so.

        Raises:
          ValueError: before `init_cache`, or for a batch of another size than the cache.
        """
        if self.cache is None:
            raise ValueError("decode: this module has no cache of its own yet; call init_cache(num_rows, capacity)")
        cache, step = own.begin(self.cache.get_value(), x, positions, spans)
        call: Any = self
        y, layer = call(x, cache.layers[0], step)
        self.cache.set_value(cache.with_layers([layer]))
        return y
