"""speculate: the tokens, reasons and cache of generate, whatever drafts; its arguments; how drafts are looked up."""

from __future__ import annotations

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generate import CAPACITY, KEY, MAX_BLOCK, PARAMS, PROMPTS, RANDOM, TOY, B, Toy, V, history
from test_trees import Branching

import jaxkv
from jaxkv.cache.arguments import FAR
from jaxkv.cache.spec import EMPTY, Chunk, Full, LayerSpec, Window
from jaxkv.errors import CacheError
from jaxkv.generate import generate, lookup, speculate, stream_speculation, verify
from jaxkv.generate.branches import Branches
from jaxkv.generate.sampling import Temperature

NUM_DRAFT = 6
SMALL = Toy((Window(6),))
SMALL_PARAMS = {"embed": PARAMS["embed"], "layers": PARAMS["layers"][:1]}
LOOP = [3, 4, 5, 6, 7, 8, 9]
REPEATING = [LOOP * 2, [*LOOP, 1, *LOOP[:4]], [7, *LOOP, 2, 3, 4]]


def small(**kwargs):
    return SMALL, SMALL_PARAMS, SMALL.cache(**kwargs)


def counting(params, tokens, positions, cache, parents=None):
    """A model by table: after token n comes what params [V, V] say. What it holds tells what it was given."""
    cache, step = cache.begin(positions, parents=parents)
    x = tokens.astype(jnp.float32)[:, :, None, None]
    return params[jnp.maximum(tokens, 0)], cache.with_layers(layer.put(step, x, x) for layer in cache.layers)


def table(after, size=V):
    """Logits by which token n is followed by after(n)."""
    return jnp.asarray(10 * np.eye(size, dtype=np.float32)[[after(n) % size for n in range(size)]])


def table_cache(num_rows=B, capacity=CAPACITY, reach=Full(), **kwargs):
    options = {"max_block": MAX_BLOCK} | kwargs
    return jaxkv.Cache.init([LayerSpec(reach, num_kv_heads=1, head_dim=1)], num_rows, capacity, **options)


UP = table(lambda n: n + 1)


def assert_holds_the_same(a, b):
    """Of two caches the next query sees the same: positions and lengths exactly, keys and values but for rounding."""
    assert a.lengths.tolist() == b.lengths.tolist()
    assert a.ok.tolist() == b.ok.tolist()
    positions = jnp.where(a.ok & (a.lengths < a.capacity), a.lengths, EMPTY)[:, None]
    seen = []
    for cache in (a, b):
        assert all(int(cache.resume_point(row, n)) == n for row, n in enumerate(cache.lengths.tolist()))
        _, step = cache.begin(positions)
        at = [group.kv_positions for group in step.groups]
        seen.append([(at[layer.group], *layer.get(step)) for layer in cache.layers])
    for one, other in zip(*jax.tree.map(np.asarray, seen), strict=True):
        for row in range(len(positions)):
            order = [np.argsort(np.where(mask[row, 0, 0], at[row], FAR)) for at, _, _, mask in (one, other)]
            count = one[3][row].sum()
            assert count == other[3][row].sum()
            count -= int(positions[row, 0] != EMPTY)  # the query's own, not put
            for x, y in zip(one[:3], other[:3], strict=True):
                np.testing.assert_allclose(x[row][order[0][:count]], y[row][order[1][:count]], rtol=1e-4, atol=1e-4)


def both(draft, prompts, cache, *, toy=TOY, params=PARAMS, num_draft=NUM_DRAFT, tree=None, **options):
    """Returns what generate and speculate make of the same."""
    plain = generate(toy, params, prompts, cache(), **options)
    form = {"draft": draft, "num_draft": num_draft, "tree": tree, "min_ngram": 1}
    drafted = speculate(toy, params, prompts, cache(), **form, **options)
    np.testing.assert_array_equal(drafted.tokens, plain.tokens)
    np.testing.assert_array_equal(drafted.lengths, plain.lengths)
    np.testing.assert_allclose(drafted.log_probs, plain.log_probs, rtol=1e-4, atol=1e-5)
    assert drafted.reasons == plain.reasons
    return plain, drafted


