"""OLMo 2 and 3: norms behind attention and MLP alone, queries and keys normalized over all heads together."""

from __future__ import annotations

from typing import Any

from jaxkv.models.decoder import DecoderConfig
from jaxkv.models.families import llama, rope
from jaxkv.models.families.fields import EPSILON, FLAG, LENGTH, Field, Fields
from jaxkv.models.families.reach import FULL, LAYER_TYPES, SLIDING, reaches
from jaxkv.models.families.table import Family, norm

_LAYER, _OURS = "model.layers.{}", "layers.{}"
BEHIND = (
    *norm(f"{_LAYER}.post_attention_layernorm", f"{_OURS}.attention_post_norm"),
    *norm(f"{_LAYER}.post_feedforward_layernorm", f"{_OURS}.mlp_post_norm"),
    *norm("model.norm", "norm"),
)
_TENSORS = (llama.EMBEDDING, *llama.ATTENTION, *llama.WHOLE_QK_NORMS, *llama.MLP, *BEHIND, llama.HEAD)


def _shared(fields: Fields) -> dict[str, Any]:
    return {
        **llama.sizes(fields),
        "activation": fields["hidden_act"],
        "use_bias": llama.biases(fields["attention_bias"]),
        "qk_norm": "together",
        "pre_norms": False,
        "post_norms": True,
    }


def _olmo2(fields: Fields) -> DecoderConfig:
    shared = _shared(fields)
    return DecoderConfig(**shared, rotary=rope.rotary(fields, shared["head_dim"]))


def _olmo3(fields: Fields) -> DecoderConfig:
    shared = _shared(fields)
    found = reaches(fields, fields["sliding_window"], (SLIDING, SLIDING, SLIDING, FULL))
    # Scaling is for full layers alone: what a window sees is never farther apart than in training. A theta at the top
    # is for both, as transformers 4 meant it, which wrote such files; 5.24 takes it for full layers alone.
    theta = fields["rope_theta"] or 500_000.0
    full, window = (rope.rotary_of(fields, kind, shared["head_dim"], theta=theta) for kind in (FULL, SLIDING))
    return DecoderConfig(
        **shared, reaches=found, rotary=tuple(full if reach.size is None else window for reach in found)
    )


_FIELDS = {**llama.FIELDS, "rms_norm_eps": Field(EPSILON, 1e-5), "attention_bias": Field(FLAG, False)}
OLMO2 = Family(_olmo2, _FIELDS, _TENSORS, ignored=llama.IGNORED)
OLMO3 = Family(
    _olmo3,
    {**_FIELDS, "sliding_window": Field(LENGTH, 4096, null=None), "layer_types": LAYER_TYPES},
    _TENSORS,
    context=rope.context_of_full,
    ignored=llama.IGNORED,
)
