"""Text to tokens and back, and conversations to text: a checkpoint's tokenizer.json and chat template."""

from __future__ import annotations

import functools
import json
import operator
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxkv.extras import need
from jaxkv.kinds import kind_of
from jaxkv.models import chat, pipelines, special
from jaxkv.models.files import MOST_LISTED, read_json, read_text
from jaxkv.models.template import TemplateLimit, render
from jaxkv.models.tools import schemas

_OTHER_FORMATS = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)
_LONGEST_TEMPLATE = 1 << 22  # bytes; the longest that are published have 2**15
_NUMBERS = 1 << 32  # that tokens can have in the library
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what decoders give for bytes that are no text, or not yet


class Tokenizer:
    """The tokenizer of a checkpoint directory, by the `tokenizers` library.

    Args:
      directory: holds tokenizer.json, and what else there is of tokenizer_config.json, chat_template.jinja and
        additional_chat_templates/.

    Attributes:
      directory: where it was read.
      template_limit: how much a chat template may take; `tokenizer.template_limit = TemplateLimit(seconds=60)` is more.
      special_tokens: the texts that chat templates know by name, {"bos_token": "<s>", ...}.
      templates: chat templates by name; the usual one is "default". Empty if there is none.

    Raises:
      ImportError: without the extra `jaxkv[models]`.
      FileNotFoundError: without a tokenizer.json.
      ValueError: for files that can't be read.

    >>> import os, tempfile, tokenizers
    >>> directory = tempfile.mkdtemp()
    >>> made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "one": 1, "two": 2}, unk_token="<unk>"))
    >>> made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    >>> made.save(os.path.join(directory, "tokenizer.json"))
    >>> tokenizer = Tokenizer(directory)
    >>> tokenizer.encode("two one")
    [2, 1]
    >>> tokenizer.decode([1, 2, -1])
    'one two'
    """

    template_limit = TemplateLimit()

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        tokenizers = need("tokenizers", "a tokenizer", "models")
        path = self.directory / "tokenizer.json"
        if not path.exists():
            raise FileNotFoundError(_missing(self.directory))
        text = read_text(path, most=MOST_LISTED)
        where = self.directory / "tokenizer_config.json"
        config = read_json(where, needed=False)
        self.templates = _templates(self.directory, config)
        kind = pipelines.kind_of(self.directory, config, lambda: '"ByteLevel"' in text)
        tokens = special.read(self.directory, config, pipelines.names_of(kind))
        self.special_tokens = tokens.texts
        self._library = f"{path}: tokenizers {tokenizers.__version__}"
        _check_merges(path, text)
        self._tokenizer = self._ask("read it", tokenizers.Tokenizer.from_str, text)
        # A file may ask for both; they are meant for training.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._ask("read it", pipelines.apply, self._tokenizer, kind, config, self.special_tokens, where)
        resets = kind == "Qwen2Tokenizer"
        self._ask("add tokens", special.add, self._tokenizer, tokens, tokenizers.AddedToken, resets=resets)
        self._added = self._tokenizer.get_added_tokens_decoder()
        _check_numbers(path, text, self._tokenizer)
        # Such decoders read bytes by the run: whether one is text is known when its run has ended.
        decoder = self._tokenizer.decoder
        self._byte_fallback = decoder is not None and self._ask("decode", decoder.decode, ["a", "<0x41>"]) == "aA"
        self._special = frozenset(token for token, added in self._added.items() if added.special)

    def _ask(self, doing: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Returns what the library answers; what it raises is of no kind, and where its Rust panics, no Exception."""
        try:
            return function(*args, **options)
        except (ValueError, MemoryError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            raise ValueError(f"{self._library} can't {doing}: {error}") from error

    def __repr__(self) -> str:
        return f"Tokenizer({os.fspath(self.directory)!r}, vocab_size={self.vocab_size})"

    @property
    def vocab_size(self) -> int:
        """How many tokens it knows, added ones included; the model's embedding may have more rows."""
        return self._tokenizer.get_vocab_size()

    @property
    def chat_template(self) -> str | None:
        """The chat template in use, None if there is none."""
        return self.templates.get("default")

    @functools.cached_property
    def stop_tokens(self) -> tuple[int, ...]:
        """The tokens that end a text or a turn, by the tokenizer's own files; empty if they name none.

        They are its eos_token and eot_token, and what the chat template writes after an assistant's last message. If it
        writes nothing there, it is what stands between that message and the next one.
        """
        texts = [self.special_tokens[name] for name in ("eos_token", "eot_token") if name in self.special_tokens]
        found = [*map(self._tokenizer.token_to_id, texts), self._end_of_turn()]
        return tuple(dict.fromkeys(token for token in found if token is not None))

    def _end_of_turn(self) -> int | None:
        if self.chat_template is None:
            return None
        texts = "the-question", "the-answer", "the-next-question"
        turns = zip(("user", "assistant", "user"), texts, strict=True)
        messages = [{"role": role, "content": text} for role, text in turns]
        # gpt-oss ends a part of a turn by one token, and the turn by another, which stands only behind the last.
        for said in (messages[:2], messages):
            try:
                text = self.render(said, add_generation_prompt=False)
                behind = self.encode(text.rpartition(texts[1])[2].partition(texts[2])[0], special=False)
            except ValueError:
                continue  # templates may refuse what they don't know: then they name no token
            known = [token for token in behind if token in self._added and not self._added[token].content.isspace()]
            if known:
                return min(known, key=lambda token: token not in self._special)  # the first special one, if any is
        return None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Returns the tokens of a text.

        Args:
          text: special tokens in it, such as "<|im_start|>", are read as such.
          special: whether the tokens that frame a text are added, such as the one that begins it. Which, says the
            post-processor of tokenizer.json alone, as in transformers 5; add_bos_token is of no account beside it.

        Raises:
          ValueError: for a value that is not a text, has no UTF-8 (half of a surrogate pair), or has no tokens.
        """
        if not isinstance(text, str):
            raise ValueError(f"text is {kind_of(text)}, must be a str; chat takes messages")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            cure = "text.encode(errors='replace').decode() replaces it"
            raise ValueError(f"text[{error.start}] is {text[error.start]!r}, half of a character; {cure}") from None
        return self._ask("encode this text", self._tokenizer.encode, text, add_special_tokens=special).ids

    def decode(self, tokens: Iterable[int], *, special: bool = False) -> str:
        """Returns the text of tokens.

        Args:
          tokens: ints or an integer array [T]. Negative ones, as EMPTY after a text's end, and those that the tokenizer
            doesn't know are left out.
          special: whether special tokens are shown.

        Raises:
          TypeError: if tokens are not integers.
        """
        known = [token for token in map(operator.index, tokens) if 0 <= token < _NUMBERS]
        return self._ask("decode these tokens", self._tokenizer.decode, known, skip_special_tokens=not special)

    def stream(self) -> TokenizerStream:
        """Returns a decoder for tokens as they come."""
        return TokenizerStream(self)

    def render(
        self,
        messages: Sequence[Any],
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        template: str | None = None,
        tools: Sequence[Any] | None = None,
        **variables: Any,
    ) -> str:
        """Returns a conversation as the text that the model was taught to read.

        Args:
          messages: such as [{"role": "user", "content": "Hello"}]. A content may be a text or a list of parts,
            [{"type": "text", "text": "Hello"}]; the arguments of tool calls an object or JSON text; reasoning stands
            under reasoning_content, thinking or reasoning: templates get what they read.
          add_generation_prompt: whether the answer's beginning follows, so that the model goes on with an answer; None
            is yes, unless the last message is continued.
          continue_final_message: whether the text ends within the last message, so that the model goes on with it:
            True for its content, or the name of another field of it.
          template: name of the template; None takes "tool_use" if tools are given and there is one, else "default".
          tools: functions with annotations and docstrings (see `jaxkv.models.tools.schema`), or JSON schemas.
          **variables: further ones that the template reads, such as `documents` or `enable_thinking`.

        Raises:
          ImportError: without the extra `jaxkv[models]`.
          ValueError: if there is no such template, it refuses the messages, never reads a variable that is given, or
            takes more time or memory than `template_limit`.
        """
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        elif add_generation_prompt and continue_final_message:
            raise ValueError(
                "add_generation_prompt begins a new answer and continue_final_message goes on with the last message; "
                "give one of them"
            )
        messages = chat.check(messages)
        if template is None:
            template = "tool_use" if tools is not None and "tool_use" in self.templates else "default"
        if template not in self.templates:
            names = ", ".join(map(repr, sorted(self.templates)))
            cure = (
                f"it has {names}: give template=" if names else "encode plain text, or put a chat_template.jinja there"
            )
            raise ValueError(f"{self.directory} has no chat template {template!r}; {cure}")
        if tools is not None:
            variables["tools"] = schemas(tools)
        where = f"the chat template {template!r} of {self.directory}"
        source = self.templates[template]
        said = ""
        if continue_final_message:
            field = continue_final_message if isinstance(continue_final_message, str) else "content"
            messages, said = chat.continued(messages, field, source)
        told = {
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self.special_tokens,
            **chat.plain(variables),
        }
        given = [name for name, value in variables.items() if value is not None and value != []]

        def run(form: list[dict[str, Any]]) -> str:
            return render(source, where, {**told, "messages": form}, given, self.template_limit)

        text = chat.render(run, messages)
        return chat.cut(text, said, where) if continue_final_message else text

    def chat(self, messages: Sequence[Any], **options: Any) -> list[int]:
        """Returns the tokens of a conversation; the template writes the special ones itself. Options: see `render`."""
        return self.encode(self.render(messages, **options), special=False)


class TokenizerStream:
    """Tokens into text as they come; together it is what `decode` gives for all of them.

    The library's own DecodeStream has no end, and fails where bytes that were text cease to be (`<0x41>` then `<0xFF>`
    is two replacement characters for it, one alone is "A").
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._owner = tokenizer
        self._name = tokenizer._tokenizer.id_to_token
        self._window: list[int] = []  # what was last given, as context, and what was not given yet
        self._given = 0  # characters of the window's text

    def take(self, tokens: Iterable[int]) -> str:
        """Returns the text that these tokens complete. A character waits for its last byte."""
        new = [token for token in map(operator.index, tokens) if 0 <= token < _NUMBERS]
        self._window += [token for token in new if token not in self._owner._special and self._name(token) is not None]
        if not self._window or (self._owner._byte_fallback and _BYTE.fullmatch(self._name(self._window[-1]))):
            return ""
        text = self._owner.decode(self._window)
        sure = text.removesuffix(_REPLACEMENT)
        found = sure[self._given :]
        if sure == text:
            # Decoders treat the first token of a text in their own way: the last one stays, to be the first.
            del self._window[:-1]
            self._given = len(self._owner.decode(self._window))
        else:
            self._given += len(found)
        return found

    def end(self) -> str:
        """Returns the rest: what stands for a character that was never finished."""
        rest = self._owner.decode(self._window)[self._given :]
        self._given += len(rest)
        return rest


