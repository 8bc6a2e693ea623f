"""EXAONE 4: OLMo 2's norms behind attention and MLP, heads normalized, full layers between windows without rotary."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxkv.models.decoder import DecoderConfig
from jaxkv.models.families import llama, rope
from jaxkv.models.families.fields import EPSILON, LAYERS, LENGTH, Field, Fields, Problems
from jaxkv.models.families.olmo import BEHIND
from jaxkv.models.families.reach import FULL, LAYER_TYPES, SLIDING, reaches
from jaxkv.models.families.table import Family


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Every how many layers one is full, or letters, one for each layer, such as "LLLG"; read as layer types."""

    def read(self, name: str, value: Any, problems: Problems) -> Any:
        if isinstance(value, str) and value and set(value) <= {"L", "G"}:
            return tuple(FULL if letter == "G" else SLIDING for letter in value)
        if isinstance(value, str):
            problems.wrong(name, value, 'it must be a number of layers, or letters "L" and "G" such as "LLLG"')
            return (FULL,)
        return (SLIDING,) * ((LAYERS.read(name, value, problems) or 1) - 1) + (FULL,)


def _exaone4(fields: Fields) -> DecoderConfig:
    shared, window = llama.sizes(fields), fields["sliding_window"]
    found = reaches(fields, window, (FULL,) if window is None else fields["sliding_window_pattern"])
    turned = rope.rotary(fields, shared["head_dim"])
    mixed = window is not None
    return DecoderConfig(
        **shared,
        reaches=found,
        rotary=tuple(None if mixed and reach.size is None else turned for reach in found),
        activation=fields["hidden_act"],
        qk_norm=True,
        pre_norms=False,
        post_norms=True,
    )


EXAONE4 = Family(
    _exaone4,
    {
        **llama.FIELDS,
        "num_key_value_heads": Field(llama.FIELDS["num_key_value_heads"].kind, 32, null=None),
        "rms_norm_eps": Field(EPSILON, 1e-5),
        "sliding_window": Field(LENGTH, 4096, null=None),
        "sliding_window_pattern": Field(Pattern(), 4),
        "layer_types": LAYER_TYPES,
    },
    (llama.EMBEDDING, *llama.ATTENTION, *llama.QK_NORMS, *llama.MLP, *BEHIND, llama.HEAD),
    ignored=llama.IGNORED,
)
