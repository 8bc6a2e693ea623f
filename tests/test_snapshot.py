"""`Cache.save` and `Cache.load`: rows go to a file, and on from there in any cache of the same layers."""

from __future__ import annotations

import errno
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import Cache, Chunk, Cross, Dense, Float8, Full, Int4, Int8, LayerSpec, Pages, Rotary, Snapshot, Window
from jaxkv.cache import restore
from jaxkv.safetensors import File, write

R, CAPACITY, LENGTHS = 3, 24, [13, 7, 0]
SPECS = [
    LayerSpec(Full(), 2, 4, None, Int8(), Int4(group=2), Rotary(), "read", drops=True),
    LayerSpec(Window(5, sinks=1), 2, 4, 6, Dense("bfloat16"), Dense("float8_e4m3fn")),
    LayerSpec(Cross(5), 2, 4),
    LayerSpec(Full(), 2, 4, None, Int8(), Int4(group=2), Rotary(), "read", drops=True),
]


@functools.partial(jax.jit, static_argnames="length")
def feed(cache, lengths, length):
    """Tokens of all rows, up to these lengths, whose keys depend on where they stand."""
    positions = cache.lengths[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
    positions = jnp.where(positions < lengths[:, None], positions, -1)
    cache, step = cache.begin(positions)
    out, layers = [], []
    for i, layer in enumerate(cache.layers):
        x = jnp.sin(positions.astype(jnp.float32)[:, :, None, None] * (i + 1.0) + jnp.arange(6.0)[None, None, None])
        x = jnp.broadcast_to(x, (*positions.shape, 2, 6))
        if not isinstance(layer.spec.reach, Cross):
            where = positions % 3 != 1 if layer.spec.drops else None
            layer = layer.put(step, x[..., :4], x[..., : layer.spec.value_dim], where=where)
        out.append(jaxkv.attend(x[..., :4], layer, step))
        layers.append(layer)
    return cache.with_layers(layers), out


def encoded(cache):
    cache, step = cache.begin_cross(jnp.array([4, -1, 0]))
    layers = list(cache.layers)
    x = jnp.arange(R * 5 * 2 * 4.0).reshape(R, 5, 2, 4)
    layers[2] = layers[2].put(step, x, -x)
    return cache.with_layers(layers)


@functools.cache
def source():
    cache = encoded(Cache.init(SPECS, R, CAPACITY, max_block=4))
    for _ in range(4):
        cache, _ = feed(cache, jnp.array(LENGTHS), 4)
    return cache


@pytest.fixture
def path(tmp_path):
    source().save(tmp_path / "rows.safetensors", fingerprint="it", metadata={"said": "hello"})
    return tmp_path / "rows.safetensors"


def arrays(path, rows):
    """What a file has of some rows, by name, as if they were its only ones."""
    file, found = File(path), {}
    for name in file:
        first, _, rest = name.partition(".")
        row, _, inner = rest.partition(".")
        if first == "rows":
            if int(row) in rows:
                found[f"{rows.index(int(row))}.{inner}"] = np.array(file[name])
        else:
            found[name] = np.array(file[name])[rows]
    return found


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, x in one.items():
        assert x.dtype == other[name].dtype
        np.testing.assert_array_equal(x, other[name], name)


def heads_apart(kind=jax.sharding.AxisType.Auto):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("heads",), axis_types=(kind,))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "heads"))


