"""Several devices give what one gives: attention, modules and models, in `shard_map` and on meshes of both kinds."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxkv
from jaxkv import Cache, Full, LayerSpec, Window
from jaxkv.models import Decoder, DecoderConfig, EncoderDecoder, EncoderDecoderConfig, Model, tensor_parallel

P = PartitionSpec
B, T, N, K, H = 4, 8, 4, 2, 8
LLAMA = Path(__file__).parent / "golden" / "families" / "llama3"
KINDS = {"Auto": AxisType.Auto, "Explicit": AxisType.Explicit}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


Q, KEYS, VALUES, SINKS = normal(0, B, T, N, H), normal(1, B, T, K, H), normal(2, B, T, K, H), normal(3, N)
ARGS = Q, KEYS, VALUES, SINKS
ENCODED_LENGTHS = np.array([8, 3, 0, 5], np.int32)


# A mesh may be set for the calls, or come with the arrays. What a test below leaves out is met elsewhere: a cache on
# Explicit axes without a set mesh in the contract, `generate` on Auto axes with checkpoints.
EXPLICIT_SET, AUTO = pytest.param("Explicit", True, id="set"), pytest.param("Auto", False, id="Auto")


def mesh_of(kind):
    return jax.make_mesh((2, 2), ("data", "heads"), axis_types=(KINDS[kind],) * 2)


def places(rows, heads):
    """PartitionSpecs of q, k, v, sinks, and the lengths of `everything`."""
    return (*[P(rows, None, heads)] * 3, P(heads), P(rows))


def everything(q, k, v, sinks, lengths):
    """Of each function that attends: a prompt over itself, over an encoder's output, and two blocks through a cache."""
    outs = [
        jaxkv.self_attend(q, k, v, reach=Window(3), sink_logits=sinks, softcap=2.0),
        jaxkv.cross_attend(q, k, v, lengths=lengths, sink_logits=sinks),
    ]
    cache = Cache.init([LayerSpec(Window(3), k.shape[2], H)], k.shape[0], 2 * T, max_block=T - 1)
    for block in (slice(0, T - 1), slice(T - 1, T)):
        positions = jnp.broadcast_to(
            jnp.arange(T, dtype=jnp.int32)[None, block], (k.shape[0], block.stop - block.start)
        )
        cache, step = cache.begin(positions)
        layer = cache.layers[0].put(step, k[:, block], v[:, block])
        outs.append(jaxkv.attend(q[:, block], layer, step, sink_logits=sinks))
        cache = cache.with_layers([layer])
    return outs


def loss(q, k, v, sinks, lengths):
    return sum((out**2).sum() for out in everything(q, k, v, sinks, lengths))


@functools.cache
def of_one_device():
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(*ARGS, ENCODED_LENGTHS)


def assert_equal(got, want):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4, rtol=2e-4)


def collectives(compiled):
    return set(re.findall(r"(all-gather|all-reduce|all-to-all|collective-permute)\S*\(", compiled.as_text()))


@pytest.mark.optimized
def test_shard_map_gives_what_one_device_gives_forward_and_backward():
    axes = ("data", "heads")

    def part(*args):
        return jax.value_and_grad(lambda *a: jax.lax.psum(loss(*a), axes), (0, 1, 2, 3))(*args)

    specs = places(*axes)
    run = jax.jit(jax.shard_map(part, mesh=mesh_of("Auto"), in_specs=specs, out_specs=(P(), specs[:4])))
    assert_equal(run(*ARGS, ENCODED_LENGTHS), of_one_device())
    assert collectives(run.lower(*ARGS, ENCODED_LENGTHS).compile()) == {"all-reduce"}


def test_dropout_in_shard_map_compiles_and_keeps_its_share():
    mesh = mesh_of("Auto")

    def part(key, q, k, v):
        key = jax.random.fold_in(key, jax.lax.axis_index("data"))  # otherwise all devices leave out the same
        return jaxkv.self_attend(q, k, jnp.ones_like(v), dropout_rate=0.25, dropout_key=key)

    spec = P("data")
    run = jax.jit(jax.shard_map(part, mesh=mesh, in_specs=(P(), spec, spec, spec), out_specs=spec))
    out = run(jax.random.key(0), Q, KEYS, VALUES)
    assert not np.allclose(out[0], out[2])
    np.testing.assert_allclose(out.mean(), 1, atol=0.15)


def test_a_mesh_with_explicit_axes_gives_what_one_device_gives_forward_and_backward():
    mesh, specs = mesh_of("Explicit"), places("data", "heads")
    args = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip((*ARGS, ENCODED_LENGTHS), specs, strict=True)]
    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))
    value, gradients = run(*args)
    assert_equal((value, gradients), of_one_device())
    for x, gradient in zip(args, gradients, strict=False):
        assert gradient.sharding.is_equivalent_to(x.sharding, x.ndim)
    out = jaxkv.self_attend(*args[:3])  # outside of jit too
    assert jax.typeof(out).sharding.spec == jax.typeof(args[0]).sharding.spec


