"""How a model's makers want it to be sampled: `generation_config.json`."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxkv.generate.sampling import Chain
from jaxkv.generate.sampling import sampler as make_sampler
from jaxkv.logs import log
from jaxkv.models.families.fields import FLAG, POSITIVE, Field, Fields, Kind, List, Names, Number, OrNull, Pair, Text
from jaxkv.models.files import read_json

_DRAWING = ("temperature", "top_k", "top_p", "min_p")
_RULES = (
    "repetition_penalty",
    "no_repeat_ngram_size",
    "logit_bias",
    "bad_words_ids",
    "forced_tokens",
    "suppress_tokens",
    "begin_suppress_tokens",
    "min_length",
    "min_new_tokens",
)
_OPTIONS = tuple(inspect.signature(make_sampler).parameters)


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Defaults for generation; None where the checkpoint says nothing, or what changes nothing.

    Attributes:
      stop_tokens: a text ends after one of these.
      stop_strings: a text ends where one of these occurs.
      max_new_tokens: most tokens of a text.
      max_length: the same, with the prompt counted.
      greedy: whether the most likely token is taken each time; else one is drawn.
      temperature, top_k, top_p, min_p: how it is drawn, see `jaxkv.sampling`.
      repetition_penalty, no_repeat_ngram_size, logit_bias, bad_words_ids, forced_tokens, suppress_tokens,
        begin_suppress_tokens, min_length, min_new_tokens: what changes logits before, see `jaxkv.sampling.sampler`.
      start_tokens: how the text of an encoder-decoder begins (Whisper: language and task); None stands for a token that
        is up to the user.
      language_tokens, task_tokens: what stands for each language and task in how it begins, (name, token) each.
      untimed_token: ends how it begins, where no timestamps are wanted.
      ignored: settings of the file that jaxkv ignores, such as "num_beams 4".

    >>> config = GenerationConfig(stop_tokens=(2,), greedy=False, temperature=0.6, top_p=0.9)
    >>> config.sampler()
    Chain(parts=(Temperature(t=0.6), TopP(p=0.9)))
    >>> config.sampler(temperature=1, top_p=None, frequency_penalty=0.5)
    Chain(parts=(FrequencyPenalty(f=0.5), Temperature(t=1.0)))
    """

    stop_tokens: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    max_length: int | None = None
    greedy: bool = True
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    logit_bias: tuple[tuple[tuple[int, ...], float], ...] | None = None
    bad_words_ids: tuple[tuple[int, ...], ...] | None = None
    forced_tokens: tuple[tuple[int, tuple[int, ...]], ...] | None = None
    suppress_tokens: tuple[int, ...] | None = None
    begin_suppress_tokens: tuple[int, ...] | None = None
    min_length: int | None = None
    min_new_tokens: int | None = None
    start_tokens: tuple[int | None, ...] = ()
    language_tokens: tuple[tuple[str, int], ...] = ()
    task_tokens: tuple[tuple[str, int], ...] = ()
    untimed_token: int | None = None
    ignored: tuple[str, ...] = ()

    @property
    def sampling(self) -> dict[str, Any]:
        """The arguments for `jaxkv.sampling.sampler`, as far as there are any."""
        names = _RULES if self.greedy else (*_DRAWING, *_RULES)
        told = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.greedy:
            told["temperature"] = 0
        if self.stop_tokens and told.keys() & {"bad_words_ids", "min_length", "min_new_tokens"}:
            told["stop_tokens"] = self.stop_tokens
        return told

    def sampler(self, **given: Any) -> Chain:
        """Returns the checkpoint's sampler; arguments replace its settings.

        Args:
          **given: arguments of `jaxkv.sampling.sampler`; None leaves out what they say. One of temperature, top_k,
            top_p and min_p lets a model draw that would be greedy.

        Raises:
          ValueError: for a number out of range.
          TypeError: for a name that is not one of its arguments.
        """
        if unknown := [name for name in given if name not in _OPTIONS]:
            raise TypeError(f"no option is called {', '.join(unknown)}; those for sampling are {', '.join(_OPTIONS)}")
        draws = any(given.get(name) is not None for name in _DRAWING)
        told = dataclasses.replace(self, greedy=self.greedy and not draws).sampling
        if given.keys() & {"bad_words_ids", "min_length", "min_new_tokens"}:
            told["stop_tokens"] = self.stop_tokens
        return make_sampler(**told | given)

    @property
    def languages(self) -> tuple[str, ...]:
        """The names that `beginning` knows of languages."""
        return tuple(name for name, _ in self.language_tokens)

    def beginning(self, language: str | None = None, task: str | None = None) -> tuple[int | None, ...]:
        """Returns how the text of an encoder-decoder begins: `start_tokens`, with this language and task.

        A language without a task is transcribed, as in transformers.

        Raises:
          ValueError: for a name that the checkpoint doesn't have.

        >>> tokens = {"language_tokens": (("de", 7), ("en", 8)), "task_tokens": (("transcribe", 3), ("translate", 4))}
        >>> GenerationConfig(start_tokens=(1, None, 3, 9), untimed_token=9, **tokens).beginning("de", "translate")
        (1, 7, 4, 9)
        """
        if language is None and task is None:
            return self.start_tokens
        said = dict(enumerate(token for token in self.start_tokens if token != self.untimed_token))
        tongue = _named("language", language, self.language_tokens, said.get(1))
        if task is None and said.get(2) is None and "transcribe" in dict(self.task_tokens):
            task = "transcribe"
        tokens = (*self.start_tokens[:1], tongue, _named("task", task, self.task_tokens, said.get(2)))
        return tokens if self.untimed_token is None else (*tokens, self.untimed_token)

    def within(self, vocab_size: int) -> GenerationConfig:
        """Returns it without the stop tokens and suppressed tokens that a vocabulary does not have: they never come."""

        def known(tokens: tuple[int, ...] | None) -> tuple[int, ...]:
            return tuple(token for token in tokens or () if token < vocab_size)

        return dataclasses.replace(
            self,
            stop_tokens=known(self.stop_tokens),
            suppress_tokens=known(self.suppress_tokens) or None,
            begin_suppress_tokens=known(self.begin_suppress_tokens) or None,
        )

    @classmethod
    def read(cls, directory: str | os.PathLike[str]) -> GenerationConfig:
        """Returns the settings of a checkpoint directory.

        Greedy unless generation_config.json has `"do_sample": true`, as in transformers. (Which draws from the 50 most
        likely tokens where the file has no `top_k`; here no number is limit.) What is not obeyed is in `ignored`, and
        the logger `jaxkv` warns of it in one line.

        Args:
          directory: with generation_config.json; what that lacks of stop tokens is taken from config.json.

        Raises:
          ValueError: for a file that is not a JSON object, or a field of the wrong kind or out of range.
        """
        path = Path(directory) / "generation_config.json"
        given, config = (read_json(file, needed=False) for file in (path, path.with_name("config.json")))
        told = _told(path, given, _FIELDS)
        for source in (config, config.get("text_config") or {}):
            if told["eos_token_id"] is None and isinstance(source, Mapping):
                told |= _told(path.with_name("config.json"), source, {"eos_token_id": _FIELDS["eos_token_id"]})
        forced: dict[int, tuple[int, ...]] = {}
        if told["forced_bos_token_id"]:
            forced[1] = told["forced_bos_token_id"]
        if told["forced_eos_token_id"]:
            forced[-1] = told["forced_eos_token_id"]
        ignored = tuple(
            f"{name} {json.dumps(value)[:40]}"
            for name, value in given.items()
            if value is not None and name not in _FIELDS and name not in _NO_MATTER and value != _NEUTRAL.get(name)
        )
        if ignored:
            log.warning("%s: not obeyed: %s", path, ", ".join(ignored))
        return cls(
            stop_tokens=told["eos_token_id"] or (),
            stop_strings=told["stop_strings"] or (),
            greedy=not told["do_sample"],
            logit_bias=told["sequence_bias"],
            forced_tokens=tuple(forced.items()) or None,
            start_tokens=_start_tokens(told),
            # "<|de|>" is called "de"
            language_tokens=tuple((name.strip("<|>"), token) for name, token in (told["lang_to_id"] or {}).items()),
            task_tokens=tuple((told["task_to_id"] or {}).items()),
            untimed_token=(told["no_timestamps_token_id"] or (None,))[0],
            ignored=ignored,
            **{field.name: told[field.name] for field in dataclasses.fields(cls) if field.name in _SAME},
        )


