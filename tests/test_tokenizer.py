"""Tokenizers and chat templates against transformers: what it said when the golden file was made, and says now."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

from golden import make_chats as golden_chats
from golden import make_tokenizers as golden
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxkv.models import ByteTokenizer, TemplateLimit, Tokenizer, template, tools

CHATS = json.loads(golden_chats.PATH.read_text())
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
def test_added_tokens_have_the_numbers_flags_and_names_that_transformers_gives(kind, tokenizers):
    flags = "content", "single_word", "lstrip", "rstrip", "normalized", "special"
    added = tokenizers[kind]._added
    assert sorted([i, *(getattr(token, flag) for flag in flags)] for i, token in added.items()) == FACTS[kind]["added"]
    assert tokenizers[kind].special_tokens == FACTS[kind]["named"]


@pytest.mark.parametrize("kind", golden.KINDS)
def test_conversations_are_rendered_and_read_as_by_transformers(kind, tokenizers):
    for key, (text, tokens) in FACTS[kind]["chats"].items():
        name, *options = key.split()
        asked = {"add_generation_prompt": "prompt" in options, "tools": golden.TOOLS if "tools" in options else None}
        if asked["tools"] and kind in ("llama3", "gemma", "llama2", "llama_names"):
            with pytest.raises(ValueError, match="never reads tools; it reads"):  # transformers drops them
                tokenizers[kind].render(golden.MESSAGES[name], **asked)
            continue
        if tokens is None:
            with pytest.raises(ValueError, match=rf"refuses these messages: {text}$"):
                tokenizers[kind].render(golden.MESSAGES[name], **asked)
        else:
            assert tokenizers[kind].render(golden.MESSAGES[name], **asked) == text
            assert tokenizers[kind].chat(golden.MESSAGES[name], **asked) == tokens


@pytest.mark.parametrize("kind", golden.KINDS)
def test_the_golden_file_is_what_transformers_says_today(kind, directories):
    pytest.importorskip("transformers")
    assert json.loads(json.dumps(golden.expected(kind, directories[kind]))) == FACTS[kind]


def test_the_golden_chats_are_what_transformers_says_today():
    pytest.importorskip("transformers")
    assert golden_chats.expected() == CHATS


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
    assert tokenizers["gemma"].decode([*tokens, 2**31, 2**40]) == "Hello"


# --- chat templates --------------------------------------------------------------------------------------------------


def chat(tmp_path, template: str, **config) -> Tokenizer:
    golden.build("llama3", tmp_path)
    config = {"bos_token": "<|begin|>", "chat_template": template, **config}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(tmp_path)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    directory = golden.build("llama3", tmp_path_factory.mktemp("checkpoint"))
    templates = [{"name": name, "template": text} for name, text in golden_chats.TEMPLATES.items()]
    config = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "chat_template": templates}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(directory)


@pytest.mark.parametrize("template", golden_chats.TEMPLATES)
def test_messages_are_rendered_and_continued_as_by_transformers(template, chats):
    for chat in golden_chats.CHATS:
        for option, values in golden_chats.OPTIONS.items():
            wanted = CHATS["texts"][f"{template}/{chat}/{option}"]
            if chat == "parts" and (wanted is None or "[{" in wanted):
                # A template that knows no parts: transformers fails, or shows a list as Python writes it.
                wanted = CHATS["texts"][f"{template}/joined/{option}"]
            if wanted is None:
                with pytest.raises(ValueError, match="continue_final_message: the "):
                    chats.render(golden_chats.CHATS[chat], template=template, **values)
            else:
                assert chats.render(golden_chats.CHATS[chat], template=template, **values) == wanted, (chat, option)


def test_an_answer_is_begun_or_continued_not_both(chats):
    messages = golden_chats.CHATS["plain"]
    continued = chats.render(messages, template="chatml", continue_final_message=True)
    assert continued.endswith("<|im_start|>assistant\nIt is")
    assert chats.chat(messages, template="chatml", continue_final_message=True) == chats.encode(
        continued, special=False
    )
    with pytest.raises(ValueError, match=r"begins a new answer and continue_final_message goes on.*give one of them"):
        chats.render(messages, template="chatml", continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(ValueError, match=r"the last message has no 'thinking' to continue, only role, content"):
        chats.render(messages, template="chatml", continue_final_message="thinking")
    with pytest.raises(ValueError, match="leaves out a part of the last message"):
        chats.render(golden.MESSAGES["system"][:1], template="llama2", continue_final_message=True)


def test_arguments_of_calls_and_contents_are_given_in_the_form_that_a_template_reads(chats, tmp_path):
    messages = golden_chats.CHATS["calls"]
    text = json.loads(json.dumps(messages))
    call = text[1]["tool_calls"][0]["function"]
    call["arguments"] = json.dumps(call["arguments"], ensure_ascii=False)
    for name in ("qwen3", "oss"):
        assert chats.render(text, template=name) == chats.render(messages, template=name)
    # DeepSeek's templates put the arguments together with texts, SmolVLM's know a content in parts only.
    joins = chat(tmp_path, "{% for m in messages %}{{ '<' + m.tool_calls[0].function.arguments + '>' }}{% endfor %}")
    assert joins.render(messages[1:]) == joins.render(text[1:]) == '<{"a": 1, "b": "zwö"}>'
    parts = (
        "{% for m in messages %}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
    )
    assert chat(tmp_path, parts + "{% endfor %}").render([{"role": "user", "content": "Hello"}]) == "Hello"
    # A call that comes without a content, as the clients of OpenAI give it.
    messages[1:] = [{**messages[1], "content": None}]
    assert "add" in chats.render(messages, template="qwen3")


def test_messages_may_be_objects_and_hold_what_json_has_not(chats):
    @dataclasses.dataclass
    class Message:
        role: str
        content: Any

    class Model:
        def model_dump(self):
            return {"role": "assistant", "content": np.str_("b"), "tool_calls": None}

    text = chats.render(
        [Message("user", [{"type": "text", "text": "a"}, {"type": "image", "image": object()}]), Model()],
        template="qwen3",
        add_generation_prompt=False,
    )
    assert text == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Hello", r"messages is a str, must be a list such as \[\{"),
        ({"role": "user", "content": "x"}, "messages is a dict, must be a list"),
        ([], "messages is empty; give at least one"),
        (["Hello"], r"messages\[0\] is 'Hello', must be a mapping"),
        ([{"role": "user"}, {"content": "x"}], r"messages\[1\] has no role but content"),
        ([{"role": 5}], r"messages\[0\] has no role but role|is 5"),
    ],
)
def test_wrong_messages_are_named(messages, message, tokenizers):
    for call in (tokenizers["qwen"].render, tokenizers["qwen"].chat):
        with pytest.raises(ValueError, match=message):
            call(messages)


def test_a_variable_that_the_template_never_reads_is_named(tokenizers, chats):
    said = golden.MESSAGES["one"]
    assert chats.render(said, template="qwen3", enable_thinking=True) != chats.render(said, template="qwen3")
    with pytest.raises(ValueError, match=r"'qwen3' of .* never reads enable_thinkin; it reads enable_thinking, tools$"):
        chats.chat(said, template="qwen3", enable_thinkin=False)
    with pytest.raises(
        ValueError, match=r"never reads enable_thinking; it reads bos_token, date_string, system_message$"
    ):
        tokenizers["llama3"].render(said, enable_thinking=True, date_string="today")
    assert tokenizers["llama3"].render(said, enable_thinking=None, tools=[]) == tokenizers["llama3"].render(said)


# --- tools -----------------------------------------------------------------------------------------------------------


def test_functions_become_the_schemas_that_transformers_makes(chats):
    functions = golden_chats.functions()
    assert [tools.schema(function) for function in functions] == CHATS["schemas"]
    said = golden.MESSAGES["one"]
    text = chats.render(said, template="qwen3", tools=[*functions, *golden.TOOLS])
    assert text == chats.render(said, template="qwen3", tools=[*CHATS["schemas"], *golden.TOOLS])


def test_functions_without_a_schema_say_what_they_lack(chats):
    messages = (
        "the tool no_doc has no docstring",
        "argument a of the tool no_hint has no annotation",
        "does not describe b; add a line",
        "has the annotation <class 'pathlib.Path'>, which has no JSON schema",
        "one of any length",
        "one of any length",
        "whose values .* are not all texts or numbers",
    )
    for function, message in zip(golden_chats.wrong_functions(), messages, strict=True):
        with pytest.raises(ValueError, match=message):
            chats.render(golden.MESSAGES["one"], template="qwen3", tools=[function])
    for wrong in ("add", {"name": "add"}, [5], ["add"], 5):
        with pytest.raises(ValueError, match=r"must be a (list of functions|function) or"):
            chats.render(golden.MESSAGES["one"], template="qwen3", tools=wrong)


# --- limits ----------------------------------------------------------------------------------------------------------

LONG = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_that_takes_too_long_is_ended_and_the_next_one_runs(tmp_path):
    tokenizer = chat(tmp_path, LONG)
    tokenizer.template_limit = TemplateLimit(seconds=0.2)
    with pytest.raises(
        ValueError,
        match=r"takes longer than its limit, 0.2 s; .*tokenizer.template_limit = TemplateLimit\(seconds=1.2\)",
    ):
        tokenizer.render(golden.MESSAGES["one"])
    assert chat(tmp_path, "{{ 1 + 1 }}").render(golden.MESSAGES["one"]) == "2"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process")
@pytest.mark.parametrize("template", ["{{ messages[0].content * 10**9 }}", "{{ 'x' | center(10**9) | length }}"])
def test_a_template_that_takes_too_much_memory_is_named(tmp_path, template):
    tokenizer = chat(tmp_path, template)
    with pytest.raises(
        ValueError, match=r"its limit, 512 MB of memory; if you trust it.*TemplateLimit\(megabytes=2048\)"
    ):
        tokenizer.render([{"role": "user", "content": "x"}])


def test_a_text_that_is_too_long_is_named_wherever_it_is_made(tmp_path):
    tokenizer = chat(tmp_path, "{{ messages[0].content * 300000 }}")
    for seconds in (10, None):
        tokenizer.template_limit = TemplateLimit(seconds, megabytes=1)
        with pytest.raises(ValueError, match="its limit, 262,144 characters"):
            tokenizer.render([{"role": "user", "content": "x"}])


def test_templates_run_in_this_process_if_asked(chats, monkeypatch, tmp_path):
    said = golden_chats.CHATS["reasoning"]
    there = chats.render(said, template="qwen3")
    here = Tokenizer(chats.directory)
    here.template_limit = TemplateLimit(seconds=None)
    assert here.render(said, template="qwen3") == there
    with pytest.raises(ValueError, match=r"refuses these messages: .*unsafe"):
        chat(tmp_path, "{{ ''.__class__.__mro__ }}").render(said)
    # Where no process can be started, the error says so.
    template._process.end()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"can't run in a process of its own \(No such.*TemplateLimit\(seconds=None\)"):
        chats.render(said, template="qwen3")


def test_a_process_that_was_ended_from_outside_is_replaced(chats):
    said = golden_chats.CHATS["plain"]
    first = chats.render(said, template="qwen3")
    template._process._running.kill()
    template._process._running.wait()
    assert chats.render(said, template="qwen3") == first


FORKS = """
import os, sys, threading, time
from jaxkv.models.template import TemplateLimit, render

