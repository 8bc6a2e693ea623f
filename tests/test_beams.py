"""beam_search: against transformers on golden checkpoints, and against an uncached search in NumPy with toy models."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import Chunk, Full, Window, models, sampling
from jaxkv.generate import beam_loop, beams

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
TRACED: dict = {}  # the shapes of tokens that each toy was traced with


@dataclasses.dataclass(frozen=True)
class Toy:
    """Attention layers on an embedding; hashable by its reaches. After some tokens its logits are NaN or infinite."""

    reaches: tuple = REACHES["window and full"]
    nan_after: int = -1
    inf_after: int = -1

    def __call__(self, params, tokens, positions, cache):
        TRACED.setdefault(self, set()).add(tokens.shape)
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


def plain_search(toy, prompt, limit, n, penalty, early, stops, adjust=None):
    """Returns [(score, new tokens, reason)], best first: beam search as the textbooks have it."""
    beams, ended = [(0.0, ())], []

    def close(total, new, reason):
        ended.append((reason not in ("stop", "length"), -total / max(len(new), 1) ** penalty, new, reason))
        ended.sort(key=lambda one: one[:2])
        del ended[n:]

    for count in range(1, limit + 1):
        continued = []
        for total, new in beams:
            text = (*prompt, *new)
            if len(text) > CAPACITY:
                close(total, new, "full")
                continue
            logits = toy.after(text)
            if not np.isfinite(logits).all():
                close(total, new, "nan" if np.isnan(logits).any() else "inf")
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
    prompts = [tuple(random.integers(0, V, random.integers(1, CAPACITY)).tolist()) for _ in range(2)]
    stops = [tuple(random.integers(0, V, size).tolist()) for size in (1, 1, 2, 2, 2)]
    settings = dict(
        max_new_tokens=random.integers(1, 11, 2).tolist(),
        length_penalty=float(random.choice([-0.5, 0, 0.7, 1, 2])),
        early_stopping=[False, True, "never"][random.integers(3)],
    )
    return prompts, stops, settings


TOY = Toy(REACHES["window and full"])
BROKEN = Toy(REACHES["sinks and chunk"], nan_after=3, inf_after=7)


on_both = pytest.mark.parametrize(
    ("toy", "layout"), [(TOY, jaxkv.Rows()), (BROKEN, jaxkv.Pages(64, page_size=4))], ids=["rows", "pages, nan, inf"]
)


@on_both
def test_it_is_the_textbook_search_for_random_prompts_stops_and_settings(toy, layout):
    ended = set()
    for seed in range(25):
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
            ended |= set(result.reasons[i])
            best = result.tokens[i, 0][: result.lengths[i, 0]].tolist()
            log_probs = result.log_probs[i, 0]
            np.testing.assert_allclose(log_probs[: len(best)], log_probs_of(toy, prompt, best), atol=1e-4)
            assert not log_probs[len(best) :].any()
        assert_goes_on(toy, prompts, result)
    if toy is BROKEN:
        assert TRACED[toy] == {(2, 8), (ROWS, 1)}  # prompts are read once, not once per beam
    assert ended >= {"stop", "length", "full"} | ({"nan", "inf"} if toy is BROKEN else set())


def assert_goes_on(toy, prompts, result):
    """The cache holds each prompt and its best text but for the last token, and nothing else."""
    texts = [(*prompt, *row[0][row[0] >= 0].tolist()) for prompt, row in zip(prompts, result.tokens, strict=True)]
    capacity, idle = result.cache.capacity, result.cache.num_rows - len(texts)
    assert result.cache.lengths.tolist() == [len(text) - 1 for text in texts] + [0] * idle
    rows = [text if len(text) <= capacity else None for text in texts]
    logits, _ = jaxkv.prefill(toy, PARAMS, [*rows, *[None] * idle], result.cache)
    for i, text in enumerate(rows):
        if text is not None and np.isfinite(toy.after(text)).all():
            np.testing.assert_allclose(logits[i], toy.after(text), atol=1e-3)


def settled(**settings):
    return {"num_beams": BEAMS, "max_new_tokens": 6, **settings}


def test_one_beam_is_greedy_decoding():
    prompts = [[1, 2, 3], [5], [4] * 12]
    options = dict(max_new_tokens=8, stop_tokens=[2, [9, 1]])
    greedy = jaxkv.generate(TOY, PARAMS, prompts, TOY.cache(num_rows=3), **options)
    result = jaxkv.beam_search(TOY, PARAMS, prompts, TOY.cache(num_rows=3), num_beams=1, **options)
    np.testing.assert_array_equal(result.tokens[:, 0], greedy.tokens)
    np.testing.assert_allclose(result.log_probs[:, 0], greedy.log_probs, rtol=1e-6, atol=1e-6)
    assert result.reasons == tuple((reason,) for reason in greedy.reasons)
    assert result.cache.lengths.tolist() == greedy.cache.lengths.tolist()
    sums = greedy.log_probs.sum(1) / greedy.lengths
    np.testing.assert_allclose(result.scores[:, 0], sums, rtol=1e-5, atol=1e-6)


def test_the_rules_of_a_sampler_follow_each_beam():
    sampler = sampling.RepetitionPenalty(1.5) | sampling.NoRepeat(2) | sampling.Suppress([2], new=3) | sampling.Greedy()

    def adjust(text, prompt_length, log_probs):
        history = sampling.History.of(text, V, prompt_length=prompt_length)
        return np.asarray(sampler.adjust(jnp.asarray(log_probs, jnp.float32), history), np.float64)

    for seed in range(6):  # one prompt: its beams share it
        prompts, stops, _ = drawn(seed)
        prompt = prompts[0][:12]
        options = settled(num_return=3, stop_tokens=[2, *stops], sampler=sampler)
        result = jaxkv.beam_search(TOY, PARAMS, [prompt], TOY.cache(), **options)
        assert_found(result, 0, plain_search(TOY, prompt, 6, BEAMS, 1, False, [(2,), *stops], adjust), 3)
        assert result.cache.shared is None
    promised = TOY.cache().sharing(2)  # by the caller
    result = jaxkv.beam_search(TOY, PARAMS, [prompt], promised, **options)
    assert_found(result, 0, plain_search(TOY, prompt, 6, BEAMS, 1, False, [(2,), *stops], adjust), 3)
    assert int(result.cache.shared) == 2


def test_fewer_different_texts_than_were_asked_for():
    sampler = sampling.Allow([4, 6]) | sampling.Greedy()
    result = jaxkv.beam_search(
        TOY, PARAMS, [[1], None], TOY.cache(), **settled(num_return=3, max_new_tokens=1) | {"sampler": sampler}
    )
    assert sorted(result.tokens[0, :2, 0].tolist()) == [4, 6]
    assert result.reasons == (("length", "length", "none"), ("idle",) * 3)
    assert result.lengths.tolist() == [[1, 1, 0], [0, 0, 0]]
    assert result.scores[0, 2] == result.scores[1, 0] == -np.inf


@on_both
def test_a_second_turn_reads_what_is_new_and_other_rows_stay(toy, layout):
    _, cache = jaxkv.prefill(toy, PARAMS, [*[None] * 6, [8, 9, 10]], toy.cache(layout=layout))
    prompts = [[1, 2, 4, 4, 5], None]
    first = jaxkv.beam_search(toy, PARAMS, prompts, cache, **settled())
    history = [*prompts[0], *first.tokens[0, 0].tolist(), 6, 6]
    told = [0, 0, *history[2:]]  # what is held is not read, whatever it is said to be
    second = jaxkv.beam_search(toy, PARAMS, [told, [2, 2]], first.cache, **settled())
    for i, prompt in enumerate([history, [2, 2]]):
        assert_found(second, i, plain_search(toy, prompt, 6, BEAMS, 1, False, []), 1)
    assert second.reasons == (("length",), ("length",))
    assert second.cache.lengths.tolist() == [len(history) + 5, 7, 0, 0, 0, 0, 3]
    logits, _ = jaxkv.prefill(toy, PARAMS, [*[None] * 6, [8, 9, 10, 11]], second.cache)
    np.testing.assert_allclose(logits[6], toy.after((8, 9, 10, 11)), atol=1e-3)


def test_beams_that_do_not_fit_into_a_pool_end_as_full_with_their_tokens():
    reasons = set()
    for seed in range(10):
        prompts, stops, _ = drawn(seed)
        prompts = [prompt[:3] for prompt in prompts]
        cache = TOY.cache(layout=jaxkv.Pages(5, page_size=4))
        options = settled(num_return=3, stop_tokens=stops, length_penalty=0)
        result = jaxkv.beam_search(TOY, PARAMS, prompts, cache, **options)
        for i, prompt in enumerate(prompts):
            proper = [reason in ("stop", "length") for reason in result.reasons[i]]
            assert proper == sorted(proper, reverse=True)
            reasons |= set(result.reasons[i])
            for tokens, length, score in zip(result.tokens[i], result.lengths[i], result.scores[i], strict=True):
                assert (tokens[:length] >= 0).all() and (tokens[length:] < 0).all()
                if score > -np.inf:
                    np.testing.assert_allclose(score, sum(log_probs_of(TOY, prompt, tokens[:length])), atol=1e-4)
            text = (*prompt, *result.tokens[i, 0][: result.lengths[i, 0]].tolist())
            assert result.cache.lengths[i] <= len(text) - 1
    assert reasons >= {"full", "stop", "length"}


@pytest.mark.optimized
@pytest.mark.parametrize("layout", [jaxkv.Rows(), jaxkv.Pages(2048, page_size=16)], ids=["rows", "pages"])
def test_the_compiled_search_makes_no_copy_and_no_temporary_of_cache_size(layout, monkeypatch):
    toy, lowered = Toy((Full(),)), []
    monkeypatch.setattr(beams, "search", Lowering(lowered))
    cache = toy.cache(num_rows=2, capacity=1 << 14, layout=layout)
    with pytest.raises(Stopped):
        jaxkv.beam_search(
            toy, PARAMS | {"at": np.ones((1, D), np.float32)}, [[1]], cache, num_beams=2, max_new_tokens=3
        )
    compiled = lowered[0].compile()
    buffer = cache.layers[0].k.nbytes
    shape = ",".join(map(str, cache.layers[0].k.shape))
    assert not re.findall(rf"f32\[{shape}\]\S* copy\(", compiled.as_text())
    assert compiled.memory_analysis().temp_size_in_bytes < buffer // 2


class Stopped(Exception):
    pass


class Lowering:
    """Stands for the compiled search, and keeps it instead of running it."""

    def __init__(self, lowered):
        self.lowered = lowered

    def eval_shape(self, *args):
        self.lowered.append(beam_loop.search.lower(*args))
        raise Stopped


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_beams": 0}, r"num_beams is 0; give a whole number, 1 or more"),
        ({"num_beams": 2.0}, r"num_beams is 2.0; give a whole number, 1 or more"),
        ({"num_beams": 4}, r"num_beams=4 takes 8 rows for 2 prompts, and the cache has 7; make it with num_rows=8"),
        ({"num_return": 4}, r"num_return is 4; give a whole number from 1 to num_beams, which is 3"),
        ({"num_return": 0}, r"num_return is 0; give a whole number from 1"),
        ({"length_penalty": float("nan")}, r"length_penalty is nan; give a finite number"),
        ({"length_penalty": "1"}, r"length_penalty is '1'; give a finite number"),
        ({"early_stopping": "yes"}, r"early_stopping is 'yes'; give True, False or \"never\""),
        ({"early_stopping": 1}, r"early_stopping is 1; give True, False or \"never\""),
        ({"sampler": sampling.Temperature(0.7)}, r"does not sample: give a greedy one"),
        ({"sampler": lambda key, logits: logits.argmax()}, r"does not sample: give a greedy one"),
        ({"max_new_tokens": 0}, r"max_new_tokens is 0; it must be 1 or more"),
        ({"max_new_tokens": [1, 2, 3]}, r"max_new_tokens has 3 numbers for 2 prompts; give one, or one per prompt"),
        ({"stop_tokens": [V]}, r"stop_tokens has token 13, outside the model's vocabulary"),
        ({"prompts": []}, r"there are no prompts; give a list of token lists"),
        ({"prompts": [[1], []]}, r"the prompt of row 1 is empty"),
        ({"prompts": [[1] * 25, [1]]}, r"the prompt of row 0 has 25 tokens, the cache a capacity of 24; shorten it"),
        ({"prompts": "text"}, r"prompts is text; encode it"),
        ({"prompts": None}, r"prompts is None; give a list of token lists"),
        ({"prompts": [[1]], "num_beams": 8}, r"num_beams=8 takes 8 rows for 1 prompt, and the cache has 7"),
        ({"cache": None}, r"cache is a NoneType; give a jaxkv.Cache"),
    ],
)
def test_what_cannot_be_is_named_before_the_cache_is_touched(change, message):
    cache = TOY.cache()
    given = {"prompts": [[1], [2]], "cache": cache, **settled()} | change
    prompts, held = given.pop("prompts"), given.pop("cache")
    with pytest.raises(ValueError, match=message):
        jaxkv.beam_search(TOY, PARAMS, prompts, held, **given)
    assert cache.lengths.tolist() == [0] * ROWS  # was not donated
