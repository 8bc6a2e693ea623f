"""The example that trains the shipped model, at a size that takes seconds."""

import importlib.util
import json
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxkv import safetensors

pytest.importorskip("optax")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

SMALL = ["--batch", "2", "--length", "32", "--width", "8", "--layers", "1"]


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[1] / "examples" / "train_tiny.py"
    spec = importlib.util.spec_from_file_location("train_tiny", path)
    sys.modules["train_tiny"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def train(example, monkeypatch, tmp_path):
    texts = [("docstring", f"Return item {i} of the list, or the default {i * i}.") for i in range(400)]
    monkeypatch.setattr(example, "documents", lambda: texts)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        yield lambda *args, out="run": example.main([*SMALL, "--out", str(tmp_path / out), *map(str, args)])


def test_a_resumed_run_is_the_same_run(example, train, tmp_path):
    assert train("--steps", 4, "--every", 2) == 0

    step_of = example.batch

    def stopping(data, step, size, length):
        if step == 1:
            signal.raise_signal(signal.SIGINT)  # Ctrl-C
        return step_of(data, step, size, length)

    example.batch = stopping
    try:
        assert train("--steps", 4, out="other") == 130
    finally:
        example.batch = step_of
    assert train("--steps", 4, "--resume", out="other") == 0

    one, other = (safetensors.File(tmp_path / out / "checkpoint.safetensors") for out in ("run", "other"))
    assert set(one) == set(other)
    for name, tensor in one.items():
        np.testing.assert_array_equal(tensor, other[name])

    curve = json.loads((tmp_path / "run" / "curve.json").read_text())["curve"]
    assert [point["step"] for point in curve] == [2, 4]
    assert all(0 < point["held_out"] < 12 for point in curve)
    assert (tmp_path / "run" / "curve.png").read_bytes().startswith(b"\x89PNG")
    tensors = safetensors.File(tmp_path / "run" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"float16"}


def test_what_can_not_be_started_is_said_in_one_line(train, tmp_path, capsys):
    assert train("--resume", out="nothing") == 2
    (tmp_path / "run").mkdir()
    safetensors.write(tmp_path / "run" / "checkpoint.safetensors", {}, metadata={"facts": '{"run": {"width": 9}}'})
    assert train() == 2
    (tmp_path / "file").touch()
    assert train(out="file") == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert "no checkpoint in" in errors[0]
    assert "add --resume to go on with it" in errors[1]
    assert "File exists" in errors[2]
    with pytest.raises(SystemExit, match="2"):
        train("--steps", 0)
    assert "--steps is 0; give more than 0" in capsys.readouterr().err


def test_a_batch_covers_the_text_once_per_epoch(example):
    data = np.arange(1000) % 251
    rows = np.concatenate([example.batch(data, step, 2, 10) for step in range(49)])  # 98 stretches: an epoch
    assert rows.shape == (98, 11)
    starts = [
        int(np.flatnonzero((np.lib.stride_tricks.sliding_window_view(data, 11) == row).all(1))[0]) for row in rows
    ]
    assert len({start % 251 for start in starts}) > 90
    np.testing.assert_array_equal(example.batch(data, 7, 2, 10), example.batch(data, 7, 2, 10))


def test_the_text_is_english_that_python_carries(example):
    source = '''
"""A module."""
# One line of a comment that says what it is that comes next in the file,
# a second one that goes on with what the first had begun to tell its reader,
# and a third.
class A:
    """A class."""
    def f(self):
        """A method."""
'''
    tree = example.ast.parse(source)
    assert list(example.docstrings(tree, "m")) == ["m\n\nA module.", "m.A\n\nA class.", "m.A.f\n\nA method."]
    assert [text.split()[0] for text in example.comments(source)] == ["One"]
    assert example.tidy("The with statement\n******************\n\nIt is used") == "The with statement\n\nIt is used"
