"""model.beam_search and model.best_of: several texts for prompts of any kind, as the functions of tokens give them."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from flax import nnx

import jaxkv
from jaxkv.models import ByteTokenizer, Decoder, DecoderConfig, GenerationConfig, Model

PROMPTS = ["Return the ", "A"]


@functools.cache
def model():
    config = DecoderConfig(vocab_size=128, width=16, num_layers=1, num_heads=2)
    generation = GenerationConfig(stop_tokens=(0,), repetition_penalty=1.2)
    module = Decoder(config, rngs=nnx.Rngs(0))
    return Model.of(module, context=128, generation=generation, make_tokenizer=ByteTokenizer)


def tokens_of(text):
    return list(text.encode())


def test_beams_obey_the_checkpoints_rules_and_their_best_is_gone_on_from():
    found = model().beam_search(PROMPTS, num_beams=3, num_return=2, max_new_tokens=5)
    rules = jaxkv.sampling.RepetitionPenalty(1.2) | jaxkv.sampling.Temperature(0)
    wanted = jaxkv.beam_search(
        model().forward,
        model().params,
        [tokens_of(prompt) for prompt in PROMPTS],
        model().init_cache(6, 128),
        num_beams=3,
        num_return=2,
        max_new_tokens=5,
        sampler=rules,
        stop_tokens=0,
    )
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-5)
    texts = [["".join(map(chr, row[row > 0])) for row in rows] for rows in found.tokens]
    assert found.texts == tuple(map(tuple, texts)) and found.reasons == wanted.reasons
    assert isinstance(found.cache.layout, jaxkv.Pages) and found.cache.num_rows == 6
    best = found.best
    assert best.texts == tuple(text for text, _ in found.texts) and best.cache.num_rows == 2
    histories = [[*history, 5] for history in best.history]
    more = model().generate(histories, cache=best, max_new_tokens=3)
    fresh = model().generate(histories, max_new_tokens=3)
    np.testing.assert_array_equal(more.tokens, fresh.tokens)


def test_the_best_of_one_prompt_is_its_text():
    drawn = model().best_of("Return the ", n=3, max_new_tokens=5, seed=1)  # greedy, says the checkpoint
    assert drawn.text == drawn.texts[0][0] and len(set(drawn.texts[0])) == 3
    rules = jaxkv.sampling.RepetitionPenalty(1.2) | jaxkv.sampling.Temperature(1)
    cache = model().init_cache(3, 128)
    options = dict(n=3, max_new_tokens=5, sampler=rules, stop_tokens=0, key=jax.random.key(1))
    wanted = jaxkv.best_of(model().forward, model().params, [tokens_of("Return the ")], cache, **options)
    np.testing.assert_array_equal(drawn.tokens, wanted.tokens)
    for leaf in jax.tree.leaves(drawn.cache):
        leaf.delete()  # as when a later call went on with it
    assert drawn.text == drawn.texts[0][0]
    with pytest.raises(ValueError, match="n is 0; give a whole number, 1 or more"):
        model().best_of("Return the ", n=0)
    with pytest.raises(ValueError, match="num_beams is 'two'; give a whole number"):
        model().beam_search("Return the ", num_beams="two")
