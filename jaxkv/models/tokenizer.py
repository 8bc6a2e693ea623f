"""Text to tokens and back: a checkpoint's tokenizer.json and chat template, and plain bytes.

What is written here about chat templates follows Hugging Face transformers 5, so that the same messages give the same
tokens. https://huggingface.co/docs/transformers/chat_templating
"""

from __future__ import annotations

import codecs
import datetime
import functools
import json
import operator
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxkv.extras import need
from jaxkv.models.files import read_json

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_OTHER_FORMATS = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what decoders give for bytes that are no text, or not yet


class Tokenizer:
    """The tokenizer of a checkpoint directory, by the `tokenizers` library.

    Args:
      directory: holds tokenizer.json, and what else there is of tokenizer_config.json, chat_template.jinja and
        additional_chat_templates/.

    Attributes:
      directory: where it was read.
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

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        tokenizers = need("tokenizers", "a tokenizer", "models")
        path = self.directory / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(_missing(self.directory))
        text = path.read_text(encoding="utf-8")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises no kind of its own
            raise ValueError(f"{path} can't be read by tokenizers {tokenizers.__version__}: {error}") from error
        # A file may ask for both; they are meant for training.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = read_json(self.directory / "tokenizer_config.json", needed=False)
        self.special_tokens = _special_tokens(self.directory, config)
        self.templates = _templates(self.directory, config)
        self._mark_special(tokenizers.AddedToken)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(token for token, text in added.items() if text.special)
        decoder = self._tokenizer.decoder
        # Such decoders read bytes by the run: whether one is text is known when its run has ended.
        self._byte_fallback = decoder is not None and decoder.decode(["a", "<0x41>"]) == "aA"

    def _mark_special(self, kind: Any) -> None:
        """Makes special what the config names, even if tokenizer.json doesn't."""
        added = {token.content: token for token in self._tokenizer.get_added_tokens_decoder().values()}
        for text in self.special_tokens.values():
            token = added.get(text)
            if self._tokenizer.token_to_id(text) is None or (token is not None and token.special):
                continue
            # Added anew, a token forgets which spaces belong to it.
            sides = (
                {} if token is None else {name: getattr(token, name) for name in ("lstrip", "rstrip", "single_word")}
            )
            self._tokenizer.add_special_tokens([kind(text, normalized=False, special=True, **sides)])

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
        found = [self._tokenizer.token_to_id(self.special_tokens.get(name, "")) for name in ("eos_token", "eot_token")]
        return tuple(dict.fromkeys(token for token in [*found, self._end_of_turn()] if token is not None))

    def _end_of_turn(self) -> int | None:
        if self.chat_template is None:
            return None
        added = self._tokenizer.get_added_tokens_decoder()
        texts = "the-question", "the-answer", "the-next-question"
        for shape in (lambda text: text, lambda text: [{"type": "text", "text": text}]):
            turns = zip(("user", "assistant", "user"), texts, strict=True)
            messages = [{"role": role, "content": shape(text)} for role, text in turns]
            # gpt-oss ends a part of a turn by one token, and the turn by another, which stands only behind the last.
            for told in (messages[:2], messages):
                try:
                    text = self.render(told, add_generation_prompt=False)
                except ValueError:
                    continue  # templates may refuse what they don't know: then they name no token
                behind = self.encode(text.rpartition(texts[1])[2].partition(texts[2])[0], special=False)
                known = [token for token in behind if token in added and not added[token].content.isspace()]
                if known:
                    return min(known, key=lambda token: not added[token].special)  # the first special one, if any is
        return None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Returns the tokens of a text.

        Args:
          text: special tokens in it, such as "<|im_start|>", are read as such.
          special: whether the tokens that frame a text are added, such as the one that begins it. Which, says the
            post-processor of tokenizer.json alone, as in transformers 5; add_bos_token is of no account beside it.
        """
        return self._tokenizer.encode(text, add_special_tokens=special).ids

    def decode(self, tokens: Iterable[int], *, special: bool = False) -> str:
        """Returns the text of tokens.

        Args:
          tokens: ints or an integer array [T]. Negative ones, as EMPTY after a text's end, and those that the tokenizer
            doesn't know are left out.
          special: whether special tokens are shown.

        Raises:
          TypeError: if tokens are not integers.
        """
        return self._tokenizer.decode([t for t in _numbers(tokens) if t >= 0], skip_special_tokens=not special)

    def stream(self) -> TokenizerStream:
        """Returns a decoder for tokens as they come."""
        return TokenizerStream(self)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """Returns a conversation as the text that the model was taught to read.

        Args:
          messages: such as [{"role": "user", "content": "Hello"}].
          add_generation_prompt: whether the answer's beginning follows, so that the model goes on with an answer.
          template: name of the template; None takes "tool_use" if tools are given and there is one, else "default".
          **variables: further ones that the template reads, such as `tools` or `enable_thinking`.

        Raises:
          ImportError: without the extra `jaxkv[models]`.
          ValueError: if there is no such template, or it refuses the messages.
        """
        if not messages:
            raise ValueError('messages is empty; give at least one: [{"role": "user", "content": "..."}]')
        if template is None:
            template = "tool_use" if variables.get("tools") is not None and "tool_use" in self.templates else "default"
        if template not in self.templates:
            others = ", ".join(map(repr, sorted(self.templates)))
            cure = (
                f"it has {others}: give template="
                if others
                else "encode plain text, or put a chat_template.jinja there"
            )
            raise ValueError(f"{self.directory} has no chat template {template!r}; {cure}")
        jinja2 = need("jinja2", "a chat template", "models")
        where = f"the chat template {template!r} of {self.directory}"
        told = {"tools": None, "documents": None, **self.special_tokens, **variables}
        said = [{name: value for name, value in message.items() if value is not None} for message in messages]
        try:
            compiled = _environment().from_string(self.templates[template])
            return compiled.render(messages=said, add_generation_prompt=add_generation_prompt, **told)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"{where} can't be read: {error.message} (its line {error.lineno})") from error
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"{where} refuses these messages: {error}") from error

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """Returns the tokens of a conversation; the template writes the special ones itself. See `render`."""
        return self.encode(
            self.render(messages, add_generation_prompt=add_generation_prompt, **variables), special=False
        )


class TokenizerStream:
    """Tokens into text as they come; together it is what `decode` gives for all of them.

    The library's own DecodeStream has no end, and fails where bytes that were text cease to be (`<0x41>` then `<0xFF>`
    is two replacement characters for it, one alone is "A").
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._owner, self._tokenizer = tokenizer, tokenizer._tokenizer
        self._window: list[int] = []  # what was last given, as context, and what was not given yet
        self._given = 0  # characters of the window's text

    def take(self, tokens: Iterable[int]) -> str:
        """Returns the text that these tokens complete. A character waits for its last byte."""
        new = [token for token in _numbers(tokens) if token >= 0 and token not in self._owner._special]
        texts = [self._tokenizer.id_to_token(token) for token in new]
        self._window += [token for token, text in zip(new, texts, strict=True) if text is not None]
        if not self._window or (
            self._owner._byte_fallback and _BYTE.fullmatch(self._tokenizer.id_to_token(self._window[-1]))
        ):
            return ""
        text = self._tokenizer.decode(self._window)
        sure = text.removesuffix(_REPLACEMENT)
        found = sure[self._given :]
        if sure == text:
            # Decoders treat the first token of a text in their own way: the last one stays, to be the first.
            del self._window[:-1]
            self._given = len(self._tokenizer.decode(self._window))
        else:
            self._given += len(found)
        return found

    def end(self) -> str:
        """Returns the rest: what stands for a character that was never finished."""
        rest = self._tokenizer.decode(self._window)[self._given :]
        self._given += len(rest)
        return rest