@pytest.mark.optimized
@pytest.mark.parametrize(("kind", "set_mesh"), [EXPLICIT_SET, AUTO])
def test_decoding_from_a_sharded_cache_gathers_nothing(kind, set_mesh):
    mesh = mesh_of(kind)
    place = NamedSharding(mesh, P("data", "heads"))

    def decode(cache, positions, q, k, v):
        cache, step = cache.begin(positions)
        layers = [layer.put(step, k, v) for layer in cache.layers]
        outs = [jaxkv.attend(q, layer, step) for layer in layers]
        return cache.with_layers(layers), outs

    def run(sharding, put, step):
        cache = Cache.init(
            [LayerSpec(reach, K, H) for reach in (Window(3), Full())], B, 64, max_block=8, sharding=sharding
        )
        outs = []
        for block in (slice(0, T - 1), slice(T - 1, T)):
            positions = np.broadcast_to(np.arange(T, dtype=np.int32)[None, block], (B, block.stop - block.start))
            cache, out = step(cache, jnp.asarray(positions), *(put(x[:, block]) for x in (Q, KEYS, VALUES)))
            outs.append(out)
        return cache, outs, positions

    _, want, _ = run(None, jnp.asarray, jax.jit(decode))
    with jax.set_mesh(mesh) if set_mesh else contextlib.nullcontext():
        put = lambda x: jax.device_put(x, NamedSharding(mesh, P("data", None, "heads")))  # noqa: E731
        step = jax.jit(decode, donate_argnums=0)
        cache, got, positions = run(place, put, step)
        assert_equal(got, want)
        assert jax.tree.leaves(cache.layers[0].k)[0].sharding.is_equivalent_to(place, 4)
        last = [put(x[:, T - 1 :]) for x in (Q, KEYS, VALUES)]
        text = step.lower(cache, jnp.asarray(positions), *last).compile().as_text()
    shapes = re.findall(r"= \w+\[([\d,]*)\]\S* (?:all-gather|all-to-all|collective-permute)", text)
    assert all(np.prod([int(n) for n in shape.split(",") if n]) < 64 * H for shape in shapes), shapes


@pytest.mark.parametrize("kind", KINDS)
def test_heads_that_a_mesh_axis_does_not_divide_are_on_every_device(kind):
    specs = [LayerSpec(Full(), 1, H), LayerSpec(Full(), K, H), LayerSpec(Full(), 1, H, 6, v_in_k=True)]
    mesh = mesh_of(kind)

    def run(cache, q, k):
        cache, step = cache.begin(jnp.tile(jnp.arange(T, dtype=jnp.int32), (B, 1)))
        ks = k[:, :, :1], k, k[:, :, :1]
        layers = [
            layer.put(step, x, None if layer.spec.v_in_k else x) for layer, x in zip(cache.layers, ks, strict=True)
        ]
        cache = cache.with_layers(layers).take(jnp.array([1, 0, 3, 2]))
        return cache, [jaxkv.attend(q, layer, step) for layer in layers]

    cache = Cache.init(specs, B, 2 * T, sharding=NamedSharding(mesh, P("data", "heads")))
    split = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (Q, KEYS)]
    cache, got = jax.jit(run)(cache, *split)
    alone, want = jax.jit(run)(Cache.init(specs, B, 2 * T), Q, KEYS)
    assert_equal((cache.layers, got), (alone.layers, want))
    assert [layer.v.sharding.shard_shape(layer.v.shape)[:2] for layer in cache.layers] == [(2, 1), (2, 1), (2, 1)]
    said = re.findall(r"(\d) x 8.*? divided over 4 devices \((.*?)\)", cache.describe())
    assert said == [("1", "rows by 2"), ("2", "rows by 2 and heads by 2"), ("1", "rows by 2")]


# Modules and models


