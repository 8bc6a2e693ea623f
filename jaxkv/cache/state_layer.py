"""One recurrent layer's buffers: put, read."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxkv.cache.layer import Layer
from jaxkv.cache.recurrent import StateStep
from jaxkv.cache.rows import Rows
from jaxkv.cache.show import show
from jaxkv.cache.spec import LayerSpec
from jaxkv.cache.step import Step
from jaxkv.kinds import kind_of
from jaxkv.meshes import automatic, like, spec_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class StateLayer:
    """The states of one recurrent layer, or of a stack of equal layers, used like a stack of `Layer`.

    >>> spec = jaxkv.LayerSpec(jaxkv.Recurrent(state=(2, 3)))  # here: a sum of all inputs
    >>> cache = jaxkv.Cache.init([spec], num_rows=1, capacity=8)
    >>> for positions in ([[0, 1, 2]], [[3, -1, -1]]):
    ...     cache, step = cache.begin(jnp.array(positions))
    ...     layer = cache.layers[0]
    ...     _, state = layer.read(step)
    ...     taken = step.groups[layer.group].counts.astype(jnp.float32)  # tokens of the call, for each state to put
    ...     cache = cache.with_layers([layer.put(step, state=state[:, None] + taken[:, :, None, None])])
    >>> cache, step = cache.begin(jnp.array([[4]]))
    >>> cache.layers[0].read(step)[1][0, 0]
    Array([4., 4., 4.], dtype=float32)
    """

    tail: Any  # [R, 1, C, channels * width], stacked [L, ...]; None without a convolution
    state: Any  # [R, heads, C, all other axes], stacked [L, ...]; None without a state
    index: Any  # None, or int32 scalar: which layer of a stack
    group: int = dataclasses.field(metadata={"static": True})
    spec: LayerSpec = dataclasses.field(metadata={"static": True})
    num_slots: int = dataclasses.field(metadata={"static": True})
    num_stacked: int | None = dataclasses.field(metadata={"static": True})  # None: not a stack
    layout = Rows()  # states belong to rows, in every layout

    __repr__ = show
    at = Layer.at
    num_kept = Layer.num_kept

    @classmethod
    def init(cls, spec: LayerSpec, group: int, num_rows: int, num_slots: int, num_stacked: int | None) -> StateLayer:
        """Returns a layer whose states are all zeros."""

        def zeros(heads: int, size: int) -> Any:
            lead = () if num_stacked is None else (num_stacked,)
            return jnp.zeros((*lead, num_rows, heads, num_slots, size), jnp.float32)

        tail, state = spec.reach.tail, spec.reach.state  # type: ignore[attr-defined]
        return cls(
            tail=None if tail is None else zeros(1, math.prod(tail)),
            state=None if state is None else zeros(state[0], math.prod(state[1:])),
            index=None,
            group=group,
            spec=spec,
            num_slots=num_slots,
            num_stacked=num_stacked,
        )

    @property
    def buffers(self) -> tuple[Any, Any]:
        """All that lies in slots."""
        return self.tail, self.state

    def with_buffers(self, buffers: tuple[Any, Any]) -> StateLayer:
        """Returns this layer with another tail and state."""
        tail, state = buffers
        return dataclasses.replace(self, tail=tail, state=state)

    def read(self, step: Step) -> tuple[Any, Any]:
        """Returns the tail [B, channels, width] and the state [B, *shape] that the call's rows go on from, float32.

        Zeros for a row that is empty; None for what the layer doesn't have.
        """
        self._check_step(step)

        def axes(buffer: Any, tail: bool) -> Any:
            if buffer is None:
                return None
            rows, heads, _, _ = spec_of(buffer)[-4:]
            return PartitionSpec(rows if step.whole else None, None if tail else heads)

        places = axes(self.tail, True), axes(self.state, False)
        return automatic(_read, places)(self, step)

    def put(self, step: Step, tail: Any = None, state: Any = None) -> StateLayer:
        """Returns this layer with states of the call stored: those after `counts` [B, M] of each row's tokens.

        `step.groups[layer.group].counts` says which. In place when the cache is donated or the carry of a loop. Every
        layer puts once per `begin`.

        Args:
          step: from the `Cache.begin` of this forward pass.
          tail: [B, M, channels, width], None if the layer has none; kept in float32.
          state: [B, M, *shape], None if the layer has none; kept in float32.

        Raises:
          ValueError: while tracing, for shapes other than these, naming both.
        """
        self._check_step(step)
        b, m = step.groups[self.group].counts.shape
        for name, x in (("tail", tail), ("state", state)):
            shape = getattr(self.spec.reach, name)
            want = None if shape is None else (b, m, *shape)
            if (None if x is None else jnp.shape(x)) != want:
                given = "None" if x is None else f"of shape {jnp.shape(x)}"
                raise ValueError(f"put: {name} is {given}, this layer and step want {want}")
        return automatic(_put, like(self))(self, step, tail, state)

    def check_step(self, step: Step) -> None:
        """Raises ValueError: there are no keys that queries could read."""
        raise ValueError(f"a layer of {self.spec.reach} has no keys and values to attend to; it has read(step)")

    def _check_step(self, step: Step) -> None:
        if not isinstance(step, Step):
            raise ValueError(f"step is {kind_of(step)}; give the Step that cache.begin(positions) returned")
        own = step.groups[self.group] if self.group < len(step.groups) else None
        if not isinstance(own, StateStep) or own.kv_positions.shape[-1] != self.num_slots:
            raise ValueError(
                f"this step has no states of a layer of {self.spec.reach}; use the step that begin() of the same cache "
                "returned"
            )
        if self.num_stacked is not None and self.index is None:
            raise ValueError(f"a stack of {self.num_stacked} layers was used as one layer; choose one with stack.at(i)")


def _read(layer: StateLayer, step: Step) -> tuple[Any, Any]:
    source = step.groups[layer.group].source

    def one(buffer: Any, shape: tuple[int, ...]) -> Any:
        x = layer.layout.gather(buffer, layer.index, step, layer.group, source[:, None])  # [B, 1, K, X]
        empty = (source == layer.num_slots).reshape(-1, *(1,) * len(shape))
        return jnp.where(empty, 0, x.reshape(-1, *shape))

    reach = layer.spec.reach
    tail = None if layer.tail is None else one(layer.tail, reach.tail)  # type: ignore[attr-defined]
    return tail, None if layer.state is None else one(layer.state, reach.state)  # type: ignore[attr-defined]


def _put(layer: StateLayer, step: Step, tail: Any, state: Any) -> StateLayer:
    def one(buffer: Any, x: Any) -> Any:
        if buffer is None:
            return None
        x = x.astype(jnp.float32).reshape(*x.shape[:2], buffer.shape[-3], -1)
        return layer.layout.write(buffer, layer.index, step, layer.group, x)

    return layer.with_buffers((one(layer.tail, tail), one(layer.state, state)))
