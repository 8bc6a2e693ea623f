"""generate and stream with a toy model: against its own uncached form, token for token, and against bad input."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxkv
from jaxkv.cache.spec import EMPTY, Chunk, Full, LayerSpec, Window
from jaxkv.errors import CacheError
from jaxkv.generate import checks, generate, loop, prefill, reading, score, stream
from jaxkv.generate.history import History
from jaxkv.generate.sampling import (
    Allow,
    Greedy,
    MinP,
    RepetitionPenalty,
    Sampler,
    Suppress,
    Temperature,
    TopK,
    TopP,
)
from jaxkv.nn.attend import attend
from jaxkv.nn.rotary import Rotary

stream_file = importlib.import_module("jaxkv.generate.stream")  # the package has a function of that name
V, D, N, K, H = 29, 16, 2, 1, 8  # vocabulary, width, query heads, kv heads, head size
B, CAPACITY, MAX_BLOCK = 3, 48, 16
ROTARY = Rotary()


@dataclasses.dataclass(frozen=True)
class Toy:
    """Attention layers on an embedding: a model in the form that generate wants, hashable by its reaches."""

    reaches: tuple

    def __call__(self, params, tokens, positions, cache):
        cache, step = cache.begin(positions)
        x = params["embed"][tokens]
        layers = []
        for layer, w in zip(cache.layers, params["layers"], strict=True):
            q, k, v = project(w, x, positions)
            layers.append(layer.put(step, k, v))
            x = x + attend(q, layers[-1], step).reshape(x.shape) @ w["o"]
        return x @ params["embed"].T, cache.with_layers(layers)

    def uncached(self, params, tokens):
        """tokens [B, S] -> logits [B, S, V], with the whole mask of every layer."""
        at = jnp.arange(tokens.shape[1])
        x = params["embed"][tokens]
        for reach, w in zip(self.reaches, params["layers"], strict=True):
            q, k, v = project(w, x, jnp.broadcast_to(at, tokens.shape))
            mask = (at[None, :] <= at[:, None]) & reach.sees(at[:, None], at[None, :])
            x = x + jax.nn.dot_product_attention(q, k, v, mask=mask[None, None]).reshape(x.shape) @ w["o"]
        return x @ params["embed"].T

    def cache(self, num_rows=B, capacity=CAPACITY, max_block=MAX_BLOCK, **kwargs):
        specs = [LayerSpec(reach, num_kv_heads=K, head_dim=H) for reach in self.reaches]
        return jaxkv.Cache.init(specs, num_rows, capacity, max_block=max_block, **kwargs)


def project(w, x, positions):
    q, k, v = ((x @ w[name]).reshape(*x.shape[:2], -1, H) for name in "qkv")
    return ROTARY.rotate(q, positions[:, :, None, None]), ROTARY.rotate(k, positions[:, :, None, None]), v


@functools.cache
def make_params(num_layers):
    random = np.random.default_rng(3)
    w = lambda *shape: jnp.asarray(random.normal(size=shape) * shape[0] ** -0.5 * 1.5, jnp.float32)  # noqa: E731
    layers = [{"q": w(D, N * H), "k": w(D, K * H), "v": w(D, K * H), "o": w(N * H, D)} for _ in range(num_layers)]
    return {"embed": jnp.asarray(random.normal(size=(V, D)), jnp.float32), "layers": layers}


MIXTURES = [(Full(), Window(5)), (Window(4, sinks=2), Chunk(6))]
TOY = Toy(MIXTURES[0])
PARAMS = make_params(2)
RANDOM = RepetitionPenalty(1.2) | Temperature(3) | TopK(12) | TopP(0.95) | MinP(0.01)
KEY = jax.random.key(5)
PROMPTS = [[3], [1, 4, 1, 5, 9, 2, 6], [int(x) for x in np.random.default_rng(1).integers(0, V, 23)]]


def assert_same(a, b):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.log_probs, b.log_probs)
    np.testing.assert_array_equal(a.lengths, b.lengths)
    assert a.reasons == b.reasons


def history(prompts, result):
    return [[*p, *t[:n].tolist()] for p, t, n in zip(prompts, result.tokens, result.lengths, strict=True)]


@functools.partial(jax.jit, static_argnums=0)
def uncached_logits(toy, params, tokens):
    return toy.uncached(params, tokens)


def uncached_loop(toy, prompts, new, choose):
    """The loop without a cache: every step reads everything again. Returns tokens and log-probabilities."""
    rows, log_probs = [list(p) for p in prompts], [[] for _ in prompts]
    for _ in range(new):
        padded = np.zeros((len(rows), CAPACITY), np.int32)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = row
        logits = np.asarray(uncached_logits(toy, PARAMS, padded))
        for i, row in enumerate(rows):
            x = logits[i, len(row) - 1]
            token = choose(i, row, x)
            log_probs[i].append(x[token] - np.log(np.exp(x.astype(np.float64)).sum()))
            row.append(token)
    return [row[-new:] for row in rows], log_probs


@pytest.mark.parametrize("reaches", MIXTURES, ids=str)
def test_cached_generation_is_the_uncached_loop_token_for_token(reaches):
    toy = Toy(reaches)
    result = generate(toy, PARAMS, PROMPTS, toy.cache(), max_new_tokens=20)
    tokens, log_probs = uncached_loop(toy, PROMPTS, 20, lambda i, row, x: int(x.argmax()))
    np.testing.assert_array_equal(result.tokens, tokens)
    np.testing.assert_allclose(result.log_probs, log_probs, rtol=1e-5, atol=5e-4)
    assert result.tokens.dtype == result.lengths.dtype == np.int32
    assert result.log_probs.dtype == np.float32
    assert result.lengths.tolist() == [20] * B
    assert result.reasons == ("length",) * B
    assert result.cache.lengths.tolist() == [len(p) + 19 for p in PROMPTS]
    assert result.cache.ok.all()


def test_random_sampling_is_the_uncached_loop_with_the_documented_keys():
    result = generate(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=12, sampler=RANDOM, key=KEY)

    @jax.jit
    def sample(row, position, logits, history):
        return RANDOM(jax.random.fold_in(jax.random.fold_in(KEY, row), position), logits, history)

    def choose(i, row, x):
        return int(sample(i, len(row), x, History.of(row, V, prompt_length=len(PROMPTS[i]), size=CAPACITY)))

    tokens, log_probs = uncached_loop(TOY, PROMPTS, 12, choose)
    np.testing.assert_array_equal(result.tokens, tokens)
    np.testing.assert_allclose(
        result.log_probs, log_probs, rtol=1e-5, atol=5e-4
    )  # of the model, not of what the sampler left


def test_a_stream_gives_exactly_the_tokens_of_generate():
    options = {"max_new_tokens": 12, "sampler": RANDOM, "key": KEY, "stop_tokens": [0, 7, 11]}
    whole = generate(TOY, PARAMS, PROMPTS, TOY.cache(), **options)
    assert len(set(whole.lengths.tolist())) > 1
    steps = stream(TOY, PARAMS, PROMPTS, TOY.cache(), **options)
    got = list(steps)
    assert all(tokens.dtype == np.int32 and tokens.shape == (B,) for tokens in got)
    np.testing.assert_array_equal(np.stack(got, 1), whole.tokens[:, : len(got)])
    assert len(got) == whole.lengths.max()
    assert_same(steps.result, whole)
    assert next(steps, None) is None


def test_a_stream_may_be_left_and_taken_up_again():
    whole = generate(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=12, sampler=RANDOM, key=KEY)
    steps = stream(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=12, sampler=RANDOM, key=KEY)
    assert steps.result.lengths.tolist() == [0] * B
    for _, _tokens in zip(range(5), steps, strict=False):
        pass
    part = steps.result
    assert part.reasons == ("running",) * B
    np.testing.assert_array_equal(part.tokens[:, :5], whole.tokens[:, :5])
    assert (part.tokens[:, 5:] == EMPTY).all()
    for _tokens in steps:
        pass
    assert_same(steps.result, whole)


def test_a_stream_that_was_left_can_be_gone_on_from_by_its_cache():
    whole = generate(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=12, sampler=RANDOM, key=KEY)
    steps = stream(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=12, sampler=RANDOM, key=KEY)
    for _, _tokens in zip(range(5), steps, strict=False):
        pass
    part = steps.result
    rest = generate(
        TOY, PARAMS, history(PROMPTS, part), part.cache, max_new_tokens=7, sampler=RANDOM, key=KEY
    )  # the key of a token comes from its position, so the same key goes on with the same text
    np.testing.assert_array_equal(rest.tokens, whole.tokens[:, 5:])
    with pytest.raises(CacheError, match=r"Use result\.cache"):
        next(steps)


def test_ctrl_c_between_steps_leaves_a_usable_result():
    # Python has no handler if it was started with Ctrl-C ignored, as a shell starts what goes into the background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    whole = generate(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=12)
    steps = stream(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=12)
    try:
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            for i, _tokens in enumerate(steps):
                if i == 3:
                    signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    result = steps.result
    np.testing.assert_array_equal(result.tokens[:, :4], whole.tokens[:, :4])
    rest = generate(TOY, PARAMS, history(PROMPTS, result), result.cache, max_new_tokens=8)
    np.testing.assert_array_equal(rest.tokens, whole.tokens[:, 4:])


def test_ctrl_c_in_a_step_can_not_lose_what_was_donated():
    # Python raises KeyboardInterrupt where it runs byte code: so none may run between the step and the keeping of it.
    steps = stream(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=12)
    for _, _tokens in zip(range(3), steps, strict=False):
        pass
    events = []
    sys.setprofile(lambda frame, event, arg: events.append((event, frame.f_code.co_name, getattr(arg, "__name__", ""))))
    try:
        next(steps)
    finally:
        sys.setprofile(None)
    begin = events.index(("c_call", "_set", "update"))
    assert events[begin + 1] == ("c_return", "_set", "update")


def test_a_cache_that_came_back_from_numpy_goes_on():
    want = generate(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=3)
    assert_same(generate(TOY, PARAMS, PROMPTS, jax.device_get(TOY.cache()), max_new_tokens=3), want)


def test_the_next_turn_goes_on_from_the_cache_and_gives_the_text_of_one_run():
    first = generate(TOY, PARAMS, [PROMPTS[1], None, PROMPTS[2]], TOY.cache(), max_new_tokens=5)
    assert first.reasons == ("length", "idle", "length")
    assert first.lengths.tolist() == [5, 0, 5]
    assert first.cache.lengths.tolist() == [11, 0, 27]
    said = [[*PROMPTS[1], *first.tokens[0].tolist(), 8, 8, 8], [2, 2], [*PROMPTS[2], *first.tokens[2].tolist(), 4]]
    second = generate(TOY, PARAMS, said, first.cache, max_new_tokens=6)
    tokens, log_probs = uncached_loop(TOY, said, 6, lambda i, row, x: int(x.argmax()))
    np.testing.assert_array_equal(second.tokens, tokens)
    np.testing.assert_allclose(second.log_probs, log_probs, rtol=1e-5, atol=5e-4)


def test_only_what_the_cache_lacks_is_read(monkeypatch):
    read = []
    read_block = reading.read_block
    monkeypatch.setattr(stream_file, "read_block", lambda *args: (read.append(args[3]), read_block(*args))[1])
    first = generate(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=4)
    assert sum((positions != EMPTY).sum() for positions in read) == sum(len(p) - 1 for p in PROMPTS)
    read.clear()
    generate(TOY, PARAMS, history(PROMPTS, first), first.cache, max_new_tokens=4)
    assert not read
    assert {positions.shape[1] for positions in read} <= {8, 16}


@pytest.mark.optimized
@pytest.mark.parametrize("sampler", [Greedy(), RANDOM], ids=["greedy", "random"])
def test_a_rows_text_does_not_depend_on_its_neighbors(sampler):
    def run(prompts):
        return generate(TOY, PARAMS, prompts, TOY.cache(), max_new_tokens=12, sampler=sampler, key=KEY)

    here = run(PROMPTS)
    for others in ([PROMPTS[2] * 2, PROMPTS[1], [5] * 30], [None, PROMPTS[1], None], [[0], PROMPTS[1], [1]]):
        there = run(others)
        np.testing.assert_array_equal(here.tokens[1], there.tokens[1])
        np.testing.assert_array_equal(here.log_probs[1], there.log_probs[1])  # bitwise, not nearly


def test_rows_with_the_same_prompt_draw_on_their_own():
    result = generate(TOY, PARAMS, [PROMPTS[1]] * B, TOY.cache(), max_new_tokens=12, sampler=RANDOM, key=KEY)
    assert len({tuple(row) for row in result.tokens.tolist()}) == B


def test_a_row_ends_with_its_stop_token_and_the_others_go_on():
    free = generate(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=20)
    stop = int(free.tokens[1, 3])
    result = generate(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=20, stop_tokens=stop)
    for row in range(B):
        at = np.flatnonzero(free.tokens[row] == stop)
        end = at[0] + 1 if at.size else 20
        assert result.reasons[row] == ("stop" if at.size else "length")
        assert result.lengths[row] == end
        np.testing.assert_array_equal(result.tokens[row, :end], free.tokens[row, :end])
        assert (result.tokens[row, end:] == EMPTY).all()
        assert (result.log_probs[row, end:] == 0).all()
    assert "stop" in result.reasons


def test_the_loop_ends_when_every_row_has():
    free = generate(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=20)
    steps = stream(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=40, stop_tokens=free.tokens[:, 2].tolist())
    assert len(list(steps)) <= 3
    assert steps.result.reasons == ("stop",) * B
    assert steps.result.tokens.shape == (B, 40)


def test_a_row_that_does_not_fit_ends_full_with_its_tokens_intact():
    prompts = [PROMPTS[0], PROMPTS[1], [2] * CAPACITY]
    result = generate(TOY, PARAMS, prompts, TOY.cache(), max_new_tokens=1000)
    assert result.tokens.shape == (B, CAPACITY + 1)  # one more step finds out that nothing fits
    assert result.reasons == ("full",) * B
    assert result.lengths.tolist() == [CAPACITY - len(p) + 1 for p in prompts]
    assert result.cache.lengths.tolist() == [CAPACITY] * B
    assert not result.cache.ok.any()
    tokens, _ = uncached_loop(TOY, prompts[:1], 30, lambda i, row, x: int(x.argmax()))
    np.testing.assert_array_equal(result.tokens[0, :30], tokens[0])


def test_a_row_that_is_not_ok_ends_full_at_once_until_retried():
    cache = TOY.cache()
    cache = dataclasses.replace(cache, ok=jnp.array([True, False, True]))
    refused = generate(TOY, PARAMS, PROMPTS, cache, max_new_tokens=4)
    assert refused.reasons == ("length", "full", "length")
    assert refused.lengths.tolist() == [4, 0, 4]
    again = generate(TOY, PARAMS, [None, PROMPTS[1], None], refused.cache.retry(~refused.cache.ok), max_new_tokens=4)
    assert again.reasons == ("idle", "length", "idle")
    np.testing.assert_array_equal(
        again.tokens[1], generate(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=4).tokens[1]
    )


def test_a_stream_does_not_yield_a_step_in_which_nothing_fitted():
    steps = stream(TOY, PARAMS, [None, [2] * CAPACITY, None], TOY.cache(), max_new_tokens=9)
    assert len(list(steps)) == 1
    assert steps.result.reasons == ("idle", "full", "idle")


def test_all_rows_idle_is_nothing_to_do():
    assert generate(TOY, PARAMS, [None] * B, TOY.cache(), max_new_tokens=3).reasons == ("idle",) * B
    assert list(stream(TOY, PARAMS, [None] * B, TOY.cache(), max_new_tokens=3)) == []


def test_many_prompts_compile_a_handful_of_times():
    def forward(params, tokens, positions, cache):  # its own, to count from zero
        return TOY(params, tokens, positions, cache)

    before = loop.decode._cache_size(), reading.read_block._cache_size()
    random = np.random.default_rng(0)
    for i in range(100):
        prompts = [random.integers(0, V, n) if n else None for n in random.integers(0, 40, B)]
        stops = random.integers(0, V, i % 7).tolist()
        generate(forward, PARAMS, prompts, TOY.cache(), max_new_tokens=1 + i % 3, stop_tokens=stops)
    for _tokens in stream(forward, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=4):
        pass
    after = loop.decode._cache_size(), reading.read_block._cache_size()
    assert after[0] - before[0] == 1
    assert after[1] - before[1] == 1  # blocks of 16


@pytest.mark.optimized
def test_a_prefix_read_on_the_same_grid_gives_bitwise_the_same_cache_and_text():
    prompt = PROMPTS[2]
    cold = generate(TOY, PARAMS, [prompt, None, None], TOY.cache(), max_new_tokens=8)
    shared = generate(TOY, PARAMS, [[*prompt[:16], 0], None, None], TOY.cache(), max_new_tokens=1)
    warm = shared.cache.copy_prefix(0, 1, 16)
    assert warm.lengths[1] == 16
    result = generate(TOY, PARAMS, [None, prompt, None], warm, max_new_tokens=8)
    np.testing.assert_array_equal(result.tokens[1], cold.tokens[0])
    np.testing.assert_array_equal(result.log_probs[1], cold.log_probs[0])
    for got, want in zip(result.cache.layers, cold.cache.layers, strict=True):
        for mine, theirs in ((got.k[1], want.k[0]), (got.v[1], want.v[0])):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("block", [1, 4, 16, 512])
def test_prompts_are_cut_row_by_row(block):
    left = np.array([0, 1, 7, 8, 100, 1023])
    schedule = list(reading.schedule(left, block))
    np.testing.assert_array_equal(sum(taken for _, taken in schedule), left)
    assert all(size & (size - 1) == 0 and size <= block for size, _ in schedule)
    assert all((taken <= size).all() for size, taken in schedule)
    assert len({size for size, _ in schedule}) <= max(1, block.bit_length() - 5)
    for row, n in enumerate(left):
        alone = [(size, taken[0]) for size, taken in reading.schedule(np.array([n]), block)]
        assert [(size, taken[row]) for size, taken in schedule if taken[row]] == alone


def test_the_end_of_a_prompt_is_padded_where_that_spares_blocks():
    for n, sizes in ((1023, [512, 512]), (300, [256, 32, 32]), (385, [512]), (384, [256, 128]), (5, [32])):
        assert [size for size, _ in reading.schedule(np.array([n]), 512)] == sizes


def test_a_cache_that_takes_one_token_at_a_time_reads_prompts_too():
    prompts = [PROMPTS[1], None, [3]]
    result = generate(TOY, PARAMS, prompts, TOY.cache(max_block=1), max_new_tokens=4)
    want = generate(TOY, PARAMS, prompts, TOY.cache(), max_new_tokens=4)
    np.testing.assert_array_equal(result.tokens, want.tokens)


def test_a_plain_function_is_a_sampler():
    def second_best(key, logits):
        assert logits.shape == (V,)
        assert logits.dtype == jnp.float32
        return jnp.argsort(logits)[-2]

    result = generate(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=6, sampler=second_best, key=KEY)
    tokens, _ = uncached_loop(TOY, PROMPTS, 6, lambda i, row, x: int(np.argsort(x)[-2]))
    np.testing.assert_array_equal(result.tokens, tokens)


def test_old_style_keys_work():
    old = generate(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=4, sampler=RANDOM, key=jax.random.PRNGKey(5))
    new = generate(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=4, sampler=RANDOM, key=jax.random.key(5))
    assert_same(old, new)


def drop(params, tokens, positions, cache):
    return TOY(params, tokens, positions, cache)[0], cache


@functools.partial(jax.jit, static_argnums=0)
def hidden(forward, *args):
    return forward(*args)


def test_a_forward_that_drops_what_begin_returned_is_refused_before_anything_is_touched():
    def forward(params, tokens, positions, cache):
        _, step = cache.begin(positions)
        x = jnp.ones((*tokens.shape, K, H))
        layers = [layer.put(step, x, x) for layer in cache.layers]
        return params["embed"][tokens], cache.with_layers(layers)

    cache = TOY.cache()
    for run in (generate, stream):
        with pytest.raises(
            ValueError, match=r"forward returned the cache as it was given.*cache\.with_layers\(layers\)"
        ):
            run(forward, PARAMS, PROMPTS, cache, max_new_tokens=3)
    assert not cache.lengths.is_deleted()


def test_a_forward_that_drops_what_begin_returned_under_its_own_jit_is_found_out_with_the_first_token():
    forward = functools.partial(hidden, drop)
    message = (
        r"row 0 was given \d tokens, and the cache that forward returned has 0; forward must return the cache that"
    )
    with pytest.raises(ValueError, match=message):
        generate(forward, PARAMS, [[1], None, [2]], TOY.cache(), max_new_tokens=3)
    with pytest.raises(ValueError, match=message):
        next(stream(forward, PARAMS, [[1], None, [2]], TOY.cache(), max_new_tokens=3))


def test_only_the_first_token_of_a_stream_waits_for_the_lengths(monkeypatch):
    calls = []
    monkeypatch.setattr(checks, "check_lengths", lambda *args: calls.append(args))
    assert len(list(stream(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=3))) == 3
    assert len(calls) == 1


def limited(params, tokens, positions, cache):
    """TOY with a table of 9 positions, whose logits are NaN from there on, as those of Flax's Embed are."""
    logits, cache = TOY(params, tokens, positions, cache)
    return jnp.where((positions < 9)[..., None], logits, jnp.nan), cache


