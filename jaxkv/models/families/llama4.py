"""Llama 4's text model: chunks, layers that turn nothing and sharpen with length, experts beside a shared one."""

from __future__ import annotations

import dataclasses

from jaxkv.cache.spec import Chunk, Full
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
    VOCABULARY,
    WIDTH,
    Choice,
    Field,
    Fields,
    List,
    Number,
)
from jaxkv.models.families.mixtures import LAYER_NUMBERS, chosen, shared_expert, stacked_experts
from jaxkv.models.families.reach import CHUNKED, FULL, TURNED_LAYERS, each_layer, turned
from jaxkv.models.families.table import Family, Ignored, linear
from jaxkv.nn.heads import QueryTemperature
from jaxkv.nn.rotary import LongRopeScaling, YarnScaling

_MLP, _OURS = "model.layers.{}.feed_forward", "layers.{}.mlp"
_TENSORS = (
    llama.EMBEDDING,
    *llama.ATTENTION,
    *linear(f"{_MLP}.gate_proj", f"{_OURS}.gate"),
    *linear(f"{_MLP}.up_proj", f"{_OURS}.up"),
    *linear(f"{_MLP}.down_proj", f"{_OURS}.down"),
    *linear(f"{_MLP}.router", f"{_OURS}.router"),
    *stacked_experts(f"{_MLP}.experts.gate_up_proj", f"{_MLP}.experts.down_proj", "in_out"),
    *shared_expert(f"{_MLP}.shared_expert"),
    *llama.NORMS,
    llama.HEAD,
)


def _llama4(fields: Fields) -> DecoderConfig:
    shared = llama.sizes(fields)
    layers, chunk = range(shared["num_layers"]), fields["attention_chunk_size"]
    turns = turned(fields)
    kinds = each_layer(fields, lambda i: CHUNKED if turns[i] and chunk else FULL)
    if CHUNKED in kinds and chunk is None:
        raise fields.wrong("attention_chunk_size", f'it must be a number of tokens, for the layers of "{CHUNKED}"')
    rotary = rope.rotary(fields, shared["head_dim"], theta=500_000.0, interleaved=True)
    if fields["use_qk_norm"] and isinstance(rotary.scaling, YarnScaling | LongRopeScaling):
        # There queries and keys are normalized once they are rotated, which takes the magnitude away again.
        rotary = dataclasses.replace(rotary, scaling=dataclasses.replace(rotary.scaling, attention_factor=1.0))
    temperature = None
    if fields["attn_temperature_tuning"]:
        temperature = QueryTemperature(fields["floor_scale"], fields["attn_scale"])
    step = fields["interleave_moe_layer_step"]
    sparse = range(step - 1, len(layers), step) if fields["moe_layers"] is None else fields["moe_layers"]
    experts = ExpertsConfig(
        *chosen(fields, "num_local_experts"),
        fields["intermediate_size"],
        scores="sigmoid",
        normalized=False,
        weighs_input=True,
        shared_dim=fields["intermediate_size"],
    )
    return DecoderConfig(
        **{**shared, "mlp_dim": fields["intermediate_size_mlp"]},
        reaches=tuple(Chunk(chunk) if kind == CHUNKED else Full() for kind in kinds),
        rotary=tuple(rotary if turn else None for turn in turns),
        qk_norm=tuple("plain" if turn and fields["use_qk_norm"] else False for turn in turns),
        temperature=tuple(None if turn else temperature for turn in turns),
        activation=fields["hidden_act"],
        use_bias=llama.biases(fields["attention_bias"]),
        experts=tuple(experts if i in sparse else None for i in layers),
    )


LLAMA4_TEXT = Family(
    _llama4,
    {
        **llama.FIELDS,
        # What is as usual is left out of the config of a text model that is part of one that sees images.
        "vocab_size": Field(VOCABULARY, 202_048),
        "hidden_size": Field(WIDTH, 5120),
        "intermediate_size": Field(WIDTH, 8192),
        "intermediate_size_mlp": Field(WIDTH, 16_384),
        "num_hidden_layers": dataclasses.replace(llama.FIELDS["num_hidden_layers"], default=48),
        "num_attention_heads": Field(HEADS, 40),
        "num_key_value_heads": Field(HEADS, 8, null=None),
        "head_dim": Field(HEADS, 128, null=None),
        "max_position_embeddings": Field(LENGTH, 131_072),
        "rms_norm_eps": Field(EPSILON, 1e-5),
        "num_local_experts": Field(HEADS, 16, also=("num_experts",)),
        "num_experts_per_tok": Field(HEADS, 1),
        "moe_layers": Field(LAYER_NUMBERS, None),
        "interleave_moe_layer_step": Field(LAYERS, 1),
        "use_qk_norm": Field(FLAG, True),
        "no_rope_layers": TURNED_LAYERS,
        "no_rope_layer_interval": Field(LAYERS, 4),
        "attention_chunk_size": Field(LENGTH, 8192, null=None),
        "layer_types": Field(List(Choice({CHUNKED: CHUNKED, FULL: FULL}), MAX_LAYERS), None),
        "attn_temperature_tuning": Field(FLAG, True),
        "floor_scale": Field(Number(1, 1e30, what="a number of at least 1"), 8192),
        "attn_scale": Field(Number(0, 1e30, what="a number of at least 0"), 0.1),
        "attention_bias": Field(FLAG, False),
    },
    _TENSORS,
    renames=(
        (r"^(model\.)?language_model\.(model\.)?(?!lm_head)", "model."),
        (r"^language_model\.lm_head\.", "lm_head."),
    ),
    ignored=(
        *llama.IGNORED,
        Ignored(r"(?:model\.)?(?:vision_model|multi_modal_projector)\..*", "not read, it is for images; text is"),
    ),
)
LLAMA4 = dataclasses.replace(LLAMA4_TEXT, part="text_config")
