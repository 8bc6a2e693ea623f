"""The attention kernel in the modes of JAX: on a mesh without a gather, under vmap in one call, exported."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkv import Cache, Full, Int8, LayerSpec, Pages, Rows, Window, attend
from jaxkv.native import library
from jaxkv.nn import native_calls

N, K, H, ROWS, T = 4, 2, 8, 4, 3
SPECS = [LayerSpec(Full(), K, H), LayerSpec(Window(5, sinks=1), K, H, k_storage=Int8(), v_storage=Int8())]
CALL = "custom_call @jaxkv_attention"
MOVED = r"all-gather|all-reduce|all-to-all|collective-permute"


pytestmark = pytest.mark.usefixtures("native_kernel")


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


POSITIONS = np.tile(np.arange(T, dtype=np.int32), (ROWS, 1))
Q, KEYS, VALUES = normal(1, ROWS, T, N, H), normal(2, ROWS, T, K, H), normal(3, ROWS, T, K, H)
SINKS = normal(4, N)


def filled(cache, positions, k, v, rows=None):
    cache, step = cache.begin(positions, rows=rows)
    return [layer.put(step, k, v) for layer in cache.layers], step


def read(q, layers, step, form="auto"):
    return [attend(q, layer, step, sink_logits=SINKS, implementation=form) for layer in layers]


@pytest.mark.optimized
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["Auto", "Explicit"])
def test_on_a_mesh_each_device_calls_it_for_its_own_rows_and_heads_and_nothing_is_gathered(kind):
    mesh = jax.make_mesh((2, 2), ("data", "heads"), axis_types=(kind,) * 2)
    place, split = NamedSharding(mesh, P("data", "heads")), NamedSharding(mesh, P("data", None, "heads"))
    cache = Cache.init(SPECS, ROWS, 64, sharding=place)
    positions = jax.device_put(POSITIONS, NamedSharding(mesh, P()))
    q, k, v = (jax.device_put(x, split) for x in (Q, KEYS, VALUES))
    layers, step = jax.jit(filled)(cache, positions, k, v)
    program = jax.jit(read).lower(q, layers, step).compile()
    text = program.as_text()
    assert text.count('custom_call_target="jaxkv_attention"') == len(SPECS)
    assert re.findall(MOVED, text) == []
    want = read(Q, *filled(Cache.init(SPECS, ROWS, 64), POSITIONS, KEYS, VALUES), "reference")
    for got, one in zip(program(q, layers, step), want, strict=True):
        np.testing.assert_allclose(got, one, atol=1e-6)
        assert got.sharding.is_equivalent_to(split, 4)


@pytest.mark.optimized
def test_what_would_need_a_gather_is_left_to_xla_and_gradients_on_a_mesh_are_those_of_one_device():
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(AxisType.Auto,))
    place, everywhere = NamedSharding(mesh, P(None, "heads")), NamedSharding(mesh, P())
    rows = jnp.array([3, 0, 1, 2])
    args = jax.device_put((Q, POSITIONS, KEYS, VALUES), everywhere)
    q, positions, k, v = args

    def loss(q, k, v, cache, positions, rows, form="auto"):
        return sum((x**2).sum() for x in read(q, *filled(cache, positions, k, v, rows), form))

    spread = Cache.init(SPECS[:1], ROWS, 64, sharding=place)
    lowered = jax.jit(loss).lower(q, k, v, spread, positions, rows)
    assert "jaxkv_attention" not in lowered.as_text()
    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2)), static_argnums=6)
    got = run(q, k, v, spread, positions, None, "auto")
    want = run(Q, KEYS, VALUES, Cache.init(SPECS[:1], ROWS, 64), POSITIONS, None, "reference")
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.optimized
def test_it_runs_in_shard_map_and_in_an_exported_program_only_if_it_is_named():
    layers, step = filled(Cache.init(SPECS[:1], ROWS, 64), POSITIONS, KEYS, VALUES)
    layer, want = layers[0], read(Q, layers, step, "reference")[0]
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(AxisType.Auto,))

    def part(q, k, v):
        spec = LayerSpec(Full(), 1, H)
        return attend(q, dataclasses.replace(layer, k=k, v=v, spec=spec), step)

    heads, of_q = P(None, "heads"), P(None, None, "heads")
    mapped = jax.jit(jax.shard_map(part, mesh=mesh, in_specs=(of_q, heads, heads), out_specs=of_q))
    assert CALL in mapped.lower(Q, layer.k, layer.v).as_text()
    without = read(Q, layers, step)[0]
    assert np.abs(mapped(Q, layer.k, layer.v) - attend(Q, layer, step, implementation="reference")).max() < 1e-6
    np.testing.assert_allclose(without, want, atol=1e-6)

    exported = jax.export.export(jax.jit(lambda q: attend(q, layer, step)))(Q)
    assert CALL not in exported.mlir_module()  # it may run where there is no kernel
    named = [jax.export.DisabledSafetyCheck.custom_call(library.ATTENTION)]
    asked = jax.jit(lambda q: attend(q, layer, step, implementation="native"))
    exported = jax.export.export(asked, disabled_checks=named)(Q)
    assert CALL in exported.mlir_module()
    np.testing.assert_array_equal(exported.call(Q), asked(Q))


@pytest.mark.parametrize("layout", [Rows(), Pages(80, 4)], ids=["rows", "pages"])
def test_vmap_is_one_call_for_all_whether_caches_or_only_queries_differ(layout):
    cache = Cache.init(SPECS, ROWS, 64, layout=layout)
    several = [filled(cache, POSITIONS, KEYS * i, VALUES - i) for i in (1, 2, 3)]
    layers, step = jax.tree.map(lambda *x: jnp.stack(x), *several)
    q = jnp.stack([Q, 2 * Q, -Q])

    def reference(*args):
        return read(*args, "reference")

    for axes, args in (((0, 0, 0), (q, layers, step)), ((0, None, None), (q, *several[0]))):
        program = jax.jit(jax.vmap(functools.partial(read, form="native"), in_axes=axes)).lower(*args)
        assert program.as_text().count(CALL) == len(SPECS)
        want = jax.jit(jax.vmap(reference, in_axes=axes))(*args)
        for one, other in zip(program.compile()(*args), want, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-6)


def test_vmap_over_layers_of_a_stack_over_sinks_and_within_another_vmap_equals_the_reference():
    cache = Cache.init(SPECS[:1] * 2, ROWS, 64, stacked=True)
    cache, step = cache.begin(POSITIONS)
    stack = cache.layers[0]
    for i in range(2):
        stack = stack.at(i).put(step, KEYS * (i + 1), VALUES - i).at(None)
    many, sinks = jnp.stack([Q, -Q, Q / 2]), normal(5, 3, N)

    def run(form):
        one = lambda q, sinks, i: attend(q, stack.at(i), step, sink_logits=sinks, implementation=form)  # noqa: E731
        layers = jax.vmap(lambda q, i: one(q, SINKS, i), in_axes=(None, 0))
        inner = jax.jit(jax.vmap(layers, in_axes=(2, None), out_axes=1))(jnp.moveaxis(many, 0, 2), jnp.arange(2))
        return inner, jax.jit(jax.vmap(lambda q, sinks: one(q, sinks, 1)))(many, sinks)

    for got, want in zip(run("native"), run("reference"), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.optimized
def test_a_mapped_cache_that_is_donated_is_read_where_it_lies():
    single = Cache.init([LayerSpec(Full(), K, H)], ROWS, 4096)
    cache = jax.tree.map(lambda x: jnp.stack([x, x]), single)

    @jax.vmap
    def decode(cache, q, k):
        cache, step = cache.begin(cache.lengths[:, None])
        layer = cache.layers[0].put(step, k, k)
        return cache.with_layers([layer]), attend(q, layer, step, implementation="native")

    args = jnp.ones((2, ROWS, 1, N, H)), jnp.ones((2, ROWS, 1, K, H))
    program = jax.jit(decode, donate_argnums=0).lower(cache, *args).compile()
    assert program.memory_analysis().temp_size_in_bytes < cache.layers[0].k.nbytes / 2


def test_lengths_and_shapes_that_disagree_with_the_buffers_are_an_error_or_never_read_beyond_them(monkeypatch):
    layers, step = filled(Cache.init(SPECS[:1], ROWS, 64), POSITIONS, KEYS, VALUES)
    layer, group = layers[0], step.groups[0]
    slots = layer.num_slots

    def run(q=Q, **changed):
        other = dataclasses.replace(step, groups=(dataclasses.replace(group, **changed),))
        return attend(q, layer, other, implementation="native")

    want = run()
    np.testing.assert_array_equal(run(filled=group.filled + 10**6), want)
    np.testing.assert_array_equal(run(filled=group.filled - 10**6), np.zeros_like(want))
    with pytest.raises(ValueError, match=f"has {2 * slots} slots, the layer has {slots}"):
        run(kv_positions=jnp.zeros((ROWS, 2 * slots), jnp.int32))
    with monkeypatch.context() as patch:

        def cut(size, *operands, **attributes):
            return alone(size, *(x[:, 1:] if x.shape == (ROWS, slots) else x for x in operands), **attributes)

        alone = native_calls.alone
        patch.setattr(native_calls, "alone", cut)
        with pytest.raises(RuntimeError, match="jaxkv: "):
            run(Q[..., :2, :]).block_until_ready()  # of another shape: traced anew
    np.testing.assert_array_equal(run(), want)  # and nothing is broken by it