@pytest.mark.parametrize(
    ("drafter", "toy", "tree"),
    [
        ("lookup", Toy((Window(4, sinks=2),)), None),
        ("model", TOY, None),
        ("lookup", Branching((Chunk(6),)), (2, 2, 1)),
    ],
    ids=["lookup", "model", "tree"],
)
def test_the_tokens_reasons_and_cache_are_those_of_generate(drafter, toy, tree):
    params = {**PARAMS, "layers": PARAMS["layers"][: len(toy.reaches)]}
    draft = (lambda: None) if drafter == "lookup" else small
    for new in (30, [1, 2, 31], [40, 5, 40]):  # the last until the cache is full
        plain, result = both(draft(), PROMPTS, toy.cache, toy=toy, params=params, max_new_tokens=new, tree=tree)
        assert_holds_the_same(plain.cache, result.cache)
        assert (result.accepted <= result.drafted).all()
        assert (result.steps + result.accepted >= result.lengths).all()
        assert (result.draft_cache is None) == (drafter == "lookup")
    assert result.reasons == ("length", "length", "full")
    assert result.drafted.sum() > result.accepted.sum() > 0


def test_streamed_each_step_brings_what_it_accepted():
    options = {"max_new_tokens": [21, 1, 12], "num_draft": NUM_DRAFT, "min_ngram": 1, "stop_tokens": [0]}
    want = speculate(TOY, PARAMS, REPEATING, TOY.cache(), **options)
    steps = stream_speculation(TOY, PARAMS, REPEATING, TOY.cache(), **options)
    came = [[] for _ in range(B)]
    for i, new in enumerate(steps):
        assert new.shape == (B, NUM_DRAFT + 1)
        for row, tokens in zip(came, new.tolist(), strict=True):
            count = tokens.index(EMPTY) if EMPTY in tokens else len(tokens)
            assert set(tokens[count:]) <= {EMPTY}
            row += tokens[:count]
        if i == 1:  # left and gone on with
            so_far = steps.result
            assert so_far.lengths.tolist() == [len(row) for row in came]
            assert so_far.steps.tolist() == [2, 1, 2] and "running" in so_far.reasons
    result = steps.result
    assert came == [row[:n].tolist() for row, n in zip(want.tokens, want.lengths, strict=True)]
    for name in ("tokens", "lengths", "log_probs", "drafted", "accepted", "steps"):
        np.testing.assert_array_equal(getattr(result, name), getattr(want, name))
    assert result.reasons == want.reasons and i + 1 == want.steps.max() < want.lengths.max()
    assert_holds_the_same(result.cache, want.cache)


def test_samples_of_a_prompt_are_those_of_generate_and_read_it_once_in_both_models():
    options = {"sampler": RANDOM, "key": KEY, "max_new_tokens": [9, 14], "num_samples": [2, 1]}
    draft = (counting, RANDOM_TABLE[::-1], table_cache())
    plain, result = both(draft, PROMPTS[:2], table_cache, toy=counting, params=RANDOM_TABLE, **options)
    alone = [PROMPTS[0], PROMPTS[0], PROMPTS[1]]
    options |= {"max_new_tokens": [9, 9, 14], "num_samples": 1}
    apart = generate(counting, RANDOM_TABLE, alone, table_cache(), **options)
    assert (apart.tokens == plain.tokens).all() and apart.reasons == plain.reasons
    assert_holds_the_same(result.cache, apart.cache)


def test_the_next_turn_goes_on_from_the_caches():
    plain, result = both(small(), PROMPTS, TOY.cache, max_new_tokens=7)
    turn = [[*text, 3, 1] for text in history(PROMPTS, plain)]
    held = np.asarray(result.draft_cache.lengths)
    assert (held <= np.asarray(result.cache.lengths)).all()
    assert (held >= np.asarray(result.cache.lengths) - 1).all()
    draft = (SMALL, SMALL_PARAMS, result.draft_cache)
    again = speculate(TOY, PARAMS, turn, result.cache, draft=draft, num_draft=NUM_DRAFT, min_ngram=1, max_new_tokens=9)
    want = generate(TOY, PARAMS, turn, plain.cache, max_new_tokens=9)
    assert (again.tokens == want.tokens).all() and again.reasons == want.reasons
    np.testing.assert_allclose(again.log_probs, want.log_probs, atol=1e-4)  # other blocks, other rounding


