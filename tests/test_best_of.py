"""best_of: samples of prompts that are read once, against generate with as many rows of the same prompt."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import Full, Window, sampling
from jaxkv.models import searching

V, D, ROWS, CAPACITY = 11, 8, 7, 32
RANDOM = np.random.default_rng(1)
SHAPES = {"embed": (V, D), "at": (CAPACITY, D), "v": (2, D, D), "out": (D, V)}
PARAMS = {name: RANDOM.normal(size=shape).astype(np.float32) * 0.5 for name, shape in SHAPES.items()}
KEY = jax.random.key(3)
PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2]
LAYOUTS = {"rows": jaxkv.Rows(), "pages": jaxkv.Pages(64, page_size=4)}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
TRACED: set = set()  # shapes of tokens


@dataclasses.dataclass(frozen=True)
class Toy:
    reaches: tuple = (Window(5), Full())

    def __call__(self, params, tokens, positions, cache):
        TRACED.add(tokens.shape)
        cache, step = cache.begin(positions)
        x = params["embed"][tokens] + params["at"][jnp.maximum(positions, 0)]
        layers = []
        for i, layer in enumerate(cache.layers):
            layers.append(layer.put(step, x[:, :, None], (x @ params["v"][i])[:, :, None]))
            x = x + jaxkv.attend(x[:, :, None], layers[-1], step)[:, :, 0]
        return x @ params["out"], cache.with_layers(layers)

    def cache(self, num_rows=ROWS, layout=jaxkv.Rows()):  # noqa: B008
        specs = [jaxkv.LayerSpec(reach, num_kv_heads=1, head_dim=D) for reach in self.reaches]
        return jaxkv.Cache.init(specs, num_rows, CAPACITY, max_block=8, layout=layout)


TOY = Toy()


def best_of(prompts, cache, n, **options):
    options = {"max_new_tokens": 6, "key": KEY, "stop_tokens": [0]} | options
    return jaxkv.best_of(TOY, PARAMS, prompts, cache, n=n, **options)


def of_rows(result, i):
    """Returns {(tokens, reason): sum of log-probabilities} of one prompt's texts."""
    rows = zip(result.tokens[i], result.lengths[i], result.reasons[i], result.log_probs[i], strict=True)
    return {(tuple(tokens[:length].tolist()), reason): log_probs.sum() for tokens, length, reason, log_probs in rows}


@each_layout
@pytest.mark.parametrize("by", ["mean", "sum"])
def test_the_samples_are_those_of_generate_with_n_rows_of_the_prompt_best_first(layout, by):
    prompts, n = [PROMPT, [5]], 3
    same = jaxkv.generate(
        TOY,
        PARAMS,
        [*[prompts[0]] * n, *[prompts[1]] * n, None],
        TOY.cache(),
        max_new_tokens=6,
        sampler=sampling.Temperature(1),
        stop_tokens=[0],
        key=KEY,
    )
    result = best_of(prompts, TOY.cache(layout=layout), n, by=by)
    assert result.tokens.shape == (2, 3, 6)
    for i in range(2):
        rows = range(i * n, i * n + n)
        wanted = {(tuple(same.tokens[r][: same.lengths[r]].tolist()), same.reasons[r]) for r in rows}
        assert set(of_rows(result, i)) == wanted
        sums = result.log_probs[i].sum(1)
        np.testing.assert_allclose(result.scores[i], sums if by == "sum" else sums / result.lengths[i], rtol=1e-6)
        assert (np.diff(result.scores[i]) <= 0).all()
    assert {"stop", "length"} >= {reason for row in result.reasons for reason in row}
    assert {shape for shape in TRACED if shape[1] > 1 and shape[0] < ROWS} == {(2, 8)}  # not once per sample


@each_layout
def test_row_j_of_a_prompt_holds_its_text_j_and_goes_on(layout):
    result = best_of([PROMPT, [5]], TOY.cache(layout=layout), 3)
    texts = [
        [*prompt, *result.tokens[i, j][: result.lengths[i, j]].tolist()]
        for j in range(3)
        for i, prompt in enumerate([PROMPT, [5]])
    ]
    assert result.cache.lengths.tolist() == [*(len(text) - 1 for text in texts), 0]
    assert result.cache.shared is None
    fresh, _ = jaxkv.prefill(TOY, PARAMS, [*texts, None], TOY.cache())
    held, _ = jaxkv.prefill(TOY, PARAMS, [*texts, None], result.cache)
    np.testing.assert_allclose(held, fresh, atol=1e-5)


