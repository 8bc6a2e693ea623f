"""What README.md and docs/ show is true: their code runs, their commands exist, their links lead somewhere."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path
from unittest import mock

import pytest
from flax import nnx

import jaxkv
from jaxkv.cli.options import parser
from jaxkv.models import FAMILIES

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
WRITTEN = [*DOCS.glob("*.md"), *DOCS.glob("guides/*.md"), *DOCS.glob("notebooks/*.md")]  # not what docs/_build holds
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(WRITTEN)]

spec = importlib.util.spec_from_file_location("cells", DOCS / "cells.py")
cells = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cells)

CHECKPOINTS = {"chat": "Qwen3-0.6B", "models": "Llama-3.2-1B-Instruct"}  # that a page lets its reader download

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Returns (line it begins at, text) of each fenced block."""
    return [(line, text) for line, name, text in all_blocks(page) if name == language]


def all_blocks(page: Path) -> list[tuple[int, str, str]]:
    """Returns (line it begins at, language, text) of each fenced block."""
    text = page.read_text("utf-8")
    found = re.finditer(r"^```(?:\{code-cell\} )?(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, block.start(2)), block.group(1), block.group(2)) for block in found]


def patched(sources: list[str], diff: str) -> str:
    """Returns the latest of some sources that a diff fits, changed by it. Each hunk must fit at one place exactly."""
    hunks = [hunk.splitlines(keepends=True) for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE)]
    old, new = (
        ["".join(line[1:] or "\n" for line in hunk if line[0] != other) for hunk in hunks] for other in ("+", "-")
    )
    fitting = [source for source in sources if all(source.count(part) == 1 for part in old)]
    assert fitting, f"no block of code before it has all hunks of this diff:\n{diff}"
    source = fitting[-1]
    for before, after in zip(old, new, strict=True):
        source = source.replace(before, after)
    return source


def write_checkpoint(directory: Path) -> None:
    """Writes a small random model that chats."""
    source = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "intermediate_size": 32,
    }
    source |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    jaxkv.models.save(directory, jaxkv.models.init(source, rngs=nnx.Rngs(0)))
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({f"t{i}": i for i in range(64)}, unk_token="t0")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    template = "{% for m in messages %}t1 {{ m.content }} t2 {% endfor %}{% if add_generation_prompt %}t3{% endif %}"
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))


def commands(page: Path) -> list[str]:
    """Returns the shell commands shown, in blocks and in the running text."""
    lines = [line for _, block in blocks(page, "sh") for line in block.splitlines()]
    prose = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return lines + re.findall(r"`([^`\n]+)`", prose)


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/getting_started.md",
        "docs/cache.md",
        "docs/attention.md",
        "docs/generate.md",
        "docs/own_models.md",
        "docs/guides/linen.md",
        "docs/guides/nnx.md",
    ],
)
def test_a_page_about_the_library_shows_code(page):
    assert blocks(ROOT / page, "python")


@each_page
def test_python_blocks_run_one_after_another_and_diffs_apply_to_them(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if page.stem in CHECKPOINTS:
        write_checkpoint(tmp_path / CHECKPOINTS[page.stem])
    names = {"__name__": page.stem}
    sources = []
    with mock.patch.dict(FAMILIES):  # a page adds one
        for line, language, code in all_blocks(page):
            if language == "diff":
                code = patched(sources, code)
            elif language == "ipython3":
                cells.run("\n" * line + code, names, str(page))
                continue
            elif language != "python":
                continue
            sources.append(code)
            exec(compile("\n" * line + code, str(page), "exec", dont_inherit=True), names)


@each_page
def test_code_that_is_shown_runs(page):
    assert {language for _, language, _ in all_blocks(page)} <= {"python", "ipython3", "diff", "sh", ""}


@each_page
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    shown = {target for command in commands(page) for target in re.findall(r"^make ([a-z][a-z-]*)", command)}
    assert shown <= targets


@each_page
def test_commands_can_be_parsed(page):
    for command in commands(page):
        found = re.search(r"(?:^|\s|/)(?:python -m )?jaxkv (?=generate|chat|memo [a-z]+ |-)([^|>#]*)", command)
        words = shlex.split(found.group(1)) if found else ["--help"]
        if {"--help", "--version"} & set(words):
            continue
        parser().parse_args(words)


@each_page
def test_links_within_the_project_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text("utf-8"))
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing
