"""Offload: what comes back is what went in, memory is freed at the last use, and nothing is done by half."""

from __future__ import annotations

import collections
import copy
import ctypes
import dataclasses
import gc
import os
import pathlib
import pickle
import random
import resource
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, struct
from flax.core import FrozenDict
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxkv import CacheError, Offload, aligned
from jaxkv.offload import ahead, kept

ROOT = pathlib.Path(__file__).parent.parent
CPUS = jax.devices("cpu")
TARGETS = ("pinned_host", "numpy", "disk", "sharding", "spilling", "none")
COPYING = TARGETS[:-1]
DTYPES = ("float32", "bfloat16", "float8_e4m3fn", "int4", "uint4", "bool", "int8", "complex64")


def make(target: str, folder: pathlib.Path) -> Offload:
    if target == "spilling":
        return Offload("pinned_host", budget=200, spill=folder)
    to = {"disk": folder, "sharding": SingleDeviceSharding(CPUS[3]), "none": None}
    return Offload(to.get(target, target))


@pytest.fixture(params=TARGETS)
def store(request, tmp_path):
    with make(request.param, tmp_path) as store:
        yield store


@pytest.fixture(params=COPYING)
def copying(request, tmp_path):
    with make(request.param, tmp_path) as store:
        yield store


@pytest.fixture
def far(monkeypatch):
    """As if the CPU were an accelerator: what is prefetched there is fetched ahead."""
    monkeypatch.setattr(kept, "NEAR", frozenset())


class Pair(NamedTuple):
    first: object
    second: object


@struct.dataclass
class Registered:
    x: jax.Array
    name: str = struct.field(pytree_node=False, default="r")


@dataclasses.dataclass
class Plain:
    x: object
    rest: object = None


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    x: object
    fixed: int = dataclasses.field(default=3, init=False)


@dataclasses.dataclass(slots=True)
class OpenSlots:
    x: object


@dataclasses.dataclass
class Output(collections.OrderedDict):
    """What transformers' ModelOutput is like."""

    logits: object = None

    def __post_init__(self):
        self["logits"] = self.logits


class Names(dict):
    """A dict that JAX does not know."""


def array(seed: int, shape: tuple[int, ...] = (3, 2), dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, 2, shape)).astype(dtype)


def values(x: object) -> np.ndarray:
    """A copy; of keys, their data."""
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.array(x)


def same(got: object, expected: object) -> None:
    """Checks trees of arrays, containers, dtypes, places and all."""
    if dataclasses.is_dataclass(expected):
        got, expected = ([getattr(x, f.name) for f in dataclasses.fields(x)] for x in (got, expected))
    if isinstance(expected, Mapping):
        assert list(got) == list(expected)  # JAX would sort them
        got, expected = list(got.values()), list(expected.values())

    def whole(x: object) -> bool:
        return type(x) is dict or dataclasses.is_dataclass(x)

    leaves, tree = jax.tree.flatten(got, is_leaf=whole)
    expected_leaves, expected_tree = jax.tree.flatten(expected, is_leaf=whole)
    assert tree == expected_tree
    for x, y in zip(leaves, expected_leaves, strict=True):
        assert type(x) is type(y)
        if whole(y):
            same(x, y)
        elif isinstance(y, jax.Array):
            assert (x.dtype, x.shape) == (y.dtype, y.shape)
            assert (x.sharding, x.committed) == (y.sharding, y.committed)
            np.testing.assert_array_equal(values(x), values(y))
        elif isinstance(y, np.ndarray):
            assert (x.dtype, x.shape) == (y.dtype, y.shape)
            np.testing.assert_array_equal(x, y)
        else:
            assert x is y


def through(store: Offload, value: object) -> object:
    return store.fetch(store.append({"x": value}))["x"]


# What comes back is what went in.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 4)], ids=str)
def test_arrays_come_back_in_every_dtype_and_shape(store, dtype, shape):
    x = array(1, shape, dtype)
    same(through(store, x), x)
    n = np.array(x)
    back = through(store, n)
    same(back, n)
    assert back.flags.writeable


def test_eight_byte_numbers_come_back_outside_of_where_they_were_allowed(store):
    with jax.enable_x64(True):
        x, y = jnp.arange(3, dtype="int64") + 2**40, jnp.array(1.1, dtype="float64")
    back = through(store, [x, y])
    assert [a.dtype for a in back] == ["int64", "float64"]
    assert [a.tolist() for a in back] == [x.tolist(), y.tolist()]


def test_weak_types_stay_weak(store):
    strong = jnp.asarray(1.5, "float32")
    for x in (jnp.asarray(1.5), jax.device_put(jnp.asarray(1.5), CPUS[1]), jnp.full((3,), 2), strong):
        back = through(store, x)
        assert (
            (back.weak_type, back.committed) == (x.weak_type, x.committed) == (x is not strong, CPUS[1] in x.devices())
        )


CONTAINERS = {
    "dict": lambda x, n: {"b": x, "a": n},
    "keys that can't be sorted": lambda x, n: {1: x, "a": n, None: 2},
    "OrderedDict": lambda x, n: collections.OrderedDict(z=x, a=n),
    "defaultdict": lambda x, n: collections.defaultdict(list, {"q": x, 1: n, "a": {"z": x, "b": n}}),
    "FrozenDict": lambda x, n: FrozenDict({"q": x, 1: n, "a": {"z": x, "b": n}}),
    "tuple, list, None": lambda x, n: (x, [n, None, (x,)], ()),
    "namedtuple": lambda x, n: Pair(x, Pair(n, "text")),
    "registered": lambda x, n: Registered(x, "other"),
    "dataclass": lambda x, n: Plain(x, Plain({"deep": n})),
    "dataclass in a dataclass in a list": lambda x, n: [Plain([Plain(n)], (x,))],
    "frozen with slots": lambda x, n: Slotted(x),
    "slots": lambda x, n: OpenSlots(x),
    "State": lambda x, n: nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0))),
    "State in an order of its own": lambda x, n: nnx.State({"q": x, 1: n, "a": {"z": x, "b": n}}),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("target", ["numpy", "none"])
def test_containers_come_back_as_they_were(container, target, tmp_path):
    value = CONTAINERS[container](array(0), np.arange(3))
    with make(target, tmp_path) as store:
        back = through(store, value)
        assert type(back) is type(value) and back is not value
        assert getattr(back, "default_factory", None) is getattr(value, "default_factory", None)
        same(back, value)


