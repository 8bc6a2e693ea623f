"""config.json: which family a checkpoint is of, and the config of its module, checked before any weight is read."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxkv.errors import NotSupportedError
from jaxkv.models.families import FAMILIES
from jaxkv.models.families.fields import Field, Fields, Object
from jaxkv.models.families.table import Family
from jaxkv.models.files import config_path, read_json
from jaxkv.models.fp8 import block_of

# What files of all families may have.
_OF_ALL = {name: Field(Object(), None) for name in ("text_config", "quantization_config", "per_layer_config")}


def read_config(
    source: Mapping[str, Any] | str | os.PathLike[str], *, context: int | None = None
) -> tuple[str, Any, dict[str, Any]]:
    """Returns (family, config, parsed config.json), and reads no weights.

    Args:
      source: a checkpoint directory, the path of a config.json, or its parsed contents.
      context: as for `load`.

    Raises:
      OSError: if there is no such file.
      NotSupportedError: for an unknown family or a feature that is not computed here, naming the field.
      ValueError: naming every field that is missing or has a value that it can't have.

    >>> name, config, _ = read_config({"model_type": "gpt2", "vocab_size": 8, "n_embd": 4, "n_layer": 1, "n_head": 2})
    >>> name, config.norm, config.max_positions
    ('gpt2', 'layer', 1024)
    """
    where = "config.json"
    if not isinstance(source, Mapping):
        path = Path(source)
        path = config_path(path) if path.suffix != ".json" or (path / "config.json").exists() else path
        where, source = str(path), read_json(path)
    family, fields = _fields(source, context, where)
    return source["model_type"], family.config(fields), dict(source)


def context_of(source: Mapping[str, Any]) -> int:
    """Returns how long the sequences are that a model was made for, by its parsed config.json."""
    family, fields = _fields(source)
    return family.context(fields)


def check_layers(source: Mapping[str, Any], names: Iterable[str], where: Any = "config.json") -> None:
    """Checks that the files have as many layers and experts as config.json says, before those are made.

    Args:
      source: the parsed config.json.
      names: of the tensors in the files.
      where: the path of config.json, for the error.

    Raises:
      ValueError: naming the field, if the files have some, but fewer.
    """
    family, fields = _fields(source, where=str(where))
    known = [family.known_as(name) for name in names]
    for name, field in family.fields.items():
        if not field.counts:
            continue
        pattern = re.compile(re.escape(field.counts).replace(r"\{\}", r"(\d+)"))
        numbers = {found[pattern.groups] for found in map(pattern.match, known) if found}
        if 0 < len(numbers) < fields[name]:  # with none of them, the names are what is wrong: all are reported later
            raise fields.wrong(name, f"the weights have {len(numbers)} {field.counted}")


def text_fields(source: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the config.json of the text part of a model that sees images too, or of the whole if that is all."""
    family = FAMILIES[source["model_type"]]
    part = source.get(family.part) if family.part else None
    if part is None:
        return source
    shared = {key: source[key] for key in ("tie_word_embeddings", "eos_token_id") if key in source}
    return {**shared, **part, "model_type": part.get("model_type", f"{source['model_type']}_text")}


def quantization(source: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Returns how the weights are quantized, by a parsed config.json; None if they aren't."""
    return source.get("quantization_config") or text_fields(source).get("quantization_config")


def _fields(source: Mapping[str, Any], context: int | None = None, where: str = "config.json") -> tuple[Family, Fields]:
    """Returns the family of a parsed config.json and its fields, all of them checked."""
    name = source.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise NotSupportedError(
            f'{where} has "model_type": {name!r}, which jaxkv does not know; it knows {", ".join(FAMILIES)}. '
            "docs/families.md says how to add one"
        )
    family = FAMILIES[name]
    Fields(source, _OF_ALL, where=where)
    text = text_fields(source)
    part = where if text is source else f'{where}, "{family.part}",'
    fields = Fields(text, {**_OF_ALL, **family.fields}, context, part)
    quantized = quantization(source)
    if quantized and (method := quantized.get("quant_method")) not in family.quantized:
        can = f"only {' or '.join(family.quantized)} can; " if family.quantized else ""
        raise NotSupportedError(
            f'{where} has "quantization_config" ({method!r}): weights quantized in this way can\'t be read; {can}'
            "fetch the model in bfloat16 or float16, or save it dequantized"
        )
    block_of(quantized, where)
    if text.get("per_layer_config") and "per_layer_config" not in family.fields:
        raise fields.unsupported("per_layer_config", "only layer_types may set layers apart")
    return family, fields
