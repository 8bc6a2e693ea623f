"""The tokens that the files beside tokenizer.json name: which there are, what they are called, how they are matched.

Their order, numbers and flags are those of Hugging Face transformers 5.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxkv.models.files import read_json

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_HALF = re.compile("[\ud800-\udfff]")  # of a character: JSON can have it, UTF-8 can't
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclasses.dataclass(frozen=True)
class Special:
    """What a checkpoint says of its tokens, beside tokenizer.json.

    Attributes:
      added: tokens by their numbers, each the arguments of a `tokenizers.AddedToken`.
      named: tokens by name, such as {"bos_token": {"content": "<s>"}}.
      extra: special tokens without a name.
      source: the file that gives the numbers.
    """

    added: Mapping[int, dict[str, Any]]
    named: Mapping[str, dict[str, Any]]
    extra: tuple[dict[str, Any], ...]
    source: Path

    @property
    def texts(self) -> dict[str, str]:
        """The texts of named tokens."""
        return {name: token["content"] for name, token in self.named.items()}


def read(directory: Path, config: Mapping[str, Any], defaults: Mapping[str, str]) -> Special:
    """Returns what a checkpoint says of its tokens.

    Args:
      directory: of the checkpoint.
      config: the content of its tokenizer_config.json.
      defaults: the texts of tokens that have a name even if no file gives one.

    Raises:
      ValueError: for values of the wrong kind.
    """
    path = directory / "tokenizer_config.json"
    given: dict[str, Any] = {name: value for name, value in defaults.items() if name not in config} | dict(config)
    where = dict.fromkeys(given, path)
    source, numbered = path, given.get("added_tokens_decoder")
    if numbered is None:  # checkpoints of old keep their tokens in files of their own
        path = directory / "special_tokens_map.json"
        for name, value in read_json(path, needed=False).items():
            if name == "additional_special_tokens" and given.get(name) is not None:
                continue
            before = given.get(name) if name == "extra_special_tokens" else None
            given[name] = [*before, *value] if isinstance(before, list) and isinstance(value, list) else value
            where[name] = path
        source = directory / "added_tokens.json"
        numbered = {}
    elif not isinstance(numbered, dict):
        raise ValueError(f"{path}: added_tokens_decoder is {_shown(numbered)}, must be an object {{number: token}}")

    added = {_number(number, path): _token(token, path, number) for number, token in numbered.items()}
    extra: list[dict[str, Any]] = []
    named: dict[str, dict[str, Any]] = {}
    for name in (*_NAMED, *(name for name in given if name.endswith("_token") and name not in _NAMED)):
        value = given.get(name)
        # Other fields end so as well: add_bos_token is true or false.
        if value is not None and (name in _NAMED or isinstance(value, str | dict)):
            named[name] = _token(value, where[name], name)
    for name in ("extra_special_tokens", "additional_special_tokens"):
        group = given.get(name)
        if isinstance(group, dict):
            named |= {key: _token(value, where[name], f"{name}[{key!r}]") for key, value in group.items()}
        elif isinstance(group, list) and not extra:  # the newer name counts
            extra = [_token(value, where[name], f"{name}[{index}]") for index, value in enumerate(group)]
        elif not isinstance(group, list | None):
            raise ValueError(f"{where[name]}: {name} is {_shown(group)}, must be a list of tokens or an object of them")

    if source.name == "added_tokens.json":
        # Only these are special then, and only if they come as texts, or from special_tokens_map.json.
        marked = {
            named[name]["content"]
            for name in _NAMED
            if name in named and (isinstance(given[name], str) or where[name] != directory / "tokenizer_config.json")
        }
        group = given.get("extra_special_tokens") or config.get("additional_special_tokens")
        marked.update(text for text in group or () if isinstance(text, str))
        for text, number in read_json(source, needed=False).items():
            special = text in marked
            token = {"content": text, "special": special, "normalized": not special}
            added[_number(number, source, text)] = _token(token, source, number)
    by_text = {token["content"]: token for token in added.values()}
    named = {name: by_text.get(token["content"], token) if name in _NAMED else token for name, token in named.items()}
    return Special(added, named, tuple(extra), source)


def add(tokenizer: Any, special: Special, kind: Any, *, resets: bool = False) -> None:
    """Adds tokens to a `tokenizers.Tokenizer`, in place.

    Args:
      tokenizer: as tokenizer.json has it.
      special: what the other files say.
      kind: `tokenizers.AddedToken`.
      resets: whether tokens that have a name or are extra lose their flags, as in transformers' Qwen2Tokenizer.

    Raises:
      ValueError: if a token can't get the number that its file gives it.
    """
    known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    new: dict[str, Any] = {}
    for _, token in sorted(special.added.items()):
        made = kind(**token)
        if repr(known.get(made.content)) != repr(made):
            new[made.content] = made
    numbered = set(new)
    for token in (*special.named.values(), *special.extra):
        if token["content"] not in known and token["content"] not in numbered:
            new[token["content"]] = kind(**{"special": True, **token})  # of two with the same text the last one counts
    for text in special.texts.values():
        if text in new:
            new[text].special = True
        elif not known[text].special:  # a named token is special, whatever tokenizer.json says of it
            sides = {flag: getattr(known[text], flag) for flag in ("single_word", "lstrip", "rstrip")}
            new[text] = kind(text, special=True, normalized=False, **sides)
    if resets:
        new |= {
            text: kind(text, special=True) for text in (*special.texts.values(), *(t["content"] for t in special.extra))
        }
    tokenizer.add_tokens(list(new.values()))
    for number, token in special.added.items():
        got = tokenizer.token_to_id(token["content"])
        if got != number and token["content"]:
            raise ValueError(
                f"{special.source}: {token['content']!r} is token {number}, but it becomes {got}: the numbers "
                f"of added tokens continue from the {tokenizer.get_vocab_size(with_added_tokens=False)} of "
                "tokenizer.json; save it again with transformers: tokenizer.save_pretrained(DIR)"
            )


def _token(value: Any, path: Path, name: Any) -> dict[str, Any]:
    given = value if isinstance(value, dict) else {"content": value}
    content = given.get("content")
    if not isinstance(content, str) or _HALF.search(content):
        raise ValueError(f"{path}: {name} is {_shown(value)}, must be a text or an object with a content")
    flags = {flag: given[flag] for flag in _FLAGS if given.get(flag) is not None}
    for flag, on in flags.items():
        if not isinstance(on, bool):
            raise ValueError(f"{path}: {flag} of {name} is {_shown(on)}, must be true or false")
    return {"content": content, **flags}


def _number(value: Any, path: Path, name: Any = None) -> int:
    text = str(value)
    if isinstance(value, bool) or not text.isdecimal() or not text.isascii() or len(text) > 9:
        raise ValueError(f"{path}: {_shown(value)}{f' of {name!r}' if name else ''} is not a token number")
    return int(text)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]}... ({type(value).__name__})"
