"""Fields that say which layers see a window of the past."""

from __future__ import annotations

from collections.abc import Sequence

from jaxkv.cache.spec import Full, Reach, Window
from jaxkv.models.families.fields import MAX_LAYERS, Choice, Field, Fields, List

FULL, SLIDING = "full_attention", "sliding_attention"
_KINDS = Choice({FULL: FULL, SLIDING: SLIDING, "attention": FULL})  # the last as older versions wrote it
LAYER_TYPES = Field(List(_KINDS, MAX_LAYERS), None)


def reaches(fields: Fields, window: int | None, pattern: Sequence[str]) -> tuple[Reach, ...]:
    """Returns what each layer sees, by `layer_types`; one entry if all see the same.

    Args:
      fields: with "layer_types" among them.
      window: how many tokens a layer of "sliding_attention" sees; None if there is no such layer.
      pattern: layer types where the file has none, repeated as often as needed.
    """
    layers = fields["num_hidden_layers"]
    kinds = fields["layer_types"] or tuple(pattern[i % len(pattern)] for i in range(layers))
    if len(kinds) != layers:
        raise fields.wrong("layer_types", f'it must have one entry for each of {layers} layers ("num_hidden_layers")')
    if window is None and SLIDING in kinds:
        raise fields.wrong("sliding_window", f'it must be a number of tokens, since there are layers of "{SLIDING}"')
    found = tuple(Full() if kind == FULL or window is None else Window(window) for kind in kinds)
    return found[:1] if len(set(found)) == 1 else found
