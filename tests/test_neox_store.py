"""The GPT-NeoX of the example, whose layers hand on their past through the store, is transformers' GPT-NeoX.

tests/golden/neox.safetensors is what transformers computed (tests/golden/make_neox.py).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxkv
from jaxkv import get_store, use_store

ROOT = Path(__file__).parent.parent


def module_of(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example = module_of(ROOT / "examples" / "neox_store.py")


def model_of(tensors, vocab=48, width=16, heads=2, layers=2):
    model = nnx.eval_shape(lambda: example.NeoX(vocab, width, heads, layers, rngs=nnx.Rngs(0)))
    example.load_transformers(model, tensors)
    return model


@pytest.fixture(scope="module")
def golden():
    tensors = jaxkv.load_state(ROOT / "tests" / "golden" / "neox.safetensors")
    return {name: np.asarray(tensors.pop(name)) for name in ("tokens", "logits", "greedy")}, model_of(tensors)


@pytest.fixture(scope="module")
def decoding(golden):
    return example.Decoding(golden[1])


def test_its_logits_are_those_of_transformers_in_one_piece_and_through_the_store(golden, decoding):
    facts, model = golden
    tokens = jnp.asarray(facts["tokens"])[None]
    np.testing.assert_allclose(decoding.whole(tokens)[0], facts["logits"], rtol=1e-4, atol=2e-5)
    store, parts = model.empty_store(1, 20), []
    for begin, end in ((0, 5), (5, 11), (11, 12)):
        logits, store = decoding.step(store, tokens[:, begin:end])
        parts.append(logits[0])
    np.testing.assert_allclose(jnp.concatenate(parts), facts["logits"], rtol=1e-4, atol=2e-5)
    assert int(store.get("length")) == 12 and store.q_size("attn_kv") == 2


def test_its_texts_are_those_of_transformers_and_of_no_cache_and_a_step_compiles_once(golden):
    facts, model = golden
    decoding = example.Decoding(model)
    prompt, steps = facts["tokens"].tolist(), len(facts["greedy"]) - 1
    tokens, _ = decoding.with_store(prompt, steps)
    others, _ = decoding.without(prompt, steps)
    assert tokens == others == facts["greedy"].tolist()
    assert decoding.compilations == {"with the store": ["12 tokens", "1 tokens"], "without a cache": ["111 tokens"]}


def test_each_layer_finds_its_own_past_in_the_one_queue(golden, decoding):
    facts, model = golden
    tokens = jnp.asarray(facts["tokens"])[None]
    _, store = decoding.step(model.empty_store(1, 12), tokens)
    x = model.embed_in(tokens)
    for layer in model.layers:
        past, store = store.pop("attn_kv")
        empty = jax.tree.map(jnp.zeros_like, past)
        with use_store(jaxkv.Store().set("use_cache", True).set("length", jnp.int32(0)).push("attn_kv", empty)):
            x = layer(x)
            alone, _ = get_store().pop("attn_kv")
        for got, want in zip(past, alone, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert store.q_size("attn_kv") == 0


@pytest.mark.optimized
def test_the_buffers_are_written_in_place(golden, decoding):
    store = golden[1].empty_store(1, 512)
    compiled = decoding.step.func.lower(*decoding.step.args, store, jnp.zeros((1, 1), jnp.int32)).compile()
    size, memory = sum(x.nbytes for x in jax.tree.leaves(store)), compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= size and memory.temp_size_in_bytes < size


def test_it_is_the_architecture_of_transformers_at_another_size(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 3}
    config = transformers.GPTNeoXConfig(**sizes, num_attention_heads=3, rotary_pct=0.25, max_position_embeddings=64)
    theirs = transformers.GPTNeoXForCausalLM(config).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
        tokens = torch.randint(0, 64, (2, 17))
        want = theirs(tokens).logits.numpy()
    ours = model_of({name: x.numpy() for name, x in theirs.state_dict().items()}, 64, 96, 3, 3)
    with use_store():
        got = ours(jnp.asarray(tokens.numpy(), jnp.int32))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-4)
