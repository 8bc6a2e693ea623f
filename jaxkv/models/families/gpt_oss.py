"""gpt-oss: learned sinks, every second layer with a window, YaRN, and experts, whose weights may come in four bits."""

from __future__ import annotations

from jaxkv.models.decoder import DecoderConfig
from jaxkv.models.experts import ExpertsConfig
from jaxkv.models.families import llama, rope
from jaxkv.models.families.fields import ACTIVATION, EPSILON, FLAG, HEADS, LENGTH, POSITIVE, Field, Fields
from jaxkv.models.families.mixtures import chosen
from jaxkv.models.families.reach import FULL, LAYER_TYPES, SLIDING, reaches
from jaxkv.models.families.table import Family, Tensor, linear

_MLP, _OURS = "model.layers.{}.mlp", "layers.{}.mlp"
_TENSORS = (
    llama.EMBEDDING,
    *llama.ATTENTION,
    Tensor("model.layers.{}.self_attn.sinks", ("layers.{}.attention.sink_logits",)),
    *linear(f"{_MLP}.router", f"{_OURS}.router"),
    Tensor(
        f"{_MLP}.experts.gate_up_proj",
        (f"{_OURS}.gate", f"{_OURS}.up"),
        "interleaved",
        num_inner=1,
        experts=True,
        packed=True,
    ),
    Tensor(
        f"{_MLP}.experts.gate_up_proj_bias", (f"{_OURS}.gate_bias", f"{_OURS}.up_bias"), "interleaved", experts=True
    ),
    Tensor(f"{_MLP}.experts.down_proj", (f"{_OURS}.down",), experts=True, packed=True),
    Tensor(f"{_MLP}.experts.down_proj_bias", (f"{_OURS}.down_bias",)),
    *llama.NORMS,
    llama.HEAD,
)


def _gpt_oss(fields: Fields) -> DecoderConfig:
    shared = llama.sizes(fields)
    return DecoderConfig(
        **shared,
        reaches=reaches(fields, fields["sliding_window"], (SLIDING, FULL)),
        rotary=rope.rotary(fields, shared["head_dim"], theta=150_000.0),
        sink_logits=True,
        use_bias=llama.biases(fields["attention_bias"]),
        experts=ExpertsConfig(*chosen(fields, "num_local_experts"), shared["mlp_dim"], use_bias=True, clamped=True),
    )


_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_FIELDS = {
    **llama.FIELDS,
    "num_key_value_heads": Field(HEADS, 8, null=None),
    "head_dim": Field(HEADS, 64, null=None),
    "max_position_embeddings": Field(LENGTH, 131_072),
    "rms_norm_eps": Field(EPSILON, 1e-5),
    "sliding_window": Field(LENGTH, 128, null=None),
    "layer_types": LAYER_TYPES,
    "attention_bias": Field(FLAG, True),
    "num_local_experts": Field(HEADS, also=("num_experts",)),
    "num_experts_per_tok": Field(HEADS, 4),
    "hidden_act": Field(ACTIVATION, "silu", only=("silu",)),
    "swiglu_alpha": Field(POSITIVE, 1.702, only=(1.702,)),
    "swiglu_limit": Field(POSITIVE, 7.0, only=(7.0,)),
    **rope.declared(default=_YARN),
}
GPT_OSS = Family(_gpt_oss, _FIELDS, _TENSORS, quantized=("mxfp4",), ignored=llama.IGNORED)