def _missing(directory: Path) -> str:
    if not directory.is_dir():
        return f"{directory} is not a directory; give one that holds a checkpoint, with its tokenizer.json"
    others = [name for name in _OTHER_FORMATS if (directory / name).is_file()]
    if others:
        return (
            f"{directory} has no tokenizer.json, only {', '.join(others)}, which is another format; make it with "
            "transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    return (
        f"{directory} has no tokenizer.json; fetch it from where the checkpoint comes from, or save it there with "
        "transformers: tokenizer.save_pretrained(DIR)"
    )


def _check_merges(path: Path, text: str) -> None:
    """Raises ValueError for what makes tokenizers 0.23 cut a character in two, which ends this process."""
    if not re.search(r'"continuing_subword_prefix"\s*:\s*"(?!")', text) or '"merges"' not in text:
        return
    try:
        model = json.loads(text)["model"]
        prefix, merges = model["continuing_subword_prefix"], model["merges"]
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
        wrong = next((pair for pair in pairs if not pair[1].startswith(prefix)), None)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return  # the library says what is wrong
    if wrong is not None:
        raise ValueError(f"{path}: the merge {wrong!r} does not go on with continuing_subword_prefix, {prefix!r}")


def _check_numbers(path: Path, text: str, tokenizer: Any) -> None:
    """Raises ValueError if a token of tokenizer.json has not the number there: the library counts by itself."""
    begin = re.search(r'"added_tokens"\s*:\s*(?=\[)', text)
    for token in json.JSONDecoder().raw_decode(text, begin.end())[0] if begin else ():
        got = tokenizer.token_to_id(token["content"])
        if got != token["id"] and token["content"]:
            raise ValueError(
                f"{path}: added_tokens has {token['content']!r} as token {token['id']}, but it becomes {got}: the "
                "numbers of added tokens follow one another; save it anew with transformers: save_pretrained(DIR)"
            )


def _templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the chat templates by name: those in files, and where there are none those of the config."""
    places = {"default": directory / "chat_template.jinja"}
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        places[path.stem] = path
    found = {name: read_text(path, most=_LONGEST_TEMPLATE) for name, path in places.items() if path.exists()}
    given = config.get("chat_template")
    if found or given is None:
        return found
    named = {"default": given} if isinstance(given, str) else given
    if isinstance(given, list) and all(
        isinstance(entry, dict) and {"name", "template"} <= set(entry) for entry in given
    ):
        named = {entry["name"]: entry["template"] for entry in given}
    if not isinstance(named, dict) or not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise ValueError(
            f"{directory / 'tokenizer_config.json'}: chat_template is {kind_of(given)}, must be a text, or a "
            'list of {"name": ..., "template": ...} with texts'
        )
    return named
