"""The model that comes with the package."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxkv
from jaxkv import safetensors
from jaxkv.models import tiny

SENTENCES = [
    'The "with" statement is used to wrap the execution of a block with methods defined by a context manager.',
    "Return the number of items in the list. If the argument is not an integer, an exception is raised.",
]


@pytest.fixture(scope="module")
def model():
    return tiny.load()


def test_it_is_small():
    assert tiny.PATH.stat().st_size < 4_000_000
    file = safetensors.File(tiny.PATH)
    assert {str(tensor.dtype) for tensor in file.values()} == {"float16"}
    assert all(np.isfinite(tensor).all() for tensor in file.values())


def test_window_layers_and_full_layers_are_mixed(model):
    assert {type(spec.reach) for spec in model.specs} == {jaxkv.Window, jaxkv.Full}


def test_it_brings_what_belongs_to_it(model):
    assert model.tokenizer.decode(model.tokenizer.encode("naïve")) == "naïve"
    assert model.generation.stop_tokens == (0,) and not model.generation.greedy
    assert model.context == 512


def test_it_predicts_english(model):
    length = 128
    ids = np.zeros((len(SENTENCES), length), np.int32)  # after a byte 0
    for row, sentence in enumerate(SENTENCES):
        ids[row, 1 : len(sentence) + 1] = model.tokenizer.encode(sentence)
    scores = jax.nn.log_softmax(nnx.jit(model.module)(jnp.asarray(ids)))
    for row, sentence in enumerate(SENTENCES):
        said = np.asarray(scores)[row, np.arange(len(sentence)), ids[row, 1 : len(sentence) + 1]]
        assert -said.mean() / math.log(2) < 2.0  # bits per byte; 8 is knowing nothing


def test_it_writes_english_past_its_window_and_the_cache_changes_no_token(model):
    prompt = model.tokenizer.encode("The for statement")  # 16 are read in one block, the last with the first step
    cache = jaxkv.Cache.init(model.specs, num_rows=1, capacity=256, max_block=16)
    result = jaxkv.generate(model.forward, model.params, [prompt], cache, max_new_tokens=183)
    new = np.asarray(result.tokens)[0]
    text = model.tokenizer.decode(new)
    known = "a an and be class for function if in is name not object of return string that the this to type value with"
    words = re.findall(r"[a-z]+", text.lower())
    assert len(set(words) & set(known.split())) >= 5, text
    assert sum(word in known.split() for word in words) > 0.4 * len(words), text

    ids = jnp.asarray([[*prompt, *new]], jnp.int32)  # [1, 200]
    logits = np.asarray(nnx.jit(model.module)(ids))[0, len(prompt) - 1 : -1]
    assert (logits.max(-1) - logits[np.arange(len(new)), new] < 1e-3).all()


def test_it_loads_in_another_dtype():
    model = tiny.load("bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("bfloat16")}
    assert {spec.k_storage for spec in model.specs} == {jaxkv.Dense("bfloat16")}
