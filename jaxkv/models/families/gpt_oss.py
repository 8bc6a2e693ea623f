"""gpt-oss: learned sinks, every second layer with a window, YaRN, and experts. Not its four-bit weights."""

from __future__ import annotations

from jaxkv.models.decoder import DecoderConfig
from jaxkv.models.families import llama
from jaxkv.models.families.table import Family, Fields, Tensor, linear

_MLP, _OURS = "model.layers.{}.mlp", "layers.{}.mlp"
_TENSORS = (
    llama.EMBEDDING,
    *llama.ATTENTION,
    Tensor("model.layers.{}.self_attn.sinks", ("layers.{}.attention.sink_logits",)),
    *linear(f"{_MLP}.router", f"{_OURS}.router"),
    Tensor(f"{_MLP}.experts.gate_up_proj", (f"{_OURS}.gate_up",)),
    Tensor(f"{_MLP}.experts.gate_up_proj_bias", (f"{_OURS}.gate_up_bias",)),
    Tensor(f"{_MLP}.experts.down_proj", (f"{_OURS}.down",)),
    Tensor(f"{_MLP}.experts.down_proj_bias", (f"{_OURS}.down_bias",)),
    *llama.NORMS,
    llama.HEAD,
)


def _gpt_oss(fields: Fields) -> DecoderConfig:
    shared = llama.sizes(fields)
    return DecoderConfig(
        **shared,
        reaches=fields.reaches(("sliding_attention", "full_attention")),
        rotary=fields.rotary(shared["head_dim"], theta=150_000.0),
        sink_logits=True,
        use_bias=llama.biases(fields["attention_bias"]),
        num_experts=fields["num_local_experts"],
        experts_per_token=fields.get("num_experts_per_tok", fields.get("experts_per_token", 4)),
    )


_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
GPT_OSS = Family(
    _gpt_oss,
    _TENSORS,
    {"head_dim": 64, "rms_norm_eps": 1e-5, "sliding_window": 128, "attention_bias": True, "rope_scaling": _YARN},
    {"hidden_act": ("silu",), "swiglu_alpha": (1.702,), "swiglu_limit": (7.0, 7)},
    ignored=llama.IGNORED,
)