def test_a_row_whose_logits_are_nan_ends_with_its_tokens_intact_and_the_others_go_on():
    prompts, options = [PROMPTS[0], PROMPTS[1], None], {"max_new_tokens": 7, "sampler": RANDOM, "key": KEY}
    want = generate(TOY, PARAMS, prompts, TOY.cache(), **options)
    result = generate(limited, PARAMS, prompts, TOY.cache(), **options)
    assert result.reasons == ("length", "nan", "idle")
    assert result.lengths.tolist() == [7, 3, 0]  # the prompt and two tokens have a place in the table
    assert result.cache.lengths.tolist() == [7, 10, 0]
    np.testing.assert_array_equal(result.tokens[0], want.tokens[0])
    np.testing.assert_array_equal(result.tokens[1], [*want.tokens[1, :3], *[EMPTY] * 4])
    np.testing.assert_array_equal(result.log_probs[1, 3:], 0)
    steps = stream(limited, PARAMS, prompts, TOY.cache(), **options)
    np.testing.assert_array_equal(np.stack(list(steps), 1), result.tokens)
    assert_same(steps.result, result)


def test_nan_weights_give_no_tokens():
    broken = {**PARAMS, "embed": PARAMS["embed"] * jnp.float32(jnp.nan)}
    steps = stream(TOY, broken, PROMPTS, TOY.cache(), max_new_tokens=3)
    assert list(steps) == []
    assert steps.result.reasons == ("nan",) * B
    assert (steps.result.tokens == EMPTY).all()


