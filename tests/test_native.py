"""The attention kernel in C++: right, alike whoever computes it, and no trouble where it can't be had."""

from __future__ import annotations

import dataclasses
import functools
import re
import shutil
import subprocess

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import EMPTY, Cache, Chunk, Cross, Dense, Full, LayerSpec, NotSupportedError, Pages, Rows, Window, attend
from jaxkv.cli import main
from jaxkv.nn.native import library

P = jax.sharding.PartitionSpec
N, K, H, HV, ROWS, CAPACITY = 6, 2, 24, 20, 3, 1216
REACHES = (Full(), Window(40, sinks=3), Chunk(600), Window(30), Cross(70))
CALL = "custom_call @jaxkv_attention"


@pytest.fixture(autouse=True)
def _kernel():
    if library.problem():
        pytest.skip(library.problem())


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


ROWS_LAYOUT, FLOAT32 = Rows(), Dense()
SINKS = normal(5, N)


def filled(storage=FLOAT32, layout=ROWS_LAYOUT, stacked=False):
    """A cache whose rows hold 1,200, 600 (with gaps) and 0 tokens, and encoder outputs of 70, 5 and 0 places."""
    specs = [LayerSpec(reach, K, H, HV, storage, storage) for reach in REACHES]
    cache = Cache.init(
        specs[:1] * 3 if stacked else specs, ROWS, CAPACITY, max_block=1200, layout=layout, stacked=stacked
    )
    at = np.arange(1200)
    positions = np.stack([at, np.where((at < 600) & (at % 7 != 3), at, EMPTY), np.full(1200, EMPTY)])

    @jax.jit
    def fill(cache, positions, k, v):
        cache, step = cache.begin(positions)
        put = lambda layer: layer.put(step, k, v)  # noqa: E731
        if stacked:
            layers = [
                functools.reduce(
                    lambda stack, i: stack.at(i).put(step, k * (i + 1), v).at(None), range(3), cache.layers[0]
                )
            ]
        else:
            layers = [layer if layer.spec.reach == REACHES[4] else put(layer) for layer in cache.layers]
            cache, cross = cache.with_layers(layers).begin_cross(jnp.array([70, 5, 0]))
            layers[4] = layers[4].put(cross, k[:, :70], v[:, :70])
        return cache.with_layers(layers)

    return fill(
        cache,
        positions.astype(np.int32),
        normal(1, ROWS, 1200, K, H),
        normal(2, ROWS, 1200, K, HV),
    )


def in_numpy(q, layer, step, softcap):
    """Float64 attention over the reference form of a layer."""
    k, v, mask = (np.asarray(x, bool if x.dtype == bool else np.float64) for x in layer.get(step))
    groups = N // K
    scores = np.einsum("btkgh,bskh->bkgts", np.asarray(q, np.float64).reshape(*q.shape[:2], K, groups, H), k) * H**-0.5
    scores = np.where(mask[:, :, None], softcap * np.tanh(scores / softcap), -np.inf)
    p = np.exp(scores)
    total = p.sum(-1, keepdims=True) + np.exp(SINKS.astype(np.float64)).reshape(K, groups, 1, 1)
    return np.einsum("bkgts,bskh->btkgh", p / total, v).reshape(*q.shape[:3], HV)


@functools.partial(jax.jit, static_argnames=("form",))
def decode(cache, positions, q, rows=None, spans=None, form="native"):
    """Attention of a call over all layers; k and v of its own tokens are made of q."""
    cache, step = cache.begin(positions, rows=rows, spans=spans)
    k, v = q[:, :, :K], q[:, :, :K, :HV]
    layers = [layer if isinstance(layer.spec.reach, Cross) else layer.put(step, k, v) for layer in cache.layers]
    outs = [attend(q, layer, step, softcap=2.0, sink_logits=SINKS, implementation=form) for layer in layers]
    return outs, layers, step


