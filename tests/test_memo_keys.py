"""No wrong hit, ever: what is different has another key; what is the same has the same one."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import enum
import functools
import hashlib
import itertools
import os
import subprocess
import sys
import types
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import NamedSharding, PartitionSpec

import jaxkv
from jaxkv.memo.hashing import HASHES, Hash

FULL = bool(os.environ.get("JAXKV_FULL"))


@pytest.fixture(autouse=True)
def _users_do_not_write_strictly():
    with jax.numpy_rank_promotion("allow"):
        yield


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def digests(*columns: np.ndarray, hash: str = "xxh3_128") -> list[bytes]:
    return Hash(hash).rows(columns)


def all_differ(rows: np.ndarray, hash: str = "xxh3_128") -> bool:
    return len(set(digests(rows, hash=hash))) == len(rows)


# What looks alike. Each battery gives distinct rows, of which no two may share a key.


def smooth_images(count: int, seed: int = 0) -> np.ndarray:
    """float32 [count, 32, 32, 3]: sums of a few slow waves, so that neighboring pixels are nearly alike."""
    place = np.linspace(0, np.pi, 32, dtype=np.float32)
    waves = np.stack([np.cos(i * place)[:, None] * np.cos(j * place)[None] for i in range(3) for j in range(3)])
    weights = rng(seed).random((count, 9, 3), np.float32)
    return np.einsum("bwc,whv->bhvc", weights, waves, optimize=True)


def random_images(count: int, seed: int = 0) -> np.ndarray:
    return rng(seed).random((count, 32, 32, 3), np.float32)


@jax.jit
def _word_sums(w, x):
    words = jax.lax.bitcast_convert_type(x.reshape(len(x), -1), jnp.uint32)
    return jnp.sum(words * w, axis=1, dtype=jnp.uint32)


@pytest.mark.parametrize("images", [smooth_images, random_images])
def test_many_images_each_get_their_own_output(images):
    count = 50_000 if FULL else 10_000
    each = count // 10
    memo = jaxkv.Memo(memory="1GiB")
    weights = rng(1).integers(0, 2**32, 32 * 32 * 3, dtype=np.uint32) | np.uint32(1)
    features = memo.wrap(_word_sums, jnp.asarray(weights))
    expected = {}
    for seed in range(10):
        batch = images(each, seed)
        expected[seed] = (batch.reshape(each, -1).view(np.uint32) * weights).sum(axis=1, dtype=np.uint32)
        np.testing.assert_array_equal(features(batch), expected[seed])
    for seed in (0, 9):
        np.testing.assert_array_equal(features.lookup(images(each, seed)), expected[seed])
    assert memo.stats().computed == memo.stats().memory.items == count


def test_many_rows_of_tokens_each_get_their_own_output():
    count = 200_000 if FULL else 40_000
    rows = np.unique(rng().integers(0, 50, (count + count // 10, 12), dtype=np.int32), axis=0)[:count]
    assert len(rows) == count
    memo = jaxkv.Memo(memory="1GiB")
    features = memo.wrap(lambda x: x[:, ::-1])
    for begin in range(0, len(rows), 10_000):
        part = rows[begin : begin + 10_000]
        np.testing.assert_array_equal(features(part), part[:, ::-1])
    np.testing.assert_array_equal(features.lookup(rows), rows[:, ::-1])
    assert memo.stats().computed == count


@pytest.mark.parametrize("hash", HASHES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8", "bool", "int32"])
def test_one_hot_rows_differ(hash, dtype):
    assert all_differ(np.eye(300, 2_000).astype(jnp.dtype(dtype)), hash)
    assert all_differ(np.eye(300).astype(jnp.dtype(dtype)), hash)


@pytest.mark.parametrize("hash", HASHES)
def test_tiny_floats_zeros_and_nans_differ_by_their_bits(hash):
    tiny = np.arange(1, 500, dtype=np.uint32).view(np.float32)  # subnormal
    assert all_differ(np.concatenate([tiny, -tiny])[:, None] * np.ones((1, 400), np.float32), hash)
    nans = (np.arange(1, 500, dtype=np.uint32) | np.uint32(0x7F800000)).view(np.float32)
    assert np.isnan(nans).all()
    assert all_differ(np.stack([nans] * 3, axis=1), hash)
    assert all_differ(np.array([[0.0], [-0.0], [np.inf], [-np.inf], [np.nan]], np.float32), hash)


@pytest.mark.parametrize("hash", HASHES)
@pytest.mark.parametrize("nbytes", [4, 64, 1_024, 1_028, 3_072])
def test_each_flipped_bit_shows(hash, nbytes):
    row = rng().integers(0, 256, nbytes, dtype=np.uint8)
    bits = np.arange(0, 8 * nbytes, 1 if FULL or nbytes < 3_000 else 7)  # one of each byte, at least
    flipped = np.repeat(row[None], len(bits) + 1, axis=0)
    flipped[np.arange(len(bits)), bits // 8] ^= (1 << (bits % 8)).astype(np.uint8)
    assert all_differ(flipped, hash)


@pytest.mark.parametrize("hash", HASHES)
def test_values_that_change_places_show(hash):
    rows = np.tile(np.arange(40, dtype=np.float32), (781, 10))
    for i, pair in enumerate(itertools.combinations(range(40), 2), start=1):
        rows[i, pair] = rows[i, pair[::-1]]
    assert all_differ(rows, hash)


@pytest.mark.parametrize("hash", HASHES)
def test_what_belongs_to_which_column_shows(hash):
    a, b = np.zeros((2, 3), np.float32), np.zeros((2, 5), np.float32)
    a[0, 2], b[1, 0] = 1, 1  # neighbours, if columns were laid end to end
    assert len(set(digests(a, b, hash=hash))) == 2
    assert digests(a, hash=hash) != digests(b[:, :3], hash=hash)


@pytest.mark.parametrize(
    "dtype",
    ["float32", "bfloat16", "float8_e4m3fn", "float4_e2m1fn", "int4", "int8", "uint16", "bool", "complex64", "int32"],
)
def test_the_device_hash_is_the_same_on_host_and_device(dtype):
    x = (rng().standard_normal((3, 7)) * 3).astype(jnp.dtype(dtype))
    assert digests(x, hash="device") == Hash("device").rows([jnp.asarray(x)])


@pytest.mark.parametrize("hash", HASHES)
@pytest.mark.parametrize("n", [3, 700])
def test_the_same_bytes_have_the_same_digest_however_they_lie(hash, n):
    x = rng().standard_normal((4, n)).astype(np.float32)
    wide = np.zeros((4, 2 * n), np.float32)
    wide[:, ::2] = x
    for other in (np.asfortranarray(x), wide[:, ::2], x[::-1][::-1]):
        assert digests(other, hash=hash) == digests(x, hash=hash)
    assert digests(x[2:], hash=hash) == digests(x, hash=hash)[2:]


@pytest.mark.parametrize("hash", HASHES)
def test_items_without_bytes_and_batches_without_items(hash):
    assert len(set(digests(np.zeros((3, 0), np.float32), hash=hash))) == 1
    assert digests(np.zeros((0, 3), np.float32), hash=hash) == []


def test_an_unknown_hash_is_refused():
    with pytest.raises(ValueError, match="hash is 'md5', must be one of xxh3_128"):
        jaxkv.Memo(hash="md5")


# Every part of the key, changed alone.


def f(params, x, scale=1.0, mode="sum"):
    y = x.astype(jnp.float32) @ params["w"] * scale
    return y if mode == "sum" else -y


X = rng().random((4, 6), np.float32)
W = {"w": jnp.asarray(rng(1).random((6, 3), np.float32))}
BASE = dict(function=f, params=(W,), args=(X,), kwargs={}, options={}, memo={})


def name(**changed) -> str:
    what = BASE | changed
    memo = jaxkv.Memo(memory="1MiB", **what["memo"])
    return memo.wrap(what["function"], *what["params"], **what["options"]).namespace(*what["args"], **what["kwargs"])


def same_but_minus(params, x, scale=1.0, mode="sum"):
    y = x.astype(jnp.float32) @ params["w"] * scale
    return -y if mode == "sum" else y


def same_but_renamed(params, image, scale=1.0, mode="sum"):
    return f(params, image, scale, mode)


def same_but_deeper(params, x, scale=1.0, mode="sum"):
    return f(params["inner"], x, scale, mode)


def first_of(params, x, scale=1.0, mode="sum"):
    return f(params, jax.tree.leaves(x)[0], scale, mode)


class Mode(enum.Enum):
    SUM = 1
    MINUS = 2


def changed_bit(array: jax.Array) -> jax.Array:
    words = np.array(array).view(np.uint32)
    words[-1, -1] ^= 1
    return jnp.asarray(words.view(np.float32))


CHANGES = {
    "the program": dict(function=same_but_minus),
    "an argument's name": dict(function=same_but_renamed),
    "one bit of one parameter": dict(params=({"w": changed_bit(W["w"])},)),
    "parameters that were rounded": dict(params=({"w": W["w"].astype(jnp.bfloat16).astype(jnp.float32)},)),
    "a parameter's place": dict(function=same_but_deeper, params=({"inner": W},)),
    "a scalar argument": dict(kwargs={"scale": 2.0}),
    "a scalar argument's type": dict(kwargs={"scale": 1}),
    "a scalar that is an array": dict(kwargs={"scale": np.float32(1.0)}),
    "another scalar that is an array": dict(kwargs={"scale": np.float32(2.0)}),
    "a scalar argument that is true": dict(kwargs={"scale": True}),
    "a scalar argument that is complex": dict(kwargs={"scale": 1 + 0j}),
    "a scalar argument with a sign": dict(kwargs={"scale": 0.0}),
    "a scalar argument with another sign": dict(kwargs={"scale": -0.0}),
    "a string": dict(kwargs={"mode": "minus"}),
    "bytes": dict(kwargs={"mode": b"minus"}),
    "an enum": dict(kwargs={"mode": Mode.SUM}),
    "another enum": dict(kwargs={"mode": Mode.MINUS}),
    "a dtype": dict(kwargs={"mode": jnp.float32}),
    "another dtype": dict(kwargs={"mode": np.dtype("float16")}),
    "nothing for an argument": dict(kwargs={"mode": None}),
    "a parameter's dtype": dict(params=({"w": W["w"].astype(jnp.bfloat16)},)),
    "a parameter's shape": dict(params=({"w": W["w"][:, :2]},)),
    "the items' path": dict(function=first_of, args=({"a": X},)),
    "the items' other path": dict(function=first_of, args=({"b": X},)),
    "the items' dtype": dict(args=(X.view(np.int32),)),
    "the items' shape": dict(args=(X[:, None],)),
    "the output's dtype": dict(options={"output_dtype": "bfloat16"}),
    "the version": dict(options={"version": "2"}),
    "how batches are computed": dict(options={"batch": "full"}),
    "the hash": dict(memo={"hash": "blake2b"}),
}


def test_every_part_of_the_key_changed_alone_gives_another_key():
    with jax.numpy_dtype_promotion("standard"):
        names = {"nothing": name()} | {change: name(**what) for change, what in CHANGES.items()}
    assert len(set(names.values())) == len(names), names


def test_what_is_the_same_has_the_same_key():
    same = {
        "the arguments by name": dict(args=(), kwargs={"x": X}),
        "a default, given": dict(kwargs={"scale": 1.0, "mode": "sum"}),
        "another batch size": dict(args=(X[:1],)),
        "JAX's array": dict(args=(jnp.asarray(X),)),
        "other bytes of the items": dict(args=(X + 1,)),
        "an equal array of parameters": dict(params=({"w": jnp.array(W["w"])},)),
        "NumPy's array of parameters": dict(params=({"w": np.array(W["w"])},)),
        "a jitted function": dict(function=jax.jit(f, static_argnames="mode")),
        "big-endian items": dict(args=(X.astype(">f4"),)),
    }
    names = {what: name(**change) for what, change in same.items()}
    jitted = names.pop("a jitted function")  # another program: allowed to differ, not to be wrong
    assert set(names.values()) == {name()}, names
    assert jitted


def test_shared_arrays_are_part_of_the_key():
    memo = jaxkv.Memo(memory="1MiB")
    masked = memo.wrap(lambda x, mask: x * mask, shared=["mask"])
    mask = np.array([1, 0, 1, 0, 1, 0], np.float32)
    np.testing.assert_array_equal(masked(X, mask), X * mask)
    np.testing.assert_array_equal(masked(X, 1 - mask), X * (1 - mask))
    np.testing.assert_array_equal(masked(X, mask=mask), X * mask)
    assert memo.stats().computed == 8


def test_a_key_that_is_shared_is_part_of_the_key():
    memo = jaxkv.Memo(memory="1MiB")
    noise = memo.wrap(lambda x, key: x + jax.random.normal(key, x.shape[1:]))
    a, b, again = (noise(X, jax.random.key(seed)) for seed in (0, 1, 0))
    np.testing.assert_array_equal(a, again)
    assert not np.array_equal(a, b)


def captured(constant):
    return lambda x: x + constant


@pytest.mark.parametrize("kind", [jnp.asarray, np.asarray])
def test_constants_that_are_baked_into_a_program_are_part_of_the_key(kind):
    big = rng().random((2, 6), np.float32)
    constants = [kind(big[0]), kind(big[1]), kind(np.float32(1)), kind(np.float32(2))]
    memo = jaxkv.Memo(memory="1MiB")
    for constant in [*constants, *constants]:
        np.testing.assert_array_equal(memo.wrap(captured(constant))(X), X + np.asarray(constant))
    assert memo.stats().computed == 4 * len(X)


def test_constants_that_stand_in_no_text_are_part_of_the_key():
    memo = jaxkv.Memo(memory="1MiB")
    before = jax.config.jax_use_simplified_jaxpr_constants
    try:
        jax.config.update("jax_use_simplified_jaxpr_constants", True)
        inner = [jax.jit(captured(jnp.full(6, float(i)))) for i in range(3)]
        names = {memo.wrap(lambda x, g=g: g(x) * 2).namespace(X) for g in inner}
        assert len(names) == 3
    finally:
        jax.config.update("jax_use_simplified_jaxpr_constants", before)


def test_settings_of_jax_that_change_the_program_are_part_of_the_key():
    features = jaxkv.Memo(memory="1MiB").wrap(lambda x: x @ jnp.ones((6, 3), x.dtype))
    name = features.namespace(X)
    with jax.default_matmul_precision("highest"):
        assert features.namespace(X) != name
    with jax.enable_x64(True):
        features.namespace(X)
        assert features(X.astype(np.float64)).dtype == jnp.float64
    assert features(X.astype(np.float64)).dtype == jnp.float32
    assert features.namespace(X) == name


OFFSET = jnp.float32(1)


def helper(x):
    return x + OFFSET


def uses_helper(x):
    return helper(x) * 2


def test_what_a_function_reads_from_around_it_is_watched(monkeypatch):
    memo = jaxkv.Memo(memory="1MiB")
    features = memo.wrap(uses_helper)
    np.testing.assert_array_equal(features(X), (X + 1) * 2)
    monkeypatch.setitem(globals(), "OFFSET", jnp.float32(5))
    np.testing.assert_array_equal(features(X), (X + 5) * 2)
    monkeypatch.setitem(globals(), "helper", lambda x: x - OFFSET)
    np.testing.assert_array_equal(features(X), (X - 5) * 2)

    table = {"w": np.ones(6, np.float32)}
    scaled = memo.wrap(lambda x: x * table["w"])
    np.testing.assert_array_equal(scaled(X), X)
    table["w"][2] = 7  # in place, which no identity shows
    np.testing.assert_array_equal(scaled(X), X * table["w"])
    table["w"] = jnp.full(6, 3.0)
    np.testing.assert_array_equal(scaled(X), X * 3)


def test_parameters_that_change_are_noticed():
    memo = jaxkv.Memo(memory="1MiB")
    for kind in (np.array, jnp.array):
        params = {"w": kind(W["w"]), "unused": kind(W["w"])}
        features = memo.wrap(f, params)
        np.testing.assert_allclose(features(X), X @ np.asarray(params["w"]), rtol=1e-5)
        before = features.namespace(X)
        params["w"] = kind(params["w"]) * 2
        assert features.namespace(X) != before
        np.testing.assert_allclose(features(X), X @ np.asarray(params["w"]), rtol=1e-5)
        params["w"] = kind(params["w"]) / 2
        assert features.namespace(X) == before
        params["unused"] = params["unused"] + 1  # nothing reads it
        assert features.namespace(X) == before
    params = {"w": np.array(W["w"])}
    features = memo.wrap(f, params)
    features(X)
    params["w"][0] += 1
    np.testing.assert_allclose(features(X), X @ params["w"], rtol=1e-5)


class Linen(linen.Module):
    width: int = 3

    @linen.compact
    def __call__(self, x, train=False):
        x = linen.Dense(self.width)(x)
        x = linen.BatchNorm(use_running_average=not train)(x)
        return x, x.sum(axis=-1)

    @linen.nowrap
    def other(self, x):
        return x


def test_a_linen_module():
    module = Linen()
    variables = module.init(jax.random.key(0), X)
    memo = jaxkv.Memo(memory="1MiB")
    features = memo.wrap(module.apply, variables)
    for got, expected in zip(features(X, train=False), jax.jit(module.apply)(variables, X), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    names = {features.namespace(X), features.namespace(x=X, train=False), features.namespace(X, False)}
    assert len(names) == 1
    others = [
        memo.wrap(module.apply, module.init(jax.random.key(1), X)),
        memo.wrap(Linen(width=4).apply, Linen(width=4).init(jax.random.key(0), X)),
    ]
    assert len(names | {other.namespace(X) for other in others}) == 3
    again = memo.wrap(Linen().apply, Linen().init(jax.random.key(0), X))
    assert again.namespace(X) in names
    with pytest.raises(ValueError, match=r"without parameters: memo\.wrap\(module\.apply, variables\)"):
        memo.wrap(module)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(6, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.sign = 1.0
        self.parts = nnx.List([nnx.Linear(3, 3, rngs=rngs)])

    def __call__(self, x):
        return self.parts[0](self.dropout(self.norm(self.linear(x)))) * self.sign

    def encode(self, x):
        return self.linear(x)


def test_an_nnx_module_is_watched():
    model = Nnx(nnx.Rngs(0))
    memo = jaxkv.Memo(memory="1MiB")
    features = memo.wrap(model)
    with pytest.raises(ValueError, match=r"Nnx changes .*norm.mean.* while it runs.*call model\.eval\(\)|module\.eval"):
        features(X)
    model.eval()
    names = set()

    def check():
        np.testing.assert_allclose(features(X), model(X), rtol=1e-5, atol=1e-6)
        assert features.namespace(X) not in names
        names.add(features.namespace(X))

    check()
    model.linear.kernel[...] = model.linear.kernel[...] * 2  # in place
    check()
    model.linear.bias = nnx.Param(jnp.ones(3))  # another Variable
    check()
    model.norm.mean[...] = jnp.ones(3)
    check()
    model.sign = -1.0  # a setting
    check()
    model.parts[0] = nnx.Linear(3, 3, rngs=nnx.Rngs(7))  # another module, within a list
    check()
    model.parts[0].kernel[...] = model.parts[0].kernel[...] * 3
    check()
    twin = nnx.merge(*nnx.split(model))
    assert memo.wrap(twin).namespace(X) == features.namespace(X)
    assert memo.wrap(model.encode).namespace(X) not in names
    np.testing.assert_allclose(memo.wrap(model.encode)(X), model.encode(X), rtol=1e-5)


def test_functions_that_read_a_module_from_outside_are_refused():
    model = Nnx(nnx.Rngs(0))
    memo = jaxkv.Memo(memory="1MiB")
    with pytest.raises(ValueError, match=r"reads the nnx module \w+ from outside.*wrap the module itself"):
        memo.wrap(lambda x: model(x))
    with pytest.raises(ValueError, match="holds its own parameters"):
        memo.wrap(model, {"w": X})


def test_functions_that_call_back_into_python_want_a_version():
    def called(x):
        return jax.pure_callback(lambda x: np.asarray(x) + 1, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    memo = jaxkv.Memo(memory="1MiB")
    with pytest.raises(jaxkv.NotSupportedError, match=r'calls back into Python \(pure_callback\).*version="1"'):
        memo.wrap(called)(X)
    np.testing.assert_array_equal(memo.wrap(called, version="1")(X), X + 1)
    names = {memo.wrap(called, version=version).namespace(X) for version in "123"}
    assert len(names) == 3


PROGRAM = """
import sys
import jax.numpy as jnp, numpy as np
from flax import linen
import jaxkv

