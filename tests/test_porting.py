"""Attention weights of PyTorch and transformers: tests/golden/make_attention.py says what they compute."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxkv
from jaxkv import safetensors
from jaxkv.nn.porting import attention_params

GOLDEN = safetensors.File(Path(__file__).parent / "golden" / "attention.safetensors")
KINDS = {
    "torch": dict(use_bias=True),
    "gpt2": dict(use_bias=True),
    "llama": dict(num_kv_heads=2, head_dim=4, use_bias=False, rotary=jaxkv.Rotary(10_000.0)),
    "qwen3": dict(num_kv_heads=2, head_dim=4, use_bias=False, rotary=jaxkv.Rotary(10_000.0), qk_norm=True),
    "phi3": dict(num_kv_heads=2, use_bias=False, rotary=jaxkv.Rotary(10_000.0)),
}


def of(kind):
    tensors = {name.removeprefix(f"{kind}/"): x for name, x in GOLDEN.items() if name.startswith(f"{kind}/")}
    return tensors, tensors.pop("x"), tensors.pop("y")


@pytest.mark.parametrize("kind", KINDS)
def test_ported_weights_give_the_numbers_of_their_library(kind):
    weights, x, y = of(kind)
    params = attention_params(weights, num_heads=4)
    attn = jaxkv.nnx.Attention(4, 8, rngs=nnx.Rngs(0), **KINDS[kind])
    assert nnx.to_pure_dict(nnx.state(attn)).keys() == params.keys()
    nnx.update(attn, params)
    np.testing.assert_allclose(attn(jnp.asarray(x)), y, atol=2e-5)
    linen = jaxkv.linen.Attention(4, 8, **KINDS[kind])
    np.testing.assert_allclose(linen.apply({"params": params}, jnp.asarray(x)), y, atol=2e-5)


def test_torch_s_own_attention_where_it_is_installed():
    torch = pytest.importorskip("torch")
    theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True, kdim=6, vdim=6, dtype=torch.bfloat16).float()
    x, encoded = torch.randn(2, 3, 8), torch.randn(2, 5, 6)
    ours = jaxkv.nnx.CrossAttention(2, 8, 6, size=5, rngs=nnx.Rngs(0))
    nnx.update(ours, attention_params(theirs.state_dict(), num_heads=2))
    want = theirs(x, encoded, encoded)[0].detach().numpy()
    np.testing.assert_allclose(ours(jnp.asarray(x.numpy()), encoded=jnp.asarray(encoded.numpy())), want, atol=2e-5)
    assert attention_params(theirs.bfloat16().state_dict(), 2)["query"]["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("change", "num_heads", "message"),
    [
        (lambda w: w | {"bias_k": np.ones(1)}, 4, "not known: bias_k. Known are q_proj, "),
        (lambda w: {f"attn.{k}": v for k, v in w.items()}, 4, "not known: attn.k_proj.weight, attn.o_proj.weight"),
        (lambda w: {k: v for k, v in w.items() if "v_proj" not in k}, 4, "no weight for value; got "),
        (lambda w: w, 3, r"num_heads=3 does not divide the projections \[out, in\]"),
    ],
)
def test_weights_that_are_no_attention_are_refused_by_name(change, num_heads, message):
    with pytest.raises(ValueError, match=message):
        attention_params(change(of("llama")[0]), num_heads)
