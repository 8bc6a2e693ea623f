"""The files of a checkpoint directory: JSON, and tensors in one safetensors file or several. Whoever they come from."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxkv import regular, safetensors, whole

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"  # of peft
_OTHER_FORMS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
_FETCH = "fetch the checkpoint as safetensors, or save it so with transformers: model.save_pretrained(DIR)"
_MERGE = "merge it into its model with peft: model.merge_and_unload().save_pretrained(DIR); and give DIR"
MOST_JSON = 10_000_000  # bytes of a file of settings
MOST_LISTED = 100_000_000  # of one that lists tokens or tensors


def config_path(directory: str | os.PathLike[str]) -> Path:
    """Returns where the config.json of a checkpoint directory is.

    Raises:
      FileNotFoundError: if there is none, saying what to do: for a model of the Hugging Face hub, for a file in it, for
        the hub's cache.
    """
    given, folder = os.fspath(directory) or ".", Path(directory).expanduser()
    if os.path.lexists(folder / "config.json"):
        return folder / "config.json"
    if folder.is_dir():
        snapshots = sorted((folder / "snapshots").glob("*/config.json"))
        if snapshots:
            raise FileNotFoundError(
                f"{given} is a folder of the hub's cache; the checkpoint lies in {snapshots[-1].parent}"
            )
        inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
        cure = (
            f"; give one of the directories in it that have one: {some(inside)}"
            if inside
            else _in_other_form(folder)
            or "; give a directory as Hugging Face publishes them: hf download NAME --local-dir DIR"
        )
        raise FileNotFoundError(f"{given} has no config.json{cure}")
    if folder.exists():
        if folder.suffix in _OTHER_FORMS:
            raise FileNotFoundError(f"{given} is a {folder.suffix} file, which can't be read; {_FETCH}")
        raise FileNotFoundError(f"{given} is a file; give the directory that holds it, with its config.json")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", given):
        name = given.split("/")[1]
        raise FileNotFoundError(
            f"{given} is not a directory here; if it is a model of the Hugging Face hub, fetch it first: "
            f"hf download {given} --local-dir {name}; then give {name} instead"
        )
    raise FileNotFoundError(
        f"{given} is not a directory; give one that holds a checkpoint: config.json, model.safetensors, tokenizer.json"
    )


def _in_other_form(folder: Path) -> str:
    """Returns what a folder without a checkpoint holds instead and what to do about it; nothing if nobody can tell."""
    if (folder / ADAPTER).exists():
        base = read_json(folder / ADAPTER).get("base_model_name_or_path")
        of = f" of {reprlib.repr(base)}" if isinstance(base, str) and base else ""
        return f"; it holds an adapter{of}, not a model: {_MERGE}"
    found = sorted(path.name for path in folder.glob("*") if path.suffix in _OTHER_FORMS)
    return f"; {some(found)} can't be read: {_FETCH}" if found else ""


def read_text(path: Path, *, most: int = MOST_JSON) -> str:
    """Returns the text in a file; a byte order mark is left out.

    Raises:
      FileNotFoundError: if it isn't there.
      ValueError: if it is not a regular file, has more than `most` bytes, or is not UTF-8.
    """
    content = regular.read(path, most)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}; fetch it again, or save it in UTF-8") from error


def read_json(path: Path, *, needed: bool = True, most: int = MOST_JSON) -> dict[str, Any]:
    """Returns the object in a file; if it isn't there and not needed, an empty one.

    Raises:
      FileNotFoundError: if it isn't there and needed.
      ValueError: if it is not a regular file, has more than `most` bytes, or is not a JSON object: not UTF-8, nested
        too deeply, with a number that no float holds, or with a name that is given two values.
    """
    try:
        text = read_text(path, most=most)
    except FileNotFoundError:
        if not needed:
            return {}
        raise
    try:
        parsed = json.loads(text, object_pairs_hook=_settled, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}; fetch it again, or correct it") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{path} holds a {type(parsed).__name__}, must be an object")
    return parsed


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an object into a file, whole or not at all."""
    with whole.written(path) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