@pytest.mark.optimized
def test_the_decode_loop_makes_no_copy_and_no_temporary_of_cache_size():
    toy, rows, capacity = TOY, 2, 1 << 14  # 0.5 MB per buffer of a Full layer stands out from everything else
    cache = toy.cache(num_rows=rows, capacity=capacity)
    steps = stream(toy, PARAMS, [[1], [2]], cache, max_new_tokens=4)
    compiled = loop.decode.lower(*steps._advance.args, steps._cache, steps._state, np.int32(4)).compile()
    buffer = rows * K * capacity * H * 4
    copies = re.findall(rf"f32\[{rows},{K},{capacity},{H}\]\S* copy\(", compiled.as_text())
    assert not copies
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < buffer // 2
    assert memory.alias_size_in_bytes >= cache.nbytes


def test_the_cache_is_donated_and_says_so_when_it_is_used_again():
    cache = TOY.cache()
    generate(TOY, PARAMS, PROMPTS, cache, max_new_tokens=2)
    assert cache.layers[0].k.is_deleted()
    for run in (generate, stream):
        with pytest.raises(CacheError, match=r"this cache was donated.*Use result\.cache"):
            run(TOY, PARAMS, PROMPTS, cache, max_new_tokens=2)


def test_a_sharded_cache_gives_the_same_tokens_and_compiles_once():
    mesh = jax.make_mesh((B,), ("row",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:B])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("row"))
    prompts = [PROMPTS[1], None, [4, 2]]
    want = generate(TOY, PARAMS, prompts, TOY.cache(), max_new_tokens=6)
    before = loop.decode._cache_size()
    steps = stream(TOY, PARAMS, prompts, TOY.cache(sharding=sharding), max_new_tokens=6)
    for _tokens in steps:
        pass
    np.testing.assert_array_equal(steps.result.tokens, want.tokens)
    cache = steps.result.cache
    assert cache.layers[0].k.sharding.is_equivalent_to(sharding, 4)
    assert cache.lengths.sharding.is_fully_replicated
    assert loop.decode._cache_size() - before == 1