class ByteTokenizer:
    """Bytes as tokens, for models that read UTF-8; it has the methods of `Tokenizer`.

    Args:
      special: tokens that stand for no text, such as a byte 0 between documents.

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.encode("é!")
    [195, 169, 33]
    >>> tokenizer.decode([195, 169, 33, 0, -1])
    'é!'
    """

    vocab_size = 256
    chat_template = None

    def __init__(self, special: Iterable[int] = (0,)) -> None:
        self._special = frozenset(special)

    def __repr__(self) -> str:
        return f"ByteTokenizer({sorted(self._special)})"

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The tokens that end a text: those that stand for none."""
        return tuple(sorted(self._special))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Returns the bytes of a text; `special` makes no difference: nothing frames it."""
        return list(text.encode())

    def decode(self, tokens: Iterable[int], *, special: bool = False) -> str:
        """Returns the text of tokens, with a replacement character for what is not UTF-8.

        Args:
          tokens: ints or an integer array [T]; anything outside [0, 256) is left out, as EMPTY after a text's end.
          special: whether special tokens are kept, as the characters that they are.

        Raises:
          TypeError: if tokens are not integers.
        """
        return self._bytes(tokens, special).decode(errors="replace")

    def stream(self) -> ByteStream:
        """Returns a decoder for tokens as they come."""
        return ByteStream(self)

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """Raises ValueError: there is no chat template."""
        raise ValueError("a model that reads bytes has no chat template; encode plain text")

    def chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """Raises ValueError: there is no chat template."""
        return self.encode(self.render(messages, **variables))

    def _bytes(self, tokens: Iterable[int], special: bool) -> bytes:
        kept = (token for token in _numbers(tokens) if 0 <= token < 256)
        return bytes(token for token in kept if special or token not in self._special)


