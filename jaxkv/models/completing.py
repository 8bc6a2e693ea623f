"""How a run of `Model.generate` begins: prompts to tokens, limits, a cache, and what the checkpoint wants."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxkv.cache.cache import Cache
from jaxkv.generate import stream
from jaxkv.generate.checks import check_alive, check_max_new_tokens, stop_sequences
from jaxkv.models.completion import Completion, TextStream
from jaxkv.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from jaxkv.models.prompts import is_messages, is_one, tokens_of

_MAX_NEW_TOKENS = 256  # where neither the caller nor the checkpoint says
_MIN_CAPACITY = 1024  # a power of two, so that most calls share their compiled programs; and so that some turns fit


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


def understand(
    model: Any,
    prompts: Any,
    *,
    max_new_tokens: Any,
    cache: Any,
    sampler: Any,
    stop_tokens: Any,
    chat: Mapping[str, Any],
    features: Any,
    numbers: Mapping[str, Any],
) -> Request:
    """Returns what is asked for. For the arguments see `Model.generate`; `numbers` are those of the sampler."""
    _check_hearing(model, cache, features)
    if prompts is None:
        prompts = _beginnings(model, cache, features)
    one = is_one(prompts)
    given = [prompts] if one else list(prompts)
    _check_chat(chat, given)
    rows = [tokens_of(prompt, lambda: model.tokenizer, chat) for prompt in given]
    limits = _limits(model, max_new_tokens, rows)
    tokenizer = _tokenizer(model)
    stops = _stop_tokens(model, tokenizer) if stop_tokens is None else stop_tokens
    request = Request(given, rows, one, limits, sampler, stops, tokenizer)
    if sampler is None:
        sampler = dataclasses.replace(model.generation, stop_tokens=request.single_stops).sampler(**numbers)
    elif numbers:
        raise ValueError(f"sampler and {', '.join(numbers)} are given; give one or the other")
    return dataclasses.replace(request, sampler=sampler)


def start(
    model: Any,
    prompts: Any,
    *,
    cache: Cache | Completion | None,
    stop_strings: Any,
    seed: Any,
    key: Any,
    features: Any,
    feature_lengths: Any,
    **asked: Any,
) -> TextStream:
    """Returns the texts to come. For the arguments see `Model.generate`, and `understand` for what is `asked`."""
    request = understand(model, prompts, cache=cache, features=features, **asked)
    strings = _stop_strings(model, request.tokenizer, stop_strings)
    held: Any = _cache(model, cache, request.given, request.rows, request.limits)
    if features is not None:
        held = hear(model.module, held, features, feature_lengths)
    steps = stream(
        model.forward,
        model.params,
        request.rows,
        held,
        max_new_tokens=request.limits.tolist(),
        sampler=request.sampler,
        stop_tokens=request.stop_tokens,
        key=key_of(seed) if key is None else key,
    )
    return TextStream(
        steps,
        request.prompts,
        one=request.one,
        tokenizer=request.tokenizer,
        joined=request.joined,
        stop_tokens=request.single_stops,
        stop_strings=strings,
    )


def _check_chat(chat: Any, prompts: Sequence[Any]) -> None:
    if not isinstance(chat, Mapping):
        raise ValueError(f"chat is {chat!r}; give variables of the chat template, such as {{'enable_thinking': False}}")
    if chat and not any(map(is_messages, prompts)):
        raise ValueError(
            f"chat has {', '.join(chat)} for the chat template, which writes down messages: none are given"
        )


def key_of(seed: Any) -> Any:
    """Returns the PRNG key of a seed."""
    if not isinstance(seed, int | np.integer) or not 0 <= seed < 1 << 32:  # JAX reads 32 bits
        raise ValueError(f"seed is {seed!r}; give a whole number from 0 to {(1 << 32) - 1}")
    return jax.random.key(seed)


def _check_hearing(model: Any, cache: Any, features: Any) -> None:
    hears = isinstance(model.config, EncoderDecoderConfig)
    if features is not None and not hears:
        raise ValueError("features are given, and this model reads text only; leave them out")
    if hears and features is None and cache is None:
        raise ValueError(
            "this model transcribes audio: give features=, float [B, frames, num_mel_bins="
            f"{model.config.num_mel_bins}], log-mel frames of one recording per row, or a cache that was encoded into"
        )


def _beginnings(model: Any, cache: Any, features: Any) -> list[list[int]]:
    """Returns the prompts of an encoder-decoder that was given none."""
    tokens = list(model.generation.start_tokens)
    if not isinstance(model.config, EncoderDecoderConfig) or not tokens or None in tokens:
        how = f": {tokens}, with a token number in place of None" if None in tokens else ""
        raise ValueError(f"no prompts are given; give how each text begins{how}")
    if features is not None:
        return [tokens] * len(features)
    return [tokens] * (len(cache.prompts) if isinstance(cache, Completion) else cache.num_rows)


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


def _stop_strings(model: Any, tokenizer: Any, given: Any) -> tuple[str, ...]:
    given = model.generation.stop_strings if given is None else given
    strings = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Iterable) else (None,)
    if not all(isinstance(text, str) and text for text in strings):
        raise ValueError(f"stop_strings is {given!r}; give a string or several, none of them empty")
    if strings and tokenizer is None:
        raise ValueError("stop_strings need a tokenizer, and this model came without one; give stop_tokens")
    return strings


def _cache(model: Any, given: Any, prompts: Sequence[Any], rows: Sequence[Any], limits: np.ndarray) -> Any:
    """Returns the cache to decode with, which holds what it can of the rows."""
    if given is None:
        return model.init_cache(len(rows), capacity_for(model, rows, limits))
    if isinstance(given, Completion):
        if given.cache is None:
            raise ValueError(
                f"cache is the result of a run that failed, and its cache is lost: leave it out ({given.error})"
            )
        if len(given.prompts) != len(rows):
            raise ValueError(f"{len(rows)} prompts for a cache of {len(given.prompts)} rows; give one per row")
        check_alive(jax.tree.leaves(given.cache))
        same = [_num_equal(held, row) for held, row in zip(given.history, rows, strict=True)]
        return _rewind(given.cache, jnp.asarray(np.array(same, np.int32)))
    check_alive(jax.tree.leaves(given))
    if isinstance(given, Cache) and any(
        row is not prompt and held
        for row, prompt, held in zip(rows, prompts, np.asarray(given.lengths).tolist(), strict=False)
    ):
        raise ValueError(
            "the cache already holds tokens, and they may belong to other texts; give the whole "
            "result of the earlier call, cache=result, or prompts of tokens"
        )
    return given


def capacity_for(model: Any, rows: Sequence[Any], limits: np.ndarray) -> int:
    """Returns how many tokens a row of a cache for these prompts is to hold."""
    needed = max(int(limit) + (0 if row is None else len(row)) for row, limit in zip(rows, limits, strict=True))
    capacity = max(_MIN_CAPACITY, 1 << (needed - 1).bit_length())
    return capacity if model.context is None else min(capacity, model.context)


def _num_equal(held: Sequence[int], row: Any) -> int:
    """Returns how many of the tokens that are held stay: those that the row begins with, but never all of the row."""
    if row is None:
        return len(held)
    # The last one is read again even if it is held: the first new token comes from it.
    new = np.asarray(row).tolist()[:-1]
    return next((i for i, (a, b) in enumerate(zip(held, new, strict=False)) if a != b), min(len(held), len(new)))


def _rewind(cache: Cache, lengths: Any) -> Cache:
    """Returns a cache with rows cut to these lengths; both share what is not changed, and none is donated.

    So the Completion that is gone on from is whole if something else does not fit.
    """
    leaves, form = jax.tree.flatten(cache)
    changed = _changed_by_rewind(cache, lengths)
    return jax.tree.unflatten(form, [old if new is None else new for new, old in zip(changed, leaves, strict=True)])


@jax.jit
def _changed_by_rewind(cache: Cache, lengths: Any) -> list[Any]:
    # A compiled program copies what it returns, keys and values too if it had to return them.
    leaves = zip(jax.tree.leaves(cache.rewind(lengths).retry(~cache.ok)), jax.tree.leaves(cache), strict=True)
    return [None if new is old else new for new, old in leaves]


hear = nnx.jit(EncoderDecoder.encode_into, donate_argnums=1)
