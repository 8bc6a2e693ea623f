"""Sampler, limits and cache of a run, and one timed run of the compiled loop."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxkv.cache.plan import plan_memory
from jaxkv.cache.rows import Rows
from jaxkv.cache.spec import EMPTY
from jaxkv.cli.options import DRAWING, SAMPLING, Failure, UsageError, option
from jaxkv.cli.terminal import Text, note
from jaxkv.generate import sampling, stream, stream_speculation
from jaxkv.sizes import format_bytes

_PREPARING = ("jaxpr_trace_duration", "jaxpr_to_mlir_module_duration", "backend_compile_duration")


def keep_compiled_programs() -> None:
    """Lets JAX keep what it compiles, so that the next start finds it."""
    folder = os.environ.get("JAXKV_CACHE_DIR") or jax.config.values["jax_compilation_cache_dir"]
    if not folder:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "jaxkv")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        note(f"{folder}: {error.strerror}; every start compiles again (set JAXKV_CACHE_DIR to another folder)")
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # small programs are many
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and who said so."""

    sampler: sampling.Chain
    text: str


def choose_sampling(args: argparse.Namespace, generation: Any, stop_tokens: Sequence[int], said_in: str) -> Sampling:
    """Returns what the options say, and where they say nothing what the model's makers do.

    One option that is about drawing lets a model draw that would be greedy.
    """
    given = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    drawing = sorted(set(given) & set(DRAWING))
    if args.greedy and drawing:
        names = " and ".join(map(option, drawing))
        raise UsageError(f"--greedy takes the most probable token; leave out {names}")
    for name, value in given.items():
        try:
            sampling.sampler(**{name: value, "stop_tokens": stop_tokens})
        except ValueError as error:
            raise UsageError(f"argument {option(name)}: {str(error).partition(': ')[2]}") from error
    told = generation.sampling
    if args.greedy:
        told = {name: value for name, value in told.items() if name not in DRAWING} | {"temperature": 0}
    elif drawing and generation.greedy:
        told = dataclasses.replace(generation, greedy=False).sampling
    numbers = {name: value for name, value in (told | given).items() if value is not None}
    try:
        sampler = sampling.sampler(**{"stop_tokens": stop_tokens, **numbers})
    except ValueError as error:
        raise Failure(f"{said_in}: {error}") from error
    greedy = numbers.get("temperature") == 0
    parts: dict[str, list[str]] = {}
    for name, value in {"temperature": 1, **numbers}.items():
        if name == "stop_tokens" or (greedy and name in DRAWING and name != "temperature"):
            continue
        if name == "temperature" and greedy:
            where = "as asked" if args.greedy or name in given else said_in
            parts.setdefault(where, []).append("greedy")
            continue
        number = f" {value:g}" if isinstance(value, int | float) else ""
        where = "as asked" if name in given else said_in if name in numbers else "the default"
        parts.setdefault(where, []).append(f"{name.replace('_', ' ')}{number}")
    return Sampling(sampler, "; ".join(f"{', '.join(what)} ({where})" for where, what in parts.items()))


def sampling_options(args: argparse.Namespace) -> list[str]:
    """Returns the options for sampling that were given."""
    return [option(name) for name in SAMPLING if getattr(args, name) is not None]


def check_capacity(capacity: int | None, context: int | None, option: str = "--capacity") -> None:
    if capacity is not None and context is not None and capacity > context:
        raise UsageError(
            f"argument {option}: {capacity:,} is more than the {context:,} tokens of the model's context; leave it "
            f"out, or give at most {context}"
        )


def describe_size(specs: Sequence[Any], num_rows: int, capacity: int, layout: Any = Rows(), slack: int = 0) -> str:
    plan = plan_memory(specs, num_rows, capacity, layout=layout, slack=slack)
    texts = "1 text" if num_rows == 1 else f"{num_rows} texts"
    per_token, in_all = format_bytes(plan.bytes_per_token), format_bytes(plan.nbytes)
    pool = "" if layout == Rows() else f", in {layout.num_pages:,} pages of {layout.page_size}"
    return f"cache: {per_token} per token, {in_all} in all, for {texts} of up to {capacity:,} tokens{pool}"


class Run:
    """One run of the compiled loop: its texts, and when its tokens came.

    Args:
      texts: one per row, to be continued; rows behind them have no prompt.

    Attributes:
      texts: what each row has got.
      stop: set it to end the run after the next token.
      result: the Generation, once `tokens` has ended.
    """

    def __init__(self, texts: Sequence[Text]) -> None:
        self.texts = list(texts)
        self.stop = False
        self.result: Any = None
        self._begin = self._first = self._last = 0.0
        self._with_first = 0  # tokens that came in the first step
        self._preparing: list[tuple[float, float]] = []  # when JAX traced, compiled or fetched a program

    def tokens(
        self,
        model: Any,
        prompts: Sequence[list[int] | None],
        cache: Any,
        *,
        max_new_tokens: Any,
        sampler: Any,
        stop_tokens: Sequence[int],
        key: Any,
        num_samples: Any = 1,
        drafting: dict[str, Any] | None = None,
    ) -> Iterator[list[str]]:
        """Yields what each row has got by one more step, as text; `result` is what became of it, however it ends.

        `drafting` has further arguments of `speculate`.
        """
        silent = {EMPTY, *stop_tokens}
        with self._watching_jax():
            self._begin = time.perf_counter()
            options = {"max_new_tokens": max_new_tokens, "sampler": sampler, "stop_tokens": stop_tokens, "key": key}
            options["num_samples"] = num_samples
            how: Any = stream if drafting is None else functools.partial(stream_speculation, **drafting)
            steps = how(model.forward, model.params, prompts, cache, **options)
            try:
                for step in steps:
                    self._last = time.perf_counter()
                    new = step.reshape(len(step), -1).tolist()
                    rows = [[token for token in row if token not in silent] for row in new]
                    if not self._first:
                        self._first, self._with_first = self._last, sum(map(len, rows))
                    yield [text.take(row) for text, row in zip(self.texts, rows, strict=False)]
                    if self.stop:
                        break
            finally:
                self.result = steps.result

    @contextlib.contextmanager
    def _watching_jax(self) -> Iterator[None]:
        def listen(event: str, duration_secs: float, **_: Any) -> None:
            if event.endswith(_PREPARING):
                now = time.perf_counter()
                self._preparing.append((now - duration_secs, now))

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)

    def speed(self) -> str:
        """Returns how long the first token took, what of that was spent on programs, and how many came per second."""
        if not self._first:
            return "no token came"
        first = self._first - self._begin
        speed = f"first token after {first:.2f} s ({self.preparing:.2f} s of it compiling or loading programs)"
        more = self.num_tokens - self._with_first
        return speed + (f", then {_rate(more / (self._last - self._first))} tokens/s" if more else "")

    @property
    def preparing(self) -> float:
        """How many seconds before the first token went into tracing, compiling or fetching programs."""
        preparing, until = 0.0, self._begin
        for begin, end in sorted(self._preparing):  # one may lie inside another
            preparing += max(0.0, min(end, self._first) - max(begin, until))
            until = max(until, end)
        return preparing

    @property
    def seconds(self) -> float:
        """How long it took, from the beginning to the last token."""
        return max(self._last - self._begin, 0.0)

    @property
    def num_tokens(self) -> int:
        """How many tokens were written, stop tokens not counted."""
        return sum(len(text.tokens) for text in self.texts)


def _rate(per_second: float) -> str:
    return f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.1f}"
