"""Variables of a module that are data: they move, shard and are saved with it, and no optimizer touches them."""

from __future__ import annotations

from typing import TypeVar

from flax import nnx

A = TypeVar("A")


@nnx.register_variable_name("buffers", overwrite=True)  # linen's collection "buffers", where Flax bridges the two
class Buffer(nnx.Variable[A]):
    """An array of an `nnx` module that is not trained, as PyTorch's `register_buffer` makes it.

    It is part of `nnx.state(module)`, so it follows `jax.device_put` and shardings, and of `jaxkv.state_dict`. It is no
    `nnx.Param`, so `nnx.grad` and an `nnx.Optimizer(..., wrt=nnx.Param)` leave it alone. In linen the same is
    `self.variable("buffers", name, init_fn)`.

    >>> from flax import nnx
    >>> class Tokens(nnx.Module):
    ...     def __init__(self):
    ...         self.banned = jaxkv.Buffer(jnp.array([0, 3]))
    ...         self.scratch = jaxkv.TransientBuffer(jnp.zeros(2))
    >>> list(jaxkv.state_dict(Tokens()))
    ['banned']
    """


@nnx.register_variable_name("transient_buffers", overwrite=True)
class TransientBuffer(Buffer[A]):
    """A Buffer that is not saved: what can be computed again, as `register_buffer(..., persistent=False)`.

    It is a Buffer, so that `nnx.state(module, jaxkv.Buffer)` gives all that must move with the module. To separate the
    two, name TransientBuffer first: `nnx.split(module, nnx.Param, jaxkv.TransientBuffer, jaxkv.Buffer)`. In linen the
    same is the collection "transient_buffers".
    """