@pytest.mark.parametrize("storage", [*map(Dense, ("float32", "float16", "bfloat16")), jaxkv.Int8()], ids=str)
def test_decoding_equals_numpy_with_every_reach_gaps_and_a_row_that_holds_nothing(storage):
    positions = np.array([[1200], [600], [EMPTY]], np.int32)
    q = normal(3, ROWS, 1, N, H)
    outs, layers, step = decode(filled(storage), positions, q)
    for out, layer in zip(outs, layers, strict=True):
        np.testing.assert_allclose(out, in_numpy(q, layer, step, 2.0), atol=1e-6)
    assert (np.asarray(outs[0][2]) == 0).all()


@pytest.mark.parametrize("layout", [Rows(), Pages(400, 16)], ids=["rows", "pages"])
def test_a_block_of_some_rows_in_another_order_equals_numpy_with_padding_and_spans(layout):
    cache = filled(layout=layout)
    positions = np.array([[600, EMPTY, 602, 604, 601], [1200, 1201, 1202, 1204, 1206]], np.int32)
    spans = np.array([[0, 0, 5, 0, 5], [0, 1, 1, 0, 0]], np.int32)
    q = normal(4, 2, 5, N, H)
    outs, layers, step = decode(cache, positions, q, np.array([1, 0]), spans)
    for out, layer in zip(outs, layers, strict=True):
        np.testing.assert_allclose(out, in_numpy(q, layer, step, 2.0), atol=1e-6)


def test_a_row_alone_equals_the_row_in_a_batch_bit_for_bit_and_nan_of_others_does_not_reach_it():
    cache, q = filled(), normal(3, ROWS, 1, N, H)
    together = decode(cache, np.array([[1200], [600], [0]], np.int32), q)[0]  # enough work for several threads
    for other in (np.array([[1200], [EMPTY], [EMPTY]]), np.array([[EMPTY], [600], [EMPTY]])):
        held = (other[:, 0] != EMPTY)[:, None, None, None]
        alone = cache.with_layers(
            [
                dataclasses.replace(x, k=jnp.where(held, x.k, jnp.nan), v=jnp.where(held, x.v, jnp.nan))
                for x in cache.layers
            ]
        )
        outs = decode(alone, other.astype(np.int32), q)[0]
        row = int(held.argmax())
        for one, all_of_them in zip(outs, together, strict=True):
            np.testing.assert_array_equal(one[row], all_of_them[row])


def test_sizes_that_vectors_do_not_divide_and_any_number_of_query_heads_equal_the_reference():
    @functools.partial(jax.jit, static_argnums=(3, 4))
    def run(q, k, v, size, form):
        cache = Cache.init([LayerSpec(Full(), 1, size)], 1, 64)
        cache, step = cache.begin(jnp.arange(13)[None])
        return attend(q, cache.layers[0].put(step, k, v), step, implementation=form)

    for heads, size in ((5, 3), (6, 40)):  # four at a time, and one or two
        args = normal(3, 1, 13, heads, size), normal(1, 1, 13, 1, size), normal(2, 1, 13, 1, size), size
        np.testing.assert_allclose(run(*args, "native"), run(*args, "reference"), atol=1e-6)


@pytest.mark.optimized
def test_a_traced_layer_of_a_stack_is_read_where_it_lies():
    cache, q = filled(stacked=True), normal(3, ROWS, 1, N, H)

    @functools.partial(jax.jit, static_argnums=2)
    def scan(cache, q, form):
        cache, step = cache.begin(cache.lengths[:, None])

        def body(stack, i):
            layer = stack.at(i).put(step, q[:, :, :K], q[:, :, :K, :HV])
            return layer.at(None), attend(q, layer, step, implementation=form)

        stack, outs = jax.lax.scan(body, cache.layers[0], jnp.arange(3, dtype=jnp.int32))
        return cache.with_layers([stack]), outs

    np.testing.assert_allclose(scan(cache, q, "native")[1], scan(cache, q, "reference")[1], atol=1e-6)
    compiled = jax.jit(scan.__wrapped__, static_argnums=2, donate_argnums=0).lower(cache, q, "native").compile()
    assert compiled.memory_analysis().temp_size_in_bytes < cache.layers[0].k.nbytes / 2