def run(text):
    return render(text, "it", {}, [], TemplateLimit(seconds=2))

def work():
    try:
        run("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    except ValueError:
        pass

assert run("{{ 1 + 1 }}") == "2"
busy = threading.Thread(target=work)
busy.start()
while not render.__globals__["_process"]._lock.locked():
    time.sleep(0.01)
child = os.fork()
if child == 0:
    sys.exit(run("{{ 1 + 2 }}") != "3")
busy.join()
assert os.waitpid(child, 0)[1] == 0
assert run("{{ 1 + 3 }}") == "4"
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks here")
def test_a_fork_renders_for_itself_though_a_thread_was_at_it():
    subprocess.run([sys.executable, "-c", FORKS], check=True, timeout=120)


def test_threads_may_render_at_once(chats):
    texts = {}

    def work(index: int) -> None:
        for turn in range(20):
            texts[index, turn] = chats.render([{"role": "user", "content": f"{index} {turn}"}], template="trimmed")

    threads = [threading.Thread(target=work, args=[index]) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(f">{i} {turn}<" in text for (i, turn), text in texts.items()) and len(texts) == 80


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
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        Tokenizer(tmp_path / "nowhere")


def test_damaged_files_are_named(tmp_path):
    golden.build("qwen", tmp_path)
    whole = (tmp_path / "tokenizer.json").read_text()
    for text in ("{}", "[]", "\0", whole[:-2], '{"added_tokens": [{"id": 1}]}', "[" * 100_000):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match=r"tokenizer\.json: tokenizers .* can't read it: "):
            Tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer(tmp_path)


def edited(tmp_path, **fields) -> Tokenizer:
    """Returns the tokenizer of Qwen's kind with other fields in tokenizer.json."""
    content = json.loads((golden.build("qwen", tmp_path) / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | fields))
    return Tokenizer(tmp_path)


def test_where_the_library_panics_there_is_one_error(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json: tokenizers .* can't read it: Precompiled"):
        edited(tmp_path, normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})
    tokenizer = edited(tmp_path, pre_tokenizer={"type": "FixedLength", "length": 0})
    with pytest.raises(ValueError, match="can't encode this text: chunk size must be non-zero"):
        tokenizer.encode("a")
    tokenizer = edited(tmp_path, decoder={"type": "Strip", "content": "b", "start": 0, "stop": 9})
    for decode in (tokenizer.decode, tokenizer.stream().take):
        with pytest.raises(ValueError, match="can't decode these tokens: index out of bounds"):
            decode(tokenizer.encode("b", special=False))


def test_merges_that_would_end_the_process_are_refused(tmp_path):
    # tokenizers 0.23 cuts "é" in two, and the whole process ends while it says so.
    model = {"type": "BPE", "vocab": {"é": 0, "éé": 1}, "merges": ["é é"], "continuing_subword_prefix": "#"}
    with pytest.raises(ValueError, match=r"the merge \['é', 'é'\] does not go on with continuing_subword_prefix, '#'"):
        edited(tmp_path, model=model)


def test_tokens_that_cant_have_their_numbers_are_named(tmp_path):
    token = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False) | {"content": "<x>"}
    with pytest.raises(ValueError, match=r"tokenizer\.json: added_tokens has '<x>' as token 999, but it becomes 265"):
        edited(tmp_path, added_tokens=[{"id": 999, **token}])
    golden.build("llama2", tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<x>": 999}')
    with pytest.raises(
        ValueError, match=r"added_tokens\.json: '<x>' is token 999, but it becomes \d+: the numbers of added tokens"
    ):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"999": {"content": "<x>"}}}')
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: '<x>' is token 999"):
        Tokenizer(tmp_path)


