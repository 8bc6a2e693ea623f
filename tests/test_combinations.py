"""Layouts, storages, shared beginnings, trees, dropped tokens and encoders together: what each does alone, all do."""

from __future__ import annotations

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import EMPTY, Cache, Cross, Float8, Full, Int4, Int8, LayerSpec, Pages, Rotary, Window

R, CAPACITY, SHARED, T, VOCABULARY = 3, 150, 80, 6, 11
FORMS = ("blockwise", "reference")
ROTARY = Rotary()
SPECS = (
    LayerSpec(Full(), 1, 8, None, Int8(), Int4(group=2), ROTARY, "read", drops=True),
    LayerSpec(Window(70, sinks=2), 1, 8, 6, Int4(group=2), Float8(), ROTARY, drops=True),
    LayerSpec(Cross(120), 1, 8, 6, Int8(), Int8(), drops=True),
)
TABLE = np.random.default_rng(0).normal(size=(VOCABULARY, 3, 2, 8)).astype(np.float32)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """The smallest tiles and blocks, 64, so that few tokens are several of them; rows one after the other."""
    monkeypatch.setattr("jaxkv.nn.plan._power", lambda x, least, most: least)
    monkeypatch.setattr("jaxkv.nn.plan.pays_by_row", lambda spec: True)


@functools.partial(jax.jit, static_argnames="form")
def call(cache, tokens, positions, parents=None, form="blockwise"):
    """A forward pass whose keys, values and dropped tokens depend on the token alone, and keys on where it stands."""
    cache, step = cache.begin(positions, parents=parents)
    q, k, v = (jnp.asarray(TABLE)[tokens, i] for i in range(3))  # [B, T, 2, 8]
    outs, layers = [], []
    for layer in cache.layers:
        spec, one_q, one_k = layer.spec, q, k[:, :, :1]
        if spec.rotary is not None:
            at = step.depths[:, :, None, None]
            one_q = spec.rotary.rotate(q, at)
            one_k = spec.rotary.rotate(one_k, at) if spec.rotary_at == "put" else one_k
        if not isinstance(spec.reach, Cross):
            where = tokens % 3 != 0 if spec.drops else None
            layer = layer.put(step, one_k, v[:, :, :1, : spec.value_dim], where=where)
        if form is not None:
            outs.append(jaxkv.attend(one_q, layer, step, implementation=form))
        layers.append(layer)
    return outs, cache.with_layers(layers), step


@functools.cache
def prefilled():
    """A cache whose rows share 80 tokens and an encoder's output, and hold 0, 1 and 9 more; and the rows' texts."""
    random = np.random.default_rng(1)
    cache = Cache.init(SPECS, R, CAPACITY, max_block=SHARED, layout=Pages(40, 16))
    cache, step = cache.begin_cross(jnp.array([110, -1, -1]))
    x = np.tile(random.normal(size=(1, 120, 1, 8)).astype(np.float32), (R, 1, 1, 1))
    where = np.tile(random.random((1, 120)) < 0.8, (R, 1))
    layers = list(cache.layers)
    layers[2] = layers[2].put(step, x, x[..., :6], where=where)
    cache = cache.with_layers(layers)
    prompt = random.integers(0, VOCABULARY, SHARED).tolist()
    _, cache, _ = feed(cache, [prompt, [], []], [0] * R, SHARED, form=None)
    cache = cache.take(jnp.zeros(R, jnp.int32)).sharing(SHARED)
    own = [random.integers(0, VOCABULARY, n).tolist() for n in (0, 1, 9)]
    _, cache, _ = feed(cache, own, [SHARED] * R, SHARED, form=None)
    return cache, [prompt + x for x in own]


def feed(cache, texts, starts, length, parents=None, form="blockwise"):
    tokens, positions = np.zeros((R, length), np.int32), np.full((R, length), EMPTY, np.int32)
    for row, (text, start) in enumerate(zip(texts, starts, strict=True)):
        tokens[row, : len(text)], positions[row, : len(text)] = text, start + np.arange(len(text))
    return call(cache, tokens, positions, parents, form=form)


PARENTS = np.array([[-1, -1, 0, 1, 3, 3], [-1, 0, 0, 1, 2, 4], [-1, 0, 1, 2, 3, 4]], np.int32)
PATHS = np.array([[1, 3, 5, -1], [0, 2, 4, 5], [-1, -1, -1, -1]], np.int32)


def branch_of(parents, t):
    return [] if t < 0 else [*branch_of(parents, parents[t]), t]


def test_a_branch_gets_what_it_gets_alone_and_stays():
    cache, texts = prefilled()
    starts = [len(text) for text in texts]
    tokens = np.random.default_rng(2).integers(0, VOCABULARY, (R, T)).tolist()
    got, grown, step = feed(cache, tokens, starts, T, PARENTS)
    for t in range(T):
        branches = [branch_of(PARENTS[row], t) for row in range(R)]
        alone = [[tokens[row][s] for s in branch] for row, branch in enumerate(branches)]
        want, _, _ = feed(cache, alone, starts, T, form="reference")
        for spec, one, other in zip(SPECS, got, want, strict=True):
            for row, branch in enumerate(branches):
                np.testing.assert_allclose(one[row, t], other[row, len(branch) - 1], atol=1e-5, err_msg=f"{spec}, {t}")
    grown = jax.jit(Cache.commit)(grown, step, PATHS)
    kept = [[tokens[row][t] for t in path if t >= 0] for row, path in enumerate(PATHS)]
    _, alone, _ = feed(cache, kept, starts, T, form="reference")
    ends = [start + len(path) for start, path in zip(starts, kept, strict=True)]
    assert grown.lengths.tolist() == alone.lengths.tolist() == ends
    np.testing.assert_array_equal(grown.num_free, alone.num_free)
    more = [[1, 2, 4, 5, 7]] * R
    got, want = (feed(cache, more, ends, T, form="reference")[0] for cache in (grown, alone))
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_rows_on_their_way_share_as_far_as_they_are():
    cache, texts = prefilled()
    cache = cache.rewind(jnp.array([81, 33, 89]))  # row 1 reads its prompt again while the others go on
    tokens = [[1, 2, 4, 5, 7, 8], texts[1][33:39], [2, 2, 4]]
    got, want = (feed(cache, tokens, cache.lengths.tolist(), T, form=form)[0] for form in FORMS)
    for spec, one, other in zip(SPECS, got, want, strict=True):
        for row, text in enumerate(tokens):
            np.testing.assert_allclose(one[row, : len(text)], other[row, : len(text)], atol=1e-5, err_msg=f"{spec}")


