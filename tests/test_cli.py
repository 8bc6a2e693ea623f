"""The command, as a user meets it: a few runs of the real thing, the rest with a model of two layers."""

from __future__ import annotations

import io
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from flax import nnx

import jaxkv
from jaxkv.cli import chat, main
from jaxkv.cli.terminal import Text, text_of
from jaxkv.models import tiny
from jaxkv.models.decoder import Decoder, DecoderConfig

ROOT = Path(__file__).parent.parent
CONFIG = DecoderConfig(
    vocab_size=256,
    width=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    mlp_dim=32,
    reaches=(jaxkv.Window(16), jaxkv.Full()),
)
# A process started by one that ignores Ctrl-C ignores it too, unless it says otherwise.
LISTENING = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); runpy.run_module('jaxkv')"


@pytest.fixture
def small_model(monkeypatch):
    """An untrained model in place of the shipped one."""
    monkeypatch.setattr(tiny, "load", lambda: Decoder(CONFIG, rngs=nnx.Rngs(0)))


@pytest.fixture
def type_in(monkeypatch):
    """Puts bytes on standard input, where no terminal is."""

    def type_in(text: str | bytes) -> None:
        data = text if isinstance(text, bytes) else text.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return type_in


def start(*words: str, code: str | None = None, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "jaxkv"] if code is None else [sys.executable, "-c", code]
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    return subprocess.Popen([*command, *words], **{**pipes, **options})


@pytest.fixture(autouse=True)
def compiled_programs(monkeypatch):
    monkeypatch.setenv("JAXKV_CACHE_DIR", str(ROOT / ".cache" / "jax"))


# --- the real thing --------------------------------------------------------------------------------------------------


def test_generate_continues_the_prompt_with_the_shipped_model():
    with start("generate", "The with statement", "-n", "60") as process:
        out, err = (text.decode() for text in process.communicate())
    assert process.returncode == 0, err
    assert out.startswith("The with statement") and len(out) > 60
    assert re.search(r"first token after [\d.]+ s .*, then [\d,]+ tokens/s; read 18 tokens, wrote \d+", err)
    assert re.search(r"cache: [\d.]+ \w+ per token, [\d.]+ MiB in all", err)


def test_version_names_what_matters_in_a_report():
    with start("--version") as process:
        out, err = process.communicate()
    assert (process.returncode, err) == (0, b"")
    assert re.fullmatch(rb"jaxkv \S.* \(jax [\d.]+, flax [\d.]+, Python [\d.]+\)\n", out)


def test_a_reader_that_goes_away_ends_it_quietly():
    with start("generate", "The", "-n", "5000") as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def test_interrupt_keeps_what_was_written_and_ends_with_130():
    with start("generate", "The", "-n", "50000", "--greedy", code=LISTENING) as process:
        begun = process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130
    assert begun.startswith(b"The") and out.endswith(b"\n")
    assert b"until Ctrl-C" in err and b"Traceback" not in err


# --- generate --------------------------------------------------------------------------------------------------------


