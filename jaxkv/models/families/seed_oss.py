"""Seed-OSS: Llama's form with biases that are switched one by one."""

from __future__ import annotations

from jaxkv.models.decoder import DecoderConfig
from jaxkv.models.families import llama, rope
from jaxkv.models.families.fields import FLAG, HEADS, LENGTH, Field, Fields
from jaxkv.models.families.table import Family


def _seed_oss(fields: Fields) -> DecoderConfig:
    shared = llama.sizes(fields)
    switches = {"attention_bias": ("query", "key", "value"), "attention_out_bias": ("out",), "mlp_bias": ("mlp",)}
    return DecoderConfig(
        **shared,
        rotary=rope.rotary(fields, shared["head_dim"]),
        activation=fields["hidden_act"],
        use_bias=tuple(name for switch, names in switches.items() if fields[switch] for name in names),
    )


SEED_OSS = Family(
    _seed_oss,
    {
        **llama.FIELDS,
        "num_key_value_heads": Field(HEADS, 8, null=None),
        "head_dim": Field(HEADS, 128, null=None),
        "max_position_embeddings": Field(LENGTH, 524_288),
        "attention_bias": Field(FLAG, True),
        "attention_out_bias": Field(FLAG, False),
        "mlp_bias": Field(FLAG, False),
    },
    llama.TENSORS,
    ignored=llama.IGNORED,
)