def test_a_dict_that_is_a_dataclass_and_one_that_jax_does_not_know_come_back(copying):
    output = through(copying, Output(logits=array(3)))
    assert type(output) is Output and list(output) == ["logits"]
    same([output.logits, output["logits"]], [array(3), array(3)])
    names = through(copying, Names(mask=array(4)))
    assert type(names) is Names
    same(names["mask"], array(4))
    assert sum(copying.size().values()) == 2 * 24


def test_attributes_of_a_dataclass_beside_its_fields_come_back():
    value = Plain(array(0))
    value.extra = array(1)
    with Offload("numpy") as store:
        back = through(store, value)
        same([back.x, back.extra], [value.x, value.extra])
        assert store.size() == {"numpy": 48}


def test_leaves_that_are_no_arrays_stay_as_they_are(store):
    leaves = [
        "text",
        3,
        2.5,
        None,
        object(),
        len,
        np.float32(1),
        Plain,
        Plain("no array"),
        jax.ShapeDtypeStruct((), "int8"),
    ]
    assert all(a is b for a, b in zip(through(store, leaves), leaves, strict=True))
    assert store.size() == {}


def test_plain_objects_are_kept_by_reference_and_their_arrays_are_not_counted(copying):
    class Output:
        logits = array(0)

    output = Output()
    copying.append({"a": output})
    assert copying.fetch(0)["a"] is output and copying.size() == {}


def test_odd_numpy_arrays_come_back(store):
    odd = [
        np.array([1, "a", None], dtype=object),
        np.ma.masked_array([1, 2, 3], [0, 1, 0]),
        np.array(["a", "bc"]),
        np.array(["2020-01-01", "NaT"], "datetime64[D]"),
        np.array([(1, 2.0)], [("a", "i4"), ("b", "f8")]),
        np.arange(6).reshape(2, 3).T,
        np.arange(3, dtype=">i4"),
        np.zeros(2, jax.dtypes.float0),
    ]
    for x in odd:
        back = through(store, x)
        assert type(back) is type(x) and back.dtype == x.dtype and back.shape == x.shape
        assert back.tolist() == x.tolist()
        assert not np.shares_memory(back, x)
        i = store.append({"x": x})
        before = x.tolist()
        x[0] = x[-1]
        assert store.fetch(i)["x"].tolist() == before


def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


@pytest.mark.parametrize("spec", [(), ("a",), ("a", "b"), (None, ("a", "b")), ("b",)], ids=str)
def test_shardings_come_back(store, spec):
    x = jax.device_put(array(0, (4, 8)), NamedSharding(mesh(), PartitionSpec(*spec)))
    same(through(store, x), x)


def test_an_explicit_mesh_comes_back(store):
    explicit = jax.make_mesh((4,), ("a",), axis_types=(jax.sharding.AxisType.Explicit,))
    x = jax.device_put(array(0, (4, 8)), NamedSharding(explicit, PartitionSpec("a")))
    back = through(store, x)
    same(back, x)
    assert jax.typeof(back) == jax.typeof(x)


@pytest.mark.parametrize("device", [0, 2])
@pytest.mark.parametrize("committed", [False, True])
def test_committedness_comes_back(store, device, committed):
    with jax.default_device(CPUS[device]):
        x = jnp.arange(3.0)
    if committed:
        x = jax.device_put(x, CPUS[device])
    assert x.committed == committed
    same(through(store, x), x)
    assert x.devices() == {CPUS[device]}


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_typed_keys_come_back(store, impl):
    keys = jax.random.split(jax.random.key(3, impl=impl), 4)
    key_mesh = NamedSharding(mesh(), PartitionSpec("a"))
    for key in (keys, keys[0], jax.device_put(keys, CPUS[1]), jax.device_put(keys, key_mesh)):
        back = through(store, key)
        assert back.dtype == key.dtype and back.committed == key.committed and back.sharding == key.sharding
        np.testing.assert_array_equal(values(back), values(key))


def test_memory_kinds_come_back(store):
    x = jax.device_put(array(0), SingleDeviceSharding(CPUS[1], memory_kind="pinned_host"))
    same(through(store, x), x)


# Nothing aliases.


def aligned_array(n: int) -> np.ndarray:
    """An array that jax.device_put on a CPU would take over without a copy."""
    x = aligned.empty((n,), "float32")
    x[:] = np.arange(n)
    assert jax.device_put(x).unsafe_buffer_pointer() == x.ctypes.data
    return x


def test_writing_into_the_source_or_into_what_was_fetched_changes_nothing(store):
    source, before = aligned_array(1000), np.arange(1000, dtype="float32")
    i = store.append({"x": source})
    source[:] = -1
    first = store.fetch(i)["x"]
    np.testing.assert_array_equal(first, before)
    first[:] = -2
    np.testing.assert_array_equal(store.fetch(i)["x"], before)
    with Offload.from_batches([{"x": before}], device=CPUS[1]) as other:
        before[:] = -3
        np.testing.assert_array_equal(other.fetch(0)["x"], np.arange(1000))


def test_an_array_that_is_donated_or_deleted_keeps_its_stored_copy(copying):
    donate = jax.jit(lambda x: x * 0 - 7, donate_argnums=0)
    for end in (donate, lambda x: x.delete()):
        for where in (CPUS[0], CPUS[3], SingleDeviceSharding(CPUS[0], memory_kind="pinned_host")):
            x = jax.device_put(jnp.asarray(aligned_array(1000)) + 0, where)
            i = copying.append({"x": x})
            jax.block_until_ready(end(x))
            np.testing.assert_array_equal(copying.fetch(i)["x"], np.arange(1000))


def test_a_fetched_array_that_is_donated_is_fetched_again(copying):
    donate = jax.jit(lambda x: x * 0 - 7, donate_argnums=0)
    i = copying.append({"x": jnp.asarray(aligned_array(1000)) + 0})
    for end in (donate, lambda x: x.delete()):
        fetched = copying.fetch(i)["x"]
        jax.block_until_ready(end(fetched))
        assert fetched.is_deleted()
        np.testing.assert_array_equal(copying.fetch(i)["x"], np.arange(1000))


