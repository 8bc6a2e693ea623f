"""best_of: samples of prompts that are read once, against generate with as many rows of the same prompt."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import Full, Window, sampling

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
        [*prompts * n, None],
        TOY.cache(),
        max_new_tokens=6,
        sampler=sampling.Temperature(1),
        stop_tokens=[0],
        key=KEY,
    )
    result = best_of(prompts, TOY.cache(layout=layout), n, by=by)
    assert result.tokens.shape == (2, 3, 6)
    for i in range(2):
        rows = range(i, 6, 2)
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