def _named(what: str, name: str | None, known: tuple[tuple[str, int], ...], default: int | None) -> int | None:
    """Returns the token of a language or task."""
    if name is None:
        return default
    if name not in dict(known):
        possible = f"it has {', '.join(name for name, _ in known)}" if known else "it names none: leave it out"
        raise ValueError(f"{what} is {name!r}, which is not in this checkpoint's generation_config.json; {possible}")
    return dict(known)[name]


def _start_tokens(told: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Returns how the text of an encoder-decoder begins: as transformers begins Whisper's."""
    if not told["decoder_start_token_id"]:
        return ()
    tokens: list[int | None] = [told["decoder_start_token_id"][0]]
    for at, token in told["forced_decoder_ids"] or ():
        if at != len(tokens):
            break
        tokens.append(token)
    if (untimed := told["no_timestamps_token_id"]) and untimed[0] not in tokens and len(tokens) > 1:
        tokens.append(untimed[0])
    return tuple(tokens)


def _told(path: Path, given: Mapping[str, Any], declared: Mapping[str, Field]) -> dict[str, Any]:
    """Returns the fields as GenerationConfig has them, None for what is not there or changes nothing."""
    told = dict(Fields(given, declared, where=str(path), what="settings for generation"))
    for name, value in told.items():
        if declared[name].kind is _TOKENS and value is not None:
            # A negative one is the token that no tokenizer has: some files give it for "none".
            told[name] = value = tuple(token for token in value if token >= 0)
        elif name == "top_p" and value is not None:
            told[name] = value = max(value, 1e-6)  # 0: the most likely token
        elif name == "temperature" and value is not None and value < 1e-6:
            told[name] = 0
        if value == _NEUTRAL.get(name, ()):
            told[name] = None
    return told


_MOST = 2**31 - 1  # tokens and counts of them are int32
_LISTED = 2**20  # at most so many values in a list
_COUNT = Number(0, _MOST, whole=True)
_TOKEN = Number(0, _MOST, whole=True, what="a token number")
_TOKENS = List(Number(-_MOST, _MOST, whole=True, what="a token number"), _LISTED, one=True)
_WORD = List(_TOKEN, _LISTED, least=1)
_LENGTH = Number(1, _MOST, whole=True)
_SHARE = Number(0, 1)
# What is obeyed.
_KINDS: dict[str, Kind] = {
    "eos_token_id": _TOKENS,
    "stop_strings": List(Text(), _LISTED, one=True),
    "max_new_tokens": _LENGTH,
    "max_length": _LENGTH,
    "min_new_tokens": _COUNT,
    "min_length": _COUNT,
    "do_sample": FLAG,
    "temperature": Number(0, 1e30),
    "top_k": _COUNT,
    "top_p": _SHARE,
    "min_p": _SHARE,
    "repetition_penalty": POSITIVE,
    "no_repeat_ngram_size": _COUNT,
    "sequence_bias": List(Pair((_WORD, Number(-1e30, 1e30))), _LISTED),
    "bad_words_ids": List(_WORD, _LISTED),
    "suppress_tokens": _TOKENS,
    "begin_suppress_tokens": _TOKENS,
    "forced_bos_token_id": _TOKENS,
    "forced_eos_token_id": _TOKENS,
    "forced_decoder_ids": List(Pair((_TOKEN, OrNull(_TOKEN))), _LISTED),
    "decoder_start_token_id": _TOKENS,
    "no_timestamps_token_id": _TOKENS,
    "lang_to_id": Names(_TOKEN, _LISTED),
    "task_to_id": Names(_TOKEN, _LISTED),
}
_FIELDS = {name: Field(kind, None) for name, kind in _KINDS.items()}
_SAME = _FIELDS.keys() - {"eos_token_id", "stop_strings"}  # those of one name in the file and in GenerationConfig
# Values that change nothing, of what is obeyed and of what is not.
_NEUTRAL: dict[str, Any] = {
    "min_new_tokens": 0,
    "min_length": 0,
    "temperature": 1,
    "top_k": 0,
    "top_p": 1,
    "min_p": 0,
    "repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "diversity_penalty": 0,
    "typical_p": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "encoder_repetition_penalty": 1,
    "encoder_no_repeat_ngram_size": 0,
    "guidance_scale": 1,
    "penalty_alpha": 0,
    "renormalize_logits": False,
    "remove_invalid_values": False,
    "token_healing": False,
    "return_timestamps": False,
}
# Fields that are about other things than which tokens come, or about beams only.
_NO_MATTER = {
    "pad_token_id",
    "bos_token_id",
    "transformers_version",
    "_from_model_config",
    "_name_or_path",
    "use_cache",
    "cache_implementation",
    "cache_config",
    "early_stopping",
    "length_penalty",
    "low_memory",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
    "return_dict_in_generate",
    "is_assistant",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "prompt_lookup_num_tokens",
    "max_matching_ngram_size",
    "assistant_early_exit",
    "assistant_lookbehind",
    "target_lookbehind",
    "assistant_ensemble_weight",
    "speculation_type",
    "compile_config",
    "disable_compile",
    "continuous_batching_config",
    "prefill_chunk_size",
    "use_mtp",
    "alignment_heads",
    "is_multilingual",
    "max_initial_timestamp_index",
    "prev_sot_token_id",
}