def test_a_sharding_that_is_the_arrays_own_is_a_copy_all_the_same():
    donate = jax.jit(lambda x: x * 0 - 7, donate_argnums=0)
    x = jnp.asarray(aligned_array(1000)) + 0
    with Offload(x.sharding) as store:
        store.append({"x": x})
        for _ in range(3):
            jax.block_until_ready(donate(x))
            x = store.fetch(0)["x"]
            np.testing.assert_array_equal(x, np.arange(1000))
        assert store.size() == {"device": 4000}


def placements() -> dict[str, jax.sharding.Sharding]:
    two = jax.sharding.Mesh(np.array(CPUS[:2]), "d")
    other_way = jax.sharding.Mesh(np.array(CPUS[1::-1]), "d")
    return {
        "one": SingleDeviceSharding(CPUS[0]),
        "other": SingleDeviceSharding(CPUS[1]),
        "mesh of one": NamedSharding(jax.sharding.Mesh(np.array(CPUS[:1]), "d"), PartitionSpec()),
        "replicated": NamedSharding(two, PartitionSpec()),
        "split": NamedSharding(two, PartitionSpec("d")),
        "split the other way": NamedSharding(other_way, PartitionSpec("d")),
        "one, pinned": SingleDeviceSharding(CPUS[0], memory_kind="pinned_host"),
        "replicated, pinned": NamedSharding(two, PartitionSpec(), memory_kind="pinned_host"),
    }


def overlap(x: jax.Array, y: jax.Array) -> bool:
    spans = [
        [(shard.data.unsafe_buffer_pointer(), shard.data.nbytes) for shard in array.addressable_shards]
        for array in (x, y)
    ]
    return any(a < b + length and b < a + size for a, size in spans[0] for b, length in spans[1])


@pytest.mark.parametrize("source", placements())
@pytest.mark.parametrize("to", placements())
def test_under_another_sharding_it_is_a_copy_all_the_same(to, source):
    values = np.arange(1000, dtype="float32")
    x = jax.device_put(jnp.asarray(values) + 0, placements()[source])
    with Offload(placements()[to]) as store:
        store.append({"x": x})
        stored = next(store._rows[0]["x"].kept()).data
        assert stored.sharding == placements()[to]
        fetched = store.fetch(0)["x"]
        same(fetched, x)
        assert not any(overlap(a, b) for a, b in [(x, stored), (stored, fetched), (x, fetched)])
        fetched.delete()
        np.testing.assert_array_equal(x, values)
        x.delete()
        np.testing.assert_array_equal(store.fetch(0)["x"], values)


def test_what_device_put_has_copied_is_not_copied_again(monkeypatch):
    put, calls = jax.device_put, []

    def device_put(*args, **options):
        calls.append(args)
        return put(*args, **options)

    places = placements()
    for to, source, puts in [
        ("other", "one", 1),
        ("split", "one", 1),
        ("replicated", "one", 2),
        ("one", "replicated", 2),
    ]:
        x = jax.device_put(jnp.arange(8.0), places[source])
        with monkeypatch.context() as patch, Offload(places[to]) as store:
            patch.setattr(jax, "device_put", device_put)
            store.append({"x": x})
            assert len(calls) == puts
        calls.clear()


@pytest.mark.parametrize("target", ["numpy", "disk", "spilling"])
def test_what_jax_takes_over_is_not_the_stores_own_memory(target, tmp_path):
    with make(target, tmp_path) as store:
        store.append({"x": jnp.arange(1000.0)})
        data = next(store._rows[0]["x"].kept()).data
        own = data if isinstance(data, np.ndarray) else np.empty(0)
        fetched = store.fetch(0)["x"]
        assert not np.shares_memory(np.asarray(fetched), own)  # np.asarray of JAX's array on a CPU is its memory
        writeable = np.ctypeslib.as_array(
            ctypes.cast(fetched.unsafe_buffer_pointer(), ctypes.POINTER(ctypes.c_float)), (1000,)
        )
        writeable[:] = 99  # as torch.from_dlpack lets everybody do
        del fetched
        np.testing.assert_array_equal(store.fetch(0)["x"], np.arange(1000))


def test_in_place_a_deleted_array_is_an_error_that_says_so():
    x = jnp.ones(3)
    store = Offload(None)
    store.append({"x": x})
    assert store.fetch(0)["x"] is x
    x.delete()
    with pytest.raises(CacheError, match="deleted or donated after it had been stored, and to=None keeps no copy"):
        store.fetch(0)


def test_a_deleted_array_is_refused(store):
    x = jnp.ones(3)
    x.delete()
    with pytest.raises(ValueError, match=r"'x' has an array float32\(3,\) that was deleted or donated"):
        store.append({"x": [x]})
    assert len(store) == 0


# Sharing, and freeing.


def test_a_mask_in_many_batches_is_stored_once_and_freed_with_the_last(store):
    mask, other = array(0, (8, 4)), array(1, (8, 4))
    for _ in range(50):
        store.append({"mask": mask, "again": [mask]})
    assert sum(store.size().values()) == 128
    store.append({"mask": other})
    assert sum(store.size().values()) == 256
    for i in range(50):
        assert sum(store.size().values()) == 256
        store.delete(i, ["mask"])
        store.delete(i)
    assert sum(store.size().values()) == 128
    store.delete(50)
    assert store.size() == {}


def test_equal_numpy_arrays_are_not_shared(store):
    n = np.arange(4, dtype="int32")
    store.append({"a": n, "b": n})
    assert sum(store.size().values()) == 32


def test_keys_are_shared_too(store):
    key = jax.random.key(0)
    store.append({"a": key, "b": key})
    assert sum(store.size().values()) == 8


def test_a_living_fetched_array_is_fetched_again_and_stored_once(copying):
    i = copying.append({"x": array(0)})
    first = copying.fetch(i)["x"]
    assert copying.fetch(i)["x"] is first
    j = copying.append({"x": first})
    assert sum(copying.size().values()) == 24
    assert copying.fetch(j)["x"] is first
    gone = weakref.ref(first)
    del first
    assert gone() is None


def test_a_reused_id_is_not_taken_for_the_array_that_had_it(copying):
    seen = set()
    for n in range(200):
        x = jnp.asarray(np.full(4, n, "int32"))
        seen.add(id(x))
        copying.append({"x": x})
        del x
    assert len(seen) < 200
    assert [int(batch["x"][0]) for batch in copying] == list(range(200))


