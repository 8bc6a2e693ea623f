"""Gemma 2 and the text part of Gemma 3: norms before and after, scaled embeddings, windows between full layers."""

from __future__ import annotations

import math
from typing import Any

from jaxkv.models.decoder import DecoderConfig
from jaxkv.models.families import llama
from jaxkv.models.families.table import Family, Fields, norm
from jaxkv.nn.rotary import Rotary

_LAYER, _OURS = "model.layers.{}", "layers.{}"
_TENSORS = (
    llama.EMBEDDING,
    *llama.ATTENTION,
    *llama.MLP,
    *norm(f"{_LAYER}.input_layernorm", f"{_OURS}.attention_norm", "minus_one"),
    *norm(f"{_LAYER}.post_attention_layernorm", f"{_OURS}.attention_post_norm", "minus_one"),
    *norm(f"{_LAYER}.pre_feedforward_layernorm", f"{_OURS}.mlp_norm", "minus_one"),
    *norm(f"{_LAYER}.post_feedforward_layernorm", f"{_OURS}.mlp_post_norm", "minus_one"),
    *norm(f"{_LAYER}.self_attn.q_norm", f"{_OURS}.attention.query_norm", "minus_one"),
    *norm(f"{_LAYER}.self_attn.k_norm", f"{_OURS}.attention.key_norm", "minus_one"),
    *norm("model.norm", "norm", "minus_one"),
    llama.HEAD,
)


def _shared(fields: Fields) -> dict[str, Any]:
    return {
        **llama.sizes(fields),
        "activation": fields.activation("hidden_activation"),
        "use_bias": llama.biases(fields.get("attention_bias", False)),
        "post_norms": True,
        "embed_scale": math.sqrt(fields["hidden_size"]),
        "attention_scale": fields["query_pre_attn_scalar"] ** -0.5,
        "attention_softcap": fields.get("attn_logit_softcapping"),
        "logit_softcap": fields.get("final_logit_softcapping"),
    }


def _gemma2(fields: Fields) -> DecoderConfig:
    shared = _shared(fields)
    return DecoderConfig(
        **shared,
        reaches=fields.reaches(("sliding_attention", "full_attention")),
        rotary=fields.rotary(shared["head_dim"]),
    )


def _gemma3(fields: Fields) -> DecoderConfig:
    shared = _shared(fields)
    windows = ("sliding_attention",) * (fields.get("sliding_window_pattern", 6) - 1)
    reaches = fields.reaches((*windows, "full_attention"))
    full = fields.rotary(shared["head_dim"], kind="full_attention", theta=1_000_000.0)
    if "sliding_attention" in fields.get("rope_parameters", {}):
        window = fields.rotary(shared["head_dim"], kind="sliding_attention")
    else:
        window = Rotary(float(fields.get("rope_local_base_freq", 10_000.0)))
    return DecoderConfig(
        **shared,
        qk_norm=True,
        reaches=reaches,
        rotary=tuple(full if reach.size is None else window for reach in reaches),
    )


_REQUIRED = {"use_bidirectional_attention": (None, False)}
_GEMMA = {"tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256}
GEMMA2 = Family(
    _gemma2,
    _TENSORS,
    {
        **_GEMMA,
        "head_dim": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    _REQUIRED,
    ignored=llama.IGNORED,
)
# The larger Gemma 3 see images too; their checkpoints hold the text model among other parts, and leave out of its
# config what is as usual.
GEMMA3 = Family(
    _gemma3,
    _TENSORS,
    {
        **_GEMMA,
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 4096,
        "max_position_embeddings": 131_072,
    },
    {**_REQUIRED, "attn_logit_softcapping": (None,)},
    renames=(
        (r"^(model\.)?language_model\.(model\.)?(?!lm_head)", "model."),
        (r"^language_model\.lm_head\.", "lm_head."),
    ),
    ignored=(*llama.IGNORED, r"(model\.)?vision_tower\..*", r"(model\.)?multi_modal_projector\..*"),
)