class Net(linen.Module):
    @linen.compact
    def __call__(self, x):
        return {{"out": linen.Dense(3)(jnp.tanh(linen.LayerNorm()(x)))}}

net = Net()
x = np.random.default_rng(0).random((5, 6), np.float32)
dense = {{"kernel": jnp.arange(18.0).reshape(6, 3) / 7, "bias": jnp.zeros(3)}}
variables = {{"params": {{"Dense_0": dense, "LayerNorm_0": {{"scale": jnp.ones(6), "bias": jnp.zeros(6)}}}}}}
with jaxkv.Memo(memory="1MiB", disk={directory!r}) as memo:
    features = memo.wrap(net.apply, variables)
    print(np.asarray(features(x)["out"]).tobytes().hex())
    print(features.namespace(x), memo.stats().computed)
"""


class Flags(enum.IntFlag):
    A, B = 1, 2


def test_enums_count_by_class_name_and_value():
    features = jaxkv.Memo(memory="1MiB").wrap(lambda x, mode: x * int(mode.value))
    for value in (2, 3):  # as when a cell of a notebook runs again
        scope = {"__name__": "__main__"}
        exec(f"import enum\nclass Mode(enum.Enum):\n  A = {value}", scope)
        np.testing.assert_array_equal(features(X, scope["Mode"].A), X * value)
    for value in (0, 4, 8, 1):
        np.testing.assert_array_equal(features(X, Flags(value)), X * value)


def test_a_parameter_s_place_is_no_part_of_the_key():
    memo = jaxkv.Memo(memory="1MiB")
    mesh = jax.make_mesh((2,), ("d",), devices=jax.devices()[:2])
    places = [
        W["w"],
        np.asarray(W["w"]),
        *(jax.device_put(W["w"], device) for device in jax.devices()[:2]),
        *(jax.device_put(W["w"], NamedSharding(mesh, spec)) for spec in (PartitionSpec(), PartitionSpec("d"))),
    ]
    names = {memo.wrap(lambda w, x: x @ w, w).namespace(X) for w in places}
    assert len(names) == 1


def test_names_of_jitted_helpers_are_no_part_of_the_key():
    names = set()
    for helper_name in ("first", "second"):
        scope = {"jax": jax}
        exec(f"@jax.jit\ndef {helper_name}(x): return x * 2\ndef f(x): return {helper_name}(x) + x", scope)
        names.add(jaxkv.Memo(memory="1MiB").wrap(scope["f"]).namespace(X))
    assert len(names) == 1


def test_another_process_finds_what_was_computed(tmp_path, capsys):
    program = PROGRAM.format(directory=str(tmp_path / "store"))
    env = {"PYTHONHASHSEED": "1", "PYTHONPATH": ":".join(sys.path), "JAX_PLATFORMS": "cpu"}  # here it is a random seed
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    exec(program, {"__name__": "other"})
    (output, name, computed), (same_output, same_name, computed_again) = (
        done.stdout.split(),
        capsys.readouterr().out.split(),
    )
    assert (output, name) == (same_output, same_name)
    assert (computed, computed_again) == ("5", "0")


@jax.numpy_dtype_promotion("standard")
def test_a_weak_type_is_part_of_the_key():
    """A scalar of weak type leaves bfloat16 what it is, one of float32 does not."""
    memo = jaxkv.Memo(memory="1MiB")

    def scaled(params, x, shift):
        return x.astype(jnp.bfloat16) * params["scale"] + shift

    weak, strong = jnp.asarray(2.0), jnp.float32(2.0)
    assert weak.weak_type and not strong.weak_type
    params = {"scale": weak}
    features = memo.wrap(scaled, params)
    for params["scale"], shift in itertools.product((weak, strong, weak), (weak, strong, np.float32(2))):
        expected = scaled(params, jnp.asarray(X), shift)
        got = features(X, shift)
        assert got.dtype == expected.dtype
        np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(expected, np.float32), rtol=1e-2)
    ramp = jnp.stack([weak, weak + 1, weak + 2])
    assert memo.wrap(lambda x: x * jnp.bfloat16(1))(ramp).dtype == jnp.float32  # items are what their dtype says


@pytest.mark.parametrize(("setting", "value"), [("jax_threefry_partitionable", False), ("jax_random_seed_offset", 7)])
def test_settings_of_random_numbers_are_part_of_the_key(setting, value):
    def noisy(x):
        return x + jax.random.uniform(jax.random.key(3), x.shape[1:])

    features = jaxkv.Memo(memory="1MiB").wrap(noisy)
    before, first = getattr(jax.config, setting), features(X)
    try:
        jax.config.update(setting, value)
        np.testing.assert_allclose(features(X), noisy(X), rtol=1e-6)
        assert not np.allclose(features(X), first)
    finally:
        jax.config.update(setting, before)
    np.testing.assert_array_equal(features(X), first)


TABLE: dict = {}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"plus": True}, {"minus": True}),
        ({"plus": None, "minus": ()}, {"plus": (), "minus": None}),
        ({"plus": [None, 1.0]}, {"plus": [1.0, None]}),
        ({None: 1, "plus": 2}, {None: 5, "plus": 2}),
        ({int: 1, float: 2}, {int: 1, str: 2}),
        ({"plus": {1, 2}}, {"plus": {1}}),
    ],
)
def test_containers_around_a_function_are_watched_with_their_keys(before, after):
    def described(x):
        text = repr(sorted(map(repr, TABLE.items()))).encode()
        return x * np.float32(int.from_bytes(hashlib.blake2b(text, digest_size=2).digest(), "little"))

    features = jaxkv.Memo(memory="1MiB").wrap(described)
    for content in (before, after, before):
        TABLE.clear()
        TABLE.update(content)
        np.testing.assert_array_equal(features(X), described(X))


def test_a_set_that_changes_in_place_is_noticed():
    names = {"a"}
    features = jaxkv.Memo(memory="1MiB").wrap(lambda x: x * len(names))
    np.testing.assert_array_equal(features(X), X)
    names.add("b")
    np.testing.assert_array_equal(features(X), X * 2)


class Caller:
    def __init__(self):
        self.function = helper

    def __call__(self, x):
        return self.inner(x)

    def inner(self, x):
        return x + OFFSET

    def of_a_field(self, x):
        return self.function(x)

    @staticmethod
    def static(x):
        return Caller().of_a_field(x)


class LinenCaller(linen.Module):
    function: object = None

    def __call__(self, x):
        return x + OFFSET if self.function is None else self.function(x)


class NnxCaller(nnx.Module):
    def __init__(self, function=None):
        self.function = function

    def __call__(self, x):
        return self.inner(x) if self.function is None else self.function(x)

    def inner(self, x):
        return x + OFFSET


@pytest.mark.parametrize(
    "function",
    [
        lambda x: [helper][0](x),
        functools.partial(lambda function, x: function(x), helper),
        functools.partial(lambda x, function: function["f"][0](x), function={"f": [helper]}),
        lambda x, function=helper: function(x),
        lambda x: Caller()(x),
        lambda x: LinenCaller().apply({}, x),
        Caller(),
        Caller().of_a_field,
        Caller.static,
        functools.partial(LinenCaller().apply, {}),
        functools.partial(LinenCaller(helper).apply, {}),
        NnxCaller(),
        NnxCaller(helper),
        NnxCaller().inner,
    ],
)
def test_functions_are_followed_however_they_are_called(function, monkeypatch):
    features = jaxkv.Memo(memory="1MiB").wrap(function)
    np.testing.assert_array_equal(features(X), X + 1)
    monkeypatch.setitem(globals(), "OFFSET", jnp.float32(5))
    np.testing.assert_array_equal(features(X), X + 5)
    assert features._traced_anew == 1
    features(X + 1)
    assert features._traced_anew == 1


def settings(name: str) -> types.ModuleType:
    """A module of the user's, with a value and a function that reads it."""
    module = types.ModuleType(name)
    exec("scale = 2.0\ndef apply(x): return x * scale\n", vars(module))
    return module


