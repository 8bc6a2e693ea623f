"""The shipped model, its sampler and cache, and one timed run of the compiled loop."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxkv.cache.cache import Cache
from jaxkv.cache.plan import plan_memory
from jaxkv.cache.spec import EMPTY
from jaxkv.cli.options import SAMPLING, TEMPERATURE, UsageError
from jaxkv.cli.terminal import Text, note
from jaxkv.generate import sampling, stream
from jaxkv.models import tiny
from jaxkv.nn.nnx import functional, fuse
from jaxkv.sizes import format_bytes

_STOP = 0  # the byte that separates documents
_PREPARING = ("jaxpr_trace_duration", "jaxpr_to_mlir_module_duration", "backend_compile_duration")


@dataclasses.dataclass(frozen=True)
class Model:
    """The shipped model, as functions."""

    forward: Callable[..., Any]
    params: Any
    specs: tuple[Any, ...]
    recompute: Callable[..., Any]  # (tokens [1, S], begin) -> tokens [1, S], greedy from `begin` on, without a cache


def load_model() -> Model:
    keep_compiled_programs()
    module = fuse(tiny.load())
    graphdef, state = nnx.split(module)

    @jax.jit
    def recompute(state: Any, tokens: Any, begin: Any) -> Any:
        def step(i: Any, tokens: Any) -> Any:
            logits = nnx.merge(graphdef, state)(tokens)  # [1, S, V]; position i - 1 sees nothing after itself
            return tokens.at[0, i].set(jnp.argmax(logits[0, i - 1]).astype(tokens.dtype))

        return jax.lax.fori_loop(begin, tokens.shape[1], step, tokens)

    forward, params = functional(module)
    return Model(forward, params, tuple(module.specs()), functools.partial(recompute, state))


def keep_compiled_programs() -> None:
    """Lets JAX keep what it compiles, so that the next start finds it."""
    folder = os.environ.get("JAXKV_CACHE_DIR") or jax.config.values["jax_compilation_cache_dir"]
    if not folder:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "jaxkv")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        note(f"{folder}: {error.strerror}; every start compiles anew (set JAXKV_CACHE_DIR to another folder)")
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # small programs are many
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def make_sampler(args: argparse.Namespace) -> Any:
    if args.greedy and (given := set(sampling_options(args)) - {"--repetition-penalty"}):
        raise UsageError(f"--greedy takes the most probable token; leave out {' and '.join(sorted(given))}")
    temperature = 0 if args.greedy else TEMPERATURE if args.temperature is None else args.temperature
    try:
        parts: tuple[tuple[Callable[[Any], Any], Any], ...] = (
            (sampling.RepetitionPenalty, args.repetition_penalty),
            (sampling.Temperature, temperature),
            (sampling.TopK, args.top_k),
            (sampling.TopP, args.top_p),
            (sampling.MinP, args.min_p),
        )
        return sampling.Chain(tuple(kind(value) for kind, value in parts if value is not None))
    except ValueError as error:
        raise UsageError(error) from error


def sampling_options(args: argparse.Namespace) -> list[str]:
    """Returns the options for sampling that were given."""
    return [option for option in SAMPLING if getattr(args, option[2:].replace("-", "_")) is not None]


def describe_size(model: Model, num_rows: int, capacity: int) -> str:
    plan = plan_memory(model.specs, num_rows, capacity)
    texts = "1 text" if num_rows == 1 else f"{num_rows} texts"
    per_token, in_all = format_bytes(plan.bytes_per_token), format_bytes(plan.nbytes)
    return f"cache: {per_token} per token, {in_all} in all, for {texts} of up to {capacity:,} tokens"


class Run:
    """One run of the compiled loop: its texts, and when its tokens came.

    Attributes:
      texts: what each row has got.
      stop: set it to end the run after the next token.
      result: the Generation, once `tokens` has ended.
    """

    def __init__(self, num_rows: int) -> None:
        self.texts = [Text() for _ in range(num_rows)]
        self.stop = False
        self.result: Any = None
        self._begin = self._first = self._last = 0.0
        self._with_first = 0  # tokens that came in the first step
        self._preparing: list[tuple[float, float]] = []  # when JAX traced, compiled or fetched a program

    def tokens(
        self, model: Model, prompts: list[list[int]], cache: Cache, args: argparse.Namespace, sampler: Any
    ) -> Iterator[list[str]]:
        """Yields what each row has got by one more step, as text."""
        with self._watching_jax():
            self._begin = time.perf_counter()
            steps = stream(
                model.forward,
                model.params,
                prompts,
                cache,
                max_new_tokens=args.max_new_tokens,
                sampler=sampler,
                stop_tokens=_STOP,
                key=jax.random.key(args.seed),
            )
            for step in steps:
                self._last = time.perf_counter()
                rows = [[] if token in (EMPTY, _STOP) else [int(token)] for token in step]
                if not self._first:
                    self._first, self._with_first = self._last, sum(map(len, rows))
                yield [text.take(row) for text, row in zip(self.texts, rows, strict=True)]
                if self.stop:
                    break
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
        """Returns how long the first token took, and how many came per second after it."""
        if not self._first:
            return "no token came"
        preparing, until = 0.0, self._begin
        for begin, end in sorted(self._preparing):  # one may lie inside another
            preparing += max(0.0, min(end, self._first) - max(begin, until))
            until = max(until, end)
        speed = f"first token after {self._first - self._begin:.2f} s ({preparing:.2f} s of it preparing programs)"
        more = self.num_tokens - self._with_first
        return speed + (f", then {more / (self._last - self._first):,.0f} tokens/s" if more else "")

    @property
    def num_tokens(self) -> int:
        """How many tokens were written, stop tokens not counted."""
        return sum(len(text.tokens) for text in self.texts)
