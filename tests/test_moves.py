"""Rows moved by the native library, beside NumPy's choice of rows and what XLA compiles."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv.cache import moves
from jaxkv.native import library

pytestmark = pytest.mark.usefixtures("native_kernel")
CALL = "custom_call @jaxkv_rows"
ROWS = jaxkv.Rows()
DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "uint8", "int32")
CHOICES = (
    [1, 0, 2, 3, 4],  # a swap
    [1, 2, 0, 4, 3],  # two cycles
    [2, 2, 2, 1, 3],  # read by several
    [0, 1, 2, 3, 4],
    [4, 0, 0, 2, 2],
    [0, -7, 99, 4, 3],  # rows that there are not: the nearest
)


def numbers(dtype, *shape):
    return jnp.asarray(np.random.default_rng(0).integers(0, 100, shape).astype(np.float32)).astype(dtype)


def buffers():
    """Of each dtype one, with heads longer than what is moved at a time, short ones, stacks and an odd size."""
    x = {dtype: numbers(dtype, 5, 2, 40, 3) for dtype in DTYPES}
    return {**x, "long": numbers("float32", 5, 1, 40, 700), "stack": numbers("float16", 3, 5, 2, 40, 5)}


def same(got, was, rows, held):
    """Checks that rows are chosen anew in slots below `held`, and that the others are what they were."""
    rows = np.clip(rows, 0, 4)
    for name, x in was.items():
        want = np.array(x)
        want[..., :held, :] = np.take(np.asarray(x), rows, axis=-4)[..., :held, :]
        np.testing.assert_array_equal(np.asarray(got[name]), want, name)


def test_cycles_duplicates_and_rows_that_there_are_not_in_every_dtype():
    was, take = buffers(), jax.jit(ROWS.take)
    text = take.lower(was, jnp.zeros(5, jnp.int32), jnp.int32(0)).as_text()
    assert text.count(CALL) == 1 and "while" not in text
    for rows in CHOICES:
        for held in (-3, 0, 1, 17, 40):
            same(take(was, jnp.array(rows, jnp.int32), jnp.int32(held)), was, rows, max(held, 0))
    same(take(was, jnp.array(CHOICES[2], jnp.int32), jnp.int32(2**31 - 1)), was, CHOICES[2], 40)


def test_one_row_is_copied_under_x64_too():
    was, copy = buffers(), jax.jit(ROWS.copy)
    assert copy.lower(was, jnp.int32(3), jnp.int32(1), jnp.int32(20)).as_text().count(CALL) == 1
    same(copy(was, jnp.int32(3), jnp.int32(1), jnp.int32(20)), was, [0, 3, 2, 3, 4], 20)
    with jax.enable_x64(True):
        same(ROWS.copy(was, jnp.int32(0), jnp.int32(4), jnp.int32(7)), was, [0, 1, 2, 3, 0], 7)
        same(ROWS.take(was, jnp.array([4, 0, 1, 2, 3], jnp.int32), jnp.int32(7)), was, [4, 0, 1, 2, 3], 7)
    with jax.disable_jit():
        same(ROWS.copy(was, jnp.int32(0), jnp.int32(4), jnp.int32(7)), was, [0, 1, 2, 3, 0], 7)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])  # accelerators have a form of their own
def test_what_xla_moves_and_jax_export_writes_is_the_same_where_something_is_held(backend, monkeypatch):
    monkeypatch.setattr(moves, "_on_cpu", lambda: backend == "cpu")
    was = {name: x for name, x in buffers().items() if name in ("float32", "uint8", "stack")}
    held, rows = 20, jnp.array(CHOICES[4], jnp.int32)
    changes = (
        (lambda x, filled: moves.take(x, rows, filled), CHOICES[4]),
        (lambda x, filled: moves.copy(x, jnp.int32(2), jnp.int32(0), filled), [2, 1, 2, 3, 4]),
    )
    for change, chosen in changes:
        moves._moved.clear_cache()
        exported = jax.export.export(jax.jit(change))(was, jnp.int32(held))
        assert "jaxkv_rows" not in exported.mlir_module()
        got = exported.call(was, jnp.int32(held))
        for name, x in was.items():
            want = np.take(np.asarray(x), chosen, axis=-4)
            np.testing.assert_array_equal(np.asarray(got[name])[..., :held, :], want[..., :held, :], name)
    moves._moved.clear_cache()


def test_vmap_and_several_devices_have_the_loop_of_xla_with_the_same_rows():
    x = numbers("float32", 2, 5, 2, 16, 4)
    rows = jnp.array([[1, 0, 2, 3, 4], [2, 2, 2, 1, 3]], jnp.int32)
    run = jax.jit(jax.vmap(ROWS.take))
    assert CALL not in run.lower(x, rows, jnp.array([16, 3], jnp.int32)).as_text()
    got = np.asarray(run(x, rows, jnp.array([16, 3], jnp.int32)))
    for i, held in enumerate((16, 3)):
        np.testing.assert_array_equal(got[i, :, :, :held], np.asarray(x)[i, rows[i], :, :held])
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec(None, "heads")
    placed = jax.device_put(x[0], jax.sharding.NamedSharding(mesh, spec))
    assert CALL not in jax.jit(ROWS.take).lower(placed, rows[0], jnp.int32(16)).as_text()
    np.testing.assert_array_equal(jax.jit(ROWS.take)(placed, rows[0], jnp.int32(16)), np.asarray(x)[0, rows[0]])
    alone = jax.jit(
        jax.shard_map(ROWS.take, mesh=mesh, in_specs=(spec, *[jax.sharding.PartitionSpec()] * 2), out_specs=spec)
    )
    assert CALL in alone.lower(placed, rows[0], jnp.int32(16)).as_text()
    np.testing.assert_array_equal(alone(placed, rows[0], jnp.int32(16)), np.asarray(x)[0, rows[0]])


def test_gradients_reach_the_rows_that_were_taken_beside_whole_numbers():
    x, codes, rows = numbers("float32", 5, 2, 16, 4), numbers("int8", 5, 2, 16, 4), jnp.array(CHOICES[2], jnp.int32)
    weight = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)

    def loss(x):
        taken, _ = ROWS.take((x, codes), rows, jnp.int32(9))
        return (taken * weight).sum()

    want = np.where(np.arange(16)[:, None] < 9, 0, weight)
    np.add.at(want, CHOICES[2], np.where(np.arange(16)[:, None] < 9, weight, 0))
    np.testing.assert_allclose(jax.grad(loss)(x), want, rtol=1e-6)


@pytest.mark.optimized
def test_a_donated_loop_of_many_layers_is_one_call_that_copies_no_buffer():
    specs = [jaxkv.LayerSpec(jaxkv.Full(), 2, 64)] * 3
    cache = jax.eval_shape(lambda: jaxkv.Cache.init(specs, 4, 4096))

    def loop(cache, rows, steps):
        return jax.lax.fori_loop(0, steps, lambda _, c: c.take(rows).copy_prefix(0, 1, 99), cache)

    abstract = jax.ShapeDtypeStruct((4,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    program = jax.jit(loop, donate_argnums=0).lower(cache, *abstract).compile()
    assert program.as_text().count('custom_call_target="jaxkv_rows"') == 2
    buffer = 4 * 2 * 4096 * 64 * 4
    assert program.memory_analysis().temp_size_in_bytes < buffer / 8
    assert program.memory_analysis().alias_size_in_bytes >= 6 * buffer


def test_buffers_that_do_not_fit_together_are_an_error_and_never_read():
    x, rows, held = numbers("float32", 5, 2, 8, 4), jnp.zeros(5, jnp.int32), jnp.int32(3)
    for operands, result, reason in (
        ((rows[:4], held, x), x, "another number of rows"),
        ((rows[None], held, x), x, "wrong rank"),
        ((rows, held[None], x), x, "wrong rank"),
        ((rows.astype(jnp.int8), held, x), x, "not int32"),
        ((rows, held, x), x[:, :1], "unlike its buffer"),
        ((rows, held, x), x.astype(jnp.float16), "unlike its buffer"),
        ((rows, held, x[0]), x[0], "another number of rows"),
        ((rows, held, x, x), x, "as many results"),
    ):
        call = jax.ffi.ffi_call(library.ROWS, [jax.ShapeDtypeStruct(result.shape, result.dtype)])
        with pytest.raises(jax.errors.JaxRuntimeError, match=reason):
            jax.block_until_ready(call(*operands))
    (apart,) = jax.ffi.ffi_call(library.ROWS, [jax.typeof(x)])(rows + 1, held, x)  # a result of its own
    same({"x": apart}, {"x": x}, [1] * 5, 3)