def test_the_seed_decides(small_model, capsys):
    def text(*options: str) -> str:
        assert main(["generate", "A list", "-n", "30", "-q", *options]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out

    assert text() == text("--seed", "0") != text("--seed", "1")
    assert text("--greedy") == text("--greedy", "--seed", "1")


def test_every_sampler_option_is_used(small_model, capsys):
    options = [
        "--temperature",
        "2",
        "--top-k",
        "50",
        "--top-p",
        "0.9",
        "--min-p",
        "0.01",
        "--repetition-penalty",
        "1.2",
    ]
    assert main(["generate", "A list", "-n", "10", *options]) == 0
    assert "wrote" in capsys.readouterr().err


def test_samples_are_printed_one_after_another(small_model, capsys):
    assert main(["generate", "A list", "-n", "10", "--samples", "2", "--seed", "3"]) == 0
    out, err = capsys.readouterr()
    first, second = re.fullmatch(r"--- 1 of 2\n(A list.*)\n--- 2 of 2\n(A list.*)\n", out, re.DOTALL).groups()
    assert first != second
    assert "for 2 texts of up to 1,024 tokens" in err


@pytest.mark.parametrize("words", [["-"], []])
def test_the_prompt_may_come_from_standard_input(small_model, capsys, type_in, words):
    type_in(b"caf\xc3\xa9 \xff\n")
    assert main(["generate", *words, "-n", "3", "-q"]) == 0
    assert capsys.readouterr().out.startswith("café \N{REPLACEMENT CHARACTER}")


def test_a_full_cache_ends_the_text_and_says_so(small_model, capsys):
    assert main(["generate", "A list", "-n", "100", "--capacity", "64", "--greedy"]) == 0
    _, err = capsys.readouterr()
    assert "until the cache was full; a larger --capacity holds more" in err
    assert "read 6 tokens, wrote 59" in err  # the last one is in the text, and not yet in the cache


def test_compare_shows_the_same_tokens_with_and_without_a_cache(small_model, capsys):
    assert main(["generate", "A list", "-n", "16", "--compare"]) == 0
    out, _ = capsys.readouterr()
    rows = re.findall(r"^ *(\d+) +[\d.,]+ ms +[\d.,]+ ms +[\d.,]+x +(.*)$", out, re.MULTILINE)
    assert rows == [("2", "yes"), ("4", "yes"), ("8", "yes"), ("16", "yes")]


# --- chat ------------------------------------------------------------------------------------------------------------


def test_chat_keeps_the_text_in_the_cache(small_model, capsys, type_in):
    type_in("hello\nwhat\n/reset\n\nagain\n/quit\nnever read\n")
    assert main(["chat", "-n", "8"]) == 0
    _, err = capsys.readouterr()
    turns = re.findall(r"(\d+) tokens did not have to be read again, (\d+) are new", err)
    assert [int(held) for held, _ in turns] == [0, int(turns[0][1]) - 1, 0]
    assert err.count("everything is forgotten") == 1


def test_chat_goes_on_as_generate_would_with_the_whole_text(small_model, capsys, type_in):
    type_in("hello\nwhat\n")
    assert main(["chat", "-n", "8", "-q", "--greedy"]) == 0
    first, second = capsys.readouterr().out.splitlines()[:2]
    model = Decoder(CONFIG, rngs=nnx.Rngs(0))
    forward, params = jaxkv.nnx.functional(model)

    def continued(history: list[int]) -> list[int]:
        cache = jaxkv.Cache.init(model.specs(), 1, 1024)
        result = jaxkv.generate(forward, params, [history], cache, max_new_tokens=8, stop_tokens=0)
        return result.tokens[0, : result.lengths[0]].tolist()

    hello = tiny.encode("hello")
    answer = continued(hello)
    assert first == text_of(answer)
    assert second == text_of(continued([*hello, *answer, *tiny.encode("\n\nwhat")]))


def test_chat_forgets_the_oldest_part_when_the_cache_is_full(small_model, capsys, type_in):
    type_in("0123456789\n" * 6)
    assert main(["chat", "-n", "8", "--capacity", "64", "--greedy"]) == 0
    _, err = capsys.readouterr()
    assert len(re.findall(r"the oldest 16 tokens are forgotten, \d+ stay", err)) >= 1
    assert err.count("did not have to be read again") == 6
    assert "full; a larger" not in err


def test_chat_refuses_a_line_that_never_fits_and_goes_on(small_model, capsys, type_in):
    type_in("x" * 60 + "\n/what\nhello\n")
    assert main(["chat", "-n", "8", "--capacity", "64", "--greedy"]) == 0
    _, err = capsys.readouterr()
    assert "error: 60 tokens and up to 8 new ones don't fit a cache that holds 64" in err
    assert "error: /what is not known; there are /reset and /quit" in err
    assert err.count("did not have to be read again") == 1


def test_interrupt_stops_the_models_turn_and_keeps_the_text(small_model, capsys, type_in, monkeypatch):
    written = []

    def write(text: str) -> None:
        written.append(text)
        if len(written) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(chat, "write", write)
    type_in("hello\nmore\n")
    assert main(["chat", "-n", "8"]) == 0
    turns = re.findall(r"(\d+) tokens did not have to be read again, (\d+) are new", capsys.readouterr().err)
    assert turns[0] == ("0", "8")  # 5 of the line and 3 of the model
    assert turns[1][0] == "7"


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "--top-p", "0", "x"], "TopP: p is 0.0, must be above 0"),
        (["generate", "--temperature", "-1", "x"], "Temperature: t is -1.0, must be"),
        (["generate", "--top-k", "0", "x"], "TopK: k is 0, must be"),
        (["generate", "--greedy", "--top-k", "3", "x"], "--greedy takes the most probable token; leave out --top-k"),
        (["generate", ""], "the prompt is empty; give some text"),
        (["generate", "x" * 20, "--capacity", "8"], "the prompt has 20 tokens and the cache holds 8; give a shorter"),
        (["generate", "x", "--compare", "--samples", "2"], "--compare decodes one text, greedily"),
        (["generate", "x", "--compare", "--top-p", "0.5"], "--compare decodes one text, greedily"),
        (["generate", "x", "-n", "0"], "'0' is not a count; give 1 or more; see jaxkv generate --help"),
        (["generate", "x", "-n", "many"], "'many' is not a count"),
        (["chat", "-n", "40", "--capacity", "64"], "--capacity 160, or a smaller --max-new-tokens"),
        (["write"], "invalid choice: 'write'"),
        ([], "the following arguments are required: COMMAND; see jaxkv --help"),
    ],
)
def test_wrong_use_is_one_line_with_the_cure_and_status_2(words, message, capsys):
    try:
        status = main(words)
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.startswith("jaxkv: error: ") and err.count("\n") == 1
    assert message in err


def test_failures_are_one_line_and_status_1(monkeypatch, capsys):
    def broken() -> None:
        raise FileNotFoundError(2, "No such file or directory", "model.safetensors")

    monkeypatch.setattr(tiny, "load", broken)
    assert main(["generate", "x"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("jaxkv: error: ")


@pytest.mark.parametrize("words", [["--help"], ["generate", "--help"], ["chat", "--help"]])
def test_help_fits_a_terminal_and_shows_examples(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        main(words)
    out, err = capsys.readouterr()
    assert (end.value.code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 104
    assert "jaxkv generate" in out or "/reset" in out


# --- text ------------------------------------------------------------------------------------------------------------


def test_characters_wait_until_they_are_whole():
    text = Text()
    assert [text.take([byte]) for byte in "é€".encode()] == ["", "é", "", "", "€"]
    assert text.end() == ""


def test_what_is_not_text_is_shown_as_such():
    assert text_of([0xFF, 0x41]) == "\N{REPLACEMENT CHARACTER}A"
    assert text_of([0x41, 0xC3]) == "A\N{REPLACEMENT CHARACTER}"
    assert text_of([0x1B, 0x0A]) == "\N{REPLACEMENT CHARACTER}\n"  # no escape sequences for the terminal