def test_sources_are_not_kept_alive_nor_remembered(copying):
    x = array(0)
    gone = weakref.ref(x)
    copying.append({"x": x})
    assert len(copying._sources._known) == 1
    del x
    assert gone() is None
    assert not copying._sources._known


@pytest.mark.parametrize("target", ["pinned_host", "numpy", "disk", "sharding"])
def test_memory_is_free_after_take_delete_update_and_close(target, tmp_path):
    gc.collect()
    before = {id(x) for x in jax.live_arrays()}

    def living() -> list[str]:
        return sorted(x.sharding.memory_kind for x in jax.live_arrays() if id(x) not in before)

    with make(target, tmp_path) as store:
        for i in range(4):
            store.append({"x": array(i), "y": array(i, (2,))})
        stored = {"pinned_host": "pinned_host", "sharding": "device"}.get(target)
        assert living() == [stored] * 8 * (stored is not None)
        store.take(0)
        store.delete(1, ["x"])
        store.update(2, {"x": "text"})
        assert living() == [stored] * 4 * (stored is not None)
        assert store.size() == {stored or target: 24 + 3 * 8}
        assert len(list(tmp_path.rglob("*"))) == (5 if target == "disk" else 0)
        batch = store.fetch(3)
    assert store.size() == {}
    same(batch, {"x": array(3), "y": array(3, (2,))})
    del batch
    assert living() == []
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_nobody_asks_for_its_size_does_not_grow():
    store = Offload("numpy")
    store.append({"x": 0})
    for i in range(100):
        store.update(0, {"x": np.full(3, i)})
    assert len(store._tally._freed) <= 1
    assert store.size() == {"numpy": 24}


def test_numpy_memory_is_free_after_delete():
    store = Offload("numpy")
    store.append({"x": np.ones(5), "y": jnp.ones(5)})
    held = [weakref.ref(leaf.data) for leaf in (k for p in store._rows[0].values() for k in p.kept())]
    assert all(ref() is not None for ref in held)
    store.delete(0)
    assert all(ref() is None for ref in held)


def test_size_counts_every_device_and_every_kind(tmp_path):
    everywhere = jax.device_put(array(0, (4, 4)), NamedSharding(mesh(), PartitionSpec()))
    split = jax.device_put(array(1, (4, 4)), NamedSharding(mesh(), PartitionSpec("a")))
    batch = {"x": everywhere, "y": split, "z": np.ones(3), "k": jax.random.key(0), "n": jnp.zeros((0, 3))}
    sizes = {"pinned_host": 4 * 64 + 2 * 64 + 8, "numpy": 24}
    for to, expected in (("pinned_host", sizes), ("numpy", {"numpy": 64 + 64 + 24 + 8}), (tmp_path, {"disk": 160})):
        with Offload(to) as store:
            store.append(batch)
            assert store.size() == expected


def test_no_more_than_one_batch_of_copies_is_on_its_way():
    store = Offload("pinned_host")
    for i in range(5):
        store.append({"x": jnp.full(4_000_000, i)})
        stored = [leaf.data for row in store._rows for packed in row.values() for leaf in packed.kept()]
        assert all(data.is_ready() for data in stored[:i])


# The interface.


def test_names_are_asked_for_in_any_order_and_missing_ones_are_named(store):
    store.append({"a": array(0), "b": 1})
    assert list(store.fetch(0)) == ["a", "b"]
    assert list(store.fetch(0, ["b", "a"])) == ["b", "a"]
    assert list(store.fetch(0, (n for n in ["b"]))) == ["b"]
    assert store.fetch(0, []) == {}
    for call in (store.fetch, store.take, store.delete, lambda i, names: next(store.iter(names))):
        with pytest.raises(KeyError, match="batch 0 has no 'c', 'd'; it has 'a', 'b'"):
            call(0, ["a", "c", "d"])
    assert store.fetch(0, ["c", "b"], missing="skip") == {"b": 1}
    assert list(next(store.iter(["c", "b"], missing="skip"))) == ["b"]
    assert list(store.fetch(0)) == ["a", "b"]


def test_wrong_arguments_are_refused(store):
    store.append({"a": 1})
    for index in (1, -1, 5, "0", None):
        for call in (store.fetch, store.take, store.delete, lambda i: store.update(i, {})):
            with pytest.raises(IndexError, match="batch"):
                call(index)
    with pytest.raises(IndexError, match="there is no batch 3; there are 0 to 0"):
        store.fetch(3)
    for batch in ([1], "text", {1: 2}, None):
        with pytest.raises(ValueError, match="a batch is a dict"):
            store.append(batch)
        with pytest.raises(ValueError, match="a batch is a dict"):
            store.update(0, batch)
    with pytest.raises(ValueError, match=r"give a list, \['hidden'\]"):
        store.fetch(0, "hidden")
    with pytest.raises(ValueError, match="'raise' and 'skip'"):
        store.fetch(0, missing="ignore")
    for prefetch in (-1, 1.0, True, None):
        with pytest.raises(ValueError, match="how many batches"):
            store.iter(prefetch=prefetch)
    assert store.fetch(0) == {"a": 1}


def test_places_that_are_none_are_refused(tmp_path):
    for to in ("pined_host", 3, "", jnp.ones(1)):
        with pytest.raises(ValueError, match=r"not a place: use 'numpy', a memory .*'pinned_host'.*\./activations"):
            Offload(to)
    for arguments, text in [
        (dict(to=tmp_path, budget=5), "leave it out"),
        (dict(to=None, budget=5), "leave it out"),
        (dict(to="numpy", budget=5), "needs a directory to spill to"),
        (dict(spill=tmp_path), "used with a budget only"),
        (dict(budget=5, spill=None), "goes to 'numpy' or a directory"),
        (dict(budget="much"), "is not a size"),
    ]:
        with pytest.raises(ValueError, match=text):
            Offload(**arguments)


def test_a_store_belongs_to_its_process(store):
    store.append({"a": array(0)})
    for call in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match=r"belongs to its process, .* can't be pickled or copied\. Send what fetch"):
            call(store)
    same(store.fetch(0), {"a": array(0)})


