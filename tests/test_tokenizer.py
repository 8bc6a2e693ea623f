"""Tokenizers and chat templates against transformers: what it said when the golden file was made, and says now."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

from golden import make_tokenizers as golden
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxkv.models import ByteTokenizer, Tokenizer

FACTS = json.loads(golden.PATH.read_text())


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return {kind: golden.build(kind, tmp_path_factory.mktemp("checkpoint") / kind) for kind in golden.KINDS}


@pytest.fixture(scope="module")
def tokenizers(directories):
    return {kind: Tokenizer(directory) for kind, directory in directories.items()}


def parts(tokenizer, tokens) -> list[str]:
    stream = tokenizer.stream()
    return [*(stream.take([token]) for token in tokens), stream.end()]


# --- as transformers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", golden.KINDS)
def test_texts_give_the_tokens_that_transformers_gives_and_tokens_the_texts(kind, tokenizers):
    tokenizer = tokenizers[kind]
    for text, (framed, plain, shown, clean) in zip(golden.TEXTS, FACTS[kind]["texts"], strict=True):
        assert tokenizer.encode(text) == framed
        assert tokenizer.encode(text, special=False) == plain
        assert tokenizer.decode(framed, special=True) == shown
        assert tokenizer.decode(framed) == clean
        assert "".join(parts(tokenizer, framed)) == clean


@pytest.mark.parametrize("kind", golden.KINDS)
def test_conversations_are_rendered_and_read_as_by_transformers(kind, tokenizers):
    for key, (text, tokens) in FACTS[kind]["chats"].items():
        name, *options = key.split()
        asked = {"add_generation_prompt": "prompt" in options, "tools": golden.TOOLS if "tools" in options else None}
        if tokens is None:
            with pytest.raises(ValueError, match=rf"refuses these messages: {text}$"):
                tokenizers[kind].render(golden.MESSAGES[name], **asked)
        else:
            assert tokenizers[kind].render(golden.MESSAGES[name], **asked) == text
            assert tokenizers[kind].chat(golden.MESSAGES[name], **asked) == tokens


@pytest.mark.parametrize("kind", golden.KINDS)
def test_the_golden_file_is_what_transformers_says_today(kind, directories):
    pytest.importorskip("transformers")
    assert golden.expected(kind, directories[kind]) == FACTS[kind]


# --- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen", "gemma"])
@given(data=st.data())
@settings(deadline=None, max_examples=200)
def test_a_stream_gives_what_decoding_the_whole_gives_whatever_the_tokens(kind, tokenizers, data):
    tokenizer = tokenizers[kind]
    # Twenty more than there are: embeddings are often larger than the vocabulary. Bytes lie first.
    some = st.one_of(st.integers(-1, tokenizer.vocab_size + 20), st.integers(100, 255))
    tokens = data.draw(st.lists(some, max_size=30))
    known = [token for token in tokens if token < tokenizer.vocab_size]
    assert "".join(parts(tokenizer, tokens)) == tokenizer.decode(known) == tokenizer.decode(tokens)


def test_characters_wait_until_they_are_whole_and_spaces_stay(tokenizers):
    qwen = tokenizers["qwen"]
    assert parts(qwen, qwen.encode("é a", special=False)) == ["", "é", " ", "a", ""]
    assert parts(qwen, qwen.encode("é", special=False)[:1]) == ["", "�"]
    gemma = tokenizers["gemma"]
    assert parts(gemma, gemma.encode("Hello world a")) == ["", "Hello", " world", " a", ""]
    stream = gemma.stream()
    stream.take(gemma.encode("Hello"))
    assert stream.take(gemma.encode("world", special=False)) == " world"  # nothing is lost at the seam


def test_results_of_generate_are_read_as_they_are(tokenizers):
    tokens = np.array([*tokenizers["gemma"].encode("Hello"), -1, -1], np.int32)
    assert tokenizers["gemma"].decode(tokens) == "Hello"


# --- chat templates --------------------------------------------------------------------------------------------------


def chat(tmp_path, template: str, **config) -> Tokenizer:
    golden.build("llama3", tmp_path)
    config = {"bos_token": "<|begin|>", "chat_template": template, **config}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(tmp_path)


def test_a_template_gets_what_the_caller_gives(tmp_path):
    tokenizer = chat(tmp_path, "{{ bos_token }}{{ thinking }}{{ strftime_now('%Y') | length }}")
    assert tokenizer.render([{"role": "user"}], thinking="no", bos_token="B") == "Bno4"
    assert tokenizer.chat_template.startswith("{{ bos_token")


def test_templates_are_chosen_by_name(tokenizers):
    messages = golden.MESSAGES["one"]
    assert "<|im_start|>" in tokenizers["odd"].render(messages, template="tool_use")
    with pytest.raises(ValueError, match=r"no chat template 'rag'; it has 'default', 'tool_use': give template="):
        tokenizers["odd"].render(messages, template="rag")


def test_special_tokens_of_old_checkpoints_lie_in_a_file_of_their_own(tmp_path):
    golden.build("llama3", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ bos_token }}{{ eos_token }}"}))
    named = {"bos_token": {"content": "<|begin|>", "lstrip": False}, "eos_token": "<|end|>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(named))
    assert Tokenizer(tmp_path).render(golden.MESSAGES["one"]) == "<|begin|><|end|>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template 'default'; encode plain text, or put a chat_template.jinja there"),
        ("{% if %}", r"can't be read: Expected an expression.* \(its line 1\)"),
        ("{{ messages[0].content + 1 }}", "refuses these messages: can only concatenate str"),
        ("{{ messages[3].content }}", "refuses these messages: .*has no element 3"),
        ("{{ ''.__class__.__mro__ }}", "refuses these messages: .*unsafe"),
        ("{{ messages.append(1) }}", "refuses these messages: .*unsafe"),
        ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "refuses these messages: .*may not set '__class__'"),
    ],
)
def test_templates_that_fail_are_named(tmp_path, template, message):
    tokenizer = chat(tmp_path, template)
    assert (tokenizer.chat_template is None) == (template is None)
    with pytest.raises(ValueError, match=message):
        tokenizer.render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("template", "stops"),
    [
        (golden.CHATML, ["<|end|>", "<|im_end|>"]),
        (golden.LLAMA3, ["<|end|>", "<|eot|>"]),
        (golden.GEMMA, ["<|end|>"]),  # its tokens are not in this vocabulary
        ("{{ messages[-1].content[0].text }}{{ '<|im_end|>' }}", ["<|end|>", "<|im_end|>"]),  # content in parts
        # Behind the last message another token than behind the others, as gpt-oss has it: only that one ends the turn.
        (
            "{% for m in messages %}{{ m.content }}{{ '<|eot|>' if loop.last else '<|im_end|>' }}{% endfor %}",
            ["<|end|>", "<|eot|>"],
        ),
        ("{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}", ["<|end|>", "<|user|>"]),  # GLM
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", ["<|end|>"]),
        ("{{ messages[5].content }}", ["<|end|>"]),
        (None, ["<|end|>"]),
    ],
)
def test_stop_tokens_are_the_ends_of_a_text_and_of_a_turn(tmp_path, template, stops):
    tokenizer = chat(tmp_path, template, eos_token="<|end|>")
    assert tokenizer.decode(tokenizer.stop_tokens, special=True) == "".join(stops)
    assert len(tokenizer.stop_tokens) == len(stops)


def test_a_conversation_has_a_message(tokenizers):
    with pytest.raises(ValueError, match="messages is empty"):
        tokenizers["qwen"].chat([])


# --- what is missing -------------------------------------------------------------------------------------------------


def test_a_missing_tokenizer_says_what_is_there_and_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json; fetch it from where the checkpoint comes from"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(FileNotFoundError, match=r"only tokenizer\.model, which is another format; make it with"):
        Tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no directory"):
        Tokenizer(tmp_path / "nowhere")


def test_damaged_files_are_named(tmp_path):
    golden.build("qwen", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json can't be read by tokenizers"):
        Tokenizer(tmp_path)


def test_a_missing_library_names_the_extra(tmp_path, monkeypatch, tokenizers):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"tokenizers is not installed.*pip install tokenizers jinja2$"):
        Tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"jinja2 is not installed.*pip install tokenizers jinja2$"):
        tokenizers["qwen"].render(golden.MESSAGES["one"])


# --- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "for", "naïve → 🐍"])
def test_bytes_come_back_as_text(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == "".join(parts(tokenizer, tokenizer.encode(text))) == text
    assert tokenizer.decode(np.array([*tokenizer.encode(text), 0, -1, 300])) == text
    assert tokenizer.decode([*tokenizer.encode(text), 0], special=True) == text + "\0"


def test_cut_bytes_are_replaced():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode("é")[:1]) == "�"
    assert parts(tokenizer, tokenizer.encode("é€")[:-1]) == ["", "é", "", "", "�"]


def test_bytes_know_no_chat():
    assert ByteTokenizer([2, 0]).stop_tokens == (0, 2)
    assert ByteTokenizer().chat_template is None
    with pytest.raises(ValueError, match="no chat template; encode plain text"):
        ByteTokenizer().chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("wrong", ["a", 1.5])
def test_tokens_are_integers(wrong, tokenizers):
    for tokenizer in (ByteTokenizer(), tokenizers["qwen"]):
        with pytest.raises(TypeError):
            tokenizer.decode([wrong])