class Slots:
    __slots__ = ("scale",)

    def __init__(self):
        self.scale = 2.0

    def __call__(self, x):
        return x * self.scale


class OfClass:
    scale = 2.0

    def __call__(self, x):
        return x * self.scale

    def named(self, x):
        return x * getattr(self, "scale")  # noqa: B009

    @property
    def doubled(self):
        return self.scale


class NnxOfClass(nnx.Module):
    scale = 2.0

    def __init__(self, settings=None):
        self.settings = settings

    def __call__(self, x):
        return x * (self.scale if self.settings is None else self.settings.scale)


def of_module():
    module = settings("mine")
    return module, lambda x: x * module.scale


def of_a_helper_in_a_module():
    module = settings("mine")
    return module, lambda x: module.apply(x)


def of_a_namespace():
    space = types.SimpleNamespace(scale=2.0)
    return space, lambda x: x * space.scale


def of_options_that_a_module_holds():
    space = argparse.Namespace(scale=2.0)
    return space, NnxOfClass(space)


def of_slots():
    slots = Slots()
    return slots, slots


def of_slots_around():
    slots = Slots()
    return slots, lambda x: slots(x)


def of_a_class():
    class Local(OfClass):
        scale = 2.0

    return Local, lambda x: x * Local.scale


def of_an_object_s_class():
    class Local(OfClass):
        scale = 2.0

    return Local, Local()


