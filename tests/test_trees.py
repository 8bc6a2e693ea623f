"""Token trees: every branch of a call gets what it gets alone, one branch is kept, and the rest leaves no trace."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generate import CAPACITY, ROTARY, B, Toy, V, make_params, uncached_logits

import jaxkv
from jaxkv.cache.spec import EMPTY, Chunk, Full, LayerSpec, Window
from jaxkv.nn.attend import attend

REACHES = (Full(), Window(5), Chunk(4), Window(3, sinks=2))
T, D = 8, 5  # tokens of a tree, longest path


@dataclasses.dataclass(frozen=True)
class Branching(Toy):
    """The toy of generate, rotated by depth, so that it takes trees."""

    implementation: str = "auto"
    with_step: bool = False

    def __call__(self, params, tokens, positions, cache, parents=None):
        cache, step = cache.begin(positions, parents=parents)
        x = params["embed"][tokens]
        at = step.depths[:, :, None, None]
        layers = []
        for layer, w in zip(cache.layers, params["layers"], strict=True):
            q, k, v = ((x @ w[name]).reshape(*x.shape[:2], -1, 8) for name in "qkv")
            layers.append(layer.put(step, ROTARY.rotate(k, at), v))
            y = attend(ROTARY.rotate(q, at), layers[-1], step, implementation=self.implementation)
            x = x + y.reshape(x.shape) @ w["o"]
        return x @ params["embed"].T, cache.with_layers(layers), *([step] if self.with_step else [])


PARAMS = jax.tree.map(lambda x: x / 2, make_params(len(REACHES)))  # smaller, so that rounding isn't magnified


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def feed(toy, tokens, positions, cache):
    return toy(PARAMS, tokens, positions, cache)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def grow(toy, tokens, positions, parents, cache, path):
    logits, cache, step = dataclasses.replace(toy, with_step=True)(PARAMS, tokens, positions, cache, parents)
    return logits, cache.commit(step, path), step.depths, step.ok


def random_tree(rng, size):
    """Parents of a tree of `size` tokens, EMPTY behind them."""
    parents = [int(rng.integers(-1, t)) for t in range(size)]
    return parents + [0] * (T - size)


def branch_of(parents, t):
    branch = [t]
    while parents[branch[0]] >= 0:
        branch.insert(0, parents[branch[0]])
    return branch


LAYOUTS = {"rows": jaxkv.Rows(), "pages": jaxkv.Pages(40, 4)}


@pytest.mark.parametrize(("layout", "implementation"), [("rows", "reference"), ("pages", "blockwise")])
def test_each_branch_gets_what_it_gets_alone_and_the_one_that_is_kept_goes_on(layout, implementation):
    toy = Branching(REACHES, implementation)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        cache = toy.cache(layout=LAYOUTS[layout])
        rows = [rng.integers(0, V, n).tolist() for n in (0, 5, 13)]
        prompt, at = np.zeros((B, 16), np.int32), np.full((B, 16), EMPTY, np.int32)
        for b, row in enumerate(rows):
            prompt[b, : len(row)], at[b, : len(row)] = row, np.arange(len(row))
        _, cache = feed(toy, prompt, at, cache)
        for _ in range(3):
            sizes = rng.integers(1, T + 1, B)
            parents = np.array([random_tree(rng, size) for size in sizes], np.int32)
            tokens = rng.integers(0, V, (B, T)).astype(np.int32)
            there = np.arange(T)[None] < sizes[:, None]
            positions = np.where(there, np.array([len(row) for row in rows])[:, None] + np.arange(T)[None], EMPTY)
            kept = [branch_of(parents[b], rng.integers(sizes[b]))[: rng.integers(0, D + 1)] for b in range(B)]
            path = np.array([branch + [EMPTY] * (D - len(branch)) for branch in kept], np.int32)
            logits, cache, depths, ok = grow(toy, tokens, positions.astype(np.int32), parents, cache, path)
            assert ok.all()
            texts = np.zeros((B, T, CAPACITY), np.int32)
            ends = np.zeros((B, T), np.int32)
            for b, row in enumerate(rows):
                for t in range(sizes[b]):
                    branch = branch_of(parents[b], t)
                    text = row + [int(tokens[b, s]) for s in branch]
                    texts[b, t, : len(text)], ends[b, t] = text, len(text) - 1
            assert depths.tolist() == np.where(there, ends, EMPTY).tolist()
            alone = uncached(toy, texts.reshape(B * T, -1)).reshape(B, T, CAPACITY, V)
            alone = np.take_along_axis(alone, ends[:, :, None, None], 2)[:, :, 0]
            np.testing.assert_allclose(np.asarray(logits)[there], alone[there], rtol=1e-4, atol=1e-4)
            for b in range(B):
                rows[b] = rows[b] + [int(tokens[b, s]) for s in kept[b]]
            assert cache.lengths.tolist() == [len(row) for row in rows]
            assert cache.ok.all()
        new = rng.integers(0, V, B).astype(np.int32)
        logits, cache = feed(toy, new[:, None], np.array([[len(row)] for row in rows], np.int32), cache)
        texts = np.zeros((B * T, CAPACITY), np.int32)
        for b, row in enumerate(rows):
            texts[b, : len(row) + 1] = [*row, new[b]]
        alone = uncached(toy, texts)
        for b, row in enumerate(rows):
            np.testing.assert_allclose(logits[b, 0], alone[b, len(row)], rtol=1e-4, atol=1e-4)


def uncached(toy, texts):
    return np.asarray(uncached_logits(Toy(toy.reaches), PARAMS, texts))


def small_cache(**kwargs):
    return jaxkv.Cache.init([LayerSpec(Full(), num_kv_heads=1, head_dim=1)], 2, 8, **kwargs)


def test_who_sees_whom_is_a_picture():
    cache, _ = small_cache().begin(jnp.array([[0, 1], [EMPTY, EMPTY]]))
    parents = jnp.array([[-1, 0, 0, -1], [-1, -1, 1, 2]])
    cache, step = cache.begin(jnp.array([[2, 3, 4, 5], [0, 1, 2, 3]]), parents=parents)
    x = jnp.ones((2, 4, 1, 1))
    _, _, mask = cache.layers[0].put(step, x, x).get(step)
    assert mask[:, 0, :, :6].astype(int).tolist() == [
        [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 1, 0], [1, 1, 0, 0, 0, 1]],
        [[1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0]],
    ]
    assert step.depths.tolist() == [[2, 3, 3, 2], [0, 0, 1, 2]]


@pytest.mark.parametrize(("layout", "stacked"), [("rows", False), ("pages", True)])
def test_a_branch_moves_up_bit_for_bit_in_the_rows_that_are_named(layout, stacked):
    specs = [LayerSpec(Full(), num_kv_heads=1, head_dim=4, k_storage=jaxkv.Dense("bfloat16"))] * 2
    cache = jaxkv.Cache.init(specs, 3, 12, layout=LAYOUTS[layout], stacked=stacked)
    rows = jnp.array([2, 7, 0])  # there is no row 7
    positions = jnp.tile(jnp.arange(6)[None], (3, 1))
    cache, step = cache.begin(positions, rows=rows, parents=jnp.tile(jnp.array([[-1, -1, 0, 1, 3, 4]]), (3, 1)))
    x = jax.random.normal(jax.random.key(0), (3, 6, 1, 4))
    if stacked:
        stack = cache.layers[0]
        for i in range(2):
            stack = stack.at(i).put(step, x + i, x - i).at(None)
        cache = cache.with_layers([stack])
    else:
        cache = cache.with_layers(layer.put(step, x + i, x - i) for i, layer in enumerate(cache.layers))
    cache = jax.jit(lambda cache, path: cache.commit(step, path))(
        cache, jnp.array([[1, 3, 4, 5], [0, 2, -1, -1], [0, 2, 3, -1]])
    )
    assert cache.lengths.tolist() == [2, 0, 4]  # row 0 was given 3, which is not a child of 2
    cache, step = cache.begin(cache.lengths[:, None])
    for i in range(2):
        layer = cache.layers[0].at(i) if stacked else cache.layers[i]
        k, v, _ = layer.get(step)
        for row, b, path in ((2, 0, [1, 3, 4, 5]), (0, 2, [0, 2])):
            want = x[b, jnp.array(path)]
            assert (k[row, : len(path)] == (want + i).astype(jnp.bfloat16)).all()
            assert (v[row, : len(path)] == want - i).all()


def test_rows_that_did_not_fit_stay_as_they_were():
    cache, _ = small_cache().begin(jnp.array([[0, 1, 2, 3], [0, 1, 2, 3]]))
    begin = jax.jit(lambda cache, positions, parents: cache.begin(positions, parents=parents))
    chain = jnp.array([[-1, 0, 1], [-1, 0, 1]])
    good = [4, 5, 6]
    for positions, parents in (
        ([3, 4, 5], [-1, 0, 1]),  # not from the length on
        ([4, 6, 7], [-1, 0, 1]),  # not consecutive
        ([4, EMPTY, 6], [-1, 0, 1]),  # padding within
        (good, [-1, 1, 1]),  # its own parent
        (good, [-1, 2, 0]),  # one that comes after it
        (good, [0, 0, 1]),
        (good, [-1, 99, 0]),
    ):
        after, step = begin(cache, jnp.array([positions, good]), chain.at[0].set(jnp.array(parents)))
        assert step.ok.tolist() == after.ok.tolist() == [False, True]
        assert step.positions.tolist() == [[EMPTY] * 3, good]
        assert step.depths.tolist() == [[EMPTY] * 3, good]
        after = after.commit(step, jnp.array([[0, 1], [0, 1]]))
        assert after.lengths.tolist() == [4, 6]
    after, step = begin(
        cache, jnp.array([[EMPTY] * 3, good]), jnp.array([[5, 5, 5], [-7, 0, -7]])
    )  # padding: no matter
    assert after.ok.all()
    assert step.depths.tolist() == [[EMPTY] * 3, [4, 5, 4]]
    assert after.commit(step, jnp.array([[0], [2]])).lengths.tolist() == [4, 5]


def test_a_pool_without_a_page_for_the_tree_refuses_the_row_alone():
    cache = small_cache(layout=jaxkv.Pages(3, 2), max_block=4)
    positions, parents = jnp.array([[0, 1, 2], [0, 1, 2]]), jnp.array([[-1, 0, 0], [-1, 0, 0]])
    cache, step = cache.begin(positions, parents=parents)
    assert step.ok.tolist() == [True, False]
    cache = cache.commit(step, jnp.array([[0, 2], [0, 2]]))
    assert cache.lengths.tolist() == [2, 0]
    assert cache.num_free.tolist() == [2]  # what the other branch lay in is free again


@functools.partial(jax.jit, static_argnums=1)
def forked_before_commit(x, pages):
    """Rows 0 and 1 hold [10, 11]; row 0 grows a tree, row 1 becomes its copy, then row 0 keeps a branch."""
    layout = jaxkv.Pages(pages, 4) if pages else jaxkv.Rows()
    cache = jaxkv.Cache.init([LayerSpec(Full(), num_kv_heads=1, head_dim=1)], 2, 8, layout=layout, max_block=4)
    for positions, parents, values in (([0, 1], None, [10, 11]), ([2, 3, 4], [[-1, 0, 0], [-1] * 3], [20, 21, 22])):
        at = jnp.array([positions, [EMPTY] * len(positions)])
        cache, step = cache.begin(at, parents=None if parents is None else jnp.array(parents))
        new = x + jnp.array(values, jnp.float32)[None, :, None, None] * jnp.ones((2, 1, 1, 1))
        cache = cache.with_layers([cache.layers[0].put(step, new, new)])
    cache = cache.copy_prefix(0, 1, 5)
    cache = cache.commit(step, jnp.array([[0, 2], [EMPTY] * 2]))
    after, step = cache.begin(jnp.where(cache.ok, cache.lengths, EMPTY)[:, None])
    return cache, after.layers[0].get(step)[0][:, :, 0, 0]


@pytest.mark.parametrize("pages", [0, 4, 2])
def test_a_row_forked_before_its_branch_is_kept_does_not_change_the_copy(pages):
    cache, k = forked_before_commit(jnp.float32(0), pages)
    assert k[1, :5].tolist() == [10, 11, 20, 21, 22]
    if pages == 2:  # no page of its own for what moves: the row is as before the tree
        assert cache.ok.tolist() == [False, True] and cache.lengths.tolist() == [2, 5]
        return
    assert cache.ok.tolist() == [True, True] and cache.lengths.tolist() == [4, 5]
    assert k[0, :4].tolist() == [10, 11, 20, 22]


def test_a_row_that_was_edited_since_its_tree_grew_is_left_alone_and_says_so():
    cache, step = small_cache().begin(jnp.array([[0, 1, 2], [0, 1, 2]]), parents=jnp.array([[-1, 0, 0]] * 2))
    for lengths, ok in (([2, 3], [False, True]), ([0, 3], [True, True])):
        after = cache.rewind(jnp.array(lengths)).commit(step, jnp.array([[0, 2]] * 2))
        assert after.lengths.tolist() == [lengths[0], 2] and after.ok.tolist() == ok


@pytest.mark.optimized
@pytest.mark.parametrize("layout", [jaxkv.Rows(), jaxkv.Pages(2048, 16)], ids=["rows", "pages"])
def test_a_commit_changes_a_donated_cache_in_place(layout):
    cache = jaxkv.Cache.init([LayerSpec(Full(), num_kv_heads=2, head_dim=8)], 2, 1 << 14, layout=layout)
    positions = jnp.tile(jnp.arange(4)[None], (2, 1))

    def run(cache, path):
        cache, step = cache.begin(positions, parents=jnp.array([[-1, 0, 0, 2]] * 2))
        x = jnp.ones((2, 4, 2, 8))
        return cache.with_layers([cache.layers[0].put(step, x, x)]).commit(step, path)

    program = jax.jit(run, donate_argnums=0).lower(cache, jnp.array([[0, 2, 3]] * 2)).compile()
    shape = ",".join(map(str, cache.layers[0].k.shape))
    assert f"f32[{shape}]{{3,2,1,0}} copy(" not in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes < cache.layers[0].k.nbytes // 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.begin(jnp.array([[0, 1]] * 2), parents=jnp.array([[-1, 1]] * 2)), r"parents\[0, 1\] is 1.*0 to 0"),
        (lambda c: c.begin(jnp.array([[0, 1]] * 2), parents=jnp.array([[-1, 0], [0, 0]])), r"parents\[1, 0\] is 0.*-1"),
        (lambda c: c.begin(jnp.array([[0, 1]] * 2), parents=jnp.array([[-1]] * 2)), r"parents has shape \(2, 1\)"),
        (lambda c: c.begin(jnp.array([[0]] * 2), parents=jnp.array([[-1.0]] * 2)), r"parents has dtype float32"),
        (
            lambda c: c.begin(jnp.array([[0]] * 2), spans=jnp.array([[1]] * 2), parents=jnp.array([[-1]] * 2)),
            r"parents and spans",
        ),
        (lambda c: c.commit(c.begin(jnp.array([[0]] * 2))[1], jnp.array([[0]] * 2)), r"no tree.*parents="),
        (
            lambda c: c.commit(c.begin(jnp.array([[0]] * 2), parents=jnp.array([[-1]] * 2))[1], jnp.array([0, 0])),
            r"path has shape \(2,\); give int \[2, D\]",
        ),
    ],
)
def test_what_can_be_told_while_tracing_is_told(call, message):
    with pytest.raises(ValueError, match=message):
        call(small_cache())