class Files(Mapping[str, np.ndarray]):
    """The tensors of a directory, in one safetensors file or several: a mapping from names to read-only arrays.

    A model.safetensors is read alone, as transformers does: an index beside it is an old one.

    Args:
      directory: with model.safetensors, or model.safetensors.index.json and what it names.

    Attributes:
      notes: files and tensors that are not read, a line each.

    Raises:
      OSError: if there is neither, or a file that the index names is missing.
      ValueError: for files that are damaged, an index that names files elsewhere, and two tensors of one name.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.notes: list[str] = []
        self._file_of: dict[str, safetensors.File] = {}
        index = self.directory / INDEX
        if os.path.lexists(self.directory / SINGLE):
            names = [SINGLE]
            if index.exists():
                self.notes.append(f"{INDEX} is not read: {SINGLE} lies beside it")
        elif os.path.lexists(index):
            names = _shards(index)
        else:
            others = sorted(path.name for path in self.directory.glob("*.safetensors*"))
            found = (
                _in_other_form(self.directory)
                or (f", only {some(others)}" if others else "")
                + "; fetch the rest of the checkpoint: hf download NAME --local-dir DIR"
            )
            raise FileNotFoundError(f"{self.directory} holds neither {SINGLE} nor {INDEX}{found}")
        if (self.directory / ADAPTER).exists():
            self.notes.append(f"{ADAPTER}: the adapter that lies here is not applied; {_MERGE}")
        for name in names:
            file = safetensors.File(self.directory / name)
            for tensor in file:
                self._settle(tensor, file)

    def _settle(self, tensor: str, file: safetensors.File) -> None:
        """Takes a tensor in; one that an earlier file has too is the same, or refused."""
        first = self._file_of.setdefault(tensor, file)
        if first is not file and not (
            (first.shape(tensor), first.kind(tensor)) == (file.shape(tensor), file.kind(tensor))
            and np.array_equal(first[tensor].reshape(-1).view(np.uint8), file[tensor].reshape(-1).view(np.uint8))
        ):
            raise ValueError(
                f"{first.path} and {file.path.name} both hold {reprlib.repr(tensor)}, with other numbers; delete the "
                "file that is not of this checkpoint, or fetch it again"
            )

    def __getitem__(self, name: str) -> np.ndarray:
        return self._file_of[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        return self._file_of[name].shape(name)

    def kind(self, name: str) -> Any:
        """Returns the dtype of a tensor."""
        return self._file_of[name].kind(name)

    def nbytes(self, name: str) -> int:
        """Returns how many bytes a tensor has."""
        return math.prod(self.shape(name)) * self.kind(name).itemsize

    @property
    def dtypes(self) -> dict[str, int]:
        """How many parameters there are of each dtype."""
        counts: dict[str, int] = {}
        for name, file in self._file_of.items():
            kind = file.kind(name).name
            counts[kind] = counts.get(kind, 0) + math.prod(file.shape(name))
        return counts

    @property
    def dtype(self) -> Any:
        """The floating dtype of most parameters; float32 if there is none."""
        floating = {name: n for name, n in self.dtypes.items() if is_floating(jnp.dtype(name))}
        return jnp.dtype(max(floating, key=lambda name: floating[name], default="float32"))


def fingerprint(directory: str | os.PathLike[str]) -> str:
    """Returns a text that tells a checkpoint from others: what `Cache.save` and `Cache.load` compare.

    It is SHA-256 of config.json, and of the name, dtype, shape and first 1,024 bytes of each tensor, so that nearly
    nothing is read; training that changes no tensor there, and a tokenizer, make no difference.

    Args:
      directory: of a checkpoint, as for `jaxkv.models.load`.

    Raises:
      OSError, ValueError: for a file that is missing or damaged.

    >>> from jaxkv.models import tiny
    >>> len(jaxkv.models.fingerprint(tiny.PATH.parent))
    64
    """
    directory = Path(directory).expanduser()
    files, digest = Files(directory), hashlib.sha256()
    config = read_json(directory / "config.json", needed=False)
    digest.update(json.dumps(config, sort_keys=True).encode())
    for name in sorted(files):
        digest.update(json.dumps([name, files.kind(name).name, files.shape(name)]).encode())
        digest.update(files[name].reshape(-1)[:1024].view(np.uint8)[:1024].tobytes())
    return digest.hexdigest()


def is_floating(kind: Any) -> bool:
    """Returns whether a dtype is one that parameters have; those of one byte are quantized."""
    return jnp.issubdtype(kind, jnp.floating) and kind.itemsize > 1


def _shards(index: Path) -> list[str]:
    """Returns the files that an index names, all of them in its directory."""
    weight_map = read_json(index, most=MOST_LISTED).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f'{index}: "weight_map" is {reprlib.repr(weight_map)}, must be an object of names of tensors and files; '
            "fetch it again"
        )
    names = []
    for name in dict.fromkeys(file if isinstance(file, str) else repr(file) for file in weight_map.values()):
        path = PurePath(name)
        if path.is_absolute() or ".." in path.parts or not name.isprintable() or path.suffix != ".safetensors":
            raise ValueError(
                f'{index}: "weight_map" names the file {reprlib.repr(name)}, must be a .safetensors file in its own '
                "directory; fetch the index again"
            )
        names.append(name)
    names.sort()
    missing = [name for name in names if not (index.parent / name).exists()]
    if missing:
        raise FileNotFoundError(
            f"{index} names {len(names)} files, of which these are not there: {some(missing)}; fetch the rest of the "
            "checkpoint"
        )
    return names


def some(names: list[str]) -> str:
    """Returns the first of some names, and how many more there are, for errors."""
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _settled(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns an object of which no name has two values."""
    found = dict(pairs)
    if len(found) < len(pairs):
        for name, value in pairs:
            last = found[name]
            if type(value) is not type(last) or value != last:
                values = " and ".join(map(reprlib.repr, (value, last)))
                raise ValueError(f"{reprlib.repr(name)} has two values, {values}; keep one")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{reprlib.repr(text)} is larger than any float")
    return number