def loss(q, layer, step, form):
    return (attend(q, layer, step, softcap=2.0, sink_logits=SINKS, implementation=form) ** 2).sum()


def small():
    cache = Cache.init([LayerSpec(Window(5), K, H, HV)], ROWS, 64)
    cache, step = cache.begin(jnp.tile(jnp.arange(8), (ROWS, 1)))
    layer = cache.layers[0].put(step, normal(1, ROWS, 8, K, H), normal(2, ROWS, 8, K, HV))
    return normal(3, ROWS, 8, N, H), layer, step


def test_gradients_and_vmap_equal_those_of_the_reference():
    q, layer, step = small()

    def gradients(form):
        run = jax.jit(
            jax.value_and_grad(lambda q, k, v: loss(q, dataclasses.replace(layer, k=k, v=v), step, form), (0, 1, 2))
        )
        return run(q, layer.k, layer.v)

    for one, other in zip(jax.tree.leaves(gradients("native")), jax.tree.leaves(gradients("reference")), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)
    many = jnp.stack([q, 2 * q])
    got = jax.jit(jax.vmap(lambda q: attend(q, layer, step, implementation="native")))(many)
    np.testing.assert_allclose(got[1], attend(2 * q, layer, step, implementation="reference"), atol=1e-6)


@pytest.mark.optimized
def test_auto_calls_it_where_one_device_runs_the_program_and_nowhere_else():
    q, layer, step = small()
    run = lambda q, layer, step: attend(q, layer, step)  # noqa: E731
    assert CALL in jax.jit(run).lower(q, layer, step).as_text()
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, P(None, "heads"))
    spread = dataclasses.replace(layer, k=jax.device_put(layer.k, place), v=jax.device_put(layer.v, place))
    rest = jax.device_put((q, step), jax.sharding.NamedSharding(mesh, P()))
    assert CALL not in jax.jit(run).lower(rest[0], spread, rest[1]).as_text()

    def part(q, k, v):
        spec = LayerSpec(Window(5), 1, H, HV)
        return run(q, dataclasses.replace(layer, k=k, v=v, spec=spec), step)

    heads = P(None, "heads")
    mapped = jax.jit(
        jax.shard_map(
            part, mesh=mesh, in_specs=(P(None, None, "heads"), heads, heads), out_specs=P(None, None, "heads")
        )
    )
    assert CALL in mapped.lower(q, layer.k, layer.v).as_text()
    np.testing.assert_allclose(
        mapped(q, layer.k, layer.v), attend(q, layer, step, implementation="reference"), atol=1e-6
    )
    exported = jax.export.export(jax.jit(lambda q: run(q, layer, step)))(q)
    assert CALL not in exported.mlir_module()  # it may run where there is no kernel
    named = [jax.export.DisabledSafetyCheck.custom_call(library.TARGET)]
    asked = jax.jit(lambda q: attend(q, layer, step, implementation="native"))
    exported = jax.export.export(asked, disabled_checks=named)(q)
    assert CALL in exported.mlir_module()
    np.testing.assert_array_equal(exported.call(q), asked(q))


def test_what_it_can_not_read_is_said_by_name_and_auto_reads_it_otherwise():
    specs = [
        LayerSpec(Full(), 1, 4, rotary=jaxkv.Rotary(), rotary_at="read"),
        LayerSpec(Full(), 1, 4, 4, Dense("float8_e4m3fn")),
    ]
    reasons = ("rotate keys when it reads", "not Dense..float8_e4m3fn")
    cache = Cache.init(specs, 1, 64)
    cache, step = cache.begin(jnp.array([[0]]))
    x = jnp.ones((1, 1, 1, 4))
    for layer, reason in zip(cache.layers, reasons, strict=True):
        layer = layer.put(step, x, x)
        with pytest.raises(NotSupportedError, match=f"implementation='native'.*{reason}"):
            attend(x, layer, step, implementation="native")
        np.testing.assert_allclose(attend(x, layer, step), x[..., : layer.spec.value_dim], atol=0.1)
    with pytest.raises(NotSupportedError, match="layers of a cache"):
        jaxkv.self_attend(x, x, x, implementation="native")


