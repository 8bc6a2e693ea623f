"""What a cache with recurrent layers keeps of its rows, where they can go back to, and what it refuses.

The laws of every cache, and random programs of operations, run on hybrids in tests/test_contract.py.
"""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import Cache, Full, Int8, LayerSpec, Pages, Recurrent, Window
from jaxkv.testing.programs import OPERATIONS

SPEC = LayerSpec(Recurrent(state=(2, 3), tail=(4, 2), every=8, keep=2))
FULL = LayerSpec(Full(), 1, 4)
CAPACITY = 64


@jax.jit  # one shape for all
def _feed(cache, positions):
    cache, step = cache.begin(positions)
    return cache, step.ok


def fed(cache, *blocks):
    """The cache after blocks of so many tokens in all of its rows; nothing is put."""
    for count in blocks:
        columns = np.arange(cache.max_block)
        positions = np.where(columns < count, np.asarray(cache.lengths)[:, None] + columns, -1)
        cache, ok = _feed(cache, positions.astype(np.int32))
        assert ok.all()
    return cache


def resume_points(cache, *positions):
    return [int(OPERATIONS["resume_point"](cache, np.int32(0), np.int32(p))) for p in positions]


def new(*specs, **options):
    return Cache.init(specs or [SPEC, FULL], 2, CAPACITY, **{"max_block": 32, **options})


def test_a_row_goes_back_to_the_newest_checkpoints_of_its_interval():
    cache = fed(new(), 30)
    assert resume_points(cache, 5, 16, 23, 24, 29, 30) == [0, 16, 16, 24, 24, 30]  # 8 is too old
    back = cache.rewind(jnp.array([29, 17]))
    assert back.lengths.tolist() == [24, 16]
    assert fed(back.rewind(jnp.array([16, 16])), 1).lengths.tolist() == [17, 17]


def test_the_end_of_a_prompt_stays_and_the_ends_of_its_blocks_do_not():
    cache = fed(new(LayerSpec(Recurrent(state=(1, 2), every=None, keep=2))), 6, 5, 1, 1, 1)
    assert resume_points(cache, 13, 14) == [11, 14]
    cache = fed(cache, 4, 1)
    assert resume_points(cache, 18, 17) == [18, 11]


def test_checkpoints_stay_where_they_are_asked_for():
    cache = new(LayerSpec(Recurrent(tail=(4, 1), every=None, keep=1)))
    cache = fed(cache, 1, 1, 1).checkpoint([0, 7, -1])
    cache = fed(cache, 1, 1)
    assert [int(cache.resume_point(row, 4)) for row in (0, 1)] == [3, 0]
    cache = fed(fed(cache, 1).checkpoint(), 1)
    assert [int(cache.resume_point(row, 6)) for row in (0, 1)] == [6, 6]
    assert int(cache.resume_point(0, 5)) == 0  # one stays, the newest


def _summing(params, tokens, positions, cache):
    """A model: of its tokens so far it knows the sum."""
    cache, step = cache.begin(positions)
    layer = cache.layers[0]
    group = step.groups[layer.group]
    _, state = layer.read(step)  # [B, 1, 1]
    x = jnp.where(positions >= 0, tokens, 0).astype(jnp.float32)[:, :, None]
    x = jnp.take_along_axis(x, group.order[:, :, None], 1)
    sums = jnp.cumsum(jnp.concatenate([state, x], 1), 1)
    layer = layer.put(step, state=jnp.take_along_axis(sums, group.counts[:, :, None], 1)[:, :, None])
    sums = jnp.take_along_axis(sums[:, 1:], group.place[:, :, None], 1)
    return jax.nn.one_hot(sums[:, :, 0].astype(jnp.int32) % 8, 8), cache.with_layers([layer])