RANDOM_TABLE = jnp.asarray(np.random.default_rng(6).normal(size=(V, V)), jnp.float32)


@pytest.mark.parametrize("tree", [None, (3, 2)], ids=["chain", "tree"])
def test_a_sampler_that_reads_the_history_draws_as_in_generate(tree):
    like = RANDOM_TABLE + 0.1 * RANDOM_TABLE[::-1]
    accepted = 0
    for seed in range(3):
        options = {"sampler": RANDOM, "key": jax.random.key(seed), "max_new_tokens": [30, 12, 20], "tree": tree}
        draft = (counting, like, table_cache())
        _, result = both(draft, PROMPTS, table_cache, toy=counting, params=RANDOM_TABLE, **options)
        accepted += int(result.accepted.sum())
    assert accepted > 30


def test_of_a_tree_of_lookups_the_branch_that_is_right_is_kept():
    # After 1 came 2 and 3; the model says 3, which came earlier, and then what came after that.
    after = {1: 3, 3: 5, 5: 7, 7: 1}
    cycle = table(lambda n: after.get(n, 0))
    prompt = [4, 1, 3, 5, 7, 8, 1, 2, 9, 9, 6, 1]
    options = {"max_new_tokens": 3, "min_ngram": 1}
    one = speculate(counting, cycle, [prompt, None, None], table_cache(), num_draft=2, **options)
    two = speculate(counting, cycle, [prompt, None, None], table_cache(), tree=(2, 1), **options)
    assert one.tokens.tolist() == two.tokens.tolist()
    assert one.tokens[0].tolist() == [3, 5, 7]
    assert (one.steps[0], one.accepted[0]) == (3, 0)
    assert (two.steps[0], two.accepted[0]) == (1, 2)
    held = two.cache.layers[0].k[0, 0, : two.cache.lengths[0], 0].tolist()
    assert held == [*prompt, *two.tokens[0].tolist()][: len(held)]


@pytest.mark.parametrize("tree", [None, (2, 1)], ids=["chain", "tree"])
def test_a_pool_that_drafts_crowd_goes_on_without_them_to_its_last_page(tree):
    cache = functools.partial(table_cache, layout=jaxkv.Pages(24, 1))
    cycle = table(lambda n: LOOP[(LOOP.index(n) + 1) % len(LOOP)] if n in LOOP else n)
    prompts = [LOOP * 2, None, None]
    _, result = both(None, prompts, cache, toy=counting, params=cycle, max_new_tokens=20, tree=tree)
    assert result.reasons == ("full", "idle", "idle")
    assert result.lengths.tolist() == [11, 0, 0]
    assert result.accepted[0] > 0
    assert result.cache.lengths.tolist() == [24, 0, 0]


def test_a_stop_inside_a_draft_that_was_right_ends_the_row_there():
    def run(stops, new=30):
        return both(None, REPEATING, table_cache, toy=counting, params=UP, max_new_tokens=new, stop_tokens=stops)

    for stops, ended in (([11], [11, 11, 11]), ([[9, 10], [5, 6]], [6, 10, 6]), ([[8, 9], 8], [None, 8, 8])):
        plain, result = run(stops)
        for row, token in enumerate(ended):
            assert token is None or result.tokens[row, result.lengths[row] - 1] == token
        assert_holds_the_same(plain.cache, result.cache)
    # Nothing is read past the stop: the cache holds what came before it.
    assert result.cache.lengths.tolist() == [
        len(prompt) + int(n) - 1 for prompt, n in zip(REPEATING, result.lengths, strict=True)
    ]


def test_counts_say_what_was_gained():
    cycle = table(lambda n: LOOP[(LOOP.index(n) + 1) % len(LOOP)] if n in LOOP else n)
    run = functools.partial(speculate, counting, cycle, max_new_tokens=21, num_draft=NUM_DRAFT)
    result = run([LOOP * 2, None, LOOP[:2]], table_cache())
    assert result.reasons == ("length", "idle", "length")
    assert result.drafted.tolist() == [18, 0, result.accepted[2]]  # 21 tokens in 3 steps of 1 + 6
    assert result.accepted[0] == 18
    assert result.steps[:2].tolist() == [3, 0]
    assert result.steps[2] + result.accepted[2] == 21
    assert result.cache.lengths.tolist() == [34, 0, 22]


