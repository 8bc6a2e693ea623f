"""Llama 2, 3 and 3.x, and those that share its form: Mistral, Qwen 2 and 3, Phi-3."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from jaxkv.cache.spec import Full, Window
from jaxkv.models.decoder import DecoderConfig
from jaxkv.models.families import rope
from jaxkv.models.families.fields import (
    ACTIVATION,
    EPSILON,
    FLAG,
    HEADS,
    LAYERS,
    LENGTH,
    MAX_LENGTH,
    VOCABULARY,
    WIDTH,
    Field,
    Fields,
    Number,
)
from jaxkv.models.families.reach import FULL, LAYER_TYPES, SLIDING, reaches
from jaxkv.models.families.table import Family, Ignored, Tensor, linear, norm

_LAYER, _OURS = "model.layers.{}", "layers.{}"
EMBEDDING = Tensor("model.embed_tokens.weight", ("embed.embedding",))
HEAD = Tensor("lm_head.weight", ("head.kernel",), "out_in", 1)


def _turns_so(config: DecoderConfig, layer: int, frequencies: np.ndarray) -> bool:
    """Returns whether a file's rotary frequencies are the config's, scaled or not: both have been written."""
    rotary = config.layer_rotary(layer)
    if rotary is None:
        return False
    size = config.rotated_dim(layer)
    wanted = (one.frequencies(size) for one in (rotary, dataclasses.replace(rotary, scaling=None)))
    given = frequencies.astype(np.float64)
    return any(given.shape == want.shape and np.allclose(given, want, rtol=1e-2, atol=1e-6) for want in wanted)


IGNORED = (
    Ignored(  # older versions of transformers wrote it along
        r"model\.(?:layers\.(\d{1,9})\.self_attn\.)?rotary_emb\.inv_freq",
        "not the frequencies that config.json asks for, which are used, as in transformers",
        _turns_so,
    ),
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
WHOLE_QK_NORMS = (  # over all heads together: in files one axis, here heads and their numbers
    Tensor(f"{_LAYER}.self_attn.q_norm.weight", (f"{_OURS}.attention.query_norm.scale",), "in_out"),
    Tensor(f"{_LAYER}.self_attn.k_norm.weight", (f"{_OURS}.attention.key_norm.scale",), "in_out"),
)
QK_NORMS = (
    *norm(f"{_LAYER}.self_attn.q_norm", f"{_OURS}.attention.query_norm"),
    *norm(f"{_LAYER}.self_attn.k_norm", f"{_OURS}.attention.key_norm"),
)
TENSORS = (EMBEDDING, *ATTENTION, *MLP, *NORMS, *QK_NORMS, HEAD)


# What config.json may say of these families and their relatives, which replace what differs.
FIELDS = {
    "vocab_size": Field(VOCABULARY),
    "hidden_size": Field(WIDTH),
    "intermediate_size": Field(WIDTH),
    "num_hidden_layers": Field(LAYERS, counts=f"{_LAYER}."),
    "num_attention_heads": Field(HEADS),
    "num_key_value_heads": Field(HEADS, None),
    "head_dim": Field(HEADS, None),
    "max_position_embeddings": Field(LENGTH, 2048),
    "hidden_act": Field(ACTIVATION, "silu"),
    "rms_norm_eps": Field(EPSILON, 1e-6),
    "tie_word_embeddings": Field(FLAG, False),
    **rope.declared(),
}


def sizes(fields: Fields, eps: str = "rms_norm_eps") -> dict[str, Any]:
    """Returns the fields of DecoderConfig that the families of this file share.

    Args:
      fields: of the family.
      eps: the field of what is added to the mean square.
    """
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    kv_heads, head_dim = fields["num_key_value_heads"] or heads, fields["head_dim"] or width // heads
    if heads % kv_heads:
        raise fields.wrong("num_key_value_heads", f'it must divide the {heads} in "num_attention_heads"')
    if head_dim < 1:
        raise fields.wrong("num_attention_heads", f'it must be at most the {width} in "hidden_size"')
    return {
        "vocab_size": fields["vocab_size"],
        "width": width,
        "num_layers": fields["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "mlp_dim": fields["intermediate_size"],
        "norm_eps": fields[eps],
        "tied": fields["tie_word_embeddings"],
    }


def biases(attention: bool, mlp: bool = False) -> tuple[str, ...]:
    """Returns `DecoderConfig.use_bias`."""
    return (*(("query", "key", "value", "out") if attention else ()), *(("mlp",) if mlp else ()))


def check_windows(fields: Fields) -> None:
    """Checks that there are no layers with a window where windows are switched off."""
    if not fields["use_sliding_window"] and SLIDING in (fields["layer_types"] or ()):
        raise fields.wrong("use_sliding_window", f'it must be true, since "layer_types" has layers of "{SLIDING}"')


def _llama(fields: Fields) -> DecoderConfig:
    shared = sizes(fields)
    return DecoderConfig(
        **shared,
        rotary=rope.rotary(fields, shared["head_dim"]),
        activation=fields["hidden_act"],
        use_bias=biases(fields["attention_bias"], fields["mlp_bias"]),
    )


def _windowed(fields: Fields, *, partial: bool = False) -> DecoderConfig:
    """Mistral and Phi-3: all layers have the window, if there is one."""
    shared, window = sizes(fields), fields["sliding_window"]
    return DecoderConfig(
        **shared,
        rotary=rope.rotary(fields, shared["head_dim"], partial=partial),
        activation=fields["hidden_act"],
        reaches=(Full() if window is None else Window(window),),
    )


def _qwen(fields: Fields, **rest: Any) -> DecoderConfig:
    shared = sizes(fields)
    window = fields["sliding_window"] if fields["use_sliding_window"] else None
    check_windows(fields)
    first = shared["num_layers"] if window is None else min(fields["max_window_layers"], shared["num_layers"])
    return DecoderConfig(
        **shared,
        rotary=rope.rotary(fields, shared["head_dim"]),
        activation=fields["hidden_act"],
        reaches=reaches(fields, window, (FULL,) * first + (SLIDING,) * (shared["num_layers"] - first)),
        **rest,
    )


def _qwen2(fields: Fields) -> DecoderConfig:
    return _qwen(fields, use_bias=("query", "key", "value"))


def _qwen3(fields: Fields) -> DecoderConfig:
    return _qwen(fields, use_bias=biases(fields["attention_bias"]), qk_norm=True)


LLAMA = Family(
    _llama,
    {**FIELDS, "attention_bias": Field(FLAG, False), "mlp_bias": Field(FLAG, False)},
    TENSORS,
    ignored=IGNORED,
)
MISTRAL = Family(
    _windowed,
    {
        **FIELDS,
        "num_key_value_heads": Field(HEADS, 8, null=None),
        "max_position_embeddings": Field(LENGTH, 131_072),
        "sliding_window": Field(LENGTH, 4096, null=None),
    },
    TENSORS,
    ignored=IGNORED,
)
_QWEN_FIELDS = {
    **FIELDS,
    "num_key_value_heads": Field(HEADS, 32, null=None),
    "max_position_embeddings": Field(LENGTH, 32_768),
    "use_sliding_window": Field(FLAG, False),
    "sliding_window": Field(LENGTH, 4096, null=None),
    "max_window_layers": Field(Number(0, MAX_LENGTH, whole=True), 28),
    "layer_types": LAYER_TYPES,
}
QWEN2 = Family(_qwen2, _QWEN_FIELDS, TENSORS, ignored=IGNORED)
QWEN3 = Family(
    _qwen3,
    {**_QWEN_FIELDS, "head_dim": Field(HEADS, 128), "attention_bias": Field(FLAG, False)},
    TENSORS,
    ignored=IGNORED,
)

_PHI3_LAYER = (
    *linear(f"{_LAYER}.self_attn.qkv_proj", *(f"{_OURS}.attention.{name}" for name in ("query", "key", "value"))),
    *linear(f"{_LAYER}.self_attn.o_proj", f"{_OURS}.attention.out", num_inner=2),
    *linear(f"{_LAYER}.mlp.gate_up_proj", f"{_OURS}.mlp.gate", f"{_OURS}.mlp.up"),
    *linear(f"{_LAYER}.mlp.down_proj", f"{_OURS}.mlp.down"),
)
PHI3 = Family(
    functools.partial(_windowed, partial=True),
    {
        **FIELDS,
        "max_position_embeddings": Field(LENGTH, 4096),
        "rms_norm_eps": Field(EPSILON, 1e-5),
        "sliding_window": Field(LENGTH, None),
        **rope.declared(4096, su="longrope", yarn="longrope"),  # as early checkpoints call it
    },
    (EMBEDDING, *_PHI3_LAYER, *NORMS, HEAD),
    ignored=IGNORED,
)