class ByteStream:
    """Bytes into text as they come; together it is what `decode` gives for all of them."""

    def __init__(self, tokenizer: ByteTokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, tokens: Iterable[int]) -> str:
        """Returns the text that these tokens complete. A character waits for its last byte."""
        return self._decoder.decode(self._tokenizer._bytes(tokens, special=False))

    def end(self) -> str:
        """Returns the rest: what stands for a character that was never finished."""
        return self._decoder.decode(b"", final=True)


def _numbers(tokens: Iterable[Any]) -> list[int]:
    return list(map(operator.index, tokens))  # not int(): 1.5 is no token


def _missing(directory: Path) -> str:
    if not directory.is_dir():
        return f"{directory} is no directory; give one that holds a checkpoint, with its tokenizer.json"
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


def _special_tokens(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    given = dict(config)
    if "added_tokens_decoder" not in config:  # checkpoints of old keep them in a file of their own
        given |= read_json(directory / "special_tokens_map.json", needed=False)
    if isinstance(given.get("extra_special_tokens"), dict):
        given |= given["extra_special_tokens"]
    named = [*_NAMED, *(name for name in given if name.endswith("_token") and name not in _NAMED)]
    texts = {name: given.get(name) for name in named}
    texts = {name: text["content"] if isinstance(text, dict) else text for name, text in texts.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the chat templates by name: those in files, and where there are none those of the config."""
    places = {"default": directory / "chat_template.jinja"}
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        places[path.stem] = path
    found = {name: path.read_text(encoding="utf-8") for name, path in places.items() if path.is_file()}
    given = config.get("chat_template")
    if found or not given:
        return found
    if isinstance(given, str):
        return {"default": given}
    try:
        return dict(given) if isinstance(given, dict) else {entry["name"]: entry["template"] for entry in given}
    except (TypeError, KeyError) as error:
        where = directory / "tokenizer_config.json"
        raise ValueError(f"{where}: chat_template is neither a text nor a list of named ones") from error


@functools.cache
def _environment() -> Any:
    """Returns the sandbox that chat templates run in: they are code from elsewhere."""
    jinja2 = need("jinja2", "a chat template", "models")
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """{% generation %} marks what an assistant says, which matters in training only."""

        tags = {"generation"}  # noqa: RUF012  (as jinja2 has it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    class PublicNamespace(Namespace):
        """jinja2's `namespace`, closed to names by which templates reach into Python."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, *rest = args
            for name in (values := dict(*rest, **kwargs)):
                _check_public(name)
            Namespace.__init__(self, values)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_public(name)
            super().__setitem__(name, value)

    def _check_public(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a chat template may not set {name!r} on a namespace")

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        # jinja2's own escapes HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    environment.globals["namespace"] = PublicNamespace
    environment.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)
    return environment
