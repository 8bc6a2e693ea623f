"""Mixtral, Qwen 2 and 3 MoE, OLMoE: Llama's form with experts in the place of all MLPs, or of some."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxkv.cache.spec import Full, Window
from jaxkv.models.decoder import DecoderConfig
from jaxkv.models.experts import ExpertsConfig
from jaxkv.models.families import llama, rope
from jaxkv.models.families.fields import (
    EPSILON,
    FLAG,
    HEADS,
    LAYERS,
    LENGTH,
    MAX_LAYERS,
    MAX_LENGTH,
    POSITIVE,
    WIDTH,
    Field,
    Fields,
    List,
    Number,
)
from jaxkv.models.families.reach import FULL, LAYER_TYPES, SLIDING, reaches
from jaxkv.models.families.table import Family, Tensor, linear

_LAYER, _OURS = "model.layers.{}", "layers.{}"
LAYER_NUMBERS = List(Number(0, MAX_LAYERS, whole=True), MAX_LAYERS)


def named_experts(file: str, names: Sequence[str] = ("gate_proj", "up_proj", "down_proj")) -> tuple[Tensor, ...]:
    """Returns the tensors of experts of which each has its own; `file` is "...experts"."""
    return tuple(
        Tensor(f"{file}.{{}}.{name}.weight", (f"{_OURS}.mlp.{ours}",), "out_in", 1, experts=True)
        for ours, name in zip(("gate", "up", "down"), names, strict=True)
    )


def stacked_experts(gate_up: str, down: str, form: str = "out_in", ours: str = f"{_OURS}.mlp") -> tuple[Tensor, ...]:
    """Returns the tensors of experts that lie in two, as transformers has them in memory: gates, then ups; downs."""
    return (
        Tensor(gate_up, (f"{ours}.gate", f"{ours}.up"), form, 1, experts=True),
        Tensor(down, (f"{ours}.down",), form, 1, experts=True),
    )


def shared_expert(file: str) -> tuple[Tensor, ...]:
    """Returns the tensors of the MLP that all tokens run through beside their experts."""
    names = ("gate", "up", "down")
    return tuple(tensor for name in names for tensor in linear(f"{file}.{name}_proj", f"{_OURS}.mlp.shared.{name}"))


def chosen(fields: Fields, count: str, each: str = "num_experts_per_tok") -> tuple[int, int]:
    """Returns how many experts there are and how many a token is sent to.

    Args:
      fields: of the family.
      count, each: their names.
    """
    experts, per_token = fields[count], fields[each]
    if per_token > experts:
        raise fields.wrong(each, f'{per_token} of them is more than the {experts} in "{count}"')
    return experts, per_token


def _mixture(
    fields: Fields, experts: Any, *, window: int | None = None, theta: float = 10_000.0, **rest: Any
) -> DecoderConfig:
    """Returns Llama's form with experts; `theta` where the file has none, `rest` as for DecoderConfig."""
    shared = llama.sizes(fields)
    return DecoderConfig(
        **shared,
        rotary=rope.rotary(fields, shared["head_dim"], theta=theta),
        activation=fields["hidden_act"],
        reaches=(Full() if window is None else Window(window),),
        experts=experts,
        **rest,
    )


def _mixtral(fields: Fields) -> DecoderConfig:
    experts = ExpertsConfig(*chosen(fields, "num_local_experts"), fields["intermediate_size"])
    return _mixture(fields, experts, window=fields["sliding_window"], theta=1_000_000.0)


def sparse(fields: Fields, **rest: Any) -> tuple[ExpertsConfig | None, ...] | None:
    """Returns which layers of a Qwen have experts; `rest` as for ExpertsConfig."""
    if not fields["num_experts"]:
        return None
    experts = ExpertsConfig(
        *chosen(fields, "num_experts"), fields["moe_intermediate_size"], normalized=fields["norm_topk_prob"], **rest
    )
    step, without = fields["decoder_sparse_step"], fields["mlp_only_layers"] or ()
    layers = range(fields["num_hidden_layers"])
    return tuple(None if i in without or (i + 1) % step else experts for i in layers)


def _qwen2_moe(fields: Fields) -> DecoderConfig:
    shared, slides = llama.sizes(fields), fields["use_sliding_window"]
    llama.check_windows(fields)
    layers, first = range(shared["num_layers"]), fields["max_window_layers"]
    pattern = [SLIDING if slides and not i % 2 and i < first else FULL for i in layers]
    return DecoderConfig(
        **shared,
        rotary=rope.rotary(fields, shared["head_dim"]),
        activation=fields["hidden_act"],
        reaches=reaches(fields, (slides and fields["sliding_window"]) or None, pattern),
        use_bias=("query", "key", "value") if fields["qkv_bias"] else (),
        experts=sparse(fields, shared_dim=fields["shared_expert_intermediate_size"], shared_gate=True),
    )


def _qwen3_moe(fields: Fields) -> DecoderConfig:
    window = fields["sliding_window"] if fields["use_sliding_window"] else None
    return _mixture(
        fields, sparse(fields), window=window, use_bias=llama.biases(fields["attention_bias"]), qk_norm=True
    )


