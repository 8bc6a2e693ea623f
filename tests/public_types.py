"""What type checkers know of the public names. `make type` runs mypy and pyright on it; nothing runs it."""

from __future__ import annotations

from typing import assert_type

import jax

import jaxkv

spec = jaxkv.LayerSpec(jaxkv.Window(8, sinks=1), num_kv_heads=2, head_dim=4, rotary=jaxkv.Rotary())
cache = jaxkv.Cache.init([spec], num_rows=2, capacity=32)
assert_type(cache, jaxkv.Cache)
cache, step = cache.begin(jax.numpy.zeros((2, 1), "int32"))
assert_type(step, jaxkv.Step)
layer = cache.layers[0].put(step, 0, 0)
assert_type(layer, jaxkv.Layer)
assert_type(cache.with_layers([layer]), jaxkv.Cache)
assert_type(cache.rewind([0, 0]).take([0]).copy_prefix(0, 1, 2).remove(0, 1, 2), jaxkv.Cache)
assert_type(cache.nbytes, int)
assert_type(cache.describe(), str)
assert_type(jaxkv.plan_memory([spec], 1, 8).nbytes_per_device, int)
assert_type(jaxkv.show(cache), jaxkv.Picture)

result = jaxkv.generate(lambda *_: None, None, [[1]], cache, max_new_tokens=1)
assert_type(result, jaxkv.Generation)
assert_type(result.reasons, tuple[str, ...])

model = jaxkv.models.load("directory")
assert_type(model, jaxkv.models.Model)
assert_type(model.generate("text").text, str)

store = jaxkv.Store().push("kv", 1)
assert_type(store, jaxkv.Store)
assert_type(jaxkv.__version__, str)
