"""The fields of config.json and its like: each declared once, with what it may be, all checked before any is used."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from jaxkv.errors import NotSupportedError

_NEEDED: Any = object()
_AS_MISSING: Any = object()


class Problems:
    """What is found wrong with a config.json, to be raised as one error.

    Args:
      where: the file, for the error.
      model: "a llama model", for the error.
    """

    def __init__(self, where: str, model: str) -> None:
        self.where, self.model = where, model
        self._wrong: list[str] = []
        self._unsupported: list[str] = []

    def wrong(self, name: str, value: Any, must: str, how: str = "") -> None:
        """Notes a value that the field can't have; `must` says what it can be, `how` how the field came by it."""
        self._wrong.append(f'"{name}" is {_shown(value)}{how}; {must}')

    def missing(self, name: str) -> None:
        """Notes a field without which there is no model."""
        self._wrong.append(f'there is no "{name}", which {self.model} needs')

    def unsupported(self, name: str, value: Any, but: str) -> None:
        """Notes a value that makes sense, but is not computed here; `but` says what is."""
        self._unsupported.append(f'"{name}" is {_shown(value)}, which is not supported; {but}')

    def __len__(self) -> int:
        return len(self._wrong) + len(self._unsupported)

    def error(self) -> Exception:
        """Returns all that was noted: a NotSupportedError if each value makes sense, else a ValueError."""
        lines = self._wrong + self._unsupported
        told = f" {lines[0]}" if len(lines) == 1 else "".join(f"\n  {line}" for line in lines)
        message = f"{self.where} can't be read as {self.model}:{told}"
        if self._wrong:
            return ValueError(f"{message}\nCorrect the file, or download it again.")
        return NotSupportedError(message)


class Kind(Protocol):
    """What values a field may have."""

    def read(self, name: str, value: Any, problems: Problems) -> Any:
        """Returns a value as the families use it; notes a problem, and returns anything, if the field can't have it."""


@dataclasses.dataclass(frozen=True)
class Number:
    """A number from `least` to `most`; a whole one may be written as 4096.0. `what` says it better, for errors."""

    least: float
    most: float
    whole: bool = False
    what: str = ""

    def read(self, name: str, value: Any, problems: Problems) -> Any:
        # NaN and the infinities fail the comparison; integers of any length pass it without becoming floats.
        if isinstance(value, int | float) and not isinstance(value, bool) and self.least <= value <= self.most:
            number = int(value) if self.whole else float(value)
            if number == value or not self.whole:
                return number
        kind = "a whole number" if self.whole else "a number"
        problems.wrong(name, value, f"it must be {self.what or f'{kind} from {self.least} to {self.most}'}")
        return None


@dataclasses.dataclass(frozen=True)
class Flag:
    """true or false; "false" in quotes is neither."""

    def read(self, name: str, value: Any, problems: Problems) -> Any:
        if not isinstance(value, bool):
            problems.wrong(name, value, "it must be true or false, without quotes")
        return value


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of some names, each of which stands for a value of ours."""

    known: Mapping[str, Any]

    def read(self, name: str, value: Any, problems: Problems) -> Any:
        if not isinstance(value, str):
            problems.wrong(name, value, f"it must be a name such as {_shown(next(iter(self.known)))}")
        elif value not in self.known:
            problems.unsupported(name, value, f"known are {', '.join(self.known)}")
        else:
            return self.known[value]
        return None


@dataclasses.dataclass(frozen=True)
class Text:
    """A string, not an empty one."""

    def read(self, name: str, value: Any, problems: Problems) -> Any:
        if not isinstance(value, str) or not value:
            problems.wrong(name, value, "it must be a string, not an empty one")
        return value


@dataclasses.dataclass(frozen=True)
class List:
    """A list of at least `least` and at most `most` values of one kind, read as a tuple."""

    kind: Kind
    most: int
    least: int = 0
    one: bool = False  # whether a value alone stands for a list of one

    def read(self, name: str, value: Any, problems: Problems) -> Any:
        if self.one and not isinstance(value, list | tuple):
            return (self.kind.read(name, value, problems),)
        if not isinstance(value, list | tuple) or not self.least <= len(value) <= self.most:
            size = f"{self.least} to {self.most}" if self.least else f"at most {self.most}"
            problems.wrong(name, value, f"it must be a list of {size} values")
            return ()
        read, before = [], len(problems)
        for i, item in enumerate(value):
            read.append(self.kind.read(f"{name}[{i}]", item, problems))
            if len(problems) > before:
                break  # the others are likely to be wrong in the same way
        return tuple(read)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A list of two values, each of a kind of its own, read as a tuple."""

    kinds: tuple[Kind, Kind]

    def read(self, name: str, value: Any, problems: Problems) -> Any:
        if not isinstance(value, list | tuple) or len(value) != 2:
            problems.wrong(name, value, "it must be a list of two values")
            return (None, None)
        pairs = enumerate(zip(self.kinds, value, strict=True))
        return tuple(kind.read(f"{name}[{i}]", item, problems) for i, (kind, item) in pairs)