def test_a_device_that_is_none_is_refused_before_the_loader_is_asked():
    def loader():
        raise AssertionError
        yield

    for device in ("cpu", 0, CPUS):
        with pytest.raises(ValueError, match=r"device=.* is none: give one of jax\.devices\(\), .*a Sharding"):
            Offload.from_batches(loader(), "numpy", device=device)
    for device in (CPUS[1], SingleDeviceSharding(CPUS[1])):
        batch = Offload.from_batches([{"x": np.ones(2)}], "numpy", device=device).fetch(0)
        assert batch["x"].devices() == {CPUS[1]}


def test_update_adds_and_replaces_and_take_empties(store):
    store.append({"a": array(0), "b": array(1)})
    store.update(0, {"b": array(2), "c": (array(3), "text")})
    same(store.fetch(0), {"a": array(0), "b": array(2), "c": (array(3), "text")})
    same(store.take(0, ["c", "a"]), {"c": (array(3), "text"), "a": array(0)})
    same(store.fetch(0), {"b": array(2)})
    assert len(store) == 1
    store.delete(0)
    assert store.fetch(0) == {} and len(store) == 1 and store.size() == {}
    assert store.append({"z": 1}) == 1


def test_what_a_batch_was_stored_as_can_be_changed_afterwards(store):
    batch = {"a": [array(0)], "b": {"c": 1}}
    store.append(batch)
    batch["a"].append(2)
    batch["b"]["c"] = 3
    del batch["a"]
    same(store.fetch(0), {"a": [array(0)], "b": {"c": 1}})
    store.fetch(0)["b"]["c"] = 4
    assert store.fetch(0)["b"] == {"c": 1}


def test_a_closed_store_says_so(store):
    store.append({"a": array(0)})
    steps = iter(store)
    store.close()
    store.close()
    calls = [store.fetch, store.take, store.delete, lambda i: store.append({}), lambda i: store.update(i, {})]
    for call in [*calls, lambda i: len(store), lambda i: store.iter(), lambda i: next(steps)]:
        with pytest.raises(CacheError, match="this Offload is closed"):
            call(0)
    assert repr(store).endswith("closed)")


def test_its_representation_says_what_it_holds(tmp_path):
    store = Offload("numpy")
    assert repr(store) == "Offload(to='numpy', 0 batches)"
    store.append({"hidden": jnp.ones((256, 4)), "mask": 1})
    assert repr(store) == "Offload(to='numpy', 1 batch of hidden, mask, 4.0 KiB numpy)"


def test_it_is_made_from_a_loader(tmp_path, capsys):
    store = Offload.from_batches(({"x": np.full(3, i)} for i in range(3)), to=tmp_path, progress=True)
    assert [int(batch["x"][0]) for batch in store.iter()] == [0, 1, 2]
    assert "3batch" in capsys.readouterr().err.replace(" ", "")
    batch = {"x": [np.arange(3, dtype="int32"), "text"], "y": jnp.ones(1)}
    with Offload.from_batches([batch], to="numpy", device=CPUS[2]) as store:
        same(store.fetch(0), {"x": [jax.device_put(batch["x"][0], CPUS[2]), "text"], "y": batch["y"]})


def test_a_loader_that_fails_leaves_no_files(tmp_path):
    def loader():
        yield {"x": jnp.ones(3)}
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more") as first:
        Offload.from_batches(loader(), to=tmp_path)
    with pytest.raises(ValueError, match="a batch is a dict") as second:
        Offload.from_batches([3], to=tmp_path)
    assert list(tmp_path.iterdir()) == [] and first and second  # which hold all that they passed


def test_a_progress_bar_without_tqdm_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r"pip install tqdm$"):
        Offload.from_batches([], progress=True)


def test_tracing_is_a_clear_error(store):
    store.append({"x": jnp.ones(3)})
    uses = [
        lambda x: store.append({"x": x}),
        lambda x: store.append({"x": np.ones(3)}),
        lambda x: store.update(0, {"x": x}),
        lambda x: store.fetch(0),
        lambda x: store.take(0),
        lambda x: next(store.iter()),
    ]
    for transform in (jax.jit, jax.grad, jax.vmap, lambda f: lambda x: jax.eval_shape(f, x)):
        for use in uses:
            with pytest.raises(CacheError, match="under jit, grad or vmap"):
                transform(lambda x, use=use: use(x) and x.sum())(jnp.ones(3))
    assert len(store) == 1 and list(store.fetch(0)) == ["x"]


def test_a_tracer_that_leaked_is_refused():
    leaked = []
    jax.eval_shape(leaked.append, 1.0)
    with pytest.raises(CacheError, match="'x' has a traced array"):
        Offload("numpy").append({"x": {"deep": leaked[0]}})


# Nothing is done by half.


class Unwilling:
    """A pytree that can't be taken apart, or not be put together."""

    def __init__(self, when: str) -> None:
        self.when = when


def refuse(when):
    raise RuntimeError(f"not {when}")


jax.tree_util.register_pytree_node(
    Unwilling,
    lambda u: refuse("in") if u.when == "in" else ((), u.when),
    lambda when, _: refuse("out") if when == "out" else Unwilling(when),
)


def test_a_failing_append_or_update_leaves_the_store_as_it_was(store, tmp_path):
    store.append({"x": array(0)})
    size, files = store.size(), len(list(tmp_path.rglob("*")))
    for call in (store.append, lambda batch: store.update(0, batch)):
        with pytest.raises(RuntimeError, match="not in"):
            call({"x": array(1), "y": np.ones(4), "z": Unwilling("in")})
        gc.collect()  # the error held what had been stored
        assert len(store) == 1 and store.size() == size and len(list(tmp_path.rglob("*"))) == files
        same(store.fetch(0), {"x": array(0)})


def test_a_failing_take_deletes_nothing(store):
    store.append({"a": array(0), "b": Unwilling("out"), "c": array(1)})
    with pytest.raises(RuntimeError, match="not out"):
        store.take(0)
    same(store.fetch(0, ["a", "c"]), {"a": array(0), "c": array(1)})
    with pytest.raises(KeyError, match="it has 'a', 'b', 'c'"):
        store.fetch(0, ["d"])


def test_a_full_disk_is_an_error_that_changes_nothing(tmp_path):
    with Offload(tmp_path) as store:
        store.append({"x": array(0)})
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        try:
            for call in (store.append, lambda batch: store.update(0, batch)):
                with pytest.raises(OSError, match=r"can't write 39.1 KiB to .*; nothing was changed") as raised:
                    call({"x": array(1), "y": jnp.ones(10_000)})
                assert raised.value.errno
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        del raised
        gc.collect()
        assert store.size() == {"disk": 24} and len(store) == 1
        assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1
        same(store.fetch(0), {"x": array(0)})
        store.append({"x": jnp.ones(10_000)})


