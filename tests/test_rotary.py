"""Rotary: the numbers of transformers, turning on by shift, conventions, dtypes, bad input."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.nn import rotary as rotary_module
from jaxkv.nn.rotary import LinearScaling, Llama3Scaling, Rotary, YarnScaling

GOLDEN = json.loads((Path(__file__).parent / "golden" / "rotary.json").read_text())
VARIANTS = [
    Rotary(),
    Rotary(theta=500.0, dim=4),
    Rotary(interleaved=True),
    Rotary(dim=6, interleaved=True, scaling=LinearScaling(2.0)),
    Rotary(scaling=Llama3Scaling(original_length=64)),
    Rotary(scaling=YarnScaling(4.0, 64)),
]


@functools.partial(jax.jit, static_argnums=0)
def rotate(rotary, x, positions):
    return rotary.rotate(x, positions)


@functools.partial(jax.jit, static_argnums=0)
def shift(rotary, k, delta):
    return rotary.shift(k, delta)


def rotary_of(arguments):
    """A Rotary from a case of the golden file."""
    arguments = dict(arguments)
    for name, rest in arguments.pop("scaling", {}).items():
        arguments["scaling"] = getattr(rotary_module, name)(**rest)
    return Rotary(**arguments)


def some(shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def at(*positions):
    """Positions of one sequence, in the shape that goes with [B, T, N, H]."""
    return jnp.array(positions, jnp.int32)[None, :, None, None]


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_numbers_are_those_of_transformers(case):
    rotary = rotary_of(case["rotary"])
    shape = tuple(case["shape"])
    np.testing.assert_allclose(rotary.frequencies(shape[-1]), case["frequencies"], rtol=5e-6)
    magnitude = 1.0 if rotary.scaling is None else rotary.scaling.magnitude
    assert magnitude == pytest.approx(case["attention_factor"], rel=1e-6)
    x = ((np.arange(math.prod(shape)) * 37 % 101 - 50) / 32).reshape(shape).astype(np.float32)
    y = rotate(rotary, jnp.asarray(x), at(*GOLDEN["positions"]))
    np.testing.assert_allclose(y, np.reshape(case["rotated"], shape), atol=1e-4)


@pytest.mark.parametrize("rotary", VARIANTS)
def test_shift_of_rotated_is_rotated_elsewhere(rotary):
    x = some((1, 3, 2, 8))
    there = shift(rotary, rotate(rotary, x, at(0, 5, 40)), at(7, -5, -13))
    np.testing.assert_allclose(there, rotate(rotary, x, at(7, 0, 27)), atol=2e-5)


@pytest.mark.parametrize("rotary", VARIANTS)
def test_scores_depend_on_distance_alone(rotary):
    q, k = some((1, 2, 1, 8)), some((1, 2, 1, 8), seed=1)
    q, k = q[:, [0, 0]], k[:, [0, 0]]
    scores = (rotate(rotary, q, at(9, 59)) * rotate(rotary, k, at(4, 54))).sum(-1)[0, :, 0]
    assert float(abs(scores[0] - scores[1])) < 1e-4


def test_position_0_is_not_turned_and_dimensions_past_dim_never():
    x = some((1, 2, 1, 8))
    y = rotate(Rotary(dim=4), x, at(0, 3))
    np.testing.assert_array_equal(y[:, 0], x[:, 0])
    np.testing.assert_array_equal(y[..., 4:], x[..., 4:])
    assert not np.allclose(y[:, 1, :, :4], x[:, 1, :, :4])


def test_interleaved_is_half_split_with_dimensions_reordered():
    x = some((1, 3, 2, 8))
    order = np.arange(8).reshape(4, 2).T.reshape(-1)  # 0 2 4 6 1 3 5 7
    y = rotate(Rotary(interleaved=True), x, at(1, 2, 3))
    np.testing.assert_allclose(y[..., order], rotate(Rotary(), x[..., order], at(1, 2, 3)), atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_is_kept_and_arithmetic_is_float32(dtype):
    x = some((1, 2, 1, 8), dtype)
    y = rotate(Rotary(), x, at(3, 4000))
    assert y.dtype == x.dtype
    want = rotate(Rotary(), x.astype(jnp.float32), at(3, 4000))
    np.testing.assert_array_equal(y, want.astype(dtype))


def test_empty_positions_give_finite_numbers():
    y = rotate(Rotary(scaling=YarnScaling(4.0, 64)), some((1, 2, 1, 8)), at(-1, -1))
    assert bool(jnp.isfinite(y).all())


def test_jit_vmap_grad():
    rotary, x = Rotary(theta=100.0), some((2, 3, 1, 4))
    positions = jnp.array([[0, 1, 2], [5, 6, 7]])[:, :, None, None]
    want = rotary.rotate(x, positions)
    np.testing.assert_allclose(jax.jit(rotary.rotate)(x, positions), want, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(rotary.rotate)(x, positions), want, atol=1e-6)
    norms = jax.grad(lambda x: jnp.square(rotary.rotate(x, positions)).sum())(x)
    np.testing.assert_allclose(norms, 2 * x, atol=1e-5)  # turning keeps lengths


def test_equal_arguments_are_equal_and_hash_alike():
    assert Rotary(scaling=LinearScaling(2.0)) == Rotary(scaling=LinearScaling(2.0))
    assert len({Rotary(), Rotary(), Rotary(theta=2.0), Rotary(dim=2), Rotary(interleaved=True)}) == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rotary(theta=0.0), r"theta=0.0\): theta is above 0"),
        (lambda: Rotary(theta=float("nan")), "finite"),
        (lambda: Rotary(theta=True), "finite number"),
        (lambda: Rotary(dim=3), r"dim=3\): .* even"),
        (lambda: Rotary(dim=0), r"dim=0\): .* even"),
        (lambda: Rotary(dim=2.0), r"dim=2.0\): .* even"),
        (lambda: Rotary(scaling=4.0), r"scaling=4.0\): give None, LinearScaling"),
        (lambda: Rotary(scaling=LinearScaling), "give None, LinearScaling"),
        (lambda: Rotary(theta=1.0, scaling=YarnScaling(2.0, 64)), "theta is above 1"),
        (lambda: LinearScaling(0.5), r"factor=0.5\): factor is at least 1"),
        (lambda: YarnScaling(0.5, 64), r"factor=0.5\): factor is at least 1"),
        (lambda: YarnScaling(2.0, 0), "original_length is at least 1"),
        (lambda: YarnScaling(2.0, 64, beta_fast=1.0, beta_slow=2.0), "beta_fast is at least 2.0"),
        (lambda: YarnScaling(2.0, 64, attention_factor=0.0), "attention_factor is above 0"),
        (lambda: Llama3Scaling(factor=0), "factor is at least 1"),
        (lambda: Llama3Scaling(low_freq_factor=4.0, high_freq_factor=4.0), "high_freq_factor is above 4.0"),
        (lambda: Rotary(dim=8).frequencies(4), r"dim=8\) rotates more dimensions than a head has, 4"),
        (lambda: Rotary().frequencies(5), "a head of 5 dimensions"),
        (lambda: Rotary().rotate(some((1, 2, 1, 4)), jnp.zeros((1, 2), jnp.int32)), r"positions\[:, :, None, None\]"),
    ],
)
def test_bad_arguments_say_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("x", "positions"), [(jnp.zeros((1, 1, 1, 4), jnp.int32), at(0)), (some((1, 1, 1, 4)), at(0).astype(jnp.float32))]
)
def test_only_floating_x_and_integer_positions(x, positions):
    with pytest.raises(TypeError, match=r"int32|float32"):
        Rotary().rotate(x, positions)
