"""Gemma, from 2 on with norms before and after and windows between full layers; of Gemma 3 the text part."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jaxkv.models.decoder import DecoderConfig
from jaxkv.models.families import llama, rope
from jaxkv.models.families.fields import (
    ACTIVATION,
    FLAG,
    HEADS,
    LAYERS,
    LENGTH,
    POSITIVE,
    VOCABULARY,
    WIDTH,
    Choice,
    Field,
    Fields,
)
from jaxkv.models.families.reach import FULL, LAYER_TYPES, SLIDING, reaches
from jaxkv.models.families.table import Family, Ignored, norm

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


def _gemma(fields: Fields) -> DecoderConfig:
    shared = llama.sizes(fields)
    return DecoderConfig(
        **shared,
        rotary=rope.rotary(fields, shared["head_dim"]),
        activation=fields["hidden_act"],
        use_bias=llama.biases(fields["attention_bias"]),
        embed_scale=math.sqrt(fields["hidden_size"]),
    )


def _shared(fields: Fields) -> dict[str, Any]:
    return {
        **llama.sizes(fields),
        "activation": fields["hidden_activation"],
        "use_bias": llama.biases(fields["attention_bias"]),
        "post_norms": True,
        "embed_scale": math.sqrt(fields["hidden_size"]),
        "attention_scale": fields["query_pre_attn_scalar"] ** -0.5,
        "attention_softcap": fields["attn_logit_softcapping"],
        "logit_softcap": fields["final_logit_softcapping"],
    }


def _gemma2(fields: Fields) -> DecoderConfig:
    shared = _shared(fields)
    return DecoderConfig(
        **shared,
        reaches=reaches(fields, fields["sliding_window"], (SLIDING, FULL)),
        rotary=rope.rotary(fields, shared["head_dim"]),
    )


def _gemma3(fields: Fields) -> DecoderConfig:
    shared = _shared(fields)
    windows = (SLIDING,) * (fields["sliding_window_pattern"] - 1)
    found = reaches(fields, fields["sliding_window"], (*windows, FULL))
    full = rope.rotary_of(fields, FULL, shared["head_dim"], theta=fields["rope_theta"] or 1_000_000.0)
    window = rope.rotary_of(fields, SLIDING, shared["head_dim"], theta=fields["rope_local_base_freq"])
    return DecoderConfig(
        **{**shared, "attention_softcap": None},  # Gemma 3 has none, whatever its config.json says
        qk_norm=True,
        reaches=found,
        rotary=tuple(full if reach.size is None else window for reach in found),
    )


_FIELDS = {
    **llama.FIELDS,
    "num_key_value_heads": Field(HEADS, 4),
    "head_dim": Field(HEADS, 256),
    "hidden_activation": Field(ACTIVATION, "gelu_pytorch_tanh"),
    "query_pre_attn_scalar": Field(POSITIVE, 256),
    "attention_bias": Field(FLAG, False),
    "attn_logit_softcapping": Field(POSITIVE, 50.0, null=None),
    "final_logit_softcapping": Field(POSITIVE, 30.0, null=None),
    "sliding_window": Field(LENGTH, 4096, null=None),
    "layer_types": LAYER_TYPES,
    "use_bidirectional_attention": Field(FLAG, False, only=(False,)),
    "tie_word_embeddings": Field(FLAG, True),
}
GEMMA = Family(
    _gemma,
    {
        **llama.FIELDS,
        "num_key_value_heads": Field(HEADS, 16),
        "head_dim": Field(HEADS, 256),
        "max_position_embeddings": Field(LENGTH, 8192),
        # The first files say "gelu" and mean the approximation.
        "hidden_act": Field(Choice({**ACTIVATION.known, "gelu": "gelu_tanh"}), "gelu_pytorch_tanh"),
        "attention_bias": Field(FLAG, False),
        "use_bidirectional_attention": Field(FLAG, False, only=(False,)),
        "tie_word_embeddings": Field(FLAG, True),
    },
    (
        llama.EMBEDDING,
        *llama.ATTENTION,
        *llama.MLP,
        *norm(f"{_LAYER}.input_layernorm", f"{_OURS}.attention_norm", "minus_one"),
        *norm(f"{_LAYER}.post_attention_layernorm", f"{_OURS}.mlp_norm", "minus_one"),
        *norm("model.norm", "norm", "minus_one"),
        llama.HEAD,
    ),
    ignored=llama.IGNORED,
)
GEMMA2 = Family(_gemma2, {**_FIELDS, "max_position_embeddings": Field(LENGTH, 8192)}, _TENSORS, ignored=llama.IGNORED)
GEMMA3_TEXT = Family(
    _gemma3,
    {
        **_FIELDS,
        # The larger Gemma 3 see images too; what is as usual is left out of the config of their text model.
        "vocab_size": Field(VOCABULARY, 262_208),
        "hidden_size": Field(WIDTH, 2304),
        "intermediate_size": Field(WIDTH, 9216),
        "num_hidden_layers": dataclasses.replace(_FIELDS["num_hidden_layers"], default=26),
        "num_attention_heads": Field(HEADS, 8),
        "max_position_embeddings": Field(LENGTH, 131_072),
        "attn_logit_softcapping": Field(POSITIVE, None),
        "final_logit_softcapping": Field(POSITIVE, None),
        "sliding_window_pattern": Field(LAYERS, 6),
        "rope_local_base_freq": Field(POSITIVE, 10_000.0),
    },
    _TENSORS,
    context=rope.context_of_full,
    renames=(
        (r"^(model\.)?language_model\.(model\.)?(?!lm_head)", "model."),
        (r"^language_model\.lm_head\.", "lm_head."),
    ),
    ignored=(
        *llama.IGNORED,
        Ignored(r"(?:model\.)?(?:vision_tower|multi_modal_projector)\..*", "not read, it is for images; text is"),
    ),
)
GEMMA3 = dataclasses.replace(GEMMA3_TEXT, part="text_config")