GOOD = {"forward": TOY, "prompts": PROMPTS, "max_new_tokens": 2}
OTHER = Toy((Full(),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": PROMPTS[:2]}, "2 prompts for a cache of 3 rows; give one per row"),
        ({"prompts": [1, 2, 3]}, "the prompt of row 0 is int64[]; give a sequence of whole token numbers"),
        ({"prompts": "abc"}, "prompts is text; encode it"),
        ({"prompts": ["a", "b", "c"]}, "the prompt of row 0 is <U1[]; give a sequence of whole token numbers"),
        ({"prompts": [[1], [], None]}, "the prompt of row 1 is empty; give at least one token, or None"),
        ({"prompts": [[1], [1.5], None]}, "the prompt of row 1 is float64[1]; give a sequence of whole token numbers"),
        ({"prompts": [[1], [True], None]}, "the prompt of row 1 is bool[1]"),
        ({"prompts": [[[1], [1, 2]], [1], None]}, "the prompt of row 0 is object[0, 0]; give a sequence"),
        ({"prompts": [[1], [V], None]}, f"the prompt of row 1 has token {V}, outside the model's vocabulary of {V}"),
        ({"prompts": [[1], [3, -1], None]}, "the prompt of row 1 has token -1, outside the model's vocabulary"),
        (
            {"prompts": [[1], None, [1] * (CAPACITY + 1)]},
            f"the prompt of row 2 has {CAPACITY + 1} tokens, the cache a capacity of {CAPACITY}; shorten it or make a",
        ),
        ({"held": True, "prompts": [[5], None, None]}, "has 1 tokens, but the row holds 2 already; give the whole"),
        ({"held": True, "prompts": [[5, 5], None, None]}, "with at least one new token, or cache.reset the row"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be 1 or more"),
        ({"max_new_tokens": [1, 0, 2]}, "max_new_tokens is [1, 0, 2]; it must be 1 or more"),
        ({"max_new_tokens": [1, 2]}, "max_new_tokens has 2 numbers for 3 prompts; give one, or one per prompt"),
        ({"num_samples": 0}, "num_samples is 0; give a whole number, 1 or more, or one per prompt"),
        ({"num_samples": [2, 1]}, "num_samples has 2 numbers for 3 prompts; give one, or one per prompt"),
        ({"num_samples": 2}, "num_samples asks for 6 rows, and the cache has 3; make it with num_rows=6"),
        ({"stop_tokens": [1, [2, V]]}, f"stop_tokens has token {V}, outside the model's vocabulary"),
        (
            {"stop_tokens": [1, []]},
            "stop_tokens is [1, []]; give whole token numbers, for instance stop_tokens=[0], or",
        ),
        ({"max_new_tokens": 2.0}, "max_new_tokens is 2.0; give a whole number, 1 or more"),
        ({"stop_tokens": [V]}, f"stop_tokens has token {V}, outside the model's vocabulary of {V} (0 to {V - 1})"),
        ({"stop_tokens": -1}, "stop_tokens has token -1, outside"),
        ({"stop_tokens": ["."]}, "stop_tokens is ['.']; give whole token numbers"),
        ({"sampler": Temperature(1.0)}, "sampler Temperature(t=1.0) draws at random but no key is given; give key=jax"),
        ({"sampler": Temperature(1.0), "key": 0}, "key is 0; give a PRNG key, for instance key=jax.random.key(0)"),
        ({"sampler": TopK(3), "key": jax.random.split(KEY)}, "key has shape (2,); give one key"),
        ({"sampler": Greedy}, "sampler is the class Greedy; give an instance of it"),
        ({"sampler": 0.8}, "sampler is 0.8; give one of jaxkv.sampling, or a function sample(key, logits)"),
        ({"sampler": [TopK(3)]}, "sampler is [TopK(k=3)], which can't be hashed"),
        ({"sampler": lambda key, x: x, "key": KEY}, f"returned float32[{V}] for the logits [V] of one row; it must"),
        ({"forward": None}, "forward is None; give a function forward(params, tokens, positions, cache)"),
        ({"forward": lambda p, t, q, c: t}, f"forward returned an array [{B}, 1]; it must return (logits, cache)"),
        (
            {"forward": lambda p, t, q, c: (c.begin(q)[0], t)},
            "forward returned the cache first; it must return (logits, cache)",
        ),
        (
            {"forward": lambda p, t, q, c: (t, c.begin(q)[0])},
            f"forward returned logits ({B}, 1) for tokens ({B}, 1); they must be",
        ),
        ({"forward": lambda p, t, q, c: (p["embed"][t], c)}, "forward must return the cache that begin returned"),
        (
            {"forward": nnx.Linear(2, 2, rngs=nnx.Rngs(0))},
            "forward is a Linear, a flax.nnx module; give a function of its parameters: forward, params = jaxkv.nnx.",
        ),
        ({"forward": linen.Dense(2)}, "forward is a Dense, a flax.linen module; give a function of its parameters"),
        (
            {"forward": lambda p, t, q, c: (p["embed"][t], OTHER.cache())},
            "forward returned another kind of cache than it was given",
        ),
        ({"cache": None}, "cache is a NoneType; give a jaxkv.Cache, from Cache.init or result.cache"),
    ],
)
@pytest.mark.parametrize("run", [generate, stream], ids=["generate", "stream"])
def test_what_does_not_fit_is_refused_before_anything_is_touched(run, change, message):
    change = dict(change)
    cache = TOY.cache()
    if change.pop("held", False):
        cache = dataclasses.replace(cache, lengths=jnp.array([2, 0, 0], jnp.int32))
    arguments = {**GOOD, "cache": cache, **change}
    forward, prompts, given = (arguments.pop(name) for name in ("forward", "prompts", "cache"))
    with pytest.raises(ValueError, match=re.escape(message)):
        run(forward, PARAMS, prompts, given, **arguments)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(cache))


