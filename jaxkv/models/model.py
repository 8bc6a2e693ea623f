"""Model: what `jaxkv.models.load` returns, ready for `Cache.init` and `generate`."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from jaxkv.cache.spec import LayerSpec
from jaxkv.models.generation import GenerationConfig
from jaxkv.nn.nnx import Forward, functional


def abstract(kind: Callable[..., Any], config: Any) -> Any:
    """Returns `kind(config, rngs=...)` with shapes in place of arrays: a module to load parameters into.

    As `nnx.eval_shape` would, in a third of the time: Flax spends most of it on counting random draws while tracing.

    >>> from jaxkv.models import Decoder, DecoderConfig
    >>> module = abstract(Decoder, DecoderConfig(vocab_size=8, width=4, num_layers=1, num_heads=1))
    >>> module.embed.embedding.shape
    (8, 4)
    """
    key = jax.random.key(0)
    return nnx.eval_shape(lambda: kind(config, rngs=types.SimpleNamespace(params=lambda: key)))


@dataclasses.dataclass(frozen=True)
class Model:
    """A model as a function and its parameters, and what belongs to it.

    Attributes:
      forward: `forward(params, tokens, positions, cache) -> (logits, cache)`, hashable.
      params: nested dicts of arrays.
      specs: one LayerSpec per layer, for `Cache.init`.
      config: what the module is made of, a DecoderConfig or an EncoderDecoderConfig.
      context: tokens of the longest sequence it was made for; None if nobody says.
      generation: stop tokens, and how its makers want it to be sampled.
      source: the parsed config.json of its checkpoint, empty if there is none.
      notes: what was decided in loading where its files don't agree, a line each.
    """

    forward: Forward
    params: Any = dataclasses.field(repr=False)
    specs: tuple[LayerSpec, ...] = dataclasses.field(repr=False)
    config: Any
    context: int | None = None
    generation: GenerationConfig = GenerationConfig()
    source: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    make_tokenizer: Callable[[], Any] | None = dataclasses.field(default=None, repr=False)

    @classmethod
    def of(cls, module: Any, **rest: Any) -> Model:
        """Returns the Model of an nnx module that has a `config` and `specs()`.

        Args:
          module: such as a `Decoder`; its arrays are shared.
          **rest: further fields.
        """
        forward, params = functional(module)
        return cls(forward, params, tuple(module.specs()), module.config, **rest)

    @property
    def module(self) -> Any:
        """The nnx module with these params: `model.module(tokens)` gives logits without a cache, and trains."""
        return nnx.merge(self.forward.graphdef, self.params)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """Text to tokens and back, see `jaxkv.models.Tokenizer`; read on first use.

        Raises:
          ImportError: without the extra `jaxkv[models]`.
          OSError: if the checkpoint has no tokenizer.json.
        """
        if self.make_tokenizer is None:
            raise FileNotFoundError("this model came without a tokenizer; make one: jaxkv.models.Tokenizer(directory)")
        return self.make_tokenizer()
