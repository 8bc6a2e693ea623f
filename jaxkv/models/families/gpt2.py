"""GPT-2: learned positions, LayerNorm, biases everywhere, and kernels stored [in, out]."""

from __future__ import annotations

from jaxkv.models.decoder import DecoderConfig
from jaxkv.models.families.table import Family, Fields, Tensor, linear, norm

_LAYER, _OURS = "transformer.h.{}", "layers.{}"
_QKV = tuple(f"{_OURS}.attention.{name}" for name in ("query", "key", "value"))
_TENSORS = (
    Tensor("transformer.wte.weight", ("embed.embedding",)),
    Tensor("transformer.wpe.weight", ("positions.embedding",)),
    *norm(f"{_LAYER}.ln_1", f"{_OURS}.attention_norm"),
    *linear(f"{_LAYER}.attn.c_attn", *_QKV, form="in_out"),
    *linear(f"{_LAYER}.attn.c_proj", f"{_OURS}.attention.out", num_inner=2, form="in_out"),
    *norm(f"{_LAYER}.ln_2", f"{_OURS}.mlp_norm"),
    *linear(f"{_LAYER}.mlp.c_fc", f"{_OURS}.mlp.up", form="in_out"),
    *linear(f"{_LAYER}.mlp.c_proj", f"{_OURS}.mlp.down", form="in_out"),
    *norm("transformer.ln_f", "norm"),
    Tensor("lm_head.weight", ("head.kernel",), "out_in", 1),
)


def _gpt2(fields: Fields) -> DecoderConfig:
    width = fields["n_embd"]
    return DecoderConfig(
        vocab_size=fields["vocab_size"],
        width=width,
        num_layers=fields["n_layer"],
        num_heads=fields["n_head"],
        mlp_dim=fields.get("n_inner", 4 * width),
        rotary=None,
        max_positions=fields["n_positions"],
        norm="layer",
        norm_eps=fields["layer_norm_epsilon"],
        activation=fields.activation("activation_function"),
        gated=False,
        use_bias=True,
        tied=fields["tie_word_embeddings"],
    )


GPT2 = Family(
    _gpt2,
    _TENSORS,
    {
        "n_positions": 1024,
        "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
    },
    {"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)},
    renames=((r"^(?!transformer\.|lm_head\.)", "transformer."),),  # the first checkpoints have no such prefix
    ignored=(
        r"lm_head\.weight",  # the tied table once more
        r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",  # the causal mask
    ),
)