def test_an_unhashable_forward_is_refused_with_the_cure():
    @dataclasses.dataclass
    class Unhashable:
        def __call__(self, params, tokens, positions, cache):
            return TOY(params, tokens, positions, cache)

    with pytest.raises(ValueError, match=r"can't be hashed.*jaxkv\.nnx\.functional\(model\)"):
        generate(Unhashable(), PARAMS, PROMPTS, TOY.cache(), max_new_tokens=1)


def test_prompts_may_be_arrays():
    prompts = jnp.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]], jnp.int32)
    want = generate(TOY, PARAMS, prompts.tolist(), TOY.cache(), max_new_tokens=3)
    assert_same(generate(TOY, PARAMS, prompts, TOY.cache(), max_new_tokens=3), want)
    assert_same(generate(TOY, PARAMS, list(prompts), TOY.cache(), max_new_tokens=np.int64(3)), want)


def test_the_limit_may_be_each_rows_own():
    free = generate(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=12)
    result = generate(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=[3, 12, 1])
    assert result.reasons == ("length",) * B and result.lengths.tolist() == [3, 12, 1]
    for row, n in enumerate([3, 12, 1]):
        np.testing.assert_array_equal(result.tokens[row, :n], free.tokens[row, :n])
    assert result.cache.lengths.tolist() == [len(p) + n - 1 for p, n in zip(PROMPTS, [3, 12, 1], strict=True)]


