"""A traced run: what the page says of each step is what the cache holds, and a real browser can show it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

import jaxkv
from jaxkv import Cache, Full, LayerSpec, Window
from jaxkv.cli import main
from jaxkv.cli import trace as traces

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [3], None]


def traced(steps=6):
    specs = [LayerSpec(Window(4, sinks=1), 2, 4), LayerSpec(Full(), 2, 4)]
    cache = Cache.init(specs, num_rows=3, capacity=24, max_block=4)
    texts = [[f"<{token}>" for token in prompt or []] for prompt in PROMPTS]
    trace = traces.Trace(cache, PROMPTS, texts)
    for i in range(steps):
        trace.step([f" a{i}</script>", f" b{i}" if i < 3 else None, None])
    return trace


def test_numbers_of_any_storage_are_drawn_alike():
    storage = (jaxkv.Int8(), jaxkv.Int4())
    specs = [LayerSpec(Full(), 2, 16, rotary=jaxkv.Rotary(), rotary_at="read")]
    cache = Cache.init(specs, num_rows=1, capacity=8, max_block=4, storage=storage)
    trace = traces.Trace(cache, [[5, 6]], [["a", "b"]])
    trace.step(["c"])
    assert "row 0   0 1 . ." in str(trace.picture)


def test_of_recurrent_layers_the_states_are_drawn_and_layers_that_share_have_nothing_to_draw():
    states = LayerSpec(jaxkv.Recurrent(tail=(4, 2), every=2, keep=1))
    full = LayerSpec(Full(), 2, 4)
    shares = LayerSpec(Full(), 2, 4, shares=1)
    for specs in ([states, full, shares], [states]):
        cache = Cache.init(specs, num_rows=1, capacity=8, max_block=4)
        trace = traces.Trace(cache, [[5, 6, 7]], [["a", "b", "c"]])
        for text in "de":
            trace.step([text])
        assert ("row 0   0 1 2 3 . ." in str(trace.picture)) == (full in specs)
        group = data_of(trace.page("t"))["groups"][-1]
        writes = [step["writes"] for step in data_of(trace.page("t"))["steps"]]
        number = len(data_of(trace.page("t"))["groups"]) - 1
        assert (group["states"], group["slots"]) == (True, 2)
        # After two tokens of the prompt it stands, then after three, and after four, which is kept.
        assert [[p for g, _, _, p in step if g == number] for step in writes] == [[2], [3], [4]]
        assert sorted(p for p in np.asarray(trace._cache.recurrent[0].held)[0]) == [2, 4]


def data_of(page):
    return json.loads(re.search(r'application/json">(.*?)</script>', page, re.DOTALL).group(1))


@pytest.fixture(scope="module")
def page():
    return traced().page("A <title>")


def test_the_writes_of_all_steps_together_are_what_the_cache_holds(page):
    data = data_of(page)
    held = [np.full((3, group["slots"]), -1) for group in data["groups"]]
    for step in data["steps"]:
        for group, row, slot, position in step["writes"]:
            held[group][row, slot] = position
    for reach, got in zip((Window(4, sinks=1), Full()), held, strict=True):
        cache = Cache.init([LayerSpec(reach, 1, 2)], num_rows=3, capacity=24, max_block=4)
        for start in range(12):
            cache, _ = cache.begin(np.array([[start], [start if start < 3 else -1], [-1]]))
        assert got.tolist() == np.asarray(cache.groups[0].held).tolist()


def test_texts_can_not_end_the_script(page):
    assert page.count("</script>") == 2
    assert data_of(page)["texts"][0][-1] == " a5</script>"
    assert "<title>A &lt;title&gt;</title>" in page


def test_the_picture_of_a_run_under_way_shows_its_cache():
    picture = traced(1).picture
    assert "Full(): slots by row" in picture.text()


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_the_page_slides_and_has_nothing_to_complain_of(page, tmp_path, width):
    probe = """<script>
    const wrong=[];window.onerror=m=>wrong.push(m);
    addEventListener("load",()=>{
      const first=document.querySelectorAll("#groups .new").length;
      at.value=at.max;at.oninput();
      const out=document.createElement("pre");out.id="probe";
      out.textContent=JSON.stringify({wrong,first,cells:document.querySelectorAll("#groups i").length,
        seen:document.querySelectorAll("#groups .seen,#groups .sink,#groups .new").length,
        say:say.textContent,fits:document.documentElement.scrollWidth<=innerWidth});
      document.body.append(out)});
    </script></head>"""
    path = tmp_path / "trace.html"
    path.write_text(page.replace("</head>", probe, 1), "utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom"]
    done = subprocess.run(
        ["chromium", *options, "--enable-logging=stderr", path.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert "CONSOLE" not in done.stderr
    found = json.loads(re.search(r'id="probe">(.*?)</pre>', done.stdout).group(1))
    assert found["wrong"] == [] and found["first"] > 0 and found["seen"] > 0 and found["fits"]
    assert re.fullmatch(r"step \d+ of \d+, decode", found["say"])
    assert found["cells"] == sum(group["slots"] for group in data_of(page)["groups"]) * 3


def run_command(*words, **options):
    command = [sys.executable, "-m", "jaxkv", "generate", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def test_the_command_writes_the_page_and_the_same_text(tmp_path):
    path = tmp_path / "run.html"
    done = run_command("The with", "-n", "5", "--greedy", "--trace", str(path))
    assert done.returncode == 0, done.stderr
    data = data_of(path.read_text("utf-8"))
    assert "".join(data["texts"][0]) == done.stdout.rstrip("\n")
    assert [step["kind"] for step in data["steps"]].count("decode") == 5
    assert str(path) in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--watch"], "--watch draws on a terminal"),
        (["--trace", "nowhere/run.html"], "nowhere is not a directory"),
        (["--trace", ""], "argument --trace: '' does not name a file; give one such as run.html"),
        (["--trace", "/"], "argument --trace: '/' does not name a file"),
        (["--trace", "x.html", "--samples", "2"], "--trace shows one text, token by token; leave out --samples"),
        (["--watch", "--beams", "2"], "--watch shows one text, token by token; leave out --beams"),
    ],
    ids=["no terminal", "no folder", "no name", "a folder", "samples", "beams"],
)
def test_what_can_not_be_seen_is_said(words, said, capsys):
    assert main(["generate", "The", *words]) == 2
    assert said in capsys.readouterr().err
