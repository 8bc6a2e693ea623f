"""Compiled programs give what the same calls give op by op, with their gradients.

XLA's CPU backend has been silently wrong in how it fuses products, sums and broadcast numbers, and which loss follows
decides what is fused. So every form runs here under sums, means and squares, with all of XLA's optimizations.
"""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxkv
from jaxkv import Cache, Dense, Full, Int8, LayerSpec, Rotary, Window, YarnScaling
from jaxkv.native import library

B, T, N, K, H, WIDTH = 2, 20, 4, 2, 8, 8
POSITIONS = np.tile(np.arange(T, dtype=np.int32), (B, 1))
LOSSES = {"sum": jnp.sum, "mean": jnp.mean, "square": lambda x: (x**2).sum()}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


Q, KEYS, VALUES, SINKS = normal(1, B, T, N, H), normal(2, B, T, K, H), normal(3, B, T, K, H), normal(4, N)


@functools.cache
def begun(length, storage):
    """The layers of an empty cache, and the steps of two calls: the second one has the last tokens."""
    specs = [LayerSpec(reach, K, H, k_storage=storage, v_storage=storage) for reach in (Full(), Window(5, sinks=1))]
    cache, first = Cache.init(specs, B, 64).begin(POSITIONS[:, :-length])
    cache, second = cache.begin(POSITIONS[:, -length:])
    return cache.layers, first, second


def attend(layers, first, second, q, k, v, sinks):
    """The tokens of the second call read what a cache holds of all of them."""
    length = second.positions.shape[1]
    layers = [layer.put(first, k[:, :-length], v[:, :-length]) for layer in layers]
    layers = [layer.put(second, k[:, -length:], v[:, -length:]) for layer in layers]
    q = q[:, -length:]
    options = {"softcap": 3.0, "sink_logits": sinks, "implementation": "blockwise"}
    return jnp.stack([jaxkv.attend(q, layer, second, **options) for layer in layers])


def of_module(name, *sizes, **options):
    """A module with parameters of no special value, as a function of them and its input."""
    graph, params = nnx.split(getattr(jaxkv.nnx, name)(*sizes, rngs=nnx.Rngs(0), **options), nnx.Param)[:2]
    random = np.random.default_rng(5)
    params = jax.tree.map(lambda x: (x + 0.3 * random.normal(size=x.shape)).astype(x.dtype), params)
    return lambda params, x: nnx.merge(graph, params)(x), (params, normal(6, B, 6, WIDTH))


LATENT = {"rank": 8, "rotary_dim": 4, "head_dim": 6, "value_dim": 5, "rotary": Rotary(interleaved=True)}
DELTA = {"num_key_heads": 2, "num_value_heads": 4, "key_dim": 3, "value_dim": 5, "kernel_size": 3}
MAMBA = {"num_heads": 4, "head_dim": 3, "state_dim": 5, "num_groups": 2, "kernel_size": 3, "use_bias": True}
CASES = {
    "attend-one": lambda: (functools.partial(attend, *begun(1, Dense())), (Q, KEYS, VALUES, SINKS)),
    "attend-some": lambda: (functools.partial(attend, *begun(17, Dense("float16"))), (Q, KEYS, VALUES, SINKS)),
    "attend-int8": lambda: (lambda q, sinks: attend(*begun(1, Int8()), q, KEYS, VALUES, sinks), (Q, SINKS)),
    "self": lambda: (functools.partial(jaxkv.self_attend, reach=Window(5)), (Q, KEYS, VALUES)),
    "cross": lambda: (jaxkv.cross_attend, (Q, KEYS[:, :7], VALUES[:, :7])),
    "rotary": lambda: (lambda q: Rotary(scaling=YarnScaling(4.0, 8)).rotate(q, POSITIONS[:, :, None, None]), (Q,)),
    "LatentAttention": lambda: of_module("LatentAttention", N, WIDTH, **LATENT),
    "ShortConv": lambda: of_module("ShortConv", WIDTH, kernel_size=4, use_bias=True),
    "GatedDelta": lambda: of_module("GatedDelta", WIDTH, **DELTA),
    "Mamba2": lambda: of_module("Mamba2", WIDTH, **MAMBA),
}


def assert_close(got, want):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = max(1.0, float(np.abs(other).max()))
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * scale)


@contextlib.contextmanager
def op_by_op():
    """Every operation is a program of its own, with nothing to fuse: it is compiled sooner without optimizations."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        with jax.disable_jit():
            yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
        jax.clear_caches()  # a program with them must not be one of these


@pytest.mark.optimized
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_under_each_loss_are_those_of_single_operations(case):
    function, args = CASES[case]()
    every = tuple(range(len(args)))
    losses = LOSSES if case[0].islower() else {name: LOSSES[name] for name in ("mean", "square")}  # modules take long
    with op_by_op():
        out, pull = jax.vjp(lambda *args: function(*args).astype(jnp.float32), *args)
        want = {name: (of(out), pull(jax.grad(of)(out))) for name, of in losses.items()}
    for name, of in losses.items():
        run = lambda *args, of=of: of(function(*args).astype(jnp.float32))  # noqa: E731
        assert_close(jax.jit(jax.value_and_grad(run, every))(*args), want[name])


@pytest.mark.optimized
def test_the_token_that_generate_writes_is_that_of_a_step_op_by_op(monkeypatch):
    monkeypatch.setattr(library, "problem", lambda: "XLA's form is what is tested here")
    source = {"model_type": "llama", "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1}
    source |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 16}
    model = jaxkv.models.init(source, rngs=nnx.Rngs(0))
    prompts = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.int32)
    result = jaxkv.generate(model.forward, model.params, prompts, Cache.init(model.specs, 2, 32), max_new_tokens=2)
    begun = jaxkv.generate(model.forward, model.params, prompts, Cache.init(model.specs, 2, 32), max_new_tokens=1)
    args = model.params, begun.tokens[:, :1], begun.cache.lengths[:, None], begun.cache
    want = jax.jit(model.forward)(*args)[0]
    with op_by_op():
        logits, _ = model.forward(*args)
    assert_close(want, logits)
    np.testing.assert_array_equal(result.tokens[:, 1], logits[:, 0].argmax(-1))
