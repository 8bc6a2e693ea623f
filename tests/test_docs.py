"""The documentation's reference names everything that is public, and its pages are all in the contents."""

from __future__ import annotations

import ast
import functools
import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest
import support

import jaxkv

DOCS = Path(__file__).parent.parent / "docs"


def module(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


api_pages, cells, inventory = module("api_pages"), module("cells"), module("inventories/inventory")

MODULES = {"linen", "models", "nnx", "sampling", "testing"}


def test_every_public_name_is_in_the_reference_once():
    pages = api_pages.names()
    names = [name for page in pages.values() for name in page]
    assert sorted(names) == sorted(set(names))
    assert {f"jaxkv.{name}" for name in jaxkv.__all__} - set(names) == {f"jaxkv.{name}" for name in MODULES}


def test_public_names_of_modules_are_in_the_reference():
    names = api_pages.names()
    assert {"jaxkv.nnx.Attention", "jaxkv.nnx.functional", "jaxkv.nnx.fuse"} <= set(names["nnx"])
    assert {"jaxkv.linen.Attention", "jaxkv.linen.attention_params"} <= set(names["linen"])
    assert {"jaxkv.models.load", "jaxkv.models.tiny.load", "jaxkv.models.FAMILIES"} <= set(names["models"])


def test_public_names_have_a_docstring():
    for page in api_pages.names().values():
        for name, value in page.items():
            assert name in api_pages.DATA if not callable(value) else value.__doc__, name


OTHERS = {path.stem: inventory.read(path)[1] for path in (DOCS / "inventories").glob("*.txt")}
UNDOCUMENTED = {"nnx.RngState"}  # Flax's own documentation has no entry for it


def test_names_of_jax_and_flax_that_the_documentation_links_to_exist():
    for names in OTHERS.values():
        for name in names:
            if name.split(".")[0] in {"jax", "flax"}:
                assert pkgutil.resolve_name(name) is not None
    assert inventory.SHORT["flax.nnx."] + "State" in OTHERS["flax"]


def test_names_of_jax_and_flax_in_docs_and_docstrings_have_an_address():
    written = [*DOCS.glob("*.md"), *DOCS.glob("*/*.md"), *(DOCS.parent / "jaxkv").rglob("*.py")]
    used = {
        name for path in written for name in re.findall(r"`((?:jax|flax|nnx|nn|lax)\.[\w.]+)`", path.read_text("utf-8"))
    }
    known = {name for names in OTHERS.values() for name in names}
    missing = used - known - UNDOCUMENTED
    assert not missing, f"add a line for each to docs/inventories: {sorted(missing)}"


def test_sphinx_reads_the_inventories(tmp_path):
    loads = pytest.importorskip("sphinx.util.inventory").InventoryFile.loads
    for project, (address, file) in inventory.write(tmp_path).items():
        assert address.startswith("https://") and address.endswith("/")
        found = loads(Path(file).read_bytes(), uri=address).data
        assert sum(len(entries) for entries in found.values()) == len(OTHERS[project])


def test_every_page_is_in_the_contents():
    listed = re.findall(r"^([\w/]+)$", (DOCS / "index.md").read_text("utf-8"), re.MULTILINE)
    pages = [page for folder in (DOCS, DOCS / "guides", DOCS / "notebooks") for page in folder.glob("*.md")]
    assert {page.relative_to(DOCS).with_suffix("").as_posix() for page in pages} - {"index"} <= set(listed)


def test_every_example_is_listed():
    listed = re.findall(r"\(\.\./examples/(\w+\.py)\) \| \S", (DOCS / "examples.md").read_text("utf-8"))
    assert sorted(listed) == sorted(path.name for path in (DOCS.parent / "examples").glob("*.py"))


def test_every_benchmark_is_on_a_page():
    pages = "".join(page.read_text("utf-8") for page in DOCS.glob("*.md"))
    scripts = {path.name for path in (DOCS.parent / "benchmarks").glob("*.py") if "__main__" in path.read_text("utf-8")}
    assert not [name for name in sorted(scripts) if f"python benchmarks/{name}" not in pages]


def test_a_cell_shows_what_it_prints_and_its_last_value():
    class Drawn:
        def _repr_html_(self):
            return "<svg/>"

    names = {"drawn": Drawn()}
    assert cells.run("x = 2\nprint('one')\nx", names) == ("one\n2\n", "")
    assert cells.run("print(x)\ndrawn", names) == ("2\n", "<svg/>")
    assert cells.run("x = 3", names) == ("", "") and names["x"] == 3


def pattern(node: ast.AST) -> str:
    """A text of the source as a regular expression: anything where a value goes in."""
    if isinstance(node, ast.Constant):
        return re.escape(node.value) if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(".*" if isinstance(value, ast.FormattedValue) else pattern(value) for value in node.values)
    return pattern(node.left) + pattern(node.right) if isinstance(node, ast.BinOp) else ".*"


@functools.cache
def messages() -> list[str]:
    """Patterns of all texts of the library that say something by themselves, not only through their values."""
    found = set()
    for path in (DOCS.parent / "jaxkv").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr | ast.BinOp | ast.Constant):
                found.add(pattern(node))
    return sorted(text for text in found if len(text.replace(".*", "")) >= 12)


def test_the_page_of_errors_shows_messages_that_the_library_has():
    shown = re.findall(r"^- `(.*)`$", (DOCS / "errors.md").read_text("utf-8"), re.MULTILINE)
    assert len(shown) > 40, "a message is one line: - `...`"
    known = [(re.compile(text, re.DOTALL), len(text.replace(".*", ""))) for text in messages()]

    def is_known(message: str) -> bool:
        return any(size > len(message) / 4 and text.fullmatch(message) for text, size in known)

    assert not [message for message in shown if not is_known(message)]
    assert not is_known(shown[2].replace("did not fit into", "does not fit"))


def test_the_page_of_what_works_with_what_is_that_of_the_contract_table():
    assert (DOCS / "support.md").read_text("utf-8") == support.page(), "run: PYTHONPATH=tests python tests/support.py"
