"""Whether the arguments of an attention module's call belong together, and to the module."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jaxkv.cache.layer import Layer
from jaxkv.kinds import kind_of
from jaxkv.nn.heads import Heads


def check_input(name: str, x: Any) -> None:
    """Raises ValueError unless x is floating numbers [B, T, D]."""
    if getattr(x, "ndim", None) != 3 or not jnp.issubdtype(x.dtype, jnp.floating):
        what = f"{x.dtype}{x.shape}" if hasattr(x, "shape") else type(x).__name__
        raise ValueError(f"{name} is {what}; give floating numbers [B, T, D]: a batch of sequences")


def check_call(heads: Any, x: Any, layer: Any, step: Any, positions: Any, spans: Any) -> None:
    """Raises ValueError if the arguments of a module's call don't belong together or to this module."""
    check_input("x", x)
    if layer is None and step is None:
        return
    if step is None and _is_array(layer):
        raise ValueError(
            f"the second argument is {layer.dtype}{layer.shape}, an array; with a cache it is a layer. No mask is "
            "passed: the reach says who sees whom, and without a cache, by name, attn(x, positions=positions, "
            "spans=spans). Keys and values of other inputs than x are for CrossAttention"
        )
    if not isinstance(layer, Layer) or step is None:
        given = f"layer is {kind_of(layer)}, step is {kind_of(step)}"
        raise ValueError(
            f"{given}; with a cache call attn(x, layer, step), both from it: cache, step = cache.begin(positions), "
            "layer = cache.layers[i]. Without a cache give positions by name: attn(x, positions=positions)"
        )
    if positions is not None or spans is not None:
        raise ValueError(
            "positions and spans are given to cache.begin(positions, spans=spans); the step carries them, so "
            "attn(x, layer, step) takes neither"
        )
    if x.shape[:2] != step.positions.shape:
        raise ValueError(
            f"x has [B, T] = {x.shape[:2]}, the step was begun for {step.positions.shape}; they must agree"
        )
    _check_layer(heads, layer)


def check_kv(heads: Heads, x: Any, layer: Any, kv: Any, return_kv: bool) -> None:
    """Raises ValueError unless a call without a cache has the keys and values that it needs, and no others."""
    if layer is not None:
        if kv is None and not return_kv:
            return
        raise ValueError(
            "kv and return_kv are for calls without a cache; with one the layer holds keys and values: a module that "
            "shares layer i is called attn(x, layers[i], step), with that layer as its own module returned it"
        )
    if heads.shares is None:
        if kv is not None:
            raise ValueError("kv was given, but this module has keys and values of its own; make it with shares=i")
        return
    want = (*x.shape[:2], heads.num_kv_heads, heads.head_dim)
    got = [jnp.shape(part) for part in kv] if isinstance(kv, tuple | list) else kind_of(kv)
    if got != [want, want]:
        raise ValueError(
            f"this module shares layer {heads.shares}, whose keys and values it is given: kv = (k, v), each [B, T, K, "
            f"H] = {want}, got {got}. Without a cache call that layer's module y, kv = attn(x, return_kv=True), and "
            f"this one attn(x, kv=kv); with one, attn(x, layers[{heads.shares}], step)"
        )


def check_cross_call(heads: Heads, x: Any, layer: Any, step: Any, encoded: Any) -> None:
    """Raises ValueError if the arguments of a cross-attention's call don't belong together or to this module."""
    check_input("x", x)
    if encoded is None:
        if step is None and _is_array(layer):
            raise ValueError(
                f"the second argument is {layer.dtype}{layer.shape}, an array; with a cache it is a layer. Give "
                "an encoder's output by name, attn(x, encoded=encoded, encoded_lengths=lengths); no mask is passed"
            )
        if not isinstance(layer, Layer) or step is None:
            raise ValueError(
                f"layer is {kind_of(layer)}, step is {kind_of(step)}; with a cache call "
                "attn(x, layer, step), both from it: cache, step = cache.begin(positions), layer = "
                "cache.layers[i]; without one attn(x, encoded=encoded)"
            )
        _check_layer(heads, layer)
    elif layer is not None or step is not None:
        raise ValueError(
            "encoded was given, and a layer or step too; with a cache the encoder's output goes in once, "
            "layer = attn.write(encoded, layer, step), and attn(x, layer, step) reads it from there"
        )
    else:
        check_encoded(heads, encoded)
        if encoded.shape[0] != x.shape[0]:
            raise ValueError(f"encoded has {encoded.shape[0]} batch rows, x has {x.shape[0]}; they must agree")


def check_encoded(heads: Heads, encoded: Any, layer: Any = None) -> None:
    """Raises ValueError unless `encoded` is an encoder's output that the reach, and the layer, can hold."""
    check_input("encoded", encoded)
    if layer is not None:
        _check_layer(heads, layer)
    size = heads.reach.size
    if size is not None and encoded.shape[1] > size:
        raise ValueError(
            f"encoded has {encoded.shape[1]} places, this module was made for size={size} at most; give it a "
            "larger size"
        )


def _check_layer(heads: Any, layer: Any) -> None:
    mine = heads.layer_spec(layer.spec.k_storage, layer.spec.v_storage)
    for name in ("reach", "num_kv_heads", "head_dim", "value_dim", "v_in_k", "rotary", "rotated"):
        here, there = getattr(mine, name), getattr(layer.spec, name)
        if name == "v_in_k" and there:
            continue  # what is put says whether keys begin with the values
        if here != there:
            raise ValueError(
                f"the layer was made for {name}={there}, this module has {name}={here}; make the cache from the "
                "modules: Cache.init([attn.layer_spec(), ...], ...)"
            )


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")