def test_a_row_goes_back_to_the_end_of_its_prompt_whatever_its_last_block_brought():
    spec = LayerSpec(Recurrent(state=(1, 1), every=None, keep=1))
    prompts = [[1] * 34, [2] * 9]  # read up to their last tokens: the first one's last block has one token

    def generated(cache):
        return jaxkv.generate(_summing, None, prompts, cache, max_new_tokens=3)

    def scored(cache):
        return fed(jaxkv.score(_summing, None, prompts, cache)[1], 1, 1)

    def prefilled(cache):
        return fed(jaxkv.prefill(_summing, None, [prompt[:-1] for prompt in prompts], cache)[1], 1, 1)

    def searched(cache):
        return jaxkv.beam_search(_summing, None, prompts[:1], cache, num_beams=2, max_new_tokens=3).cache

    for call in (scored, prefilled, searched, lambda cache: generated(cache).cache):
        cache = call(Cache.init([spec], 2, CAPACITY, max_block=32))
        ends = [33, 0] if call is searched else [33, 8]
        assert (cache.lengths > jnp.array(ends))[0]
        cache = cache.rewind(jnp.array(ends))
        assert cache.lengths.tolist() == ends
    with pytest.raises(ValueError, match=r"slack=4, by Cache\.init or model\.init_cache\. model\.generate makes"):
        jaxkv.speculate(_summing, None, prompts, cache, max_new_tokens=3, num_draft=4)
    first = generated(cache)  # nothing is left to read, and it goes on from the sums of the prompts
    assert first.tokens[:, 0].tolist() == [34 % 8, 18 % 8]
    assert first.cache.rewind(jnp.array(ends)).lengths.tolist() == ends


def test_slack_keeps_the_state_after_each_of_the_last_tokens():
    for blocks in ([20], [1] * 20, [17, 3]):
        cache = fed(new(SPEC, slack=3), *blocks)
        assert resume_points(cache, 20, 19, 18, 17, 15) == [20, 19, 18, 17, 8]


def test_all_layers_land_at_one_place_where_all_can_go_on():
    other = LayerSpec(Recurrent(tail=(2, 1), every=6, keep=4))
    cache = fed(new(SPEC, other), *[1] * 26)
    assert resume_points(cache, 25, 23) == [24, 0]  # 16 is not a multiple of 6, and 12 not of 8
    window = LayerSpec(Window(4), 1, 4)
    cache = fed(new(SPEC, window, max_block=2), *[2] * 13)
    assert resume_points(cache, 25, 24, 23) == [24, 24, 0]  # at 16 the window has lost what it would see
    copied = cache.copy_prefix(0, 1, 25)
    assert copied.lengths.tolist() == [26, 24]
    assert cache.take(jnp.array([1, -1])).lengths.tolist() == [26, 0]


def test_a_sequence_that_does_not_go_on_where_it_stands_takes_nothing_anywhere():
    cache = fed(new(), 4)
    for positions in ([[5], [4]], [[3], [4]]):
        after, step = cache.begin(jnp.array(positions))
        assert step.ok.tolist() == [False, True]
        assert after.lengths.tolist() == [4, 5]
        np.testing.assert_array_equal(after.groups[0].positions[0], cache.groups[0].positions[0])
        np.testing.assert_array_equal(after.recurrent[0].positions[0], cache.recurrent[0].positions[0])
    _, step = cache.begin(jnp.array([[5, 4], [4, 5]]))
    assert step.ok.tolist() == [False, True]
    _, step = cache.begin(jnp.array([[4], [5], [4]]), rows=jnp.array([0, 0, 1]))  # row 0 comes twice
    assert step.ok.tolist() == [False, False, True]
    _, step = cache.begin(jnp.array([[4], [-1]]), rows=jnp.array([0, 0]))  # here once
    assert step.ok.tolist() == [True, True]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recurrent(), "give the shape of the state, that of the tail, or both"),
        (lambda: Recurrent(tail=(4,)), r"tail=\(4,\).*channels, kernel size - 1"),
        (lambda: Recurrent(state=(2, 0)), "state is a whole number of at least 1"),
        (lambda: Recurrent(state=(2, 2), every=0), "every is a whole number of at least 1"),
        (lambda: Recurrent(state=(2, 2), keep=-1), "keep is a whole number of at least 0"),
        (lambda: LayerSpec(SPEC.reach, 2, 4), "num_kv_heads=2.*no keys and values"),
        (lambda: LayerSpec(SPEC.reach, k_storage=Int8()), "k_storage=Int8.*its state is kept in float32"),
        (lambda: LayerSpec(Full()), "num_kv_heads is a whole number"),
    ],
)
def test_what_a_recurrent_layer_can_not_have_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_operations_that_a_state_does_not_allow_are_refused():
    cache = fed(new(), 4)
    with pytest.raises(jaxkv.NotSupportedError, match=r"layer 0 is of Recurrent.*give end=None"):
        cache.remove(0, 1, 3)
    with pytest.raises(jaxkv.NotSupportedError, match=r"parents.*Recurrent.*not of several branches"):
        cache.begin(jnp.array([[4, 5], [4, 5]]), parents=jnp.array([[-1, -1], [-1, 0]]))
    with pytest.raises(ValueError, match=r"rows has shape \(1, 1\)"):
        cache.checkpoint([[0]])
    cache, step = cache.begin(jnp.array([[4], [4]]))
    with pytest.raises(ValueError, match="tail is of shape"):
        cache.layers[0].put(step, jnp.zeros((2, 2, 4, 2)), jnp.zeros((2, 1, 2, 3)))


