"""Which file may import what."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINE = ("native", "cache", "nn", "generate", "models", "cli")  # each imports only from its left
ASIDE = ("memo", "offload", "store")  # import none of the line, nor one another
COMMON = {
    "aligned",
    "casting",
    "errors",
    "extras",
    "kinds",
    "logs",
    "meshes",
    "picture",
    "regular",
    "safetensors",
    "sizes",
    "tracing",
    "whole",
}  # import none of them
MAY = {
    **{name: {*LINE[:i], name} for i, name in enumerate(LINE)},
    **{name: {name} for name in ASIDE},
    "cli": {*LINE, *ASIDE, "__version__"},
}
FILES = [path for path in sorted((ROOT / "jaxkv").rglob("*.py")) if path.parent.name != "jaxkv"]


def imported(path: Path, *, within_functions: bool = True) -> Iterator[tuple[str, str]]:
    """Yields (module, name) of what a file imports from elsewhere than its own package."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree) if within_functions else tree.body:
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node.module or "", alias.name) for alias in node.names)


def rooms(path: Path) -> set[str]:
    """What of jaxkv a file imports: names of packages and files right under it."""
    found = set()
    for module, name in imported(path):
        top, *inner = module.split(".")
        if top == "jaxkv":
            found.add(inner[0] if inner else name)
    return found


def short(path: Path) -> str:
    return path.relative_to(ROOT / "jaxkv").as_posix()


@pytest.mark.parametrize("path", [path for path in FILES if short(path).split("/")[0] in MAY], ids=short)
def test_a_file_imports_only_from_its_left_and_what_stands_beside_only_itself(path):
    room = short(path).split("/")[0]
    assert rooms(path) <= MAY[room] | COMMON


@pytest.mark.parametrize("name", sorted(COMMON))
def test_what_all_share_imports_nothing_but_itself(name):
    assert rooms(ROOT / "jaxkv" / f"{name}.py") <= COMMON


@pytest.mark.parametrize("path", FILES, ids=short)
def test_importing_wants_nothing_but_jax_flax_and_numpy(path):
    tops = {module.split(".")[0] for module, _ in imported(path, within_functions=False)}
    assert tops <= {*sys.stdlib_module_names, "jax", "flax", "numpy", "jaxkv"}


@pytest.mark.parametrize("path", FILES, ids=short)
def test_private_stays_private(path):
    names = [part for pair in imported(path) for part in (*pair[0].split("."), pair[1])]
    assert [name for name in names if name.startswith("_") and name not in ("__future__", "__version__")] == []
