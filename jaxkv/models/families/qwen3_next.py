"""Qwen3-Next: three gated delta layers to one that attends with gates, and experts beside a shared one."""

from __future__ import annotations

import dataclasses

from jaxkv.models.decoder import DecoderConfig
from jaxkv.models.families import llama, rope
from jaxkv.models.families.fields import FLAG, HEADS, LAYERS, MAX_LAYERS, WIDTH, Choice, Field, Fields, List, Number
from jaxkv.models.families.mixtures import NUM_EXPERTS, OF_QWENS, QWEN_EXPERTS, STACKED, shared_expert, sparse
from jaxkv.models.families.reach import FULL, each_layer
from jaxkv.models.families.table import Family, Ignored, Tensor, linear, norm
from jaxkv.models.mixers import GatedDeltaConfig

_LAYER, _OURS = "model.layers.{}", "layers.{}"
_LINEAR = "linear_attention"
LINEAR_OR_FULL = Field(List(Choice({FULL: FULL, _LINEAR: _LINEAR}), MAX_LAYERS), None)


def _qwen3_next(fields: Fields) -> DecoderConfig:
    shared = llama.sizes(fields)
    interval = fields["full_attention_interval"]
    kinds = each_layer(fields, lambda i: _LINEAR if (i + 1) % interval else FULL)
    key_heads, value_heads = fields["linear_num_key_heads"], fields["linear_num_value_heads"]
    if value_heads % key_heads:
        raise fields.wrong("linear_num_value_heads", f'the {key_heads} in "linear_num_key_heads" must divide it')
    delta = GatedDeltaConfig(
        key_heads,
        value_heads,
        fields["linear_key_head_dim"],
        fields["linear_value_head_dim"],
        fields["linear_conv_kernel_dim"],
        shared["norm_eps"],
    )
    return DecoderConfig(
        **shared,
        mixers=tuple(None if kind == FULL else delta for kind in kinds),
        rotary=rope.rotary(fields, shared["head_dim"], partial=True),
        activation=fields["hidden_act"],
        use_bias=llama.biases(fields["attention_bias"]),
        qk_norm=True,
        gated_attention=True,
        experts=sparse(fields, shared_dim=fields["shared_expert_intermediate_size"], shared_gate=True),
    )


_DELTA, _MIXER = f"{_LAYER}.linear_attn", f"{_OURS}.mixer"
QWEN3_NEXT = Family(
    _qwen3_next,
    {
        **{name: field for name, field in OF_QWENS.items() if "sliding" not in name},
        "num_key_value_heads": Field(HEADS, 2, null=None),
        "head_dim": Field(HEADS, 256),
        "partial_rotary_factor": dataclasses.replace(llama.FIELDS["partial_rotary_factor"], default=0.25),
        "attention_bias": Field(FLAG, False),
        "layer_types": LINEAR_OR_FULL,
        "full_attention_interval": Field(LAYERS, 4),
        "linear_num_key_heads": Field(HEADS, 16),
        "linear_num_value_heads": Field(HEADS, 32),
        "linear_key_head_dim": Field(HEADS, 128),
        "linear_value_head_dim": Field(HEADS, 128),
        "linear_conv_kernel_dim": Field(Number(2, 1024, whole=True), 4),
        "num_experts": dataclasses.replace(NUM_EXPERTS, default=512),
        "num_experts_per_tok": Field(HEADS, 10),
        "norm_topk_prob": Field(FLAG, True),
        "moe_intermediate_size": Field(WIDTH, 512),
        "shared_expert_intermediate_size": Field(WIDTH, 512),
    },
    (
        llama.EMBEDDING,
        *llama.ATTENTION,
        *norm(f"{_LAYER}.self_attn.q_norm", f"{_OURS}.attention.query_norm", "minus_one"),
        *norm(f"{_LAYER}.self_attn.k_norm", f"{_OURS}.attention.key_norm", "minus_one"),
        *linear(f"{_DELTA}.in_proj_qkvz", f"{_MIXER}.qkvz"),
        *linear(f"{_DELTA}.in_proj_ba", f"{_MIXER}.ba"),
        Tensor(f"{_DELTA}.conv1d.weight", (f"{_MIXER}.conv.kernel",), "reversed"),
        Tensor(f"{_DELTA}.A_log", (f"{_MIXER}.a_log",)),
        Tensor(f"{_DELTA}.dt_bias", (f"{_MIXER}.dt_bias",)),
        *norm(f"{_DELTA}.norm", f"{_MIXER}.norm"),
        *linear(f"{_DELTA}.out_proj", f"{_MIXER}.out", num_inner=2),
        *llama.MLP,
        *QWEN_EXPERTS,
        *shared_expert(f"{_LAYER}.mlp.shared_expert"),
        *linear(f"{_LAYER}.mlp.shared_expert_gate", f"{_OURS}.mlp.shared_gate"),
        *norm(f"{_LAYER}.input_layernorm", f"{_OURS}.attention_norm", "minus_one"),
        *norm(f"{_LAYER}.post_attention_layernorm", f"{_OURS}.mlp_norm", "minus_one"),
        *norm("model.norm", "norm", "minus_one"),
        llama.HEAD,
    ),
    others=STACKED,
    ignored=(*llama.IGNORED, Ignored(r"mtp\..*", "not read, it predicts further tokens")),
)
