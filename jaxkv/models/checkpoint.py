"""Checkpoints as Hugging Face publishes them: a directory with config.json and safetensors, into a Model and back.

What config.json asks for is checked before any weight is read. Weights are read through a memory map, tensor by tensor,
straight into their place: beside the model there is one tensor in memory at most.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxkv import safetensors
from jaxkv.logs import log
from jaxkv.models import fp8
from jaxkv.models.config import check_layers, context_of, quantization, read_config, text_fields
from jaxkv.models.families import FAMILIES
from jaxkv.models.families.table import Tensor
from jaxkv.models.files import INDEX, SINGLE, Files, config_path, is_floating, write_json
from jaxkv.models.generation import GenerationConfig
from jaxkv.models.model import Model, abstract
from jaxkv.models.places import Contents, entries
from jaxkv.models.tokenizer import Tokenizer
from jaxkv.nn.leaves import name_of, named


def load(
    directory: str | os.PathLike[str],
    *,
    dtype: Any = None,
    sharding: Any = None,
    context: int | None = None,
    fuse: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Returns the model of a checkpoint directory, ready to generate texts.

    Where files and config.json differ and one of them is right, it is taken: as transformers would. Each such choice is
    a line of `Model.notes`, and a warning of the logger "jaxkv".

    Args:
      directory: with config.json and model.safetensors, or several files and their index; tokenizer.json and
        generation_config.json if they are there.
      dtype: of the parameters and the computation; None takes that of most parameters in the checkpoint, and float32
        for float64. Scales of norms of which the checkpoint holds scale - 1 stay float32.
      sharding: None, a `jax.sharding.Sharding` for all parameters, or a function (name, shape) -> Sharding such as
        `tensor_parallel(mesh)`. Each device then reads its own part.
      context: how many tokens sequences may reach; None: as many as the model was made for. Only LongRoPE (Phi-3 with
        long contexts) computes differently for it: beyond the original length with its long factors.
      fuse: whether weights are laid out for decoding on one CPU, see `jaxkv.nnx.fuse`. Such a model can't be saved.
      progress: called with (bytes read, bytes in all) after each tensor.

    Raises:
      OSError: if a file is missing or can't be opened; FileNotFoundError says how to get it.
      NotSupportedError: for a family or a feature that is not computed here; before any weight is read.
      ValueError: for a file that is damaged or not a regular one; naming every tensor that is missing, unknown or of
        another shape or kind.

    ```python
    model = jaxkv.models.load("Llama-3.2-1B-Instruct", dtype="bfloat16")
    print(model.generate("The capital of France is", max_new_tokens=50).text)
    print(model.generate([{"role": "user", "content": "Where is Paris?"}]).text)
    ```
    """
    name, config, source = read_config(config_path(directory), context=context)
    directory = Path(directory).expanduser()
    generation = GenerationConfig.read(directory)
    block = fp8.block_of(quantization(source), str(directory / "config.json"))
    files = Files(directory) if block is None else fp8.ScaledFiles(directory, block)
    check_layers(source, files, directory / "config.json")
    family = FAMILIES[name]
    contents = Contents(family, files)
    config = _with_dtype(config, _computed(files.dtype if dtype is None else dtype, given=dtype is not None))
    notes = list(files.notes)
    if config.tied and not contents.is_tied(config.dtype):
        config = dataclasses.replace(config, tied=False)
        notes.append(
            'config.json has "tie_word_embeddings": true, but the files hold an output head of other numbers than the '
            "embedding: that head is used, as in transformers"
        )
    module = abstract(family.module, config)
    state = nnx.state(module)
    places = contents.places(named(state))
    notes += contents.notes(config)
    for line in notes:
        log.warning("%s: %s", directory, line)
    done, total = 0, sum(place.nbytes for place in places.values())

    def fetch(path: Any, like: Any) -> Any:
        nonlocal done
        name = name_of(path)
        array = places[name].read(files, like, None if sharding is None else _sharding_of(sharding, name, like))
        done += places[name].nbytes
        if progress is not None:
            progress(done, total)
        return array

    nnx.update(module, jax.tree_util.tree_map_with_path(fetch, state))
    if fuse:
        for _, part in list(nnx.iter_modules(module)):
            if hasattr(part, "fuse"):
                part.fuse()
    return Model.of(
        module,
        context=context_of(source) if context is None else context,
        generation=generation.within(config.vocab_size),
        source=source,
        notes=tuple(notes),
        make_tokenizer=functools.partial(Tokenizer, directory),
    )


