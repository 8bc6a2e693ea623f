"""Experts give what each token's own experts give, whatever the number of tokens, and touch no others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxkv.models import DecoderConfig, ExpertsConfig, experts
from jaxkv.models.experts import Experts

WIDTH, HIDDEN, EXPERTS = 6, 4, 8
CONFIG = DecoderConfig(vocab_size=8, width=WIDTH, num_layers=1, num_heads=1)
KINDS = {
    "softmax, normalized, as Mixtral": ExpertsConfig(EXPERTS, 2, HIDDEN),
    "not normalized, beside a gated shared one, as Qwen 2": ExpertsConfig(
        EXPERTS, 3, HIDDEN, normalized=False, shared_dim=5, shared_gate=True
    ),
    "sigmoid of the input, beside a shared one, as Llama 4": ExpertsConfig(
        EXPERTS, 1, HIDDEN, scores="sigmoid", normalized=False, weighs_input=True, shared_dim=HIDDEN
    ),
    "chosen by group and bias, scaled, as DeepSeek": ExpertsConfig(
        EXPERTS, 3, HIDDEN, scores="sigmoid", scale=2.5, choice_bias=True, num_groups=4, groups_per_token=2
    ),
    "clamped, with biases, as gpt-oss": ExpertsConfig(EXPERTS, 4, HIDDEN, use_bias=True, clamped=True),
}


def made(kind):
    module = Experts(CONFIG, KINDS[kind], rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(module)
    leaves, tree = jax.tree.flatten(state)
    rng = np.random.default_rng(0)
    leaves = [jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves]
    return graphdef, tree.unflatten(leaves)


def tokens(count):
    return jnp.asarray(np.random.default_rng(count).normal(size=(1, count, WIDTH)), jnp.float32)


def by_hand(module, x):
    """What the experts give for one token x [D], one expert at a time, in NumPy."""
    config = module.config
    x = np.asarray(x, np.float64)
    get = {
        name: np.asarray(value[...], np.float64) for name, value in vars(module).items() if isinstance(value, nnx.Param)
    }
    logits = x @ np.asarray(module.router.kernel[...], np.float64)
    if config.use_bias:
        logits = logits + np.asarray(module.router.bias[...], np.float64)
    scores = 1 / (1 + np.exp(-logits))
    if config.scores == "softmax":
        scores = np.exp(logits) / np.exp(logits).sum()
    ranks = scores + get.get("choice_bias", 0)
    groups = ranks.reshape(config.num_groups, -1)
    kept = np.argsort(-np.sort(groups, axis=1)[:, -2:].sum(axis=1))[: config.groups_per_token]
    allowed = np.repeat(np.isin(np.arange(config.num_groups), kept), EXPERTS // config.num_groups)
    chosen = np.argsort(-np.where(allowed, ranks, -np.inf))[: config.per_token]
    weights = scores[chosen]
    weights = config.scale * (weights / weights.sum() if config.normalized else weights)

    def expert(x, i):
        bias = {part: get[f"{part}_bias"][i] if config.use_bias else 0 for part in ("gate", "up", "down")}
        gate, up = x @ get["gate"][i] + bias["gate"], x @ get["up"][i] + bias["up"]
        if config.clamped:
            gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
            return (up + 1) * gate / (1 + np.exp(-1.702 * gate)) @ get["down"][i] + bias["down"]
        return gate / (1 + np.exp(-gate)) * up @ get["down"][i]

    total = sum(
        expert(w * x, i) if config.weighs_input else w * expert(x, i) for w, i in zip(weights, chosen, strict=True)
    )
    if module.shared is not None:
        gate, up, down = (np.asarray(getattr(module.shared, n).kernel[...]) for n in ("gate", "up", "down"))
        y = (x @ gate) / (1 + np.exp(-(x @ gate))) * (x @ up) @ down
        if module.shared_gate is not None:
            y = y / (1 + np.exp(-(x @ np.asarray(module.shared_gate.kernel[...]))))
        total = total + y
    return total, chosen


@pytest.fixture(params=["blocks", "native"])
def way(request, monkeypatch):
    """How experts are computed: in blocks by XLA, or by the native library, which leaves small ones alone otherwise."""
    if request.param == "native":
        request.getfixturevalue("native_kernel")
        monkeypatch.setattr(experts, "_LEAST", 0)
    return request.param


def is_native(run, *operands):
    return "custom_call @jaxkv_groups" in run.lower(*operands).as_text()


@pytest.mark.parametrize("kind", KINDS)
def test_each_token_gets_what_its_own_experts_give(kind, way):
    graphdef, state = made(kind)
    run = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    module = nnx.merge(graphdef, state)
    for count in (1, 60):  # one row at a time, and blocks of several
        x = tokens(count)
        assert is_native(run, state, x) == (way == "native")
        want = np.stack([by_hand(module, token)[0] for token in x[0]])
        np.testing.assert_allclose(run(state, x)[0], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [1, 3, 700])
def test_experts_that_no_token_needs_are_not_touched(count, way):
    graphdef, state = made("softmax, normalized, as Mixtral")
    module = nnx.merge(graphdef, state)
    x = jnp.broadcast_to(tokens(1), (1, count, WIDTH))
    want, chosen = by_hand(module, x[0, 0])
    unused = jnp.asarray([i not in chosen for i in range(EXPERTS)])[:, None, None]
    for name in ("gate", "up", "down"):
        param = getattr(module, name)
        param[...] = jnp.where(unused, jnp.nan, param[...])
    got = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(nnx.state(module), x)
    np.testing.assert_allclose(got[0], np.broadcast_to(want, (count, WIDTH)), rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_all_experts_weighted(way):
    graphdef, state = made("softmax, normalized, as Mixtral")

    def through_all(state, x):
        module = nnx.merge(graphdef, state)
        weights, chosen = module.route(module.router(x[0]))
        weights = jnp.zeros((x.shape[1], EXPERTS)).at[jnp.arange(x.shape[1])[:, None], chosen].set(weights)
        gate, up = (jnp.einsum("td,edi->tei", x[0], getattr(module, name)[...]) for name in ("gate", "up"))
        y = jnp.einsum("tei,eid->ted", jax.nn.silu(gate) * up, module.down[...])
        return jnp.sum(jnp.sin(jnp.einsum("te,ted->td", weights, y)))

    x = tokens(60)
    got = jax.jit(jax.grad(lambda state, x: jnp.sum(jnp.sin(nnx.merge(graphdef, state)(x))), (0, 1)))(state, x)
    want = jax.jit(jax.grad(through_all, (0, 1)))(state, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), got, want)


@pytest.mark.usefixtures("native_kernel")
def test_the_library_computes_experts_of_16_bits_and_leaves_the_rest_to_xla(monkeypatch):
    graphdef, state = made("softmax, normalized, as Mixtral")
    run = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    x = tokens(40)
    assert not is_native(run, state, x)  # small ones
    monkeypatch.setattr(experts, "_LEAST", 0)
    run = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    want = run(state, x)
    many = jax.vmap(run, in_axes=(None, 0))
    np.testing.assert_allclose(many(state, jnp.stack([x, 2 * x]))[0], want, atol=1e-4)
    assert "jaxkv_groups" not in jax.export.export(run)(state, x).mlir_module()
    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    divided = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "i")))
    assert not is_native(run, state, divided)
    np.testing.assert_allclose(run(state, divided), want, atol=1e-4)
    monkeypatch.setattr(experts, "_MOST", 40 * 2 * 2 * (WIDTH + HIDDEN) - 1)  # more than may be kept
    assert not is_native(jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)), state, x)
    monkeypatch.setattr(experts, "_MOST", 40 * 2 * 2 * (WIDTH + HIDDEN))
    for dtype in (jnp.bfloat16, jnp.float16):
        module = Experts(
            dataclasses.replace(CONFIG, dtype=dtype, param_dtype=dtype), KINDS["clamped, with biases, as gpt-oss"],
            rngs=nnx.Rngs(0),
        )  # fmt: skip
        half, rest = nnx.split(module)
        run = jax.jit(lambda state, x, half=half: nnx.merge(half, state)(x))
        x16 = x[:, :20].astype(dtype)
        assert is_native(run, rest, x16)
        got = run(rest, x16)
        assert got.dtype == dtype
        want16 = np.stack([by_hand(module, token)[0] for token in x16[0]])
        np.testing.assert_allclose(got[0].astype(jnp.float32), want16, atol=0.03)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_token": 9}, "per_token=9 is more than num_experts=8"),
        ({"mlp_dim": 0}, r"ExpertsConfig\(mlp_dim=0\): mlp_dim is at least 1"),
        ({"scores": "relu"}, "scores='relu': known are softmax, sigmoid"),
        ({"num_groups": 3}, "num_groups=3 must divide num_experts=8"),
        ({"num_groups": 8, "groups_per_token": 1}, "per_token=2 experts are more than groups_per_token=1 groups have"),
    ],
)
def test_numbers_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(KINDS["softmax, normalized, as Mixtral"], **changes)
