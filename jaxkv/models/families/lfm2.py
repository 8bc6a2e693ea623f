"""LFM2: most layers are short convolutions, every few one attends."""

from __future__ import annotations

from jaxkv.models.decoder import DecoderConfig
from jaxkv.models.families import llama, rope
from jaxkv.models.families.fields import (
    EPSILON,
    FLAG,
    HEADS,
    LENGTH,
    MAX_LAYERS,
    POSITIVE,
    WIDTH,
    Choice,
    Field,
    Fields,
    List,
    Number,
)
from jaxkv.models.families.reach import FULL, each_layer
from jaxkv.models.families.table import Family, Tensor, linear, norm
from jaxkv.models.mixers import ShortConvConfig

_LAYER, _OURS = "model.layers.{}", "layers.{}"
_CONV = "conv"


def _lfm2(fields: Fields) -> DecoderConfig:
    shared = llama.sizes(fields, eps="norm_eps")
    conv = ShortConvConfig(fields["conv_L_cache"], fields["conv_bias"])
    return DecoderConfig(
        **{**shared, "mlp_dim": _mlp_dim(fields)},
        mixers=tuple(None if kind == FULL else conv for kind in _kinds(fields)),
        rotary=rope.rotary(fields, shared["head_dim"], theta=1_000_000.0),
        qk_norm=True,
    )


def _kinds(fields: Fields) -> tuple[str, ...]:
    attending = fields["full_attn_idxs"]
    return each_layer(fields, lambda i: FULL if attending is None or i in attending else _CONV)


def _mlp_dim(fields: Fields) -> int:
    """Returns the inner width, which is two thirds of what the file says unless it says otherwise."""
    width = fields["intermediate_size"]
    if not fields["block_auto_adjust_ff_dim"]:
        return width
    width = int(2 * width / 3)
    if (factor := fields["block_ffn_dim_multiplier"]) is not None:
        multiple = fields["block_multiple_of"]
        width = multiple * -(-int(factor * width) // multiple)
    return width


LFM2 = Family(
    _lfm2,
    {
        **{name: field for name, field in llama.FIELDS.items() if name not in ("rms_norm_eps", "hidden_act")},
        "intermediate_size": Field(WIDTH, 12_288, also=("block_ff_dim",)),
        "num_key_value_heads": Field(HEADS, 8, null=None),
        "max_position_embeddings": Field(LENGTH, 128_000),
        "norm_eps": Field(EPSILON, 1e-5),
        "tie_word_embeddings": Field(FLAG, True, also=("tie_embedding",)),
        "conv_bias": Field(FLAG, False),
        "conv_L_cache": Field(Number(2, 1024, whole=True), 3),
        "block_multiple_of": Field(WIDTH, 256),
        "block_ffn_dim_multiplier": Field(POSITIVE, 1.0, null=None),
        "block_auto_adjust_ff_dim": Field(FLAG, True),
        "full_attn_idxs": Field(List(Number(0, MAX_LAYERS, whole=True), MAX_LAYERS), None),
        "layer_types": Field(List(Choice({FULL: FULL, _CONV: _CONV}), MAX_LAYERS), None),
    },
    (
        llama.EMBEDDING,
        *linear(f"{_LAYER}.self_attn.q_proj", f"{_OURS}.attention.query"),
        *linear(f"{_LAYER}.self_attn.k_proj", f"{_OURS}.attention.key"),
        *linear(f"{_LAYER}.self_attn.v_proj", f"{_OURS}.attention.value"),
        *linear(f"{_LAYER}.self_attn.out_proj", f"{_OURS}.attention.out", num_inner=2),
        *norm(f"{_LAYER}.self_attn.q_layernorm", f"{_OURS}.attention.query_norm"),
        *norm(f"{_LAYER}.self_attn.k_layernorm", f"{_OURS}.attention.key_norm"),
        *linear(f"{_LAYER}.conv.in_proj", f"{_OURS}.mixer.in_proj"),
        Tensor(f"{_LAYER}.conv.conv.weight", (f"{_OURS}.mixer.conv.kernel",), "reversed"),
        Tensor(f"{_LAYER}.conv.conv.bias", (f"{_OURS}.mixer.conv.bias",)),
        *linear(f"{_LAYER}.conv.out_proj", f"{_OURS}.mixer.out_proj"),
        *linear(f"{_LAYER}.feed_forward.w1", f"{_OURS}.mlp.gate"),
        *linear(f"{_LAYER}.feed_forward.w3", f"{_OURS}.mlp.up"),
        *linear(f"{_LAYER}.feed_forward.w2", f"{_OURS}.mlp.down"),
        *norm(f"{_LAYER}.operator_norm", f"{_OURS}.attention_norm"),
        *norm(f"{_LAYER}.ffn_norm", f"{_OURS}.mlp_norm"),
        *norm("model.embedding_norm", "norm"),
        llama.HEAD,
    ),
    ignored=llama.IGNORED,
)
