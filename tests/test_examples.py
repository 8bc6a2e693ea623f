"""Every example runs, at a small size, as a user would start it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMALL = {
    "beam_search.py": "--beams 3 --new-tokens 8",
    "build_a_cache.py": "",
    "buffers.py": "--sizes 64",
    "frozen_backbone.py": "--images 128 --size 32 --epochs 2",
    "neox_store.py": "--layers 2 --width 64 --steps 20",
    "sequential_calibration.py": "--layers 2 --width 32 --length 8 --batch 2 --batches 3",
    "serve.py": "--rows 3 --pages 12 --new-tokens 16",
    "train_tiny.py": "--steps 2 --every 1 --batch 2 --length 64 --width 32 --layers 2 --out run",
}

SAYS = {
    "beam_search.py": ["the same texts as jaxkv.beam_search: True"],
    "build_a_cache.py": ["jaxkv.Window(4), against 4"],
    "buffers.py": ["kept", "forgotten"],
    "frozen_backbone.py": ["losses of all steps: the same, bit by bit", "100.0% found, 0 computed"],
    "neox_store.py": ["equal: True"],
    "sequential_calibration.py": ["equal to the last bit"],
    "serve.py": ["57 of  59 tokens shared", "the same texts as one by one: True"],
}


def run(name: str, words: str, folder: Path) -> subprocess.CompletedProcess:
    cache = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax")}
    command = [sys.executable, str(ROOT / "examples" / name), *words.split()]
    return subprocess.run(command, cwd=folder, env=cache, capture_output=True, text=True, check=False)


def test_every_example_is_listed():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_it_runs(name, tmp_path):
    done = run(name, SMALL[name], tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(words in done.stdout for words in SAYS.get(name, [])), done.stdout
    assert "False" not in done.stdout


def test_each_explains_itself(tmp_path):
    """All in one process, since most of the time goes into importing JAX."""
    code = """
import contextlib, io, runpy, sys
for path in sys.argv[1:]:
    sys.argv, said = [path, "--help"], io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            assert not end.code, path
        else:
            raise AssertionError(path)
    assert "usage:" in said.getvalue(), path
"""
    paths = [str(ROOT / "examples" / name) for name in SMALL]
    command = [sys.executable, "-c", code, *paths]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