def test_storage_is_that_of_keys_and_values_alone():
    cache = new(storage=Int8())
    assert cache.specs == (SPEC, LayerSpec(Full(), 1, 4, k_storage=Int8(), v_storage=Int8()))


@pytest.mark.parametrize("layout", [jaxkv.Rows(), Pages(16, 8)])
def test_bytes_are_planned_as_they_are_allocated(layout):
    specs = [SPEC, FULL, SPEC]
    for stacked in (False, True):
        options = {"layout": layout, "slack": 1, "stacked": stacked}
        cache = Cache.init(specs, 2, CAPACITY, **options)
        plan = jaxkv.plan_memory(specs, 2, CAPACITY, **options)
        assert plan.nbytes == cache.nbytes == sum(x.nbytes for x in jax.tree.leaves(cache))
        assert plan.bytes_per_token == 2 * 4 * 4  # of the full layer alone
        reach, count, slots, nbytes, why = plan.groups[1]
        assert (reach, count, slots, nbytes) == (SPEC.reach, 2, 4, 2 * 2 * 4 * 14 * 4 + 2 * 2 * 4 * 4)
        assert why.startswith(" (the row's own + 1 of slack + 2 checkpoints")


def test_describe_says_where_each_row_goes_back_to():
    text = fed(new(), 20).rewind(jnp.array([99, 0])).describe()
    assert "14 numbers float32 a state, 3 slots" in text
    assert "row 0: stands at 20, goes back to 0, 8, 16" in text
    assert text.endswith("row 1: empty")
    assert "stands" not in jax.eval_shape(new).describe()


def test_a_decode_step_runs_in_another_process_by_jax_export():
    def step(cache, positions):
        cache, step = cache.begin(positions)
        layer = cache.layers[0]
        tail, state = layer.read(step)
        layer = layer.put(step, tail[:, None] + 1, state[:, None] + 1)
        return cache.with_layers([layer, *cache.layers[1:]]), tail

    cache, positions = new(), jnp.zeros((2, 1), jnp.int32)
    written = jax.export.export(jax.jit(step))(cache, positions).serialize()
    cache, _ = jax.export.deserialize(written).call(cache, positions)
    assert isinstance(cache, Cache)
    _, tail = jax.export.deserialize(written).call(cache, positions + 1)
    assert (tail == 1).all()


def make_model(mixers):
    from flax import nnx

    from jaxkv.models import Decoder, DecoderConfig

    config = DecoderConfig(vocab_size=16, width=16, num_layers=2, num_heads=2, mlp_dim=16, mixers=mixers)
    model = Decoder(config, rngs=nnx.Rngs(0))
    return *jaxkv.nnx.functional(model), model.specs()


def test_speculation_gives_the_text_of_generate_and_needs_slack_for_its_draft():
    from jaxkv.models import ShortConvConfig

    forward, params, specs = make_model((ShortConvConfig(), None))
    prompts = [[1, 2, 3, 1, 2, 3, 1, 2], [5, 6, 5, 6, 5]]
    want = jaxkv.generate(forward, params, prompts, Cache.init(specs, 2, CAPACITY), max_new_tokens=24)
    options = {"max_new_tokens": 24, "num_draft": 3, "min_ngram": 1}
    got = jaxkv.speculate(forward, params, prompts, Cache.init(specs, 2, CAPACITY, slack=3), **options)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    assert got.accepted.sum() > 0
    assert got.drafted.sum() > got.accepted.sum()  # some drafts were taken back
    with pytest.raises(ValueError, match=r"each of the last 2: .* slack=3, by .*, or give num_draft=2"):
        jaxkv.speculate(forward, params, prompts, Cache.init(specs, 2, CAPACITY, slack=2), **options)
    with pytest.raises(ValueError, match="not of several branches"):
        jaxkv.speculate(
            forward, params, prompts, Cache.init(specs, 2, CAPACITY, slack=6), max_new_tokens=4, tree=(2, 1)
        )
