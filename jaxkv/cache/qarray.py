"""What a storage keeps, as qwix has quantized arrays, and back: to quantize with one and compute with the other.

qwix is Google's quantization library for JAX (https://github.com/google/qwix). Its QArray stands for
(qvalue - zero_point) * scale, with a scale for each tile of numbers.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jaxkv.cache.bits import unpack
from jaxkv.cache.quantized import FORMATS, Float8, Int4, Int8
from jaxkv.extras import need


def to_qarray(storage: Any, stored: Any) -> Any:
    """Returns what a storage keeps as a `qwix.QArray`: the same codes and scales.

    Its numbers are in the storage's basis: those of `Int8()` and `Int4()`, which rotate, are
    `storage.basis(qwix.dequantize(qarray))`.

    Args:
      storage: Int8, Int4 or Float8.
      stored: what its `encode` gives, such as `layer.k` of a layer with that `k_storage`: codes [..., H] and scales.

    Raises:
      ImportError: if qwix is not installed.
      ValueError: for another storage.

    ```python
    cache, step = cache.begin(positions)
    layer = cache.layers[0].put(step, k, v)
    qarray = jaxkv.to_qarray(layer.spec.k_storage, layer.k)  # qvalue int8 [R, K, V, H], scale float32 [R, K, V, 1]
    ```
    """
    qwix = _qwix("to_qarray")
    if isinstance(storage, Int8):
        return qwix.QArray(stored["codes"], stored["scales"])
    if isinstance(storage, Float8):
        return qwix.QArray(unpack(stored["codes"], FORMATS[storage.format]), stored["scales"])
    if isinstance(storage, Int4):
        codes, groups = stored["codes"], stored["groups"]
        scales = unpack(stored["scales"], jnp.bfloat16).astype(jnp.float32)
        whole = jnp.concatenate([codes & 15, codes >> 4], -1)
        steps = ((groups >> 4).astype(jnp.int32) + 1).astype(jnp.float32) * scales
        return qwix.QArray(whole.astype(jnp.uint4), steps, (groups & 15).astype(jnp.uint4))
    raise ValueError(f"to_qarray: {storage!r} keeps numbers without scales; give Int8, Int4 or Float8")


def from_qarray(storage: Any, qarray: Any) -> Any:
    """Returns what a storage keeps of a `qwix.QArray` [..., H]: the pytree of its `encode`.

    The same codes and scales where the array has the form that the storage keeps: int8 or float8, one scale for each
    vector, no zero points. Others are dequantized and rounded once more.

    Args:
      storage: how they are to be kept. If it rotates, the array's numbers are in its basis, as `to_qarray` gives them.
      qarray: quantized by qwix, of any tiles.

    Raises:
      ImportError: if qwix is not installed.
      ValueError: for something else than a QArray.

    ```python
    codes = jaxkv.from_qarray(jaxkv.Int8(rotate=False), qwix.quantize(k, jnp.int8, channelwise_axes=(0, 1, 2)))
    ```
    """
    qwix = _qwix("from_qarray")
    if not isinstance(qarray, qwix.QArray):
        raise ValueError(f"from_qarray got a {type(qarray).__name__}; give a qwix.QArray, qwix.quantize makes one")
    kind = jnp.int8 if isinstance(storage, Int8) else FORMATS[storage.format] if isinstance(storage, Float8) else None
    by_vector = qarray.scale.shape == (*qarray.qvalue.shape[:-1], 1)
    if kind is not None and qarray.qvalue.dtype == jnp.dtype(kind) and by_vector and qarray.zero_point is None:
        kept = storage.zeros((), qarray.qvalue.shape[-1])
        codes = qarray.qvalue
        if codes.dtype != kept["codes"].dtype:
            codes = jnp.asarray(codes).view(kept["codes"].dtype)
        return {"codes": codes, "scales": qarray.scale.astype(kept["scales"].dtype)}
    return storage.encode(storage.basis(qwix.dequantize(qarray).astype(jnp.float32)))


def _qwix(what: str) -> Any:
    return need("qwix", what, "qwix")