def test_a_row_ends_with_a_stop_sequence_that_it_wrote_itself():
    free = generate(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=20)
    stop = free.tokens[1, 2:5].tolist()
    stops = [[*stop, V - 1], stop, [V - 2, *stop[:2]]]
    result = generate(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=20, stop_tokens=stops)
    for row in range(B):
        written = free.tokens[row].tolist()
        end = next((i + 3 for i in range(18) if written[i : i + 3] == stop), None)
        assert (result.reasons[row], result.lengths[row]) == (("length", 20) if end is None else ("stop", end))
    assert result.reasons[1] == "stop"
    # One that began in the prompt is not what the model wrote.
    first = int(free.tokens[1, 0])
    result = generate(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=4, stop_tokens=[[PROMPTS[1][-1], first]])
    assert result.reasons[1] == "length"


def test_what_a_sampler_reads_of_a_row_is_its_prompt_and_its_tokens():
    @dataclasses.dataclass(frozen=True)
    class Count(Sampler):
        greedy = True
        needs_history = True

        def adjust(self, logits, history):
            # A token that depends on all of the history.
            total = (
                jnp.where(history.tokens >= 0, history.tokens, 0).sum()
                + history.counts[3]
                + 2 * history.in_prompt[1].astype(jnp.int32)
            )
            total += 5 * history.num_generated + 7 * history.prompt_length + 11 * (history.limit - history.length)
            return jnp.where(jnp.arange(V) == total % V, 1.0, 0.0)

    result = generate(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=[9, 12, 5], sampler=Count())
    for prompt, limit, tokens in zip(PROMPTS, [9, 12, 5], result.tokens, strict=True):
        row = list(prompt)
        for token in tokens[:limit]:
            new = row[len(prompt) :]
            total = sum(row) + new.count(3) + 2 * (1 in prompt) + 5 * len(new) + 7 * len(prompt)
            assert token == (total + 11 * (limit - len(new))) % V
            row.append(int(token))