def of_a_name_in_a_string():
    thing = OfClass()
    return thing, thing.named


def of_an_object_that_hides_its_class_s():
    thing = OfClass()
    return thing, lambda x: thing(x)


def of_a_property():
    thing = OfClass()
    return thing, lambda x: x * thing.doubled


def of_an_nnx_module_s_class():
    class Local(NnxOfClass):
        scale = 2.0

    return Local, Local()


class Settings(dict):
    def __getattr__(self, name):
        return self[name]

    def __setattr__(self, name, value):
        self[name] = value


class Mean(linen.Module):
    table: np.ndarray

    def __call__(self, x):
        return x * self.table[0]


class Pair(typing.NamedTuple):
    thing: object


@dataclasses.dataclass
class Ways:
    """An owner whose scale is set in some way."""

    set: typing.Callable[[float], None]

    def __setattr__(self, name, value):
        if name == "scale":
            self.set(value)
        else:
            super().__setattr__(name, value)


def of_a_dict_with_attributes():
    table = Settings(scale=2.0)
    return table, lambda x: x * table.scale


def of_a_user_dict():
    table = collections.UserDict(scale=2.0)
    return Ways(lambda value: table.update(scale=value)), lambda x: x * table["scale"]


def of_a_deque():
    queue = collections.deque([2.0])
    return Ways(lambda value: queue.__setitem__(0, value)), lambda x: x * queue[0]