@pytest.mark.parametrize(
    "options",
    [
        {"capacity": 200, "num_rows": 5},
        {"layout": Pages(20, 5), "stacked": True},
        {"capacity": 13, "sharding": heads_apart()},
        {"stacked": True, "sharding": heads_apart(jax.sharding.AxisType.Explicit)},
    ],
    ids=str,
)
def test_rows_come_back_bit_for_bit_in_a_cache_of_another_make(path, options):
    options = {"num_rows": R, "capacity": CAPACITY, "max_block": 4, **options}
    cache = Cache.init(SPECS, **options)
    sharding = cache.layers[0].v["codes"].sharding
    cache = cache.load(path, rows=[2, 0], saved=[0, 1], fingerprint="it")
    assert cache.lengths.tolist()[:3] == [7, 0, 13]
    assert cache.layers[0].v["codes"].sharding == sharding
    again = path.with_name("again")
    cache.save(again, rows=[2, 0])
    if not options.get("stacked"):
        assert_same(arrays(again, [0, 1]), arrays(path, [0, 1]))
        return
    back = Cache.init(SPECS, R, CAPACITY, max_block=4).load(again)  # from stacks, whose layers are in another order
    back.save(again, rows=[0, 1])
    assert_same(arrays(again, [0, 1]), arrays(path, [0, 1]))


def test_loading_over_rows_that_hold_others_forgets_those_and_leaves_the_rest(path):
    cache = source().take(jnp.array([1, 0, 0]))
    for layer, x in zip(cache.layers, source().layers, strict=True):  # so that the old one lives on
        assert not any(a is b for a, b in zip(jax.tree.leaves(layer), jax.tree.leaves(x), strict=True))
    cache = cache.load(path, rows=[1], saved=[1])
    again = path.with_name("again")
    cache.save(again)
    assert_same(
        arrays(again, [0, 1, 2]),
        arrays(path, [1, 1, 0]) | {k: v for k, v in arrays(again, [0, 1, 2]).items() if k[0] == "1"},
    )
    assert_same(arrays(again, [1]), arrays(path, [1]))
    assert_same(arrays(again, [2]), arrays(path, [0]))


def test_nothing_but_a_change_of_hands_is_compiled_to_load_into_memory(path, monkeypatch):
    def compiled(*args, **kwargs):
        raise AssertionError("numbers of the same storage go into memory as they are")

    monkeypatch.setattr(restore, "_write", compiled)
    cache = Cache.init(SPECS, R, CAPACITY, max_block=4)
    places = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(cache.layers)]
    cache = cache.load(path)
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(cache.layers)] == places
    cache.save(path.with_name("again"))
    assert_same(arrays(path.with_name("again"), [0, 1, 2]), arrays(path, [0, 1, 2]))


def test_memory_that_somebody_else_still_reads_keeps_its_numbers(path):
    cache = Cache.init(SPECS, R, CAPACITY, max_block=4)
    views = [np.asarray(x) for x in jax.tree.leaves(cache.layers)]
    before = [np.array(x) for x in views]
    cache = cache.load(path)
    for x, y in zip(views, before, strict=True):
        np.testing.assert_array_equal(x, y)
    cache.save(path.with_name("again"))
    assert_same(arrays(path.with_name("again"), [0, 1, 2]), arrays(path, [0, 1, 2]))


def test_layers_of_one_stack_that_were_stored_apart_come_into_one_storage(tmp_path):
    one, other = (LayerSpec(Full(), 1, 2, None, Dense(dtype)) for dtype in ("float32", "float16"))
    cache, step = Cache.init([one, other], 1, 8).begin(jnp.arange(3)[None])
    x = jnp.arange(6.0).reshape(1, 3, 1, 2)
    cache = cache.with_layers([layer.put(step, x + i, -x) for i, layer in enumerate(cache.layers)])
    cache.save(tmp_path / "rows")
    stack = Cache.init([one, one], 1, 8, stacked=True).load(tmp_path / "rows").layers[0]
    np.testing.assert_array_equal(stack.k[:, 0, 0, :3], np.stack([x[0, :, 0], x[0, :, 0] + 1]))