def test_a_function_that_does_not_read_its_key_needs_none():
    want = generate(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=6)

    def best(key, logits):
        return logits.argmax()

    assert_same(generate(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=6, sampler=best), want)

    def draw(key, logits):
        return jax.random.categorical(key, logits)

    with pytest.raises(ValueError, match=r"draw.* draws at random but no key is given; give key=jax\.random\.key\(0\)"):
        generate(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=6, sampler=draw)

    def broken(key, logits):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        generate(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=6, sampler=broken)


@pytest.mark.parametrize("bad", [-1, V])
def test_a_sampler_that_answers_with_no_token_is_told_by_name(bad):
    @dataclasses.dataclass(frozen=True)
    class Odd:
        token: int
        needs_key = False
        needs_history = True

        def __call__(self, key, logits, history):
            wrong = (history.num_generated == 2) & (history.prompt_length == len(PROMPTS[1]))
            return jnp.where(wrong, self.token, logits.argmax()).astype(jnp.int32)

    message = (
        rf"sampler .*Odd\(token={bad}\) answered with token {bad} for row 1, outside the model's vocabulary of {V}"
    )
    with pytest.raises(ValueError, match=message):
        generate(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=6, sampler=Odd(bad))
    steps = stream(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=6, sampler=Odd(bad))
    next(steps), next(steps)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            next(steps)
    assert steps.result.reasons == ("running", "sampler", "running")
    assert steps.result.lengths[1] == 2


def test_rules_that_leave_no_token_are_told():
    with pytest.raises(ValueError, match="-1 says that no token was left to choose from"):
        generate(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=6, sampler=Allow(1) | Suppress(1) | Greedy())


@pytest.mark.parametrize("case", ["+inf", "-inf", "some -inf"])
def test_a_row_whose_logits_are_infinite_ends_with_its_tokens_intact(case):
    def infinite(params, tokens, positions, cache):
        logits, cache = TOY(params, tokens, positions, cache)
        here = (positions >= 9)[..., None] & ((jnp.arange(V) == 4) | (case == "-inf"))[None, None]
        return jnp.where(here, jnp.float32(jnp.inf if case == "+inf" else -jnp.inf), logits), cache

    if case == "some -inf":  # which is how models rule tokens out
        assert generate(infinite, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=7).reasons == ("length",) * B
        return
    want = generate(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=7)
    result = generate(infinite, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=7)
    assert result.reasons == ("length", "inf", "inf")
    assert result.lengths.tolist() == [7, 3, 0]
    np.testing.assert_array_equal(result.tokens[1, :3], want.tokens[1, :3])


class Fails:
    """A sampler whose host function fails at its nth call."""

    needs_key = False

    def __init__(self, at):
        self.at, self.calls = at, 0

    def choose(self, logits):
        self.calls += 1
        if self.calls > self.at:
            raise KeyError("the sensor is gone")
        return np.argmax(logits, -1).astype(np.int32)

    def __call__(self, key, logits):
        return jax.pure_callback(self.choose, jax.ShapeDtypeStruct((), jnp.int32), logits, vmap_method="expand_dims")


def test_a_loop_that_fails_says_so_and_a_stream_keeps_the_tokens_that_came_before():
    want = generate(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=8, stop_tokens=[5])
    steps = stream(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=8, sampler=Fails(3))
    for _ in range(3):
        next(steps)
    said = "the compiled loop failed: KeyError: 'the sensor is gone'. stream.result has the tokens of the 3 steps that"
    for _ in range(2):
        with pytest.raises(CacheError, match=re.escape(said)):
            next(steps)
    result = steps.result
    assert said in result.error and result.cache is None
    assert result.reasons == ("failed",) * B and result.lengths.tolist() == [3] * B
    np.testing.assert_array_equal(result.tokens[:, :3], want.tokens[:, :3])
    np.testing.assert_array_equal(result.log_probs[:, :3], want.log_probs[:, :3])
    assert (result.tokens[:, 3:] == EMPTY).all()
    with pytest.raises(CacheError, match="No token had come out of it yet; the cache was donated to it and is lost"):
        generate(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=8, sampler=Fails(3))


def test_reading_that_fails_says_so(monkeypatch):
    def forward(params, tokens, positions, cache):
        logits, cache = TOY(params, tokens, positions, cache)

        def fail(x):
            raise OSError("no disk")

        return logits + jax.pure_callback(fail, jax.ShapeDtypeStruct((), jnp.float32), logits[0, 0, 0]), cache

    for run in (prefill, score):
        with pytest.raises(CacheError, match=r"failed: OSError: no disk\. The cache was donated to it and is lost"):
            run(forward, PARAMS, PROMPTS, TOY.cache())