def of_bytes():
    data = bytearray([2])
    return Ways(lambda value: data.__setitem__(0, int(value))), lambda x: x * data[0]


def of_a_function_s_own():
    def function(x):
        return x * function.scale

    function.scale = 2.0
    return function, lambda x: function(x)


def of_a_named_tuple():
    space = types.SimpleNamespace(scale=2.0)
    pair = Pair(space)
    return space, lambda x: x * pair.thing.scale


def of_code_that_is_exchanged():
    def function(x):
        return x * 2.0

    def exchange(value):
        scope = {}
        exec(f"def function(x): return x * {value}", scope)
        function.__code__ = scope["function"].__code__

    return Ways(exchange), lambda x: function(x)


def of_an_array_in_a_linen_module():
    table = np.array([2.0], np.float32)
    return Ways(lambda value: table.fill(value)), Mean(table).apply


def of_a_module_that_is_imported_within():
    module = sys.modules["jaxkv_settings_of_a_test"] = settings("jaxkv_settings_of_a_test")

    def function(x):
        import jaxkv_settings_of_a_test

        return x * jaxkv_settings_of_a_test.scale

    return module, function


def of_what_is_mapped():
    space = types.SimpleNamespace(scale=2.0)
    return space, jax.vmap(lambda row: row * space.scale)