def test_a_directory_that_cannot_be_is_an_error_that_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"can't keep arrays in .*file/below: .*; give another `to`"):
        Offload(tmp_path / "file" / "below")


def test_files_that_others_change_or_remove_are_clear_errors(tmp_path):
    with Offload(tmp_path) as store:
        store.append({"x": jnp.ones(100), "y": jnp.ones(100)})
        first, second = sorted(path for path in tmp_path.rglob("*") if path.is_file())
        os.truncate(first, 10)
        second.unlink()
        with pytest.raises(OSError, match="390 of 400 bytes short"):
            store.fetch(0, ["x"])
        with pytest.raises(FileNotFoundError):
            store.fetch(0, ["y"])


def test_device_memory_that_runs_out_leaves_the_store_as_it_was(monkeypatch):
    with Offload("pinned_host") as store:
        store.append({"x": array(0)})
        put, calls = jax.device_put, []

        def device_put(*args, **options):
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
            return put(*args, **options)

        monkeypatch.setattr(jax, "device_put", device_put)
        with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
            store.append({"x": array(1), "y": array(2)})
        gc.collect()
        assert store.size() == {"pinned_host": 24} and len(store) == 1
        calls.append(1)
        same(store.fetch(0), {"x": array(0)})


# Files.


def test_a_store_removes_its_directory_and_no_other(tmp_path):
    (tmp_path / "mine").write_text("kept")
    one, two = Offload(tmp_path), Offload(str(tmp_path / "new" / "folder"))
    one.append({"x": jnp.ones(3)})
    two.append({"x": jnp.ones(3)})
    one.close()
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["mine"]
    assert len(list((tmp_path / "new" / "folder").iterdir())) == 1
    del two  # forgotten, not closed
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "mine", "new"]


