"""beam_search: against transformers on golden checkpoints, and against an uncached search in NumPy with toy models."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import Chunk, Full, Window, models, sampling

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


CASES = [(family, case) for family, found in FOUND.items() for case in found["cases"]]


@pytest.mark.parametrize(("family", "case"), CASES)
def test_texts_and_scores_are_those_of_transformers(family, case):
    result = search_as(family, case)
    for at, found in zip(case["prompts"], case["found"], strict=True):
        texts = [row[row >= 0].tolist() for row in result.tokens[at]]
        assert texts == found["texts"]
        np.testing.assert_allclose(result.scores[at], found["scores"], rtol=2e-4, atol=2e-5)


# --- a toy model, and the same search in NumPy without a cache -------------------------------------------------------

V, D = 13, 8
REACHES = {"window and full": (Window(4), Full()), "sinks and chunk": (Window(3, sinks=1), Chunk(5))}
ROWS, CAPACITY, BEAMS = 7, 24, 3  # two prompts with three beams each, and a row that is nobody's
RANDOM = np.random.default_rng(1)
SHAPES = {"embed": (V, D), "at": (CAPACITY, D), "q": (2, D, D), "v": (2, D, D), "out": (D, V)}
PARAMS = {name: RANDOM.normal(size=shape).astype(np.float32) * 0.8 for name, shape in SHAPES.items()}


@dataclasses.dataclass(frozen=True)
class Toy:
    """Attention layers on an embedding; hashable by its reaches. After some tokens its logits are NaN or infinite."""

    reaches: tuple = REACHES["window and full"]
    nan_after: int = -1
    inf_after: int = -1

    def __call__(self, params, tokens, positions, cache):
        cache, step = cache.begin(positions)
        x = params["embed"][tokens] + params["at"][jnp.maximum(positions, 0)]
        layers = []
        for i, layer in enumerate(cache.layers):
            k, v = x[:, :, None], (x @ params["v"][i])[:, :, None]
            layers.append(layer.put(step, k, v))
            x = x + jaxkv.attend((x @ params["q"][i])[:, :, None], layers[-1], step)[:, :, 0]
        logits = x @ params["out"]
        logits = jnp.where((tokens == self.nan_after)[:, :, None], jnp.nan, logits)
        return jnp.where((tokens == self.inf_after)[:, :, None], jnp.inf, logits), cache.with_layers(layers)

    def cache(self, num_rows=ROWS, capacity=CAPACITY, **kwargs):
        specs = [jaxkv.LayerSpec(reach, num_kv_heads=1, head_dim=D) for reach in self.reaches]
        return jaxkv.Cache.init(specs, num_rows, capacity, max_block=8, **kwargs)

    @functools.cache  # noqa: B019
    def after(self, tokens):
        """Returns the logits after a tuple of tokens, from all of them anew, float64 [V]."""
        at = np.arange(len(tokens))
        x = (PARAMS["embed"][list(tokens)] + PARAMS["at"][: len(tokens)]).astype(np.float64)
        for i, reach in enumerate(self.reaches):
            see = (at[None, :] <= at[:, None]) & np.asarray(reach.sees(at[:, None], at[None, :]))
            scores = np.where(see, (x @ PARAMS["q"][i]) @ x.T / np.sqrt(D), -np.inf)
            weights = np.exp(scores - scores.max(1, keepdims=True))
            x = x + weights / weights.sum(1, keepdims=True) @ (x @ PARAMS["v"][i])
        bad = np.nan if tokens[-1] == self.nan_after else np.inf if tokens[-1] == self.inf_after else 0
        return x[-1] @ PARAMS["out"] + bad


def plain_search(toy, prompt, limit, n, penalty, early, stops, adjust=None, capacity=CAPACITY):
    """Returns [(score, new tokens, reason)], best first: beam search as the textbooks have it."""
    beams, ended = [(0.0, ())], []

    def close(total, new, reason):
        ended.append((reason not in ("stop", "length"), -total / max(len(new), 1) ** penalty, new, reason))
        ended.sort(key=lambda one: one[:2])
        del ended[n:]

    for count in range(1, limit + 1):
        continued = []
        for total, new in beams:
            text, logits = (*prompt, *new), toy.after((*prompt, *new))
            if len(text) > capacity or np.isnan(logits).any() or np.isinf(logits).any():
                close(total, new, "full" if len(text) > capacity else "nan" if np.isnan(logits).any() else "inf")
                continue
            log_probs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
            log_probs = log_probs if adjust is None else adjust(text, len(prompt), log_probs)
            continued += [(total + x, (*new, token)) for token, x in enumerate(log_probs) if x > -np.inf]
        continued.sort(key=lambda one: -one[0])
        stopped = [any(new[-len(stop) :] == stop for stop in stops) for _, new in continued]
        for (total, new), stop in list(zip(continued, stopped, strict=True))[:n]:
            if stop or count == limit:
                close(total, new, "stop" if stop else "length")
        beams = [one for one, stop in zip(continued, stopped, strict=True) if not stop][:n]
        if not beams:
            break
        if len(ended) == n and not ended[-1][0]:
            length = limit if early == "never" and penalty > 0 else count
            if early is True or beams[0][0] / length**penalty <= -ended[-1][1]:
                break
    return [(-score, new, reason) for _, score, new, reason in ended]


def assert_found(result, i, wanted, num_return):
    got = [row[row >= 0].tolist() for row in result.tokens[i]]
    missing = max(num_return - len(wanted), 0)
    wanted = wanted[:num_return]
    assert got == [list(new) for _, new, _ in wanted] + [[]] * missing
    assert result.reasons[i] == (*(reason for *_, reason in wanted), *["none"] * missing)
    assert result.lengths[i].tolist() == [len(new) for _, new, _ in wanted] + [0] * missing
    scores = [score for score, *_ in wanted] + [-np.inf] * missing
    np.testing.assert_allclose(result.scores[i], scores, rtol=1e-4, atol=1e-4)


def log_probs_of(toy, prompt, tokens):
    out = []
    for i, token in enumerate(tokens):
        logits = toy.after((*prompt, *tokens[:i]))
        out.append(logits[token] - np.log(np.exp(logits).sum()))
    return out


def drawn(seed):
    """Returns random prompts and settings, of one shape each."""
    random = np.random.default_rng(seed)
    prompts = [tuple(random.integers(0, V, random.integers(1, 12)).tolist()) for _ in range(2)]
    stops = [tuple(random.integers(0, V, size).tolist()) for size in (1, 1, 2, 2, 2)]
    settings = dict(
        max_new_tokens=random.integers(1, 11, 2).tolist(),
        length_penalty=float(random.choice([-0.5, 0, 0.7, 1, 2])),
        early_stopping=[False, True, "never"][random.integers(3)],
    )
    return prompts, stops, settings


LAYOUTS = [jaxkv.Rows(), jaxkv.Pages(64, page_size=4)]


@pytest.mark.parametrize(("reaches", "layout"), [*zip(REACHES.values(), LAYOUTS, strict=True)], ids=[*REACHES])
def test_it_is_the_textbook_search_for_random_prompts_stops_and_settings(reaches, layout):
    toy = Toy(reaches)
    for seed in range(40):
        prompts, stops, settings = drawn(seed)
        cache = toy.cache(layout=layout)
        result = jaxkv.beam_search(
            toy, PARAMS, prompts, cache, num_beams=BEAMS, num_return=2, stop_tokens=stops, **settings
        )
        for i, prompt in enumerate(prompts):
            limit = settings["max_new_tokens"][i]
            wanted = plain_search(
                toy, prompt, limit, BEAMS, settings["length_penalty"], settings["early_stopping"], stops
            )
            assert_found(result, i, wanted, 2)
            best = result.tokens[i, 0][: result.lengths[i, 0]].tolist()
            log_probs = result.log_probs[i, 0]
            np.testing.assert_allclose(log_probs[: len(best)], log_probs_of(toy, prompt, best), atol=1e-4)
            assert not log_probs[len(best) :].any()
        assert_goes_on(toy, prompts, result)


def assert_goes_on(toy, prompts, result):
    """The cache holds each prompt and its best text but for the last token, and nothing else."""
    texts = [(*prompt, *row[0][row[0] >= 0].tolist()) for prompt, row in zip(prompts, result.tokens, strict=True)]
    capacity, idle = result.cache.capacity, result.cache.num_rows - len(texts)
    assert result.cache.lengths.tolist() == [len(text) - 1 for text in texts] + [0] * idle
    rows = [text if len(text) <= capacity else None for text in texts]
    logits, _ = jaxkv.prefill(toy, PARAMS, [*rows, *[None] * idle], result.cache)
    for i, text in enumerate(rows):
        if text is not None:
            np.testing.assert_allclose(logits[i], toy.after(text), atol=1e-3)
