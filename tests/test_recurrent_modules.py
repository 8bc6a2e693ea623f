"""Recurrent layers give what a plain scan gives, with a cache and without, in blocks and token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxkv
from jaxkv.native import build, library
from jaxkv.nn import fading

ROWS, LENGTH, FEATURES = 2, 12, 8
CALL = "custom_call @jaxkv_memory"


CONV = {"kernel_size": 4, "use_bias": True}
DELTA = {"num_key_heads": 2, "num_value_heads": 4, "key_dim": 3, "value_dim": 5, "kernel_size": 3}
MAMBA = {"num_heads": 4, "head_dim": 3, "state_dim": 5, "num_groups": 2, "kernel_size": 3, "use_bias": True}


def plain_short_conv(p, x):
    """One token after the other, in float64."""
    projected = x @ p["in_proj.kernel"] + p["in_proj.bias"]
    b, c, u = np.split(projected, 3, -1)
    u = b * u
    kernel = p["conv.kernel"][:, 0]
    y = np.zeros_like(x)
    for t in range(x.shape[1]):
        for i in range(len(kernel)):
            if (s := t - (len(kernel) - 1) + i) >= 0:
                y[:, t] += kernel[i] * u[:, s]
    return (c * (y + p["conv.bias"])) @ p["out_proj.kernel"] + p["out_proj.bias"]


def plain_gated_delta(p, x):
    qkvz, ba = (np.einsum("btd,dhx->bthx", x, p[f"{name}.kernel"]) for name in ("qkvz", "ba"))
    q, k, v, z = np.split(qkvz, [3, 6, 16], -1)
    v, z, (beta, decay) = v.reshape(ROWS, -1, 4, 5), z.reshape(ROWS, -1, 4, 5), np.split(ba, 2, -1)
    beta, decay = (y.reshape(ROWS, -1, 4) for y in (beta, decay))
    mixed = np.concatenate([y.reshape(ROWS, -1, y.shape[2] * y.shape[3]) for y in (q, k, v)], -1)
    padded = np.pad(mixed, ((0, 0), (2, 0), (0, 0)))
    mixed = sum(padded[:, i : i + x.shape[1]] * p["conv.kernel"][i, 0] for i in range(3))
    q, k, v = np.split(mixed / (1 + np.exp(-mixed)), [6, 12], -1)
    q, k = (y.reshape(ROWS, -1, 2, 3).repeat(2, 2) for y in (q, k))
    q, k = (y / np.sqrt((y * y).sum(-1, keepdims=True) + 1e-6) for y in (q, k))
    v, q = v.reshape(ROWS, -1, 4, 5), q / np.sqrt(3)
    g, beta = -np.exp(p["a_log"]) * np.log1p(np.exp(decay + p["dt_bias"])), 1 / (1 + np.exp(-beta))
    state, read = np.zeros((ROWS, 4, 3, 5)), []
    for t in range(x.shape[1]):
        state = state * np.exp(g[:, t])[:, :, None, None]
        change = (v[:, t] - np.einsum("bhkv,bhk->bhv", state, k[:, t])) * beta[:, t, :, None]
        state = state + k[:, t, :, :, None] * change[:, :, None]
        read.append(np.einsum("bhkv,bhk->bhv", state, q[:, t]))
    y = np.stack(read, 1)
    y = y / np.sqrt((y * y).mean(-1, keepdims=True) + 1e-6) * p["norm.scale"] * z / (1 + np.exp(-z))
    return np.einsum("bthv,hvd->btd", y, p["out.kernel"])


def plain_mamba2(p, x):
    gate, mixed, dt = np.split(x @ p["in_proj.kernel"] + p["in_proj.bias"], [12, 44], -1)
    padded = np.pad(mixed, ((0, 0), (2, 0), (0, 0)))
    mixed = sum(padded[:, i : i + x.shape[1]] * p["conv.kernel"][i, 0] for i in range(3)) + p["conv.bias"]
    u, b, c = np.split(mixed / (1 + np.exp(-mixed)), [12, 22], -1)
    u, (b, c) = u.reshape(ROWS, -1, 4, 3), (y.reshape(ROWS, -1, 2, 5).repeat(2, 2) for y in (b, c))
    dt = np.log1p(np.exp(dt + p["dt_bias"]))
    state, read = np.zeros((ROWS, 4, 5, 3)), []
    for t in range(x.shape[1]):
        state = state * np.exp(-np.exp(p["a_log"]) * dt[:, t])[:, :, None, None]
        state = state + np.einsum("bhn,bhp->bhnp", b[:, t], u[:, t] * dt[:, t, :, None])
        read.append(np.einsum("bhnp,bhn->bhp", state, c[:, t]) + p["d"][:, None] * u[:, t])
    y = (np.stack(read, 1).reshape(gate.shape) * gate / (1 + np.exp(-gate))).reshape(ROWS, -1, 2, 6)
    y = (y / np.sqrt((y * y).mean(-1, keepdims=True) + 1e-6)).reshape(gate.shape) * p["norm.scale"]
    return y @ p["out_proj.kernel"] + p["out_proj.bias"]


KINDS = {
    "ShortConv": (CONV, plain_short_conv),
    "GatedDelta": (DELTA, plain_gated_delta),
    "Mamba2": (MAMBA, plain_mamba2),
}


@functools.cache
def module(kind):
    """A module with parameters of no special value, and what the plain form gives."""
    made = getattr(jaxkv.nnx, kind)(FEATURES, **KINDS[kind][0], rngs=nnx.Rngs(0))
    random = np.random.default_rng(0)
    state = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape) * 0.5, x.dtype), nnx.state(made))
    nnx.update(made, state)
    x = random.normal(size=(ROWS, LENGTH, FEATURES)).astype(np.float32)
    params = {name: np.asarray(value, np.float64) for name, value in jaxkv.state_dict(made).items()}
    return made, x, KINDS[kind][1](params, x.astype(np.float64))


@nnx.jit
def call(module, x, layer=None, step=None, positions=None):
    return module(x, layer, step, positions=positions)


def feed(module, cache, x, positions):
    cache, step = cache.begin(jnp.asarray(positions, jnp.int32))
    y, layer = call(module, jnp.asarray(x), cache.layers[0], step)
    return np.asarray(y), cache.with_layers([layer])


def assert_close(got, want, atol=1e-4):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=atol)


def new_cache(made, **options):
    spec = made.layer_spec(every=3, keep=4)
    return jaxkv.Cache.init([spec], ROWS, LENGTH + 4, **{"max_block": LENGTH, **options})


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_cache_padding_anywhere_changes_nothing(kind):
    made, x, want = module(kind)
    assert_close(call(made, x), want)
    places = np.sort(np.random.default_rng(1).permutation(LENGTH + 3)[:LENGTH])
    spread, positions = np.full((ROWS, LENGTH + 3, FEATURES), 9.0, np.float32), np.full((ROWS, LENGTH + 3), -1)
    spread[:, places], positions[:, places] = x, np.arange(LENGTH)
    got = np.asarray(call(made, spread, positions=jnp.asarray(positions)))
    assert_close(got[:, places], want)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_any_split_and_single_tokens_give_the_whole(kind):
    made, x, want = module(kind)
    for cuts in ((0, 12), (0, 4, 8, 12), range(13)):
        cache, parts = new_cache(made), []
        for begin, end in zip(cuts[:-1], cuts[1:], strict=True):
            y, cache = feed(made, cache, x[:, begin:end], np.tile(np.arange(begin, end), (ROWS, 1)))
            parts.append(y)
        assert_close(np.concatenate(parts, 1), want)


@pytest.mark.parametrize("kind", KINDS)
def test_ragged_rows_go_back_to_checkpoints_inside_a_block_and_on(kind):
    made, x, want = module(kind)
    cache = new_cache(made, slack=2)
    positions = np.tile(np.arange(LENGTH), (ROWS, 1))
    positions[1, [0, 5, 11]] = -1  # row 1 brings 9 tokens, with padding on both sides and between
    columns = positions[1] >= 0
    positions[1, columns] = np.arange(9)
    block = x.copy()
    block[1, columns] = x[1, :9]
    y, cache = feed(made, cache, block, positions)
    assert_close(y[0], want[0])
    assert_close(y[1, columns], want[1, :9])
    for asked, landed in (([10, 8], [10, 8]), ([9, 5], [9, 3]), ([5, 6], [3, 6])):
        back = cache.rewind(jnp.asarray(asked, jnp.int32))
        np.testing.assert_array_equal(back.lengths, landed)
        tokens = np.stack([x[row, n : n + 1] for row, n in enumerate(landed)])
        y, _ = feed(made, back, tokens, np.asarray(landed)[:, None])
        assert_close(y[:, 0], np.stack([want[row, n] for row, n in enumerate(landed)]))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_through_a_cache_are_those_without(kind):
    made, x, _ = module(kind)
    graphdef, state = nnx.split(made)

    def uncached(state, x):
        return jnp.sin(nnx.merge(graphdef, state)(x)).sum()

    def cached(state, x):
        made, cache, total = nnx.merge(graphdef, state), new_cache(made_spec), 0.0
        for begin, end in ((0, 7), (7, 12)):
            cache, step = cache.begin(jnp.tile(jnp.arange(begin, end), (ROWS, 1)))
            y, layer = made(x[:, begin:end], cache.layers[0], step)
            cache, total = cache.with_layers([layer]), total + jnp.sin(y).sum()
        return total

    made_spec = made
    got, want = (jax.jit(jax.grad(f, (0, 1)))(state, x) for f in (cached, uncached))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(a, b, atol=1e-3)
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(want))


@pytest.mark.parametrize("kind", KINDS)
def test_linen_and_nnx_share_names_and_numbers(kind):
    made, x, want = module(kind)
    twin = getattr(jaxkv.linen, kind)(FEATURES, **KINDS[kind][0])
    apply = jax.jit(lambda params, *args: twin.apply({"params": params}, *args))
    params = nnx.to_pure_dict(nnx.state(made))
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(twin.init, jax.random.key(0), x)["params"])
    assert shapes == jax.tree.map(jnp.shape, params)
    assert twin.layer_spec() == made.layer_spec()
    cache = new_cache(made)
    for begin in (0, 6):
        cache, step = cache.begin(begin + jnp.tile(jnp.arange(6), (ROWS, 1)))
        y, layer = apply(params, x[:, begin : begin + 6], cache.layers[0], step)
        cache = cache.with_layers([layer])
        assert_close(y, want[:, begin : begin + 6])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flavor", ["nnx", "linen"])
def test_a_module_s_own_cache_takes_prompts_and_tokens(kind, flavor):
    made, x, want = module(kind)
    if flavor == "nnx":
        alone = nnx.clone(made)
        alone.init_cache(ROWS, LENGTH, every=3)
        assert alone.cache.get_value().specs == (made.layer_spec(every=3),)
        decode = nnx.jit(lambda module, x, positions: module.decode(x, positions))
        call, held = functools.partial(decode, alone), alone.cache.get_value
    else:
        twin = getattr(jaxkv.linen, kind)(FEATURES, **KINDS[kind][0], decode=True)
        state = {"cache": jax.jit(twin.init)(jax.random.key(0), x)["cache"]}  # as long as x, and left empty
        params = {"params": nnx.to_pure_dict(nnx.state(made))}
        decode = jax.jit(lambda state, *args: twin.apply(params | state, args[0], positions=args[1], mutable=["cache"]))

        def call(x, positions):
            y, new = decode(state, x, positions)
            state.update(new)
            return y

        def held():
            return state["cache"]["kv"]

    assert (held().lengths.tolist(), held().capacity) == ([0] * ROWS, LENGTH)
    positions = np.tile(np.arange(-1, 6, dtype=np.int32), (ROWS, 1))  # the first one is padding
    padded = np.concatenate([np.full((ROWS, 1, FEATURES), 9.0, np.float32), x[:, :6]], 1)
    parts = [call(padded, positions)[:, 1:], *(call(x[:, t : t + 1], None) for t in range(6, LENGTH))]
    assert_close(np.concatenate(parts, 1), want)
    assert np.asarray(call(x[:, :1], None)).shape == (ROWS, 1, FEATURES) and not held().ok.any()


def test_spans_are_refused_where_a_state_is_kept():
    alone = nnx.clone(module("ShortConv")[0])
    alone.init_cache(ROWS, LENGTH)
    with pytest.raises(ValueError, match=r"spans were given to a layer of Recurrent.* one by one"):
        alone.decode(jnp.ones((ROWS, 2, FEATURES)), spans=jnp.ones((ROWS, 2), jnp.int32))


def test_what_does_not_belong_to_a_module_is_refused():
    made, x, _ = module("ShortConv")
    cache = new_cache(made)
    cache, step = cache.begin(jnp.tile(jnp.arange(LENGTH), (ROWS, 1)))
    other = jaxkv.nnx.ShortConv(FEATURES, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"tail=\(8, 3\).*tail=\(8, 2\)"):
        other(x, cache.layers[0], step)
    with pytest.raises(ValueError, match="give both, a StateLayer and a Step"):
        made(x, cache.layers[0])
    with pytest.raises(ValueError, match="they must agree"):
        made(x[:, :3], cache.layers[0], step)
    with pytest.raises(ValueError, match="kernel_size is a whole number of at least 2"):
        jaxkv.nnx.ShortConv(FEATURES, kernel_size=1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="no keys and values"):
        jaxkv.attend(jnp.ones((ROWS, LENGTH, 1, 8)), cache.layers[0], step)


def in_chunks(q, k, v, g, beta, state, counts=None):
    """`fading_memory` as XLA computes it."""
    return fading._in_chunks(q, k, v, g, state, beta, counts)


FORMS = {"in chunks": in_chunks, "as it is chosen": fading.fading_memory}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("beta", [True, False], ids=["delta rule", "plain"])
def test_several_chunks_are_the_plain_scan_and_give_the_state_after_any_token(beta, form):
    random = np.random.default_rng(0)
    heads, length, size = 2, 2 * fading.CHUNK + 9, 4
    q, k, v = (random.normal(size=(ROWS, length, heads, size)) for _ in range(3))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    g, b = -random.exponential(size=(ROWS, length, heads)), random.uniform(size=(ROWS, length, heads))
    g[1, 70:] = b[1, 70:] = v[1, 70:] = 0  # row 1 has 70 tokens
    states, read = [random.normal(size=(ROWS, heads, size, size))], []
    for t in range(length):
        state = states[-1] * np.exp(g[:, t])[:, :, None, None]
        new = v[:, t]
        if beta:
            new = (new - np.einsum("bhkv,bhk->bhv", state, k[:, t])) * b[:, t, :, None]
        states.append(state + k[:, t, :, :, None] * new[:, :, None])
        read.append(np.einsum("bhkv,bhk->bhv", states[-1], q[:, t]))
    counts = np.array([[length, 64, 1, 65, 0], [70, 64, 63, 69, 0]], np.int32)
    args = [jnp.asarray(x, jnp.float32) for x in (q, k, v, g, b, states[0])]
    y, after = jax.jit(FORMS[form])(*args[:4], args[4] if beta else None, args[5], counts)
    assert_close(y[0], np.stack(read, 1)[0])
    assert_close(y[1, :70], np.stack(read, 1)[1, :70])
    wanted = [[states[n][row] for n in counts[row]] for row in range(ROWS)]
    assert_close(after, np.array(wanted))


@pytest.mark.parametrize("form", FORMS)
def test_the_delta_rule_is_exact_where_all_keys_are_nearly_alike_and_nothing_fades(form):
    # The powers of the triangular system grow up to 1e17 there, though its solution does not.
    random = np.random.default_rng(0)
    shape = (1, fading.CHUNK, 1, 8)
    q, k, v = (random.normal(size=shape) for _ in range(3))
    k = np.ones(shape) + 0.1 * k
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    state, read = np.zeros((8, 8)), []
    for t in range(fading.CHUNK):
        state = state + np.outer(k[0, t, 0], v[0, t, 0] - state.T @ k[0, t, 0])
        read.append(state.T @ q[0, t, 0])
    g, b = np.zeros(shape[:3]), np.ones(shape[:3])
    args = [jnp.asarray(x, jnp.float32) for x in (q, k, v, g, b, np.zeros((1, 1, 8, 8)))]
    assert_close(jax.jit(FORMS[form])(*args)[0][0, :, 0], np.stack(read))


@pytest.mark.usefixtures("native_kernel")
@pytest.mark.parametrize("instructions", build.SETS)
def test_the_native_library_remembers_any_sizes_as_xla_does_and_a_split_changes_no_bit(instructions, monkeypatch):
    monkeypatch.setenv("JAXKV_NATIVE", instructions)
    library.problem.cache_clear()
    assert library.problem() is None
    random = np.random.default_rng(1)
    run = jax.jit(fading.fading_memory)
    for heads, keys, values in ((3, 5, 70), (1, 128, 128)):
        shapes = ((keys,), (keys,), (values,), (), ())
        args = [random.normal(size=(ROWS, 6, heads, *shape)).astype(np.float32) for shape in shapes]
        args[1] /= np.linalg.norm(args[1], axis=-1, keepdims=True)
        args[3], args[4] = -abs(args[3]), abs(args[4]) % 1
        state = random.normal(size=(ROWS, heads, keys, values)).astype(np.float32)
        counts = np.full((ROWS, 1), 6, np.int32)
        assert CALL in run.lower(*args, state, counts).as_text()
        got = run(*args, state, counts)
        for mine, xlas in zip(got, in_chunks(*args, state, counts), strict=True):
            assert_close(mine, xlas, atol=1e-5)
        for t in range(6):
            y, state = run(*(x[:, t : t + 1] for x in args), state, np.ones((ROWS, 1), np.int32))
            state = state[:, 0]
            np.testing.assert_array_equal(y[:, 0], got[0][:, t])
        np.testing.assert_array_equal(state, got[1][:, 0])
    monkeypatch.delenv("JAXKV_NATIVE")
    library.problem.cache_clear()
    assert library.problem() is None


@pytest.mark.usefixtures("native_kernel")
def test_gradients_vmap_and_exports_have_the_form_of_xla():
    args = [jnp.ones((1, 2, 1, 4)) / 2] * 3 + [jnp.zeros((1, 2, 1)), jnp.ones((1, 2, 1)), jnp.ones((1, 1, 4, 4))]
    loss = lambda f: lambda q, *rest: (f(q, *rest)[0] ** 2).sum()  # noqa: E731
    for change in (jax.grad, jax.jacfwd):
        got, want = (jax.jit(change(loss(form)))(*args) for form in FORMS.values())
        np.testing.assert_allclose(got, want, rtol=1e-6)
    several = [x[None].repeat(2, 0) for x in args]
    got, want = (jax.jit(jax.vmap(form))(*several)[0] for form in FORMS.values())
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert CALL not in jax.jit(jax.vmap(fading.fading_memory)).lower(*several).as_text()
    exported = jax.export.export(jax.jit(fading.fading_memory))(*args)
    assert CALL not in exported.mlir_module()