def test_files_go_when_the_program_ends_and_stay_when_a_fork_of_it_does(tmp_path):
    program = f"""
import os, sys
import jax.numpy as jnp, jaxkv
store = jaxkv.Offload({str(tmp_path / "a")!r})
store.append({{"x": jnp.ones(3)}})
if os.fork() == 0:
    del store
    sys.exit()
os.wait()
assert float(store.fetch(0)["x"].sum()) == 3
print("there")
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("there\n", "")
    assert list((tmp_path / "a").iterdir()) == []


# The budget.


@pytest.mark.parametrize("spill", ["numpy", "disk"])
def test_pinned_memory_has_a_budget_and_the_rest_spills(spill, tmp_path):
    with Offload("pinned_host", budget="100B", spill=tmp_path if spill == "disk" else spill) as store:
        for i in range(6):
            store.append({"x": array(i)})
        assert store.size() == {"pinned_host": 96, spill: 48}
        same([batch["x"] for batch in store], [array(i) for i in range(6)])
        store.delete(0)
        store.append({"x": array(7), "n": np.ones(9)})
        expected = collections.Counter({"pinned_host": 96, spill: 48}) + collections.Counter({"numpy": 72})
        assert store.size() == dict(expected)


def test_a_budget_may_be_any_integer():
    with Offload("pinned_host", budget=np.int64(24)) as store:
        store.append({"x": array(0), "y": array(1)})
        assert store.size() == {"numpy": 24, "pinned_host": 24}


def test_the_budget_counts_every_device():
    x = jax.device_put(array(0, (4, 4)), NamedSharding(mesh(), PartitionSpec("a")))
    for budget, kind in ((127, "numpy"), (128, "pinned_host")):
        store = Offload("pinned_host", budget=budget)
        store.append({"x": x})
        assert list(store.size()) == [kind]


def test_numpy_memory_has_a_budget_too(tmp_path):
    with Offload("numpy", budget=60, spill=tmp_path) as store:
        store.append({"a": np.ones(5), "b": np.ones(3), "c": array(0), "d": np.ones(2)})
        assert store.size() == {"disk": 48, "numpy": 56}


# Iterating.


@pytest.mark.parametrize("mode", ["near", "far"])
@pytest.mark.parametrize("prefetch", [0, 1, 3, 20])
def test_iterating_gives_what_fetching_gives(store, prefetch, mode, request):
    if mode == "far":
        request.getfixturevalue("far")
    for i in range(7):
        store.append({"x": array(i), "n": np.arange(i), "s": f"{i}"})
    for _ in range(2):
        for i, batch in enumerate(store.iter(prefetch=prefetch)):
            same(batch, {"x": array(i), "n": np.arange(i), "s": batch["s"]})
            assert batch["s"] == f"{i}"
    assert i == 6
    assert [list(batch) for batch in store.iter(["s"], prefetch)] == [["s"]] * 7
    assert list(Offload("numpy").iter(prefetch=prefetch)) == []


def fetched_on_device(store: Offload) -> int:
    """How many stored arrays have a living copy on the device."""
    living = [leaf._alive() for row in store._rows for packed in row.values() for leaf in packed.kept() if leaf._alive]
    return sum(x is not None for x in living)


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(ahead.THREAD_NAME)]


def finish() -> None:
    for thread in workers():
        thread.join()


@pytest.mark.parametrize("prefetch", [1, 2])
def test_the_next_batches_are_on_their_way_and_no_more(copying, far, prefetch):
    for i in range(6):
        copying.append({"x": array(i)})
    i = -1
    for batch in copying.iter(prefetch=prefetch):  # enumerate would hold the batch
        i += 1
        coming = min(prefetch, 5 - i)
        steps = copying._rows[i + 1 : i + 1 + coming]
        for leaf in (leaf for row in steps for leaf in row["x"].kept()):
            while leaf._alive is None and workers():  # a worker may still be at it
                pass
            assert leaf._alive is not None
        assert fetched_on_device(copying) <= 1 + prefetch
        assert fetched_on_device(copying) == 1 + coming
        del batch
        assert fetched_on_device(copying) == coming
    finish()
    assert fetched_on_device(copying) == 0


def test_on_a_cpu_nothing_is_fetched_ahead_and_no_thread_runs(copying):
    for i in range(6):
        copying.append({"x": array(i)})
    for batch in copying.iter(prefetch=3):
        assert fetched_on_device(copying) == 1 and batch
        assert workers() == []


@pytest.mark.parametrize("end", ["break", "close", "error", "forget"])
def test_leaving_the_loop_frees_what_was_prefetched(copying, far, end):
    for i in range(6):
        copying.append({"x": array(i)})

    def body() -> None:
        steps = copying.iter(prefetch=3)
        for batch in steps:
            same(batch, {"x": array(0)})
            del batch
            if end == "close":
                steps.close()
            elif end == "error":
                raise ArithmeticError
            elif end == "break":
                break
            else:
                return

    if end == "error":
        with pytest.raises(ArithmeticError):
            body()
        gc.collect()
    else:
        body()
    finish()
    assert fetched_on_device(copying) == 0
    assert workers() == []


def test_an_error_frees_what_was_prefetched(copying, far):
    for i in range(4):
        copying.append({"x": array(i)})
    copying.delete(1)
    steps = copying.iter(["x"], prefetch=3)
    next(steps)
    with pytest.raises(KeyError) as raised:
        next(steps)
    finish()
    assert raised.value and fetched_on_device(copying) == 0


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_batch_updated_after_it_was_prefetched_is_fetched_again(copying, far, prefetch):
    for i in range(5):
        copying.append({"x": array(i), "n": np.full(2, i)})
    got = []
    for i, batch in enumerate(copying.iter(prefetch=prefetch)):
        got.append(int(batch["n"][0]))
        same(batch["x"], array(got[-1]))
        if i + 1 < 5:
            copying.update(i + 1, {"x": array(10 + i), "n": np.full(2, 10 + i)})
        copying.update(i, {"x": "passed"})
    assert got == [0, 10, 11, 12, 13]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_appending_while_iterating_is_an_error(store, far, prefetch):
    for i in range(3):
        store.append({"x": array(i)})
    steps = store.iter(prefetch=prefetch)
    next(steps)
    store.append({"x": 1})
    with pytest.raises(CacheError, match="a batch was appended while iterating over 3"):
        next(steps)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_batches_that_are_passed_may_be_deleted(store, far, prefetch):
    for i in range(5):
        store.append({"x": array(i)})
    for i, batch in enumerate(store.iter(["x"], prefetch=prefetch)):
        same(batch, {"x": array(i)})
        store.delete(i)
    del batch
    assert i == 4
    finish()
    assert store.size() == {}


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_errors_come_at_the_batch_that_has_them(tmp_path, far, prefetch):
    with Offload(tmp_path) as store:
        for i in range(3):
            store.append({"x": array(i), "m": i})
        store.delete(2, ["m"])
        steps = store.iter(["x", "m"], prefetch=prefetch)
        same([next(steps)["x"], next(steps)["x"]], [array(0), array(1)])
        with pytest.raises(KeyError, match="batch 2 has no 'm'; it has 'x'"):
            next(steps)
        file = next(leaf for leaf in store._rows[1]["x"].kept()).data.path
        os.truncate(file, 3)
        steps = store.iter(["x"], prefetch=prefetch)
        same(next(steps)["x"], array(0))
        with pytest.raises(OSError, match="21 of 24 bytes short"):
            next(steps)


@pytest.mark.parametrize("to", ["pinned_host", "numpy"])
@pytest.mark.parametrize("failures", [1, 2])
def test_a_copy_that_fails_ahead_is_tried_again_at_its_turn(to, failures, far, monkeypatch):
    store, bring, tried = Offload(to), kept.Home.bring, []
    for i in range(3):
        store.append({"x": array(i, (i + 1,))})

    def failing(home, data):
        if home.aval.shape == (2,):
            tried.append(1)
            if len(tried) <= failures:
                raise RuntimeError("RESOURCE_EXHAUSTED")
        return bring(home, data)

    monkeypatch.setattr(kept.Home, "bring", failing)
    steps = store.iter(prefetch=2)
    same(next(steps), {"x": array(0, (1,))})
    if failures == 1:
        same([batch["x"] for batch in steps], [array(1, (2,)), array(2, (3,))])
    else:
        with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
            next(steps)


def test_closing_the_iterator_calls_off_what_has_not_begun(far, monkeypatch):
    store, bring, brought = Offload("numpy"), kept.Home.bring, []
    begun, go_on = threading.Event(), threading.Event()
    for i in range(5):
        store.append({"x": array(i)})

    def slow(home, data):
        brought.append(1)
        if len(brought) == 2:
            begun.set()
            go_on.wait()
        return bring(home, data)

    monkeypatch.setattr(kept.Home, "bring", slow)
    steps = store.iter(prefetch=3)
    next(steps)
    begun.wait()
    threads = workers()
    steps.close()  # and does not wait
    go_on.set()
    for thread in threads:
        thread.join()
    assert len(threads) == 1 and len(brought) == 2
    assert fetched_on_device(store) == 0


def test_a_name_that_comes_back_before_its_batch_is_no_error(copying, far):
    for i in range(3):
        copying.append({"x": array(i)})
    copying.delete(1)
    for i, batch in enumerate(copying.iter(["x"], prefetch=2)):
        same(batch["x"], array(i))
        copying.update(1, {"x": array(1)})


# The example.


PEAK = """
import argparse, runpy, sys
import jax
from jaxkv.offload import kept

kept.NEAR.clear()  # the CPU counts as an accelerator
example = runpy.run_path(sys.argv[1])
options = argparse.Namespace(to="pinned_host", layers=4, width=32, length=32, batch=8, batches=6)
layer, peak = example["Layer"](options.width), example["Peak"]()
bring = kept.Home.bring

def bring_and_look(home, data):
    x = bring(home, data)
    peak.look()
    return x

