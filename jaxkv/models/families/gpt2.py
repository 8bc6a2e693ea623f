"""GPT-2: learned positions, LayerNorm, biases everywhere, and kernels stored [in, out]."""

from __future__ import annotations

import operator

import numpy as np

from jaxkv.models.decoder import DecoderConfig
from jaxkv.models.families.fields import (
    ACTIVATION,
    EPSILON,
    FLAG,
    HEADS,
    LAYERS,
    TABLE,
    VOCABULARY,
    WIDTH,
    Field,
    Fields,
)
from jaxkv.models.families.table import Family, Ignored, Tensor, linear, norm

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


def _is_causal(config: DecoderConfig, layer: int, mask: np.ndarray) -> bool:
    size = config.max_positions or 0
    return mask.shape == (1, 1, size, size) and np.array_equal(mask[0, 0] != 0, np.tri(size, dtype=bool))


def _gpt2(fields: Fields) -> DecoderConfig:
    width, heads = fields["n_embd"], fields["n_head"]
    if width % heads:
        raise fields.wrong("n_head", f'it must divide the {width} in "n_embd"')
    return DecoderConfig(
        vocab_size=fields["vocab_size"],
        width=width,
        num_layers=fields["n_layer"],
        num_heads=heads,
        mlp_dim=fields["n_inner"] or 4 * width,
        rotary=None,
        max_positions=fields["n_positions"],
        norm="layer",
        norm_eps=fields["layer_norm_epsilon"],
        activation=fields["activation_function"],
        gated=False,
        use_bias=True,
        tied=fields["tie_word_embeddings"],
    )


_FIELDS = {
    "vocab_size": Field(VOCABULARY),
    "n_embd": Field(WIDTH, also=("hidden_size",)),
    "n_layer": Field(LAYERS, also=("num_hidden_layers",), counts=f"{_LAYER}."),
    "n_head": Field(HEADS, also=("num_attention_heads",)),
    "n_inner": Field(WIDTH, None),
    "n_positions": Field(TABLE, 1024, also=("max_position_embeddings",)),
    "layer_norm_epsilon": Field(EPSILON, 1e-5),
    "activation_function": Field(ACTIVATION, "gelu_new"),
    "tie_word_embeddings": Field(FLAG, True),
    "scale_attn_weights": Field(FLAG, True, only=(True,)),
    "scale_attn_by_inverse_layer_idx": Field(FLAG, False, only=(False,)),
    "add_cross_attention": Field(FLAG, False, only=(False,)),
}
GPT2 = Family(
    _gpt2,
    _FIELDS,
    _TENSORS,
    context=operator.itemgetter("n_positions"),
    renames=((r"^(?!transformer\.|lm_head\.)", "transformer."),),  # the first checkpoints have no such prefix
    ignored=(
        Ignored(
            r"transformer\.h\.\d+\.attn\.bias",
            "not the causal mask, which is used, as in transformers",
            _is_causal,
        ),
        Ignored(
            r"transformer\.h\.\d+\.attn\.masked_bias",
            "not the score of what is masked; such tokens are not seen at all, as in transformers",
            lambda config, layer, score: score.size == 1 and bool(np.all(score.astype(np.float64) <= -1e4)),
        ),
    ),
)
