"""Conversations as chat templates read them.

What is written here follows Hugging Face transformers 5, so that the same messages give the same text.
https://huggingface.co/docs/transformers/chat_templating
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxkv.kinds import kind_of
from jaxkv.models.template import Refusal

_REASONING = ("reasoning_content", "thinking", "reasoning")  # the names that templates read it by
_MARK = "END-OF-WHAT-IS-CONTINUED "  # its space shows whether the template trims

Message = dict[str, Any]


def plain(value: Any) -> Any:
    """Returns a value as JSON has it; of what JSON doesn't have the type's name remains, as "<Image>".

    Templates are code from elsewhere: they get no objects, whose methods might do anything.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, np.generic):
        return value.item()
    for base in (str, int, float):
        if isinstance(value, base):
            return base(value) if base is not str else str.__str__(value)
    if isinstance(value, Mapping):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):  # messages as the clients of OpenAI and others return them
        return plain(value.model_dump())
    return f"<{type(value).__name__}>"


def check(messages: Any) -> list[Message]:
    """Returns messages as templates get them: without fields that are None, reasoning under each of its names.

    Args:
      messages: a list of mappings, dataclasses or pydantic models, each with a role.

    Raises:
      ValueError: if they are not, or there is none.
    """
    example = '[{"role": "user", "content": "..."}]'
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(f"messages is {kind_of(messages)}, must be a list such as {example}")
    if not messages:
        raise ValueError(f"messages is empty; give at least one: {example}")
    checked = []
    for index, message in enumerate(plain(list(messages))):
        if not isinstance(message, dict):
            raise ValueError(f"messages[{index}] is {message!r}, must be a mapping: {example} is a list of one")
        said = {name: value for name, value in message.items() if value is not None}
        if not isinstance(said.get("role"), str):
            raise ValueError(
                f"messages[{index}] has no role but {', '.join(said) or 'nothing'}; give one as in {example}"
            )
        reasoning = next((said[name] for name in _REASONING if name in said), None)
        if reasoning is not None:
            said = {"thinking": reasoning, **said, "reasoning_content": reasoning}
        checked.append(said)
    return checked


def render(run: Callable[[list[Message]], str], messages: list[Message]) -> str:
    """Returns the text that a template makes of messages, in the first of their forms that it takes whole.

    Templates differ in what they read: a content that is a text or a list of parts, arguments of tool calls that are an
    object or JSON text. If one refuses what was given, leaves a user's content out or shows a list as Python writes it,
    the other forms are tried; if all fail, what was given counts.

    Args:
      run: the template, as a function of messages; raises Refusal if it refuses them.
      messages: checked ones.
    """
    first: str | Refusal | None = None
    for form in _forms(messages):
        try:
            found: str | Refusal = run(form)
        except Refusal as error:
            found = error
        if isinstance(found, str) and _tells_all(form, found):
            return found
        if first is None or (isinstance(first, Refusal) and isinstance(found, str)):
            first = found
    if isinstance(first, str):
        return first
    raise first  # type: ignore[misc]


def _tells_all(messages: list[Message], text: str) -> bool:
    for message in messages:
        content = message.get("content")
        if isinstance(content, list) and content and repr(content) in text:
            return False
        if message["role"] == "user" and any(part.strip() not in text for part in _texts(content)):
            return False
    return True


def _texts(content: Any) -> list[str]:
    if isinstance(content, str):
        return [content]
    parts = content if isinstance(content, list) else []
    return [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]


def _forms(messages: list[Message]) -> Iterator[list[Message]]:
    """Yields the messages as they are, then in other forms that say the same; arguments of calls as objects first."""
    seen: list[Any] = []
    for content in (lambda value: value, _as_words, _as_parts):
        for arguments in (_as_object, lambda value: value, _as_text):
            form = [_in_form(message, content, arguments) for message in messages]
            if form not in seen:
                seen.append(form)
                yield form


def _in_form(message: Message, content: Callable[[Any], Any], arguments: Callable[[Any], Any]) -> Message:
    changed = dict(message)
    if "content" in message:
        changed["content"] = content(message["content"])
    if isinstance(calls := message.get("tool_calls"), list):
        changed["tool_calls"] = [_call(call, arguments) for call in calls]
    return changed


def _call(call: Any, arguments: Callable[[Any], Any]) -> Any:
    if not isinstance(call, dict):
        return call
    changed = dict(call)
    if "arguments" in call:
        changed["arguments"] = arguments(call["arguments"])
    if "function" in call:
        changed["function"] = _call(call["function"], arguments)
    return changed


def _as_object(arguments: Any) -> Any:
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def _as_text(arguments: Any) -> Any:
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments


def _as_words(content: Any) -> Any:
    texts = _texts(content)
    return "".join(texts) if isinstance(content, list) and len(texts) == len(content) else content


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def continued(messages: list[Message], field: str, template: str) -> tuple[list[Message], str]:
    """Returns the messages with a mark behind the text that is to be continued, and that text.

    Args:
      messages: checked ones.
      field: a field of the last one.
      template: what will render them.

    Raises:
      ValueError: if the last message has no such text, or the template doesn't read the field.
    """
    last = dict(messages[-1])
    value = last.get(field)
    names = [name for name in _REASONING if last.get(name) == value] if field in _REASONING else [field]
    if value is None:
        raise ValueError(
            f"continue_final_message: the last message has no {field!r} to continue, only {', '.join(last)}"
        )
    if not any(name in template for name in names):
        raise ValueError(f"continue_final_message: the template never reads {field!r}")
    if isinstance(value, str):
        last.update(dict.fromkeys(names, value + _MARK))
        return [*messages[:-1], last], value
    parts = list(value) if isinstance(value, list) else []
    index = next((i for i in reversed(range(len(parts))) if _texts([parts[i]])), None)
    if index is None:
        raise ValueError(f"continue_final_message: the last message's {field!r} has no text to continue")
    text = parts[index]["text"]
    parts[index] = {**parts[index], "text": text + _MARK}
    last[field] = parts
    return [*messages[:-1], last], text


def cut(rendered: str, said: str, where: str) -> str:
    """Returns a text up to the mark that `continued` set, and without the space before it if the template trims.

    Args:
      rendered: the text.
      said: what is to be continued.
      where: what the template is called in errors.

    Raises:
      ValueError: if it isn't there as a whole.
    """
    before, found, after = rendered.rpartition(_MARK.strip())
    if not found or said.strip() not in rendered:
        raise ValueError(f"continue_final_message: {where} leaves out a part of the last message; give it without that")
    return before if after.startswith(" ") else before.rstrip()
