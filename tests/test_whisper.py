"""Whisper gives the logits and the texts that Hugging Face transformers gives, of several recordings at a time.

tests/golden/families/whisper is what transformers wrote and computed (tests/golden/make_whisper.py).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxkv
from jaxkv import EMPTY, Cache, safetensors
from jaxkv.models import EncoderDecoder, EncoderDecoderConfig
from jaxkv.nn.leaves import named
from jaxkv.testing import WAYS_OF_FEEDING, assert_cache_correct

GOLDEN = Path(__file__).parent / "golden" / "families" / "whisper"
ROWS, CAPACITY, BLOCK = 3, 80, 12


@functools.cache
def whisper():
    return jaxkv.models.load(GOLDEN, dtype="float32")


@functools.cache
def facts():
    """What transformers computed of each of the two recordings: dicts of features, tokens, logits, greedy."""
    file = safetensors.File(GOLDEN / "expected.safetensors")
    return [
        {name: np.asarray(file[f"{name}.{i}"]) for name in ("features", "tokens", "logits", "greedy")} for i in (0, 1)
    ]


def recordings(*which):
    """Features of recordings [B, 40, mel], the short ones with noise beyond their length, and their lengths."""
    longest = len(facts()[0]["features"])
    features = np.full((len(which), longest, 8), 9.0, np.float32)
    lengths = np.array([len(facts()[i]["features"]) for i in which], np.int32)
    for b, i in enumerate(which):
        features[b, : lengths[b]] = facts()[i]["features"]
    return features, lengths


encode_into = nnx.jit(EncoderDecoder.encode_into)
encode = nnx.jit(EncoderDecoder.encode)
uncached = nnx.jit(EncoderDecoder.__call__)


def hear(cache, which, rows=None):
    return encode_into(whisper().module, cache, *recordings(*which), rows)


@functools.partial(jax.jit, static_argnums=0)
def run(forward, params, tokens, positions, cache):
    return forward(params, tokens, positions, cache)


def empty(rows=ROWS, model=None):
    return Cache.init((model or whisper()).specs, rows, CAPACITY, max_block=BLOCK)


def feed(cache, texts, starts, length):
    """Feeds text b of each row from starts[b] on, as far as one block of `length` goes; returns (logits, cache)."""
    positions = np.full((len(texts), length), EMPTY, np.int32)
    tokens = np.zeros((len(texts), length), np.int32)
    for b, (text, start) in enumerate(zip(texts, starts, strict=True)):
        piece = text[start : start + length]
        tokens[b, : len(piece)], positions[b, : len(piece)] = piece, np.arange(start, start + len(piece))
    logits, cache = run(whisper().forward, whisper().params, tokens, positions, cache)
    return np.asarray(logits), cache


def logits_of(cache, texts, block):
    """The logits of every position of each row's text, fed in blocks."""
    out = [[] for _ in texts]
    for start in range(0, max(map(len, texts)), block):
        logits, cache = feed(cache, texts, [start] * len(texts), block)
        for b, text in enumerate(texts):
            out[b].append(logits[b, : max(0, min(block, len(text) - start))])
    return [np.concatenate(parts) for parts in out], cache


def assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-4)


def test_logits_without_a_cache():
    for fact in facts():
        got = uncached(whisper().module, jnp.asarray(fact["tokens"])[None], features=fact["features"][None])
        assert_close(got[0], fact["logits"])
    features, lengths = recordings(1, 0)
    text = np.concatenate([facts()[1]["tokens"], np.zeros(7, np.int32)])
    tokens = jnp.asarray(np.stack([text, facts()[0]["tokens"]]))
    got = uncached(whisper().module, tokens, features=features, lengths=jnp.asarray(lengths))
    assert_close(got[0, :5], facts()[1]["logits"])
    assert_close(got[1], facts()[0]["logits"])


