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

FORMS = ("same", "minus_one", "reversed", "in_out", "out_in", "interleaved")
_JOINED = FORMS[3:]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint: which params it holds, and in which form. Skipped if the model has none of them.

    Args:
      file: its name there, with {} for the number of the layer.
      params: names of our params; several are joined along the output axis, in this order.
      form: "same": of the same shape; "minus_one": the same, of which 1 was subtracted (scales); "reversed": all axes
        the other way round (convolutions); "in_out" and "out_in": all axes of the input as one and all of the output as
        one, in this order (ours have an axis for heads); "interleaved": as "in_out", but joined params take turns.
      num_inner: for the last three, how many leading axes of our param are input; none for a bias.
      experts: whether the first axis of our param is that of experts, which the file has too: before all others, or,
        if `file` has a second {}, for the number of the expert, as a tensor for each.
      packed: whether it may lie in the file in MXFP4, as `file` + "_blocks" and `file` + "_scales".
      exact: whether it keeps its dtype, whatever that of the others in a file is.

    >>> kernel = Tensor("q_proj.weight", ("query.kernel",), "out_in", num_inner=1)
    >>> kernel.file_shape((24, 4, 8)), kernel.decode(np.ones((32, 24)), (24, 4, 8)).shape
    ((32, 24), (24, 4, 8))
    """

    file: str
    params: tuple[str, ...]
    form: str = "same"
    num_inner: int = 0
    experts: bool = False
    packed: bool = False
    exact: bool = False

    def __post_init__(self) -> None:
        if self.form not in FORMS or (len(self.params) > 1 and self.form not in _JOINED):
            raise ValueError(
                f"{self}: form is one of {', '.join(FORMS)}, and several params are joined in the last three"
            )

    @property
    def is_each(self) -> bool:
        """Whether each expert has a tensor of its own."""
        return self.experts and self.file.count("{}") > 1

    @property
    def joined_axis(self) -> int:
        """Along which axis of the file's tensor several params are joined."""
        return -2 if self.form == "out_in" and self.num_inner else -1

    def stretch(self, number: int, shapes: Sequence[tuple[int, ...]]) -> slice | None:
        """Returns which part of the joined axis is that of one of the params; None if there is but one.

        Args:
          number: which one.
          shapes: of all of them.
        """
        if len(shapes) == 1:
            return None
        if self.form == "interleaved":
            return slice(number, None, len(shapes))
        sizes = [self.file_shape(shape)[self.joined_axis] for shape in shapes]
        return slice(sum(sizes[:number]), sum(sizes[: number + 1]))

    def file_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape in the file of one param of this shape."""
        if self.form in ("same", "minus_one"):
            return shape
        if self.form == "reversed":
            return shape[::-1]
        lead, shape = shape[: self.experts], shape[self.experts :]
        inner = (math.prod(shape[: self.num_inner]),) if self.num_inner else ()
        flat = (*inner, math.prod(shape[self.num_inner :]))
        return (*lead, *(flat[::-1] if self.form == "out_in" else flat))

    def joined_shape(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """Returns the shape of the file's tensor, or of one for each expert stacked, given those of its params."""
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
            lead, inner = shape[: self.experts], shape[self.experts :][: self.num_inner]
            outer = shape[len(lead) + len(inner) :]
            x = x.reshape(*lead, *outer, *inner)
            begin, middle = len(lead), len(lead) + len(outer)
            return x.transpose(*range(begin), *range(middle, x.ndim), *range(begin, middle))
        return x.reshape(shape)

    def encode(self, params: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the file's tensor of all its params."""
        parts = [self._encoded(param) for param in params]
        if len(parts) == 1:
            return parts[0]
        if self.form == "interleaved":
            return np.stack(parts, axis=-1).reshape(*parts[0].shape[:-1], -1)
        return np.concatenate(parts, self.joined_axis)

    def _encoded(self, param: np.ndarray) -> np.ndarray:
        shape = self.file_shape(param.shape)
        if self.form == "minus_one":
            return param - np.asarray(1, param.dtype)
        if self.form == "reversed":
            return param.T
        if self.form == "out_in":
            middle = self.experts + self.num_inner
            axes = (*range(self.experts), *range(middle, param.ndim), *range(self.experts, middle))
            return param.transpose(axes).reshape(shape)
        return param.reshape(shape)


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
      fields: what those fields may be. Others are ignored.
      tensors: what its checkpoints hold, and what `save` writes.
      others: the same params under other names or in other forms, for files that don't have those of `tensors`.
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
    others: tuple[Tensor, ...] = ()
    context: Callable[[Fields], int] = rope.context
    part: str | None = None
    quantized: tuple[str, ...] = ("fp8",)
    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[Ignored, ...] = ()
    module: Any = Decoder

    def known_as(self, name: str) -> str:
        """Returns the name by which `tensors` knows a tensor of a file."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name
