"""Python functions as the tools that chat templates read: JSON schemas from annotations and docstrings.

The schemas are those of Hugging Face transformers 5. https://huggingface.co/docs/transformers/chat_extras
"""

from __future__ import annotations

import contextlib
import enum
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Union

from jaxkv.kinds import kind_of

_NAMES = {
    int: "integer",
    float: "number",
    str: "string",
    bool: "boolean",
    type(None): "null",
    list: "array",
    tuple: "array",
    dict: "object",
}
_VALUES = (int, float, str, bool, type(None))
_SECTIONS = re.compile(r"^[ \t]*(Args|Returns|Raises):[ \t]*$", re.MULTILINE)
_ARGUMENT = re.compile(r"([ \t]*)(\w+)(?:[ \t]*\([^()\n]*\))?:\s*(.*)")
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


def schemas(tools: Iterable[Any]) -> list[Any]:
    """Returns tools as templates read them: mappings as they are, of functions their schemas.

    Raises:
      ValueError: for what is neither, and for functions without annotations or docstrings.
    """
    if isinstance(tools, str | Mapping) or not isinstance(tools, Iterable):
        raise ValueError(f"tools is {kind_of(tools)}, must be a list of functions or of JSON schemas")
    return [tool if isinstance(tool, Mapping) else schema(tool) for tool in tools]


def schema(function: Callable[..., Any]) -> dict[str, Any]:
    """Returns the JSON schema of a function.

    Args:
      function: with an annotation for each argument, and a docstring in the style of Google that describes each under
        `Args:`. A description may end with its choices: `what to drink (choices: ["tea", "coffee"])`.

    Raises:
      ValueError: if one of these is missing, or an annotation has no JSON schema.

    >>> def add(a: int, b: int = 0) -> int:
    ...     '''Adds two numbers.
    ...
    ...     Args:
    ...         a: The first.
    ...         b: The second.
    ...     '''
    >>> schema(add)["function"]["parameters"]["required"]
    ['a']
    """
    if not (inspect.isfunction(function) or inspect.ismethod(function)):
        raise ValueError(f"a tool is {kind_of(function)}, must be a function or a JSON schema")
    name = function.__name__
    doc = (inspect.getdoc(function) or "").strip()
    if not doc:
        raise ValueError(f"the tool {name} has no docstring; say there what it does, and under Args: what it takes")
    about, described, returned = _parse(doc)
    try:
        hints = typing.get_type_hints(function)
    except Exception as error:  # whatever evaluating them raises
        raise ValueError(f"the annotations of the tool {name} can't be evaluated: {error}") from error
    parameters = dict(inspect.signature(function).parameters)
    first = next(iter(parameters), "")
    if first in ("self", "cls") and first not in hints:
        del parameters[first]
    properties: dict[str, Any] = {}
    for argument in parameters:
        if argument not in hints:
            raise ValueError(f"argument {argument} of the tool {name} has no annotation; give one, as {argument}: int")
        if argument not in described:
            raise ValueError(
                f"the docstring of the tool {name} does not describe {argument}; add a line "
                f'"{argument}: ..." under Args:'
            )
        said = _of(hints[argument], f"argument {argument} of the tool {name}")
        text = described[argument]
        if choices := _CHOICES.search(text):
            try:
                values = json.loads(choices[1])
            except ValueError:
                values = None
            if not isinstance(values, list):
                raise ValueError(f'the choices of {argument} of the tool {name} are {choices[1]}, must be ["a", ...]')
            said["enum"] = [value.strip() if isinstance(value, str) else value for value in values]
            text = text[: choices.start()].strip()
        properties[argument] = {**said, "description": text}
    needed = [argument for argument, parameter in parameters.items() if parameter.default is parameter.empty]
    found: dict[str, Any] = {
        "name": name,
        "description": about,
        "parameters": {"type": "object", "properties": properties, **({"required": needed} if needed else {})},
    }
    if "return" in hints:
        with contextlib.suppress(ValueError):  # no model writes what comes back: it may be anything
            found["return"] = _of(hints["return"], "") | ({} if returned is None else {"description": returned})
    return {"type": "function", "function": found}


def _parse(doc: str) -> tuple[str, dict[str, str], str | None]:
    """Returns what a docstring says: of the function, of each argument, of what comes back."""
    about, *rest = _SECTIONS.split(doc)
    sections = dict(zip(rest[::2], rest[1::2], strict=True))
    described: dict[str, str] = {}
    indent = name = None
    for line in sections.get("Args", "").splitlines():
        entry = _ARGUMENT.fullmatch(line)
        if entry and (indent is None or len(entry[1]) <= indent):
            indent, name = len(entry[1]), entry[2]
            described[name] = entry[3].strip()
        elif name is not None and line.strip():
            described[name] = f"{described[name]} {line.strip()}".strip()
    returned = sections.get("Returns")
    return about.strip(), described, None if returned is None else returned.strip()


def _of(hint: Any, where: str) -> dict[str, Any]:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}
    if hint in _NAMES:
        return {"type": _NAMES[hint]}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _one_of([member.value for member in hint], hint, where)
    if origin is Literal:
        return _one_of(list(inner), hint, where)
    if origin in (Union, types.UnionType):
        kinds = [_of(kind, where) for kind in inner if kind is not type(None)]
        if len(kinds) == 1:
            said = kinds[0]
        elif all(kind.keys() == {"type"} and isinstance(kind["type"], str) for kind in kinds):
            names = sorted({kind["type"] for kind in kinds})
            said = {"type": names[0] if len(names) == 1 else names}
        else:
            said = {"anyOf": kinds}
        return {**said, "nullable": True} if type(None) in inner else said
    if origin is list:
        return {"type": "array", "items": _of(inner[0], where)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _of(inner[1], where)}
    if origin is tuple and len(inner) > 1 and ... not in inner:
        return {"type": "array", "prefixItems": [_of(kind, where) for kind in inner]}
    cure = " (list[...] is one of any length)" if origin is tuple else ""
    raise ValueError(
        f"{where} has the annotation {hint!r}, which has no JSON schema{cure}; use int, float, str, bool, list, dict, "
        "tuple, Literal, an Enum or a union of them, or give the tool's JSON schema instead of the function"
    )


def _one_of(values: list[Any], hint: Any, where: str) -> dict[str, Any]:
    if not values or any(type(value) not in _VALUES for value in values):
        raise ValueError(f"{where} has the annotation {hint!r}, whose values {values} are not all texts or numbers")
    names = list(dict.fromkeys(_NAMES[type(value)] for value in values))
    return {"type": names[0] if len(names) == 1 else names, "enum": values}
