"""GLM-4 of 2025, with norms before and after, and GLM-4.5 to 4.7, with DeepSeek's way to experts."""

from __future__ import annotations

import dataclasses

from jaxkv.models.decoder import DecoderConfig
from jaxkv.models.experts import ExpertsConfig
from jaxkv.models.families import llama, rope
from jaxkv.models.families.fields import (
    EPSILON,
    FLAG,
    HEADS,
    LENGTH,
    MAX_LAYERS,
    POSITIVE,
    WIDTH,
    Field,
    Fields,
    Number,
)
from jaxkv.models.families.mixtures import NUM_EXPERTS, QWEN_EXPERTS, STACKED, chosen, shared_expert
from jaxkv.models.families.table import Family, Ignored, Tensor, linear, norm

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
    count, each = chosen(fields, "n_routed_experts")
    groups, kept = fields["n_group"], fields["topk_group"]
    if count % groups or count < 2 * groups:
        raise fields.wrong("n_group", f'it must divide the {count} in "n_routed_experts", and leave 2 to a group')
    if kept > groups or each > kept * (count // groups):
        raise fields.wrong(
            "topk_group",
            f'it must be at most the {groups} in "n_group", with room for the {each} in "num_experts_per_tok"',
        )
    experts = ExpertsConfig(
        count,
        each,
        fields["moe_intermediate_size"],
        scores="sigmoid",
        normalized=fields["norm_topk_prob"],
        scale=fields["routed_scaling_factor"],
        choice_bias=True,
        num_groups=groups,
        groups_per_token=kept,
        shared_dim=fields["moe_intermediate_size"] * fields["n_shared_experts"],
    )
    dense = fields["first_k_dense_replace"]
    return DecoderConfig(
        **shared,
        rotary=rope.rotary(fields, shared["head_dim"], partial=True),
        activation=fields["hidden_act"],
        use_bias=_QKV if fields["attention_bias"] else (),
        qk_norm=fields["use_qk_norm"],
        experts=tuple(None if i < dense else experts for i in range(shared["num_layers"])),
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
        "n_routed_experts": dataclasses.replace(NUM_EXPERTS, kind=HEADS, also=("num_local_experts",)),
        "num_experts_per_tok": Field(HEADS, 8),
        "moe_intermediate_size": Field(WIDTH, 1408),
        "n_shared_experts": Field(Number(1, 2**10, whole=True), 1),
        "n_group": Field(HEADS, 1),
        "topk_group": Field(HEADS, 1),
        "first_k_dense_replace": Field(Number(0, MAX_LAYERS, whole=True), 1),
        "norm_topk_prob": Field(FLAG, True),
        "routed_scaling_factor": Field(POSITIVE, 1.0),
    },
    (
        llama.EMBEDDING,
        *llama.ATTENTION,
        *llama.QK_NORMS,
        *llama.MLP,
        *QWEN_EXPERTS,
        Tensor(f"{_LAYER}.mlp.gate.e_score_correction_bias", (f"{_OURS}.mlp.choice_bias",), exact=True),
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