WRONG = [True, 5, -1, 1.5, "", "x", "\ud800", [], [5], [None], ["x", []], {}, {"a": 5}, {"5": {}}, {"content": 5}]
WRONG += [{"5": "x"}, {"x": {"content": "x"}}, {"content": "x", "lstrip": "false"}, [{"name": 5, "template": "x"}]]
WRONG += [{"-1": {"content": "x"}}, {"9" * 30: {"content": "x"}}, [[["x"]]], {"default": 5}, {"__type": "AddedToken"}]


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        (
            "tokenizer_config.json",
            "bos_token eos_token unk_token pad_token image_token add_bos_token extra_special_tokens chat_template "
            "additional_special_tokens added_tokens_decoder tokenizer_class legacy add_prefix_space model_max_length",
        ),
        ("special_tokens_map.json", "bos_token eos_token x_token extra_special_tokens additional_special_tokens"),
        ("added_tokens.json", "x <|end|>"),
        ("config.json", "tokenizer_class model_type"),
    ],
)
def test_a_field_of_the_wrong_kind_is_named_or_does_no_harm(tmp_path, file, fields):
    golden.build("llama_class", tmp_path)
    refused = set()
    base = {"tokenizer_class": "LlamaTokenizer"} if file == "tokenizer_config.json" else {}
    for field in fields.split():
        for value in WRONG:
            (tmp_path / file).write_text(json.dumps(base | {field: value}))
            try:
                tokenizer = Tokenizer(tmp_path)
            except ValueError as error:
                said = str(error)
                refused.add(field)
            else:
                said = str(tmp_path / file)
                assert tokenizer.decode(tokenizer.encode("ab a")) == "ab a"
                assert all(isinstance(token, int) for token in tokenizer.stop_tokens)
            assert str(tmp_path / file) in said, (field, value, said)
    harmless = {"model_type", "x", "x_token", "image_token", "add_bos_token", "model_max_length"}
    assert refused >= set(fields.split()) - harmless