def _olmoe(fields: Fields) -> DecoderConfig:
    counts = chosen(fields, "num_experts")
    experts = ExpertsConfig(*counts, fields["intermediate_size"], normalized=fields["norm_topk_prob"])
    return _mixture(fields, experts, use_bias=llama.biases(fields["attention_bias"]), qk_norm="together")


_EXPERTS = f"{_LAYER}.mlp.experts"
_ROUTER = linear(f"{_LAYER}.mlp.gate", f"{_OURS}.mlp.router")
QWEN_EXPERTS = (*_ROUTER, *named_experts(_EXPERTS))
STACKED = stacked_experts(f"{_EXPERTS}.gate_up_proj", f"{_EXPERTS}.down_proj")

_SPARSE = f"{_LAYER}.block_sparse_moe"
MIXTRAL = Family(
    _mixtral,
    {
        **llama.FIELDS,
        "num_key_value_heads": Field(HEADS, 8, null=None),
        "max_position_embeddings": Field(LENGTH, 131_072),
        "rms_norm_eps": Field(EPSILON, 1e-5),
        "sliding_window": Field(LENGTH, None),
        "num_local_experts": Field(
            HEADS, 8, also=("num_experts",), counts=f"{_SPARSE}.experts.{{}}.", counted="experts"
        ),
        "num_experts_per_tok": Field(HEADS, 2),
    },
    (
        llama.EMBEDDING,
        *llama.ATTENTION,
        *linear(f"{_SPARSE}.gate", f"{_OURS}.mlp.router"),
        *named_experts(f"{_SPARSE}.experts", ("w1", "w3", "w2")),
        *llama.NORMS,
        llama.HEAD,
    ),
    others=stacked_experts(f"{_SPARSE}.experts.gate_up_proj", f"{_SPARSE}.experts.down_proj"),
    renames=((r"^(model\.layers\.\d+)\.mlp\.", r"\1.block_sparse_moe."),),  # as transformers has it in memory
    ignored=llama.IGNORED,
)

OF_QWENS = {
    **llama.FIELDS,
    "max_position_embeddings": Field(LENGTH, 32_768),
    "use_sliding_window": Field(FLAG, False),
    "sliding_window": Field(LENGTH, 4096, null=None),
    "num_experts_per_tok": Field(HEADS),
    "norm_topk_prob": Field(FLAG, False),
    "decoder_sparse_step": Field(LAYERS, 1),
    "mlp_only_layers": Field(LAYER_NUMBERS, None),
}
NUM_EXPERTS = Field(
    Number(0, 2**14, whole=True), 128, also=("num_local_experts",), counts=f"{_EXPERTS}.{{}}.", counted="experts"
)
QWEN2_MOE = Family(
    _qwen2_moe,
    {
        **OF_QWENS,
        "num_key_value_heads": Field(HEADS, 16, null=None),
        # transformers writes 0 where windows are switched off
        "sliding_window": Field(Number(0, MAX_LENGTH, whole=True), 4096, null=None),
        "max_window_layers": Field(Number(0, MAX_LAYERS, whole=True), 28),
        "layer_types": LAYER_TYPES,
        "qkv_bias": Field(FLAG, True),
        "num_experts": dataclasses.replace(NUM_EXPERTS, default=60),
        "num_experts_per_tok": Field(HEADS, 4),
        "moe_intermediate_size": Field(WIDTH, 1408),
        "shared_expert_intermediate_size": Field(WIDTH, 5632),
    },
    (
        llama.EMBEDDING,
        *llama.ATTENTION,
        *llama.MLP,
        *QWEN_EXPERTS,
        *shared_expert(f"{_LAYER}.mlp.shared_expert"),
        *linear(f"{_LAYER}.mlp.shared_expert_gate", f"{_OURS}.mlp.shared_gate"),
        *llama.NORMS,
        llama.HEAD,
    ),
    others=STACKED,
    ignored=llama.IGNORED,
)
QWEN3_MOE = Family(
    _qwen3_moe,
    {
        **OF_QWENS,
        "num_key_value_heads": Field(HEADS, 4, null=None),
        "attention_bias": Field(FLAG, False),
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": Field(HEADS, 8),
        "moe_intermediate_size": Field(WIDTH, 768),
    },
    (
        llama.EMBEDDING,
        *llama.ATTENTION,
        *llama.QK_NORMS,
        *llama.MLP,
        *QWEN_EXPERTS,
        *llama.NORMS,
        llama.HEAD,
    ),
    others=STACKED,
    ignored=llama.IGNORED,
)
OLMOE = Family(
    _olmoe,
    {
        **llama.FIELDS,
        "max_position_embeddings": Field(LENGTH, 4096),
        "rms_norm_eps": Field(EPSILON, 1e-5),
        "attention_bias": Field(FLAG, False),
        "num_experts": dataclasses.replace(NUM_EXPERTS, kind=HEADS, default=64),
        "num_experts_per_tok": Field(HEADS, 8),
        "norm_topk_prob": Field(FLAG, False),
        "clip_qkv": Field(POSITIVE, None, only=(None,)),
    },
    (
        llama.EMBEDDING,
        *llama.ATTENTION,
        *llama.WHOLE_QK_NORMS,
        *QWEN_EXPERTS,
        *llama.NORMS,
        llama.HEAD,
    ),
    others=STACKED,
    ignored=llama.IGNORED,
)
