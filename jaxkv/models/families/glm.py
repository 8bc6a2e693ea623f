"""GLM-4 of 2025, with norms before and after, and GLM-4.5 to 4.7, with DeepSeek's way to experts."""

from __future__ import annotations

import dataclasses

from jaxkv.models.decoder import DecoderConfig
from jaxkv.models.families import deepseek, llama, rope
from jaxkv.models.families.fields import EPSILON, FLAG, HEADS, LENGTH, Field, Fields
from jaxkv.models.families.mixtures import QWEN_EXPERTS, STACKED, shared_expert
from jaxkv.models.families.table import Family, Ignored, linear, norm

_LAYER, _OURS = "model.layers.{}", "layers.{}"
_QKV = ("query", "key", "value")


def _glm4(fields: Fields) -> DecoderConfig:
    shared = llama.sizes(fields)
    return DecoderConfig(
        **shared,
        rotary=rope.rotary(fields, shared["head_dim"], partial=True, interleaved=True),
        activation=fields["hidden_act"],
        use_bias=_QKV if fields["attention_bias"] else (),
        post_norms=True,
    )


def _glm4_moe(fields: Fields) -> DecoderConfig:
    shared = llama.sizes(fields)
    return DecoderConfig(
        **shared,
        rotary=rope.rotary(fields, shared["head_dim"], partial=True),
        activation=fields["hidden_act"],
        use_bias=_QKV if fields["attention_bias"] else (),
        qk_norm=fields["use_qk_norm"],
        experts=deepseek.sigmoid_routed(fields),
    )


_FIELDS = {
    **llama.FIELDS,
    "max_position_embeddings": Field(LENGTH, 131_072),
    "partial_rotary_factor": dataclasses.replace(llama.FIELDS["partial_rotary_factor"], default=0.5),
}
GLM4 = Family(
    _glm4,
    {
        **_FIELDS,
        "num_key_value_heads": Field(HEADS, 2),
        "head_dim": Field(HEADS, 128),
        "rms_norm_eps": Field(EPSILON, 1.5625e-7),
        "attention_bias": Field(FLAG, True),
    },
    (
        llama.EMBEDDING,
        *llama.ATTENTION,
        *linear(f"{_LAYER}.mlp.gate_up_proj", f"{_OURS}.mlp.gate", f"{_OURS}.mlp.up"),
        *linear(f"{_LAYER}.mlp.down_proj", f"{_OURS}.mlp.down"),
        *llama.NORMS,
        *norm(f"{_LAYER}.post_self_attn_layernorm", f"{_OURS}.attention_post_norm"),
        *norm(f"{_LAYER}.post_mlp_layernorm", f"{_OURS}.mlp_post_norm"),
        llama.HEAD,
    ),
    ignored=llama.IGNORED,
)
GLM4_MOE = Family(
    _glm4_moe,
    {
        **_FIELDS,
        "num_key_value_heads": Field(HEADS, 8),
        "rms_norm_eps": Field(EPSILON, 1e-5),
        "attention_bias": Field(FLAG, False),
        "use_qk_norm": Field(FLAG, False),
        **deepseek.routed_fields(128, Field(HEADS, 8), 1408, (1, 1), 1, 1, 1.0),
        "norm_topk_prob": Field(FLAG, True),
    },
    (
        llama.EMBEDDING,
        *llama.ATTENTION,
        *llama.QK_NORMS,
        *llama.MLP,
        *QWEN_EXPERTS,
        deepseek.ROUTER_BIAS,
        *shared_expert(f"{_LAYER}.mlp.shared_experts"),
        *llama.NORMS,
        llama.HEAD,
    ),
    others=STACKED,
    ignored=(
        *llama.IGNORED,
        Ignored(  # the layer behind the last one
            r"model\.layers\.(46|92)\..*",
            "not read, it predicts further tokens",
            lambda config, layer, x: layer < config.num_layers,
        ),
    ),
)
