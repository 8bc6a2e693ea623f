"""The product of a few tokens with a matrix [out, in], on a CPU as a sum."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.nn.product import product

RANDOM = np.random.default_rng(0)
KERNEL = jnp.asarray(RANDOM.normal(size=(512, 256)).astype(np.float32))


def how(x, kernel=KERNEL):
    text = str(jax.make_jaxpr(product)(x, kernel))
    return "product" if "dot_general" in text else "sum"


@pytest.mark.parametrize("shape", [(1, 1, 256), (4, 1, 256), (2, 9, 256), (33, 256)])
def test_a_product_is_the_same_however_many_tokens_there_are(shape):
    x = jnp.asarray(RANDOM.normal(size=shape).astype(np.float32))
    wanted = np.asarray(x, np.float64) @ np.asarray(KERNEL, np.float64).T
    np.testing.assert_allclose(jax.jit(product)(x, KERNEL), wanted, atol=2e-4)
    _, backward = jax.vjp(product, x, KERNEL)
    dx, dkernel = backward(jnp.ones(wanted.shape, np.float32))
    np.testing.assert_allclose(dx, np.broadcast_to(np.asarray(KERNEL).sum(0), shape), atol=2e-4)
    np.testing.assert_allclose(dkernel[0], np.asarray(x).reshape(-1, 256).sum(0), atol=2e-4)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other devices have matrix products for few tokens")
def test_few_tokens_are_summed_if_the_matrix_is_large_and_in_float32():
    assert how(jnp.ones((4, 1, 256))) == "sum"
    assert how(jnp.ones((1, 1, 256))) == how(jnp.ones((33, 256))) == "product"
    assert how(jnp.ones((4, 256)), KERNEL[:8]) == "product"
    assert how(jnp.ones((4, 256), jnp.bfloat16), KERNEL.astype(jnp.bfloat16)) == "product"