def test_another_storage_gets_what_the_first_one_has(path):
    kept = {"Float8": (Float8(), Dense("float32")), "bits": (Dense("float16"), Dense("bfloat16"))}
    before, again = arrays(path, [0]), path.with_name("again")
    for k, v in kept.values():
        Cache.init(SPECS, 1, CAPACITY, storage=(k, v)).load(path, saved=[0]).save(again)
        after = arrays(again, [0])
        for i, spec in enumerate(SPECS):
            for part, was, now, size in (("k", spec.k_storage, k, 4), ("v", spec.v_storage, v, spec.value_dim)):
                prefix = f"0.layers.{i}.{part}"
                leaves, tree = jax.tree.flatten(was.zeros((1,), size))
                names = [name for name in before if name == prefix or name.startswith(prefix + ".")]
                assert len(names) == len(leaves)
                stored = jax.tree.unflatten(tree, [before[name] for name in sorted(names)])
                want = jax.tree.leaves(now.encode(was.decode(stored)[..., :size]))
                got = [after[name] for name in sorted(after) if name == prefix or name.startswith(prefix + ".")]
                for x, y in zip(got, want, strict=True):
                    np.testing.assert_array_equal(x, y)
    with pytest.raises(ValueError, match=r"k of layer 0 was kept by Int8.*float32 numbers would be cut to int8"):
        Cache.init(SPECS, 1, CAPACITY, storage=Dense("int8")).load(path, saved=[0])


def test_a_shorter_ring_keeps_what_it_has_room_for_and_says_what_is_gone(tmp_path):
    specs, path = [LayerSpec(Window(5, sinks=2), 1, 2)], tmp_path / "rows"
    cache = Cache.init(specs, 1, 40, max_block=20)
    cache, _ = cache.begin(jnp.arange(20)[None])
    cache.save(path)
    short = Cache.init(specs, 1, 30, max_block=4).load(path)  # a ring of 8
    held = np.asarray(short.groups[0].positions[0])
    assert sorted(held[held >= 0]) == [0, 1, *range(12, 20)]
    assert [int(short.resume_point(0, p)) for p in (20, 17, 16, 15, 9)] == [20, 17, 16, 2, 2]
    assert [int(cache.resume_point(0, p)) for p in (20, 17, 16, 15, 9)] == [20, 17, 16, 15, 9]
    # In a cache so small that its ring never wraps a token can't be written either whose past is gone.
    short.save(path)
    small = Cache.init(specs, 1, 21, max_block=20).load(path)
    assert not small.groups[0].wraps
    assert int(small.resume_point(0, 15)) == 2
    assert [small.begin(jnp.array([[p]]))[1].ok.tolist() for p in (20, 16, 15)] == [[True], [True], [False]]


def refused(cache, path, error, match, **options):
    before = [np.array(x) for x in jax.tree.leaves(cache)]
    with pytest.raises(error, match=match):
        cache.load(path, **options)
    for x, y in zip(jax.tree.leaves(cache), before, strict=True):
        np.testing.assert_array_equal(x, y)


def test_what_does_not_fit_says_how_much_is_needed_and_changes_nothing(path):
    refused(Cache.init(SPECS, R, 12), path, jaxkv.CacheFullError, "a row of 13 tokens.*capacity of 12.*at least 13")
    few = Cache.init(SPECS, R, CAPACITY, layout=Pages(4, 4), max_block=4)
    refused(few, path, jaxkv.CacheFullError, "need 6 pages of 4, and a pool of 4 has 4 left")
    assert few.load(path, saved=[0]).lengths.tolist() == [13, 0, 0]


def test_files_of_other_models_are_refused_by_what_differs(path, tmp_path):
    cache = Cache.init(SPECS, R, CAPACITY)
    refused(cache, path, ValueError, "the fingerprint 'it', this model 'other'", fingerprint="other")
    source().save(tmp_path / "unnamed", rows=[1])
    refused(cache, tmp_path / "unnamed", ValueError, "has no fingerprint, this model 'it'", fingerprint="it")
    refused(Cache.init(SPECS[:3], R, CAPACITY), path, ValueError, "has 4 layers, this cache 3")
    others = [*SPECS[:3], LayerSpec(Full(), 4, 4, None, Int8(), Int4(group=2), Rotary(), "read", drops=True)]
    refused(
        Cache.init(others, R, CAPACITY), path, ValueError, "layer 3 has num_kv_heads=2, in this cache num_kv_heads=4"
    )
    refused(Cache.init(others, R, CAPACITY, stacked=True), path, ValueError, "has 2 layers with .*, this cache 1")
    wider = [SPECS[0], LayerSpec(Window(6, sinks=1), 2, 4, 6), *SPECS[2:]]
    refused(Cache.init(wider, R, CAPACITY), path, ValueError, r"layer 1 has reach=Window\(size=5, sinks=1\), in this")