@pytest.mark.parametrize("flavor", ["nnx", "linen"])
def test_attention_modules_give_what_one_device_gives_on_explicit_axes(flavor):
    kind = dict(num_heads=N, num_kv_heads=K, head_dim=6, reach=Window(3), rotary=jaxkv.Rotary(), qk_norm=True)
    x = normal(5, B, T, 12)
    if flavor == "nnx":
        graphdef, state = nnx.split(jaxkv.nnx.Attention(in_features=12, rngs=nnx.Rngs(0), **kind))
        params, apply = nnx.to_pure_dict(state), lambda params, *a: nnx.merge(graphdef, params)(*a)
    else:
        module = jaxkv.linen.Attention(in_features=12, **kind)
        params = jax.jit(module.init)(jax.random.key(0), x)["params"]
        apply = lambda params, *a: module.apply({"params": params}, *a)  # noqa: E731

    def run(params, x):
        y = apply(params, x)
        cache = Cache.init([jaxkv.linen.Attention(in_features=12, **kind).layer_spec()], B, T)
        cache, step = cache.begin(jnp.tile(jnp.arange(T), (B, 1)))
        z, _ = apply(params, x, cache.layers[0], step)
        return (y**2).sum() + (z**2).sum(), (y, z)

    mesh = mesh_of("Explicit")
    split = {"query": P(None, "heads"), "key": P(None, "heads"), "value": P(None, "heads"), "out": P("heads")}
    placed = {
        name: {
            leaf: jax.device_put(y, NamedSharding(mesh, split.get(name, P()) if leaf == "kernel" else P()))
            for leaf, y in part.items()
        }
        for name, part in params.items()
    }
    gradient = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))
    want = gradient(params, x)
    got = gradient(placed, jax.device_put(x, NamedSharding(mesh, P("data"))))
    assert_equal(got, want)
    assert jax.typeof(got[0][1][0]).sharding.spec[0] == "data"


CONFIG = DecoderConfig(
    vocab_size=32, width=16, num_layers=2, num_heads=N, num_kv_heads=K, reaches=(Window(6), Full()), tied=False
)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8]]


def parallel(model, mesh):
    """The same Model with its params split over the mesh."""
    place = tensor_parallel(mesh)

    def put(path, x):
        return jax.device_put(x, place(".".join(str(key.key) for key in path), x.shape))

    return dataclasses.replace(model, params=jax.tree_util.tree_map_with_path(put, model.params))


def written(model, sharding):
    cache = Cache.init(model.specs, num_rows=2, capacity=32, sharding=sharding)
    result = jaxkv.generate(model.forward, model.params, PROMPTS, cache, max_new_tokens=6)
    return np.asarray(result.tokens), result


def test_a_checkpoint_loaded_onto_a_mesh_writes_what_one_device_writes():
    axis_types = AxisType.Explicit, AxisType.Auto
    mesh = jax.make_mesh((2, 2), ("data", "heads"), axis_types=axis_types)
    alone, spread = (
        jaxkv.models.load(LLAMA, dtype="float32", sharding=place) for place in (None, tensor_parallel(mesh))
    )

    def texts(model, cache):
        return np.stack(model.generate(PROMPTS, cache=cache, max_new_tokens=4, temperature=0).tokens)

    want = texts(alone, alone.init_cache(2, 16))
    on_mesh = spread.init_cache(2, 16, sharding=NamedSharding(mesh, P("data", "heads")))
    for cache in (on_mesh, spread.init_cache(2, 16)):  # the latter is put on the mesh of the params
        np.testing.assert_array_equal(texts(spread, cache), want)


def test_generate_with_a_tensor_parallel_model_writes_what_one_device_writes():
    model = Model.of(Decoder(CONFIG, rngs=nnx.Rngs(0)))
    (want, _), logits = written(model, None), jax.jit(model.module)(jnp.array(PROMPTS[1:]))
    mesh = mesh_of("Explicit")
    spread, place = parallel(model, mesh), NamedSharding(mesh, P("data", "heads"))
    with jax.set_mesh(mesh):
        tokens, result = written(spread, place)
        np.testing.assert_array_equal(tokens, want)
        assert jax.tree.leaves(result.cache.layers[0].k)[0].sharding.is_equivalent_to(place, 4)
        np.testing.assert_allclose(jax.jit(spread.module)(jnp.array(PROMPTS[1:])), logits, atol=1e-5)  # without a cache


def test_an_encoder_decoder_gives_what_one_device_gives_on_explicit_axes():
    config = EncoderDecoderConfig(
        16, 8, num_mel_bins=4, encoder_layers=1, encoder_heads=2, decoder_layers=1, decoder_heads=2,
        max_source_positions=6, max_positions=16,
    )  # fmt: skip
    model = Model.of(EncoderDecoder(config, rngs=nnx.Rngs(0)))
    features, lengths, tokens = normal(6, 2, 12, 4), jnp.array([12, 5]), jnp.array(PROMPTS[1:] * 2)
    positions = jnp.tile(jnp.arange(5), (2, 1))

    def run(model, sharding):
        cache = Cache.init(model.specs, num_rows=2, capacity=16, sharding=sharding)
        cache = jax.jit(model.module.encode_into)(cache, features, lengths)
        logits, cache = jax.jit(model.forward)(model.params, tokens, positions, cache)
        return logits, jax.jit(model.module)(tokens, features=features, lengths=lengths)

    mesh = mesh_of("Explicit")
    with jax.set_mesh(mesh):
        got = run(parallel(model, mesh), NamedSharding(mesh, P("data", "heads")))
    assert_equal(got, run(model, None))
    assert_equal(*got)
