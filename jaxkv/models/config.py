"""config.json: which family a checkpoint is of, and the config of its module; read before any weight is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxkv.errors import NotSupportedError
from jaxkv.models.families import FAMILIES
from jaxkv.models.families.table import Fields
from jaxkv.models.files import read_json


def read_config(
    source: Mapping[str, Any] | str | os.PathLike[str], *, context: int | None = None
) -> tuple[str, Any, dict[str, Any]]:
    """Returns (family, config, parsed config.json), and reads no weights.

    Args:
      source: a checkpoint directory, a path of config.json, or what was parsed from it.
      context: as for `load`.

    Raises:
      OSError: if there is no such file.
      NotSupportedError: for an unknown family or a feature that is not computed here, naming the field.
      ValueError: for a field that is missing or makes no sense.

    >>> name, config, _ = read_config({"model_type": "gpt2", "vocab_size": 8, "n_embd": 4, "n_layer": 1, "n_head": 2})
    >>> name, config.norm, config.max_positions
    ('gpt2', 'layer', 1024)
    """
    if not isinstance(source, Mapping):
        path = Path(source)
        source = read_json(path / "config.json" if path.is_dir() or path.suffix != ".json" else path)
    source = dict(source)
    name = source.get("model_type")
    if name not in FAMILIES:
        raise NotSupportedError(
            f'config.json has "model_type": {name!r}, which is not known here; known are {", ".join(FAMILIES)}. '
            "docs/families.md says how to add one"
        )
    if source.get("quantization_config") is not None:
        method = source["quantization_config"].get("quant_method")
        raise NotSupportedError(
            f'config.json has "quantization_config" ({method}): weights that are quantized can\'t be read; fetch the '
            "model in bfloat16 or float16, or save it dequantized"
        )
    family = FAMILIES[name]
    try:
        config = family.config(Fields(text_fields(source), family, context))
    except (TypeError, AttributeError) as error:
        raise ValueError(f"config.json has a field of a wrong kind: {error}") from error
    return name, config, source


def context_of(source: Mapping[str, Any]) -> int | None:
    """Returns how long the sequences are that a model was made for, by its parsed config.json; None if it is silent."""
    fields = text_fields(source)
    names = ("max_position_embeddings", "n_positions", "max_target_positions")
    return next((int(fields[name]) for name in names if fields.get(name) is not None), None)


def text_fields(source: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the config.json of the text part of a model that sees images too, or of the whole if that is all."""
    text = source.get("text_config")
    if not isinstance(text, Mapping):
        return source
    shared = {key: source[key] for key in ("tie_word_embeddings", "eos_token_id") if key in source}
    return {**shared, **text, "model_type": text.get("model_type", f"{source.get('model_type')}_text")}