@pytest.mark.parametrize("block", [12, 5, 1])
def test_logits_of_every_way_to_feed_a_ragged_batch_of_recordings(block):
    which = (1, 0, 1)
    got, cache = logits_of(hear(empty(), which), [facts()[i]["tokens"] for i in which], block)
    for logits, i in zip(got, which, strict=True):
        assert_close(logits, facts()[i]["logits"])
    assert cache.encoder_cached.all()


def test_a_row_alone_is_the_row_in_a_batch():
    texts = [fact["tokens"] for fact in facts()]
    together, _ = logits_of(hear(empty(), (0, 1, 0)), [texts[0], texts[1], texts[0]], BLOCK)
    alone = hear(empty(), (1,), rows=np.array([1]))
    assert alone.encoder_cached.tolist() == [False, True, False]
    got, _ = logits_of(alone, [[], np.resize(texts[1], BLOCK), []], BLOCK)  # the same program runs
    np.testing.assert_allclose(got[1][:5], together[1], atol=1e-5)


def test_recordings_are_heard_at_different_times_and_another_one_later():
    first, second = facts()
    cache = hear(empty(), (0,), rows=np.array([2]))
    logits, cache = feed(cache, [[], [], first["tokens"]], [0, 0, 0], 5)
    assert_close(logits[2], first["logits"][:5])
    cache = hear(cache, (1,), rows=np.array([0]))
    logits, cache = feed(cache, [second["tokens"], [], first["tokens"]], [0, 0, 5], 5)
    assert_close(logits[0], second["logits"])
    assert_close(logits[2], first["logits"][5:10])
    # Row 0 gets the other recording, after its text went: what it heard before is gone.
    cache = hear(cache.rewind(jnp.array([0, 99, 99])), (0,), rows=np.array([0]))
    logits, cache = feed(cache, [first["tokens"], [], first["tokens"]], [0, 0, 10], 5)
    assert_close(logits[0], first["logits"][:5])
    assert_close(logits[2, :2], first["logits"][10:])
    # Candidates of one recording: what was heard goes along with the row.
    cache = cache.take(jnp.array([2, 2, 0])).copy_prefix(2, 0, 0)
    logits, _ = feed(cache, [first["tokens"], [], first["tokens"]], [0, 0, 5], 5)
    assert_close(logits[0], first["logits"][:5])
    assert_close(logits[2], first["logits"][5:10])


def test_greedy_texts_of_two_recordings():
    cache = hear(empty(), (1, 0, 1))
    prompts = [facts()[i]["tokens"] for i in (1, 0)]
    result = jaxkv.generate(whisper().forward, whisper().params, [*prompts, None], cache, max_new_tokens=64)
    assert result.tokens[:2].tolist() == [facts()[i]["greedy"].tolist() for i in (1, 0)]
    assert result.cache.encoder_cached.all()


def test_decoding_is_right_however_the_text_is_fed():
    features, lengths = recordings(1)
    graphdef = whisper().forward.graphdef

    def forward(params, tokens, positions, cache):
        model = nnx.merge(graphdef, params)
        everywhere = jnp.tile(features, (cache.num_rows, 1, 1)), jnp.tile(lengths, cache.num_rows)
        return model(tokens, positions, model.encode_into(cache, *everywhere))

    @jax.jit
    def alone(params, tokens):
        everywhere = jnp.tile(features, (len(tokens), 1, 1))
        return nnx.merge(graphdef, params)(tokens, features=everywhere, lengths=jnp.tile(lengths, len(tokens)))

    cache = Cache.init(whisper().specs, 2, 24, max_block=5)
    ways = [way for way in WAYS_OF_FEEDING if way != "in one block"]
    assert_cache_correct(forward, whisper().params, cache, vocab_size=96, uncached=alone, ways=ways)