@dataclasses.dataclass(frozen=True)
class OrNull:
    """A value of a kind, or null: in a list, where it has a place of its own."""

    kind: Kind

    def read(self, name: str, value: Any, problems: Problems) -> Any:
        return None if value is None else self.kind.read(name, value, problems)


@dataclasses.dataclass(frozen=True)
class Object:
    """An object, of which these fields are looked at; read as a dict of those that are there and not null."""

    kinds: Mapping[str, Kind] = dataclasses.field(default_factory=dict)

    def read(self, name: str, value: Any, problems: Problems) -> Any:
        if not isinstance(value, Mapping):
            problems.wrong(name, value, "it must be an object, {...}")
            return {}
        given = {key: kind for key, kind in self.kinds.items() if value.get(key) is not None}
        return {key: kind.read(f"{name}.{key}", value[key], problems) for key, kind in given.items()}


@dataclasses.dataclass(frozen=True)
class ByLayer:
    """An object with numbers of layers as keys, each with an object of which these fields may be there and no others.

    Read as a dict of dicts, by number.
    """

    kinds: Mapping[str, Kind]

    def read(self, name: str, value: Any, problems: Problems) -> Any:
        if not isinstance(value, Mapping) or not all(str(key).isdecimal() for key in value):
            problems.wrong(name, value, 'it must be an object with numbers of layers as keys, {"0": {...}}')
            return {}
        one, read = Object(self.kinds), {}
        for key, given in value.items():
            read[int(key)] = one.read(f"{name}.{key}", given, problems)
            for other in set(given if isinstance(given, Mapping) else ()) - set(self.kinds):
                known = " and ".join(self.kinds)
                problems.unsupported(f"{name}.{key}.{other}", given[other], f"layers may differ in {known}")
        return read


@dataclasses.dataclass(frozen=True)
class Names:
    """An object of at most `most` fields of any names, all values of one kind; read as a dict."""

    kind: Kind
    most: int

    def read(self, name: str, value: Any, problems: Problems) -> Any:
        if not isinstance(value, Mapping) or len(value) > self.most:
            problems.wrong(name, value, f"it must be an object, {{...}}, of at most {self.most} fields")
            return {}
        return {key: self.kind.read(f"{name}.{key}", item, problems) for key, item in value.items()}


