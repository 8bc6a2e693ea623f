"""Weights laid out for decoding: the same numbers, read in fewer and longer stretches.

A decode step multiplies one token by every weight, so it takes as long as reading them. On a CPU, projections of the
same input are read faster as one matrix [in, all outputs], and one that narrows to few outputs faster as [out, in]
(benchmarks/model.py). Training and checkpoints keep Flax's layout; `fuse` makes the other one from it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from jaxkv.cache.rotation import rotate as hadamard
from jaxkv.nn.product import dot_general

_ALIKE = (False, "plain")  # kinds of `qk_norm` that treat all numbers of a head alike
M = TypeVar("M", bound=nnx.Module)


class Joined(nnx.Module):
    """Several projections of one input as one product.

    Args:
      projections: `nnx.Linear` or `nnx.LinearGeneral` whose kernels are [D, ...], of the same D and dtype.

    >>> from flax import nnx
    >>> q, k = (nnx.LinearGeneral(4, (n, 2), rngs=nnx.Rngs(n)) for n in (3, 1))
    >>> y, z = Joined([q, k])(jnp.ones((1, 5, 4)))
    >>> y.shape, z.shape, bool(jnp.allclose(y, q(jnp.ones((1, 5, 4)))))
    ((1, 5, 3, 2), (1, 5, 1, 2), True)
    """

    def __init__(self, projections: Sequence[Any]) -> None:
        kernels = [projection.kernel[...] for projection in projections]
        self.shapes = tuple(kernel.shape[1:] for kernel in kernels)
        self.kernel = nnx.Param(jnp.concatenate([kernel.reshape(kernel.shape[0], -1) for kernel in kernels], 1))
        biases = [None if projection.bias is None else projection.bias[...].ravel() for projection in projections]
        if all(bias is None for bias in biases):
            self.bias = nnx.data(None)
        else:
            zeros = [jnp.zeros(kernel.size // kernel.shape[0], kernel.dtype) for kernel in kernels]
            whole = [zero if bias is None else bias for zero, bias in zip(zeros, biases, strict=True)]
            self.bias = nnx.Param(jnp.concatenate(whole))
        self.dtype, self.precision = projections[0].dtype, projections[0].precision

    def __call__(self, x: Any) -> list[Any]:
        """Returns what each projection gives for x [..., D]."""
        y = _product(self, x, 0)
        ends = list(itertools.accumulate(math.prod(shape) for shape in self.shapes))[:-1]
        parts = jnp.split(y, ends, -1)
        return [part.reshape(*x.shape[:-1], *shape) for part, shape in zip(parts, self.shapes, strict=True)]


class Transposed(nnx.Module):
    """A projection whose kernel is kept as [out, in].

    Args:
      projection: `nnx.Linear`, or an `nnx.LinearGeneral` over all axes of its input but the first two.

    >>> from flax import nnx
    >>> narrow = nnx.LinearGeneral((3, 2), 4, axis=(-2, -1), rngs=nnx.Rngs(0))
    >>> x = jnp.ones((1, 5, 3, 2))
    >>> bool(jnp.allclose(Transposed(narrow)(x), narrow(x)))
    True
    """

    def __init__(self, projection: Any) -> None:
        kernel = projection.kernel[...]
        self.num_inner = kernel.ndim - 1
        self.kernel = nnx.Param(kernel.reshape(-1, kernel.shape[-1]).T)
        self.bias = nnx.data(None) if projection.bias is None else nnx.Param(projection.bias[...])
        self.dtype, self.precision = projection.dtype, projection.precision

    def __call__(self, x: Any) -> Any:
        """Returns the projection of x [B, T, ...]."""
        return _product(self, x.reshape(*x.shape[: x.ndim - self.num_inner], -1), 1)


def fuse(model: M, *, rotate: bool = False) -> M:
    """Returns a copy of a model with its weights laid out for decoding; the numbers are the same up to rounding.

    For use on one device, as the last step before `jaxkv.nnx.functional`: a fused model decodes faster on a CPU, but
    its parameters no longer have Flax's names, so keep the original for training and checkpoints.

    Args:
      model: any nnx module. Every module in it that has a method `fuse()` is laid out anew by that: those of
        `jaxkv.nnx.Attention` and `jaxkv.models.Decoder` have one, and yours may.
      rotate: whether the Hadamard rotation of `Int8` and `Int4` goes into the projections, so that no step computes it:
        that of values into `value` and `out`, that of keys into `query` and `key` where neither a rotary nor a learned
        norm is between them and the cache. Other keys, and queries, are rotated in each call as before; so are values
        whose output is gated or that are keys too, and all of a model whose layers share keys and values. Caches are
        then made from the specs of the fused model.

    >>> from flax import nnx
    >>> attn = jaxkv.nnx.Attention(num_heads=2, in_features=8, rngs=nnx.Rngs(0))
    >>> x = jnp.ones((1, 3, 8))
    >>> bool(jnp.allclose(attn(x), jaxkv.nnx.fuse(attn)(x), atol=1e-6))
    True
    """
    model = nnx.clone(model)
    modules = [module for _, module in nnx.iter_modules(model)]
    if rotate and all(getattr(getattr(module, "heads", None), "shares", None) is None for module in modules):
        for module in modules:
            if hasattr(module, "rotate"):
                module.rotate()
    for module in modules:
        if hasattr(module, "fuse"):
            module.fuse()
    return model


def with_rotation(module: Any) -> None:
    """Puts the Hadamard rotation into the projections of an attention module that is not laid out anew yet.

    Products of queries and keys, and what the output projection gives, stay what they are: the matrix is orthonormal
    and symmetric. Norms that learned nothing treat all numbers alike and stay what they are, too.
    """
    heads, rotated = module.heads, []
    if module.value is not None and not module.gated:
        rotated.append("v")
        _rotate(module.value, -1)
        _rotate(module.out, -2, inputs=True)
    if module.key is not None and module.value is not None and heads.rotary is None and module.qk_norm in _ALIKE:
        rotated.append("k")
        _rotate(module.key, -1)
        _rotate(module.query, -1, num_parts=1 + module.gated)
    module.heads = dataclasses.replace(heads, rotated=tuple(rotated))


def _rotate(projection: Any, axis: int, *, inputs: bool = False, num_parts: int = 1) -> None:
    """Rotates what a projection gives, along an axis of its kernel; of that the first of so many parts.

    Args:
      projection: `nnx.LinearGeneral`.
      axis: of the kernel, on which the numbers of a head lie.
      inputs: whether this is an axis of the input: then the bias stays.
      num_parts: equal parts of the axis.
    """

    def turned(x: Any, axis: int) -> Any:
        first, *rest = jnp.split(jnp.moveaxis(x, axis, -1), num_parts, -1)
        first = hadamard(first.astype(jnp.promote_types(x.dtype, jnp.float32))).astype(x.dtype)
        return jnp.moveaxis(jnp.concatenate([first, *rest], -1), -1, axis)

    projection.kernel[...] = turned(projection.kernel[...], axis)
    if projection.bias is not None and not inputs:
        projection.bias[...] = turned(projection.bias[...], axis)


def _product(projection: Any, x: Any, axis: int) -> Any:
    """Returns x [..., in] times the kernel, whose `axis` is in, plus the bias."""
    bias = None if projection.bias is None else projection.bias[...]
    x, kernel, bias = promote_dtype((x, projection.kernel[...], bias), dtype=projection.dtype)
    y = dot_general(x, kernel, (((x.ndim - 1,), (axis,)), ((), ())), precision=projection.precision)
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))