def test_the_encoder_sees_both_ways_and_not_beyond_a_length():
    model = whisper().module
    features, _ = recordings(0)
    lengths = jnp.array([27])  # odd: the last place stands for one frame

    def places(x):
        return jnp.abs(model.encode(x, lengths)[:, :14]).sum((0, 2))

    seen = np.abs(jax.jit(jax.jacrev(places))(jnp.asarray(features))).sum((1, 3)) > 0
    assert seen[:, :27].all()
    assert not seen[:, 27:].any()
    alone = encode(model, features[:, :27])
    assert alone.shape == (1, 14, 24)
    np.testing.assert_allclose(encode(model, features, lengths)[:, :14], alone, atol=1e-5)


def test_an_untrained_model_has_whisper_s_positions_and_trains_all_but_those():
    config = whisper().config
    model = EncoderDecoder(config, rngs=nnx.Rngs(0))
    table = whisper().module.encoder.positions.embedding[...]
    np.testing.assert_allclose(model.encoder.positions.embedding[...], table, atol=5e-3)  # theirs was bfloat16
    features, lengths = recordings(0, 1)
    tokens = jnp.asarray(np.resize(facts()[0]["tokens"], (2, BLOCK)))

    @nnx.jit
    def gradient(model):
        def loss(model):
            logits = model(tokens[:, :-1], features=jnp.asarray(features), lengths=jnp.asarray(lengths))
            return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], 2).mean()

        return nnx.grad(loss)(model)

    moved = {name: bool(np.asarray(leaf).any()) for name, leaf in named(gradient(model)).items()}
    assert [name for name, some in moved.items() if not some] == ["encoder.positions.embedding"]


def test_fused_and_saved_it_is_the_same(tmp_path):
    fused = jaxkv.models.load(GOLDEN, dtype="float32", fuse=True)
    fact = facts()[0]
    got = uncached(fused.module, jnp.asarray(fact["tokens"])[None], features=fact["features"][None])
    assert_close(got[0], fact["logits"])
    jaxkv.models.save(tmp_path, whisper(), dtype="bfloat16")
    before, after = jaxkv.models.Files(GOLDEN), jaxkv.models.Files(tmp_path)
    assert set(after) == set(before)
    for name in before:
        np.testing.assert_array_equal(after[name].view(np.uint16), before[name].view(np.uint16), err_msg=name)


def test_the_cache_holds_both_halves_and_says_so():
    plan = jaxkv.plan_memory(whisper().specs, num_rows=2, capacity=CAPACITY)
    assert [group[:2] for group in plan.groups] == [(jaxkv.Full(), 3), (jaxkv.Cross(20), 3)]
    assert whisper().context == 80


def test_what_is_not_computed_is_refused():
    source = json.loads((GOLDEN / "config.json").read_text())
    with pytest.raises(jaxkv.NotSupportedError, match='"scale_embedding" is true'):
        jaxkv.models.read_config(source | {"scale_embedding": True})
    untied = jaxkv.models.read_config(source | {"tie_word_embeddings": False})[1]
    assert not untied.tied


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, c, x: m(jnp.zeros((1, 3), int)), "without a cache give features="),
        (lambda m, c, x: m(jnp.zeros((3,), int), features=x), r"give an integer array \[B, T\]"),
        (lambda m, c, x: m(jnp.zeros((1, 81), int), features=x), "has 81 tokens, .* max_positions=80"),
        (lambda m, c, x: m(jnp.zeros((1, 3), int), cache=c), "with a cache give positions"),
        (lambda m, c, x: m(jnp.zeros((1, 3), int), jnp.zeros((1, 2), int), c), "they must agree"),
        (lambda m, c, x: m(jnp.zeros((1, 1), int), jnp.zeros((1, 1), int), c, features=x), "those go in once"),
        (lambda m, c, x: m.encode(x.swapaxes(1, 2)), r"features has shape \(1, 8, 40\); .*the other way round"),
        (lambda m, c, x: m.encode(jnp.zeros((1, 41, 8))), "at most 40 frames"),
        (lambda m, c, x: m.encode(x, jnp.ones(1)), r"lengths must be int \[B\]"),
        (lambda m, c, x: m.encode_into(Cache.init(whisper().specs[:2], 1, 8), x), "has 2 layers, the model 6"),
    ],
)
def test_wrong_calls_are_refused_with_the_cure(call, message):
    with pytest.raises(ValueError, match=message):
        call(whisper().module, empty(1), jnp.zeros((1, 40, 8)))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"width": 7}, "width=7: sinusoid positions come in pairs"),
        ({"encoder_heads": 3}, "width=8 is not a multiple of num_heads=3"),
        ({"num_mel_bins": 0}, "num_mel_bins=0"),
        ({"activation": "swish"}, "activation='swish'"),
    ],
)
def test_configs_that_make_no_sense(sizes, message):
    with pytest.raises(ValueError, match=message):
        EncoderDecoderConfig(**{"vocab_size": 8, "width": 8, "encoder_heads": 2, "decoder_heads": 2} | sizes)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("config", ["CONFIG", "ODD"])
