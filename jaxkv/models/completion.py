"""Texts from a model: what `Model.generate` returns, and `Model.stream` gives piece by piece."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxkv.cache.cache import Cache
from jaxkv.cache.spec import EMPTY
from jaxkv.generate import Stream


@dataclasses.dataclass(frozen=True, eq=False)
class Completion:
    """Generated texts, one entry per prompt, also for a single prompt.

    Attributes:
      texts: the generated texts, without the prompts, and without stop tokens and stop strings; None if the model has
        no tokenizer.
      tokens: int32 [B, N], EMPTY (-1) after a row's end. A stop token, and those of a stop string, are among them.
      lengths: int32 [B], how many tokens each row has.
      log_probs: float32 [B, N], of the tokens under the model's own distribution.
      reasons: why each row ended, see `jaxkv.Generation`.
      prompts: the tokens of each prompt; none for an idle row.
      cache: holds prompts and tokens but for the last token of each row. Give this whole object as `cache=` to go on.
      error: what happened, if the compiled loop failed; else None.
      drafted, accepted, steps: of speculation, see `jaxkv.Speculation`; None without.
    """

    texts: tuple[str, ...] | None
    tokens: np.ndarray
    lengths: np.ndarray
    log_probs: np.ndarray
    reasons: tuple[str, ...]
    prompts: tuple[tuple[int, ...], ...]
    cache: Any
    error: str | None = None
    drafted: np.ndarray | None = None
    accepted: np.ndarray | None = None
    steps: np.ndarray | None = None

    @property
    def text(self) -> str:
        """The text, where there is one.

        Raises:
          ValueError: if there are several, or none.
        """
        if self.texts is None or len(self.texts) != 1:
            count = 0 if self.texts is None else len(self.texts)
            raise ValueError(f"there are {count} texts; take one of texts, or decode tokens")
        return self.texts[0]

    @property
    def history(self) -> tuple[tuple[int, ...], ...]:
        """The tokens of each row, prompt and generated."""
        rows = zip(self.prompts, self.tokens, self.lengths, strict=True)
        return tuple((*prompt, *tokens[:length].tolist()) for prompt, tokens, length in rows)


class TextStream:
    """Texts as they come. Made by `Model.stream`.

    An iterator over pieces of text: strings for one prompt, tuples of strings, one per row, for a list of them. A
    character waits for its last byte, and what may be the beginning of a stop string for its end. It may be left at any
    time; `result` has the text so far.
    """

    def __init__(
        self,
        stream: Stream,
        prompts: Sequence[Sequence[int]],
        *,
        one: bool,
        tokenizer: Any,
        joined: Sequence[bool],
        stop_tokens: Sequence[int],
        stop_strings: Sequence[str],
    ) -> None:
        self._stream, self._one, self._tokenizer = stream, one, tokenizer
        self._prompts = tuple(tuple(map(int, prompt)) for prompt in prompts)
        self._joined, self._stop_tokens, self._stop_strings = joined, frozenset(stop_tokens), tuple(stop_strings)
        self._texts = [] if tokenizer is None else self._begin()

    def _begin(self) -> list[_Text]:
        texts = []
        for prompt, joined in zip(self._prompts, self._joined, strict=True):
            text = _Text(self._tokenizer.stream(), self._stop_tokens, self._stop_strings)
            if joined:
                text.join(prompt)
            texts.append(text)
        return texts

    def __iter__(self) -> TextStream:
        return self

    def __next__(self) -> Any:
        if not self._texts and self._tokenizer is None:
            raise ValueError("this model came without a tokenizer: iterate over jaxkv.stream, which gives tokens")
        while True:
            pieces = self._step(next(self._stream))
            if not self._one:
                return pieces
            if pieces[0]:
                return pieces[0]

    def _step(self, tokens: np.ndarray) -> tuple[str, ...]:
        new = tokens.reshape(len(self._texts), -1).tolist()
        pieces = [text.take(tokens) for text, tokens in zip(self._texts, new, strict=True)]
        found = np.array([text.found for text in self._texts])
        if found.any():
            self._stream.stop(found)
        for i, reason in enumerate(self._stream.reasons):
            if reason != "running":
                pieces[i] += self._texts[i].end()
        return tuple(pieces)

    def run(self) -> Completion:
        """Generates until every row has ended, in one compiled loop if there are no stop strings."""
        if self._stop_strings:
            for tokens in self._stream:
                self._step(tokens)
        else:
            self._stream.run()
        return self.result

    @property
    def result(self) -> Completion:
        """The Completion so far. Its cache is donated when the iteration goes on."""
        made = self._stream.result
        fields = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
        fields.pop("draft_cache", None)
        texts = None
        if self._tokenizer is not None:  # anew: Ctrl-C may have struck between a token and its text
            rows = self._begin()
            pieces = [row.take(tokens.tolist()) + row.end() for row, tokens in zip(rows, made.tokens, strict=True)]
            texts, lengths = tuple(pieces), np.array([row.num_tokens for row in rows], np.int32)
            if (lengths < made.lengths).any():  # a step of speculation went past a stop string
                fields |= self._cut(made, lengths)
        return Completion(texts=texts, prompts=self._prompts, **fields)

    def _cut(self, made: Any, lengths: np.ndarray) -> dict[str, Any]:
        """Returns fields of the result with rows that end after so many tokens [B]."""
        there = np.arange(made.tokens.shape[1]) < lengths[:, None]
        fields: dict[str, Any] = {"tokens": np.where(there, made.tokens, EMPTY), "lengths": lengths}
        fields["log_probs"] = np.where(there, made.log_probs, 0)
        cut = lengths < made.lengths
        fields["reasons"] = tuple("stop" if c else reason for c, reason in zip(cut, made.reasons, strict=True))
        if made.cache is not None:
            kept = np.array([len(prompt) for prompt in self._prompts], np.int32) + lengths - 1
            kept = np.where(cut, kept, np.iinfo(np.int32).max).astype(np.int32)
            fields["cache"] = dataclasses.replace(rewound(made.cache, kept), ok=made.cache.ok)
        return fields


class _Text:
    """The text of one row as its tokens come, up to a stop string."""

    def __init__(self, decoder: Any, stop_tokens: frozenset[int], stop_strings: tuple[str, ...]) -> None:
        self._decoder, self._stop_tokens, self._stop_strings = decoder, stop_tokens, stop_strings
        self._held = ""  # what may be the beginning of a stop string
        self.found = False  # whether there was one
        self.num_tokens = 0  # so many were taken

    def join(self, prompt: Sequence[int]) -> None:
        """Lets the text be what follows the prompt's: a space stays between words."""
        self._decoder.take(prompt)

    def take(self, tokens: Sequence[int]) -> str:
        """Returns what these tokens complete; those behind a stop string are not looked at."""
        tokens = [token for token in tokens if token >= 0]
        whole = not self._stop_strings
        return "".join(map(self._take, [tokens] if whole else ([token] for token in tokens)))

    def _take(self, tokens: Sequence[int]) -> str:
        if self.found:
            return ""
        self.num_tokens += len(tokens)
        shown = [token for token in tokens if token not in self._stop_tokens]
        return self._let_go(self._decoder.take(shown), at_end=False)

    def end(self) -> str:
        """Returns the rest."""
        return "" if self.found else self._let_go(self._decoder.end(), at_end=True)

    def _let_go(self, new: str, *, at_end: bool) -> str:
        text = self._held + new
        places = [at for stop in self._stop_strings if (at := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        longest = 0 if at_end else max(map(len, self._stop_strings), default=1) - 1
        kept = next((n for n in range(min(longest, len(text)), 0, -1) if self._may_begin(text[-n:])), 0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def _may_begin(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stop_strings)


def rewound(cache: Cache, lengths: Any) -> Cache:
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
