"""What a first use says when something is missing."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import jaxkv
from jaxkv.extras import need

ROOT = Path(__file__).parent.parent


@pytest.fixture
def find_python(tmp_path):
    """Runs .ci/find-python where only the given Pythons are there: name -> (version, has venv)."""

    def find_python(pythons: dict[str, tuple[str, bool]], *words: str, **environment: str):
        for name, (version, has_venv) in pythons.items():
            old_enough = int(version.split(".")[1]) >= 11
            stub = tmp_path / name
            stub.write_text(
                "#!/bin/sh\n"
                'case "$2" in\n'
                f"  *exit*) exit {0 if old_enough else 1} ;;\n"
                f"  *ensurepip*) exit {0 if has_venv else 1} ;;\n"
                f"  *) echo {version} ;;\n"
                "esac\n"
            )
            stub.chmod(0o755)
        command = ["/bin/sh", str(ROOT / ".ci" / "find-python"), *words]
        return subprocess.run(command, env={"PATH": str(tmp_path), **environment}, capture_output=True, text=True)

    return find_python


def test_python3_comes_first_and_a_newer_one_by_name_after_it(find_python):
    assert find_python({"python3": ("3.11", True), "python3.12": ("3.12", True)}).stdout.endswith("/python3\n")
    assert find_python({"python3": ("3.9", True), "python3.12": ("3.12", True)}).stdout.endswith("/python3.12\n")


def test_the_one_asked_for_is_taken(find_python):
    found = find_python({"python3": ("3.11", True), "mine": ("3.12", True)}, PYTHON="mine")
    assert found.stdout.endswith("/mine\n")


@pytest.mark.parametrize(
    ("pythons", "message"),
    [
        (
            {},
            "needs Python 3.11 or newer, and python3 is not there; install one (Debian, Ubuntu: apt install python3.12",
        ),
        ({"python3": ("3.9", True)}, "needs Python 3.11 or newer, and python3 is 3.9; install one"),
        (
            {"python3": ("3.12", False)},
            "python3 has no venv module; install it (Debian, Ubuntu: apt install python3.12-venv)",
        ),
    ],
)
def test_what_is_missing_is_said_in_one_line_with_the_cure(find_python, pythons, message):
    found = find_python(pythons)
    assert found.returncode == 1
    assert found.stdout == ""
    assert found.stderr.startswith("jaxkv: error: ")
    assert found.stderr.count("\n") == 1
    assert message in found.stderr


def test_an_exact_version_is_found_or_not(find_python):
    pythons = {"python3": ("3.11", True), "python3.12": ("3.12", True)}
    assert find_python(pythons, "3.12").stdout.endswith("/python3.12\n")
    assert find_python(pythons, "3.11").stdout.endswith("/python3\n")
    assert find_python(pythons, "3.14").returncode == 1


def test_the_version_in_the_changelog_is_that_of_the_package():
    assert f"\n## {jaxkv.__version__} " in (ROOT / "CHANGELOG.md").read_text("utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"] == {"path": "jaxkv/__init__.py"}


FIRST_IMPORT = """
import json, sys
import jaxkv
first = sorted(name for name in sys.modules if name.startswith(("jax.", "flax", "numpy", "jaxkv.")))
import jaxkv.generate.stream  # binds the package jaxkv.generate, which must not hide the function
import jaxkv.models as models
found = [jaxkv.generate.__module__, models.__name__, jaxkv.nnx.Attention.__module__]
namespace = {}
exec("from jaxkv import *", namespace)
print(json.dumps([first, found, sorted(set(namespace) - {"__builtins__"})]))
"""


def test_importing_takes_nothing_along_and_every_public_name_is_there():
    command = [sys.executable, "-W", "error", "-c", FIRST_IMPORT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, found, names = json.loads(done.stdout)
    assert first == ["jaxkv.logs"]
    assert found == ["jaxkv.generate.stream", "jaxkv.models", "jaxkv.nn.nnx"]
    assert names == sorted(jaxkv.__all__)


def test_dir_is_the_public_names_and_nothing_else():
    assert set(dir(jaxkv)) == {*jaxkv.__all__, "__version__"}
    assert {"Cache", "Memo", "generate", "linen", "models", "nnx", "sampling", "testing"} < set(dir(jaxkv))
    for name in dir(jaxkv):
        assert getattr(jaxkv, name) is not None
    with pytest.raises(AttributeError, match="module 'jaxkv' has no attribute 'Cash'"):
        jaxkv.Cash  # noqa: B018


def test_each_package_that_an_error_names_is_one_that_an_extra_installs():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    with pytest.raises(ImportError, match="pip install ") as raised:
        need("no_such_package", "a tokenizer", "models")
    named = str(raised.value).rpartition("pip install ")[2].split()
    assert named and all(any(wanted.startswith(name) for wanted in extras["models"]) for name in named)
