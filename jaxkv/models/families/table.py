"""What a family's table is made of: which of our fields its config.json fills, which of our params its tensors are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxkv.cache.spec import Full, Reach, Window
from jaxkv.errors import NotSupportedError
from jaxkv.models.decoder import Decoder
from jaxkv.nn.rotary import LinearScaling, Llama3Scaling, LongRopeScaling, Rotary, Scaling, YarnScaling

FORMS = ("same", "minus_one", "reversed", "in_out", "out_in")
# transformers' names of activations, and those of DecoderConfig.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint: which params it holds, and in which form. Skipped if the model has none of them.

    Args:
      file: its name there, with {} for the number of the layer.
      params: names of our params; several are joined along the output axis, in this order.
      form: "same": of the same shape; "minus_one": the same, of which 1 was subtracted (scales); "reversed": all axes
        the other way round (convolutions); "in_out" and "out_in": all axes of the input as one and all of the output as
        one, in this order (ours have an axis for heads).
      num_inner: for the last two, how many leading axes of our param are input; none for a bias.

    >>> kernel = Tensor("q_proj.weight", ("query.kernel",), "out_in", num_inner=1)
    >>> kernel.file_shape((24, 4, 8)), kernel.decode(np.ones((32, 24)), (24, 4, 8)).shape
    ((32, 24), (24, 4, 8))
    """

    file: str
    params: tuple[str, ...]
    form: str = "same"
    num_inner: int = 0

    def __post_init__(self) -> None:
        if self.form not in FORMS or (len(self.params) > 1 and self.form not in FORMS[3:]):
            raise ValueError(
                f"{self}: form is one of {', '.join(FORMS)}, and several params are joined in the last two"
            )

    @property
    def joined_axis(self) -> int:
        """Along which axis of the file's tensor several params are joined."""
        return 0 if self.form == "out_in" else -1

    def file_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape in the file of one param of this shape."""
        if self.form in ("same", "minus_one"):
            return shape
        if self.form == "reversed":
            return shape[::-1]
        inner = (math.prod(shape[: self.num_inner]),) if self.num_inner else ()
        flat = (*inner, math.prod(shape[self.num_inner :]))
        return flat[::-1] if self.form == "out_in" else flat

    def joined_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """Returns the shape of the file's tensor, given those of its params."""
        parts = [self.file_shape(shape) for shape in shapes]
        whole = list(parts[0])
        if len(parts) > 1:
            whole[self.joined_axis] = sum(part[self.joined_axis] for part in parts)
        return tuple(whole)

    def decode(self, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Returns a param of this shape as a view of its part of the file's tensor; of "minus_one" the 1 is missing."""
        if self.form == "reversed":
            return x.T
        if self.form == "out_in":
            inner = shape[: self.num_inner]
            outer = len(shape) - len(inner)
            x = x.reshape(*shape[self.num_inner :], *inner)
            return x.transpose(*range(outer, len(shape)), *range(outer))
        return x.reshape(shape)

    def encode(self, param: np.ndarray) -> np.ndarray:
        """Returns a param as its part of the file's tensor."""
        if self.form == "minus_one":
            return param - np.asarray(1, param.dtype)
        if self.form == "reversed":
            return param.T
        if self.form == "out_in":
            return param.reshape(self.file_shape(param.shape)[::-1]).T
        return param.reshape(self.file_shape(param.shape))


def linear(file: str, *params: str, num_inner: int = 1, form: str = "out_in") -> tuple[Tensor, ...]:
    """Returns the weight and the bias of a projection, or of several that the file holds as one.

    Args:
      file: "...q_proj", without ".weight".
      *params: "...query", without ".kernel".
      num_inner: axes of the kernel that are inputs.
      form: of the kernel: "out_in" as torch's Linear has it, "in_out" as the Conv1D of GPT-2.
    """
    weight = Tensor(f"{file}.weight", tuple(f"{name}.kernel" for name in params), form, num_inner)
    return weight, Tensor(f"{file}.bias", tuple(f"{name}.bias" for name in params), "in_out")


def norm(file: str, params: str, form: str = "same") -> tuple[Tensor, ...]:
    """Returns the scale of a norm, and the bias if it is a LayerNorm; `form` "minus_one" is Gemma's."""
    return Tensor(f"{file}.weight", (f"{params}.scale",), form), Tensor(f"{file}.bias", (f"{params}.bias",))


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models.

    Args:
      config: from the fields of config.json to the config of the module.
      tensors: what its checkpoints hold.
      defaults: fields that a config.json of this family may leave out.
      required: what a field must be for the model to be one that we compute; another value is refused.
      renames: (pattern, replacement) pairs, applied to the names in a file before `tensors` is asked.
      ignored: patterns of names in a file that hold nothing the model needs.
      module: the class that is made from the config.
    """

    config: Callable[[Fields], Any]
    tensors: tuple[Tensor, ...]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    required: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    module: Any = Decoder


class Fields:
    """The fields of a config.json, which complain by name.

    Args:
      source: the parsed file.
      context: how many tokens sequences may reach; None: as many as the model was made for.

    Raises:
      NotSupportedError: for a field in `family.required` that has another value.

    >>> Fields({"model_type": "llama", "hidden_act": "swish"}).activation("hidden_act")
    'silu'
    """

    def __init__(self, source: Mapping[str, Any], family: Family | None = None, context: int | None = None) -> None:
        self.context = context
        self._source = {**family.defaults, **source} if family else dict(source)
        for name, allowed in (family.required if family else {}).items():
            if name in source and source[name] not in allowed:
                raise self.refusal(name, f"only {' or '.join(map(repr, allowed))} is")

    def __getitem__(self, name: str) -> Any:
        value = self._source.get(name)
        if value is None:
            raise ValueError(f'config.json has no "{name}", which a {self._source.get("model_type")} model needs')
        return value

    def get(self, name: str, default: Any = None) -> Any:
        """Returns a field, or `default` where it is missing or null."""
        value = self._source.get(name)
        return default if value is None else value

    def refusal(self, name: str, but: str) -> NotSupportedError:
        """Returns the error for a field whose value is not supported; `but` says what is."""
        value = self._source.get(name)
        return NotSupportedError(f'config.json has "{name}": {value!r}, which is not supported; {but}')

    def activation(self, name: str) -> str:
        """Returns our name of the activation in a field."""
        if self[name] not in ACTIVATIONS:
            raise self.refusal(name, f"known are {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[self[name]]

    def reaches(self, pattern: Sequence[str]) -> tuple[Reach, ...]:
        """Returns what each layer sees, from `layer_types` and `sliding_window`.

        Args:
          pattern: layer types where config.json has none, repeated as often as needed.
        """
        layers, window = int(self["num_hidden_layers"]), self.get("sliding_window")
        kinds = self.get("layer_types") or [pattern[i % len(pattern)] for i in range(layers)]
        if window is None and "sliding_attention" in kinds:
            raise ValueError('config.json has layers of "sliding_attention" but no "sliding_window"')
        known = {"full_attention": Full(), "sliding_attention": Full() if window is None else Window(window)}
        if not set(kinds) <= set(known):
            raise self.refusal("layer_types", f"known are {', '.join(known)}")
        if len(kinds) != layers:
            raise ValueError(f'config.json has {len(kinds)} "layer_types" for {layers} layers ("num_hidden_layers")')
        return tuple(known[kind] for kind in kinds)

    def rotary(self, head_dim: int, *, kind: str | None = None, theta: float = 10_000.0) -> Rotary:
        """Returns how queries and keys are turned.

        Reads `rope_parameters`, as transformers 5 writes it, or `rope_scaling` and `rope_theta`, as was usual before.

        Args:
          head_dim: size of a head.
          kind: the layer type whose parameters are meant, for models that have several.
          theta: where config.json says nothing.
        """
        name = "rope_parameters" if self.get("rope_parameters") is not None else "rope_scaling"
        given = dict(self.get(name, {}))
        if kind is not None and isinstance(given.get(kind), dict):
            given = dict(given[kind])
        theta = float(given.get("rope_theta") or self.get("rope_theta", theta))
        part = float(given.get("partial_rotary_factor") or self.get("partial_rotary_factor", 1.0))
        dim = int(head_dim * part)
        return Rotary(theta, dim=None if dim == head_dim else dim, scaling=self._scaling(name, given))

    def _scaling(self, name: str, given: dict[str, Any]) -> Scaling | None:
        kind = given.get("rope_type", given.get("type", "default"))
        if self.get("model_type") == "phi3" and kind in ("su", "yarn"):  # what early checkpoints call it
            kind = "longrope"
        known = ("default", "linear", "llama3", "yarn", "longrope")
        if kind not in known:
            raise self.refusal(name, f'"rope_type" is one of {", ".join(known)}')
        if kind == "default":
            return None

        def number(field: str) -> Any:
            if given.get(field) is None:
                raise ValueError(f'config.json: "{name}" of type "{kind}" has no "{field}"')
            return given[field]

        if kind == "linear":
            return LinearScaling(number("factor"))
        longest = self.get("max_position_embeddings")
        original = given.get("original_max_position_embeddings") or self.get(
            "original_max_position_embeddings", longest
        )
        if kind == "llama3":
            return Llama3Scaling(number("factor"), number("low_freq_factor"), number("high_freq_factor"), original)
        if kind == "yarn":
            rest = {key: given[key] for key in ("attention_factor", "mscale", "mscale_all_dim") if given.get(key)}
            fast, slow = given.get("beta_fast") or 32.0, given.get("beta_slow") or 1.0
            return YarnScaling(number("factor"), original, fast, slow, truncate=given.get("truncate", True), **rest)
        is_long = (longest if self.context is None else self.context) > original
        factors = tuple(map(float, number("long_factor" if is_long else "short_factor")))
        factor = given.get("factor") or max(longest / original, 1.0)
        return LongRopeScaling(factors, factor, original, given.get("attention_factor"))
