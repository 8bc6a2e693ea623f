"""Granite 3 and its mixtures: Llama's form with four factors."""

from __future__ import annotations

from typing import Any

from jaxkv.models.decoder import DecoderConfig
from jaxkv.models.experts import ExpertsConfig
from jaxkv.models.families import llama, rope
from jaxkv.models.families.fields import FLAG, HEADS, POSITIVE, Field, Fields
from jaxkv.models.families.mixtures import chosen, stacked_experts
from jaxkv.models.families.table import Family, linear

_MIX = "model.layers.{}.block_sparse_moe"


def _factored(fields: Fields, **rest: Any) -> DecoderConfig:
    shared = llama.sizes(fields)
    return DecoderConfig(
        **shared,
        rotary=rope.rotary(fields, shared["head_dim"]),
        activation=fields["hidden_act"],
        embed_scale=fields["embedding_multiplier"],
        attention_scale=fields["attention_multiplier"],
        residual_scale=fields["residual_multiplier"],
        logit_scale=1 / fields["logits_scaling"],
        **rest,
    )


def _granite(fields: Fields) -> DecoderConfig:
    return _factored(fields, use_bias=llama.biases(fields["attention_bias"], fields["mlp_bias"]))


def _granitemoe(fields: Fields) -> DecoderConfig:
    return _factored(
        fields,
        use_bias=llama.biases(fields["attention_bias"]),
        experts=ExpertsConfig(*chosen(fields, "num_local_experts"), fields["intermediate_size"]),
    )


FACTORS = {
    "attention_bias": Field(FLAG, False),
    "embedding_multiplier": Field(POSITIVE, 1.0),
    "attention_multiplier": Field(POSITIVE, 1.0),  # of the scores, in the place of head_dim ** -0.5
    "residual_multiplier": Field(POSITIVE, 1.0),
    "logits_scaling": Field(POSITIVE, 1.0),
}
_FIELDS = {**llama.FIELDS, **FACTORS}
GRANITE = Family(_granite, {**_FIELDS, "mlp_bias": Field(FLAG, False)}, llama.TENSORS, ignored=llama.IGNORED)
GRANITEMOE = Family(
    _granitemoe,
    {**_FIELDS, "num_local_experts": Field(HEADS, 8), "num_experts_per_tok": Field(HEADS, 2)},
    (
        llama.EMBEDDING,
        *llama.ATTENTION,
        *linear(f"{_MIX}.router.layer", "layers.{}.mlp.router"),
        *stacked_experts(f"{_MIX}.input_linear.weight", f"{_MIX}.output_linear.weight"),
        *llama.NORMS,
        llama.HEAD,
    ),
    renames=(  # as transformers has them in memory
        (r"\.block_sparse_moe\.experts\.gate_up_proj$", ".block_sparse_moe.input_linear.weight"),
        (r"\.block_sparse_moe\.experts\.down_proj$", ".block_sparse_moe.output_linear.weight"),
        (r"\.block_sparse_moe\.router\.weight$", ".block_sparse_moe.router.layer.weight"),
    ),
    ignored=llama.IGNORED,
)
