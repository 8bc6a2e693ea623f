"""What is checked on the host before anything is touched, and what is said when a compiled program fails."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.cache.arguments import integers
from jaxkv.cache.cache import Cache
from jaxkv.cache.spec import EMPTY
from jaxkv.errors import CacheError
from jaxkv.generate.generation import SAMPLER
from jaxkv.generate.history import History
from jaxkv.kinds import kind_of
from jaxkv.meshes import beside
from jaxkv.tracing import is_tracing

_CURE = (
    "forward must return the cache that begin returned, with its layers put back: cache, step = "
    "cache.begin(positions), and at the end cache.with_layers(layers)"
)


_NOWHERE = -2  # equal to no token, and not to EMPTY


def check_call(forward: Any, params: Any, prompts: Any, cache: Any) -> tuple[Cache, list[np.ndarray], np.ndarray, int]:
    """Returns the cache in JAX's arrays, the checked prompts, what each row holds [B], and the vocabulary's size."""
    if is_tracing():
        raise ValueError(
            "generate and the other loops run on the host: they compile their own programs, and can't be called "
            "under jit, vmap, grad or another transform of JAX. Call them outside; many prompts are the rows of one "
            "cache, not a vmap"
        )
    if not isinstance(cache, Cache):
        raise ValueError(f"cache is {kind_of(cache)}; give a jaxkv.Cache, from Cache.init or result.cache")
    check_alive(jax.tree.leaves(cache))
    cache = beside(params, jax.tree.map(jnp.asarray, cache))
    held = np.array(cache.lengths)
    vocab_size = check_forward(forward, params, cache)
    return cache, check_prompts(prompts, held, cache.capacity, vocab_size), held, vocab_size


def check_alive(leaves: Any) -> None:
    if any(leaf.is_deleted() for leaf in leaves if isinstance(leaf, jax.Array)):
        raise CacheError(
            "this cache was donated: an earlier generate or stream, or another jitted function, reuses its "
            "memory. Use result.cache of that generation, or make a new one with Cache.init"
        )


@contextlib.contextmanager
def failures_told(doing: str) -> Iterator[None]:
    """Turns the failure of a compiled program that the cache was donated to into a CacheError that says so."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        raise CacheError(
            f"{doing} failed: {cause_of(error)}. The cache was donated to it and is lost: make a new one with "
            "Cache.init"
        ) from error


def cause_of(error: BaseException) -> str:
    """Returns what an error says, in one line: of a traceback as text, which JAX makes of others' errors, the last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def check_forward(forward: Any, params: Any, cache: Cache) -> int:
    """Returns the size of the vocabulary, from the shape of the logits."""
    if type(forward).__name__ == "Model" and type(forward).__module__.startswith("jaxkv.models."):
        raise ValueError(
            "forward is a jaxkv.models.Model; call model.generate(prompts), or give its parts: "
            "generate(model.forward, model.params, prompts, cache)"
        )
    flavor = _flax_flavor(forward)
    if flavor is not None:
        cure = {
            "nnx": "forward, params = jaxkv.nnx.functional(model)",
            "linen": "forward = jaxkv.linen.functional(module), with params = variables['params']",
        }[flavor]
        raise ValueError(
            f"forward is {kind_of(forward)}, a flax.{flavor} module; give a function of its parameters: {cure}"
        )
    if not callable(forward):
        raise ValueError(f"forward is {forward!r}; give a function forward(params, tokens, positions, cache)")
    try:
        hash(forward)
    except TypeError:
        raise ValueError(
            f"forward is {kind_of(forward)} that can't be hashed, so its compiled form can't be found again; "
            "give a function, or jaxkv.nnx.functional(model)"
        ) from None
    one = np.zeros((cache.num_rows, 1), np.int32)
    out = _forward.eval_shape(forward, params, one, one, cache)
    if not isinstance(out, tuple) or len(out) != 2:
        what = f"an array {list(out.shape)}" if hasattr(out, "shape") else f"{kind_of(out)}"
        raise ValueError(f"forward returned {what}; it must return (logits, cache)")
    logits, after = out
    if isinstance(logits, Cache):
        raise ValueError("forward returned the cache first; it must return (logits, cache), in this order")
    shape = getattr(logits, "shape", None)
    if shape is None or len(shape) != 3 or shape[:2] != one.shape:
        raise ValueError(f"forward returned logits {shape} for tokens {one.shape}; they must be [B, T, V]")
    if _form(after) != _form(cache):
        raise ValueError(
            "forward returned another kind of cache than it was given (other layers, shapes or dtypes); it must return "
            "cache.with_layers(layers), of the cache that cache.begin returned"
        )
    return shape[2]


def check_lengths(lengths: np.ndarray, least: np.ndarray) -> None:
    """Raises ValueError if the cache of a row holds fewer tokens than forward was given."""
    for row in np.flatnonzero(lengths < least):
        raise ValueError(
            f"row {row} was given {least[row]} tokens, and the cache that forward returned has {lengths[row]}; {_CURE}"
        )


def _flax_flavor(forward: Any) -> str | None:
    """Returns "nnx" or "linen" for a module of Flax. By name: who doesn't use Flax need not import it."""
    for kind in type(forward).__mro__:
        for flavor in ("nnx", "linen"):
            if kind.__name__ == "Module" and kind.__module__.startswith(f"flax.{flavor}."):
                return flavor
    return None


