"""Llama 2, 3 and 3.x, and those that share its form: Mistral, Qwen 2 and 3, Phi-3."""

from __future__ import annotations

from typing import Any

from jaxkv.cache.spec import Full, Window
from jaxkv.models.decoder import DecoderConfig
from jaxkv.models.families.table import Family, Fields, Tensor, linear, norm

_LAYER, _OURS = "model.layers.{}", "layers.{}"
EMBEDDING = Tensor("model.embed_tokens.weight", ("embed.embedding",))
HEAD = Tensor("lm_head.weight", ("head.kernel",), "out_in", 1)
IGNORED = (
    r"lm_head\.weight",  # a tied table once more; one of its own is in the table below
    r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",  # older versions of transformers wrote it along
)

ATTENTION = (
    *linear(f"{_LAYER}.self_attn.q_proj", f"{_OURS}.attention.query"),
    *linear(f"{_LAYER}.self_attn.k_proj", f"{_OURS}.attention.key"),
    *linear(f"{_LAYER}.self_attn.v_proj", f"{_OURS}.attention.value"),
    *linear(f"{_LAYER}.self_attn.o_proj", f"{_OURS}.attention.out", num_inner=2),
)
MLP = (
    *linear(f"{_LAYER}.mlp.gate_proj", f"{_OURS}.mlp.gate"),
    *linear(f"{_LAYER}.mlp.up_proj", f"{_OURS}.mlp.up"),
    *linear(f"{_LAYER}.mlp.down_proj", f"{_OURS}.mlp.down"),
)
NORMS = (
    *norm(f"{_LAYER}.input_layernorm", f"{_OURS}.attention_norm"),
    *norm(f"{_LAYER}.post_attention_layernorm", f"{_OURS}.mlp_norm"),
    *norm("model.norm", "norm"),
)
QK_NORMS = (
    *norm(f"{_LAYER}.self_attn.q_norm", f"{_OURS}.attention.query_norm"),
    *norm(f"{_LAYER}.self_attn.k_norm", f"{_OURS}.attention.key_norm"),
)
TENSORS = (EMBEDDING, *ATTENTION, *MLP, *NORMS, *QK_NORMS, HEAD)


def sizes(fields: Fields) -> dict[str, Any]:
    """Returns the fields of DecoderConfig that the families of this file share."""
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    return {
        "vocab_size": fields["vocab_size"],
        "width": width,
        "num_layers": fields["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": fields.get("num_key_value_heads", heads),
        "head_dim": fields.get("head_dim", width // heads),
        "mlp_dim": fields["intermediate_size"],
        "norm_eps": fields.get("rms_norm_eps", 1e-6),
        "tied": fields.get("tie_word_embeddings", False),
    }


def biases(attention: bool, mlp: bool = False) -> tuple[str, ...]:
    """Returns `DecoderConfig.use_bias`."""
    return (*(("query", "key", "value", "out") if attention else ()), *(("mlp",) if mlp else ()))


def _llama(fields: Fields) -> DecoderConfig:
    shared = sizes(fields)
    return DecoderConfig(
        **shared,
        rotary=fields.rotary(shared["head_dim"]),
        activation=fields.activation("hidden_act"),
        use_bias=biases(fields.get("attention_bias", False), fields.get("mlp_bias", False)),
    )


def _windowed(fields: Fields) -> DecoderConfig:
    """Mistral and Phi-3: all layers have the window, if there is one."""
    shared = sizes(fields)
    window = fields.get("sliding_window")
    return DecoderConfig(
        **shared,
        rotary=fields.rotary(shared["head_dim"]),
        activation=fields.activation("hidden_act"),
        reaches=(Full() if window is None else Window(window),),
    )


def _qwen(fields: Fields, **rest: Any) -> DecoderConfig:
    shared = sizes(fields)
    first = min(fields.get("max_window_layers", 28), shared["num_layers"])
    kinds = ("full_attention",) * first + ("sliding_attention",) * (shared["num_layers"] - first)
    return DecoderConfig(
        **shared,
        rotary=fields.rotary(shared["head_dim"]),
        activation=fields.activation("hidden_act"),
        reaches=fields.reaches(kinds) if fields.get("use_sliding_window", False) else (Full(),),
        **rest,
    )


def _qwen2(fields: Fields) -> DecoderConfig:
    return _qwen(fields, use_bias=("query", "key", "value"))


def _qwen3(fields: Fields) -> DecoderConfig:
    return _qwen(fields, use_bias=biases(fields.get("attention_bias", False)), qk_norm=True)


_RMS_EPS = {"rms_norm_eps": 1e-6, "hidden_act": "silu"}
LLAMA = Family(_llama, TENSORS, _RMS_EPS, {"pretraining_tp": (1, None)}, ignored=IGNORED)
MISTRAL = Family(_windowed, TENSORS, {**_RMS_EPS, "sliding_window": 4096}, ignored=IGNORED)
QWEN2 = Family(_qwen2, TENSORS, _RMS_EPS, ignored=IGNORED)
QWEN3 = Family(_qwen3, TENSORS, {**_RMS_EPS, "head_dim": 128}, ignored=IGNORED)

_PHI3_LAYER = (
    *linear(f"{_LAYER}.self_attn.qkv_proj", *(f"{_OURS}.attention.{name}" for name in ("query", "key", "value"))),
    *linear(f"{_LAYER}.self_attn.o_proj", f"{_OURS}.attention.out", num_inner=2),
    *linear(f"{_LAYER}.mlp.gate_up_proj", f"{_OURS}.mlp.gate", f"{_OURS}.mlp.up"),
    *linear(f"{_LAYER}.mlp.down_proj", f"{_OURS}.mlp.down"),
)
PHI3 = Family(
    _windowed,
    (EMBEDDING, *_PHI3_LAYER, *NORMS, HEAD),
    {"rms_norm_eps": 1e-5, "hidden_act": "silu"},
    {"attention_bias": (False, None)},
    ignored=IGNORED,
)
