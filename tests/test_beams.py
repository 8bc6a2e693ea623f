"""beam_search: against transformers on golden checkpoints, and against an uncached search in NumPy with toy models."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import models, sampling

GOLDEN = Path(__file__).parent / "golden"


# --- transformers ----------------------------------------------------------------------------------------------------

FOUND = json.loads((GOLDEN / "beams.json").read_text())
RULES = ("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "min_new_tokens")


@functools.cache
def checkpoint(family):
    return models.load(GOLDEN / "families" / family, dtype="float32")


def search_as(family, case):
    """Returns what beam_search finds for a case, all prompts of the family in one cache, those not asked for idle."""
    model, config = checkpoint(family), case["config"]
    stops = config.get("eos_token_id", [])
    rules = {name: config[name] for name in RULES if name in config}
    if "forced_eos_token_id" in config:
        rules["forced_tokens"] = {-1: config["forced_eos_token_id"]}
    prompts = [prompt if i in case["prompts"] else None for i, prompt in enumerate(FOUND[family]["prompts"])]
    return jaxkv.beam_search(
        model.forward,
        model.params,
        prompts,
        model.init_cache(num_rows=12, capacity=64, max_block=16),
        num_beams=config["num_beams"],
        num_return=config.get("num_return_sequences", 1),
        max_new_tokens=config["max_new_tokens"],
        length_penalty=config.get("length_penalty", 1.0),
        early_stopping=config.get("early_stopping", False),
        sampler=sampling.sampler(**rules, temperature=0, stop_tokens=stops) if rules else sampling.Greedy(),
        stop_tokens=stops,
    )


def is_slow(family, case):
    return family != "llama3" and len(case["prompts"]) == 1  # each rule is a program of its own


@pytest.mark.parametrize(
    ("family", "case"),
    [
        pytest.param(family, case, id=f"{family}-{i}", marks=[pytest.mark.slow] if is_slow(family, case) else [])
        for family, found in FOUND.items()
        for i, case in enumerate(found["cases"])
    ],
)
def test_texts_and_scores_are_those_of_transformers(family, case):
    result = search_as(family, case)
    for at, found in zip(case["prompts"], case["found"], strict=True):
        texts = [row[row >= 0].tolist() for row in result.tokens[at]]
        assert texts == found["texts"]
        np.testing.assert_allclose(result.scores[at], found["scores"], rtol=2e-4, atol=2e-5)
