"""`attend`: attention of a call's queries over what a cache layer holds."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxkv.cache.arguments import FAR, chosen, shared_length
from jaxkv.cache.layer import Layer
from jaxkv.cache.step import Step
from jaxkv.nn import call


def attend(
    q: Any,
    layer: Layer,
    step: Step,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Any = None,
    shared: Any = None,
    select: Any = None,
    implementation: str = "auto",
) -> Any:
    """Returns attention of the call's queries over the tokens that the layer holds of their sequences.

    A query sees the stored positions at or before its own that the layer's reach allows (and those of its span); one
    that sees nothing gets zeros. Scores and softmax are float32 whatever is stored. Reverse-mode differentiable in q,
    the layer's keys and values, and `sink_logits`; forward mode is not offered.

    Args:
      q: queries [B, T, N, H] of any floating dtype, already rotated if the keys are. N is a multiple of the layer's kv
        heads; query heads [i * N/K, (i + 1) * N/K) read kv head i.
      layer: a layer of the cache, after its `put`.
      step: from the `Cache.begin` of this forward pass; has the positions of the queries.
      scale: factor of the scores; None means head_dim ** -0.5.
      softcap: None, or the bound c > 0 of c * tanh(scores / c) (Gemma 2).
      sink_logits: None, or learned float [N], one score per query head that joins the softmax and brings no value
        (gpt-oss).
      shared: how many first tokens all rows of the call have in common: those are read once for all of them. None: what
        `Cache.sharing` declared. A number of tokens, whole pages where the layer has pages, or int32 scalar. Where rows
        differ in spite of it, they get one another's keys.
      select: None, or int [B, T, n]: the slots that each query reads, all different, of those that it may see; others,
        and numbers out of range, are skipped. `lax.top_k` over scores of all slots gives them (DeepSeek-V3.2), with
        `Layer.read_side` to compute those. Nothing else is read.
      implementation: "auto", "reference" (plain, builds [T, S]), "blockwise" (reads only filled blocks) or "native":
        the kernel in C++ for CPUs, see docs/native.md. "auto" takes it on CPUs where it can, in short blocks.

    Returns:
      [B, T, N, value_dim] in q's dtype, on a mesh with Explicit axes sharded as q is.

    Raises:
      NotSupportedError: while tracing, if "native" can't be had, with the reason.
      ValueError: while tracing, for shapes or dtypes that don't fit the layer and the step, a softcap of 0 or below, or
        an unknown implementation, or a `shared` that is below 0, longer than the layer, or not a whole number of pages;
        for a `select` of another shape, or together with `shared` or an implementation.

    >>> cache = jaxkv.Cache.init([jaxkv.LayerSpec(jaxkv.Full(), num_kv_heads=1, head_dim=2)], num_rows=1, capacity=4)
    >>> cache, step = cache.begin(jnp.array([[0, 1]]))
    >>> k = jnp.zeros((1, 2, 1, 2))
    >>> layer = cache.layers[0].put(step, k, jnp.array([[[[2.0, 0.0]], [[4.0, 0.0]]]]))
    >>> jaxkv.attend(k, layer, step)[0, :, 0, 0]
    Array([2., 3.], dtype=float32)
    """
    if not hasattr(layer, "check_step"):
        raise ValueError(
            f"layer is of type {type(layer).__name__}; give attend(q, layer, step), layer = cache.layers[i]"
        )
    layer.check_step(step)
    if shared is not None:
        group = step.groups[layer.group]
        most = layer.num_slots if group.slot_is_position else FAR
        step = dataclasses.replace(step, shared=shared_length(shared, group.page_size, most))
    if select is not None:
        if shared is not None or implementation != "auto":
            raise ValueError(
                "select reads the chosen slots of each query by itself, in a form of its own: it takes neither shared "
                "nor an implementation"
            )
        select = chosen(select, step.positions.shape)
    return call.run(q, layer, step, scale, softcap, sink_logits, implementation, select=select)