# Where it can't be had.


def test_a_damaged_library_is_built_anew_and_never_loaded(tmp_path, monkeypatch):
    original, builds = library.built().read_bytes(), []

    def build(compiler, to):
        builds.append(compiler)
        to.write_bytes(original)

    monkeypatch.setattr("jaxkv.nn.native.library._compile", build)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = library.where()
    path.parent.mkdir(parents=True)
    flipped = bytearray(original)
    flipped[len(flipped) // 2] ^= 1
    for damaged in (bytes(flipped), original[:-1], b""):
        path.write_bytes(damaged)
        assert library.built() == path
    assert library.built() == path
    assert len(builds) == 3
    assert {x.suffix for x in path.parent.iterdir()} == {".so", ".lock"}
    library.load(path)


def test_a_library_for_another_machine_another_jaxlib_or_with_wrong_sums_is_not_given_to_xla(tmp_path, monkeypatch):
    content = library.built().read_bytes()
    other = tmp_path / "other.so"
    for damaged in (content[:18] + b"\x03" + content[19:], b"#!/bin/sh\n", b""):
        other.write_bytes(damaged)
        with pytest.raises(library.Unusable, match="not a library for"):
            library.load(other)
    with monkeypatch.context() as patch:
        patch.setattr("jaxkv.nn.native.library._api_version", lambda: 2)
        with pytest.raises(library.Unusable, match=r"for another jaxlib, with version [35].*here it is 2"):
            library.load(library.built())
    source = tmp_path / "wrong.cc"
    version = library.load(library.built()).jaxkv_api_version()
    source.write_text(
        f'extern "C" {{ int jaxkv_api_version() {{ return {version}; }} int jaxkv_self_test() {{ return 30; }} }}'
    )
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))))
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(other)], check=True)
    with pytest.raises(library.Unusable, match="wrong sums"):
        library.load(other)


@pytest.mark.optimized
def test_without_a_compiler_or_a_directory_or_when_switched_off_attention_runs_all_the_same(tmp_path, monkeypatch):
    q, layer, step = small()
    want = attend(q, layer, step, implementation="blockwise")
    (tmp_path / "file").write_text("")
    cases = (
        ({"PATH": "", "CXX": "", "XDG_CACHE_HOME": str(tmp_path)}, "no C\\+\\+ compiler"),
        ({"CXX": "false", "XDG_CACHE_HOME": str(tmp_path)}, "false failed"),
        ({"XDG_CACHE_HOME": str(tmp_path / "file")}, "can't be written"),
        ({"JAXKV_NATIVE": "0"}, "switches it off"),
    )
    for environment, reason in cases:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            library.problem.cache_clear()
            assert re.search(reason, library.problem() or "")
            np.testing.assert_array_equal(attend(q, layer, step), want)
            with pytest.raises(NotSupportedError, match=reason):
                attend(q, layer, step, implementation="native")
    library.problem.cache_clear()
    assert library.problem() is None
    assert [x for x in (tmp_path / "jaxkv" / "native").iterdir() if x.suffix != ".lock"] == []


def test_doctor_and_explain_attend_say_what_runs_and_why(capsys):
    q, layer, step = small()
    assert jaxkv.explain_attend(q, layer, step).startswith("native: ")
    assert jaxkv.explain_attend(jnp.ones((ROWS, 17, N, H)), layer, step).startswith("blockwise: of 17 tokens")
    cache = Cache.init([LayerSpec(Full(), K, H, HV, Dense("float16"), Dense("int8"))], ROWS, 64)
    assert "not Dense('int8')" in jaxkv.explain_attend(q, cache.layers[0], cache.begin(step.positions)[1])
    assert main(["doctor"]) == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert said["versions"].startswith(f"jaxkv {jaxkv.__version__}, jax {jax.__version__}, ")
    assert said["attention"].startswith("the native kernel with ")
    assert re.match(r"right: |wrong: .* off by a factor of ", said["sums"])