def test_a_stream_is_for_one_thread_at_a_time():
    inside, go_on = threading.Event(), threading.Event()

    class Waits(Fails):
        def choose(self, logits):
            inside.set()
            assert go_on.wait(60)
            return np.argmax(logits, -1).astype(np.int32)

    steps = stream(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=2, sampler=Waits(9))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(next, steps)
        assert inside.wait(60)
        for use in (lambda: next(steps), lambda: steps.result):
            with pytest.raises(CacheError, match="another thread is using this stream;"):
                use()
        go_on.set()
        first.result()
    assert steps.result.lengths.tolist() == [1] * B
    next(steps)


def test_rows_of_a_stream_can_be_stopped_from_outside():
    whole = generate(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=6)
    steps = stream(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=6)
    next(steps), next(steps)
    steps.stop(np.array([False, True, False]))
    assert steps.reasons == ("running", "stop", "running")
    assert len(list(steps)) == 4
    result = steps.result
    assert result.reasons == ("length", "stop", "length") and result.lengths.tolist() == [6, 2, 6]
    np.testing.assert_array_equal(result.tokens[[0, 2]], whole.tokens[[0, 2]])
    with pytest.raises(ValueError, match=r"rows is int64\[1\]; give bool \[3\]"):
        steps.stop([1])


def test_prefill_gives_the_logits_that_generate_chooses_from():
    want = generate(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=4)
    logits, cache = prefill(TOY, PARAMS, PROMPTS, TOY.cache())
    assert logits.shape == (B, V)
    np.testing.assert_array_equal(logits.argmax(1), want.tokens[:, 0])
    assert cache.lengths.tolist() == [len(p) for p in PROMPTS]
    rest = generate(
        TOY,
        PARAMS,
        [[*p, t] for p, t in zip(PROMPTS, want.tokens[:, 0].tolist(), strict=True)],
        cache,
        max_new_tokens=3,
    )
    np.testing.assert_array_equal(rest.tokens, want.tokens[:, 1:])
    # An idle row, one that does not fit, and one of which the cache holds a part.
    held = dataclasses.replace(rest.cache.rewind(jnp.array([0, 3, 20])), ok=jnp.array([True, False, True]))
    logits2, cache = prefill(TOY, PARAMS, [None, PROMPTS[1], PROMPTS[2]], held)
    assert (logits2[:2] == 0).all() and cache.ok.tolist() == [True, False, True]
    np.testing.assert_allclose(logits2[2], logits[2], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="the cache that forward returned has 0; forward must return the cache that"):
        prefill(functools.partial(hidden, drop), PARAMS, PROMPTS, TOY.cache())


def test_score_gives_the_log_probabilities_of_given_tokens():
    made = generate(TOY, PARAMS, PROMPTS, TOY.cache(), max_new_tokens=12)
    texts = history(PROMPTS, made)
    log_probs, cache = score(TOY, PARAMS, texts, TOY.cache())
    assert log_probs.shape == (B, 35) and log_probs.dtype == np.float32
    assert cache.lengths.tolist() == [len(text) - 1 for text in texts]
    padded = np.zeros((B, CAPACITY), np.int32)
    for row, text in enumerate(texts):
        padded[row, : len(text)] = text
    logits = jax.nn.log_softmax(uncached_logits(TOY, PARAMS, padded))
    for row, text in enumerate(texts):
        want = np.asarray(logits)[row, np.arange(len(text) - 1), text[1:]]
        np.testing.assert_allclose(log_probs[row, 1 : len(text)], want, rtol=1e-5, atol=5e-4)
        np.testing.assert_allclose(
            log_probs[row, len(PROMPTS[row]) : len(text)], made.log_probs[row], rtol=1e-5, atol=5e-4
        )
        assert log_probs[row, 0] == 0 and (log_probs[row, len(text) :] == 0).all()
    # What the cache holds is not read again: the first token after it can't be told.
    again, _ = score(TOY, PARAMS, [None, texts[1], None], cache.rewind(jnp.array([0, 6, 0])))
    np.testing.assert_allclose(again[1, 7:], log_probs[1, 7 : len(texts[1])], rtol=1e-5, atol=5e-4)
    assert (again[1, :7] == 0).all() and (again[[0, 2]] == 0).all()


@pytest.mark.parametrize("run", [generate, prefill], ids=["generate", "prefill"])
def test_under_a_transform_of_jax_nothing_runs(run):
    options = {"max_new_tokens": 1} if run is generate else {}
    message = "run on the host: they compile their own programs, and can't be called under jit, vmap, grad"

    def of_params(params):
        return run(TOY, params, PROMPTS, TOY.cache(), **options)

    for transformed in (jax.jit(of_params), jax.grad(of_params)):
        with pytest.raises(ValueError, match=message):
            transformed(PARAMS)
    cache = TOY.cache()
    for what in (cache, jnp.ones((B, 3), jnp.int32)):
        with pytest.raises(ValueError, match=message):
            jax.vmap(lambda x: run(TOY, PARAMS, [[1], x, None], cache, **options))(what)


def test_a_model_given_as_forward_is_refused_with_the_cure():
    model = jaxkv.models.tiny.load()
    with pytest.raises(
        ValueError, match=r"call model\.generate\(prompts\), or give its parts: generate\(model\.forward"
    ):
        generate(model, model.params, [[1]], TOY.cache(), max_new_tokens=1)