def test_layers_in_stacks_that_differ_only_in_storage_are_not_mixed_up(tmp_path):
    one, other = (LayerSpec(Full(), 1, 2, None, Dense(dtype)) for dtype in ("float32", "float16"))
    Cache.init([one, other, one], 1, 8).save(tmp_path / "rows")
    refused(
        Cache.init([one, other, one], 1, 8, stacked=True), tmp_path / "rows", ValueError, "nobody can tell their order"
    )
    assert Cache.init([one, one, one], 1, 8, stacked=True).load(tmp_path / "rows").lengths.tolist() == [0]


def test_rows_are_named_once_and_exist(path):
    cache = Cache.init(SPECS, 2, CAPACITY)
    refused(cache, path, ValueError, "has 3 rows, this cache 2; name those to be taken by saved=")
    refused(cache, path, ValueError, "2 saved rows for the 1 rows", rows=[1], saved=[0, 1])
    for rows in ([2], [-1], [0, 0], [], [0.5], 0):
        refused(cache, path, ValueError, "load: rows is", rows=rows, saved=[0])
    with pytest.raises(ValueError, match=r"save: rows is \[3\]; give different rows of 0 to 2"):
        source().save(path, rows=[3])
    with pytest.raises(ValueError, match=r"logits has shape \(2, 5\); give \[N, V\] = \[3, V\]"):
        source().save(path, logits=np.zeros((2, 5)))
    with pytest.raises(ValueError, match="outside of jit"):
        jax.jit(lambda cache: cache.save(path))(cache)
    assert Snapshot(path).num_rows == 3  # none of these replaced the file


def test_a_snapshot_says_what_is_in_a_file(path):
    logits = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert Snapshot(path).logits is None
    source().save(path, rows=[1, 0], fingerprint="it", logits=jnp.asarray(logits), metadata={"said": "hello"})
    snapshot = Snapshot(path)
    assert (snapshot.num_rows, snapshot.capacity, snapshot.lengths.tolist()) == (2, 13, [7, 13])
    assert (snapshot.fingerprint, snapshot.metadata, snapshot.version) == ("it", {"said": "hello"}, jaxkv.__version__)
    np.testing.assert_array_equal(snapshot.logits, logits)
    assert "rows of 7, 13 tokens, 4 layers, fingerprint='it'" in repr(snapshot)
    assert Cache.init(SPECS, 2, CAPACITY).load(snapshot).lengths.tolist() == [7, 13]


def test_damaged_and_cut_files_are_refused_and_change_nothing(path):
    content, cache = path.read_bytes(), Cache.init(SPECS, R, CAPACITY)
    for at in {0, 3, *range(9, len(content), 101), len(content) - 1}:
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        refused(cache, path, ValueError, "rows.safetensors")
    for length in (0, 7, 500, len(content) - 1):
        path.write_bytes(content[:length])
        refused(cache, path, ValueError, "cut short")
    with pytest.raises(FileNotFoundError):
        cache.load(path.with_name("none"))


