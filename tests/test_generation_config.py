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


def test_what_changes_nothing_is_not_said(tmp_path):
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": None, "repetition_penalty": 1.0}
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
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>', must be a token number or a list of them"),
        ({"top_p": "high"}, "top_p is 'high', must be a number"),
        ({"top_k": 2.5}, "top_k is 2.5, must be a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens is True, must be a number"),
    ],
)
def test_what_can_not_be_read_is_named(tmp_path, generation, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, generation)
