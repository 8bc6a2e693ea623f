"""A GPT-NeoX decoder whose attention layers hand on keys and values through queues of a store, compiled once.

    python examples/neox_store.py
    python examples/neox_store.py --layers 8 --width 512 --steps 199

It is the way of labml's annotated GPT-NeoX (https://nn.labml.ai/neox/utils/cache.html): nobody passes a cache down to
the layers. Each layer pops its past from the queue and pushes the new one, first in first out, so layer i finds what
layer i pushed in the step before. There the past grows, and the cache is a global; here it is a buffer of fixed size
and a length, and the store comes into the jitted step as an argument and goes out as a result. Weights are random.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxkv
from jaxkv import Store, get_store, set_store, use_store

VOCAB = 256  # bytes


class Attention(nnx.Module):
    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.query_key_value = nnx.Linear(width, 3 * width, rngs=rngs)
        self.dense = nnx.Linear(width, width, rngs=rngs)
        self.shape = (heads, width // heads)
        self.rotary = jaxkv.Rotary(dim=width // heads // 4)  # a quarter of each head is rotated

    def __call__(self, x):
        b, t, _ = x.shape
        heads, size = self.shape
        qkv = self.query_key_value(x).reshape(b, t, heads, 3 * size)  # per head: its q, k, v
        q, k, v = jnp.split(qkv, 3, axis=-1)  # [B, T, N, H]

        store = get_store()
        use_cache = store.get("use_cache", False)  # a Python bool: structure of the store, not data
        length = store.get("length") if use_cache else jnp.int32(0)
        positions = length + jnp.arange(t)
        q, k = (self.rotary.rotate(y, positions[None, :, None, None]) for y in (q, k))
        if use_cache:
            (k_past, v_past), store = store.pop("attn_kv")
            k, v = (
                jax.lax.dynamic_update_slice(past, new, (0, length, 0, 0)) for past, new in ((k_past, k), (v_past, v))
            )
            set_store(store.push("attn_kv", (k, v)))

        scores = jnp.einsum("btnh,bsnh->bnts", q, k) * size**-0.5
        visible = jnp.arange(k.shape[1])[None, :] <= positions[:, None]  # [T, S]; slots not yet written are later ones
        scores = jnp.where(visible[None, None], scores, -jnp.inf)
        y = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v)
        return self.dense(y.reshape(b, t, heads * size))


class MLP(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.dense_h_to_4h = nnx.Linear(width, 4 * width, rngs=rngs)
        self.dense_4h_to_h = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x):
        return self.dense_4h_to_h(nnx.gelu(self.dense_h_to_4h(x), approximate=False))


class Layer(nnx.Module):
    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.input_layernorm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.post_attention_layernorm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.attention = Attention(width, heads, rngs=rngs)
        self.mlp = MLP(width, rngs=rngs)

    def __call__(self, x):
        # Attention and MLP stand side by side: both read x, and both are added to it.
        return x + self.attention(self.input_layernorm(x)) + self.mlp(self.post_attention_layernorm(x))


class NeoX(nnx.Module):
    """GPT-NeoX; modules are named as in Hugging Face transformers."""

    def __init__(self, vocab: int, width: int, heads: int, layers: int, *, rngs: nnx.Rngs):
        self.embed_in = nnx.Embed(vocab, width, rngs=rngs)
        self.layers = nnx.List([Layer(width, heads, rngs=rngs) for _ in range(layers)])
        self.final_layer_norm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.embed_out = nnx.Linear(width, vocab, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        """Returns logits [B, T, V] of tokens [B, T]; knows nothing of caches."""
        x = self.embed_in(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.embed_out(self.final_layer_norm(x))

    def empty_store(self, batch: int, capacity: int) -> Store:
        """Returns the store before the first token: a queue with an empty past per layer."""
        store = Store().set("use_cache", True).set("length", jnp.int32(0))
        for layer in self.layers:
            shape = (batch, capacity, *layer.attention.shape)
            store = store.push("attn_kv", (jnp.zeros(shape), jnp.zeros(shape)))
        return store


def load_transformers(model: NeoX, tensors: Mapping[str, np.ndarray]) -> None:
    """Puts the weights of transformers' GPTNeoXForCausalLM, by their names there, into a model."""
    state = {}
    for name, tensor in tensors.items():
        path = name.removeprefix("gpt_neox.").replace("embed_in.weight", "embed_in.embedding")
        path = path.replace("lm_head.", "embed_out.")  # its name since transformers 5
        if path.endswith("norm.weight"):
            path = path.replace(".weight", ".scale")
        elif path.endswith(".weight"):
            path, tensor = path.replace(".weight", ".kernel"), np.asarray(tensor).T
        state[path] = tensor
    jaxkv.load_state_dict(model, state)


