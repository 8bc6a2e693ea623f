"""What the ways to make texts with a Model have in common: their arguments, and what these mean for this model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxkv.generate.checks import check_max_new_tokens, stop_sequences
from jaxkv.models.completion import Completion
from jaxkv.models.encoder_decoder import EncoderDecoderConfig
from jaxkv.models.prompts import is_messages, is_one, tokens_of

_MAX_NEW_TOKENS = 256  # where neither the caller nor the checkpoint says
_MIN_CAPACITY = 1024  # a power of two, so that most calls share their compiled programs; and so that some turns fit


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """Arguments of `Model.generate`, `beam_search` and `best_of`, as they are given: see there.

    Attributes:
      numbers: those of the sampler, all that have no name here.
    """

    prompts: Any
    max_new_tokens: Any = None
    cache: Any = None
    sampler: Any = None
    stop_tokens: Any = None
    chat: Any = dataclasses.field(default_factory=dict)
    features: Any = None
    feature_lengths: Any = None
    language: Any = None
    task: Any = None
    numbers: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, prompts: Any, options: Mapping[str, Any], numbers: Mapping[str, Any]) -> Asked:
        """Returns what is asked for.

        Args:
          prompts: as they are given.
          options: the arguments by name.
          numbers: of the sampler, where the options don't say it.
        """
        named = {field.name for field in dataclasses.fields(cls)} - {"prompts", "numbers"}
        own = {name: value for name, value in options.items() if name in named}
        rest = {name: value for name, value in options.items() if name not in named}
        return cls(prompts, **own, numbers=dict(numbers if own.get("sampler") is None else {}) | rest)


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of a model, in tokens.

    Attributes:
      given: the prompts as they were given, one per row.
      rows: their tokens, None for a row that stays idle.
      one: whether one prompt was given, rather than a list.
      limits: int [B], the most new tokens of each.
      sampler: the checkpoint's, or what takes its place.
      stop_tokens: what ends a text.
      tokenizer: None: tokens in, tokens out.
    """

    given: Sequence[Any]
    rows: Sequence[Any]
    one: bool
    limits: np.ndarray
    sampler: Any
    stop_tokens: Any
    tokenizer: Any

    @property
    def single_stops(self) -> tuple[int, ...]:
        """The stop tokens that end a text by themselves."""
        return tuple(int(stop[0]) for stop in stop_sequences(self.stop_tokens) if stop.size == 1)

    @property
    def prompts(self) -> list[Any]:
        """The tokens of each prompt, none for an idle row."""
        return [() if row is None else row for row in self.rows]

    @property
    def joined(self) -> list[bool]:
        """Whether each text goes on from where its prompt ends; an answer to messages stands for itself."""
        return [isinstance(prompt, str) or row is prompt for prompt, row in zip(self.given, self.rows, strict=True)]

    def run(self, loop: Any, model: Any, cache: Any, **more: Any) -> Any:
        """Returns what a loop of `jaxkv.generate` makes of it."""
        return loop(
            model.forward,
            model.params,
            self.rows,
            cache,
            max_new_tokens=self.limits.tolist(),
            sampler=self.sampler,
            stop_tokens=self.stop_tokens,
            **more,
        )

    def capacity(self, context: int | None) -> int:
        """Returns how many tokens a row of a cache for these prompts is to hold, of a model made for `context`."""
        sizes = [len(prompt) for prompt in self.prompts]
        needed = max(int(limit) + size for size, limit in zip(sizes, self.limits, strict=True))
        capacity = max(_MIN_CAPACITY, 1 << (needed - 1).bit_length())
        return capacity if context is None else min(capacity, context)


