"""SmolLM3: Llama's form, but every fourth layer turns nothing by position."""

from __future__ import annotations

from jaxkv.models.decoder import DecoderConfig
from jaxkv.models.families import llama, rope
from jaxkv.models.families.fields import FLAG, HEADS, LAYERS, LENGTH, Field, Fields
from jaxkv.models.families.reach import FULL, LAYER_TYPES, SLIDING, TURNED_LAYERS, reaches, turned
from jaxkv.models.families.table import Family


def _smollm3(fields: Fields) -> DecoderConfig:
    shared = llama.sizes(fields)
    llama.check_windows(fields)
    window = fields["sliding_window"] if fields["use_sliding_window"] else None
    turns = turned(fields)
    pattern = [FULL if turns[i] or window is None else SLIDING for i in range(shared["num_layers"])]
    rotary = rope.rotary(fields, shared["head_dim"], theta=2_000_000.0)
    return DecoderConfig(
        **shared,
        reaches=reaches(fields, window, pattern),
        rotary=tuple(rotary if turn else None for turn in turns),
        activation=fields["hidden_act"],
        use_bias=llama.biases(fields["attention_bias"], fields["mlp_bias"]),
    )


SMOLLM3 = Family(
    _smollm3,
    {
        **llama.FIELDS,
        "num_key_value_heads": Field(HEADS, 4, null=None),
        "max_position_embeddings": Field(LENGTH, 32_768),
        "use_sliding_window": Field(FLAG, False),
        "sliding_window": Field(LENGTH, None),
        "layer_types": LAYER_TYPES,
        "no_rope_layers": TURNED_LAYERS,
        "no_rope_layer_interval": Field(LAYERS, 4),
        "attention_bias": Field(FLAG, False),
        "mlp_bias": Field(FLAG, False),
        "tie_word_embeddings": Field(FLAG, True),
    },
    llama.TENSORS,
    ignored=llama.IGNORED,
)
