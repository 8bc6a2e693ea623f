"""A compiled function of a Cache goes to a file and runs in another process."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import Cache, Chunk, Cross, Dense, Float8, Full, Int4, Int8, LayerSpec, Window

SCALINGS = [
    None,
    jaxkv.LinearScaling(2.0),
    jaxkv.YarnScaling(4.0, 64),
    jaxkv.Llama3Scaling(8.0, original_length=64),
    jaxkv.LongRopeScaling((1.5, 2.0), factor=2.0, original_length=64),
]
SPECS = [LayerSpec(Window(3, sinks=1), 1, 4, None, Dense("int4"), Dense("float8_e4m3fn")), LayerSpec(Cross(3), 1, 4)]
SPECS += [LayerSpec(Full(), 1, 4, 6, rotary=jaxkv.Rotary(scaling=scaling)) for scaling in SCALINGS]
SPECS += [LayerSpec(Chunk(4), 1, 4, rotary=jaxkv.Rotary(dim=2, interleaved=True))]
SPECS += [
    LayerSpec(Full(), 1, 4, 6, Int8(), Int4(group=1), jaxkv.Rotary(), "read"),
    LayerSpec(Full(), 1, 4, 4, Float8("e5m2"), Float8()),
]


def step(cache, x):
    cache, step = cache.begin(cache.lengths[:, None])
    layers = [
        layer
        if isinstance(layer.spec.reach, Cross)
        else layer.put(step, x[..., :4].astype(layer.spec.k_storage.dtype), x[..., : layer.spec.value_dim])
        for layer in cache.layers
    ]
    return cache.with_layers(layers), jaxkv.attend(x[..., :4], layers[2], step)


READ = """
import sys, jax, numpy as np, pickle
import jax.export
import jaxkv
exported = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
run = jax.jit(exported.call, donate_argnums=0)
from test_export import SPECS
cache = jaxkv.Cache.init(SPECS, 2, 16)
x = jax.numpy.ones((2, 1, 1, 6))
for _ in range(3):
    old = cache
    cache, y = run(cache, x)
    assert old.layers[2].k.is_deleted()
np.save(sys.argv[2], np.asarray(y))
assert cache.lengths.tolist() == [3, 3]
"""


def test_a_function_of_a_cache_runs_in_a_new_process(tmp_path):
    cache, x = Cache.init(SPECS, 2, 16), jnp.ones((2, 1, 1, 6))
    exported = jax.export.export(jax.jit(step, donate_argnums=0))(cache, x)
    path, answer = tmp_path / "step.bin", tmp_path / "answer.npy"
    path.write_bytes(exported.serialize())
    here = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    code = f"import sys; sys.path[:0] = {here}\n{READ}"
    subprocess.run([sys.executable, "-c", code, str(path), str(answer)], check=True)
    for _ in range(3):
        cache, y = jax.jit(step)(cache, x)
    np.testing.assert_array_equal(np.load(answer), y)


@dataclasses.dataclass(frozen=True)
class Own:
    angle: float = 1.0

    def shift(self, k, delta):
        return k + delta.astype(k.dtype)


def test_a_rotary_of_ones_own_is_declared_first():
    cache = Cache.init([LayerSpec(Full(), 1, 2, rotary=Own(2.0))], 1, 8)
    exported = jax.export.export(jax.jit(lambda cache: cache.rewind(jnp.array([0]))))(cache)
    with pytest.raises(ValueError, match=r"Own\(angle=2.0\).*with @jaxkv.exportable"):
        exported.serialize()
    jaxkv.exportable(Own)
    again = jax.export.deserialize(exported.serialize())
    assert jax.tree.unflatten(again.in_tree, range(again.in_tree.num_leaves))[0][0].specs == cache.specs
    with pytest.raises(ValueError, match="give a frozen dataclass"):
        jaxkv.exportable(int)
