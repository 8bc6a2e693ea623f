"""The command, as a user meets it: a few runs of the real thing, the rest with a model of two layers."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import io
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest
from flax import nnx

import jaxkv
from jaxkv import safetensors
from jaxkv.cli import chat, info, main
from jaxkv.cli.conversation import Writing
from jaxkv.cli.options import SAMPLING, Failure, option
from jaxkv.cli.terminal import Text, color, printable, progress_bar
from jaxkv.models import ByteTokenizer, Decoder, DecoderConfig, GenerationConfig, Model, tiny

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
# A process started by one that ignores Ctrl-C ignores it too, unless it says otherwise. The model may go on for long.
LISTENING = """
import dataclasses, runpy, signal
from jaxkv.models import tiny
signal.signal(signal.SIGINT, signal.default_int_handler)
load = tiny.load
tiny.load = lambda: dataclasses.replace(load(), context=None)
runpy.run_module("jaxkv")
"""


@functools.cache
def untrained():
    generation = GenerationConfig(stop_tokens=(0,), greedy=False, temperature=0.7)
    return Model.of(Decoder(CONFIG, rngs=nnx.Rngs(0)), generation=generation, make_tokenizer=ByteTokenizer)


@pytest.fixture
def small_model(monkeypatch):
    """An untrained model in place of the shipped one."""
    monkeypatch.setattr(tiny, "load", untrained)
    return untrained()


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
    assert re.search(r"first token after [\d.]+ s .*, then [\d,]+ tokens/s\n", err)
    assert re.search(r"prefilled 18 tokens, wrote \d+: ", err)
    assert re.search(r"cache: [\d.]+ \w+ per token, [\d.]+ [KM]iB in all", err)


def test_version_names_what_matters_in_a_report():
    with start("--version") as process:
        out, err = process.communicate()
    assert (process.returncode, err) == (0, b"")
    assert re.fullmatch(rb"jaxkv \S.* \(jax [\d.]+, flax [\d.]+, Python [\d.]+\)\n", out)


def test_a_reader_that_goes_away_ends_it_quietly():
    with start("generate", "The", "-n", "500") as process:
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
    assert SAMPLING.keys() <= inspect.signature(jaxkv.sampling.sampler).parameters.keys()
    words = [word for name in SAMPLING for word in (option(name), "1")]
    assert main(["generate", "A list", "-n", "10", *words]) == 0
    said = ", ".join(f"{name.replace('_', ' ')} 1" for name in SAMPLING)
    assert f"sampling: {said} (as asked)\n" in capsys.readouterr().err


def test_a_text_does_not_end_before_its_least_length(small_model, capsys):
    ends = dict.fromkeys(range(256), 1.0)  # every token is an end
    del ends[65]
    generation = dataclasses.replace(small_model.generation, stop_tokens=tuple(ends), greedy=True)
    patched = dataclasses.replace(small_model, generation=generation)
    tiny.load = lambda: patched  # small_model's monkeypatch puts it back
    assert main(["generate", "A list", "-n", "5", "--min-new-tokens", "3", "-q"]) == 0
    assert capsys.readouterr().out.startswith("A listAAA")


def test_samples_are_printed_one_after_another(small_model, capsys):
    assert main(["generate", "A list", "-n", "10", "--samples", "2", "--seed", "3"]) == 0
    out, err = capsys.readouterr()
    first, second = re.fullmatch(r"--- 1 of 2\n(A list.*)\n--- 2 of 2\n(A list.*)\n", out, re.DOTALL).groups()
    assert first != second
    assert "for 2 texts of up to 1,024 tokens" in err


def test_speculation_gives_the_same_text_and_says_what_was_accepted(small_model, checkpoint, capsys):
    prompt = "a list, a list, a list, a "
    assert main(["generate", prompt, "-n", "20", "--seed", "2"]) == 0
    plain = capsys.readouterr().out
    assert main(["generate", prompt, "-n", "20", "--seed", "2", "--speculate", "lookup"]) == 0
    out, err = capsys.readouterr()
    assert out == plain
    assert re.search(r"drafts: \d+ of \d+ tokens accepted; 20 tokens in \d+ steps of the model\n", err)
    assert "first token after" in err

    directory, words = checkpoint(), ["t5 t7 t9", "-n", "12", "--greedy"]
    assert main(["generate", "-m", directory, *words]) == 0
    plain = capsys.readouterr().out
    assert main(["generate", "-m", directory, *words, "--speculate", directory]) == 0  # it agrees with itself
    out, err = capsys.readouterr()
    assert out == plain
    assert "drafts: 10 of 10 tokens accepted; 12 tokens in 2 steps of the model" in err
    hybrid = checkpoint("lfm2")
    assert main(["generate", "-m", hybrid, *words, "--speculate", "lookup"]) == 0
    assert "drafts: " in capsys.readouterr().err
    assert main(["generate", "x", "-n", "3", "--samples", "2", "--speculate", "lookup"]) == 0
    assert re.search(r"accepted; \d\.\d tokens of a text per step of the model\n", capsys.readouterr().err)
    for options, message in (
        (["--speculate", "lookup", "--capacity", "1"], "--capacity: --speculate checks a token and a draft at once"),
        (["--speculate", directory], "has a vocabulary of 96 tokens, the bundled model one of"),
        (["--speculate", "nowhere"], "nowhere is not a directory"),
        (["--speculate", "lookup", "--compare"], "--best-of, --layout, --speculate and the options"),
    ):
        assert main(["generate", "x", *options]) == 2
        assert message in capsys.readouterr().err


def test_a_model_over_several_devices_writes_the_same(small_model, checkpoint, type_in, capsys):
    hybrid, latent = checkpoint("lfm2"), checkpoint("deepseek_v2")
    one_head = "model over 2 devices; each has all that 2 of 2 attention layers keep"
    for words, said in (
        (["generate", "-m", checkpoint(), "t5 t7", "-n", "8", "--best-of", "2"], "model over 2 devices\n"),
        (["generate", "-m", hybrid, "t5 t7", "-n", "4", "--greedy"], "model over 2 devices\n"),
        (["generate", "-m", latent, "t5 t7", "-n", "4", "--greedy"], one_head),
        (["chat", "-n", "4", "--greedy"], one_head),
    ):
        type_in("a list\nand more\n")
        assert main(words) == 0
        alone = capsys.readouterr().out
        type_in("a list\nand more\n")
        assert main([*words, "--devices", "2"]) == 0
        out, err = capsys.readouterr()
        assert out == alone and said in err
    assert main(["generate", "x", "--devices", "64"]) == 2
    message = "--devices: 64 are asked for, and JAX has 4 here; XLA_FLAGS=--xla_force_host_platform_device_count=64"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [["-"], []])
def test_the_prompt_may_come_from_standard_input(small_model, capsys, type_in, words):
    type_in(b"caf\xc3\xa9 \xff\n")
    assert main(["generate", *words, "-n", "3", "-q"]) == 0
    assert capsys.readouterr().out.startswith("café \N{REPLACEMENT CHARACTER}")


def test_a_full_cache_ends_the_text_and_says_so(small_model, capsys):
    assert main(["generate", "A list", "-n", "100", "--capacity", "64", "--greedy"]) == 0
    _, err = capsys.readouterr()
    assert "until the cache was full; give a larger --capacity for more" in err
    assert "prefilled 6 tokens, wrote 59" in err  # the last one is in the text, and not yet in the cache


def test_compare_shows_the_same_tokens_with_and_without_a_cache(small_model, capsys):
    assert main(["generate", "A list", "-n", "16", "--compare"]) == 0
    out, _ = capsys.readouterr()
    rows = re.findall(r"^ *(\d+) +[\d.,]+ ms +[\d.,]+ ms +[\d.,]+x +(.*)$", out, re.MULTILINE)
    assert rows == [("2", "yes"), ("4", "yes"), ("8", "yes"), ("16", "yes")]


def test_each_line_of_a_file_is_continued_in_order_and_as_if_alone(small_model, capsys, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("A list\r\n\nAn iterator\ncaf\u00e9".encode())
    assert main(["generate", "--prompts", str(file), "--rows", "2", "-n", "5", "--greedy", "--json", "-q"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["line"], one["prompt"]) for one in found] == [(1, "A list"), (3, "An iterator"), (4, "caf\u00e9")]
    for one in found:
        cache = jaxkv.Cache.init(small_model.specs, 2, 1024)
        prompts = [small_model.tokenizer.encode(one["prompt"]), None]
        alone = jaxkv.generate(small_model.forward, small_model.params, prompts, cache, max_new_tokens=5, stop_tokens=0)
        assert one["tokens"] == [token for token in alone.tokens[0].tolist() if token > 0]
        assert (one["text"], one["reason"]) == (text_of(one["tokens"]), alone.reasons[0])
    assert main(["generate", "--prompts", str(file), "--rows", "2", "-n", "5", "--greedy"]) == 0
    out, err = capsys.readouterr()
    assert out == "".join(f"--- line {one['line']}\n{one['prompt']}{one['text']}\n" for one in found)
    assert "prefilled 22 tokens, wrote " in err and "for 2 texts of up to" in err


def test_all_lines_that_cannot_be_continued_are_named_before_anything_is(small_model, capsys, type_in):
    type_in(b"good\n\xff\n" + b"x" * 1024 + b"\n")
    words = ["generate", "--prompts", "-", "--capacity", "64"]
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and "standard input has 1 line that the model can't continue:\n  line 2: not UTF-8\n" in err
    type_in(b"good\n" + b"x" * 1024 + b"\n")
    assert main(words) == 2
    assert "the prompt on line 2 has 1,024 tokens, and the cache has room for 64" in capsys.readouterr().err
    type_in(b"\n \n")
    assert main(words) == 2
    assert "standard input has no prompts; write one per line" in capsys.readouterr().err


# --- chat ------------------------------------------------------------------------------------------------------------


def test_chat_keeps_the_text_in_the_cache(small_model, capsys, type_in):
    type_in("hello\nwhat\n/reset\n\nagain\n/quit\nnever read\n")
    assert main(["chat", "-n", "8"]) == 0
    _, err = capsys.readouterr()
    turns = re.findall(r"reused (\d+) tokens?, prefilled (\d+), wrote (\d+) in [\d.]+ s", err)
    assert [int(held) for held, *_ in turns] == [0, int(turns[0][1]) + int(turns[0][2]) - 1, 0]
    assert err.count("forgot everything") == 1


def test_chat_goes_on_as_generate_would_with_the_whole_text(small_model, capsys, type_in):
    type_in("hello\nwhat\n")
    assert main(["chat", "-n", "8", "-q", "--greedy"]) == 0
    first, second = capsys.readouterr().out.splitlines()[:2]

    def continued(history: list[int]) -> list[int]:
        cache = jaxkv.Cache.init(small_model.specs, 1, 1024)
        options = dict(max_new_tokens=8, stop_tokens=0)
        result = jaxkv.generate(small_model.forward, small_model.params, [history], cache, **options)
        return result.tokens[0, : result.lengths[0]].tolist()

    hello = small_model.tokenizer.encode("hello")
    answer = continued(hello)
    assert first == text_of(answer)
    assert second == text_of(continued([*hello, *answer, *small_model.tokenizer.encode("\n\nwhat")]))


def test_chat_forgets_the_oldest_part_when_the_cache_is_full(small_model, capsys, type_in):
    type_in("0123456789\n" * 6)
    assert main(["chat", "-n", "8", "--capacity", "64", "--greedy"]) == 0
    _, err = capsys.readouterr()
    assert len(re.findall(r"forgot 16 tokens, kept \d+", err)) >= 1
    assert err.count("reused ") == 6
    assert "full; a larger" not in err


def test_chat_refuses_a_line_that_never_fits_and_goes_on(small_model, capsys, type_in):
    type_in("x" * 60 + "\n/what\nhello\n")
    assert main(["chat", "-n", "8", "--capacity", "64", "--greedy"]) == 0
    _, err = capsys.readouterr()
    assert "error: 60 tokens and up to 8 new ones don't fit into a cache for 64" in err
    assert "error: /what is not a command; /help lists them" in err
    assert err.count("reused ") == 1


def test_undo_forgets_the_last_exchange_in_text_and_cache(small_model, capsys, type_in):
    type_in("hello\nwhat\n/undo\nwhat\n/undo\n/undo\n/undo\n/undo it\nhello\n")
    assert main(["chat", "-n", "8", "--greedy"]) == 0
    out, err = capsys.readouterr()
    hello, what, again, anew = out.splitlines()
    assert (what, hello) == (again, anew)
    held = re.findall(r"reused (\d+) tokens?", err)
    assert held[1] == held[2] and held[3] == "0" != held[1]
    assert re.findall(r"forgot: (\w+)", err) == ["what", "what", "hello"]
    assert "error: there is nothing to undo" in err and "error: /undo takes nothing after it" in err


def test_a_saved_conversation_is_gone_on_with(checkpoint, capsys, type_in, tmp_path):
    directory, path = checkpoint("mistral", TEMPLATE), tmp_path / "a talk"
    words = ["chat", "-m", directory, "-n", "12", "--system", "t9"]
    type_in(f"t1 t2\n/save {path}\nt3\n/undo\nt3\n/save {path}\n/save\n/save {tmp_path / 'no' / 'where'}\n")
    assert main(words) == 0
    out, err = capsys.readouterr()
    answers = out.splitlines()
    assert answers[1] == answers[2] and re.findall(r"reused (\d+)", err)[1:] == ["19", "20"]
    assert "/save needs a file name: /save FILE" in err
    assert err.endswith(f"error: {tmp_path / 'no'}: there is no such folder to save into; make it first\n")
    said = [("system", "t9"), ("user", "t1 t2"), ("assistant", answers[0]), ("user", "t3"), ("assistant", answers[1])]
    messages = json.loads(jaxkv.Snapshot(path).metadata["messages"])
    assert [(message["role"], message["content"]) for message in messages] == said
    type_in(f"t4\n/save {path}\n/load {path}\n/undo\nt3\n")
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[1] == answers[1] and f"error: {path} exists; give another name" in err


def test_a_session_goes_on_tomorrow_where_it_ended(checkpoint, capsys, type_in, tmp_path):
    directory, path = checkpoint("mistral", TEMPLATE), tmp_path / "talk"
    words = ["chat", "-m", directory, "-n", "12", "--greedy"]
    type_in("t1 t2\nt3\n")
    assert main(words) == 0
    whole, err = capsys.readouterr()
    reused = re.findall(r"reused (\d+) tokens?, prefilled (\d+)", err)
    for line in ("t1 t2\n", "t3\n"):
        type_in(line)
        assert main([*words, "--session", str(path)]) == 0
    out, err = capsys.readouterr()
    assert out == whole
    assert re.findall(r"reused (\d+) tokens?, prefilled (\d+)", err) == reused
    assert f"2 messages read from {path}, {reused[1][0]} tokens in the cache" in err
    # Another model, or a smaller cache, has the messages alone.
    other = checkpoint("llama3", TEMPLATE)
    for command, why in (
        (["chat", "-m", other, "-n", "4"], "another model wrote it"),
        ([*words, "-n", "4", "--capacity", "16"], "it has 33 tokens, and the cache holds 16"),
    ):
        type_in("")
        assert main([*command, "--session", str(path)]) == 0
        assert f"4 messages read from {path}; prefilled again: {why}" in capsys.readouterr().err
    assert main([*words, "--session", str(path), "--system", "t9"]) == 2
    assert "goes on with what its model was told first; leave out --system" in capsys.readouterr().err
    type_in("/reset\n")
    assert main([*words, "--session", str(path)]) == 0
    assert not path.exists()
    assert main([*words, "--session", str(tmp_path / "no" / "talk")]) == 2
    path.write_text("[]")
    assert main([*words, "--session", str(path)]) == 1
    assert "is not a safetensors file" in capsys.readouterr().err
    assert path.read_text() == "[]"


def test_a_text_in_turns_is_gone_on_with(small_model, capsys, type_in, tmp_path):
    path = tmp_path / "text"
    type_in(f"hello\n/save {path}\nwhat\n")
    assert main(["chat", "-n", "8", "--greedy"]) == 0
    out, err = capsys.readouterr()
    type_in(f"else\n/load {path}\nwhat\n/undo\nwhat\n/undo\n/undo\n/undo\n")
    assert main(["chat", "-n", "8", "--greedy"]) == 0
    again, err_again = capsys.readouterr()
    assert again.splitlines()[1:3] == [out.splitlines()[1]] * 2
    assert re.findall(r"reused (\d+)", err_again)[1:] == re.findall(r"reused (\d+)", err)[1:] * 2
    assert re.findall(r"forgot: (\w+)", err_again) == ["what", "what", "hello"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "has messages that are not JSON"),
        ("{}", "has no list of messages; give a file that /save wrote"),
        ("[]", "has no list of messages"),
        ("[1]", 'message 1 is not {"role": ..., "content": ...}'),
        ('[{"role": "tool", "content": "x"}]', 'message 1: "role" must be one of system, user, assistant'),
        ('[{"role": "user", "content": 3}]', 'and "content" a text'),
        ('[{"role": "assistant", "content": "x"}]', "message 1 is from assistant; here it must be from user"),
        ('[{"role": "user", "content": "x"}]', "ends with a user message, without an answer"),
        ('[{"role": "system", "content": "x"}]', "has other tokens than its messages"),
        ('[{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]', "has other tokens than"),
    ],
)
def test_what_is_no_conversation_is_not_loaded(text, message, tmp_path):
    path, config = tmp_path / "file", types.SimpleNamespace(vocab_size=256)
    source = types.SimpleNamespace(name="it", tokenizer=ByteTokenizer(), known=list, fingerprint="it", config=config)
    cache = jaxkv.Cache.init([jaxkv.LayerSpec(jaxkv.Full(), num_kv_heads=1, head_dim=1)], 1, 8)
    writing = Writing(source, cache, 2, lambda *_: None, lambda _: None)
    metadata = {"messages": text, "history": "[1, 2, 256]", "begins": "[]"}
    cache.save(path, fingerprint="it", metadata=metadata)
    with pytest.raises(Failure, match=re.escape(message)):
        writing.load(path)
    cache.save(path, metadata=metadata | {"history": "3"})
    with pytest.raises(Failure):
        writing.load(path)
    assert (writing.messages, writing.history) == ([], [])


def test_interrupt_stops_the_models_turn_and_keeps_the_text(small_model, capsys, type_in, monkeypatch):
    written = []

    def write(text: str) -> None:
        written.append(text)
        if len(written) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(chat, "write", write)
    type_in("hello\nmore\n")
    assert main(["chat", "-n", "8"]) == 0
    turns = re.findall(r"reused (\d+) tokens?, prefilled (\d+), wrote (\d+) in [\d.]+ s", capsys.readouterr().err)
    assert turns[0] == ("0", "5", "3")
    assert turns[1][0] == "7"


def test_interrupt_before_the_first_token_ends_the_turn_and_not_the_chat(small_model, capsys, type_in, monkeypatch):
    make_room = Writing._make_room

    def interrupted(self, *sizes: int) -> None:
        signal.raise_signal(signal.SIGINT)
        make_room(self, *sizes)

    monkeypatch.setattr(Writing, "_make_room", interrupted)
    type_in("hello\n/undo\nmore\n")
    assert main(["chat", "-n", "8"]) == 0
    assert re.findall(r"wrote (\d+)", capsys.readouterr().err) == ["1", "1"]


# --- checkpoints -----------------------------------------------------------------------------------------------------

FAMILIES = ROOT / "tests" / "golden" / "families"
TEMPLATE = """\
{%- for message in messages %}
{%- if message.role == 'critic' %}{{ raise_exception('nobody asked') }}{% endif %}
{{- 't90 ' if message.role == 'user' else 't93 ' if message.role == 'system' else 't91 ' }}
{{- message.content + ' t92 ' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 't91' }}{% endif %}
"""


@pytest.fixture
def checkpoint(tmp_path):
    """Makes a checkpoint of a golden one: with a tokenizer whose token 7 is "t7", and what else is given."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("jinja2")

    def checkpoint(family: str = "llama3", template: str | None = None, **generation) -> str:
        directory = tmp_path / family
        shutil.copytree(FAMILIES / family, directory)
        words = {f"t{i}": i for i in range(96)}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="t0"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        tokenizer.save(str(directory / "tokenizer.json"))
        (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        (directory / "generation_config.json").write_text(json.dumps(generation))
        return str(directory)

    return checkpoint


def words(tokens) -> str:
    return " ".join(f"t{token}" for token in tokens)


@pytest.mark.parametrize("family", ["llama3", "mistral"])
def test_a_checkpoint_goes_on_as_it_does_in_transformers(checkpoint, capsys, family):
    golden = safetensors.File(FAMILIES / family / "expected.safetensors")
    directory = checkpoint(family)
    for prompt, greedy in (("tokens", "greedy"), ("short", "short_greedy")):
        assert main(["generate", "--model", directory, words(golden[prompt]), "-n", "64"]) == 0
        out, err = capsys.readouterr()
        assert out == f"{words(golden[prompt])} {words(golden[greedy])}\n"
        assert "loaded as float32" in err and "sampling: greedy (generation_config.json)" in err


def test_a_checkpoint_is_sampled_as_its_makers_want_and_options_go_before(checkpoint, capsys):
    directory = checkpoint(do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=[28, 2], max_new_tokens=5)

    def report(*options: str) -> str:
        assert main(["generate", "-m", directory, "t5 t7", *options]) == 0
        return capsys.readouterr().err

    assert "sampling: temperature 0.6, top p 0.9 (generation_config.json)" in report()
    assert "sampling: temperature 0.6, top p 0.9 (generation_config.json); top k 3 (as asked)" in report("--top-k", "3")
    greedy = report("--greedy")
    assert "sampling: greedy (as asked)" in greedy
    assert re.search(r"wrote \d+: (up to a stop token|as many tokens as asked for)", greedy)


def test_one_option_for_drawing_makes_a_greedy_checkpoint_draw(checkpoint, capsys):
    assert main(["generate", "-m", checkpoint(top_k=3), "t5", "-n", "2", "--top-p", "0.9"]) == 0
    sampling = "sampling: temperature 1 (the default); top k 3 (generation_config.json); top p 0.9 (as asked)"
    assert sampling in capsys.readouterr().err


def test_a_text_ends_where_the_model_was_not_made_for_more(checkpoint, capsys):
    assert main(["generate", "-m", checkpoint(), words(range(1, 91))]) == 0
    out, err = capsys.readouterr()
    assert len(out.split()) == 128
    assert "wrote 38: up to the 128 tokens of the model's context" in err


def test_compare_works_for_checkpoints(checkpoint, capsys):
    assert main(["generate", "-m", checkpoint(), "t5 t7", "-n", "8", "--compare"]) == 0
    assert re.findall(r"x   (.*)$", capsys.readouterr().out, re.MULTILINE) == ["yes"] * 4


def test_a_checkpoint_is_computed_in_the_dtype_that_is_asked_for(checkpoint, capsys):
    assert main(["generate", "-m", checkpoint(), "t5 t7", "-n", "2", "--dtype", "bfloat16"]) == 0
    err = capsys.readouterr().err
    assert "loaded as bfloat16" in err and "cache: 192 B per token" in err


def conversation(directory: str, turns: list[str], num_tokens: int) -> list[str]:
    """Returns the answers to a growing list of messages, each read from its beginning."""
    model = jaxkv.models.load(directory, dtype="float32", context=128, fuse=True)
    messages, answers = [], []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        prompt = model.tokenizer.chat(messages)
        cache = jaxkv.Cache.init(model.specs, 1, 128)
        result = jaxkv.generate(model.forward, model.params, [prompt], cache, max_new_tokens=num_tokens)
        answers.append(model.tokenizer.decode(result.tokens[0]))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def test_a_conversation_is_answered_as_if_it_were_read_from_its_beginning_but_is_not(checkpoint, capsys, type_in):
    directory = checkpoint("mistral", TEMPLATE)  # windows of 8: what was said early is gone
    type_in("t1 t2\nt3\n/reset\nt4\n")
    assert main(["chat", "-m", directory, "-n", "12"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [*conversation(directory, ["t1 t2", "t3"], 12), *conversation(directory, ["t4"], 12)]
    turns = re.findall(r"reused (\d+) tokens?, prefilled (\d+), wrote (\d+) in [\d.]+ s", err)
    # "t90 t1 t2 t92 t91" and 12 tokens, of which the cache doesn't hold the last
    assert turns == [("0", "5", "12"), ("16", "6", "12"), ("0", "4", "12")]
    assert "write a line, and the model answers; /help shows more" in err


def test_what_a_template_writes_in_another_way_is_read_again(checkpoint, capsys, type_in):
    shortened = TEMPLATE.replace("message.content", "message.content[:11]")  # three tokens of each answer stay
    directory = checkpoint("mistral", shortened)
    type_in("t10 t20\nt30\n")
    assert main(["chat", "-m", directory, "-n", "12"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == conversation(directory, ["t10 t20", "t30"], 12)
    held = [int(n) for n in re.findall(r"reused (\d+) tokens?,", err)]
    assert held[0] == 0 and 5 <= held[1] <= 9


def test_a_conversation_forgets_its_oldest_messages_but_not_the_system_message(checkpoint, capsys, type_in):
    type_in("".join(f"t{i} t2 t3 t4\n" for i in range(12)))
    words = ["chat", "-m", checkpoint("llama3", TEMPLATE), "-n", "8", "--system", "t5"]
    assert main(words) == 0
    err = capsys.readouterr().err
    assert len(re.findall(r"the cache was full: forgot the oldest \d+ messages", err)) >= 1
    held = [int(n) for n in re.findall(r"reused (\d+) tokens?,", err)]
    assert len(held) == 12 and min(held[1:]) == 4  # "t93 t5 t92 t90": the system message, and that a user speaks


def test_a_message_that_does_not_fit_or_is_refused_leaves_the_conversation_as_it_was(checkpoint, capsys, type_in):
    refusing = TEMPLATE.replace("message.role == 'critic'", "message.content == 't9'")
    type_in("t1\nt9\n" + "t2 " * 130 + "\nt3\n")
    assert main(["chat", "-m", checkpoint("llama3", refusing), "-n", "8"]) == 0
    err = capsys.readouterr().err
    assert "refuses these messages: nobody asked" in err
    assert "error: 133 tokens and up to 8 new ones don't fit into a cache for 128" in err
    turns = re.findall(r"reused (\d+) tokens?, prefilled (\d+), wrote (\d+) in [\d.]+ s", err)
    assert [(held, int(read) + int(wrote)) for held, read, wrote in turns] == [("0", 12), ("11", 14)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "has no config.json; give a directory as Hugging Face publishes them"),
        (lambda d: (d / "config.json").write_text("{}"), '"model_type": None, which jaxkv does not know'),
        (
            lambda d: (d / "model.safetensors").unlink(),
            "holds neither model.safetensors nor model",
        ),
        (lambda d: (d / "tokenizer.json").unlink(), "has no tokenizer.json; fetch it from where the checkpoint comes"),
        (lambda d: (d / "generation_config.json").write_text("{"), "generation_config.json is not valid JSON"),
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_said_on_one_line(checkpoint, capsys, change, message):
    directory = checkpoint()
    change(Path(directory))
    assert main(["generate", "-m", directory, "t5"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("jaxkv: error: ") and message in err


def test_what_is_wrong_with_many_tensors_is_a_short_list(checkpoint, capsys):
    directory = checkpoint()
    path = Path(directory) / "model.safetensors"
    safetensors.write(path, {f"{name}.strange": array for name, array in safetensors.File(path).items()})
    assert main(["generate", "-m", directory, "t5"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("does not fit its config.json:") and lines[1].startswith("  missing: ")
    assert len(lines) == 10 and re.fullmatch(r"  and \d+ more", lines[-1])


def test_a_model_that_hears_is_not_asked_to_continue_text(tmp_path, capsys):
    sizes = dict(vocab_size=96, d_model=16, num_mel_bins=8, max_source_positions=16, max_target_positions=32)
    layers = {
        f"{part}_{name}": size
        for part in ("encoder", "decoder")
        for name, size in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "whisper", **sizes, **layers}))
    assert main(["generate", "--model", str(tmp_path), "x"]) == 2
    assert "is a whisper model: it needs audio, and the command only has text; in Python" in capsys.readouterr().err
    safetensors.write(tmp_path / "model.safetensors", {})
    assert main(["info", str(tmp_path)]) == 0
    assert "layers       1 Full(), 1 Cross(16)" in capsys.readouterr().out


def test_a_folder_of_the_hubs_cache_leads_to_the_checkpoint_in_it(tmp_path, capsys):
    snapshot = tmp_path / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").touch()
    assert main(["info", str(tmp_path)]) == 1
    assert f"is a folder of the hub's cache; the checkpoint lies in {snapshot}" in capsys.readouterr().err


def test_a_tokenizer_of_another_model_is_noticed(checkpoint, capsys):
    directory = Path(checkpoint())
    tokenizer = (directory / "tokenizer.json").read_text().replace('"t95": 95', '"t95": 195')
    (directory / "tokenizer.json").write_text(tokenizer)
    assert main(["generate", "-m", str(directory), "t95"]) == 1
    assert "this text has the token 195, and the model knows 96" in capsys.readouterr().err


def test_loading_shows_its_progress_on_a_terminal_only(capsys):
    pytest.importorskip("tqdm")
    for show in (True, False):
        with progress_bar("loading", show=show) as progress:
            progress(50, 100)
        assert ("loading" in capsys.readouterr().err) == show


@pytest.mark.parametrize("kind", ["qwen", "gemma"])
def test_what_transformers_wrote_is_continued_and_answered_as_by_transformers(kind, tmp_path, capsys, type_in):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from golden import make_tokenizers

    tokenizer = transformers.AutoTokenizer.from_pretrained(make_tokenizers.build(kind, tmp_path / "made"))
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = transformers.LlamaConfig(vocab_size=len(tokenizer) + 10, eos_token_id=None, initializer_range=0.3, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    directory = tmp_path / "written"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)

    def continued(tokens: list[int]) -> str:
        with torch.no_grad():
            made = model.generate(torch.tensor([tokens]), max_new_tokens=40, do_sample=False)[0]
        return printable(tokenizer.decode(made[len(tokens) :] if chats else made, skip_special_tokens=True))

    text, chats = "Hello world", False
    assert main(["generate", "--model", str(directory), text, "-n", "40", "-q"]) == 0
    assert capsys.readouterr().out == continued(tokenizer.encode(text)) + "\n"
    chats = True
    type_in(text)
    assert main(["chat", "--model", str(directory), "-n", "40", "-q"]) == 0
    messages = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert capsys.readouterr().out == continued(prompt) + "\n"


# --- info ------------------------------------------------------------------------------------------------------------


def test_info_says_what_a_checkpoint_is(checkpoint, capsys):
    directory = checkpoint("mistral", TEMPLATE, eos_token_id=2)
    assert main(["info", "--model", directory, "--memory", "1GB"]) == 0
    out, err = capsys.readouterr()
    assert main(["info", directory, "--memory", "1GB"]) == 0
    assert capsys.readouterr().out == out
    assert err == ""
    for line in (
        "parameters   20,328, 39.7 KiB of bfloat16",
        "layers       3 Window(8)",
        "attention    4 query heads, 2 kv heads x 8",
        "context      texts of up to 128 tokens",
        "tokenizer    96 tokens, with a chat template",
        "stop tokens  2",
    ):
        assert f"{line}\n" in out
    assert re.search(r"^bfloat16 +39\.7 KiB +0 B +24\.5 KiB +all 128$", out, re.MULTILINE)
    assert "953.7 MiB (given)" in out


def test_info_says_how_long_a_text_fits(capsys):
    assert main(["info", "--memory", "6MB"]) == 0
    longest = re.findall(r"^b?float\d+ .* (\S+)$", capsys.readouterr().out, re.MULTILINE)
    plan = jaxkv.plan_memory(tiny.load().specs, 1, int(longest[0])).nbytes
    left = 6_000_000 - 4 * 1_373_920
    assert longest[1:] == ["512", "512"] and plan <= left
    assert jaxkv.plan_memory(tiny.load().specs, 1, int(longest[0]) + 64).nbytes > left
    assert main(["info", "--memory", "4MB"]) == 0
    assert "too large" in capsys.readouterr().out


def test_info_plans_for_rows_and_capacity(capsys):
    assert main(["info", "--rows", "3", "--capacity", "0.1k", "--memory", "7.5MB"]) == 0
    out = capsys.readouterr().out
    specs = [
        dataclasses.replace(spec, k_storage=jaxkv.Dense("float32"), v_storage=jaxkv.Dense("float32"))
        for spec in tiny.load().specs
    ]
    plan = jaxkv.plan_memory(specs, 3, 100)
    assert "at 100 tokens, 3 texts" in out and "longest: tokens of each of 3 texts beside the parameters" in out
    shown = "".join(f"  {line}\n" for line in str(plan).splitlines())
    assert out.endswith(f"cache for 3 texts of up to 100 tokens in float32:\n{shown}")
    longest = int(re.search(r"^float32 .* (\d+)$", out, re.MULTILINE)[1])
    left = 7_500_000 - 4 * 1_373_920
    assert jaxkv.plan_memory(specs, 3, longest).nbytes <= left < jaxkv.plan_memory(specs, 3, longest + 64).nbytes

    assert main(["info", "--rows", "3", "--context", "0.1k", "--layout", "pages", "--memory", "7.5MB"]) == 0
    out = capsys.readouterr().out
    plan = jaxkv.plan_memory(specs, 3, 100, layout=jaxkv.Pages(3 * 7))
    shown = "".join(f"  {line}\n" for line in str(plan).splitlines())
    assert out.endswith(f"cache for 3 texts of up to 100 tokens in float32, in pages of 16 tokens:\n{shown}")
    longest = int(re.search(r"^float32 .* (\d+)$", out, re.MULTILINE)[1])
    for tokens, fits in ((longest, True), (longest + 64, False)):
        pool = jaxkv.Pages(3 * -(-tokens // 16))
        assert (jaxkv.plan_memory(specs, 3, tokens, layout=pool).nbytes <= left) == fits


def test_info_names_the_memory_that_is_free_here(capsys, monkeypatch):
    monkeypatch.setattr(info, "free_memory", lambda: (1 << 30, "free on this machine"))
    assert main(["info"]) == 0
    assert "1.0 GiB (free on this machine)" in capsys.readouterr().out
    monkeypatch.undo()
    assert info.free_memory()[0] > 0
    gpu = types.SimpleNamespace(
        platform="gpu", device_kind="GPU X", memory_stats=lambda: {"bytes_limit": 9, "bytes_in_use": 2}
    )
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    assert info.free_memory() == (7, "free on GPU X")


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "--top-p", "0", "x"], "argument --top-p: p is 0.0, must be above 0"),
        (["generate", "--temperature", "-1", "x"], "argument --temperature: t is -1.0, must be"),
        (["generate", "--top-k", "0", "x"], "argument --top-k: k is 0, must be"),
        (["generate", "--greedy", "--top-k", "3", "x"], "--greedy takes the most probable token; leave out --top-k"),
        (["generate", ""], "the prompt is empty; give some text"),
        (
            ["generate", "x" * 20, "--capacity", "8"],
            "--capacity: the prompt has 20 tokens, and the cache has room for 8; give",
        ),
        (["generate", "x", "--compare", "--samples", "2"], "--compare decodes one text, greedily"),
        (["generate", "x", "--compare", "--top-p", "0.5"], "--compare decodes one text, greedily"),
        (
            ["generate", "x", "-n", "0"],
            "'0' is not a number of tokens; give a whole number from 1 to 1,073,741,824; see jaxkv",
        ),
        (["generate", "x", "-n", "many"], "argument -n/--max-new-tokens: 'many' is not a number of tokens"),
        (["chat", "-n", "40", "--capacity", "64"], "a cache for 64; give 32 or less, or --capacity 160"),
        (["chat", "-n", "300"], "leave too little room in a cache for 512; give 256 or less"),
        (["chat", "--system", "Be brief."], "has no chat template, so it takes no system message; leave out --system"),
        (["generate", "x", "-n", "600"], "1 token of prompt and 600 new ones are more than the 512"),
        (["generate", "x" * 512], "the prompt has 512 tokens, and the model's context is 512"),
        (["generate", "x", "--capacity", "1024"], "argument --capacity: 1,024 is more than the 512 tokens"),
        (["generate", "x", "--model", "openai/gpt-2"], "hf download openai/gpt-2 --local-dir gpt-2; then give gpt-2"),
        (["info", "nowhere"], "nowhere is not a directory; give one that holds a checkpoint"),
        (["info", "pyproject.toml"], "pyproject.toml is a file; give the directory that holds it"),
        (["info", "--memory", "8 bits"], "'8 bits' is not a size; give one such as 8GB"),
        (["info", "--rows", "0"], "argument --rows: '0' is not a count; give 1 or more"),
        (["info", "--context", "9999"], "argument --context/--capacity: 9,999 is more than the 512 tokens"),
        (
            ["generate", "x", "--seed", "-1"],
            "argument --seed: '-1' is not a seed; give a whole number from 0 to",
        ),
        (["generate", "x", "--temperature", "hot"], "argument --temperature: 'hot' is not a number; give one such as"),
        (["generate", "x", "--no-repeat-ngram-size", "2.5"], "ngram-size: '2.5' is not a whole number; give one such"),
        (["generate", "hi", "there"], 'the prompt is more than one word: put it in quotes, "hi there"'),
        (["generate", "hi", "-n", "3", "there"], 'put it in quotes, "hi there"'),
        (["generate", "hi", "--top-q", "3"], "--top-q 3 is not known; see jaxkv generate --help"),
        (["chat", "hello"], "start it and then write; a checkpoint goes after --model: --model hello"),
        (["generate", "tests", "hi"], "a checkpoint goes after --model: --model tests"),
        (["info", "tests", "hi"], "hi is not known; see jaxkv info --help"),
        (["generate", "hi", "--prompts", "-"], "--prompts takes the prompts from a file; leave out PROMPT"),
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
    assert capsys.readouterr().err == "jaxkv: error: model.safetensors: no such file or directory\n"


def test_a_file_of_prompts_that_cant_be_read_is_named(small_model, capsys):
    for name, message in (("nowhere.txt", "no such file or directory"), ("tests", "is a directory")):
        assert main(["generate", "--prompts", name]) == 1
        assert capsys.readouterr().err == f"jaxkv: error: {name}: {message}\n"


def test_too_little_memory_is_said_and_other_failures_of_jax_are_not_hidden(small_model, capsys, monkeypatch):
    def fail(what: str):
        def stream(*args, **options):
            raise jax.errors.JaxRuntimeError(what)

        monkeypatch.setattr("jaxkv.cli.run.stream", stream)

    fail("RESOURCE_EXHAUSTED: Out of memory allocating 12345 bytes.")
    assert main(["generate", "x"]) == 1
    assert "error: there is not enough memory; jaxkv info DIR shows" in capsys.readouterr().err
    fail("INTERNAL: something else")
    with pytest.raises(jax.errors.JaxRuntimeError):
        main(["generate", "x"])


@pytest.mark.parametrize("words", [["--help"], ["generate", "--help"], ["chat", "--help"], ["info", "--help"]])
def test_help_fits_a_terminal_and_shows_examples(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        main(words)
    out, err = capsys.readouterr()
    assert (end.value.code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 104
    assert "jaxkv generate" in out or "/reset" in out or "jaxkv info" in out


# --- terminals -------------------------------------------------------------------------------------------------------

# A chat with a model that says what it heard: no program is compiled, and what is seen is the terminal's part.
AT_A_TERMINAL = """
import fcntl, os, signal, termios, types
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)
from jaxkv.cli import chat, terminal
try:
    heard = types.SimpleNamespace(messages=[], turn=lambda line: terminal.write(f"heard {line}" + chr(10)))
    chat.talk(heard, chat.Interrupts())
except KeyboardInterrupt:
    terminal.note("left")
"""


def wait_until_it_waits(pid):
    """Waits until a process has gone to sleep: Python's readline misses Ctrl-C between its prompt and that."""
    state = Path(f"/proc/{pid}/stat")
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] not in "SZ":
        os.sched_yield()


def test_at_a_terminal_interrupts_wipe_then_ask_then_end_and_own_text_has_a_color(tmp_path):
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": "", "INPUTRC": str(tmp_path)}

    terminals = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    with start(code=AT_A_TERMINAL, env=environment, **terminals) as chatting, os.fdopen(ours, "rb", buffering=0):
        os.close(theirs)
        seen, at = "", 0
        for awaited, typed in [
            ("> ", "hello\n"),
            ("> ", "half"),
            ("half", "\x03"),
            ("> ", "\x03"),
            ("Ctrl-C once more ends the chat", "more\n"),
            ("heard more.*> ", "\x03"),
            ("once more", "\x03"),
            ("left", ""),
        ]:
            while not re.search(awaited, seen[at:], re.DOTALL):
                assert select.select([ours], [], [], 120)[0], f"{awaited!r} does not come after {seen!r}"
                seen += os.read(ours, 4096).decode()
            at = len(seen)
            wait_until_it_waits(chatting.pid)
            os.write(ours, typed.encode())
    assert "\033[1;36m> " in seen and "\033[0mheard hello" in seen, "the model's text is plain"
    assert "\033[2mjaxkv: left\033[0m" in seen and "heard half" not in seen


def test_colors_are_for_terminals_that_want_them(monkeypatch):
    terminal = types.SimpleNamespace(isatty=lambda: True)
    for name, value, colored in [("TERM", "xterm", True), ("TERM", "dumb", False), ("NO_COLOR", "1", False)]:
        with monkeypatch.context() as patch:
            patch.setenv("TERM", "xterm")
            patch.delenv("NO_COLOR", raising=False)
            patch.setenv(name, value)
            assert bool(color("own", terminal)) == colored
            assert color("own", io.StringIO()) == ""


# --- text ------------------------------------------------------------------------------------------------------------


def text_of(tokens: list[int]) -> str:
    text = Text(ByteTokenizer())
    return text.take(tokens) + text.end()


def test_characters_wait_until_they_are_whole():
    text = Text(ByteTokenizer())
    assert [text.take([byte]) for byte in "é€".encode()] == ["", "é", "", "", "€"]
    assert text.end() == ""
    assert (text.text, text.tokens) == ("é€", list("é€".encode()))


def test_what_is_not_text_is_shown_as_such():
    assert text_of([0xFF, 0x41]) == "\N{REPLACEMENT CHARACTER}A"
    assert text_of([0x41, 0xC3]) == "A\N{REPLACEMENT CHARACTER}"
    assert text_of([0x1B, 0x0A]) == "\N{REPLACEMENT CHARACTER}\n"  # no escape sequences for the terminal
    assert text_of([0xC2, 0x9B]) == "\N{REPLACEMENT CHARACTER}"  # nor the one that stands for their beginning
