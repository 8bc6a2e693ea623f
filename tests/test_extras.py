"""Each package of an extra serves a feature, which works with it, and without it says how to install it."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import jaxkv
from jaxkv.cli.terminal import progress_bar
from jaxkv.picture import Cell, Panel, Picture, Strip

EXTRAS = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text("utf-8"))["project"][
    "optional-dependencies"
]
X = np.ones((2, 3), np.float32)


def double(x):
    return 2 * x


def encode(folder):
    return jaxkv.models.Tokenizer(folder).encode("a b") == [0, 1]


def render(folder):
    return jaxkv.models.Tokenizer(folder).render([{"role": "user", "content": "a"}]) == "a!"


def keep(folder, **options):
    with jaxkv.Memo(**options) as memo:
        return (memo.wrap(double)(X) == 2).all()


def warm(folder):
    with jaxkv.Memo(memory="1MiB") as memo:
        doubled = memo.wrap(double)
        doubled.warm([X])  # with a bar
        return doubled.lookup(X) is not None


def draw(folder):
    return Picture((Panel("row 0", (Strip("", (Cell("held"),)),)),)).figure() is not None


USES = {
    "models": {"tokenizers": encode, "jinja2": render},
    "memo": {
        "xxhash": lambda folder: keep(folder, memory="1MiB"),
        "blake3": lambda folder: keep(folder, memory="1MiB", hash="blake3"),
        "zstandard": lambda folder: keep(folder, disk=folder / "features", compress="zstd"),
        "tqdm": warm,
    },
    "bench": {"matplotlib": draw},
}


@pytest.fixture
def folder(tmp_path):
    """Holds a tokenizer of two words, with a chat template."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}!"}))
    return tmp_path


@pytest.mark.parametrize(("extra", "package"), [(extra, package) for extra in USES for package in USES[extra]])
def test_a_feature_works_with_its_package_and_without_it_says_what_to_install(folder, monkeypatch, extra, package):
    with monkeypatch.context() as without:
        for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
            without.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=rf"pip install .*\b{package}\b"):
            USES[extra][package](folder)
    assert USES[extra][package](folder)


def test_the_command_shows_a_progress_bar_with_tqdm_and_goes_on_without(monkeypatch, capsys):
    with progress_bar("loading", show=True) as progress:
        progress(1, 2)
    assert "loading" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with progress_bar("loading", show=True) as progress:
        progress(1, 2)
    assert capsys.readouterr().err == ""


def test_every_package_of_an_extra_is_used():
    for extra, used in USES.items():
        wanted = {re.match(r"[\w-]+", package).group() for package in EXTRAS[extra]}
        assert wanted - {"tqdm"} == set(used) - {"tqdm"}
