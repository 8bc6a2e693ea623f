"""What a first use says when something is missing."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path

import pytest

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
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert f"\n## {version} " in (ROOT / "CHANGELOG.md").read_text("utf-8")