def test_files_that_lie_are_refused_and_change_nothing(path):
    file, cache = File(path), Cache.init(SPECS, R, CAPACITY)
    header = json.loads(file.metadata["jaxkv"])

    def lie(match, tensors=(), **changes):
        metadata = {"jaxkv": json.dumps(header | changes)}
        write(path, {**file, **dict(tensors)}, metadata=metadata, checked=True)
        refused(cache, path, ValueError, match)

    lie("was written by jaxkv 0.1.0 in format 2; .* reads format 1; update", format=2)
    lie("its header says other things", layers=[])
    lie("its header says other things", groups=[3])
    lie("it has no group of Full", groups=["Window(size=5, sinks=1)"] * 3)
    lie("it has no rows", {"lengths": np.zeros(0, np.int32)})
    lie("a length that none can have", {"lengths": np.array([-1, 2**31 - 1, 3], np.int32)})
    order = np.array(file["rows.0.groups.0.positions"])[::-1]
    lie("row 0 has positions that are not in order", {"rows.0.groups.0.positions": order})
    lie(
        "row 1 has positions that .* beyond the length", {"rows.1.groups.0.positions": 5 + np.arange(7, dtype=np.int32)}
    )
    lie("lost positions that there can't be", {"groups.1.lost": np.full((3, 2), -9, np.int32)})
    lie("output of a length that none can have", {"groups.2.lengths": np.array([4, 9, 0], np.int32)})
    lie(r"layers.1.k is int8\[2, 10, 4\], must be", {"rows.0.layers.1.k": np.zeros((2, 10, 4), np.int8)})
    lie(r"layers.2.v is float32\[2, 4, 5\], must be", {"rows.0.layers.2.v": np.zeros((2, 4, 5), np.float32)})
    layers = [dict(layer) for layer in header["layers"]]
    layers[0]["k_storage"] = {"kind": "jaxkv.cache.rows.Rows"}
    lie(r"k_storage of layer 0: Rows\(\) is not a storage", layers=layers)
    layers[0]["k_storage"] = {"kind": "subprocess.Popen", "args": "true"}
    lie("k_storage of layer 0: .*subprocess.Popen", layers=layers)
    write(path, dict(file), metadata={"jaxkv": "[" * 100_000}, checked=True)
    refused(cache, path, ValueError, "its header is not JSON")
    write(path, dict(file), metadata={"made by": "others"})
    refused(cache, path, ValueError, "not one that Cache.save wrote")


def test_a_full_disk_leaves_the_old_file(path, monkeypatch):
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("jaxkv.whole.os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device.*rows\.safetensors"):
        source().save(path, rows=[1])
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("reach", [Chunk(4), Window(3)], ids=str)
def test_specs_that_nobody_can_compare_are_not_saved(reach, tmp_path):
    class Plain:
        def shift(self, k, delta):
            return k

    with pytest.raises(ValueError, match="make it a frozen dataclass"):
        Cache.init([LayerSpec(reach, 1, 2, rotary=Plain())], 1, 8).save(tmp_path / "rows")
    assert not list(tmp_path.iterdir())


NEW_PROCESS = """
import sys
import numpy as np, jax.numpy as jnp
from test_snapshot import CAPACITY, SPECS, Cache, feed
cache = Cache.init(SPECS, 3, CAPACITY, max_block=4).load(sys.argv[1])
_, out = feed(cache, jnp.array([17, 11, 4]), 4)
np.savez(sys.argv[2], *out)
"""


def test_a_new_process_goes_on_to_the_bit(path):
    here = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    code = f"import sys; sys.path[:0] = {here}\n{NEW_PROCESS}"
    subprocess.run([sys.executable, "-c", code, str(path), str(path.with_suffix(".npz"))], check=True)
    _, want = feed(source(), jnp.array([17, 11, 4]), 4)
    got = np.load(path.with_suffix(".npz"))
    for one, other in zip(got.values(), want, strict=True):
        np.testing.assert_array_equal(one, other)


def test_orbax_saves_and_restores_a_cache(tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "cache", source())
        checkpointer.wait_until_finished()
        empty = jax.eval_shape(lambda: Cache.init(SPECS, R, CAPACITY, max_block=4))
        restored = checkpointer.restore(tmp_path / "cache", empty)
    assert isinstance(restored, Cache) and jax.tree.structure(restored) == jax.tree.structure(source())
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(source()), strict=True):
        np.testing.assert_array_equal(x, y)
