"""Samplers against NumPy, which sorts where the library bisects, and against the frequencies they should draw with."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.generate import sampling
from jaxkv.generate.sampling import (
    Allow,
    Chain,
    Force,
    FrequencyPenalty,
    Greedy,
    History,
    LogitBias,
    MinP,
    NoRepeat,
    PresencePenalty,
    RepetitionPenalty,
    Sampler,
    Suppress,
    Temperature,
    TopK,
    TopP,
)
from jaxkv.generate.sampling import sampler as make_sampler
from jaxkv.models import GenerationConfig

V = 24


def softmax(x):
    e = np.exp(x - x[np.isfinite(x)].max())
    return e / e.sum()


N = 12


def histories(texts, prompt_length=2, limit=None):
    """Many rows at once: a History of [rows, ...]."""
    rows = [History.of(text, V, prompt_length=min(prompt_length, len(text)), size=N, limit=limit) for text in texts]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


def only(logits, kept):
    out = np.full_like(logits, -np.inf)
    out[list(kept)] = logits[list(kept)]
    return out


def expected(part, logits, text):
    """What each sampler does, said once more: float64, by sorting."""
    best = np.argsort(-logits, kind="stable")
    match part:
        case Temperature(t):
            return logits / t if t else logits
        case TopK(k):
            return only(logits, best[:k])
        case TopP(p):
            probs = softmax(logits)[best]
            return only(logits, [token for i, token in enumerate(best) if probs[:i].sum() < p])
        case MinP(p):
            probs = softmax(logits)
            return only(logits, np.flatnonzero(probs >= p * probs.max()))
        case RepetitionPenalty(r):
            return np.array([(x / r if x > 0 else x * r) if i in text else x for i, x in enumerate(logits)])
        case FrequencyPenalty(f):
            return np.array([x - f * text[2:].count(i) for i, x in enumerate(logits)])
        case PresencePenalty(p):
            return np.array([x - p * (i in text[2:]) for i, x in enumerate(logits)])
        case NoRepeat(n):
            grams = {tuple(text[i : i + n]) for i in range(len(text) - n + 1)}
            return np.array([-np.inf if (*text[len(text) - n + 1 :], i) in grams else x for i, x in enumerate(logits)])
        case Greedy():
            return logits
        case Chain(parts):
            for one in parts:
                logits = expected(one, logits, text)
            return logits
    raise AssertionError(part)


SAMPLERS = [
    Greedy(),
    Temperature(0.7),
    Temperature(2.0),
    TopK(1),
    TopK(5),
    TopK(V),
    TopK(V + 100),
    TopP(1e-6),
    TopP(0.3),
    TopP(0.9),
    TopP(1.0),
    MinP(0.0),
    MinP(0.2),
    MinP(1.0),
    RepetitionPenalty(1.3),
    RepetitionPenalty(0.8),
    Temperature(0.8) | TopK(7) | TopP(0.8),
    RepetitionPenalty(1.5) | Temperature(1.3) | TopK(12) | TopP(0.9) | MinP(0.05),
    RepetitionPenalty(2.0) | Greedy(),
    FrequencyPenalty(0.7),
    FrequencyPenalty(-0.5) | PresencePenalty(1.1),
    NoRepeat(1),
    NoRepeat(2),
    NoRepeat(3),
    NoRepeat(N + 1),
]


@pytest.fixture(scope="module")
def rows():
    random = np.random.default_rng(0)
    logits = (random.normal(size=(40, V)) * random.uniform(0.1, 5, size=(40, 1))).astype(np.float32)
    return logits, [random.integers(0, 5, n).tolist() for n in random.integers(1, N + 1, size=40)]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_the_adjusted_logits_are_those_of_the_formula(sampler, rows):
    logits, texts = rows
    got = jax.jit(jax.vmap(sampler.adjust))(logits, histories(texts))
    want = np.stack([expected(sampler, x.astype(np.float64), text) for x, text in zip(logits, texts, strict=True)])
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize(
    "sampler",
    [
        Temperature(0.7),
        TopK(3),
        TopP(0.6),
        MinP(0.3),
        RepetitionPenalty(1.5),
        RepetitionPenalty(1.2) | Temperature(1.5) | TopK(6) | TopP(0.9),
    ],
    ids=str,
)
def test_tokens_are_drawn_as_often_as_they_should_be(sampler, rows):
    logits, text = rows[0][3], rows[1][3]
    history = jax.tree.map(jnp.asarray, History.of(text, V))
    draws = 20_000
    keys = jax.random.split(jax.random.key(7), draws)
    tokens = jax.jit(jax.vmap(lambda key: sampler(key, jnp.asarray(logits), history)))(keys)
    assert tokens.dtype == jnp.int32
    counts = np.bincount(np.asarray(tokens), minlength=V)
    want = softmax(expected(sampler, logits.astype(np.float64), text))
    assert not counts[want == 0].any()
    # 4.5 standard deviations of each count, with a fixed seed
    assert (np.abs(counts - draws * want) <= 4.5 * np.sqrt(draws * want * (1 - want)) + 1e-9).all()


def test_greedy_takes_the_most_likely_and_the_lowest_of_equals_without_a_key():
    logits = jnp.array([0.0, 3.0, 1.0, 3.0])
    assert int(Greedy()(None, logits)) == 1
    assert int(Temperature(0)(None, logits)) == 1
    assert int((TopK(3) | Temperature(0.0))(None, logits)) == 1


def test_a_greedy_part_makes_the_chain_greedy_but_the_penalty_still_counts():
    logits = jnp.array([3.0, 2.9, -1.0])
    sampler = RepetitionPenalty(1.2) | Greedy()
    assert sampler.greedy
    assert not sampler.needs_key
    assert int(sampler(None, logits, History.of([0], 3))) == 1
    assert int(sampler(None, logits, History.of([1, 2], 3))) == 0


def test_equally_likely_tokens_stay_or_go_together():
    logits = jnp.array([2.0, 1.0, 0.0, 1.0, -0.0])

    def kept(sampler):
        return np.isfinite(sampler.adjust(logits, None)).astype(int).tolist()

    assert kept(TopK(2)) == [1, 1, 0, 1, 0]
    assert kept(TopK(4)) == [1, 1, 1, 1, 1]
    assert kept(TopP(0.5)) == [1, 1, 0, 1, 0]


def test_tokens_that_were_ruled_out_stay_ruled_out():
    logits = jnp.array([0.0, -jnp.inf, 1.0, -jnp.inf])
    for sampler in (TopK(3), TopP(0.999), MinP(0.01), Temperature(0.5), RepetitionPenalty(1.5)):
        adjusted = sampler.adjust(logits, History.of([0, 1, 2, 3], 4))
        assert np.isfinite(adjusted).tolist() == [True, False, True, False], sampler


def test_nan_logits_give_a_token_of_the_vocabulary_and_leave_the_other_rows_alone(rows):
    logits, history = rows[0], histories(rows[1])
    sampler = RepetitionPenalty(1.1) | Temperature(0.8) | TopK(8) | TopP(0.9) | MinP(0.01)
    keys = jax.random.split(jax.random.key(0), len(logits))
    run = jax.jit(jax.vmap(sampler))
    clean = run(keys, logits, history)
    broken = logits.copy()
    broken[5] = np.nan
    broken[6, 3] = np.nan
    tokens = run(keys, broken, history)
    assert 0 <= int(tokens[5]) < V
    assert 0 <= int(tokens[6]) < V
    np.testing.assert_array_equal(np.delete(tokens, [5, 6]), np.delete(clean, [5, 6]))


def test_a_row_is_sampled_alike_whatever_its_neighbors(rows):
    logits, history = rows[0], histories(rows[1])
    sampler = RepetitionPenalty(1.1) | Temperature(0.8) | TopK(8) | TopP(0.9)
    run = jax.jit(jax.vmap(lambda key, x, s: (sampler(key, x, s), sampler.adjust(x, s))))
    keys = jax.random.split(jax.random.key(0), len(logits))
    token, adjusted = run(keys, logits, history)
    others = np.roll(logits, 1, axis=0) * 3
    others[11] = logits[11]
    token2, adjusted2 = run(keys, others, history)
    assert token[11] == token2[11]
    np.testing.assert_array_equal(adjusted[11], adjusted2[11])


def test_samplers_are_values():
    chain = Temperature(0.8) | TopK(40) | TopP(0.95)
    assert chain == Chain((Temperature(0.8), TopK(40), TopP(0.95)))
    assert chain == Chain([Chain((Temperature(0.8), TopK(40))), TopP(0.95)])
    assert hash(chain) == hash(Temperature(0.8) | (TopK(40) | TopP(0.95)))
    assert Temperature(np.float32(0.5)) == Temperature(0.5)
    assert hash(TopK(np.int64(3))) == hash(TopK(3))
    assert TopK(3.0) == TopK(3)
    assert chain != Temperature(0.8) | TopP(0.95) | TopK(40)
    with pytest.raises(dataclasses.FrozenInstanceError):
        chain.parts[0].t = 3


def test_a_users_own_part_composes():
    @dataclasses.dataclass(frozen=True)
    class Ban(Sampler):
        token: int

        def adjust(self, logits, history):
            return logits.at[self.token].set(-jnp.inf)

    assert int((Ban(1) | Greedy())(None, jnp.array([0.0, 2.0, 1.0]))) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Temperature(-0.1), "Temperature: t is -0.1, must be 0 (greedy), or 1e-6 and above"),
        (lambda: Temperature(1e-9), "Temperature: t is 1e-09, must be 0 (greedy), or 1e-6 and above"),
        (lambda: Temperature(float("nan")), "Temperature: t is nan"),
        (lambda: Temperature(float("inf")), "Temperature: t is inf"),
        (lambda: Temperature("hot"), "Temperature: t is 'hot'"),
        (lambda: Temperature(jnp.float32(1)), "Temperature: t is Array(1., dtype=float32)"),
        (lambda: TopK(0), "TopK: k is 0, must be a whole number, 1 and above"),
        (lambda: TopK(2.5), "TopK: k is 2.5, must be a whole number, 1 and above"),
        (lambda: TopK(True), "TopK: k is True"),
        (lambda: TopP(0), "TopP: p is 0, must be above 0 and at most 1 (1 is no limit)"),
        (lambda: TopP(1.01), "TopP: p is 1.01"),
        (lambda: TopP(None), "TopP: p is None"),
        (lambda: MinP(-0.1), "MinP: p is -0.1, must be from 0 (no limit) to 1"),
        (lambda: MinP(1.5), "MinP: p is 1.5"),
        (lambda: RepetitionPenalty(0), "RepetitionPenalty: r is 0, must be above 0 (1 changes nothing)"),
        (lambda: RepetitionPenalty(-1.2), "RepetitionPenalty: r is -1.2"),
        (lambda: FrequencyPenalty(float("inf")), "FrequencyPenalty: f is inf, must be a finite number"),
        (lambda: PresencePenalty("a"), "PresencePenalty: p is 'a', must be a finite number"),
        (lambda: NoRepeat(0), "NoRepeat: n is 0, must be a whole number, 1 and above"),
        (lambda: LogitBias({}), "LogitBias: bias is {}, must be {token or tuple of tokens: number}, not empty"),
        (lambda: LogitBias(3), "LogitBias: bias is 3, must be"),
        (lambda: LogitBias({3: float("inf")}), "a bias is inf, must be a finite number, or -inf to rule a token out"),
        (lambda: LogitBias({-1: 1.0}), "LogitBias: a key is -1, must be token numbers, 0 and above, at least one"),
        (lambda: LogitBias({V: 1.0})(None, jnp.zeros(V)), f"LogitBias names token {V}, outside the model's vocabulary"),
        (lambda: Suppress(()), "Suppress: tokens is (), must be token numbers"),
        (lambda: Suppress("ab"), "Suppress: tokens is 'ab', must be token numbers"),
        (lambda: Suppress(1, new=0), "Suppress: new is 0, must be a whole number"),
        (lambda: Allow([1.5]), "Allow: tokens is [1.5], must be token numbers"),
        (lambda: Force({}), "Force: tokens is {}, must be {position: token}, not empty"),
        (lambda: Force({"a": 1}), "Force: tokens is {'a': 1}, must be"),
        (lambda: Force({1: -1}), "Force: tokens[1] is -1, must be token numbers"),
        (lambda: Chain(()), "Chain: no parts given; give at least one"),
        (lambda: Chain((Temperature(1), print)), "can't be chained; parts are samplers like Temperature(0.8)"),
        (lambda: Chain(Temperature(1)), "Chain: give a tuple of samplers, Chain((a, b)), not Temperature(t=1.0)"),
        (lambda: RepetitionPenalty(1.2)(jax.random.key(0), jnp.zeros(3)), "give history, a jaxkv.sampling.History"),
    ],
)
def test_what_is_impossible_is_refused_and_the_cure_is_named(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_a_sampler_and_something_else_do_not_compose():
    with pytest.raises(TypeError):
        Temperature(1.0) | max


def test_a_sampler_is_made_from_the_numbers_known_everywhere():
    numbers = dict(min_p=0.1, top_p=0.9, top_k=40, temperature=0.8, repetition_penalty=1.1)
    assert make_sampler(**numbers) == RepetitionPenalty(1.1) | Temperature(0.8) | TopK(40) | TopP(0.9) | MinP(0.1)
    assert make_sampler(top_k=40) == Temperature(1.0) | TopK(40)
    assert make_sampler(temperature=0).greedy and not make_sampler().greedy
    with pytest.raises(ValueError, match="TopP: p is 2"):
        make_sampler(top_p=2)


def test_all_that_was_ruled_out_is_no_token():
    logits = jnp.array([0.0, 1.0, 2.0])
    nothing = Allow(1) | Suppress(1)
    assert int((nothing | Greedy())(None, logits)) == -1
    assert int(nothing(jax.random.key(0), logits)) == -1


def test_a_history_grows_as_if_it_had_been_made_of_the_whole():
    history = jax.tree.map(jnp.asarray, History.of([3, 1], V, size=N))
    for token in (1, 5, -1, 1):
        history = history.append(jnp.int32(token))
    jax.tree.map(np.testing.assert_array_equal, history, History.of([3, 1, 1, 5, 1], V, prompt_length=2, size=N))
    assert history.last(3).tolist() == [1, 5, 1]
    assert history.last(7).tolist() == [-1, -1, 3, 1, 1, 5, 1]


GOLDEN = json.loads((Path(__file__).parent / "golden" / "processors.json").read_text("utf-8"))


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: ",".join(case["config"]))
def test_logits_are_those_of_transformers(case, tmp_path):
    # tests/golden/make_processors.py: what its processors made of these logits, from the same generation_config.json.
    (tmp_path / "generation_config.json").write_text(json.dumps(case["config"]))
    sampler = make_sampler(**GenerationConfig.read(tmp_path).sampling)
    logits = np.array(GOLDEN["logits"], np.float32)
    rows = [
        History.of(text, logits.size, prompt_length=prompt_length, size=N, limit=limit)
        for text, prompt_length, limit, _ in case["rows"]
    ]
    history = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
    got = jax.jit(jax.vmap(sampler.adjust, (None, 0)))(logits, history)
    want = [[-np.inf if x is None else x for x in logits] for *_, logits in case["rows"]]
    np.testing.assert_allclose(got, np.array(want, np.float32), rtol=1e-5, atol=1e-6)


def test_numbers_beyond_every_size_are_as_good_as_no_limit():
    logits, history = jnp.arange(5.0), History.of([0], 5)
    for huge in (2**31, 2**62, 2**2000):
        for part, same in (
            (sampling.TopK(huge), True),
            (sampling.NoRepeat(huge), True),
            (sampling.Force({huge: 1}), True),
            (sampling.Force({-huge: 1}), True),
            (sampling.Suppress([3], new=huge), False),
            (sampling.Suppress([3], length=huge), False),
        ):
            want = logits if same else logits.at[3].set(-jnp.inf)
            np.testing.assert_array_equal(part.adjust(logits, history), want)