def test_against_transformers(config, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("make_whisper", GOLDEN.parent.parent / "make_whisper.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    made = script.build(getattr(script, config), seed=7)
    of_it = script.expected(made, seed=7, new=0)
    script.write(tmp_path, made, of_it)
    model = jaxkv.models.load(tmp_path, dtype="float32")
    for i in (0, 1):
        features, tokens, logits = (of_it[f"{name}.{i}"].numpy() for name in ("features", "tokens", "logits"))
        assert_close(model.module(jnp.asarray(tokens)[None], features=features[None])[0], logits)
        cache = encode_into(model.module, empty(1, model), features[None])
        for p, token in enumerate(tokens):
            got, cache = run(model.forward, model.params, np.array([[token]]), np.array([[p]], np.int32), cache)
            assert_close(got[0, 0], logits[p])


def test_a_tree_of_drafts_is_checked_against_what_each_row_hears():
    texts, options = [[1, 5, 6, 5, 6, 5], [1, 7], [1, 5, 6, 5]], {"max_new_tokens": 10}

    def cache():
        return hear(Cache.init(whisper().specs, ROWS, CAPACITY, max_block=BLOCK, layout=jaxkv.Pages(40, 8)), (0, 1, 1))

    plain = jaxkv.generate(whisper().forward, whisper().params, texts, cache(), **options)
    grown = jaxkv.speculate(whisper().forward, whisper().params, texts, cache(), tree=(2, 2, 1), min_ngram=1, **options)
    np.testing.assert_array_equal(grown.tokens, plain.tokens)
    np.testing.assert_allclose(grown.log_probs, plain.log_probs, atol=1e-4)
    assert grown.cache.lengths.tolist() == plain.cache.lengths.tolist() and grown.drafted.sum() > 0


def test_a_text_begins_with_the_language_and_task_that_are_named(tmp_path):
    said = {"decoder_start_token_id": 1, "forced_decoder_ids": [[1, None], [2, 20]], "no_timestamps_token_id": 30}
    said |= {"lang_to_id": {"<|de|>": 10, "<|en|>": 11}, "task_to_id": {"transcribe": 20, "translate": 21}}
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    model = dataclasses.replace(whisper(), generation=jaxkv.models.GenerationConfig.read(tmp_path))
    features, lengths = recordings(0, 1)
    options = {"features": features, "feature_lengths": lengths, "max_new_tokens": 2}
    for given, begins in (
        ({"language": "de"}, (1, 10, 20, 30)),
        ({"language": "en", "task": "translate"}, (1, 11, 21, 30)),
    ):
        result = model.generate(**given, **options)
        assert result.prompts == (begins,) * 2
        want = model.generate([begins] * 2, **options)
        np.testing.assert_array_equal(result.tokens, want.tokens)
    for given, message in (
        ({}, "leaves the language open; give language=, one of de, en"),
        ({"language": "xx"}, "language is 'xx', which is not in this checkpoint's.*; it has de, en"),
        ({"task": "sing", "language": "de"}, "task is 'sing'.*; it has transcribe, translate"),
        ({"language": "de", "prompts": [[1]] * 2}, "prompts are given, and language= or task="),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(**given, **options)
