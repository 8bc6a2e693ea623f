"""Writes one page of the API reference per room: every public name, in the order in which the source has it.

`conf.py` calls `write` before each build; `tests/test_docs.py` holds that no public name is left out.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import jaxkv

# Page, title, what it is about, and where its names live: a package of jaxkv's top-level names, or a public module.
PAGES = (
    ("cache", "jaxkv: the cache", "State: what a model remembers, and every operation on it.", "jaxkv.cache"),
    ("attention", "jaxkv: attention and buffers", "Readers of the cache, rotary embeddings, buffers.", "jaxkv.nn"),
    ("nnx", "jaxkv.nnx", "Attention modules for flax.nnx.", jaxkv.nnx),
    ("linen", "jaxkv.linen", "Attention modules for flax.linen.", jaxkv.linen),
    ("generate", "jaxkv: generation", "Compiled loops over a cache.", "jaxkv.generate"),
    ("sampling", "jaxkv.sampling", "Samplers and their parts.", jaxkv.sampling),
    ("models", "jaxkv.models", "Models, checkpoints and tokenizers.", jaxkv.models),
    ("memo", "jaxkv: the memo", "Outputs of frozen models, found again by content.", "jaxkv.memo"),
    ("offload", "jaxkv: offload", "Activations of many batches, off the accelerator.", "jaxkv.offload"),
    ("store", "jaxkv: the store", "Named values and queues inside jit.", "jaxkv.store"),
    ("testing", "jaxkv.testing", "For tests of caches and of models that use one.", jaxkv.testing),
    ("picture", "jaxkv: pictures", "What `jaxkv.show` and `jaxkv.show_mask` return.", "jaxkv.picture"),
    ("errors", "jaxkv: errors", "What jaxkv raises.", "jaxkv.errors"),
)

# What the modules of nnx and linen import by name, and is public there.
_KEPT_APART = ("LatentAttention", "fuse", "attention_params")

# Public names that have no docstring of their own.
DATA = {
    "jaxkv.EMPTY": "int, -1: the position that marks padding, and slots in which nothing lies.",
    "jaxkv.models.FAMILIES": "dict from `model_type` to the table of a family; :doc:`/families` adds one.",
    "jaxkv.testing.WAYS_OF_FEEDING": "The ways in which `jaxkv.testing.assert_cache_correct` feeds the same tokens.",
}


def names() -> dict[str, dict[str, Any]]:
    """Returns for each page its public names, "jaxkv.Cache" or "jaxkv.models.load", and what they are."""
    return {page: _of_package(where) if isinstance(where, str) else _of_module(where) for page, *_, where in PAGES}


def _of_package(package: str) -> dict[str, Any]:
    homes = {name: jaxkv._HOMES[name] for name in jaxkv.__all__}
    return {
        f"jaxkv.{name}": getattr(jaxkv, name)
        for name, home in homes.items()
        if (home == package or home.startswith(f"{package}.")) and not inspect.ismodule(getattr(jaxkv, name))
    }


def _of_module(module: Any) -> dict[str, Any]:
    """A module's own names: what it, or its package, defines. In a package, what it imports by name is public too."""
    public = f"jaxkv.{module.__name__.rsplit('.', 1)[-1]}"
    is_package = hasattr(module, "__path__")
    own = {}
    for name, value in vars(module).items():
        if name.startswith("_") or inspect.ismodule(value):
            continue
        home = getattr(value, "__module__", module.__name__)
        written_here = home == module.__name__ or (is_package and home.startswith("jaxkv"))
        if (written_here or name in _KEPT_APART) and (callable(value) or is_package):
            own[f"{public}.{name}"] = value
    if public == "jaxkv.models":
        own["jaxkv.models.tiny.load"] = module.tiny.load
    return own


def write(folder: Path) -> None:
    """Writes the pages and their index; a page that is there already as it should be stays untouched."""
    folder.mkdir(exist_ok=True)
    public = names()
    for page, title, about, _ in PAGES:
        parts = [_title(title), about, *(_directive(name, value) for name, value in public[page].items())]
        _write(folder / f"{page}.rst", "\n\n".join(parts))
    about = "Every public name, from its docstring. Axes and words are those of :doc:`the glossary </glossary>`."
    listed = "\n".join(f"   {page}" for page, *_ in PAGES)
    _write(folder / "index.rst", f"{_title('API reference')}\n\n{about}\n\n.. toctree::\n\n{listed}\n")


def _title(text: str) -> str:
    return f"{text}\n{'=' * len(text)}"


def _directive(name: str, value: Any) -> str:
    if inspect.isclass(value):
        return f".. autoclass:: {name}" + ("" if issubclass(value, Exception) else "\n   :members:")
    if callable(value):
        return f".. autofunction:: {name}"
    return f".. py:data:: {name}\n\n   {DATA[name]}"


def _write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text("utf-8") != text:
        path.write_text(text, "utf-8")
