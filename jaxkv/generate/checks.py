"""What `generate` and `stream` check on the host before anything is touched."""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.cache.cache import Cache
from jaxkv.cache.spec import EMPTY
from jaxkv.errors import CacheError

_CURE = (
    "forward must return the cache that begin returned, with its layers put back: cache, step = "
    "cache.begin(positions), and at the end cache.with_layers(layers)"
)


def check_cache(cache: Any) -> None:
    if not isinstance(cache, Cache):
        raise ValueError(f"cache is a {type(cache).__name__}; give a jaxkv.Cache, from Cache.init or result.cache")
    leaves = jax.tree.leaves(cache)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        raise ValueError("generate and stream run on the host; call them outside jit (they compile their own loop)")
    check_alive(leaves)


def check_alive(leaves: Any) -> None:
    if any(leaf.is_deleted() for leaf in leaves if isinstance(leaf, jax.Array)):
        raise CacheError(
            "this cache was donated: an earlier generate or stream, or another jitted function, went on with its "
            "memory. Use result.cache of that generation, or make a new one with Cache.init"
        )


def check_forward(forward: Any, params: Any, cache: Cache) -> int:
    """Returns the size of the vocabulary, from the shape of the logits."""
    flavor = _flax_flavor(forward)
    if flavor is not None:
        cure = {
            "nnx": "forward, params = jaxkv.nnx.functional(model)",
            "linen": "forward = jaxkv.linen.functional(module), with params = variables['params']",
        }[flavor]
        raise ValueError(
            f"forward is a {type(forward).__name__}, a flax.{flavor} module; give a function of its parameters: {cure}"
        )
    if not callable(forward):
        raise ValueError(f"forward is {forward!r}; give a function forward(params, tokens, positions, cache)")
    try:
        hash(forward)
    except TypeError:
        raise ValueError(
            f"forward is a {type(forward).__name__} that can't be hashed, so its compiled form can't be found again; "
            "give a function, or jaxkv.nnx.functional(model)"
        ) from None
    one = np.zeros((cache.num_rows, 1), np.int32)
    out = _forward.eval_shape(forward, params, one, one, cache)
    if not isinstance(out, tuple) or len(out) != 2:
        raise ValueError(f"forward returned {type(out).__name__}; it must return (logits, cache)")
    logits, after = out
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
    prompts = list(np.asarray(prompts) if isinstance(prompts, jax.Array) else prompts)
    if len(prompts) != len(held):
        raise ValueError(
            f"{len(prompts)} prompts for a cache of {len(held)} rows; give one per row (a list of token lists), None "
            "for a row that is to stay idle"
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
                "whole conversation, what was read before included, with at least one new token, or cache.reset the row"
            )
        checked.append(tokens.astype(np.int32))
    return checked


def check_max_new_tokens(value: Any) -> int:
    try:
        value = operator.index(value)
    except TypeError:
        raise ValueError(f"max_new_tokens is {value!r}; give a whole number, 1 or more") from None
    if value < 1:
        raise ValueError(f"max_new_tokens is {value}; it must be 1 or more")
    return value


def check_stop_tokens(stop_tokens: Any, vocab_size: int) -> np.ndarray:
    """Returns int32 [S], padded with EMPTY to a power of two, so that few lengths are compiled."""
    tokens = np.atleast_1d(np.asarray(stop_tokens))
    if tokens.size == 0:
        tokens = tokens.astype(np.int32)
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"stop_tokens is {stop_tokens!r}; give whole token numbers, for instance stop_tokens=[0]")
    _check_tokens("stop_tokens", tokens, vocab_size)
    size = max(8, 1 << (tokens.size - 1).bit_length()) if tokens.size else 8
    return np.pad(tokens.astype(np.int32), (0, size - tokens.size), constant_values=EMPTY)


def _check_tokens(what: str, tokens: np.ndarray, vocab_size: int) -> None:
    wrong = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if wrong.size:
        raise ValueError(
            f"{what} has token {wrong[0]}, outside the model's vocabulary of {vocab_size} (0 to {vocab_size - 1}); was "
            "it encoded with another tokenizer?"
        )


def check_sampler(sampler: Any, key: Any) -> Any:
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
    if not getattr(sampler, "needs_key", True):
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
