"""ERNIE 4.5, the dense ones: Llama's form that turns neighbors, with biases everywhere or nowhere."""

from __future__ import annotations

from jaxkv.models.decoder import DecoderConfig
from jaxkv.models.families import llama, rope
from jaxkv.models.families.fields import EPSILON, FLAG, HEADS, LENGTH, Field, Fields
from jaxkv.models.families.table import Family


def _ernie(fields: Fields) -> DecoderConfig:
    shared = llama.sizes(fields)
    return DecoderConfig(
        **shared,
        rotary=rope.rotary(fields, shared["head_dim"], theta=500_000.0, interleaved=True),
        activation=fields["hidden_act"],
        use_bias=fields["use_bias"],
    )


ERNIE4_5 = Family(
    _ernie,
    {
        **llama.FIELDS,
        "num_key_value_heads": Field(HEADS, 2, null=None),
        "head_dim": Field(HEADS, 128, null=None),
        "max_position_embeddings": Field(LENGTH, 131_072),
        "rms_norm_eps": Field(EPSILON, 1e-5),
        "use_bias": Field(FLAG, False),
        "tie_word_embeddings": Field(FLAG, True),
    },
    llama.TENSORS,
    ignored=llama.IGNORED,
)