def test_text_files_may_begin_with_a_mark_and_must_be_utf_8(tmp_path):
    golden.build("gemma", tmp_path)
    names = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
    plain = Tokenizer(tmp_path).chat(golden.MESSAGES["one"])
    contents = {name: (tmp_path / name).read_bytes() for name in names}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
    assert Tokenizer(tmp_path).chat(golden.MESSAGES["one"]) == plain
    for name, content in contents.items():
        (tmp_path / name).write_bytes(b"\xff\xfe" + content)
        with pytest.raises(ValueError, match=rf"{name} is not .*UTF-8"):
            Tokenizer(tmp_path)
        (tmp_path / name).write_bytes(content)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "added_tokens.json"]
)
def test_what_is_no_file_is_not_opened(tmp_path, name):
    golden.build("gemma", tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=rf"{name} is a directory"):
        Tokenizer(tmp_path)
    (tmp_path / name).rmdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name} is a named pipe"):
            Tokenizer(tmp_path)


def test_texts_are_text(tokenizers):
    with pytest.raises(ValueError, match="text is a list, must be a str; chat takes messages"):
        tokenizers["qwen"].encode(golden.MESSAGES["one"])
    with pytest.raises(ValueError, match=r"text\[1\] is '\\ud800', half of a character"):
        tokenizers["qwen"].encode("a\ud800")


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
