"""Cohere's Command R, R+, R7B and A: attention and MLP beside each other, LayerNorm without bias, scaled logits."""

from __future__ import annotations

from typing import Any

from jaxkv.models.decoder import DecoderConfig
from jaxkv.models.families import llama, rope
from jaxkv.models.families.fields import EPSILON, FLAG, LAYERS, LENGTH, POSITIVE, Field, Fields
from jaxkv.models.families.reach import FULL, LAYER_TYPES, SLIDING, reaches
from jaxkv.models.families.table import Family, norm

_LAYER, _OURS = "model.layers.{}", "layers.{}"
_TENSORS = (
    llama.EMBEDDING,
    *llama.ATTENTION,
    *llama.QK_NORMS,
    *llama.MLP,
    *norm(f"{_LAYER}.input_layernorm", f"{_OURS}.attention_norm"),
    *norm("model.norm", "norm"),
    llama.HEAD,
)


def _shared(fields: Fields) -> dict[str, Any]:
    return {
        **llama.sizes(fields, eps="layer_norm_eps"),
        "activation": fields["hidden_act"],
        "use_bias": llama.biases(fields["attention_bias"]),
        "norm": "layer",
        "norm_bias": False,
        "parallel": True,
        "logit_scale": fields["logit_scale"],
    }


def _cohere(fields: Fields) -> DecoderConfig:
    shared = _shared(fields)
    return DecoderConfig(
        **shared,
        rotary=rope.rotary(fields, shared["head_dim"], theta=500_000.0, interleaved=True),
        qk_norm="centered" if fields["use_qk_norm"] else False,
    )


def _cohere2(fields: Fields) -> DecoderConfig:
    shared = _shared(fields)
    windows = (SLIDING,) * (fields["sliding_window_pattern"] - 1)
    found = reaches(fields, fields["sliding_window"], (*windows, FULL))
    turned = rope.rotary(fields, shared["head_dim"], interleaved=True)
    return DecoderConfig(
        **shared, reaches=found, rotary=tuple(None if reach.size is None else turned for reach in found)
    )


_FIELDS = {
    **{name: field for name, field in llama.FIELDS.items() if name != "rms_norm_eps"},
    "layer_norm_eps": Field(EPSILON, 1e-5),
    "max_position_embeddings": Field(LENGTH, 8192),
    "attention_bias": Field(FLAG, False),
    "logit_scale": Field(POSITIVE, 0.0625),
    "tie_word_embeddings": Field(FLAG, True),
}
COHERE = Family(_cohere, {**_FIELDS, "use_qk_norm": Field(FLAG, False)}, _TENSORS, ignored=llama.IGNORED)
COHERE2 = Family(
    _cohere2,
    {
        **_FIELDS,
        "sliding_window": Field(LENGTH, 4096, null=None),
        "sliding_window_pattern": Field(LAYERS, 4),
        "layer_types": LAYER_TYPES,
    },
    _TENSORS,
    ignored=llama.IGNORED,
)