def _form(cache: Any) -> Any:
    leaves, kind = jax.tree.flatten(cache)
    return kind, [(leaf.shape, leaf.dtype) for leaf in leaves]


@functools.partial(jax.jit, static_argnums=0)
def _forward(forward: Any, params: Any, tokens: Any, positions: Any, cache: Cache) -> Any:
    # Under jit, so that later calls find the shapes without tracing.
    out = forward(params, tokens, positions, cache)
    for part in out if isinstance(out, tuple) else ():
        if isinstance(part, Cache) and part.lengths is cache.lengths:
            raise ValueError(f"forward returned the cache as it was given, without the call's tokens; {_CURE}")
    return out


def check_prompts(prompts: Any, held: np.ndarray, capacity: int, vocab_size: int) -> list[np.ndarray]:
    """Returns the prompts as int32 arrays, empty for idle rows."""
    if isinstance(prompts, str | bytes):
        raise ValueError("prompts is text; encode it, and give one sequence of token numbers per row: [encode(text)]")
    if not isinstance(prompts, Iterable):
        raise ValueError(f"prompts is {prompts!r}; give a list of token lists, one per row, such as [[1, 2, 3]]")
    prompts = list(np.asarray(prompts) if isinstance(prompts, jax.Array) else prompts)
    if len(prompts) != len(held):
        raise ValueError(
            f"{len(prompts)} prompts for a cache of {len(held)} rows; give one per row (a list of token lists), None "
            "for an idle row"
        )
    checked = []
    for row, prompt in enumerate(prompts):
        if prompt is None:
            checked.append(np.zeros(0, np.int32))
            continue
        try:
            tokens = np.asarray(prompt)
        except ValueError:  # lists of several lengths
            tokens = np.zeros((0, 0), object)
        if tokens.ndim == 1 and not tokens.size:
            raise ValueError(
                f"the prompt of row {row} is empty; give at least one token, or None to leave the row idle"
            )
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(
                f"the prompt of row {row} is {tokens.dtype}{list(tokens.shape)}; give a sequence of whole token numbers"
            )
        _check_tokens(f"the prompt of row {row}", tokens, vocab_size)
        if tokens.size > capacity:
            raise ValueError(
                f"the prompt of row {row} has {tokens.size} tokens, the cache a capacity of {capacity}; shorten it or "
                "make a larger cache"
            )
        if tokens.size <= held[row]:
            raise ValueError(
                f"the prompt of row {row} has {tokens.size} tokens, but the row holds {held[row]} already; give the "
                "whole conversation, from its first token, with at least one new token, or cache.reset the row"
            )
        checked.append(tokens.astype(np.int32))
    return checked


def check_max_new_tokens(value: Any, num_rows: int) -> np.ndarray:
    """Returns int32 [B], most new tokens of each row."""
    try:
        most = np.asarray(integers("max_new_tokens", value))
    except ValueError:
        raise ValueError(f"max_new_tokens is {value!r}; give a whole number, 1 or more, or one per row") from None
    if most.ndim == 1 and most.size != num_rows:
        raise ValueError(f"max_new_tokens has {most.size} numbers for {num_rows} prompts; give one, or one per prompt")
    if most.ndim > 1:
        raise ValueError(f"max_new_tokens is {value!r}; give a whole number, 1 or more, or one per row")
    if (most < 1).any():
        raise ValueError(f"max_new_tokens is {value!r}; it must be 1 or more")
    return np.broadcast_to(most, (num_rows,))


