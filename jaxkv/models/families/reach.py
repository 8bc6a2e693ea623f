"""Fields that say which layers see a window of the past."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxkv.cache.spec import Full, Reach, Window
from jaxkv.models.families.fields import MAX_LAYERS, Choice, Field, Fields, List, Number

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
_KINDS = Choice({FULL: FULL, SLIDING: SLIDING, "attention": FULL})  # the last as older versions wrote it
LAYER_TYPES = Field(List(_KINDS, MAX_LAYERS), None)
# "no_rope_layers" of Llama 4 and SmolLM3, which has 1 for a layer whose queries and keys are rotated by position.
TURNED_LAYERS = Field(List(Number(0, 1, whole=True), MAX_LAYERS), None)


def each_layer(fields: Fields, default: Callable[[int], Any], name: str = "layer_types") -> tuple[Any, ...]:
    """Returns what a list in the file says of each layer; where there is none, what `default` says of their numbers."""
    layers = fields["num_hidden_layers"]
    kinds = fields[name] or tuple(map(default, range(layers)))
    if len(kinds) != layers:
        raise fields.wrong(name, f'it must have one entry for each of {layers} layers ("num_hidden_layers")')
    return kinds


def reaches(fields: Fields, window: int | None, pattern: Sequence[str]) -> tuple[Reach, ...]:
    """Returns what each layer sees, by `layer_types`; one entry if all see the same.

    Args:
      fields: with "layer_types" among them.
      window: how many tokens a layer of "sliding_attention" sees; None if there is no such layer.
      pattern: layer types where the file has none, repeated as often as needed.
    """
    kinds = each_layer(fields, lambda i: pattern[i % len(pattern)])
    if window is None and SLIDING in kinds:
        raise fields.wrong("sliding_window", f'it must be a number of tokens, since there are layers of "{SLIDING}"')
    found = tuple(Full() if kind == FULL or window is None else Window(window) for kind in kinds)
    return found[:1] if len(set(found)) == 1 else found


def turned(fields: Fields) -> tuple[bool, ...]:
    """Returns of which layers queries and keys are rotated by position.

    Args:
      fields: with "no_rope_layers" and "no_rope_layer_interval" among them.
    """
    layers, interval = fields["num_hidden_layers"], fields["no_rope_layer_interval"]
    given = fields["no_rope_layers"] or [(i + 1) % interval != 0 for i in range(layers)]
    if len(given) < layers:
        raise fields.wrong("no_rope_layers", f'it must have an entry for each of {layers} layers ("num_hidden_layers")')
    return tuple(map(bool, given[:layers]))