kept.Home.bring = bring_and_look
ranges, params, outputs, _ = example["sequential"](layer, options, peak)
one_layer = sum(x.nbytes for x in jax.tree.leaves((params[0], ranges[0])))
two_batches, output, mask = 2 * outputs[0].nbytes, outputs[0].nbytes, options.length**2
print(peak.most - (one_layer + two_batches + output + mask))
"""


def test_of_the_example_one_layer_and_two_batches_are_on_the_device():
    # In a process of its own: what other tests leave on the device would be counted.
    words = [sys.executable, "-c", PEAK, str(ROOT / "examples" / "sequential_calibration.py")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert 0 <= int(done.stdout) < 100


# Threads.


def test_threads_share_a_store(copying):
    mask, errors = array(0, (16, 4)), []

    def work(number: int) -> None:
        try:
            mine = [copying.append({"mask": mask, "x": jnp.full(4, number * 100 + k)}) for k in range(10)]
            for k, i in enumerate(mine):
                copying.update(i, {"y": np.full(3, k)})
                batch = copying.fetch(i)
                assert int(batch["x"][0]) == number * 100 + k and batch["y"].tolist() == [k] * 3
                assert batch["mask"].shape == mask.shape
                copying.delete(i, ["x"])
                assert copying.take(i, ["y"])["y"].tolist() == [k] * 3
                del batch
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(copying) == 80
    assert sum(copying.size().values()) == mask.nbytes


def test_only_one_of_many_threads_takes_a_value():
    store = Offload("numpy")
    for i in range(20):
        store.append({"x": np.full(1000, i)})
    taken, missed = [], []

    def work() -> None:
        for i in range(20):
            try:
                taken.append(int(store.take(i, ["x"])["x"][0]))
            except KeyError:
                missed.append(i)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(20)) and len(missed) == 60


# Random programs, against a dict of copies.

PROGRAMS = int(os.environ.get("JAXKV_OFFLOAD_PROGRAMS", "3"))  # 200 takes some minutes


class Program:
    """Random operations on a store, and on plain copies."""

    def __init__(self, store: Offload, seed: int) -> None:
        self.store, self.random = store, random.Random(seed)
        self.model: list[dict[str, tuple[str, object]]] = []
        self.pool = [array(seed + i, (i + 1, 3), DTYPES[i % len(DTYPES)]) for i in range(6)]
        self.stored: list[weakref.ref] = []

    def value(self) -> tuple[object, object]:
        """Returns (what is stored, an independent copy as nested lists of arrays)."""
        kind = self.random.choice(["new", "pool", "numpy", "tree", "key", "text"])
        seed = self.random.randrange(10**6)
        shape = (self.random.randrange(4), self.random.randrange(1, 5))
        if kind == "new":
            x = array(seed, shape, self.random.choice(DTYPES))
        elif kind == "pool":
            x = self.random.choice(self.pool)
        elif kind == "numpy":
            x = np.random.default_rng(seed).random(shape)
        elif kind == "tree":
            x = Plain(Pair(self.random.choice(self.pool), np.arange(seed % 5)), {"b": 1, "a": [None, "t"]})
        elif kind == "key":
            x = jax.random.key(seed)
        else:
            x = f"text {seed}"
        return x, self.frozen(x)

    def frozen(self, x: object) -> object:
        if isinstance(x, Plain):
            return [self.frozen(x.x), self.frozen(x.rest)]
        return jax.tree.map(lambda a: values(a) if isinstance(a, (jax.Array, np.ndarray)) else a, x)

    def batch(self) -> tuple[dict, dict]:
        pairs = {name: self.value() for name in self.random.sample("abcd", self.random.randrange(4))}
        return {n: x for n, (x, _) in pairs.items()}, {n: y for n, (_, y) in pairs.items()}

    def check(self, got: dict, expected: dict) -> None:
        assert list(got) == list(expected)
        for name, y in expected.items():
            jax.tree.map(np.testing.assert_array_equal, self.frozen(got[name]), y)

    def scribble(self, *trees: dict) -> None:
        """Writes over all NumPy arrays that went in or came out, and deletes some arrays of JAX that came out."""
        for leaf in jax.tree.leaves(trees):
            parts = jax.tree.leaves([leaf.x, leaf.rest]) if isinstance(leaf, Plain) else [leaf]
            for x in parts:
                if isinstance(x, np.ndarray):
                    x[...] = 77

    def step(self) -> None:
        store, model = self.store, self.model
        i = self.random.randrange(len(model)) if model else None
        do = self.random.choice(["append", "update", "fetch", "take", "delete", "iter"]) if model else "append"
        if do == "append":
            batch, copy = self.batch()
            assert store.append(batch) == len(model)
            model.append(copy)
            self.scribble(batch)
            return
        names = self.random.sample(sorted(model[i]), self.random.randrange(len(model[i]) + 1))
        if do == "update":
            batch, copy = self.batch()
            store.update(i, batch)
            model[i] |= copy
            self.scribble(batch)
        elif do in ("fetch", "take"):
            got = getattr(store, do)(i, names)
            self.check(got, {name: model[i][name] for name in names})
            self.scribble(got)
            if do == "take":
                for name in names:
                    del model[i][name]
        elif do == "delete":
            store.delete(i, names)
            for name in names:
                del model[i][name]
        else:
            for k, got in enumerate(store.iter(prefetch=self.random.randrange(4))):
                self.check(got, model[k])
                self.scribble(got)
                later = self.random.randrange(len(model))
                if self.random.random() < 0.3:
                    batch, copy = self.batch()
                    store.update(later, batch)
                    model[later] |= copy
                if self.random.random() < 0.1:
                    return

    def exact_size(self) -> dict[str, int]:
        unique = {id(leaf): leaf for row in self.store._rows for packed in row.values() for leaf in packed.kept()}
        sizes: collections.Counter[str] = collections.Counter()
        for leaf in unique.values():
            if isinstance(leaf.data, jax.Array):
                sizes[leaf.data.sharding.memory_kind] += sum(s.data.nbytes for s in leaf.data.addressable_shards)
            else:
                sizes["numpy" if isinstance(leaf.data, np.ndarray) else "disk"] += leaf.data.nbytes
        return {kind: size for kind, size in sizes.items() if size}


@pytest.mark.parametrize("mode", ["near", "far"])
@pytest.mark.parametrize("target", TARGETS)
def test_random_programs_agree_with_a_dict_of_copies(target, mode, tmp_path, request):
    if mode == "far":
        request.getfixturevalue("far")
    for seed in range(PROGRAMS):
        with make(target, tmp_path) as store:
            program = Program(store, seed)
            for _ in range(40):
                program.step()
            finish()
            assert store.size() == program.exact_size()
            for i, expected in enumerate(program.model):
                program.check(store.fetch(i), expected)
            files = [path for path in tmp_path.rglob("*") if path.is_file()]
            assert sum(path.stat().st_size for path in files) == store.size().get("disk", 0)
    assert list(tmp_path.iterdir()) == []