def check_stop_tokens(stop_tokens: Any, vocab_size: int) -> np.ndarray:
    """Returns int32 [S, L], a token or sequence of tokens a line, as `loop.decode` takes them.

    Padded to powers of two, so that few shapes are compiled.
    """
    lines = stop_sequences(stop_tokens)
    for line in lines:
        _check_tokens("stop_tokens", line, vocab_size)
    longest = max((line.size for line in lines), default=1)
    shape = max(8, _power_of_two(len(lines))), _power_of_two(longest)
    table = np.full(shape, _NOWHERE, np.int32)
    for i, line in enumerate(lines):
        table[i] = np.pad(line, (shape[1] - line.size, 0), constant_values=EMPTY)
    return table


def stop_sequences(stop_tokens: Any) -> list[np.ndarray]:
    """Returns stop tokens, one or several, and sequences among them, as sequences.

    Raises:
      ValueError: for anything else.
    """
    try:
        lines = [np.atleast_1d(np.asarray(stop)) for stop in stop_tokens]
    except (TypeError, ValueError):  # one number; or a sequence of sequences
        lines = [np.asarray([stop_tokens])]
    if not all(line.ndim == 1 and line.size and np.issubdtype(line.dtype, np.integer) for line in lines):
        raise ValueError(
            f"stop_tokens is {stop_tokens!r}; give whole token numbers, for instance stop_tokens=[0], or sequences of "
            "them, stop_tokens=[0, [13, 10]]"
        )
    return lines


def _power_of_two(n: int) -> int:
    """Returns the smallest one that is n or more."""
    return 1 << max(n - 1, 0).bit_length()


def _check_tokens(what: str, tokens: np.ndarray, vocab_size: int) -> None:
    wrong = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if wrong.size:
        raise ValueError(
            f"{what} has token {wrong[0]}, outside the model's vocabulary of {vocab_size} (0 to {vocab_size - 1}); was "
            "it encoded with another tokenizer?"
        )


def check_sampler(sampler: Any, key: Any, vocab_size: int) -> Any:
    """Returns the key as a typed one; None for samplers that don't need one."""
    if isinstance(sampler, type):
        raise ValueError(f"sampler is the class {sampler.__name__}; give an instance of it, like Temperature(0.8)")
    try:
        hash(sampler)
    except TypeError:
        raise ValueError(
            f"sampler is {sampler!r}, which can't be hashed; give a function or a frozen dataclass"
        ) from None
    if not callable(sampler):
        raise ValueError(f"sampler is {sampler!r}; give one of jaxkv.sampling, or a function sample(key, logits)")
    needs_key = getattr(sampler, "needs_key", None)  # None: a function of the user's own, which nobody knows
    if needs_key is False or (needs_key is None and key is None and _works_without_key(sampler, vocab_size)):
        return None
    if key is None:
        raise ValueError(f"sampler {sampler} draws at random but no key is given; give key=jax.random.key(0)")
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed and not (isinstance(key, jax.Array) and key.dtype == jnp.uint32 and key.ndim == 1):
        raise ValueError(f"key is {key!r}; give a PRNG key, for instance key=jax.random.key(0)")
    if not typed:
        key = jax.random.wrap_key_data(key)
    if key.shape:
        raise ValueError(f"key has shape {key.shape}; give one key, rows and steps derive theirs from it")
    return key


def check_sampled(sampler: Any, tokens: Any, reasons: Any, vocab_size: int) -> None:
    """Raises ValueError if the compiled loop ended because the sampler's answer was not a token.

    Args:
      sampler: that was asked.
      tokens, reasons: int [B], of each row.
      vocab_size: V.
    """
    for row in np.flatnonzero(np.asarray(reasons) == SAMPLER)[:1]:
        token = int(tokens[row])
        left = "; -1 says that no token was left to choose from" if token == EMPTY else ""
        raise ValueError(
            f"sampler {sampler} answered with token {token} for row {row}, outside the model's vocabulary of "
            f"{vocab_size} (0 to {vocab_size - 1}){left}"
        )


def _works_without_key(sampler: Any, vocab_size: int) -> bool:
    args = [jax.ShapeDtypeStruct((vocab_size,), jnp.float32)]
    if getattr(sampler, "needs_history", False):
        args.append(jax.eval_shape(lambda: jax.tree.map(jnp.asarray, History.of([0], vocab_size))))
    try:
        _answer.eval_shape(sampler, None, *args)
    except Exception:  # noqa: BLE001  (a sampler may fail in any way)
        _answer.eval_shape(sampler, jax.random.key(0), *args)  # if it fails with a key too, it says why itself
        return False
    return True


@functools.partial(jax.jit, static_argnums=0)
def _answer(sampler: Any, key: Any, *args: Any) -> Any:
    # Under jit, so that later calls find out without tracing.
    return sampler(key, *args)
