"""What a family's table is made of: which of our fields its config.json fills, which of our params its tensors are."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxkv.models.decoder import Decoder
from jaxkv.models.families import rope
from jaxkv.models.families.fields import Field, Fields

FORMS = ("same", "minus_one", "reversed", "in_out", "out_in")


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
      packed: whether it may lie in the file in MXFP4, as `file` + "_blocks" and `file` + "_scales".

    >>> kernel = Tensor("q_proj.weight", ("query.kernel",), "out_in", num_inner=1)
    >>> kernel.file_shape((24, 4, 8)), kernel.decode(np.ones((32, 24)), (24, 4, 8)).shape
    ((32, 24), (24, 4, 8))
    """

    file: str
    params: tuple[str, ...]
    form: str = "same"
    num_inner: int = 0
    packed: bool = False

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
class Ignored:
    """Tensors of a file of which no param is made.

    Args:
      pattern: of their names; its group, if there is one, is the number of the layer.
      note: what users are told where such a tensor doesn't agree.
      agrees: (config, number of the layer or 0, array) -> whether it holds what is computed in its place. None: nothing
        is, for it belongs to another part of the model.
    """

    pattern: str
    note: str
    agrees: Callable[[Any, int, np.ndarray], bool] | None = None


# What models of any family had among their buffers once.
POSITIONS = Ignored(
    r"(?:.*\.)?position_ids",
    "not 0, 1, 2 and so on, which is what positions are",
    lambda config, layer, x: x.dtype.kind in "iu" and np.array_equal(x.reshape(-1), np.arange(x.size)),
)


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models.

    Args:
      config: from the fields of config.json to the config of the module.
      fields: what those fields may be. Others are passed over.
      tensors: what its checkpoints hold.
      context: from the fields to how long sequences may be.
      part: the field that holds the fields, in files that describe several models.
      quantized: the methods of quantization whose weights can be read, as "quant_method" names them.
      renames: (pattern, replacement) pairs, applied to the names in a file before `tensors` is asked.
      ignored: tensors of a file that hold nothing the model needs.
      module: the class that is made from the config.
    """

    config: Callable[[Fields], Any]
    fields: Mapping[str, Field]
    tensors: tuple[Tensor, ...]
    context: Callable[[Fields], int] = rope.context
    part: str | None = None
    quantized: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[Ignored, ...] = ()
    module: Any = Decoder

    def known_as(self, name: str) -> str:
        """Returns the name by which `tensors` knows a tensor of a file."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name
