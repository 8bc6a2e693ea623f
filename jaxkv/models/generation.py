"""How a model's makers want it to be sampled: `generation_config.json`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from jaxkv.models.files import read_json

# Values of the file that change nothing.
_NEUTRAL = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1}


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Defaults for generation; None where the checkpoint says nothing, or what changes nothing.

    Attributes:
      stop_tokens: a text ends after one of these.
      max_new_tokens: most tokens of a text.
      greedy: whether the most likely token is taken each time; else one is drawn.
      temperature, top_k, top_p, min_p: how it is drawn, see `jaxkv.sampling`.
      repetition_penalty: see `jaxkv.sampling.RepetitionPenalty`.

    >>> config = GenerationConfig(stop_tokens=(2,), greedy=False, temperature=0.6, top_p=0.9)
    >>> jaxkv.sampling.sampler(**config.sampling)
    Chain(parts=(Temperature(t=0.6), TopP(p=0.9)))
    """

    stop_tokens: tuple[int, ...] = ()
    max_new_tokens: int | None = None
    greedy: bool = True
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    @property
    def sampling(self) -> dict[str, Any]:
        """The arguments for `jaxkv.sampling.sampler`."""
        if self.greedy:
            return {"temperature": 0, "repetition_penalty": self.repetition_penalty}
        return {name: getattr(self, name) for name in _NEUTRAL}

    @classmethod
    def read(cls, directory: str | os.PathLike[str]) -> GenerationConfig:
        """Returns what a checkpoint directory says.

        Greedy unless generation_config.json has `"do_sample": true`, as in transformers. (Which draws from the 50 most
        likely tokens where the file has no `top_k`; here no number is limit.)

        Args:
          directory: with generation_config.json; what that lacks of stop tokens is taken from config.json.

        Raises:
          ValueError: for a file that is no JSON object, or values of the wrong kind.
        """
        path = Path(directory) / "generation_config.json"
        given, config = (read_json(file, needed=False) for file in (path, path.with_name("config.json")))
        for source, where in (
            (given, path),
            (config, path.with_name("config.json")),
            (config.get("text_config") or {}, path.with_name("config.json")),
        ):
            stops = source.get("eos_token_id")
            if stops is not None:
                stop_tokens = tuple(stops) if isinstance(stops, list) else (stops,)
                if not all(type(token) is int for token in stop_tokens):
                    raise ValueError(f"{where}: eos_token_id is {stops!r}, must be a token number or a list of them")
                break
        else:
            stop_tokens = ()
        fields: dict[str, Any] = {}
        for name in (*_NEUTRAL, "max_new_tokens"):
            value = given.get(name)
            if value is None or value == _NEUTRAL.get(name):
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{path}: {name} is {value!r}, must be a number")
            whole = name in ("top_k", "max_new_tokens")
            if whole and value != int(value):
                raise ValueError(f"{path}: {name} is {value!r}, must be a whole number")
            fields[name] = int(value) if whole else value
        # -1 is the token that no tokenizer has: some files give it for "none".
        stop_tokens = tuple(token for token in stop_tokens if token >= 0)
        return cls(stop_tokens=stop_tokens, greedy=not given.get("do_sample"), **fields)
