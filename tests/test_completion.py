"""model.generate and model.stream: from prompts of every kind to texts, as the checkpoint's makers want them."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import jaxkv
from jaxkv import EMPTY, safetensors, sampling
from jaxkv.errors import CacheError
from jaxkv.models import Completion, Decoder, DecoderConfig, GenerationConfig, Model, load, tiny

GOLDEN = Path(__file__).parent / "golden"
WHISPER = GOLDEN / "families" / "whisper"
GREEDY = {"temperature": 0, "max_new_tokens": 12}
RETURN = "Return the "
SEED = 7


@functools.cache
def model():
    """It writes ASCII, of no sense and without much repetition."""
    config = DecoderConfig(vocab_size=128, width=16, num_layers=1, num_heads=2)
    made = Model.of(Decoder(config, rngs=nnx.Rngs(SEED)))
    generation = GenerationConfig(stop_tokens=(0,), greedy=False, temperature=0.7)
    params = jax.tree.map(lambda x: x * 3, made.params)
    return dataclasses.replace(
        made, params=params, context=512, generation=generation, make_tokenizer=tiny.ByteTokenizer
    )


class Chatty:
    """The tokenizer of the model that ships, as if it had been taught to chat."""

    def __init__(self):
        self.plain = model().tokenizer
        self.stop_tokens = (0, ord("|"))

    def __getattr__(self, name):
        return getattr(self.plain, name)

    def chat(self, messages, *, end="|"):
        return self.encode("".join(f"{m['role'][0]}:{m['content']}{end}" for m in messages) + "a:")


@functools.cache
def chatty():
    return dataclasses.replace(model(), make_tokenizer=Chatty)


def plain(prompts, **options):
    """The same by jaxkv.generate."""
    cache = jaxkv.Cache.init(model().specs, len(prompts), 512)
    tokens = [None if prompt is None else list(prompt.encode()) for prompt in prompts]
    return jaxkv.generate(model().forward, model().params, tokens, cache, stop_tokens=[0], **options)


def test_texts_are_continued_one_or_many():
    want = plain([RETURN, None, "A list"], max_new_tokens=12)
    result = model().generate([RETURN, None, "A list"], **GREEDY)
    assert isinstance(result, Completion)
    np.testing.assert_array_equal(result.tokens, want.tokens)
    np.testing.assert_array_equal(result.log_probs, want.log_probs)
    assert result.reasons == want.reasons == ("length", "idle", "length")
    assert result.texts == tuple(bytes(row[row > 0].tolist()).decode() for row in want.tokens)
    assert result.prompts[1] == () and result.history[0] == (*RETURN.encode(), *want.tokens[0].tolist())
    one = model().generate(RETURN, **GREEDY)
    assert one.texts == (one.text,) == result.texts[:1]
    with pytest.raises(ValueError, match=r"there are 3 texts; take one of texts"):
        _ = result.text


def test_tokens_are_prompts_too():
    want = model().generate(RETURN, **GREEDY)
    tokens = list(RETURN.encode())
    for prompt in (tokens, [tokens], np.array(tokens), np.array([tokens])):
        assert model().generate(prompt, **GREEDY).texts == want.texts


def test_messages_go_through_the_chat_template():
    messages = [{"role": "user", "content": "list"}]
    want = chatty().generate(list(b"u:list|a:"), **GREEDY)
    assert chatty().generate(messages, **GREEDY).tokens.tolist() == want.tokens.tolist()
    assert chatty().generate([messages, None, "u:list|a:"], **GREEDY).texts[0] == want.text
    other = chatty().generate(messages, chat={"end": "!"}, **GREEDY)
    assert other.prompts == (tuple(b"u:list!a:"),)


def test_it_samples_as_the_makers_say_and_what_is_given_takes_the_place():
    key = jax.random.key(0)
    want = plain([RETURN], max_new_tokens=12, sampler=sampling.sampler(temperature=0.7), key=key)
    assert model().generate(RETURN, max_new_tokens=12).tokens.tolist() == want.tokens.tolist()
    assert model().generate(RETURN, max_new_tokens=12, key=key).tokens.tolist() == want.tokens.tolist()
    given = {"top_k": 5, "presence_penalty": 0.5}
    sampler = sampling.sampler(temperature=0.7, **given)
    want = plain([RETURN], max_new_tokens=12, sampler=sampler, key=jax.random.key(3))
    assert model().generate(RETURN, max_new_tokens=12, seed=3, **given).tokens.tolist() == want.tokens.tolist()
    same = model().generate(RETURN, max_new_tokens=12, seed=3, sampler=sampler)
    assert same.tokens.tolist() == want.tokens.tolist()


def test_it_stops_at_the_tokens_of_the_checkpoint_and_at_those_of_the_tokenizer():
    free = chatty().generate(RETURN, **GREEDY, stop_tokens=())
    letter = free.text[4]
    end = free.text.index(letter)
    own = dataclasses.replace(chatty(), generation=GenerationConfig(stop_tokens=(ord(letter), 999)))
    result = own.generate(RETURN, max_new_tokens=12)
    assert (result.reasons, result.text) == (("stop",), free.text[:end])
    assert result.tokens[0, end] == ord(letter)
    tokenizer = Chatty()
    tokenizer.stop_tokens = (ord(letter),)
    own = dataclasses.replace(model(), make_tokenizer=lambda: tokenizer)
    assert own.generate(RETURN, **GREEDY).text == free.text[:end]
    later = own.generate(RETURN, min_new_tokens=end + 1, **GREEDY)
    assert len(later.text) > end  # the tokenizer's own stop token was held back, too


def test_stop_tokens_may_be_sequences():
    free = model().generate(RETURN, **GREEDY)
    end = free.text.index(free.text[3:5]) + 2
    result = model().generate(RETURN, stop_tokens=[0, list(free.text[3:5].encode())], **GREEDY)
    assert (result.reasons, result.text) == (("stop",), free.text[:end])


def test_a_stop_string_ends_its_row_and_is_cut_off():
    prompts = [RETURN, "A list", "The "]
    free = model().generate(prompts, **GREEDY)
    stop = free.texts[0][3:6]
    result = model().generate(prompts, stop_strings=stop, **GREEDY)
    for text, got, reason in zip(free.texts, result.texts, result.reasons, strict=True):
        at = text.find(stop)
        assert (got, reason) == ((text, "length") if at < 0 else (text[:at], "stop"))
    assert result.lengths[0] == free.texts[0].find(stop) + 3
    assert model().generate(RETURN, stop_strings=("zzz", stop), **GREEDY).text == result.texts[0]


def test_a_stream_gives_the_texts_of_generate_piece_by_piece():
    prompts = [RETURN, None, "A list"]
    for options in ({}, {"stop_strings": ["<X", "!r"]}, {"stop_tokens": [0, ord("p")]}):
        want = model().generate(prompts, **GREEDY, **options)
        steps = model().stream(prompts, **GREEDY, **options)
        pieces = list(steps)
        assert tuple(map("".join, zip(*pieces, strict=True))) == want.texts
        assert steps.result.texts == want.texts and steps.result.reasons == want.reasons
        one = model().stream(RETURN, **GREEDY, **options)
        pieces = list(one)
        assert "".join(pieces) == want.texts[0] and all(pieces)


def test_a_stream_holds_back_what_may_be_a_stop_string_until_it_is_not():
    free = model().generate(RETURN, **GREEDY).text
    steps = model().stream(RETURN, stop_strings=free[2:5] + "~", **GREEDY)
    assert "".join(steps) == free


def test_a_stream_may_be_left_and_its_result_goes_on():
    want = model().generate(RETURN, **GREEDY)
    steps = model().stream(RETURN, **GREEDY)
    begin = next(steps) + next(steps)
    part = steps.result
    assert part.text == begin and part.reasons == ("running",)
    rest = model().generate([*part.history[0]], temperature=0, max_new_tokens=10, cache=part)
    assert begin + rest.text == want.text


def test_a_conversation_goes_on_and_what_is_held_is_not_read_again(monkeypatch):
    read = []
    stream_file = __import__("importlib").import_module("jaxkv.generate.stream")
    read_block = stream_file.read_block
    monkeypatch.setattr(
        stream_file, "read_block", lambda *args: (read.append(int((args[3] >= 0).sum())), read_block(*args))[1]
    )
    messages = [{"role": "user", "content": "list"}]
    first = chatty().generate(messages, **GREEDY)
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "more"}]
    anew = chatty().generate(messages, **GREEDY)
    read.clear()
    turn = chatty().generate(messages, cache=first, **GREEDY)
    assert turn.tokens.tolist() == anew.tokens.tolist()
    held = len(first.prompts[0]) + 12 - 1
    assert sum(read) == len(turn.prompts[0]) - 1 - held
    # Said in another way: what differs is forgotten, and read anew.
    messages[0] = {"role": "user", "content": "lists"}
    other = chatty().generate(messages, cache=turn, **GREEDY)
    assert other.tokens.tolist() == chatty().generate(messages, **GREEDY).tokens.tolist()
    again = chatty().generate(messages, cache=other, **GREEDY)  # the same once more
    assert again.tokens.tolist() == other.tokens.tolist()


def test_a_cache_of_ones_own_may_be_given():
    cache = model().init_cache(1, 64)
    result = model().generate(RETURN, cache=cache, **GREEDY)
    assert result.cache.capacity == 64
    with pytest.raises(ValueError, match=r"give the whole result of the earlier call, cache=result"):
        model().generate(RETURN + result.text + ", ", cache=result.cache, **GREEDY)
    more = [*result.history[0], ord(",")]
    want = model().generate(more, **GREEDY)
    assert model().generate(more, cache=result.cache, **GREEDY).tokens.tolist() == want.tokens.tolist()


def test_a_row_that_was_full_goes_on_with_a_shorter_prompt():
    full = model().generate(RETURN, temperature=0, max_new_tokens=30, cache=model().init_cache(1, 16))
    assert full.reasons == ("full",)
    again = model().generate("A list", temperature=0, max_new_tokens=4, cache=full)
    assert again.reasons == ("length",)


def test_limits_are_those_of_the_checkpoint_and_of_what_it_was_made_for():
    short = dataclasses.replace(model(), context=20, generation=GenerationConfig())
    assert short.generate([RETURN, "A"]).lengths.tolist() == [9, 19]
    with pytest.raises(ValueError, match=r"a prompt of 11 tokens and 10 new ones are more than the 20.*=9 or less"):
        short.generate(RETURN, max_new_tokens=10)
    with pytest.raises(ValueError, match="a prompt has 20 tokens, and the model was made for texts of 20"):
        short.generate("a" * 20)
    said = dataclasses.replace(model(), generation=GenerationConfig(max_new_tokens=3))
    assert said.generate(RETURN).lengths.tolist() == [3]
    said = dataclasses.replace(model(), generation=GenerationConfig(stop_tokens=(0,), max_length=14))
    prompts = [RETURN, None, "A list"]
    assert said.generate(prompts).lengths.tolist() == [3, 0, 8]
    assert model().generate(prompts, temperature=0, max_new_tokens=[2, 9, 5]).lengths.tolist() == [2, 0, 5]


def test_a_model_without_a_tokenizer_takes_and_gives_tokens():
    mine = dataclasses.replace(model(), make_tokenizer=None)
    result = mine.generate([1, 2, 3], temperature=0, max_new_tokens=4)
    assert result.texts is None and result.lengths.tolist() == [4]
    mine = dataclasses.replace(mine, context=None)
    assert mine.stream([1, 2, 3]).result.cache.capacity == 1024
    with pytest.raises(FileNotFoundError, match=r"came without a tokenizer"):
        mine.generate("abc")
    with pytest.raises(ValueError, match=r"iterate over jaxkv.stream"):
        next(mine.stream([1, 2, 3]))
    with pytest.raises(ValueError, match=r"give capacity=, in tokens"):
        mine.init_cache()


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts is []; give a text, a list of messages"),
        (None, {}, "no prompts are given; give how each text begins"),
        ("", {}, "a prompt is empty: it has no tokens"),
        ([[1.5]], {}, "a prompt is [1.5]; give a text"),
        ({"role": "user"}, {}, "prompts is {'role': 'user'}; give a text, a list of messages"),
        ([{"role": "user", "content": "a"}], {}, "has no chat template"),
        ("a", {"sampler": sampling.Greedy(), "top_k": 3}, "sampler and top_k are given; give one or the other"),
        ("a", {"top_p": 2}, "TopP: p is 2"),
        ("a", {"max_new_tokens": 2.5}, "max_new_tokens is 2.5; give a whole number"),
        ("a", {"max_new_tokens": [1, 2]}, "max_new_tokens has 2 numbers for 1 prompts"),
        ("a", {"stop_strings": [""]}, "stop_strings is ['']; give a string or several"),
        ("a", {"stop_strings": 5}, "stop_strings is 5; give a string or several"),
        ("a", {"seed": "x"}, "seed is 'x'; give a whole number from 0 to 4294967295"),
        ("a", {"seed": 2**32}, "seed is 4294967296; give a whole number"),
        ("a", {"seed": -1}, "seed is -1; give a whole number"),
        ("a", {"chat": {"enable_thinking": False}}, "chat has enable_thinking for the chat template, which writes"),
        ("a", {"chat": "x"}, "chat is 'x'; give variables of the chat template"),
        (b"abc", {}, "prompts is b'abc'; give a text"),
        ("a", {"features": np.ones((1, 2, 3))}, "features are given, and this model reads text only"),
        ("a", {"cache": 3}, "cache is an int; give a jaxkv.Cache"),
    ],
)
def test_what_does_not_fit_is_refused(prompts, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        model().generate(prompts, **options)


def test_a_name_that_nobody_knows_does_not_vanish():
    with pytest.raises(TypeError, match=r"no option is called temprature, num_beams; .* are temperature, top_k, "):
        model().generate("a", temprature=0.5, num_beams=2)


def test_an_error_leaves_the_result_that_was_given_whole_and_a_second_use_is_named():
    first = model().generate(RETURN, **GREEDY)
    more = [*first.history[0], 32]
    for wrong in (
        {"prompts": [*more, 999]},
        {"prompts": [*more] * 99},
        {"stop_tokens": [999]},
        {"sampler": 5},
        {"sampler": lambda logits: logits},
    ):
        with pytest.raises((ValueError, TypeError)):
            model().generate(**{"prompts": more, "cache": first, **wrong})
    places = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(first.cache) if leaf.ndim == 4}
    second = model().generate(more, cache=first, **GREEDY)
    assert places == {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(second.cache) if leaf.ndim == 4}
    assert second.tokens.tolist() == model().generate(more, **GREEDY).tokens.tolist()
    with pytest.raises(CacheError, match="this cache was donated: an earlier generate or stream"):
        model().generate(more, cache=first)
    with pytest.raises(CacheError, match="this cache was donated: an earlier generate or stream"):
        model().generate(RETURN, cache=first.cache)


def test_the_result_of_a_run_that_failed_is_refused():
    def break_down(x):
        raise KeyError("sensor")

    def sampler(logits_or_key, logits):
        return jax.pure_callback(break_down, jax.ShapeDtypeStruct((), "int32"), logits[0], vmap_method="sequential")

    steps = model().stream("a", sampler=sampler)
    with pytest.raises(CacheError, match=r"KeyError: 'sensor'"):
        next(steps)
    assert steps.result.texts == ("",) and steps.result.cache is None
    with pytest.raises(ValueError, match=r"cache is lost.* leave it out"):
        model().generate("a", cache=steps.result)


@functools.cache
def whisper():
    return jaxkv.models.load(WHISPER, dtype="float32")


def test_whisper_hears_and_writes():
    facts = safetensors.File(WHISPER / "expected.safetensors")
    features = np.zeros((2, 40, 8), np.float32)
    features[0], features[1, :26] = facts["features.0"], facts["features.1"]
    prompts = [np.asarray(facts[f"tokens.{i}"]) for i in (0, 1)]
    result = whisper().generate(prompts, features=features, feature_lengths=np.array([40, 26]), max_new_tokens=20)
    for row in (0, 1):
        assert result.tokens[row].tolist() == np.asarray(facts[f"greedy.{row}"])[:20].tolist()
    begun = dataclasses.replace(whisper(), generation=GenerationConfig(start_tokens=(1, 2), max_new_tokens=2))
    assert begun.generate(features=features, feature_lengths=np.array([40, 26])).prompts == ((1, 2),) * 2
    asked = dataclasses.replace(whisper(), generation=GenerationConfig(start_tokens=(1, None, 3)))
    with pytest.raises(ValueError, match=re.escape("[1, None, 3], with a token number in place of None")):
        asked.generate(features=features)
    with pytest.raises(ValueError, match=r"this model transcribes audio: give features=, float \[B, frames"):
        whisper().generate([1, 2])


@pytest.mark.parametrize("case", json.loads((GOLDEN / "processors.json").read_text("utf-8"))["whisper"], ids=str)
def test_whisper_writes_the_text_of_transformers_under_the_rules_of_its_checkpoint(case, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(case["config"]))
    model = dataclasses.replace(whisper(), generation=GenerationConfig.read(tmp_path))
    features = np.stack([safetensors.File(WHISPER / "expected.safetensors")["features.0"]] * 2)
    sizes = {"feature_lengths": np.array([40, 40]), "max_new_tokens": len(case["tokens"])}
    result = model.generate([[1], [1]], features=features, **sizes)
    assert result.tokens.tolist() == [case["tokens"]] * 2


def test_nothing_stands_behind_a_rows_end():
    result = model().generate([RETURN, None, "A list"], temperature=0, max_new_tokens=[3, 6, 6])
    assert (result.tokens[0, 3:] == EMPTY).all() and result.lengths.tolist() == [3, 0, 6]


def test_speculation_streams_the_same_text_in_fewer_steps():
    want = model().generate(["ababab", RETURN], **GREEDY)
    steps = model().stream(["ababab", RETURN], **GREEDY, speculate=model(), num_draft=3)
    pieces = list(steps)
    assert tuple("".join(row) for row in zip(*pieces, strict=True)) == want.texts
    result = steps.result
    np.testing.assert_array_equal(result.tokens, want.tokens)
    assert len(pieces) == result.steps.max() < 12 and (result.accepted > 0).all()
    assert model().generate("ababab", **GREEDY, speculate="lookup").text == want.texts[0]
    with pytest.raises(ValueError, match=r"speculate is 'draft'; give \"lookup\", or a small Model"):
        model().generate(RETURN, speculate="draft")


def test_a_model_with_recurrent_layers_gets_a_cache_from_which_drafts_are_taken_back():
    hybrid = load(GOLDEN / "families" / "lfm2", dtype="float32")
    options = {"max_new_tokens": 8, "temperature": 0}
    want = hybrid.generate([[5, 6, 5, 6, 5]], **options)
    got = hybrid.generate([[5, 6, 5, 6, 5]], **options, speculate="lookup", num_draft=2)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    assert got.cache.slack == 2 and want.cache.slack == 0
    with pytest.raises(ValueError, match="num_draft"):
        hybrid.generate([[5, 6]], speculate="lookup", num_draft=0)


def test_a_stop_string_within_a_step_of_speculation_cuts_tokens_text_and_cache():
    free = model().generate(RETURN, **GREEDY)
    stop = free.text[5:7]
    want = model().generate(RETURN, **GREEDY, stop_strings=stop)
    result = model().generate(RETURN, **GREEDY, stop_strings=stop, speculate=model(), num_draft=6)
    assert (result.text, result.reasons) == (want.text, ("stop",))
    np.testing.assert_array_equal(result.tokens, want.tokens)
    np.testing.assert_array_equal(result.lengths, want.lengths)
    assert result.cache.lengths.tolist() == want.cache.lengths.tolist()
    turn = [*want.history[0], 65]
    again = [model().generate(turn, cache=given, **GREEDY).text for given in (result, want)]
    assert again[0] == again[1]


def test_samples_of_a_prompt_are_those_of_as_many_rows_and_it_is_read_once():
    options = {"max_new_tokens": 6, "seed": 4}
    want = model().generate([RETURN, RETURN, None, "A list", "A list"], **options)
    result = model().generate([RETURN, None, "A list"], num_samples=2, **options)
    assert result.texts == want.texts and result.reasons == want.reasons
    np.testing.assert_array_equal(result.tokens, want.tokens)
    alone = model().generate(RETURN, num_samples=2, **options)
    assert alone.texts == want.texts[:2]
    assert (
        model().generate([list(row) for row in alone.history], cache=alone, max_new_tokens=1).reasons == ("length",) * 2
    )
    for wrong in (0, True, 1.5):
        with pytest.raises(ValueError, match=r"num_samples is .*; give a whole number, 1 or more"):
            model().generate(RETURN, num_samples=wrong)


def test_what_a_search_found_is_gone_on_from_by_its_best():
    found = model().beam_search(RETURN, num_beams=2, max_new_tokens=4)
    turn = [*found.best.history[0], 65]
    assert model().generate(turn, cache=found, **GREEDY).text == model().generate(turn, **GREEDY).text
    with pytest.raises(CacheError, match="donated"):
        model().generate(turn, cache=found, **GREEDY)
