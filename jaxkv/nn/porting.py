"""Attention weights of PyTorch and transformers as the params of `Attention`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxkv.nn.heads import PROJECTIONS

# What others call a projection of its own, and one of queries, keys and values together.
_NAMES = {
    "query": ("q_proj", "query", "q_lin", "wq"),
    "key": ("k_proj", "key", "k_lin", "wk"),
    "value": ("v_proj", "value", "v_lin", "wv"),
    "out": ("o_proj", "out_proj", "out_lin", "c_proj", "dense", "wo"),
    "qkv": ("qkv_proj", "in_proj", "c_attn"),
}
_OF_CONV1D = ("c_attn", "c_proj")  # GPT-2's: [in, out], where a Linear is [out, in]
_OTHERS = {
    "q_norm.weight": ("query_norm", "scale"),
    "k_norm.weight": ("key_norm", "scale"),
    "sinks": ("sink_logits",),
}


def attention_params(weights: Mapping[str, Any], num_heads: int) -> dict[str, Any]:
    """Returns the params of a `jaxkv.nnx.Attention` or `jaxkv.linen.Attention` from the weights of another library.

    Known are the weights of `torch.nn.MultiheadAttention`, of transformers' attentions with `q_proj`, `k_proj`,
    `v_proj` and `o_proj` or with `qkv_proj`, and of GPT-2's `c_attn` and `c_proj`. The sizes, the count of kv heads
    too, come from the shapes.

    Args:
      weights: arrays or tensors by name, such as `module.state_dict()` of the attention alone, without a prefix.
      num_heads: query heads N.

    Returns:
      Nested dicts of NumPy arrays in the dtypes of the weights: kernels [D, N, H], [D, K, H], [D, K, H] and
      [N, H, out_features], biases where there are some. For nnx `nnx.update(attn, params)`, for linen
      `attn.apply({"params": params}, x)`.

    Raises:
      ValueError: for names that are not known, a projection that is missing, or shapes that num_heads does not divide.

    >>> weights = {"in_proj_weight": np.ones((12, 4)), "in_proj_bias": np.ones(12)}
    >>> weights |= {"out_proj.weight": np.ones((4, 4)), "out_proj.bias": np.ones(4)}
    >>> params = jaxkv.nnx.attention_params(weights, num_heads=2)
    >>> {name: param["kernel"].shape for name, param in params.items()}
    {'query': (4, 2, 2), 'key': (4, 2, 2), 'value': (4, 2, 2), 'out': (2, 2, 4)}
    """
    found: dict[str, dict[str, Any]] = {}  # "query": {"weight": [out, in], "bias": [out]}
    params: dict[str, Any] = {}
    unknown = []
    for name, weight in weights.items():
        x = _array(weight)
        projection, _, kind = name.replace("_weight", ".weight").replace("_bias", ".bias").rpartition(".")
        which = next((which for which, names in _NAMES.items() if projection in names), None)
        if name in _OTHERS:
            *path, last = _OTHERS[name]
            (params.setdefault(path[0], {}) if path else params)[last] = x
        elif which is None or kind not in ("weight", "bias"):
            unknown.append(name)
        else:
            found.setdefault(which, {})[kind] = x.T if projection in _OF_CONV1D else x
    if unknown:
        raise ValueError(
            f"attention_params: not known: {', '.join(unknown)}. Known are {', '.join(sum(_NAMES.values(), ()))} with "
            f".weight and .bias, and {', '.join(_OTHERS)}; leave other names and prefixes out"
        )
    joined = found.pop("qkv", {})  # PyTorch joins the biases even where it keeps the weights apart
    inner = found["out"]["weight"].shape[1] if "weight" in found.get("out", {}) else 0  # as wide as the queries
    for kind, x in joined.items():
        for which, part in zip(PROJECTIONS, np.split(x, (inner, (x.shape[0] + inner) // 2)), strict=False):
            found.setdefault(which, {})[kind] = part
    missing = [which for which in PROJECTIONS if "weight" not in found.get(which, {})]
    if missing:
        raise ValueError(f"attention_params: no weight for {', '.join(missing)}; got {', '.join(weights)}")
    inner = found["query"]["weight"].shape[0]
    if inner % num_heads or any(found[which]["weight"].shape[0] % (inner // num_heads) for which in ("key", "value")):
        shapes = {which: found[which]["weight"].shape for which in PROJECTIONS}
        raise ValueError(f"attention_params: num_heads={num_heads} does not divide the projections [out, in] {shapes}")
    return {which: _projection(found[which], which, inner // num_heads) for which in PROJECTIONS} | params


def _projection(found: Mapping[str, Any], which: str, head_dim: int) -> dict[str, Any]:
    """Returns kernel and bias as Flax shapes them, of a weight [out, in] and a bias [out]."""
    weight, bias = found["weight"], found.get("bias")
    if which == "out":
        kernel = weight.T.reshape(-1, head_dim, weight.shape[0])
    else:
        kernel = weight.T.reshape(weight.shape[1], -1, head_dim)
        bias = None if bias is None else bias.reshape(-1, head_dim)
    return {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias}


def _array(x: Any) -> Any:
    """Returns a NumPy array of an array or a tensor of PyTorch, which has no bfloat16 in NumPy."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        if str(x.dtype) == "torch.bfloat16":
            return x.float().numpy().astype(jnp.bfloat16)
        return x.numpy()
    return np.asarray(x)
