"""The benchmarks run, at sizes at which their numbers mean nothing."""

from __future__ import annotations

import importlib
import json
from pathlib import Path


def test_the_decode_benchmark_runs_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    decode = importlib.import_module("decode")
    numbers, figure = tmp_path / "data" / "decode.json", tmp_path / "figures" / "decode.png"
    only = ["jaxkv", "jax.nn.dot_product_attention"]
    options = ["--quick", "--batch", "1", "--capacity", "128", "--only", *only]
    assert decode.main([*options, "--out", str(numbers), "--figure", str(figure)]) == 0
    assert "plain read" in capsys.readouterr().out
    data = json.loads(numbers.read_text())
    assert [cell["fill"] for cell in data["cells"]] == [8, 128]
    assert all(set(cell["ms"]) == set(only) for cell in data["cells"])
    assert data["versions"]["jax"]
    assert figure.stat().st_size > 1000
