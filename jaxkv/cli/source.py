"""Which model is meant: the bundled one, or a checkpoint directory. All about it, then its weights."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from jaxkv.cache.build import stored_as
from jaxkv.cli.devices import divided
from jaxkv.cli.options import Failure, UsageError
from jaxkv.cli.run import keep_compiled_programs
from jaxkv.cli.storage import storages
from jaxkv.cli.terminal import note, progress_bar
from jaxkv.models import (
    FAMILIES,
    ByteTokenizer,
    DecoderConfig,
    GenerationConfig,
    Model,
    Tokenizer,
    fingerprint,
    load,
    read_config,
    tensor_parallel,
    tiny,
)
from jaxkv.models.config import context_of
from jaxkv.models.files import config_path
from jaxkv.models.model import abstract
from jaxkv.nn.nnx import functional, fuse

_SHIPPED = "the bundled model"


@dataclasses.dataclass(frozen=True)
class Source:
    """A model before its weights are read.

    Attributes:
      name: how to call it.
      family: the "model_type" of its config.json.
      config: what it is made of.
      context: tokens of the longest sequence it was made for; None if nobody says.
      generation: how its makers want it to be sampled, and where they say so.
      directory: None for the bundled model.
      shipped: that model.
    """

    name: str
    family: str
    config: Any
    context: int | None
    generation: GenerationConfig
    directory: Path | None
    shipped: Model | None = None

    @functools.cached_property
    def tokenizer(self) -> Any:
        if self.directory is None:
            return ByteTokenizer()
        with told():
            return Tokenizer(self.directory)

    @property
    def said_in(self) -> str:
        """Where `generation` comes from."""
        if self.directory is None:
            return "the model's default"
        there = (self.directory / "generation_config.json").is_file()
        return "generation_config.json" if there else "the default"

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Tokens that end a text, as far as the model knows them."""
        return self._known(self.generation.stop_tokens)

    @property
    def ends_of_turn(self) -> tuple[int, ...]:
        """Tokens that end an answer: `stop_tokens`, and what the tokenizer writes behind one."""
        return self._known((*self.generation.stop_tokens, *self.tokenizer.stop_tokens))

    def _known(self, tokens: Iterable[int]) -> tuple[int, ...]:
        return tuple(dict.fromkeys(token for token in tokens if token < self.config.vocab_size))

    def known(self, tokens: list[int]) -> list[int]:
        """Returns tokens of the tokenizer, all of which the model knows.

        Raises:
          Failure: if it does not.
        """
        if tokens and max(tokens) >= self.config.vocab_size:
            raise Failure(
                f"this text has the token {max(tokens):,}, and the model knows "
                f"{self.config.vocab_size:,}; its tokenizer.json belongs to another model"
            )
        return tokens

    @functools.cached_property
    def module(self) -> Any:
        """The module of the model; no weights are read."""
        return self.shipped.module if self.shipped else abstract(FAMILIES[self.family].module, self.config)

    @property
    def num_params(self) -> int:
        """How many parameters it has."""
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(self.module)))

    @functools.cached_property
    def fingerprint(self) -> str:
        """What tells it from other models, see `jaxkv.models.fingerprint`."""
        return fingerprint(self.directory or tiny.PATH.parent)

    def specs(self) -> list[Any]:
        """Returns what a cache must keep, layer by layer."""
        return list(self.module.specs())

    def load(self, dtype: str | None, num_tokens: int, *, storage: str | None, quiet: bool, mesh: Any = None) -> Model:
        """Returns the model, its weights laid out for decoding where that is faster.

        Args:
          dtype: of parameters and computation; None: see `default_dtype`.
          num_tokens: how long sequences may become.
          storage: how its cache keeps numbers, as `--storage` names it; None: in the dtype of the computation.
          quiet: whether nothing is shown meanwhile.
          mesh: of devices over which the model is divided; None: one device.
        """
        keep_compiled_programs()
        model = self._load(dtype, num_tokens, quiet, mesh)
        with told():
            return dataclasses.replace(model, specs=stored_as(model.specs, storages(storage)))

    def _load(self, dtype: str | None, num_tokens: int, quiet: bool, mesh: Any) -> Model:
        on_cpu = jax.default_backend() == "cpu"
        if self.directory is None:
            model = tiny.load(dtype) if self.shipped is None or dtype else self.shipped
            if mesh is not None:
                return divided(model, mesh)
            if not on_cpu:
                return model
            forward, params = functional(fuse(model.module))
            return dataclasses.replace(model, forward=forward, params=params)
        begin = time.perf_counter()
        with told(), progress_bar("loading", show=not quiet and sys.stderr.isatty()) as progress:
            dtype = dtype or default_dtype()
            how: dict[str, Any] = {"fuse": on_cpu} if mesh is None else {"sharding": tensor_parallel(mesh)}
            model = load(self.directory, dtype=dtype, context=num_tokens, progress=progress, **how)
        if not quiet:
            seconds = time.perf_counter() - begin
            note(f"{self.name} ({self.family}) loaded as {model.config.dtype.name} in {seconds:.1f} s")
        return model


def default_dtype() -> str | None:
    """Returns the dtype in which a checkpoint is computed if nobody says; None is its own.

    On a CPU jax 0.10 rewrites the whole cache for each bfloat16 token that is put.
    """
    return "float32" if jax.default_backend() == "cpu" else None


def find(given: str | None, *, text: bool = True) -> Source:
    """Returns the model that a directory holds, or that comes with jaxkv for None.

    Args:
      given: as the user wrote it.
      text: whether only a model that continues text will do.

    Raises:
      UsageError: if it is not a directory, or a model that will not do.
      Failure: if something in it is missing, can't be read, or is not computed here.
    """
    if given is None:
        model = tiny.load()
        return Source(_SHIPPED, "bytes", model.config, model.context, model.generation, None, model)
    directory = Path(given).expanduser()
    with told():
        try:
            path = config_path(given)
        except FileNotFoundError as error:
            raise (Failure if directory.is_dir() else UsageError)(error) from error
        family, config, parsed = read_config(path)
        if text and not isinstance(config, DecoderConfig):
            raise UsageError(
                f"{given} is a {family} model: it needs audio, and the command only has text; in Python "
                "use jaxkv.models.load"
            )
        generation = GenerationConfig.read(directory)
    return Source(given, family, config, context_of(parsed), generation, directory)


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Turns errors that are written for users into failures of the command."""
    try:
        yield
    except (ValueError, ImportError) as error:
        raise Failure(error) from error
