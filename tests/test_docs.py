"""The documentation's reference names everything that is public, and its pages are all in the contents."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import jaxkv

DOCS = Path(__file__).parent.parent / "docs"
spec = importlib.util.spec_from_file_location("api_pages", DOCS / "api_pages.py")
api_pages = importlib.util.module_from_spec(spec)
spec.loader.exec_module(api_pages)

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


def test_every_page_is_in_the_contents():
    listed = re.findall(r"^(\w+)$", (DOCS / "index.md").read_text("utf-8"), re.MULTILINE)
    assert {page.stem for page in DOCS.glob("*.md")} - {"index"} <= set(listed)