def of_what_is_mapped_within():
    space = types.SimpleNamespace(scale=2.0)
    mapped = {"f": jax.vmap(lambda row: row * space.scale)}
    return space, lambda x: mapped["f"](x)


def of_a_gradient():
    space = types.SimpleNamespace(scale=2.0)
    return space, jax.vmap(jax.grad(lambda row: (row * row).sum() * space.scale / 2))


@pytest.mark.parametrize(
    "make",
    [
        of_a_dict_with_attributes,
        of_a_user_dict,
        of_a_deque,
        of_bytes,
        of_a_function_s_own,
        of_a_named_tuple,
        of_code_that_is_exchanged,
        of_an_array_in_a_linen_module,
        of_a_module_that_is_imported_within,
        of_what_is_mapped,
        of_what_is_mapped_within,
        of_a_gradient,
        of_module,
        of_a_helper_in_a_module,
        of_a_namespace,
        of_options_that_a_module_holds,
        of_slots,
        of_slots_around,
        of_a_class,
        of_an_object_s_class,
        of_a_name_in_a_string,
        of_an_object_that_hides_its_class_s,
        of_a_property,
        of_an_nnx_module_s_class,
    ],
)
def test_fields_of_modules_classes_and_objects_are_watched(make):
    owner, function = make()
    memo = jaxkv.Memo(memory="1MiB")
    features = memo.wrap(function, {}) if make is of_an_array_in_a_linen_module else memo.wrap(function)
    for factor in (2.0, 2.0, 3.0, 3.0):
        owner.scale = factor
        np.testing.assert_array_equal(features(X), X * factor)
    assert features._traced_anew <= 2  # a field of an object's own in place of its class's is one change more
    assert len(features._function.watch()[0]) < 60  # before each call all of it is looked at