def test_samples_of_one_prompt_share_its_pages_and_read_them_once():
    cache = TOY.cache(layout=jaxkv.Pages(64, page_size=4))
    _, cache = jaxkv.prefill(
        TOY, PARAMS, [[5, 5, 5], *[None] * 5, [9]], cache
    )  # what the samples' rows held is forgotten
    cache = cache.reset(np.arange(ROWS) == 0)
    result = best_of([PROMPT], cache, 6)
    same = jaxkv.generate(
        TOY,
        PARAMS,
        [*[PROMPT] * 6, None],
        TOY.cache(),
        max_new_tokens=6,
        sampler=sampling.Temperature(1),
        stop_tokens=[0],
        key=KEY,
    )
    wanted = {
        (tuple(row[:n].tolist()), why) for row, n, why in zip(same.tokens, same.lengths, same.reasons, strict=True)
    }
    wanted.discard(((), "idle"))
    assert set(of_rows(result, 0)) == wanted
    full = next(group for group in result.cache.groups if not group.wraps)
    first = np.asarray(full.pages.table)[:6, : (len(PROMPT) - 1) // 4]
    assert (first == first[0]).all() and (np.asarray(full.pages.refs)[first[0]] == 6).all()
    assert result.cache.lengths[6] == 1 and result.cache.shared is None


def test_a_second_turn_reads_what_is_new():
    first = best_of([PROMPT, [5]], TOY.cache(), 3)
    texts = [[*p, *row[0][row[0] >= 0].tolist(), 3] for p, row in zip([PROMPT, [5]], first.tokens, strict=True)]
    told = [[0, *texts[0][1:]], texts[1]]  # what is held is not read, whatever it is said to be
    second = best_of(told, first.cache, 3)
    fresh = best_of(texts, TOY.cache(), 3)
    for i in range(2):
        assert set(of_rows(second, i)) == set(of_rows(fresh, i))


def test_samples_that_do_not_fit_into_a_pool_come_last_with_their_tokens():
    result = jaxkv.best_of(
        TOY,
        PARAMS,
        [PROMPT, [5]],
        TOY.cache(layout=jaxkv.Pages(6, page_size=4)),
        n=3,
        max_new_tokens=[9, 4],
        key=KEY,
    )
    alone = jaxkv.generate(
        TOY,
        PARAMS,
        [PROMPT, [5], None],
        TOY.cache(),
        max_new_tokens=[9, 4, 1],
        num_samples=[3, 3, 1],
        sampler=sampling.Temperature(1),
        key=KEY,
    )
    texts = [tuple(row[:n].tolist()) for row, n in zip(alone.tokens, alone.lengths, strict=True)]
    reasons = [reason for row in result.reasons for reason in row]
    assert set(reasons) == {"full", "length"}
    for i in range(2):
        proper = [reason == "length" for reason in result.reasons[i]]
        assert proper == sorted(proper, reverse=True)
        for tokens, reason in of_rows(result, i):
            whole = [text for text in texts[3 * i : 3 * i + 3] if text[: len(tokens)] == tokens]
            assert whole and (reason == "full" or tokens in whole)
    assert not np.isnan(result.scores).any()


def test_a_pool_without_pages_for_all_copies_ends_the_last_samples_and_the_first_go_on():
    toy, options = Toy((Full(),)), {"n": 5, "max_new_tokens": 5, "key": KEY}
    for prompt, served in ((PROMPT, 2), ([*PROMPT, *PROMPT[:7]], 1)):  # of three pages two are the prompt's, or all
        cache = toy.cache(layout=jaxkv.Pages(3, page_size=8))
        result = jaxkv.best_of(toy, PARAMS, [prompt], cache, **options)
        assert result.reasons == (("length",) * served + ("full",) * (5 - served),)
        assert result.lengths.tolist() == [[5] * served + [0] * (5 - served)]
        ample = jaxkv.best_of(toy, PARAMS, [prompt], toy.cache(), **options)
        assert {tokens for tokens, _ in of_rows(result, 0)} - {()} <= {tokens for tokens, _ in of_rows(ample, 0)}


def test_the_pool_that_a_model_makes_has_pages_for_all_copies_and_few_more(monkeypatch):
    monkeypatch.setattr(searching, "_PAGE_SIZE", 4)
    toy, prompt, limit = Toy((Window(7, sinks=1), Full())), [*PROMPT, *PROMPT[:6]], 14
    pool = searching.pages_for(toy.cache(1).specs, [(len(prompt), limit, ROWS)], CAPACITY)
    cache = toy.cache(layout=pool)
    result = jaxkv.best_of(toy, PARAMS, [prompt], cache, n=ROWS, max_new_tokens=limit, key=KEY)
    assert result.reasons == (("length",) * ROWS,)
    full = searching.pages_for([toy.cache(1).specs[1]], [(len(prompt), limit, ROWS)], CAPACITY)
    assert full.num_pages == 4 + ROWS * 4  # of 31 tokens, 16 are shared; 8 pages each if nothing were
    assert full.num_pages < pool.num_pages < ROWS * 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "n is 0; give a whole number, 1 or more"),
        ({"n": 4}, "n=4 takes 8 rows for 2 prompts, and the cache has 7; make it with num_rows=8"),
        ({"by": "max"}, """by is 'max'; give "mean" or "sum\""""),
        ({"key": None}, "draws at random but no key is given"),
        ({"sampler": sampling.Greedy()}, "is greedy, so all 2 samples would be the same; give Temperature"),
        ({"max_new_tokens": [1, 2, 3]}, "max_new_tokens has 3 numbers for 2 prompts"),
        ({"prompts": [[1], [1] * 40]}, "the prompt of row 1 has 40 tokens, the cache a capacity of 32"),
        ({"prompts": []}, "there are no prompts"),
        ({"cache": 3}, "cache is an int; give a jaxkv.Cache"),
    ],
)
def test_what_cannot_be_is_named_before_the_cache_is_touched(change, message):
    cache = TOY.cache()
    given = {"prompts": [[1], [2]], "cache": cache, "n": 2, "max_new_tokens": 3, "key": KEY} | change
    prompts, held = given.pop("prompts"), given.pop("cache")
    with pytest.raises(ValueError, match=message):
        jaxkv.best_of(TOY, PARAMS, prompts, held, **given)
    assert cache.lengths.tolist() == [0] * ROWS  # was not donated