def init(source: Mapping[str, Any] | str | os.PathLike[str], *, dtype: Any = "float32", rngs: nnx.Rngs) -> Model:
    """Returns an untrained model of a known family, made from its config.json alone: to be trained and saved.

    Args:
      source: the parsed config.json, its path, or the directory that holds it.
      dtype: of the parameters and the computation.
      rngs: random streams of the parameters.

    Raises:
      NotSupportedError: for a family or a feature that is not computed here.

    >>> from flax import nnx
    >>> gpt2 = {"model_type": "gpt2", "vocab_size": 8, "n_embd": 4, "n_layer": 1, "n_head": 2, "n_positions": 16}
    >>> jaxkv.models.init(gpt2, rngs=nnx.Rngs(0)).config.head_dim
    2
    """
    name, config, parsed = read_config(source)
    module = FAMILIES[name].module(_with_dtype(config, dtype), rngs=rngs)
    return Model.of(module, context=context_of(parsed), source=parsed)


def save(
    directory: str | os.PathLike[str], model: Model, *, dtype: Any = None, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Writes a model as transformers' `save_pretrained` would: config.json and safetensors, one file or several.

    `model = dataclasses.replace(model, params=trained)` takes trained parameters along. The tokenizer's files are not
    written; copy them.

    Args:
      directory: made if it isn't there. Files of the same names are replaced; a single file or an index that would be
        read in place of what is written is removed.
      model: from `load` or `init`, not fused.
      dtype: of the tensors in the file; None: that of the model's computation.
      max_shard_bytes: about the largest size of a file, in bytes; with more than one there is an index.

    Raises:
      ValueError: for a model that did not come from a config.json, or is fused, or a dtype that would quantize it.
      NotADirectoryError: if there is a file of that name.
    """
    directory = Path(directory).expanduser()
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(
            errno.ENOTDIR, "this is not a directory; give the name of one to save into", str(directory)
        )
    if not model.source:
        raise ValueError("this model did not come from a config.json; make it by jaxkv.models.init(config, rngs=...)")
    name, _, _ = read_config(model.source)
    dtype = _floating(model.config.dtype if dtype is None else dtype)
    family = FAMILIES[name]
    params = named(model.params)
    tensors: dict[str, Any] = {}
    left = set(params)
    for tensor, files, parts in entries(family.tensors, params):
        left -= set(parts)
        for expert, file in enumerate(files):
            tensors[file] = _Written(tensor, [params[part] for part in parts], expert if tensor.is_each else None)
    if left:
        raise ValueError(
            f"params {', '.join(sorted(left)[:3])} have no name in a {name} checkpoint; a fused model can't be saved: "
            "load it without fuse"
        )
    directory.mkdir(parents=True, exist_ok=True)
    exact = {name for name, tensor in tensors.items() if tensor.tensor.exact}
    sizes = {
        name: math.prod(tensor.shape) * (tensor.dtype if name in exact else dtype).itemsize
        for name, tensor in tensors.items()
    }
    shards = _shards(sizes, max_shard_bytes)
    count = len(shards)
    numbered = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)] if count > 1 else [SINGLE]
    for file, names in zip(numbered, shards, strict=True):
        own, metadata = {n: tensors[n] for n in names}, {"format": "pt"}
        safetensors.write(directory / file, own, dtype=dtype, exact=exact, metadata=metadata)
    if len(shards) > 1:
        weight_map = {n: file for file, names in zip(numbered, shards, strict=True) for n in names}
        write_json(directory / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
        (directory / SINGLE).unlink(missing_ok=True)  # it would be read instead
    else:
        (directory / INDEX).unlink(missing_ok=True)
    of_others = ("torch_dtype", "quantization_config")  # the older name of "dtype"; weights are written unpacked
    source = {key: value for key, value in text_fields(model.source).items() if key not in of_others}
    source |= {"tie_word_embeddings": model.config.tied, "dtype": dtype.name}
    write_json(directory / "config.json", source)


def tensor_parallel(mesh: jax.sharding.Mesh, axis: str | None = None) -> Callable[[str, tuple[int, ...]], Any]:
    """Returns the `sharding` of `load` that splits heads, MLPs and vocabulary over a mesh axis, as Megatron-LM does.

    Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053. What the axis does not divide is replicated. The cache goes
    along by `Cache.init(..., sharding=NamedSharding(mesh, PartitionSpec(None, axis)))` if the axis divides its heads.

    Args:
      mesh: devices.
      axis: its axis; None: the last one.

    >>> mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("model",))
    >>> tuple(tensor_parallel(mesh)("layers.0.attention.query.kernel", (64, 4, 16)).spec)
    (None, 'model', None)
    """
    axis = mesh.axis_names[-1] if axis is None else axis
    if axis not in mesh.axis_names:
        raise ValueError(f"axis={axis!r}: the mesh has {', '.join(map(str, mesh.axis_names))}")
    split = {  # which axis of the param
        r"attention\.(query|query_up|key|value)\.kernel": 1,
        r"attention\.expand": 1,
        r"attention\.(query|key|value)\.bias": 0,
        r"attention\.out\.kernel": 0,
        r"attention\.sink_logits": 0,
        r"mlp\.(shared\.)?(gate|up)\.kernel": 1,
        r"mlp\.(shared\.)?(gate|up)\.bias": 0,
        r"mlp\.(shared\.)?down\.kernel": 0,
        r"(mlp|experts)\.(gate|up)$": 2,  # of all experts
        r"mlp\.(gate|up)_bias": 1,
        r"(mlp|experts)\.down$": 1,
        r"^embed\.embedding": 0,
        r"^head\.kernel": 1,
    }

    def place(name: str, shape: tuple[int, ...]) -> Any:
        spec: list[str | None] = [None] * len(shape)
        for pattern, at in split.items():
            if re.search(pattern, name) and shape[at] % mesh.shape[axis] == 0:
                spec[at] = axis
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    return place


class _Written:
    """A tensor of a file, put together from its params when it is written."""

    def __init__(self, tensor: Tensor, params: list[Any], expert: int | None) -> None:
        self.tensor, self.params, self.expert = tensor, params, expert
        self.dtype = params[0].dtype
        shape = tensor.joined_shape([param.shape for param in params])
        self.shape = shape if expert is None else shape[1:]

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        own = slice(None) if self.expert is None else slice(self.expert, self.expert + 1)
        return self.tensor.encode([np.asarray(param)[own] for param in self.params]).reshape(self.shape)


def _shards(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Returns the names of sizes in bytes, in groups of at most so many, but for those that are larger alone."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, nbytes in sizes.items():
        if shards[-1] and size + nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def _floating(dtype: Any) -> Any:
    """Returns the dtype that a user's word means.

    Raises:
      ValueError: unless parameters can have it.
    """
    try:
        found = jnp.dtype(dtype)
        if is_floating(found):
            return found
        dtype = found.name
    except TypeError:
        pass
    raise ValueError(f"dtype={dtype}: checkpoints hold parameters as they are; give bfloat16, float16 or float32")


def _computed(dtype: Any, given: bool) -> Any:
    """Returns the dtype of the computation for that of the files, or a given one."""
    found = _floating(dtype)
    if found != jnp.float64:
        return found
    if not given:
        return jnp.dtype("float32")
    if not jax.config.read("jax_enable_x64"):
        raise ValueError('dtype=float64: JAX has it after jax.config.update("jax_enable_x64", True); give float32')
    return found


def _with_dtype(config: Any, dtype: Any) -> Any:
    return dataclasses.replace(config, dtype=dtype, param_dtype=dtype)


def _sharding_of(sharding: Any, name: str, like: Any) -> Any:
    return sharding if isinstance(sharding, jax.sharding.Sharding) else sharding(name, like.shape)
