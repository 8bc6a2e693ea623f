"""A few tokens times a matrix: the native library's product beside NumPy's in double precision."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxkv.models.decoder import Decoder, DecoderConfig
from jaxkv.native import build, library
from jaxkv.nn import product
from jaxkv.nn.product import MOST_TOKENS, dot_general, tied

pytestmark = pytest.mark.usefixtures("native_kernel")
CALL = "custom_call @jaxkv_product"
LAYOUTS = ("[in, out]", "[out, in]")


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def weights(layout, inner=261, outer=307):
    w = normal(1, inner, outer)
    return w if layout == "[in, out]" else np.ascontiguousarray(w.T)


def times(x, w, layout):
    return dot_general(x, w, (((x.ndim - 1,), (LAYOUTS.index(layout),)), ((), ())))


def exact(x, w, layout):
    return x.astype(np.float64) @ (w if layout == "[in, out]" else w.T).astype(np.float64)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("instructions", build.SETS)
def test_any_number_of_tokens_and_sizes_that_vectors_do_not_divide_equal_numpy(layout, instructions, monkeypatch):
    monkeypatch.setenv("JAXKV_NATIVE", instructions)
    library.problem.cache_clear()
    assert library.problem() is None
    for tokens, inner, outer in (
        (2, 261, 307),
        (3, 1, 70_001),
        (7, 70_001, 1),
        (MOST_TOKENS, 300, 1030),
        (5, 768, 512),
    ):
        x, w = normal(2, tokens, inner), weights(layout, inner, outer)
        run = jax.jit(functools.partial(times, layout=layout))
        assert CALL in run.lower(x, w).as_text()
        np.testing.assert_allclose(run(x, w), exact(x, w, layout), atol=2e-6 * inner)
    monkeypatch.delenv("JAXKV_NATIVE")
    library.problem.cache_clear()
    assert library.problem() is None


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("instructions", build.SETS)
def test_sums_of_weights_of_16_bits_are_rounded_once(instructions, layout, dtype, monkeypatch):
    monkeypatch.setenv("JAXKV_NATIVE", instructions)
    library.problem.cache_clear()
    assert library.problem() is None
    epsilon = float(jnp.finfo(dtype).eps)
    for tokens, inner, outer in ((1, 261, 307), (3, 261, 307), (1, 1030, 70), (MOST_TOKENS, 300, 1030)):
        x, w = normal(2, tokens, inner).astype(dtype), weights(layout, inner, outer).astype(dtype)
        want = exact(x, w, layout)
        numbers = (((1,), (LAYOUTS.index(layout),)), ((), ()))
        for kept, error in ((dtype, epsilon / 2 * np.abs(want)), (jnp.float32, 0)):
            run = jax.jit(functools.partial(dot_general, dimension_numbers=numbers, preferred_element_type=kept))
            assert CALL in run.lower(x, w).as_text()
            got = run(x, w)
            assert got.dtype == kept
            assert np.all(np.abs(np.asarray(got, np.float64) - want) <= error + 1e-6 * inner)
    monkeypatch.delenv("JAXKV_NATIVE")
    library.problem.cache_clear()
    assert library.problem() is None


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_weights_of_16_bits_are_read_where_they_lie(dtype):
    x, w = normal(2, 2, 261).astype(dtype), weights("[in, out]").astype(dtype)
    program = jax.jit(functools.partial(times, layout="[in, out]")).lower(x, w).compile().as_text()
    assert "jaxkv_product" in program and not re.search(r"f32\[261,307\]", program)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_derivatives_in_both_modes_are_those_of_the_product_of_xla(layout):
    x, w, seen = normal(3, 2, 3, 261), weights(layout), normal(4, 2, 3, 307)
    numbers = (((2,), (LAYOUTS.index(layout),)), ((), ()))

    def loss(product, x, w):
        return (product(x, w, numbers) * seen).sum()

    ours, theirs = (functools.partial(loss, each) for each in (dot_general, jax.lax.dot_general))
    for one, other in zip(jax.grad(ours, (0, 1))(x, w), jax.grad(theirs, (0, 1))(x, w), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    pushed = [jax.jvp(f, (x, w), (x + 1, w + 1))[1] for f in (ours, theirs)]
    np.testing.assert_allclose(*pushed, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vmap_over_tokens_is_one_call_and_over_weights_the_product_of_xla(layout):
    x, w = normal(5, 4, 1, 261), weights(layout)
    over_tokens = jax.jit(jax.vmap(functools.partial(times, layout=layout), in_axes=(0, None)))
    assert over_tokens.lower(x, w).as_text().count(CALL) == 1
    np.testing.assert_allclose(over_tokens(x, w), exact(x, w, layout), atol=1e-4)
    many, both = np.stack([w, 2 * w]), jax.jit(jax.vmap(functools.partial(times, layout=layout)))
    assert CALL not in both.lower(x[:2], many).as_text()
    np.testing.assert_allclose(both(x[:2], many)[1], 2 * exact(x[1], w, layout), atol=2e-4)


def test_loops_x64_checks_for_nan_and_no_jit_change_nothing():
    x, w = normal(6, 3, 300), normal(7, 300, 300) / 20

    def three(x):
        return jax.lax.scan(lambda x, _: (times(x, w, "[in, out]"), None), x, None, 3)[0]

    want = exact(exact(exact(x, w, "[in, out]"), w, "[in, out]"), w, "[in, out]")
    np.testing.assert_allclose(three(x), want, atol=1e-4)
    for switch in (jax.enable_x64(True), jax.debug_nans(True), jax.disable_jit()):
        with switch:
            np.testing.assert_allclose(three(x), want, atol=1e-4)


def test_what_is_exported_or_divided_or_has_other_numbers_is_the_product_of_xla():
    w, run = weights("[in, out]"), jax.jit(functools.partial(times, layout="[in, out]"))
    x = normal(8, 4, 261)
    assert CALL in run.lower(x, w).as_text()
    exported = jax.export.export(run)(x, w)
    assert "jaxkv_product" not in exported.mlir_module()
    np.testing.assert_allclose(exported.call(x, w), run(x, w), atol=1e-4)
    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("i"))
    assert "jaxkv_product" not in run.lower(jax.device_put(x, place), w).as_text()
    np.testing.assert_allclose(run(jax.device_put(x, place), w), run(x, w), atol=1e-4)
    for others in (normal(8, 1, 261), normal(8, MOST_TOKENS + 1, 261), x.astype(jnp.float8_e5m2)):
        assert CALL not in run.lower(others, w.astype(others.dtype)).as_text()
    small = normal(9, 261, 8)  # a call would cost more than it brings
    assert CALL not in run.lower(x, small).as_text()


def test_buffers_that_do_not_fit_together_are_an_error_and_never_read():
    x, w = normal(1, 3, 20), normal(2, 21, 30)
    for operands, transposed, result, reason in (
        ((x, w), 0, (3, 30), "don't fit together"),
        ((x, w[:20]), 1, (3, 20), "don't fit together"),
        ((x, w[:20]), 0, (3, 31), "don't fit together"),
        ((x[0], w[:20]), 0, (3, 30), "wrong ranks"),
        ((x.astype(np.int32), w[:20]), 0, (3, 30), "tokens that are not float32"),
        ((x, w[:20].astype(np.int32)), 0, (3, 30), "weights that are not floats of 32 or 16 bits"),
        ((x[:, :0], w[:0]), 0, (3, 30), "sizes that are not read"),
    ):
        call = jax.ffi.ffi_call(library.PRODUCT, jax.ShapeDtypeStruct(result, jnp.float32))
        with pytest.raises(jax.errors.JaxRuntimeError, match=reason):
            jax.block_until_ready(call(*operands, transposed=np.int64(transposed)))


def groups(x, w, sizes):
    result = jax.ShapeDtypeStruct((x.shape[0], w.shape[-1]), jnp.float32)
    return jax.block_until_ready(jax.ffi.ffi_call(library.GROUPS, result)(x, w, np.asarray(sizes, np.int32)))


@pytest.mark.parametrize("instructions", build.SETS)
def test_tokens_of_groups_are_multiplied_by_the_matrix_of_their_group(instructions, monkeypatch):
    monkeypatch.setenv("JAXKV_NATIVE", instructions)
    library.problem.cache_clear()
    assert library.problem() is None
    try:
        # Groups of no token, of more than a task takes, and of any number; the last tokens are of no group.
        for sizes, inner, outer in (((0, 130, 3, 0, 18, 1), 261, 75), ((1, 0, 0, 2), 70, 1030), ((0, 0), 5, 6)):
            x, ends = normal(1, sum(sizes) + 2, inner), np.cumsum(sizes)
            w = normal(2, len(sizes), inner, outer).astype(jnp.bfloat16)
            want = np.zeros((len(x), outer))
            for matrix, end, size in zip(w.astype(np.float64), ends, sizes, strict=True):
                want[end - size : end] = x[end - size : end].astype(np.float64) @ matrix
            for dtype in (jnp.float32, jnp.bfloat16):
                np.testing.assert_allclose(groups(x, w.astype(dtype), sizes), want, atol=2e-6 * inner)
    finally:
        monkeypatch.delenv("JAXKV_NATIVE")
        library.problem.cache_clear()
        assert library.problem() is None


def test_groups_that_do_not_fit_are_an_error_and_never_read():
    x, w = normal(1, 5, 20), normal(2, 3, 20, 30)
    for operands, reason in (
        ((x, w, (2, 2, 2)), "groups of more tokens than there are"),
        ((x, w, (2**31 - 1, 2**31 - 1, 2**31 - 1)), "groups of more tokens than there are"),
        ((x, w, (3, -1, 3)), "a group of fewer than 0 tokens"),
        ((x, w, (3, 2)), "don't fit together"),
        ((x[:, :19], w, (2, 2, 1)), "don't fit together"),
        ((x, w[0], (2, 2, 1)), "wrong ranks"),
        ((x.astype(np.int32), w, (2, 2, 1)), "not float32"),
        ((x, w.astype(np.int32), (2, 2, 1)), "weights that are not floats"),
        ((x, w[:0], ()), "sizes that are not read"),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match=reason):
            groups(*operands)


def test_all_projections_of_a_model_take_it_and_its_logits_stay_the_same_up_to_rounding(monkeypatch):
    config = DecoderConfig(
        vocab_size=600, width=256, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=64, mlp_dim=300, tied=True
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    tokens = jnp.arange(6, dtype=jnp.int32).reshape(2, 3)
    run = nnx.jit(lambda model, tokens: model(tokens))
    projections = ["query", "key", "value", "out", "gate", "up", "down", "head"]
    assert str(jax.make_jaxpr(lambda tokens: model(tokens))(tokens)).count(f"{library.PRODUCT}[") == len(projections)
    assert CALL in run.lower(model, tokens).as_text()
    with_it = run(model, tokens)
    monkeypatch.setattr(product, "_form", lambda *_, **__: None)
    without = nnx.jit(lambda model, tokens: model(tokens))(model, tokens)
    for one, other in zip(jax.tree.leaves(with_it), jax.tree.leaves(without), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    np.testing.assert_allclose(tied(model.embed, normal(1, 2, 256)), model.embed.attend(normal(1, 2, 256)), atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 3])
def test_what_xla_multiplies_keeps_the_precision_that_was_asked_for(tokens, monkeypatch):
    monkeypatch.setenv("JAXKV_NATIVE", "0")
    library.problem.cache_clear()
    try:
        x, w = normal(1, tokens, 256), normal(2, 256, 300)

        def multiply(x, w, precision=jax.lax.Precision.HIGHEST):
            return dot_general(x, w, (((1,), (0,)), ((), ())), precision=precision)

        for function in (multiply, jax.grad(lambda x, w: multiply(x, w).sum(), argnums=(0, 1))):
            text = jax.jit(function).lower(x, w).as_text()
            assert "dot_general" in text and "DEFAULT" not in text and "HIGHEST" in text
        with jax.default_matmul_precision("highest"):
            text = jax.jit(functools.partial(multiply, precision=None)).lower(x, w).as_text()
        assert "DEFAULT" not in text and "HIGHEST" in text
    finally:
        monkeypatch.undo()
        library.problem.cache_clear()
