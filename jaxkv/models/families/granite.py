"""Granite 3 and 4, the dense ones: Llama's form with four factors."""

from __future__ import annotations

from jaxkv.models.decoder import DecoderConfig
from jaxkv.models.families import llama, rope
from jaxkv.models.families.fields import FLAG, POSITIVE, Field, Fields
from jaxkv.models.families.table import Family

FACTORS = {
    "embedding_multiplier": Field(POSITIVE, 1.0),
    "attention_multiplier": Field(POSITIVE, 1.0),  # of the scores, in the place of head_dim ** -0.5
    "residual_multiplier": Field(POSITIVE, 1.0),
    "logits_scaling": Field(POSITIVE, 1.0),
}


def factors(fields: Fields) -> dict[str, float]:
    """Returns the fields of DecoderConfig that FACTORS fill."""
    return {
        "embed_scale": fields["embedding_multiplier"],
        "attention_scale": fields["attention_multiplier"],
        "residual_scale": fields["residual_multiplier"],
        "logit_scale": 1 / fields["logits_scaling"],
    }


def _granite(fields: Fields) -> DecoderConfig:
    shared = llama.sizes(fields)
    return DecoderConfig(
        **shared,
        **factors(fields),
        rotary=rope.rotary(fields, shared["head_dim"]),
        activation=fields["hidden_act"],
        use_bias=llama.biases(fields["attention_bias"], fields["mlp_bias"]),
    )


GRANITE = Family(
    _granite,
    {**llama.FIELDS, **FACTORS, "attention_bias": Field(FLAG, False), "mlp_bias": Field(FLAG, False)},
    llama.TENSORS,
    ignored=llama.IGNORED,
)