def understand(model: Any, asked: Asked) -> Request:
    """Returns what is asked of a Model."""
    _check_hearing(model, asked)
    prompts = asked.prompts
    if prompts is None:
        prompts = _beginnings(model, asked)
    elif asked.language is not None or asked.task is not None:
        raise ValueError(
            "prompts are given, and language= or task=, which say how a text begins; give one or the other"
        )
    one = is_one(prompts)
    given = [prompts] if one else list(prompts)
    _check_chat(asked.chat, given)
    rows = [tokens_of(prompt, lambda: model.tokenizer, asked.chat) for prompt in given]
    limits = _limits(model, asked.max_new_tokens, rows)
    tokenizer = _tokenizer(model)
    stops = _stop_tokens(model, tokenizer) if asked.stop_tokens is None else asked.stop_tokens
    request = Request(given, rows, one, limits, asked.sampler, stops, tokenizer)
    if asked.sampler is not None:
        if asked.numbers:
            raise ValueError(f"sampler and {', '.join(asked.numbers)} are given; give one or the other")
        return request
    own = dataclasses.replace(model.generation, stop_tokens=request.single_stops)
    return dataclasses.replace(request, sampler=own.sampler(**asked.numbers))


def _check_hearing(model: Any, asked: Asked) -> None:
    hears = isinstance(model.config, EncoderDecoderConfig)
    if asked.features is not None and not hears:
        raise ValueError("features are given, and this model reads text only; leave them out")
    if hears and asked.features is None and asked.cache is None:
        raise ValueError(
            "this model transcribes audio: give features=, float [B, frames, num_mel_bins="
            f"{model.config.num_mel_bins}], log-mel frames of one recording per row, or a cache that was encoded into"
        )


def _beginnings(model: Any, asked: Asked) -> list[list[int]]:
    """Returns the prompts of an encoder-decoder that was given none."""
    tokens = list(model.generation.beginning(asked.language, asked.task))
    if not isinstance(model.config, EncoderDecoderConfig) or not tokens:
        raise ValueError("no prompts are given; give how each text begins")
    if None in tokens:
        known = ", ".join(model.generation.languages)
        cure = f"language=, one of {known}" if known else f"prompts={tokens}, with a token number in place of None"
        raise ValueError(f"no prompts are given, and the checkpoint leaves the language open; give {cure}")
    if asked.features is not None:
        return [tokens] * len(asked.features)
    cache = asked.cache
    return [tokens] * (len(cache.prompts) if isinstance(cache, Completion) else cache.num_rows)


def _check_chat(chat: Any, prompts: Sequence[Any]) -> None:
    if not isinstance(chat, Mapping):
        raise ValueError(f"chat is {chat!r}; give variables of the chat template, such as {{'enable_thinking': False}}")
    if chat and not any(map(is_messages, prompts)):
        raise ValueError(
            f"chat has {', '.join(chat)} for the chat template, which writes down messages: none are given"
        )


def _limits(model: Any, asked: Any, rows: Sequence[Any]) -> np.ndarray:
    """Returns the most new tokens of each row, int [B]."""
    sizes = np.array([0 if row is None else len(row) for row in rows])
    left = np.full_like(sizes, np.iinfo(np.int32).max) if model.context is None else model.context - sizes
    if (left < 1).any():
        raise ValueError(
            f"a prompt has {sizes.max()} tokens, and the model was made for texts of {model.context} in all; give a "
            "shorter one"
        )
    if asked is not None:
        limits = check_max_new_tokens(asked, len(rows))
        if (limits > left).any():
            row = int((limits - left).argmax())
            raise ValueError(
                f"a prompt of {sizes[row]} tokens and {limits[row]} new ones are more than the {model.context} that "
                f"the model was made for; give max_new_tokens={left[row]} or less"
            )
        return limits
    said = model.generation.max_new_tokens
    if said is None and model.generation.max_length is not None:
        said = np.maximum(model.generation.max_length - sizes, 1)
    return np.minimum(_MAX_NEW_TOKENS if said is None else said, left)


def _tokenizer(model: Any) -> Any:
    """Returns the model's tokenizer, None if there is none: tokens in, tokens out."""
    try:
        return model.tokenizer
    except (ImportError, FileNotFoundError):
        return None


def _stop_tokens(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Returns what ends a text, as the checkpoint and its tokenizer say."""
    own = () if tokenizer is None else tokenizer.stop_tokens
    stops = dict.fromkeys((*model.generation.stop_tokens, *own))
    return tuple(token for token in stops if token < model.config.vocab_size)  # one that can't come ends nothing