def test_queries_of_a_tree_have_the_gradients_of_plain_attention():
    cache, texts = prefilled()
    _, cache, step = feed(cache, [[1] * T] * R, [len(text) for text in texts], T, PARENTS)
    q, sinks = jax.random.normal(jax.random.key(0), (R, T, 2, 8)), jnp.arange(2.0)

    def loss(q, sinks, form):
        outs = [jaxkv.attend(q, x, step, sink_logits=sinks, implementation=form) for x in cache.layers]
        return sum(jnp.sin(x).sum() for x in outs)

    got, want = (jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)(q, sinks, form) for form in FORMS)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


@functools.partial(jax.jit, static_argnames="form")
def rest(x, cache, positions, form):
    cache, step = cache.begin(positions)
    layer = cache.layers[0].put(step, x, x)
    return jaxkv.attend(x, layer, step, implementation=form), cache.with_layers([layer])


def test_the_last_block_is_read_once_where_pages_are_of_an_odd_size(monkeypatch):
    monkeypatch.setattr("jaxkv.nn.plan._power", lambda x, least, most: 128)
    cache = Cache.init([LayerSpec(Full(), 1, 2)], 1, 896, max_block=896, layout=Pages(180, 5))
    x = jax.random.normal(jax.random.key(0), (1, 890, 1, 2))
    _, cache = rest(x, cache, jnp.arange(890)[None], "reference")
    assert cache.groups[0].num_slots == 900
    got, want = (rest(x[:, :1], cache, jnp.array([[890]]), form)[0] for form in ("blockwise", "reference"))
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_a_query_of_a_tree_longer_than_a_block_sees_the_sinks_of_its_branch():
    cache = Cache.init([LayerSpec(Window(4, sinks=2), 1, 2)], 1, 400, max_block=260)
    # Two texts from the first token on: the sinks of the second lie behind the first.
    parents = np.concatenate([[-1], np.arange(69), [-1], np.arange(70, 259)])[None].astype(np.int32)
    cache, step = cache.begin(jnp.arange(260)[None], parents=parents)
    x = jax.random.normal(jax.random.key(0), (1, 260, 1, 2))
    layer = cache.layers[0].put(step, x, x)
    attend = jax.jit(jaxkv.attend, static_argnames="implementation")
    got, want = (attend(x, layer, step, implementation=form) for form in ("blockwise", "reference"))
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_what_a_row_left_behind_does_not_spoil_the_next_one():
    x = jnp.ones((2, 4, 1, 2))
    cache = Cache.init([LayerSpec(Full(), 1, 2)], 2, 4)
    cache, step = cache.begin(jnp.array([[0, 1, 2, 3], [EMPTY] * 4]))
    cache = cache.with_layers([cache.layers[0].put(step, jnp.nan * x, jnp.nan * x)])
    cache, step = cache.reset(jnp.array([True, False])).begin(jnp.array([[0], [0]]))
    k, v, mask = cache.layers[0].put(step, x[:, :1], x[:, :1]).get(step)
    assert (jax.nn.dot_product_attention(x[:, :1], k, v, mask=mask) == 1).all()


def test_a_mask_is_drawn_without_the_tokens_that_a_layer_left_out():
    cache = Cache.init([LayerSpec(Full(), 1, 2, drops=True)], 1, 8, layout=Pages(2, 4))
    x = jnp.ones((1, 3, 1, 2))
    cache, step = cache.begin(jnp.array([[0, 1, 2]]), parents=jnp.array([[-1, 0, 0]]))
    layer = cache.layers[0].put(step, x, x, where=jnp.array([[False, True, True]]))
    lines = str(jaxkv.show_mask(step, layer)).splitlines()[2:5]
    assert [line.split()[1:] for line in lines] == [[*"..."], [*".1."], [*"..1"]]


def test_a_program_takes_a_tree_through_a_file():
    specs = [LayerSpec(Full(), 1, 4, None, Int8(), Int4(group=1), ROTARY, "read", drops=True)]
    cache = Cache.init(specs, 1, 8, layout=Pages(2, 4)).sharing(4)
    parents, path = jnp.array([[-1, 0, 0]]), jnp.array([[0, 2, -1]])
    begin = jax.export.export(jax.jit(lambda cache, parents: cache.begin(jnp.array([[0, 1, 2]]), parents=parents)))
    grown, step = jax.export.deserialize(begin(cache, parents).serialize()).call(cache, parents)
    commit = jax.export.export(jax.jit(Cache.commit))(grown, step, path)
    after = jax.export.deserialize(commit.serialize()).call(grown, step, path)
    assert after.lengths.tolist() == [2]
    assert int(after.shared) == 4
