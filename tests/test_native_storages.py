"""What the kernel in C++ reads: every storage, mixed freely, values in keys, and trees of tokens."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxkv import Cache, Chunk, Dense, Float8, Full, Int4, Int8, LayerSpec, Pages, Rows, Window, attend

HEADS, K, ROWS, HELD, T = 6, 2, 2, 600, 7

MIXED = [
    LayerSpec(Full(), K, 48, 32, Int8(), Int4()),
    LayerSpec(Window(300, sinks=3), K, 48, 32, Int4(rotate=False), Float8("e4m3")),
    LayerSpec(Chunk(250), K, 48, 32, Float8("e5m2"), Dense("bfloat16")),
    LayerSpec(Full(), K, 48, 32, Dense("float16"), Int8(rotate=False)),
    LayerSpec(Full(), K, 44, 12, Int4(11), Int4(3)),  # groups that no vector register divides
    LayerSpec(Full(), K, 23, 17, Float8(), Float8("e5m2")),
]
IN_KEYS = [
    LayerSpec(Full(), 1, 40, 24, Dense(), Dense(), v_in_k=True),
    LayerSpec(Window(300), 1, 40, 24, Dense("bfloat16"), Int8(), v_in_k=True),
    LayerSpec(Full(), 2, 40, 24, Int8(), Int4(4), v_in_k=True),
    LayerSpec(Full(), 1, 24, 24, v_storage=Int4(3), v_in_k=True),  # a key is nothing but its value
]


pytestmark = pytest.mark.usefixtures("native_kernel")


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def attended(specs, layout, parents=None):
    """The kernel's attention of a block behind what two rows hold, and that of `get`, per layer."""

    @jax.jit
    def run(held, positions, ks, vs, q):
        def put(layer, step, k, v):
            spec = layer.spec
            k = k[:, :, : spec.num_kv_heads, : spec.head_dim]
            return layer.put(step, k, None if spec.v_in_k else v[:, :, :, : spec.value_dim])

        cache, step = Cache.init(specs, ROWS, HELD + 40, max_block=HELD, layout=layout).begin(held)
        cache = cache.with_layers([put(layer, step, ks[0], vs[0]) for layer in cache.layers])
        cache, step = cache.begin(positions, parents=parents)
        layers = [put(layer, step, ks[1], vs[1]) for layer in cache.layers]
        outs = [attend(q[..., : x.spec.head_dim], x, step, softcap=9.0, implementation="native") for x in layers]
        return outs, [layer.get(step) for layer in layers]

    at = np.arange(HELD)
    held = np.stack([at, np.where(at < 130, at, -1)]).astype(np.int32)
    own = np.array([[HELD], [130]]) + np.arange(T)
    own[1, 5:] = -1
    ks, vs = ([normal(i, ROWS, n, K, 48) for n in (HELD, T)] for i in (1, 2))
    q = normal(3, ROWS, T, HEADS, 48)
    outs, got = run(held, own.astype(np.int32), ks, vs, q)
    return [(out, softmax(q, *one)) for out, one in zip(outs, got, strict=True)]


def softmax(q, k, v, mask):
    """Float64 attention with a soft cap of 9."""
    k, v, mask = np.asarray(k, np.float64), np.asarray(v, np.float64), np.asarray(mask)
    q = np.asarray(q, np.float64)[..., : k.shape[-1]].reshape(ROWS, T, k.shape[2], -1, k.shape[-1])
    scores = 9 * np.tanh(np.einsum("btkgh,bskh->bkgts", q, k) * k.shape[-1] ** -0.5 / 9)
    p = np.where(mask[:, :, None], np.exp(scores), 0)
    p /= np.maximum(p.sum(-1, keepdims=True), 1e-30)
    return np.einsum("bkgts,bskh->btkgh", p, v).reshape(ROWS, T, HEADS, -1)


def assert_equal(pairs):
    for one, other in pairs:
        assert np.abs(other).max() > 0.1
        np.testing.assert_allclose(one, other, atol=2e-6 * np.abs(other).max())


@pytest.mark.parametrize(
    ("specs", "layout"), [(MIXED + IN_KEYS, Rows()), (MIXED[:1] + IN_KEYS[2:3], Pages(100, 16))], ids=["rows", "pages"]
)
def test_storages_of_keys_and_values_mix_and_values_may_be_in_keys(specs, layout):
    assert_equal(attended(specs, layout))


def test_a_tree_of_tokens_sees_what_the_row_held_and_its_ancestors():
    parents = np.array([[-1, 0, 0, 1, 1, 2, 5], [-1, -1, 0, 1, 3, -1, -1]], np.int32)
    specs = [LayerSpec(Full(), K, 48, 32), LayerSpec(Window(3, sinks=1), K, 48, 32, Int8(), Int4())]
    assert_equal(attended(specs, Rows(), parents))
