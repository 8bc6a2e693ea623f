"""The last step of a model: how well each token of the vocabulary goes on."""

from __future__ import annotations

from typing import Any

from jaxkv.nn.product import product


def logits_of(model: Any, x: Any) -> Any:
    """Returns logits [B, T, V] of x [B, T, D]: by the model's head, or by its table of embeddings if it has none.

    Args:
      model: has `embed`, `head` (None where they are tied) and `fused`, see `jaxkv.nnx.fuse`.
      x: what the last norm gives.
    """
    if model.head is not None:
        return model.head(x)
    if not model.fused:
        return model.embed.attend(x)
    x, table = model.embed.promote_dtype((x, model.embed.embedding[...]), dtype=model.embed.dtype)
    return product(x, table)