def test_a_method_that_is_exchanged_is_noticed():
    class Local(OfClass):
        pass

    features = jaxkv.Memo(memory="1MiB").wrap(Local())
    np.testing.assert_array_equal(features(X), X * 2)
    Local.__call__ = lambda self, x: x - 1
    np.testing.assert_array_equal(features(X), X - 1)


def test_a_method_of_a_class_is_traced_once():
    class Scale:
        factor = 2

        @classmethod
        def call(cls, x):
            return x * cls.factor

    features = jaxkv.Memo(memory="1MiB").wrap(Scale.call)
    for factor in (2, 2, 3):
        Scale.factor = factor
        np.testing.assert_array_equal(features(X), X * factor)
    assert features._traced_anew == 1


class Holds(nnx.Module):
    def __init__(self):
        self.sizes = [1, 2]
        self.table = {"scale": 1.0}
        self.data = nnx.data({"w": jnp.ones(6)})
        self.weight = nnx.Param({"w": jnp.ones(6)})

    def __call__(self, x):
        return x * float(sum(self.sizes)) * self.table["scale"] * self.data["w"] * self.weight.get_value()["w"]


def test_what_an_nnx_module_holds_in_containers_is_watched():
    model = Holds()
    features = jaxkv.Memo(memory="1MiB").wrap(model)

    def check(factor):
        np.testing.assert_array_equal(features(X), X * np.float32(factor))

    check(3)
    model.sizes.append(1)
    check(4)
    model.table["scale"] = 0.5
    check(2)
    model.data["w"] = jnp.full(6, 3.0)
    check(6)
    model.weight.get_raw_value()["w"] = jnp.full(6, 0.25)
    check(1.5)