class Decoding:
    """The two ways to decode greedily, each as a compiled function, and for which inputs each was compiled."""

    def __init__(self, model: NeoX):
        self.model = model
        graph, params = nnx.split(model)
        self.compilations: dict[str, list[str]] = {"with the store": [], "without a cache": []}

        @functools.partial(jax.jit, donate_argnums=1)  # the buffers are written in place
        def step(params, store, tokens):
            self.compilations["with the store"].append(f"{tokens.shape[1]} tokens")
            with use_store(store):
                logits = nnx.merge(graph, params)(tokens)
                store = get_store()
                return logits, store.set("length", store.get("length") + tokens.shape[1])

        @jax.jit
        def whole(params, tokens):
            self.compilations["without a cache"].append(f"{tokens.shape[1]} tokens")
            with use_store():
                return nnx.merge(graph, params)(tokens)

        self.step, self.whole = functools.partial(step, params), functools.partial(whole, params)

    def with_store(self, prompt: list[int], steps: int) -> tuple[list[int], float]:
        """Returns the first token after a prompt and one more per step, and seconds per step once it is compiled."""
        store = self.model.empty_store(1, len(prompt) + steps)
        logits, store = self.step(store, jnp.array([prompt]))
        tokens, start = [int(logits[0, -1].argmax())], 0.0
        for i in range(steps):
            start = time.perf_counter() if i == 1 else start
            logits, store = self.step(store, jnp.array([tokens[-1:]]))
            tokens.append(int(logits[0, -1].argmax()))
        return tokens, (time.perf_counter() - start) / max(steps - 1, 1)

    def without(self, prompt: list[int], steps: int) -> tuple[list[int], float]:
        """The same, with all that was said computed anew at every step."""
        text = np.zeros((1, len(prompt) + steps), np.int32)
        text[0, : len(prompt)] = prompt
        tokens, start = [], 0.0
        for i in range(len(prompt), len(prompt) + steps + 1):
            start = time.perf_counter() if i == len(prompt) + 2 else start
            tokens.append(int(self.whole(text)[0, i - 1].argmax()))
            if i < text.shape[1]:
                text[0, i] = tokens[-1]
        return tokens, (time.perf_counter() - start) / max(steps - 1, 1)


def lively(model: NeoX) -> None:
    """Makes random weights large enough that the text does not end in one token for ever."""
    state = jaxkv.state_dict(model)
    jaxkv.load_state_dict(model, {name: 3 * x if name.endswith("kernel") else x for name, x in state.items()})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="neox_store", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=4, help="default %(default)s")
    parser.add_argument("--width", type=int, default=128, help="default %(default)s")
    parser.add_argument("--heads", type=int, default=4, help="of 8, 16, 24, ... dimensions each; default %(default)s")
    parser.add_argument("--steps", type=int, default=99, help="after the prompt, a token each; default %(default)s")
    parser.add_argument("--prompt", default="Einstein was born in the German Empire", help="text, read as bytes")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights; default %(default)s")
    args = parser.parse_args(argv)
    for name in ("layers", "width", "heads", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; give at least 1")
    if args.width % args.heads or args.width // args.heads % 8:
        parser.error(
            f"--width {args.width} in {args.heads} heads; a quarter of a head is rotated in pairs, give heads of 8"
        )
    if not args.prompt:
        parser.error("--prompt is empty; give a text")

    model = NeoX(VOCAB, args.width, args.heads, args.layers, rngs=nnx.Rngs(args.seed))
    lively(model)
    prompt = list(args.prompt.encode())
    decoding = Decoding(model)
    print(f"GPT-NeoX, {args.layers} layers of width {args.width}; {len(prompt)} bytes of prompt, {args.steps} steps")
    store = model.empty_store(1, len(prompt) + args.steps)
    (k, _), _ = store.pop("attn_kv")
    print(
        f"the store has {', '.join(store.names)}; "
        f"attn_kv is a queue of {store.q_size('attn_kv')} pasts of {k.shape[1]} slots"
    )

    runs = {"with the store": decoding.with_store, "without a cache": decoding.without}
    results = {name: run(prompt, args.steps) for name, run in runs.items()}
    for name, (_, seconds) in results.items():
        compilations = " + ".join(decoding.compilations[name])
        print(f"{name:16} {1 / seconds:7.0f} tokens/s, compiled for {compilations}")
    tokens, others = (found for found, _ in results.values())
    print(f"tokens: {' '.join(map(str, tokens))}")
    print(f"equal: {tokens == others}")
    return 0 if tokens == others else 1


if __name__ == "__main__":
    raise SystemExit(main())
