"""The decoder: its arithmetic, its cached decoding, its config."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxkv
from jaxkv.models import Decoder, DecoderConfig
from jaxkv.models.mlp import gelu
from jaxkv.nn.leaves import named

BASE = {"vocab_size": 11, "width": 8, "num_heads": 4, "mlp_dim": 12}
CONFIGS = {
    "llama": DecoderConfig(**BASE, num_layers=2, num_kv_heads=2, head_dim=4, reaches=(jaxkv.Window(5), jaxkv.Full())),
    "gpt2": DecoderConfig(
        **BASE,
        num_layers=1,
        rotary=None,
        max_positions=24,
        norm="layer",
        activation="gelu_tanh",
        gated=False,
        use_bias=True,
    ),
    "mixed": DecoderConfig(
        **BASE,
        num_layers=2,
        num_kv_heads=1,
        reaches=(jaxkv.Chunk(4), jaxkv.Window(3, sinks=1)),
        rotary=(jaxkv.Rotary(theta=100.0), None),
        activation="gelu",
        qk_norm=True,
        tied=False,
    ),
}


def make(config):
    """A decoder whose every parameter is random: biases and scales too, which start as zeros and ones."""
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    random = np.random.default_rng(0)
    state = nnx.state(model)
    nnx.update(model, jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape) * 0.5, x.dtype), state))
    return model


def tokens(*shape):
    return jnp.asarray(np.random.default_rng(1).integers(0, BASE["vocab_size"], shape), jnp.int32)


def numpy_logits(model, ids):
    """The formulas, for one sequence: no batch, no cache, no shared code."""
    c, p = model.config, {name: np.asarray(x, np.float64) for name, x in named(nnx.state(model)).items()}

    def norm(x, name):
        if c.norm == "layer":
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + c.norm_eps) * p[f"{name}.scale"]
        return x + p.get(f"{name}.bias", 0)

    def linear(x, name, axes=1):
        return np.tensordot(x, p[f"{name}.kernel"], axes) + p.get(f"{name}.bias", 0)

    def rotate(x, rotary):  # [T, N, H]
        half = x.shape[-1] // 2
        angle = np.arange(len(x))[:, None] * rotary.theta ** (-np.arange(half) / half)
        z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None]
        return np.concatenate([z.real, z.imag], -1)

    act = {
        "silu": lambda x: x / (1 + np.exp(-x)),
        "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
        "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    }[c.activation]
    x = p["embed.embedding"][ids]
    if c.max_positions:
        x = x + p["positions.embedding"][: len(ids)]
    for i in range(c.num_layers):
        at = f"layers.{i}"
        h = norm(x, f"{at}.attention_norm")
        q, k, v = (linear(h, f"{at}.attention.{name}") for name in ("query", "key", "value"))
        if c.qk_norm:
            q, k = (
                y / np.sqrt((y * y).mean(-1, keepdims=True) + c.norm_eps) * p[f"{at}.attention.{name}_norm.scale"]
                for y, name in ((q, "query"), (k, "key"))
            )
        if c.layer_rotary(i):
            q, k = rotate(q, c.layer_rotary(i)), rotate(k, c.layer_rotary(i))
        mixed = np.zeros_like(q)
        reach = c.reach(i)
        for t in range(len(ids)):
            seen = [s for s in range(t + 1) if reach.sees(np.int32(t), np.int32(s))]
            for n in range(c.num_heads):
                head = n * c.num_kv_heads // c.num_heads
                e = np.exp(k[seen, head] @ q[t, n] / math.sqrt(c.head_dim))
                mixed[t, n] = e / e.sum() @ v[seen, head]
        x = x + linear(mixed, f"{at}.attention.out", 2)
        h = norm(x, f"{at}.mlp_norm")
        up = linear(h, f"{at}.mlp.up")
        x = x + linear(act(linear(h, f"{at}.mlp.gate")) * up if c.gated else act(up), f"{at}.mlp.down")
    x = norm(x, "norm")
    return x @ p["embed.embedding"].T if c.tied else linear(x, "head")


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_formulas(name):
    model, ids = make(CONFIGS[name]), tokens(1, 12)
    np.testing.assert_allclose(nnx.jit(model)(ids)[0], numpy_logits(model, np.asarray(ids[0])), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mixed"])
def test_a_cache_gives_the_logits_of_training_however_the_tokens_are_fed(name):
    model = make(CONFIGS[name])
    ids = tokens(2, 16)
    want = nnx.jit(model)(ids)
    forward, params = jaxkv.nnx.functional(model)
    forward = jax.jit(forward)
    for size in (16, 4, 1):
        cache = jaxkv.Cache.init(model.specs(), num_rows=2, capacity=24, max_block=16)
        for begin in range(0, 16, size):
            block = jnp.broadcast_to(jnp.arange(begin, begin + size)[None], (2, size))
            logits, cache = forward(params, ids[:, begin : begin + size], block, cache)
            np.testing.assert_allclose(logits, want[:, begin : begin + size], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_cached_decoding_passes_the_public_check():
    model = make(CONFIGS["gpt2"])
    forward, params = jaxkv.nnx.functional(model)
    cache = jaxkv.Cache.init(model.specs(), num_rows=2, capacity=24, max_block=4)
    graph = nnx.graphdef(model)
    uncached = jax.jit(lambda params, ids: nnx.merge(graph, params)(ids))
    jaxkv.testing.assert_cache_correct(forward, params, cache, tokens=tokens(2, 18), uncached=uncached)


def test_padding_without_a_cache_changes_nothing():
    model = make(CONFIGS["llama"])
    ids = tokens(1, 5)
    ragged = jnp.array([[-1, 0, 1, -1, 2, 3, 4]])
    padded = jnp.full((1, 7), 10_000).at[:, ragged[0] >= 0].set(ids)  # unknown tokens, in padding only
    run = nnx.jit(model)
    np.testing.assert_allclose(run(padded, ragged)[:, ragged[0] >= 0], run(ids), rtol=1e-5, atol=1e-5)


def test_reaches_are_a_pattern_over_the_layers():
    window, full = jaxkv.Window(5), jaxkv.Full()
    config = DecoderConfig(**BASE, num_layers=8, reaches=(window, window, full), rotary=(jaxkv.Rotary(), None))
    specs = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))).specs()
    assert [spec.reach for spec in specs] == [window, window, full, window, window, full, window, window]
    assert [spec.rotary for spec in specs] == [jaxkv.Rotary(), None] * 4


def test_what_a_cache_keeps_has_the_dtype_of_the_computation():
    config = dataclasses.replace(CONFIGS["llama"], dtype="bfloat16")
    ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    assert {spec.k_storage for spec in model.specs()} == {jaxkv.Dense("bfloat16")}
    assert {spec.v_storage for spec in model.specs(v_storage=jaxkv.Dense("float16"))} == {jaxkv.Dense("float16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    assert jax.eval_shape(lambda ids: Decoder(config, rngs=nnx.Rngs(0))(ids), ids).dtype == jnp.bfloat16


def test_models_of_equal_config_share_compiled_programs():
    one, other = (jaxkv.nnx.functional(make(CONFIGS["gpt2"]))[0] for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_heads": 3}, "width=8 is not a multiple of num_heads=3"),
        ({"num_kv_heads": 3}, "num_heads=4 is not a multiple of num_kv_heads=3"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"mlp_dim": -1}, "mlp_dim=-1"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"max_positions": 0}, "max_positions=0"),
        ({"reaches": ()}, r"reaches=\(\)"),
        ({"reaches": (5,)}, r"reaches=\(5,\)"),
        ({"rotary": ()}, r"rotary=\(\)"),
        ({"norm": "batch"}, "norm='batch': known are rms, layer"),
        ({"activation": "selu"}, "activation='selu': known are silu, gelu, gelu_tanh, relu"),
        ({"dtype": "int32"}, "dtype=int32"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        DecoderConfig(**BASE | {"num_layers": 2} | changes)


def test_calls_that_do_not_fit_are_refused():
    model = make(CONFIGS["llama"])
    ids, positions = tokens(1, 3), jnp.arange(3)[None]
    cache = jaxkv.Cache.init(model.specs(), num_rows=1, capacity=24)
    with pytest.raises(ValueError, match=r"tokens is float32\(1, 3\)"):
        model(ids.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"tokens is int32\(3,\)"):
        model(ids[0])
    with pytest.raises(ValueError, match="tokens is list"):
        model([[1, 2]])
    with pytest.raises(ValueError, match=r"positions has shape \(1, 2\), tokens \(1, 3\)"):
        model(ids, positions[:, :2])
    with pytest.raises(ValueError, match="with a cache give positions"):
        model(ids, None, cache)
    with pytest.raises(ValueError, match="token 11 is not in the vocabulary of 11"):
        model(ids.at[0, 1].set(11))
    with pytest.raises(ValueError, match="token -3 is not in the vocabulary"):
        model(ids.at[0, 2].set(-3), positions, cache)
    with pytest.raises(ValueError, match="the cache has 1 layers, the model 2"):
        model(ids, positions, jaxkv.Cache.init(model.specs()[:1], num_rows=1, capacity=24))


def test_learned_positions_end_where_their_table_ends():
    model = nnx.eval_shape(lambda: Decoder(CONFIGS["gpt2"], rngs=nnx.Rngs(0)))
    longer = jax.eval_shape(lambda: jaxkv.Cache.init(model.specs(), num_rows=1, capacity=25))
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    with pytest.raises(
        ValueError, match="the cache's capacity is 25 tokens, the model's learned table max_positions=24"
    ):
        jax.eval_shape(model, ids, ids, longer)
    with pytest.raises(ValueError, match="the sequence has 25 tokens, the model's learned table max_positions=24"):
        jax.eval_shape(model, jax.ShapeDtypeStruct((1, 25), jnp.int32))


def test_under_jit_an_unknown_token_or_position_gives_nan_for_its_row_alone():
    model = make(CONFIGS["gpt2"])
    ids, positions = tokens(2, 3), jnp.array([[0, 1, 2]] * 2)
    run = nnx.jit(model)
    for logits in (run(ids.at[0, 1].set(11), positions), run(ids, positions.at[0, 1].set(24))):
        assert np.isnan(logits[0, 1]).all()
        assert np.isfinite(logits[1]).all()


def test_a_decoder_learns():
    graph, params = nnx.split(make(CONFIGS["gpt2"]))
    ids = tokens(2, 18)

    @jax.jit
    def loss_and_grad(params):
        def loss(params):
            scores = jax.nn.log_softmax(nnx.merge(graph, params)(ids[:, :-1]))
            return -jnp.mean(jnp.take_along_axis(scores, ids[:, 1:, None], 2))

        return jax.value_and_grad(loss)(params)

    losses = []
    for _ in range(30):
        loss, grads = loss_and_grad(params)
        params = jax.tree.map(lambda p, g: p - jnp.float32(0.2) * g, params, grads)
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]


def test_gelu_is_exact_to_rounding_and_so_is_its_gradient():
    x = np.concatenate([np.linspace(-12, 12, 4001), [-1e30, -50, 50, 1e30]]).astype(np.float32)
    below = np.array([0.5 * math.erfc(-float(y) / 2**0.5) for y in x])
    with np.errstate(over="ignore", under="ignore"):
        density = np.exp(-0.5 * x.astype(np.float64) ** 2) / math.sqrt(2 * math.pi)
    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(gelu)))(x)
    np.testing.assert_allclose(values, x * below, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(slopes, below + x * density, rtol=1e-6, atol=1e-6)


def test_gelu_of_half_precision_is_rounded_once():
    x = jnp.linspace(-4, 4, 999).astype(jnp.bfloat16)
    want = [0.5 * y * math.erfc(-y / 2**0.5) for y in np.asarray(x, np.float64)]
    values = gelu(x)
    assert values.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(values, np.float64), want, rtol=2**-8, atol=1e-6)