def test_without_a_match_no_draft_is_made_and_a_step_is_one_of_generate():
    result = speculate(counting, UP, [[0], [1], [2]], table_cache(), max_new_tokens=20, num_draft=NUM_DRAFT)
    assert result.drafted.tolist() == [0, 0, 0]
    assert result.steps.tolist() == [20, 20, 20]


def rising(params, tokens, positions, cache):
    """A model that writes 0, 1, 0, 2, 0, 3: what followed a 0 never follows it again."""
    _, cache = counting(UP, tokens, positions, cache)
    after = positions + 1
    return jax.nn.one_hot(jnp.where(after % 2 == 0, 0, after // 2 + 1), V), cache


def test_a_row_whose_draft_was_wrong_makes_no_other_before_guesses_are_right():
    options = {"max_new_tokens": 44, "num_draft": 1, "min_ngram": 1}
    result = speculate(rising, None, [[0, 1, 0, 2], None, None], table_cache(), **options)
    assert result.tokens[0, :6].tolist() == [0, 3, 0, 4, 0, 5]
    assert result.accepted[0] == 0
    assert result.drafted[0] == 1  # without a pause there are 22
    cycle = table(lambda n: LOOP[(LOOP.index(n) + 1) % len(LOOP)] if n in LOOP else n)
    prompt = [3, 9, 5, 1, 3]  # 9 came after 3; from now on 4 does
    options |= {"max_new_tokens": 30, "num_draft": NUM_DRAFT}
    result = speculate(counting, cycle, [prompt, None, None], table_cache(), **options)
    assert result.steps[0] <= 1 + 7 + 1 + 4  # a wrong draft, once around, a guess, and the rest by drafts


@pytest.mark.parametrize("drafter", ["lookup", "model"])
def test_the_distribution_is_the_samplers(drafter):
    size, rows, new = 5, 512, 3
    random = np.random.default_rng(4)
    logits = jnp.asarray(random.normal(size=(size, size)), jnp.float32)
    drafts = jnp.asarray(random.normal(size=(size, size)), jnp.float32)
    cache = functools.partial(table_cache, rows, 16, max_block=8)
    draft = None if drafter == "lookup" else (counting, drafts, cache())
    counts: collections.Counter = collections.Counter()
    accepted = 0
    for seed in range(8):
        draft = draft and (*draft[:2], cache())
        result = speculate(
            counting,
            logits,
            [[0, 1, 2, 3, 4, 0, 1, 2]] * rows,
            cache(),
            draft=draft,
            num_draft=2,
            max_new_tokens=new,
            sampler=Temperature(0.8),
            key=jax.random.key(seed),
        )
        counts.update(map(tuple, result.tokens.tolist()))
        accepted += int(result.accepted.sum())
    p = np.exp(np.asarray(logits, np.float64) / np.float32(0.8))
    p /= p.sum(1, keepdims=True)
    want = np.einsum("a,ab,bc->abc", p[2], p, p).ravel() * rows * 8
    got = np.array([counts[tuple(at)] for at in np.ndindex(size, size, size)])
    assert got.sum() == rows * 8
    assert accepted > 100
    chi = ((got - want) ** 2 / want).sum()
    assert chi < 124 + 4 * np.sqrt(2 * 124)  # 124 degrees of freedom: mean and spread of chi-square


def test_two_draws_with_one_key_agree_more_often_than_two_of_their_own():
    # What a draft model is drawn with matters: of two like distributions nearly all draws are the same.
    size, rows = 5, 512
    random = np.random.default_rng(5)
    logits = random.normal(size=(size, size)).astype(np.float32)
    near = logits + 0.2 * random.normal(size=(size, size)).astype(np.float32)
    cache = functools.partial(table_cache, rows, 16, max_block=8)
    options = {"num_draft": 2, "max_new_tokens": 3, "sampler": Temperature(0.8), "key": KEY}
    draft = (counting, jnp.asarray(near), cache())
    result = speculate(counting, jnp.asarray(logits), [[0, 1]] * rows, cache(), draft=draft, **options)
    p, q = (np.exp(x.astype(np.float64) / 0.8) for x in (logits, near))
    apart = np.abs(p / p.sum(1, keepdims=True) - q / q.sum(1, keepdims=True)).sum(1).max() / 2
    least = (1 - apart) / (1 + apart)
    first = result.accepted >= 1
    assert first.mean() > least - 0.05


def test_a_row_that_breaks_within_a_draft_ends_as_in_generate():
    for bad in (jnp.nan, jnp.inf):
        broken = UP.at[12, 0].set(bad)
        prompts = [[*range(16), 6, 7, 8], [1], [20, 21]]
        plain, result = both(None, prompts, table_cache, toy=counting, params=broken, max_new_tokens=20)
        assert result.reasons[:2] == (("nan", "nan") if jnp.isnan(bad) else ("inf", "inf"))
        assert result.accepted[0] == 4
        assert_holds_the_same(plain.cache, result.cache)


def test_rows_that_are_not_ok_end_full_and_idle_rows_stay():
    cache = table_cache()
    cache, _ = cache.begin(jnp.array([[0, 0], [EMPTY, EMPTY], [0, 1]]))  # a position twice does not fit
    result = speculate(counting, UP, [LOOP * 2, LOOP * 2, None], cache, max_new_tokens=5, num_draft=NUM_DRAFT)
    assert result.reasons == ("full", "length", "idle")
    assert result.cache.ok.tolist() == [False, True, True]
    assert result.cache.lengths.tolist() == [0, 18, 2]


def test_it_is_compiled_once_for_all_prompts_limits_stops_and_keys():
    cycle = table(lambda n: LOOP[(LOOP.index(n) + 1) % len(LOOP)] if n in LOOP else n)
    run = functools.partial(speculate, counting, cycle, num_draft=NUM_DRAFT)
    run([LOOP * 2, None, LOOP[:2]], table_cache(), max_new_tokens=21)
    before = verify.run._cache_size()
    run([[1], LOOP * 3, [4, 5]], table_cache(), max_new_tokens=[2, 9, 11], stop_tokens=[4])
    assert verify.run._cache_size() == before


@pytest.mark.optimized
def test_the_caches_are_changed_in_place():
    specs = [LayerSpec(Full(), num_kv_heads=2, head_dim=8)]
    cache = functools.partial(jaxkv.Cache.init, specs, 1, 1 << 16, max_block=MAX_BLOCK)
    draft = (wide, UP, cache())
    steps = stream_speculation(wide, UP, [LOOP * 2], cache(), draft=draft, num_draft=NUM_DRAFT, max_new_tokens=3)
    leaves = steps._cache, steps._draft, steps._state
    program = verify.run.lower(*steps._advance.args, *leaves, np.int32(3)).compile()
    shape = "f32[1,2,65536,8]"
    assert not re.search(rf"= {re.escape(shape)}\S* copy\(", program.as_text())
    assert program.memory_analysis().temp_size_in_bytes < cache().layers[0].k.nbytes


def wide(params, tokens, positions, cache):
    cache, step = cache.begin(positions)
    x = jnp.broadcast_to(tokens.astype(jnp.float32)[:, :, None, None], (*tokens.shape, 2, 8))
    layers = [layer.put(step, x, x) for layer in cache.layers]
    return params[tokens] + jaxkv.attend(x, layers[0], step)[..., 0].sum(2, keepdims=True), cache.with_layers(layers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_draft": 0}, r"num_draft=0.*at least 1"),
        ({"num_draft": 16}, r"a block is 17 tokens.*blocks of 16.*max_block=17.*num_draft=15"),
        ({"min_ngram": 0}, r"min_ngram=0"),
        ({"tree": (4, 4)}, r"tree is \(4, 4\), so a block is 21 tokens.*max_block=21"),
        ({"tree": ()}, r"tree is \(\); give how many tokens follow each one"),
        ({"tree": (2, 0)}, r"tree is \(2, 0\); give how many"),
        ({"forward": TOY, "params": PARAMS, "cache": TOY.cache(), "tree": (2,)}, r"parents.*tree= needs a forward"),
        ({"draft": (counting, UP, table_cache(max_block=1))}, r"reads blocks of 2 tokens, and its cache takes 1"),
        ({"prompts": None}, r"prompts is None; give a list of token lists"),
        (
            {"cache": table_cache(capacity=6), "num_draft": 6},
            r"a block is 7 tokens, and the cache takes blocks of 6: give num_draft=5$",
        ),
        ({"cache": table_cache(capacity=1)}, r"takes blocks of 1: give a cache of more capacity$"),
        ({"max_ngram": 1}, r"max_ngram=1.*at least 3"),
        ({"draft": counting}, r"draft is a function; give \(forward, params, cache\)"),
        ({"draft": (counting, UP, None)}, r"draft: cache is a NoneType"),
        ({"draft": (counting, table(lambda n: n, 7), table_cache())}, r"vocabulary of 7 tokens, the model one of 29"),
        ({"draft": (counting, UP, table_cache(capacity=32))}, r"draft's cache has capacity 32, the model's cache 48"),
        ({"draft": (counting, UP, table_cache(2))}, r"draft: 3 prompts for a cache of 2 rows"),
        (
            {"draft": (counting, UP, table_cache(reach=Window(4), max_block=2)), "num_draft": 5},
            r"go back 2 tokens.*slack=5",
        ),
        ({"sampler": Temperature(1)}, r"no key is given"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_cache_is_touched(options, message):
    given = {"forward": counting, "params": UP, "prompts": [[1]] * B, "cache": table_cache(), "max_new_tokens": 3}
    given |= options
    with pytest.raises(ValueError, match=message):
        speculate(**given)
    assert not given["cache"].lengths.is_deleted()


def test_a_donated_cache_and_a_bad_sampler_are_told_as_in_generate():
    cache = table_cache()
    speculate(counting, UP, [[1]] * B, cache, max_new_tokens=3)
    with pytest.raises(CacheError, match="donated"):
        speculate(counting, UP, [[1]] * B, cache, max_new_tokens=3)
    cache = table_cache()
    with pytest.raises(ValueError, match=r"the draft's cache is the model's own"):
        speculate(counting, UP, [[1]] * B, cache, draft=(counting, UP, cache), max_new_tokens=3)
    assert not cache.lengths.is_deleted()
    with pytest.raises(ValueError, match=r"answered with token 99 for row 0"):
        speculate(counting, UP, [[1]] * B, table_cache(), max_new_tokens=3, sampler=lambda key, logits: jnp.int32(99))
    with pytest.raises(ValueError, match="run on the host"):
        jax.jit(lambda c: speculate(counting, UP, [[1]] * B, c, max_new_tokens=3).tokens)(table_cache())


def found_by_hand(row, num_draft, least, most):
    """Prompt lookup in a loop over lists."""
    for n in range(most, least - 1, -1):
        for after in range(len(row) - 1, n - 1, -1):
            if row[after - n : after] == row[len(row) - n :]:
                told = list(row)
                for i in range(num_draft):
                    told.append(told[after + i])
                return told[len(row) :]
    return None


def test_lookup_finds_the_last_place_where_most_tokens_stood_before():
    rng = np.random.default_rng(2)
    drafter = lookup.Lookup(Branches((1,) * 5), 2, 4)
    rows = [rng.integers(0, 3, rng.integers(1, 24)).tolist() for _ in range(64)]
    text = np.full((64, 32), EMPTY, np.int32)
    for row, tokens in zip(text, rows, strict=True):
        row[: len(tokens)] = tokens
    position = np.array([len(tokens) - 1 for tokens in rows], np.int32)
    blank = dict.fromkeys(verify.State.__dataclass_fields__) | {
        "text": jnp.array(text),
        "position": jnp.array(position),
    }
    drafts, found, _ = drafter.propose(None, None, None, None, verify.State(**blank), None)
    want = [found_by_hand(tokens, 5, 2, 4) for tokens in rows]
    assert found.all(1).tolist() == found.any(1).tolist() == [draft is not None for draft in want]
    assert 10 < sum(draft is not None for draft in want) < 64
    for draft, right in zip(drafts.tolist(), want, strict=True):
        assert right is None or draft == right
