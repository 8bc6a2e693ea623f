"""One call of a recurrent layer, whatever it computes: its checks, its tokens without padding, its states before and
after.

A layer's own rule sees packed tokens: those of a row come first, whatever padding lay between them, so that nothing of
padding reaches a convolution or a state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxkv.cache.recurrent import packing
from jaxkv.cache.spec import EMPTY, LayerSpec, Recurrent
from jaxkv.cache.state_layer import StateLayer
from jaxkv.kinds import kind_of
from jaxkv.meshes import automatic, like, spec_of
from jaxkv.nn.arguments import check_input

# (inputs packed [B, T, ...], weights, tail, state, which tokens are real [B, T], after how many of them states are
# asked for [B, M] or None) -> (output [B, T, ...] packed, tails [B, M, ...], states [B, M, ...])
Rule = Callable[[Any, Any, Any, Any, Any, Any], tuple[Any, Any, Any]]


# The docstring of a module's call.
CALL = """Returns what the tokens mix, reading what came before them out of a layer, or of x itself without one.

        Args:
          x: [B, T, D], floating.
          layer: None, or this module's layer of a cache, made from `layer_spec()`.
          step: None, or the step of this forward pass from `cache.begin`.
          positions: without a layer: int [B, T], negative for padding, the tokens in order; None: no padding.

        Returns:
          y [B, T, D], or with a layer (y, the layer with the call's states).

        Raises:
          ValueError: while tracing, for shapes that don't fit, or a layer that was not made for this module."""


class RecurrentModule:
    """A module that keeps a state, of which `_reach` says the shapes."""

    in_features: int

    def _reach(self, every: int | None, keep: int) -> Recurrent:
        raise NotImplementedError

    def layer_spec(self, *, every: int | None = 512, keep: int = 3) -> LayerSpec:
        """Returns what a cache must keep for this module: the shapes of its state and of its convolution's tail.

        Args:
          every, keep: which checkpoints a row has, see `jaxkv.Recurrent`.

        >>> jaxkv.linen.ShortConv(in_features=8, kernel_size=3).layer_spec(every=64).reach
        Recurrent(state=None, tail=(8, 2), every=64, keep=3)
        """
        return LayerSpec(self._reach(every, keep))

    def _check(self, x: Any, layer: Any, step: Any, positions: Any) -> None:
        """Raises ValueError if the arguments of a call don't belong together, or to this module."""
        check_input("x", x)
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x has {x.shape[-1]} features, this module was made for in_features={self.in_features}")
        if layer is None and step is None:
            if positions is not None and jnp.shape(positions) != x.shape[:2]:
                raise ValueError(f"positions has shape {jnp.shape(positions)}, x has [B, T] = {x.shape[:2]}")
            return
        if not isinstance(layer, StateLayer) or step is None:
            raise ValueError(
                f"layer is {kind_of(layer)}, step is {kind_of(step)}; with a cache give both, a StateLayer and a Step: "
                "cache, step = cache.begin(positions), layer = cache.layers[i]"
            )
        if positions is not None:
            raise ValueError("positions are given to cache.begin(positions); the step carries them")
        if x.shape[:2] != step.positions.shape:
            raise ValueError(
                f"x has [B, T] = {x.shape[:2]}, the step was begun for {step.positions.shape}; they must agree"
            )
        given = layer.spec.reach
        mine = self._reach(given.every, given.keep)  # type: ignore[attr-defined]
        if mine != given:
            raise ValueError(
                f"the layer was made for {given}, this module has {mine}; make the cache from the modules: "
                "Cache.init([module.layer_spec(), ...], ...)"
            )


def recur(
    rule: Rule, reach: Recurrent, inputs: Any, weights: Any, layer: Any, step: Any, positions: Any
) -> tuple[Any, Any]:
    """Returns what a rule gives for each token, 0 for padding, and the layer after its put (None without a cache).

    Args:
      rule: of one kind of layer.
      reach: the shapes of its state and tail.
      inputs: a pytree of [B, T, ...].
      weights: a pytree of arrays.
      layer, step: both or neither.
      positions: int [B, T], EMPTY for padding, or None; without a layer only.
    """

    def run(inputs: Any, weights: Any, layer: Any, step: Any, positions: Any) -> Any:
        batch, length = jax.tree.leaves(inputs)[0].shape[:2]
        if layer is None:
            tail, state = (
                None if shape is None else jnp.zeros((batch, *shape), jnp.float32)
                for shape in (reach.tail, reach.state)
            )
            counts, real = None, jnp.ones((batch, length), bool) if positions is None else positions >= 0
        else:
            tail, state = layer.read(step)
            counts, real = step.groups[layer.group].counts, step.positions != EMPTY
        if length > 1 and (layer is not None or positions is not None):
            order, place = packing(real) if layer is None else _places(layer, step)
            packed = jnp.arange(length, dtype=jnp.int32)[None] < real.sum(1, dtype=jnp.int32)[:, None]
            inputs = jax.tree.map(lambda x: _at(x, order), inputs)
            y, *after = rule(inputs, weights, tail, state, packed, counts)
            y = _at(y, place)
        else:
            y, *after = rule(inputs, weights, tail, state, real, counts)
        y = jnp.where(real.reshape(batch, length, *(1,) * (y.ndim - 2)), y, 0)
        return y, None if layer is None else layer.put(step, *after)

    places = PartitionSpec(*spec_of(jax.tree.leaves(inputs)[0])[:2]), None if layer is None else like(layer)
    return automatic(run, places)(inputs, weights, layer, step, positions)


def decay_init(key: Any, shape: Any, dtype: Any) -> Any:
    """Returns logarithms of decays drawn from 1 to 16, as Mamba-2's and gated delta's makers begin with."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, 16.0))


def causal_conv(x: Any, tail: Any, kernel: Any, bias: Any, counts: Any) -> tuple[Any, Any]:
    """Returns a convolution along each channel, [B, T, C], and the tails after some tokens, [B, M, C, W - 1].

    Args:
      x: [B, T, C], packed.
      tail: [B, C, W - 1], the inputs before.
      kernel: [W, 1, C], the last of W for the token itself.
      bias: [C] or None.
      counts: int32 [B, M], after how many of the tokens; None for no tails.
    """
    width, length = kernel.shape[0], x.shape[1]
    whole = jnp.concatenate([tail.swapaxes(1, 2).astype(x.dtype), x], 1)  # [B, W - 1 + T, C]
    y = sum(whole[:, i : i + length] * kernel[i].astype(x.dtype)[None] for i in range(width))
    if bias is not None:
        y = y + bias.astype(x.dtype)[None, None]
    if counts is None:
        return y, None
    index = counts[:, :, None] + jnp.arange(width - 1, dtype=jnp.int32)[None, None]
    tails = jax.vmap(lambda row, i: row[i])(whole, index)  # [B, M, W - 1, C]
    return y, tails.swapaxes(2, 3)


def _places(layer: Any, step: Any) -> tuple[Any, Any]:
    own = step.groups[layer.group]
    return own.order, own.place


def _at(x: Any, columns: Any) -> Any:
    """Returns x [B, T, ...] with its columns in another order, int32 [B, T]."""
    return jax.vmap(lambda row, i: row[i])(x, columns)
