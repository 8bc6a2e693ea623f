"""Fields that say how queries and keys are rotated by position, in all the ways that checkpoints write it.

Older ones have `rope_scaling` and `rope_theta`, those of transformers 5 `rope_parameters`, for all layers or for each
layer type; fine-tunes have both. What counts then is what counts in transformers 5.24.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxkv.logs import log
from jaxkv.models.families.fields import (
    FLAG,
    LENGTH,
    MAX_LENGTH,
    POSITIVE,
    Choice,
    Field,
    Fields,
    Kind,
    List,
    Number,
    Object,
)
from jaxkv.models.families.reach import FULL, SLIDING
from jaxkv.nn.rotary import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ProportionalScaling,
    Rotary,
    Scaling,
    YarnScaling,
)

PROPORTIONAL = "proportional"  # a way of Gemma 4 alone
_ORIGINAL = "original_max_position_embeddings"
_PART = Number(1e-30, 1, what="a number above 0, at most 1")
_FACTORS, _NOT_NEGATIVE = List(POSITIVE, 2**13), Number(0, 1e30, what="a number of at least 0")


def _parameters(**names: str) -> dict[str, Kind]:
    """Returns what may stand in a dictionary; `names` are further names of scalings."""
    known = Choice({name: name for name in ("default", "linear", "llama3", "yarn", "longrope")} | names)
    return {
        **dict.fromkeys(("rope_type", "type"), known),
        **dict.fromkeys(("rope_theta", "attention_factor", "low_freq_factor", "high_freq_factor"), POSITIVE),
        **dict.fromkeys(("beta_fast", "beta_slow", "mscale", "mscale_all_dim"), _NOT_NEGATIVE),
        **dict.fromkeys(("short_factor", "long_factor"), _FACTORS),
        "partial_rotary_factor": _PART,
        "factor": Number(1, 2**20),
        _ORIGINAL: LENGTH,
        "truncate": FLAG,
    }


def declared(original: int | None = None, default: Mapping[str, Any] | None = None, **names: str) -> dict[str, Field]:
    """Returns the fields, for a family's table.

    Args:
      original: `original_max_position_embeddings` where the file has none beside the dictionaries.
      default: `rope_parameters` where the file has none.
      **names: further names of scalings, and what they stand for.
    """
    one = _parameters(**names)
    dictionary = Object({**one, FULL: Object(one), SLIDING: Object(one)})
    return {
        "rope_parameters": Field(dictionary, default),
        "rope_scaling": Field(dictionary, None),
        "rope_theta": Field(POSITIVE, None),
        "partial_rotary_factor": Field(_PART, None),
        _ORIGINAL: Field(LENGTH, original),
    }


def rotary(
    fields: Fields, head_dim: int, *, theta: float = 10_000.0, partial: bool = False, interleaved: bool = False
) -> Rotary:
    """Returns how all layers rotate queries and keys.

    Args:
      fields: with those of `declared` among them.
      head_dim: size of a head.
      theta: where the file says nothing.
      partial: whether the family can rotate a part of a head alone.
      interleaved: whether it turns neighbors.
    """
    name, given = _for_all(fields, theta)
    unused = (fields["rope_parameters"] or {}).get("rope_theta")
    if name == "rope_scaling" and unused not in (None, given["rope_theta"]):
        log.warning(
            '%s: "rope_scaling" replaces all of "rope_parameters", as in transformers: rope_theta is %g, not %g. '
            'To keep that, write "rope_theta" into "rope_scaling" too',
            fields.where,
            given["rope_theta"],
            unused,
        )
    return dataclasses.replace(_rotary(fields, name, given, head_dim, partial), interleaved=interleaved)


def rotary_of(fields: Fields, kind: str, head_dim: int, *, theta: float) -> Rotary:
    """Returns how the layers of one type rotate queries and keys, in families where types have their own ways.

    Args:
      fields, head_dim: as for `rotary`.
      kind: the layer type. `rope_scaling` is for "full_attention" alone.
      theta: where the dictionaries say nothing.
    """
    return _rotary(fields, *_for_kind(fields, kind, theta), head_dim, False)


def context(fields: Fields) -> int:
    """Returns how long sequences may be: with YaRN at least as long as its factor makes them."""
    return _stretched(fields, _for_all(fields)[1])


def context_of_full(fields: Fields) -> int:
    """Returns the same in families where layer types have their own ways."""
    return _stretched(fields, _for_kind(fields, FULL)[1])


def _stretched(fields: Fields, given: Mapping[str, Any]) -> int:
    longest = fields["max_position_embeddings"]
    if _kind(given) != "yarn":
        return longest
    # Model cards say to add the scaling and leave max_position_embeddings alone; other files have it multiplied.
    return min(max(longest, int(given[_ORIGINAL] * given.get("factor", 1))), MAX_LENGTH)


def _kind(given: Mapping[str, Any]) -> str:
    return given.get("rope_type") or given.get("type", "default")


def _for_all(fields: Fields, theta: float = 1.0) -> tuple[str, dict[str, Any]]:
    """Returns the name of the dictionary that counts, and the dictionary with what stands beside it."""
    name = "rope_scaling" if fields["rope_scaling"] else "rope_parameters"
    given = fields[name] or {}
    if FULL in given or SLIDING in given:
        raise fields.unsupported(name, "layer types of this family can't differ: write one dictionary for all of them")
    beside = {
        "rope_theta": fields["rope_theta"] or theta,
        "partial_rotary_factor": fields["partial_rotary_factor"] or 1.0,
    }
    # Of the original lengths the one at the top counts.
    original = fields[_ORIGINAL] or given.get(_ORIGINAL)
    return name, {**beside, **given, _ORIGINAL: original or fields["max_position_embeddings"]}


def _for_kind(fields: Fields, kind: str, theta: float = 1.0) -> tuple[str, dict[str, Any]]:
    """Returns the same for one layer type."""
    scaling, given = fields["rope_scaling"] or {}, fields["rope_parameters"] or {}
    if set(given) - {FULL, SLIDING}:
        raise fields.wrong("rope_parameters", f'it must have a dictionary for "{FULL}" and one for "{SLIDING}"')
    if FULL in scaling or SLIDING in scaling:
        raise fields.wrong("rope_scaling", f'it is for "{FULL}" alone; write both layer types into "rope_parameters"')
    name = "rope_scaling" if scaling and kind == FULL else "rope_parameters"
    beside = {
        "rope_theta": theta,
        "partial_rotary_factor": fields["partial_rotary_factor"] or 1.0,
        _ORIGINAL: fields["max_position_embeddings"],
    }
    return name, {**beside, **given.get(kind, {}), **(scaling if kind == FULL else {})}


def _rotary(fields: Fields, name: str, given: Mapping[str, Any], head_dim: int, partial: bool) -> Rotary:
    kind, dim = _kind(given), head_dim
    if partial or kind not in (
        "default",
        PROPORTIONAL,
    ):  # the default of families that can't is to rotate all, whatever the file says
        dim = int(head_dim * given["partial_rotary_factor"])
    if dim != head_dim and not partial:
        raise fields.unsupported(name, 'this family rotates whole heads: remove "partial_rotary_factor"')
    if dim % 2 or not dim:
        part = given["partial_rotary_factor"]
        raise fields.unsupported(
            "head_dim" if dim == head_dim else name,
            f'dimensions are rotated in pairs, and "partial_rotary_factor" {part} makes {dim} of the {head_dim} of a '
            'head ("head_dim")',
        )
    try:
        scaling = None if kind == "default" else _scaling(fields, kind, given)
        found = Rotary(given["rope_theta"], dim=None if dim == head_dim else dim, scaling=scaling)
        found.frequencies(head_dim)  # refuses lists of another length
    except ValueError as error:
        raise fields.wrong(name, str(error)) from error
    return found


def _scaling(fields: Fields, kind: str, given: Mapping[str, Any]) -> Scaling:
    longest, original = fields["max_position_embeddings"], given[_ORIGINAL]

    def needed(key: str) -> Any:
        if key not in given:
            raise ValueError(f'the scaling "{kind}" needs "{key}"')
        return given[key]

    if kind == PROPORTIONAL:
        return ProportionalScaling(given["partial_rotary_factor"], given.get("factor", 1.0))
    if kind == "linear":
        return LinearScaling(needed("factor"))
    if kind == "llama3":
        return Llama3Scaling(needed("factor"), needed("low_freq_factor"), needed("high_freq_factor"), original)
    attention = given.get("attention_factor")
    if kind == "yarn":
        factor = given.get("factor") or longest / original
        fast, slow = given.get("beta_fast") or 32.0, given.get("beta_slow") or 1.0
        mscale, all_dim = given.get("mscale"), given.get("mscale_all_dim")
        return YarnScaling(factor, original, fast, slow, attention, mscale, all_dim, given.get("truncate", True))
    short, long = needed("short_factor"), needed("long_factor")
    is_long = (longest if fields.context is None else fields.context) > original
    return LongRopeScaling(
        long if is_long else short, given.get("factor") or max(longest / original, 1.0), original, attention
    )
