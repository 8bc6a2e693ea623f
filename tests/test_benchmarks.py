"""The benchmarks run, at sizes at which their numbers mean nothing."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def _scripts_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))


def test_the_decode_benchmark_runs_and_draws(tmp_path, capsys):
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
    assert {"plain copy", "take, capacity 64", "take, capacity 128"} <= set(data["reordering"]["cells"][0]["ms"])
    assert figure.stat().st_size > 1000


def test_the_figures_of_the_readme_are_those_of_the_data():
    readme = importlib.import_module("readme")
    data = json.loads((readme.ROOT / "docs" / "data" / "model.json").read_text())
    assert readme.paragraph(data) in (readme.ROOT / "README.md").read_text("utf-8"), "run: python benchmarks/readme.py"
    data["decode_ms_per_token"]["32"]["jaxkv"] = [99.0]
    assert "decodes in 99.0 / " in readme.paragraph(data)


def test_the_benchmark_of_a_whole_model_decodes_several_rows(tmp_path, capsys, monkeypatch):
    model = importlib.import_module("model")
    monkeypatch.setattr(model, "TINY", dataclasses.replace(model.TINY, contexts=(8,)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    numbers = tmp_path / "data" / "model_rows.json"
    options = ["--quick", "--threads", "1", "--only", "jaxkv", "llama.cpp", "plain read"]
    assert model.main([*options, "--rows", "3", "--out", str(numbers)]) == 0
    printed, data = capsys.readouterr().out, json.loads(numbers.read_text())
    assert "tokens per second, decode at 8: jaxkv " in printed
    assert data["settings"]["rows"] == 3
    for at, count in (("8", 8), ("prefill", 1)):
        tokens = data["tokens"][at]
        assert np.shape(tokens["jaxkv"]) == (3, count)
        assert len({tuple(row) for row in tokens["jaxkv"]}) == 3  # each row has a text of its own
        assert "llama.cpp" in data["left_out"] or tokens["llama.cpp"] == tokens["jaxkv"]
    assert (tmp_path / "figures" / "model_rows.png").stat().st_size > 1000
    with pytest.raises(SystemExit):
        model.main([*options, "--rows", "17"])
    assert "--rows 17: from 1 to 16" in capsys.readouterr().err


def test_tokens_of_a_row_agree_until_the_first_that_differs():
    model = importlib.import_module("model")
    tokens = {"8": {"jaxkv": [[1, 2, 3], [4, 5, 6]], "other": [[1, 2, 3], [4, 0, 6]]}}
    assert model.agreement({"tokens": tokens}) == {"other": "4/6 at 8"}


def test_the_benchmark_of_pages_runs_and_draws(tmp_path, capsys, monkeypatch):
    pages = importlib.import_module("pages")
    monkeypatch.setattr(pages.Peer, "there", lambda: False)  # transformers takes longer than all else
    numbers, figure = tmp_path / "data" / "pages.json", tmp_path / "figures" / "pages.png"
    options = ["--quick", "--out", str(numbers), "--figure", str(figure)]
    assert pages.main([*options, "--only", "layer"]) == 0
    assert pages.main([*options, "--only", "forks"]) == 0
    data = json.loads(numbers.read_text())
    assert list(data) == ["layer", "forks"]  # one run keeps what another measured
    assert "copy_prefix" in capsys.readouterr().out
    assert figure.stat().st_size > 1000


def test_the_memo_benchmark_runs_and_draws(tmp_path):
    memo = importlib.import_module("memo")
    numbers, figure = tmp_path / "data" / "memo.json", tmp_path / "figures" / "memo.png"
    assert memo.main(["--quick", "--rows", "1000", "--out", str(numbers), "--figure", str(figure)]) == 0
    data = json.loads(numbers.read_text())
    assert {"hash", "memory hit", "disk hit", "miss, on disk"} <= set(data["ms"])
    assert data["policies"]["keep"] == [0, 0.5]
    assert figure.stat().st_size > 1000


def test_where_others_answer_wrongly_the_memo_does_not(capsys):
    assert importlib.import_module("memo").main(["--quick", "--faults"]) == 0
    assert "right" in capsys.readouterr().out


def test_the_offload_benchmark_runs(tmp_path):
    offload = importlib.import_module("offload")
    assert offload.main(["--quick", "--out", str(tmp_path / "offload.json")]) == 0
    assert {"ms", "overlap", "settings"} <= set(json.loads((tmp_path / "offload.json").read_text()))


def test_writers_a_reader_clear_and_prune_at_once_lose_nothing():
    """But what they are asked to remove; without locks, no value is wrong. In a process of its own, since it forks."""
    script = Path(__file__).parent.parent / "benchmarks" / "disk_together.py"
    done = subprocess.run([sys.executable, str(script), "--seconds", "1"], capture_output=True, text=True, check=True)
    *locked, without_locks = done.stdout.splitlines()
    for line in locked:
        for what in ("wrong", "raised", "lost in the end", "corrupt", "lost", "replaced", "errors", "damaged"):
            assert f"  {what} 0" in line, line
    assert "  wrong 0  raised 0" in without_locks


def test_the_benchmark_of_loader_workers_runs(tmp_path):
    pytest.importorskip("torch")
    loaders = importlib.import_module("memo_loaders")
    options = ["--rows", "2000", "--workers", "1", "--rounds", "1", "--seconds", "0.1"]
    assert loaders.main([*options, "--out", str(tmp_path / "loaders.json")]) == 0
    assert json.loads((tmp_path / "loaders.json").read_text())["turns"]["jaxkv"][0]["items_per_second"] > 0


def test_the_disk_benchmark_times_whatever_is_installed(tmp_path):
    """In a process of its own, since it forks."""
    script = Path(__file__).parent.parent / "benchmarks" / "disk.py"
    options = ["--quick", "--only", "times", "--out", str(tmp_path / "disk.json")]
    subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True, check=True)
    cases = json.loads((tmp_path / "disk.json").read_text())["times"]["cases"]
    assert all({"jaxkv", "files"} <= set(case["microseconds"]) for case in cases)


def test_the_experts_benchmark_compares_ways_that_agree(capsys):
    assert importlib.import_module("experts").main(["--quick", "--rounds", "1"]) == 0
    assert "8 tokens: own tokens" in capsys.readouterr().out


def test_the_storage_benchmark_runs(tmp_path, monkeypatch):
    storage = importlib.import_module("storage")
    monkeypatch.setattr(storage, "STORAGES", {name: storage.STORAGES[name] for name in ("float32", "k int8, v int4")})
    monkeypatch.setattr(storage, "TIMED", tuple(storage.STORAGES))
    assert (
        storage.main(
            ["--quick", "--only", "bytes", "errors", "times", "files", "--out", str(tmp_path / "storage.json")]
        )
        == 0
    )
    data = json.loads((tmp_path / "storage.json").read_text())
    assert {"float32", "k int8, v int4"} <= set(data["times"][0]["ms"])
    assert set(data["files"][1]["ms"]) == {"write", "save", "read", "load"}
    assert 0.01 < data["errors"][1]["error"]["normal"] < 0.08


def test_the_benchmark_of_latents_runs(tmp_path, capsys, monkeypatch):
    latent = importlib.import_module("latent")
    monkeypatch.setattr(latent, "STORAGES", {"float32": latent.STORAGES["float32"]})

    def not_there(*args):
        raise ImportError("transformers takes longer than all else")

    monkeypatch.setattr(latent, "theirs", not_there)
    numbers = tmp_path / "data" / "latent.json"
    assert latent.main(["--quick", "--out", str(numbers)]) == 0
    assert "of all heads" in capsys.readouterr().out
    assert set(json.loads(numbers.read_text())["ms"]) == {"float32"}


def test_the_far_context_is_made_of_passages_that_come_again():
    far = importlib.import_module("far_context")
    text = np.arange(200, dtype=np.uint8)
    tokens, back = far.sequence(np.random.default_rng(0), text, 2000, letters=0.5)
    assert tokens.shape == back.shape == (2001,)
    again = np.flatnonzero(back)
    assert 0.2 < len(again) / 2001 < 0.7 and back.max() > 1000
    np.testing.assert_array_equal(tokens[again], tokens[again - back[again]])


def test_the_benchmark_of_generates_overhead_compares_loops_that_write_the_same(tmp_path, capsys):
    out = tmp_path / "overhead.json"
    options = ["--tiny", "--rounds", "1", "--tokens", "6", "--out", str(out)]
    assert importlib.import_module("overhead").main(options) == 0
    assert "| overhead |" in capsys.readouterr().out
    assert set(json.loads(out.read_text())["contexts"]["8"]["ms_per_token"]) == {"bare", "generate"}


@pytest.mark.usefixtures("native_kernel")
def test_the_benchmark_of_the_product_compares_steps_that_write_the_same(tmp_path, capsys):
    out = tmp_path / "product.json"
    options = ["--tiny", "--rows", "2", "--rounds", "2", "--steps", "2", "--out", str(out)]
    assert importlib.import_module("product").main(options) == 0
    assert "| bfloat16 | 2 |" in capsys.readouterr().out
    assert set(json.loads(out.read_text())["ms_per_step"]["float32"]["2"]) == {"XLA's", "the library's"}


@pytest.mark.usefixtures("native_kernel")
def test_the_benchmark_of_memories_compares_forms_that_give_the_same(tmp_path, capsys):
    out = tmp_path / "memories.json"
    assert importlib.import_module("memories").main(["--quick", "--out", str(out)]) == 0
    assert "| Mamba-2 | 8 |" in capsys.readouterr().out
    assert set(json.loads(out.read_text())["ms"]["gated delta"]["1"]) == {"XLA's", "the library's"}