# Bounds that no model comes near: they keep what is not a size from being built. Positions are int32.
MAX_LAYERS = 1024
LAYERS = Number(1, MAX_LAYERS, whole=True)
HEADS = Number(1, 2**14, whole=True)
WIDTH = Number(1, 2**20, whole=True)
VOCABULARY = Number(1, 2**24, whole=True)
MAX_LENGTH = 2**30
LENGTH = Number(1, MAX_LENGTH, whole=True)
TABLE = Number(1, 2**24, whole=True)  # positions that are learned
POSITIVE = Number(1e-30, 1e30, what="a number above 0")  # in float32, and so is its root
EPSILON = Number(0, 1)
FLAG = Flag()
# transformers' names of activations, and those of DecoderConfig.
ACTIVATION = Choice(
    {
        "silu": "silu",
        "swish": "silu",
        "gelu": "gelu",
        "gelu_python": "gelu",
        **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate"), "gelu_tanh"),
        "relu": "relu",
    }
)


@dataclasses.dataclass(frozen=True)
class Field:
    """What a field of a config.json may be.

    Args:
      kind: its values.
      default: its value, as the file would have it, where the file has none; a field without one is needed.
      null: its value where the file has null; left out: as if the field were missing.
      only: the values that are computed here; empty: all.
      also: older names of it. What the file has under one of them is what counts, as in transformers.
      counts: for a number of layers, or of experts: how the names of their tensors begin in the files, with {} for the
        number, which is the last one.
      counted: what is counted so, for errors.
    """

    kind: Kind
    default: Any = _NEEDED
    null: Any = _AS_MISSING
    only: tuple[Any, ...] = ()
    also: tuple[str, ...] = ()
    counts: str = ""
    counted: str = "layers"

    def read(self, name: str, source: Mapping[str, Any], problems: Problems) -> Any:
        """Returns the value of the field in a parsed config.json."""
        name = next((old for old in reversed(self.also) if source.get(old) is not None), name)
        value = source.get(name)
        if value is None:
            value = self.null if name in source and self.null is not _AS_MISSING else self.default
            if value is _NEEDED:
                problems.missing(name)
                return None
        if value is None:
            return None
        before = len(problems)
        read = self.kind.read(name, value, problems)
        if self.only and read not in self.only and len(problems) == before:
            problems.unsupported(name, value, f"only {' or '.join(map(_shown, self.only))} is")
        return read


class Fields(Mapping[str, Any]):
    """The declared fields of a config.json, all of them checked. Others are ignored.

    Args:
      source: the parsed file.
      declared: what its fields may be.
      context: how many tokens sequences may reach; None: as many as the model was made for.
      where: the file, for errors.
      what: what it is, for errors; empty: a model of the type that it names.

    Raises:
      ValueError: naming every field that is missing or has a value that it can't have.
      NotSupportedError: naming every field whose value is not computed here.

    >>> declared = {"hidden_size": Field(WIDTH), "hidden_act": Field(ACTIVATION, "silu")}
    >>> fields = Fields({"model_type": "llama", "hidden_size": 64.0}, declared)
    >>> fields["hidden_size"], fields["hidden_act"]
    (64, 'silu')
    """

    def __init__(
        self,
        source: Mapping[str, Any],
        declared: Mapping[str, Field],
        context: int | None = None,
        where: str = "config.json",
        what: str = "",
    ) -> None:
        self.context, self.where = context, where
        self._source, self._model = source, what or f"a {source.get('model_type')} model"
        problems = Problems(where, self._model)
        self._values = {name: field.read(name, source, problems) for name, field in declared.items()}
        if problems:
            raise problems.error()

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def wrong(self, name: str, must: str) -> Exception:
        """Returns the error for a field that does not go with the others; `must` says what does."""
        problems = Problems(self.where, self._model)
        given = self._source.get(name)
        by_default = given is None and self._values.get(name) is not None
        problems.wrong(name, self._values[name] if by_default else given, must, " by default" if by_default else "")
        return problems.error()

    def unsupported(self, name: str, but: str) -> Exception:
        """Returns the error for a field that is not computed here together with the others; `but` says what is."""
        problems = Problems(self.where, self._model)
        problems.unsupported(name, self._source.get(name), but)
        return problems.error()


def _shown(value: Any) -> str:
    """Returns a value as the file has it, but its beginning alone if it is long."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else f"{text[:60]}..."
