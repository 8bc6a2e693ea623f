"""Gemma 4: layers that share keys and values, values out of the key projection, per-layer embeddings; the text part."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jaxkv.cache.spec import Full, Window
from jaxkv.models.decoder import DecoderConfig
from jaxkv.models.experts import ExpertsConfig
from jaxkv.models.families import llama, rope
from jaxkv.models.families.fields import (
    ACTIVATION,
    FLAG,
    HEADS,
    LENGTH,
    MAX_LAYERS,
    POSITIVE,
    VOCABULARY,
    WIDTH,
    ByLayer,
    Choice,
    Field,
    Fields,
    Number,
)
from jaxkv.models.families.mixtures import chosen, stacked_experts
from jaxkv.models.families.reach import FULL, LAYER_TYPES, SLIDING, each_layer
from jaxkv.models.families.table import Family, Ignored, Tensor, linear, norm

_LAYER, _OURS = "model.layers.{}", "layers.{}"
_BESIDE = "layers.{}.beside"
_ATTENTION = r"model\.layers\.(\d{1,9})\.self_attn\."
_TENSORS = (
    llama.EMBEDDING,
    *llama.ATTENTION,
    *llama.MLP,
    *norm(f"{_LAYER}.input_layernorm", f"{_OURS}.attention_norm"),
    *norm(f"{_LAYER}.post_attention_layernorm", f"{_OURS}.attention_post_norm"),
    *norm(f"{_LAYER}.pre_feedforward_layernorm", f"{_OURS}.mlp_norm"),
    *norm(f"{_LAYER}.post_feedforward_layernorm", f"{_OURS}.mlp_post_norm"),
    *llama.QK_NORMS,
    *linear(f"{_LAYER}.per_layer_input_gate", f"{_OURS}.input.gate"),
    *linear(f"{_LAYER}.per_layer_projection", f"{_OURS}.input.projection"),
    *norm(f"{_LAYER}.post_per_layer_input_norm", f"{_OURS}.input.norm"),
    *norm(f"{_LAYER}.post_feedforward_layernorm_1", f"{_BESIDE}.mlp_norm"),
    *norm(f"{_LAYER}.pre_feedforward_layernorm_2", f"{_BESIDE}.norm"),
    *norm(f"{_LAYER}.post_feedforward_layernorm_2", f"{_BESIDE}.post_norm"),
    *linear(f"{_LAYER}.router.proj", f"{_BESIDE}.experts.router"),
    Tensor(f"{_LAYER}.router.scale", (f"{_BESIDE}.router_scale",)),
    Tensor(f"{_LAYER}.router.per_expert_scale", (f"{_BESIDE}.experts.expert_scales",)),
    *stacked_experts(f"{_LAYER}.experts.gate_up_proj", f"{_LAYER}.experts.down_proj", ours=f"{_BESIDE}.experts"),
    Tensor(f"{_LAYER}.layer_scalar", (f"{_OURS}.scale",)),
    Tensor("model.embed_tokens_per_layer.weight", ("inputs.table.embedding",)),
    *linear("model.per_layer_model_projection", "inputs.projection"),
    *norm("model.per_layer_projection_norm", "inputs.norm"),
    *norm("model.norm", "norm"),
    llama.HEAD,
)


def _gemma4(fields: Fields) -> DecoderConfig:
    sizes = llama.sizes(fields)
    kinds = _kinds(fields, sizes["num_layers"])
    shares = _shares(fields, kinds)
    heads = [_heads(fields, sizes, i, kind) for i, kind in enumerate(kinds)]
    wide = 2 if fields["use_double_wide_mlp"] else 1
    experts = _experts(fields) if fields["enable_moe_block"] else None
    window = rope.rotary_of(fields, SLIDING, sizes["head_dim"], theta=10_000.0)
    return DecoderConfig(
        **{
            **sizes,
            "num_kv_heads": tuple(count for count, _ in heads),
            "head_dim": tuple(size for _, size in heads),
            "mlp_dim": tuple(sizes["mlp_dim"] * (1 if source is None else wide) for source in shares),
        },
        reaches=tuple(Full() if kind == FULL else Window(fields["sliding_window"]) for kind in kinds),
        rotary=tuple(
            rope.rotary_of(fields, FULL, size, theta=1_000_000.0) if kind == FULL else window
            for kind, (_, size) in zip(kinds, heads, strict=True)
        ),
        shares=shares,
        qk_norm=True,
        value_norm=True,
        tied_values=tuple(fields["attention_k_eq_v"] and kind == FULL for kind in kinds),
        attention_scale=1.0,
        experts=experts,
        activation=fields["hidden_activation"],
        use_bias=llama.biases(fields["attention_bias"]),
        post_norms=True,
        embed_scale=math.sqrt(fields["hidden_size"]),
        layer_input_dim=fields["hidden_size_per_layer_input"] or None,
        layer_input_vocab=fields["vocab_size_per_layer_input"],
        layer_scales=True,
        logit_softcap=fields["final_logit_softcapping"],
    )


def _experts(fields: Fields) -> ExpertsConfig:
    for name in ("num_experts", "top_k_experts", "moe_intermediate_size"):
        if fields[name] is None:
            raise fields.wrong(name, 'it must be a number, since "enable_moe_block" is true')
    counts = chosen(fields, "num_experts", "top_k_experts")
    return ExpertsConfig(*counts, fields["moe_intermediate_size"], beside_mlp=True, expert_scales=True)


def _kinds(fields: Fields, layers: int) -> tuple[str, ...]:
    """Returns the type of each layer; the last one is full whatever the file says, as in transformers."""
    kinds = each_layer(fields, lambda i: FULL if i % 6 == 5 else SLIDING)
    return (*kinds[:-1], FULL)


def _shares(fields: Fields, kinds: tuple[str, ...]) -> tuple[int | None, ...]:
    """Returns whose keys and values each layer reads: the last layers those of the last one of their type before."""
    own = len(kinds) - fields["num_kv_shared_layers"]
    before = {kind: i for i, kind in enumerate(kinds[: max(own, 0)])}
    if missing := set(kinds[max(own, 0) :]) - set(before):
        raise fields.wrong(
            "num_kv_shared_layers", f'it must leave a layer of "{min(missing)}" ("layer_types") that is not shared'
        )
    return tuple(None if i < own else before[kind] for i, kind in enumerate(kinds))


def _heads(fields: Fields, sizes: dict[str, Any], layer: int, kind: str) -> tuple[int, int]:
    """Returns how many heads of keys and values a layer has, and their size."""
    count, size = sizes["num_kv_heads"], sizes["head_dim"]
    if fields["per_layer_config"] is None and kind == FULL:  # as older files have it
        size = fields["global_head_dim"]
        if fields["attention_k_eq_v"]:
            count = fields["num_global_key_value_heads"] or count
    elif fields["per_layer_config"] is not None:
        own = fields["per_layer_config"].get(layer, {})
        count, size = own.get("num_key_value_heads", count), own.get("head_dim", size)
    if sizes["num_heads"] % count:
        name = "num_global_key_value_heads" if fields["per_layer_config"] is None else "per_layer_config"
        raise fields.wrong(name, f"heads of layer {layer} must divide the {sizes['num_heads']} query heads")
    return count, size


GEMMA4_TEXT = Family(
    _gemma4,
    {
        **llama.FIELDS,
        **rope.declared(
            default={
                SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
                FULL: {"rope_type": rope.PROPORTIONAL, "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
            },
            proportional=rope.PROPORTIONAL,
        ),
        # What is as usual is left out of the config of a text model that is part of one that sees images.
        "vocab_size": Field(VOCABULARY, 262_144),
        "hidden_size": Field(WIDTH, 2304),
        "intermediate_size": Field(WIDTH, 9216),
        "num_hidden_layers": dataclasses.replace(llama.FIELDS["num_hidden_layers"], default=30),
        "num_attention_heads": Field(HEADS, 8),
        "num_key_value_heads": Field(HEADS, 4),
        "head_dim": Field(HEADS, 256),
        "hidden_activation": Field(ACTIVATION, "gelu_pytorch_tanh"),
        "max_position_embeddings": Field(LENGTH, 131_072),
        "attention_bias": Field(FLAG, False),
        "sliding_window": Field(LENGTH, 512),
        "layer_types": LAYER_TYPES,
        "final_logit_softcapping": Field(POSITIVE, None),
        "use_bidirectional_attention": Field(Choice({"vision": "vision", "all": "all"}), None, only=("vision",)),
        "vocab_size_per_layer_input": Field(VOCABULARY, 262_144),
        "hidden_size_per_layer_input": Field(Number(0, WIDTH.most, whole=True), 256, null=0),
        "attention_k_eq_v": Field(FLAG, False),
        "num_kv_shared_layers": Field(Number(0, MAX_LAYERS, whole=True), 0),
        "use_double_wide_mlp": Field(FLAG, False),
        "enable_moe_block": Field(FLAG, False),
        "num_experts": Field(HEADS, None),
        "top_k_experts": Field(HEADS, None),
        "moe_intermediate_size": Field(WIDTH, None),
        "per_layer_config": Field(ByLayer({"head_dim": HEADS, "num_key_value_heads": HEADS}), None),
        "global_head_dim": Field(HEADS, 512),
        "num_global_key_value_heads": Field(HEADS, None),
        "tie_word_embeddings": Field(FLAG, True),
    },
    _TENSORS,
    context=rope.context_of_full,
    renames=(
        (r"^(model\.)?language_model\.(model\.)?(?!lm_head)", "model."),
        (r"^language_model\.lm_head\.", "lm_head."),
    ),
    ignored=(
        *llama.IGNORED,
        # What a layer that shares would have; files of training have it.
        Ignored(rf"{_ATTENTION}(?:k_proj|k_norm|v_norm)\..*", "not read", lambda config, layer, x: True),
        Ignored(
            rf"{_ATTENTION}v_proj\..*",
            'not read: by "attention_k_eq_v" of config.json values come out of the key projection there',
            lambda config, layer, x: config.source(layer) != layer or not config.layer_ties_values(layer),
        ),
        Ignored(
            r"(?:model\.)?(?:vision_tower|audio_tower|embed_vision|embed_audio|multi_modal_projector)\..*",
            "not read, it is for images and sound; text is",
        ),
    ),
)
GEMMA4 = dataclasses.replace(GEMMA4_TEXT, part="text_config")
