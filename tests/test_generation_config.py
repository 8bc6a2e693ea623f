"""generation_config.json: what is read of it, what counts as said."""

import json

import pytest

from jaxkv.generate.sampling import sampler
from jaxkv.models import GenerationConfig


def read(tmp_path, generation=None, config=None) -> GenerationConfig:
    for name, content in (("generation_config", generation), ("config", config)):
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / f"{name}.json").write_text(text)
    return GenerationConfig.read(tmp_path)


def test_llama_3_is_read(tmp_path):
    given = {"bos_token_id": 128000, "do_sample": True, "eos_token_id": [128001, 128009], "temperature": 0.6}
    config = read(tmp_path, {**given, "top_p": 0.9, "transformers_version": "4.43.0"})
    assert config == GenerationConfig(stop_tokens=(128001, 128009), greedy=False, temperature=0.6, top_p=0.9)
    assert sampler(**config.sampling) == sampler(temperature=0.6, top_p=0.9)


@pytest.mark.parametrize("generation", [None, {"eos_token_id": 2}, {"do_sample": False, "temperature": 0.6}])
def test_without_do_sample_it_is_greedy_as_in_transformers(tmp_path, generation):
    config = read(tmp_path, generation)
    assert config.greedy and sampler(**config.sampling).greedy


def test_a_penalty_counts_when_greedy_too(tmp_path):
    config = read(tmp_path, {"repetition_penalty": 1.1, "top_k": 20})
    assert sampler(**config.sampling) == sampler(temperature=0, repetition_penalty=1.1)


def test_a_top_p_or_temperature_of_0_leaves_the_most_likely_token_as_in_transformers(tmp_path):
    assert read(tmp_path, {"do_sample": True, "top_p": 0.0}).sampler() == sampler(top_p=1e-6)
    assert read(tmp_path, {"do_sample": True, "temperature": 1e-9}).sampler().greedy


def test_what_changes_nothing_is_not_said(tmp_path):
    neutral: dict = {"num_beams": 1, "min_length": 0, "bad_words_ids": None, "suppress_tokens": [-1]}
    neutral |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": None, "repetition_penalty": 1.0}
    assert read(tmp_path, {"do_sample": True, **neutral}) == GenerationConfig(greedy=False)


@pytest.mark.parametrize(
    ("generation", "config", "stop_tokens"),
    [
        ({"eos_token_id": 2}, {"eos_token_id": 7}, (2,)),
        ({"eos_token_id": None}, {"eos_token_id": 7}, (7,)),
        (None, {"eos_token_id": [7, 8]}, (7, 8)),
        (None, {"text_config": {"eos_token_id": 9}}, (9,)),
        (None, {}, ()),
        ({"eos_token_id": -1}, None, ()),
    ],
)
def test_stop_tokens_are_found_where_they_are(tmp_path, generation, config, stop_tokens):
    assert read(tmp_path, generation, config).stop_tokens == stop_tokens


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ("{", r"generation_config\.json is not valid JSON"),
        ("[]", "holds a list, must be an object"),
        ({"eos_token_id": "</s>"}, '"eos_token_id" is "</s>"; it must be a token number'),
        ({"top_p": "high"}, r'"top_p" is "high"; it must be a number from 0 to 1'),
        ({"do_sample": "false"}, '"do_sample" is "false"; it must be true or false'),
        ({"top_p": 1.5}, '"top_p" is 1.5; it must be a number from 0 to 1'),
        ({"temperature": -1}, '"temperature" is -1; it must be a number from 0'),
        ({"temperature": float("nan")}, '"temperature" is NaN; it must be'),
        ({"bad_words_ids": [3]}, r'"bad_words_ids\[0\]" is 3; it must be a list of 1 to'),
        ({"bad_words_ids": [[]]}, r'"bad_words_ids\[0\]" is \[\]; it must be a list of 1 to'),
        ({"sequence_bias": [[[1], "a"]]}, r'"sequence_bias\[0\]\[1\]" is "a"; it must be a number'),
        ({"sequence_bias": [[1]]}, r'"sequence_bias\[0\]" is \[1\]; it must be a list of two values'),
        ({"suppress_tokens": ["a"]}, r'"suppress_tokens\[0\]" is "a"; it must be a token number'),
        ({"suppress_tokens": [10**30]}, r'"suppress_tokens\[0\]" is 10+; it must be a token number'),
        ({"forced_decoder_ids": {"1": 2}}, '"forced_decoder_ids" is .*; it must be a list of'),
        ({"stop_strings": [""]}, r'"stop_strings\[0\]" is ""; it must be a string'),
        ({"no_repeat_ngram_size": -1}, '"no_repeat_ngram_size" is -1; it must be a whole number from 0'),
        ({"top_k": 2.5}, '"top_k" is 2.5; it must be a whole number'),
        ({"max_new_tokens": True}, '"max_new_tokens" is true; it must be a whole number from 1'),
        ({"max_new_tokens": 10**30}, '"max_new_tokens" is 10+; it must be a whole number from 1'),
        ({"top_k": -1, "top_p": 2}, r'generation:\n  "top_k" is -1; .*\n  "top_p" is 2;'),
    ],
)
def test_what_can_not_be_read_is_named(tmp_path, generation, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, generation)


def test_whispers_tokens_are_read(tmp_path):
    given = {"begin_suppress_tokens": [220, 50256], "suppress_tokens": [1, 2], "decoder_start_token_id": 50257}
    given |= {"forced_decoder_ids": [[1, 50362]], "max_length": 448, "no_timestamps_token_id": 50362}
    config = read(tmp_path, {**given, "eos_token_id": 50256, "alignment_heads": [[1, 0]], "is_multilingual": False})
    assert config.start_tokens == (50257, 50362) and config.max_length == 448 and config.ignored == ()
    assert config.sampler() == sampler(temperature=0, suppress_tokens=(1, 2), begin_suppress_tokens=(220, 50256))
    multilingual = {"forced_decoder_ids": [[1, None], [2, 50359]], "no_timestamps_token_id": 50363}
    assert read(tmp_path, given | multilingual).start_tokens == (50257, None, 50359, 50363)


def test_what_is_not_obeyed_is_said_in_one_line(tmp_path, caplog):
    given = {"num_beams": 4, "typical_p": 0.9, "chat_format": "chatml", "top_h": None, "pad_token_id": 0}
    assert read(tmp_path, given).ignored == ("num_beams 4", "typical_p 0.9", 'chat_format "chatml"')
    (line,) = caplog.messages
    assert line.endswith('generation_config.json: not obeyed: num_beams 4, typical_p 0.9, chat_format "chatml"')


def test_what_is_given_takes_the_place_of_what_the_makers_say():
    config = GenerationConfig(stop_tokens=(2,), temperature=0.6, suppress_tokens=(5,))
    assert config.sampler() == sampler(temperature=0, suppress_tokens=(5,))
    assert config.sampler(top_p=0.9) == sampler(temperature=0.6, top_p=0.9, suppress_tokens=(5,))
    assert config.sampler(suppress_tokens=None, min_new_tokens=3) == sampler(
        temperature=0, min_new_tokens=3, stop_tokens=[2]
    )
    drawing = GenerationConfig(greedy=False, temperature=0.6, top_k=9)
    assert drawing.sampler(temperature=0).greedy
    with pytest.raises(TypeError, match="heat"):
        config.sampler(heat=3)