def test_modules_that_are_reached_through_others_are_refused():
    model = Nnx(nnx.Rngs(0))
    memo = jaxkv.Memo(memory="1MiB")
    for function in (
        lambda x, models={"a": [model]}: models["a"][0](x),
        functools.partial(lambda model, x: model(x), model),
        jax.vmap(model),
        nnx.vmap(model),
        functools.partial(jax.vmap(lambda x: model(x))),
    ):
        with pytest.raises(ValueError, match=r"reads the nnx module \w+ from outside.*wrap the module itself"):
            memo.wrap(function)


class Methods(linen.Module):
    def __call__(self, x, train=True):
        return x + float(train)

    def encode(self, x, negate=False):
        return -x if negate else x

    def last(self, x):
        return x * 3


def test_another_method_of_a_linen_module_has_its_own_arguments():
    module = Methods()
    features = jaxkv.Memo(memory="1MiB").wrap(module.apply, {})
    np.testing.assert_array_equal(features(X), X + 1)
    np.testing.assert_array_equal(features(X, method="encode"), X)
    np.testing.assert_array_equal(features(X, negate=True, method="encode"), -X)
    np.testing.assert_array_equal(features(X, method="last"), X * 3)


@pytest.mark.parametrize("kind", ["params", "module"])
def test_what_is_exchanged_within_a_call_does_not_reach_it(kind, monkeypatch):
    """As another thread may, between the lookup and the computing."""
    memo = jaxkv.Memo(memory="1MiB")
    if kind == "params":
        params = {"w": jnp.ones(6)}
        features, exchange = memo.wrap(lambda params, x: x * params["w"], params), params.update
    else:

        class Scale(nnx.Module):
            def __init__(self):
                self.w = nnx.Param(jnp.ones(6))

            def __call__(self, x):
                return x * self.w[...]

        model = Scale()
        features, exchange = memo.wrap(model), lambda new: model.w.set_value(new["w"])
    read = memo._tiers.read

    def read_and_exchange(keys, nbytes):
        exchange({"w": jnp.full(6, 5.0)})
        return read(keys, nbytes)

    monkeypatch.setattr(memo._tiers, "read", read_and_exchange)
    np.testing.assert_array_equal(features(X), X)
    monkeypatch.undo()
    np.testing.assert_array_equal(features(X), X * 5)
    exchange({"w": jnp.ones(6)})
    np.testing.assert_array_equal(features(X), X)


def test_one_version_of_several_functions_that_call_back():
    memo = jaxkv.Memo(memory="1MiB")

    def called(dtype, x):
        shape = jax.ShapeDtypeStruct(x.shape, dtype)
        return jax.pure_callback(lambda x: np.asarray(x).astype(dtype), shape, x)

    same = functools.partial(called, np.float32)
    for function, dtype in [
        (same, None),
        (functools.partial(called, np.int8), None),
        (functools.partial(called, np.int32), None),
        (lambda x: same(x) * 3, None),
        (same, "bfloat16"),
    ]:
        expected = function(X) if dtype is None else function(X).astype(dtype)
        got = memo.wrap(function, version="1", output_dtype=dtype)(X)
        assert got.dtype == expected.dtype
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(expected, np.float32))


def test_callbacks_on_buffers_want_a_version():
    buffer_callback = pytest.importorskip("jax.experimental.buffer_callback").buffer_callback

    def called(x):
        return buffer_callback(lambda context, out, x: None, jax.ShapeDtypeStruct(x.shape, x.dtype))(x)

    with pytest.raises(jaxkv.NotSupportedError, match=r"calls back into Python \(buffer_callback\)"):
        jaxkv.Memo(memory="1MiB").wrap(called)(X)


ONES = jnp.ones(6)


def positional(x, shift=ONES, scale=2.0, /):
    return (x + shift) * scale


def test_defaults_that_cannot_be_given_by_name():
    np.testing.assert_array_equal(jaxkv.Memo(memory="1MiB").wrap(positional)(X), (X + 1) * 2)
