"""The memo: what comes out, what is computed, what is kept, and what is refused."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import pickle
import random
import shutil
import signal
import sqlite3
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx, struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxkv
from jaxkv.memo import database
from jaxkv.memo.budget import LEAST
from jaxkv.memo.memory import Memory
from jaxkv.sizes import format_bytes

Pair = collections.namedtuple("Pair", "a b")


@struct.dataclass
class Both:
    x: jax.Array
    y: jax.Array


def items(count: int, seed: int = 0, width: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).random((count, width), np.float32)


def double(x):
    return x * 2


@pytest.fixture
def memo():
    with jaxkv.Memo(memory="16MiB") as memo:
        yield memo


@pytest.fixture(params=["memory", "disk", "both"])
def any_memo(request, tmp_path):
    memory = None if request.param == "disk" else "16MiB"
    disk = None if request.param == "memory" else tmp_path / "store"
    with jaxkv.Memo(memory=memory, disk=disk) as memo:
        yield memo


# What comes out


def rich(x, image=None):
    return {
        "pair": Pair(x[:, 0] > 0.5, x.astype(jnp.bfloat16)),
        "both": Both(x=x.sum(axis=1), y=jnp.stack([x, x], axis=1)),
        "rest": [x.astype(jnp.int8), None, (jnp.zeros((len(x), 0)),)],
        "complex": jax.lax.complex(x, x),
        "eight": x.astype(jnp.float8_e4m3fn),
        "image": image,
    }


def test_pytrees_go_in_and_come_out_as_they_are(any_memo):
    features = any_memo.wrap(rich)
    x, image = items(5), {"a": items(5, 1).reshape(5, 2, 3), "b": [np.arange(5)]}
    expected = rich(jnp.asarray(x), jax.tree.map(jnp.asarray, image))
    for _ in range(2):  # computed, then found
        got = features(x, image=image)
        assert jax.tree.structure(got) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert isinstance(a, jax.Array) and a.dtype == b.dtype
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    found = features.lookup(x, image=image)
    assert isinstance(found["pair"], Pair) and isinstance(found["both"], Both)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found))
    assert any_memo.stats().computed == 5


def test_another_order_other_batches_and_repeated_items(any_memo):
    features = any_memo.wrap(double)
    x = items(12)
    features(x[:7])
    for rows in ([11, 3, 0], [5, 5, 8, 8, 5], [6], list(range(12)), []):
        np.testing.assert_array_equal(features(x[rows]), x[rows] * 2)
    assert any_memo.stats().computed == 12
    np.testing.assert_array_equal(features.contains(np.concatenate([x[:2], x[:2] + 1])), [True, True, False, False])
    assert features.lookup(x[:2] + 1) is None


def test_a_batch_without_items(any_memo):
    assert any_memo.wrap(double)(items(0)).shape == (0, 6)
    assert any_memo.stats().computed == 0


@pytest.mark.parametrize("batch", ["bucket", "full"])
def test_the_programs_are_few(memo, batch, capsys):
    def traced(x):
        print("traced", len(x))
        return x + 1

    features = memo.wrap(traced, batch=batch, check=False)
    order = random.Random(0)
    for step in range(60):
        x = items(1_000)[order.sample(range(1_000), 31 if step % 10 == 1 else 48)]
        np.testing.assert_array_equal(features(x), x + 1)
    lines = capsys.readouterr().out.splitlines()
    sizes = {line for line in lines if line != "traced 2"}  # with two items it is traced for its name, and checked
    assert len(sizes) + 1 <= (7 if batch == "bucket" else 3)  # ceil(log2(48)) + 1
    assert len(lines) <= 1 + 2 * 7


@pytest.mark.optimized
def test_full_batches_give_bitwise_what_the_function_gives(memo):
    weights = jnp.asarray(items(256, 1, 64))
    function = lambda w, x: jnp.tanh(x @ w)  # noqa: E731
    x = items(16, 2, 256)
    features = memo.wrap(function, weights, batch="full")
    features(x[:5])
    expected = jax.jit(function)(weights, x)
    np.testing.assert_array_equal(memo.wrap(function, weights, batch="full", version="2")(x), expected)
    np.testing.assert_allclose(features(x), expected, rtol=1e-5)


def test_a_cast_holds_for_hits_and_misses(any_memo):
    features = any_memo.wrap(lambda x: (x / 3, jnp.argmax(x, axis=1)), output_dtype="bfloat16")
    x = items(4)
    computed, found = features(x), features(x)
    assert computed[0].dtype == found[0].dtype == jnp.bfloat16
    assert computed[1].dtype == jnp.int32
    np.testing.assert_array_equal(np.asarray(computed[0]), np.asarray(found[0]))


def test_nothing_is_shared_with_what_is_kept(any_memo):
    features = any_memo.wrap(lambda x: (x, x[:, :2]))
    x = items(64, width=64)
    original = x.copy()
    first = features(x)
    x[:] = -1  # the input
    for _ in range(2):
        found = features.lookup(original)
        np.testing.assert_array_equal(found[0], original)
        np.testing.assert_array_equal(found[1], original[:, :2])
        for array in found:
            array[:] = -2  # a result
    np.testing.assert_array_equal(first[0], original)
    others = [items(64, seed, 64) for seed in (1, 2)]  # computed through the same memory as the first
    results = [features(other) for other in others]
    for other, result in zip(others, results, strict=True):
        np.testing.assert_array_equal(result[0], other)
    np.testing.assert_array_equal(first[0], original)
    held = [features(original) for _ in range(3)]
    buffers = {array.unsafe_buffer_pointer() for pair in held for array in pair}
    assert len(buffers) == 6
    for pair in held:
        pair[0].delete()
    np.testing.assert_array_equal(features(original)[0], original)


def test_results_lie_where_the_arguments_were_put(memo):
    features = memo.wrap(lambda x: x.sum(axis=1))
    x = items(8)
    device = jax.devices()[2]
    assert features(jax.device_put(x, device)).devices() == {device}
    sharding = NamedSharding(Mesh(np.array(jax.devices()), "data"), PartitionSpec("data"))
    spread = features(jax.device_put(x, sharding))
    assert spread.sharding.is_equivalent_to(sharding, 1)
    fresh = features(jax.device_put(x + 1, sharding))
    np.testing.assert_allclose(fresh, (x + 1).sum(axis=1), rtol=1e-6)
    assert memo.stats().computed == 16


# What is kept


def test_epochs_after_the_first_compute_nothing(any_memo):
    features = any_memo.wrap(double)
    x = items(40)
    for epoch in range(3):
        order = np.random.default_rng(epoch).permutation(40)
        for begin in range(0, 40, 16):
            rows = order[begin : begin + 16]
            np.testing.assert_array_equal(features(x[rows]), x[rows] * 2)
    stats = any_memo.stats()
    assert (stats.calls, stats.items, stats.hits, stats.misses, stats.computed) == (9, 120, 80, 40, 40)
    assert stats.hit_rate == pytest.approx(2 / 3)
    assert str(stats).startswith("120 items in 9 calls, 66.7% found, 40 computed; 40 in ")


def test_what_is_on_disk_outlives_the_memo(tmp_path):
    x = items(9)
    with jaxkv.Memo(disk=tmp_path / "store", compress="zstd") as memo:
        memo.wrap(double)(x)
        memo.flush()
    with jaxkv.Memo(memory="1MiB", disk=tmp_path / "store") as memo:
        features = memo.wrap(double)
        np.testing.assert_array_equal(features.lookup(x), x * 2)
        features(x)
        assert memo.stats().computed == 0
        assert memo.stats().memory.items == memo.stats().disk.items == 9  # found on disk, and put into memory
        features.clear()
        assert features.lookup(x) is None
    with pytest.raises(
        jaxkv.CacheError, match=r"this memo is closed; make another one \(what is on disk is still there\)"
    ):
        features(x)


def test_damage_on_disk_is_computed_again_and_counted(tmp_path):
    x = items(20, width=500)
    with jaxkv.Memo(disk=tmp_path / "store") as memo:
        memo.wrap(double)(x)
    (database,) = (tmp_path / "store").glob("*.db")
    data = bytearray(database.read_bytes())
    for place in range(50, len(data), 5_000):
        data[place] ^= 4
    database.write_bytes(data)
    with jaxkv.Memo(memory=None, disk=tmp_path / "store") as memo:
        features = memo.wrap(double)
        np.testing.assert_array_equal(features(x), x * 2)
        stats = memo.stats()
        assert 1 <= stats.computed <= 20
        assert stats.disk.corrupt + stats.disk.replaced > 0
        np.testing.assert_array_equal(features.lookup(x), x * 2)


def test_a_store_that_is_removed_or_fails_costs_no_answer_and_is_written_again(tmp_path):
    with jaxkv.Memo(memory=None, disk=tmp_path / "store") as memo:
        features, x = memo.wrap(double), items(3)
        features(x)
        shutil.rmtree(tmp_path / "store")
        (tmp_path / "store").touch()  # nothing can be kept there
        for _ in range(5):
            np.testing.assert_array_equal(features(x), x * 2)
            assert features.lookup(x) is None
        assert memo.stats().disk.errors > 0
        (tmp_path / "store").unlink()
        while features.lookup(x) is None:
            np.testing.assert_array_equal(features(x), x * 2)
        assert memo.stats().computed < 150
        shutil.rmtree(tmp_path / "store")  # a moment is enough
        features(x)
        assert features.lookup(x) is not None and labels(tmp_path / "store") == [memo.wrap(double).namespace(x)]


def labels(directory) -> list[str]:
    """The namespaces that are described."""
    (path,) = directory.glob("*.db")
    with contextlib.closing(sqlite3.connect(path)) as db:
        return [namespace.hex() for (namespace,) in db.execute("select namespace from labels")]


def test_two_functions_share_one_memo(memo):
    x = items(4)
    a, b = memo.wrap(double), memo.wrap(lambda x: x + 1)
    np.testing.assert_array_equal(a(x), x * 2)
    np.testing.assert_array_equal(b(x), x + 1)
    a.clear()
    assert a.lookup(x) is None and b.lookup(x) is not None
    memo.clear()
    assert b.lookup(x) is None


def test_the_decorator(memo):
    @memo
    def plain(x):
        return x + 1

    @memo(version="2", output_dtype="float16")
    def told(x):
        return x + 1

    x = items(2)
    np.testing.assert_array_equal(plain(x), x + 1)
    assert told(x).dtype == jnp.float16
    assert "plain" in repr(plain)


# Threads


def test_eight_threads_get_the_right_answers(any_memo):
    features = any_memo.wrap(double)
    x = items(200)
    problems = []

    def work(seed: int) -> None:
        order = np.random.default_rng(seed)
        for _ in range(30):
            rows = order.integers(0, 200, 16)
            if not np.array_equal(features(x[rows]), x[rows] * 2):
                problems.append(rows)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert any_memo.stats().items == 8 * 30 * 16


def test_once_computes_each_item_once_whoever_asks():
    memo = jaxkv.Memo(memory="16MiB", once=True)
    computed: list[int] = []
    both_are_in = threading.Barrier(2, timeout=60)

    def slow(x):
        if len(computed) < 2:  # the first two calls wait for each other, so that both are computing at once
            computed.append(len(x))
            both_are_in.wait()
        else:
            computed.append(len(x))
        return np.asarray(x) * 2

    def called(x):
        return jax.pure_callback(slow, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    features = memo.wrap(called, version="1", check=False)
    x = items(24)
    features.namespace(x)
    parts = [[*range(16)], [*range(8, 24)]]
    got = {}
    threads = [threading.Thread(target=lambda i=i: got.update({i: features(x[parts[i]])})) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        np.testing.assert_array_equal(got[i], x[parts[i]] * 2)
    assert memo.stats().computed == 24
    assert sum(computed) == 24


def test_when_the_first_fails_the_next_one_computes():
    from jaxkv.memo.once import Once

    once, entered, go_on = Once(), threading.Event(), threading.Event()

    def fails(keys):
        if not keys:
            return {}
        entered.set()
        go_on.wait(60)
        raise RuntimeError("out of memory")

    problems = []

    def first():
        try:
            once.fill([b"a", b"b"], lambda keys: {}, fails)
        except RuntimeError as error:
            problems.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    entered.wait(60)
    waiting = threading.Thread(
        target=lambda: problems.append(once.fill([b"b", b"c"], lambda keys: {}, lambda keys: dict.fromkeys(keys, 1)))
    )
    waiting.start()
    go_on.set()
    thread.join()
    waiting.join()
    assert {b"b": 1, b"c": 1} in problems
    assert any(isinstance(problem, RuntimeError) for problem in problems)


def test_of_many_that_waited_for_one_that_failed_one_computes():
    from jaxkv.memo.once import Once

    once, entered, go_on = Once(), threading.Event(), threading.Event()
    computed, kept, got = [], {}, []

    def compute(keys):
        if keys:
            computed.append(keys)
            entered.set()
            go_on.wait(60)
            if len(computed) == 1:
                raise RuntimeError("out of memory")
            kept.update(dict.fromkeys(keys, 1))
        return {key: kept[key] for key in keys}

    def call():
        try:
            got.append(once.fill([b"a"], lambda keys: {key: kept[key] for key in keys if key in kept}, compute))
        except RuntimeError:
            got.append(None)

    threads = [threading.Thread(target=call) for _ in range(6)]
    threads[0].start()
    entered.wait(60)
    for thread in threads[1:]:
        thread.start()
    time.sleep(0.2)  # until they wait; if some don't yet, they find what is kept
    go_on.set()
    for thread in threads:
        thread.join()
    assert len(computed) == 2
    assert got.count({b"a": 1}) == 5 and got.count(None) == 1


# What is refused


def test_tracing_is_refused(memo):
    features = memo.wrap(double)
    x = items(2)
    for trace in (jax.jit(features), jax.grad(lambda x: features(x).sum()), jax.vmap(features)):
        with pytest.raises(jaxkv.NotSupportedError, match="Call the memoized function outside and pass its result in"):
            trace(x)
    with pytest.raises(jaxkv.NotSupportedError):
        jax.lax.scan(lambda carry, x: (carry, features(x)), 0, x[None])


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x: x.mean(axis=0), r"\(6,\) for 2 items"),
        (lambda x: {"a": x, "b": x.sum()}, r"output\['b'\] of .* has shape \(\) for 2 items"),
        (lambda x: x[:1], r"\(1, 6\) for 2 items"),
        (lambda x: jnp.zeros((2, 3)), r"\(2, 3\) for 4 items"),
    ],
)
def test_outputs_without_the_batch_axis_are_refused(memo, function, shape):
    with pytest.raises(ValueError, match=f"{shape}; every output must have the items along its first axis"):
        memo.wrap(function)(items(4))


@pytest.mark.parametrize("function", [lambda x: x - x.mean(axis=0, keepdims=True), lambda x: x[::-1], jnp.cumsum])
def test_functions_whose_rows_depend_on_one_another_are_refused(memo, function):
    function = (lambda x: jnp.cumsum(x, axis=0)) if function is jnp.cumsum else function
    with pytest.raises(ValueError, match=r"depends on the other rows of the batch.*check=False"):
        memo.wrap(function)(items(4)[::-1])
    assert memo.stats().memory.items == 0


def test_a_large_constant_or_rare_flags_do_not_hide_that_rows_depend_on_one_another(memo):
    def masked(x):
        normed = (x - x.mean(axis=0, keepdims=True)) / x.std(axis=0, keepdims=True)
        return jnp.concatenate([normed, jnp.full((len(x), 1), -1e9, x.dtype)], axis=1)

    for function in (masked, lambda x: x[:, 0] == x[:, 0].max()):
        features = memo.wrap(function)
        for _ in range(2):
            with pytest.raises(ValueError, match="depends on the other rows"):
                features(items(256))
        with pytest.raises(ValueError, match="depends on the other rows"):  # whatever is asked from then on
            features.lookup(items(2))


def test_functions_that_depend_on_the_size_of_the_batch_are_refused_at_the_second_size(memo):
    features = memo.wrap(lambda x: {"whole": x.astype(jnp.int32), "part": jnp.maximum(x, 0) / len(x)})
    x = items(6)
    features(x[:4])
    with pytest.raises(
        ValueError, match=r"output\['part'\] of .* size of the batch.* of 4 gives other values than one of 2"
    ):
        features(x)
    assert memo.stats().memory.items == 4
    assert memo.wrap(lambda x: x / len(x), check=False)(x[:4]).shape == (4, 6)


def test_what_is_chosen_by_a_rounded_value_may_jump_with_the_size_of_the_batch(memo):
    def nearest(table, x):  # the first row jumps in large batches, as rounding could make it do
        index = jnp.argmin(jnp.abs(x[:, None] - table[None]).sum(-1), axis=-1)
        return table[jnp.where(jnp.arange(len(x)) == 0, index + int(len(x) > 4), index)]

    features = memo.wrap(nearest, jnp.asarray(items(64, seed=1)))
    features(items(4))
    assert features(items(12)).shape == (12, 6)


def test_functions_that_only_round_are_not_refused(memo):
    weights = jnp.asarray(items(256, 1, 64))
    for dtype in (jnp.float32, jnp.bfloat16):
        features = memo.wrap(lambda w, x, d=dtype: jnp.tanh(x.astype(d) @ w.astype(d)), weights)
        assert features(items(33, 2, 256)).dtype == dtype


def test_rows_that_are_all_alike_prove_nothing_and_a_later_batch_tells(memo):
    features = memo.wrap(lambda x: x - x.mean(axis=0, keepdims=True))
    features(np.ones((4, 6), np.float32))
    with pytest.raises(ValueError, match="depends on the other rows"):
        features(items(4))


def centred(x):
    return x - x.mean(axis=0, keepdims=True)


@pytest.mark.parametrize("kept", [[0, 1], [0]])
def test_items_that_several_processes_kept_one_by_one_are_checked_by_the_first_that_meets_two(tmp_path, kept):
    x = items(2)
    for i in kept:
        with jaxkv.Memo(memory=None, disk=tmp_path) as one:
            assert not one.wrap(centred)(x[i : i + 1]).any()
    for calls in ([x], [x[::-1]], [x[:1], x[:1], x[1:]]):
        with jaxkv.Memo(memory=None, disk=tmp_path) as other:
            features = other.wrap(centred)
            for call in calls[:-1]:
                features(call)  # with one item nobody can tell
            with pytest.raises(ValueError, match="depends on the other rows"):
                features(calls[-1])
            assert other.stats().disk.items == len(kept)
    with jaxkv.Memo(memory=None, disk=tmp_path) as trusting:
        assert trusting.wrap(centred, check=False)(x).shape == (2, 6)
    with jaxkv.Memo(memory=None, disk=tmp_path) as other, pytest.raises(ValueError, match="depends on the other rows"):
        other.wrap(centred)(x)  # whoever doesn't check proves nothing to others


def test_two_that_wrap_one_function_in_one_memo_check_what_the_other_kept(memo):
    x = items(2)
    memo.wrap(centred)(x[:1])
    with pytest.raises(ValueError, match="depends on the other rows"):
        memo.wrap(centred)(x)


def runs(memo):
    """Returns a wrapped function, and the sizes of the batches it was run with."""
    sizes: list[int] = []

    def called(x):
        sizes.append(len(x))
        return 2 * x

    features = memo.wrap(lambda x: jax.pure_callback(called, jax.ShapeDtypeStruct(x.shape, x.dtype), x), version="1")
    return features, sizes


@pytest.mark.parametrize("how", ["at once", "one by one", "by several", "and cleared"])
def test_a_function_is_checked_once_per_store_and_its_outputs_are_then_only_read(tmp_path, how):
    x = items(4)
    calls = {"at once": [x], "one by one": [x[:1], x[1:2], x[2:]], "by several": [x[:1], x[1:2]], "and cleared": [x]}
    memos = [jaxkv.Memo(memory=None, disk=tmp_path) for _ in range(2)]
    if how == "by several":
        for memo, call in zip(memos, calls[how], strict=True):
            runs(memo)[0](call)
        features, sizes = runs(jaxkv.Memo(memory=None, disk=tmp_path))
        np.testing.assert_array_equal(features(x[:2]), 2 * x[:2])
        assert sizes == [2] * 3  # the two beside each other, and each alone
    else:
        features, _ = runs(memos[0])
        for call in calls[how]:
            features(call)
        if how == "and cleared":
            features.clear()
            features(x)
    features, sizes = runs(jaxkv.Memo(memory="1MiB", disk=tmp_path))
    np.testing.assert_array_equal(features(x[:2]), 2 * x[:2])
    assert sizes == []


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((items(2), items(3)), {}, r"must have one batch axis, and have x \(2, 6\), y \(3, 6\).*shared=\(\"mask\",\)"),
        ((), {"x": 3.0, "y": None}, "no argument has items: give at least one array whose first axis is the batch"),
        ((np.array(["a", "b"]), None), {}, r"x is an array of <U1, which JAX can't compute with"),
        ((items(2), object()), {}, r"y is an object; arguments are arrays.*functools\.partial"),
        ((items(2), [items(2), {"k": max}]), {}, r"y\.1\.k is a builtin_function_or_method"),
        ((jax.random.split(jax.random.key(0)), None), {}, r"x are PRNG keys; give their jax\.random\.key_data"),
    ],
)
def test_arguments_that_cannot_be_part_of_a_key_are_refused(memo, args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        memo.wrap(lambda x, y=None: x)(*args, **kwargs)


def test_a_call_that_does_not_fit_the_function_is_a_type_error(memo):
    with pytest.raises(TypeError, match="unexpected keyword argument 'z'"):
        memo.wrap(double)(items(2), z=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memory": None}, "neither memory nor disk keeps nothing"),
        ({"memory": "lots"}, "'lots' is not a size"),
        ({"policy": "random"}, "policy is 'random', must be one of keep, lru, mru, fifo"),
        ({"disk_budget": "1GiB"}, "are settings of a disk; give disk=DIR, too"),
    ],
)
def test_settings_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        jaxkv.Memo(**arguments)


def test_options_that_do_not_fit_are_refused(memo):
    with pytest.raises(ValueError, match="batch is 'all', must be one of bucket, full"):
        memo.wrap(double, batch="all")
    with pytest.raises(ValueError, match=r"parameter \[0\]\['name'\] of .* is a str"):
        memo.wrap(lambda params, x: x, {"name": "relu"})
    with pytest.raises(ValueError, match="a int can't be called"):
        memo.wrap(3)
    with pytest.raises(TypeError, match=r"can't be pickled.*features\.source"):
        pickle.dumps(memo.wrap(double))


# Warming, and reading elsewhere


def test_warming(memo, capsys):
    features = memo.wrap(double)
    x = items(20)
    assert features.warm([x[:8], x[4:12]]) == 12
    assert "2/2" in capsys.readouterr().err
    assert features.warm((x[begin : begin + 5] for begin in range(0, 20, 5)), progress=False) == 8
    assert capsys.readouterr().err == ""
    assert features.lookup(x) is not None


def test_a_source_reads_example_by_example(any_memo):
    features = any_memo.wrap(lambda x: {"f": x * 2})
    x = items(6)
    features(x[:5])
    source = features.source(list(x))
    assert len(source) == 6
    np.testing.assert_array_equal(source[3]["f"], x[3] * 2)
    np.testing.assert_array_equal(source[-2]["f"], x[4] * 2)
    with pytest.raises(KeyError, match=r"the output for example 5 is not there; .*features\.warm\(batches\)"):
        source[5]
    with pytest.raises(IndexError, match="there are 6 examples, and 6 is none of them"):
        source[6]
    assert features.source(list(x), missing="none")[5] is None
    labeled = features.source([{"image": row, "label": i} for i, row in enumerate(x)], at="image")
    np.testing.assert_array_equal(labeled[2]["image"]["f"], x[2] * 2)
    assert labeled[2]["label"] == 2
    for kind in (tuple, list, Pair._make):
        got = features.source([kind((row, i)) for i, row in enumerate(x)], at=0)[1]
        assert type(got) is type(kind((0, 0))) and got[1] == 1
        np.testing.assert_array_equal(got[0]["f"], x[1] * 2)
    with pytest.raises(ValueError, match=r"example 1 is float32\[3\], and the first one float32\[6\]"):
        features.source([x[0], x[1, :3]])[1]
    for wrong, message in [((x for x in x), "without __len__"), ([], "there are no examples")]:
        with pytest.raises(ValueError, match=message):
            features.source(wrong)


def test_a_source_goes_to_another_process_if_there_is_a_disk(tmp_path, memo):
    x = items(3)
    with jaxkv.Memo(memory="1MiB", disk=tmp_path / "store") as both:
        features = both.wrap(double)
        features(x)
        copy = pickle.loads(pickle.dumps(features.source(list(x))))
        np.testing.assert_array_equal(copy[1], x[1] * 2)
    with pytest.raises(TypeError, match=r"only in memory can't go to another process; .*Memo\(disk=DIR\)"):
        pickle.dumps(memo.wrap(double).source(list(x)))


# The tier in memory


def simulate(policy: str, budget: int, accesses: list[int]) -> tuple[set[int], int]:
    """The policies in ten lines: (what is held at the end, hits)."""
    held: list[int] = []
    hits = 0
    for key in accesses:
        if key in held:
            hits += 1
            if policy in ("lru", "mru"):
                held.append(held.pop(held.index(key)))
        elif len(held) < budget or policy != "keep":
            if len(held) == budget:
                held.pop(-1 if policy == "mru" else 0)
            held.append(key)
    return set(held), hits


@pytest.mark.parametrize("policy", ["keep", "lru", "mru", "fifo"])
def test_policies_are_what_they_are_called(policy):
    size = Memory(10**6)
    size.write([bytes(32)], [bytes(100)])
    one = size.stats().nbytes
    memory = Memory(20 * one + one // 2, policy)
    order = np.random.default_rng(0).integers(0, 40, 2_000)
    for number in order:
        key = int(number).to_bytes(32, "little")
        if memory.read([key]) == [None]:
            memory.write([key], [bytes(100)])
    held, hits = simulate(policy, 20, order.tolist())
    stats = memory.stats()
    assert stats.hits == hits and stats.items == len(held) == 20
    assert {n for n in range(40) if memory.read([n.to_bytes(32, "little")]) != [None]} == held
    assert stats.nbytes == 20 * one <= stats.budget
    assert (stats.refused if policy == "keep" else stats.evicted) == stats.misses - 20


def test_shuffled_epochs_at_half_the_capacity_are_best_kept():
    """Half is found under "keep"; "lru" has thrown most of it away when it comes again."""
    rates = {}
    for policy in ("keep", "lru"):
        memory = Memory(500 * (65 + 133 + 120), policy)
        for epoch in range(11):
            if epoch == 1:
                before = memory.stats().hits
            for number in np.random.default_rng(epoch).permutation(1_000):
                key = int(number).to_bytes(32, "little")
                if memory.read([key]) == [None]:
                    memory.write([key], [bytes(100)])
        rates[policy] = (memory.stats().hits - before) / 10_000
    assert rates["keep"] == pytest.approx(0.5, abs=0.01)
    assert rates["lru"] < 0.2


def test_what_is_larger_than_the_budget_is_returned_but_not_kept():
    memo = jaxkv.Memo(memory="1KiB")
    x = items(1, width=1_000)
    features = memo.wrap(double)
    np.testing.assert_array_equal(features(x), x * 2)
    assert features.lookup(x) is None
    assert memo.stats().memory == dataclasses.replace(memo.stats().memory, items=0, nbytes=0, refused=1)


def test_a_function_that_is_traced_anew_all_the_time_is_warned_of(memo, caplog):
    calls = [0]

    def counts(x):
        calls[0] += 1  # changes what it captures
        return x

    features = memo.wrap(counts)
    for _ in range(12):
        features(items(2))
    warnings = [record.message for record in caplog.records if "traced anew" in record.message]
    assert len(warnings) == 1


@pytest.mark.parametrize(
    "function",
    [lambda x: x + jax.random.normal(jax.random.key(0), x.shape), lambda x: x + jnp.arange(float(len(x)))[:, None]],
)
def test_functions_whose_rows_depend_on_their_place_are_refused(memo, function):
    with pytest.raises(ValueError, match="or on its place among them"):
        memo.wrap(function)(items(4))


def test_functions_that_give_no_arrays_are_refused(memo):
    with pytest.raises(ValueError, match="gives no arrays, so there is nothing to keep"):
        memo.wrap(lambda x: {"a": None})(items(4))


def test_masked_arrays_are_refused(memo):
    with pytest.raises(ValueError, match=r"x is a masked array, .*filled\(\)"):
        memo.wrap(double)(np.ma.masked_greater(items(4), 0.5))


def test_a_function_that_is_called_back_may_call_a_memoized_one(memo):
    inner = memo.wrap(double)
    other = np.full((64, 512), -1, np.float32)

    def back(x):
        inner(other)
        other[:] -= 1
        return np.asarray(x)

    def outer(x):
        called = jax.pure_callback(back, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
        return called * 0 + x * 2

    features = memo.wrap(outer, version="1", check=False)
    x = items(64, width=512)[::-1]
    np.testing.assert_array_equal(features(x), x * 2)
    np.testing.assert_array_equal(features(x), x * 2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_child_that_is_forked_while_a_thread_traces_can_look_up(memo):
    traces, go_on = threading.Event(), threading.Event()

    def slow(x):
        if x.shape[1] == 7:
            traces.set()
            go_on.wait(60)
        return x * 2

    features = memo.wrap(slow)
    x = items(3)
    features(x)
    thread = threading.Thread(target=lambda: features.namespace(items(3, width=7)))
    thread.start()
    traces.wait(60)
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        found = features.lookup(x)
        os._exit(0 if memo.stats().memory.items == 3 and np.array_equal(found, x * 2) else 1)
    go_on.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# What people do


class Holder:
    """Somebody's own object, which holds what a function reads."""


def test_what_a_captured_object_holds_is_watched(memo):
    holder, other = Holder(), Holder()
    holder.inner, other.w = other, jnp.float32(2)
    holder.unread = object()
    features = memo.wrap(lambda x: x * holder.inner.w)
    x = items(3)
    np.testing.assert_array_equal(features(x), x * 2)
    other.w = jnp.float32(3)
    np.testing.assert_array_equal(features(x), x * 3)
    holder.inner = Holder()
    holder.inner.w = jnp.float32(4)
    np.testing.assert_array_equal(features(x), x * 4)
    name = features.namespace(x)
    holder.unread = object()
    assert features.namespace(x) == name
    holder.model = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="reads the nnx module Linear from outside"):
        memo.wrap(lambda x: holder.model(x))


def test_what_changes_unseen_is_an_error_and_nothing_is_kept(memo, tmp_path):
    path = tmp_path / "factor"
    path.write_text("2")
    features = memo.wrap(lambda x: x * float(path.read_text()))
    x = items(8)
    features(x[:1])
    path.write_text("9")
    with pytest.raises(ValueError, match="is another function than when it was traced first: it reads something"):
        features(x)
    assert memo.stats().memory.items == 1
    path.write_text("2")
    np.testing.assert_array_equal(memo.wrap(features._function._target)(x), x * 2)


def test_noise_that_belongs_to_places_is_refused(memo):
    for noisy in (
        lambda x, key: x + jax.random.normal(key, x.shape),
        lambda x, key: x + jnp.arange(len(x), dtype=x.dtype)[:, None],
    ):
        with pytest.raises(ValueError, match=r"or on its place among them.*4 items of .*x: float32\[6\]"):
            memo.wrap(noisy)(items(4), jax.random.key(0))


def test_a_mask_taken_for_items_is_explained(memo):
    mask = np.tri(4, dtype=np.float32)
    with pytest.raises(ValueError, match=r"mask: float32\[4\].*belong to all items \(shared="):
        memo.wrap(lambda x, mask: x * mask.sum(axis=0)[:, None].mean())(items(4), mask)
    with pytest.raises(ValueError, match="Size of label 's'") as caught:
        memo.wrap(lambda x, mask: jnp.einsum("ts,sd->td", mask, x))(items(4), mask)
    assert any("traced for 2 items of mask: float32[4], x: float32[6]" in note for note in caught.value.__notes__)
    with pytest.raises(ValueError, match=r"shared names msk; the arguments of .* are x, mask"):
        memo.wrap(lambda x, mask: x, shared=["msk"])


def test_whole_numbers_may_round_to_their_neighbors(memo):
    weights = jnp.asarray(items(256, 1, 64))
    features = memo.wrap(lambda w, x: ((x @ w) * 1e6).astype(jnp.int32) // 1_000_000, weights)
    assert features(items(33, 2, 256)).dtype == jnp.int32
    with pytest.raises(ValueError, match="depends on the other rows"):
        memo.wrap(lambda x: jnp.argsort(x, axis=0))(items(9))


@pytest.mark.parametrize("dtype", ["int8", "bool", "complex64", "bf16", "nothing"])
def test_a_cast_that_would_lose_everything_is_refused(memo, dtype):
    with pytest.raises(ValueError, match=f"output_dtype is '{dtype}', must be floating: float32, bfloat16"):
        memo.wrap(double, output_dtype=dtype)


def test_jitted_functions_are_taken_as_they_were(memo):
    module = linen.Dense(4)
    x = items(3)
    variables = module.init(jax.random.key(0), x)
    np.testing.assert_allclose(memo.wrap(jax.jit(module.apply), variables)(x), module.apply(variables, x), rtol=1e-6)
    plain = lambda x, mode="a": x if mode == "a" else -x  # noqa: E731
    jitted = memo.wrap(jax.jit(plain, static_argnames="mode"))
    np.testing.assert_array_equal(jitted(x, mode="b"), -x)
    assert jitted.namespace(x) == memo.wrap(plain).namespace(x)


def test_warming_with_what_loaders_yield(memo):
    features = memo.wrap(double)
    x = items(8)
    batches = [{"image": x[:4], "label": "a"}, {"image": x[4:], "label": "b"}]
    assert features.warm(batches, at="image", progress=False) == 8
    assert features.warm([(x[:4], 1)], at=0, progress=False) == 0
    with pytest.raises(ValueError, match=r"at='picture', and what was given is \['image', 'label'\]"):
        features.warm(batches, at="picture", progress=False)
    with pytest.raises(ValueError, match=r"batches is an array \(8, 6\); give a list of batches"):
        features.warm(x)
    with pytest.raises(ValueError, match="at='picture'"):
        features.source(batches, at="picture")
    with pytest.raises(IndexError, match="one example at a time"):
        features.source(list(x))[0:2]


def test_memory_that_is_full_is_said_once(caplog):
    memo = jaxkv.Memo(memory="1KiB")
    features = memo.wrap(double)
    for seed in range(3):
        features(items(20, seed))
    (record,) = caplog.records
    assert record.message.startswith("memory=1.0 KiB of a memo is full after 4 outputs of ")
    assert str(memo.stats()).endswith("of memory, of at most 1.0 KiB (full: 56 times an output had no place)")


def test_an_epoch_has_stats_of_its_own(tmp_path):
    memo = jaxkv.Memo(disk=tmp_path / "store", disk_budget=None)
    features = memo.wrap(double)
    features(items(40, width=600))
    first = memo.end_epoch()
    assert (first.calls, first.items, first.hits, first.computed) == (1, 40, 0, 40)
    assert first.grown > 40 * 2400 and first.memory.items == first.disk.items == 40
    features(items(40, width=600)[:30]), features(items(10, seed=1, width=600))
    second, nothing = memo.end_epoch(), memo.end_epoch()
    assert (second.calls, second.items, second.hits, second.misses, second.computed) == (2, 40, 30, 10, 10)
    assert second.hit_rate == 0.75 and 0 < second.grown < first.grown and nothing.items == nothing.grown == 0
    assert memo.stats().items == 80 and memo.stats().grown == first.grown + second.grown


@pytest.mark.parametrize("disk", [True, False])
def test_items_that_are_others_in_each_epoch_are_said_once_with_what_they_took(tmp_path, caplog, disk):
    memo = jaxkv.Memo(disk=tmp_path / "store" if disk else None)
    augmented, right = memo.wrap(double), memo.wrap(lambda x: x + 1)
    for epoch in range(4):
        for seed in range(2):
            augmented(items(16, seed=2 * epoch + seed)), right(items(16, seed=seed))
        ended = memo.end_epoch()
        assert len(caplog.messages) == (epoch > 0)
        if epoch == 1:
            grown = format_bytes(ended.grown)
    (message,) = caplog.messages
    assert message.startswith(f"double: none of 32 items was found in this epoch, and the store grew by {grown}. If")
    assert "augmentation: let it come after the memo" in message


def test_where_no_epoch_ends_many_items_without_a_hit_are_said_once(caplog, monkeypatch):
    monkeypatch.setattr("jaxkv.memo.counts.MANY", 64)
    memo = jaxkv.Memo()
    features, other = memo.wrap(double), memo.wrap(lambda x: x + 1)
    other(items(16)), other(items(16))
    for seed in range(10):
        features(items(16, seed=seed)), other(items(16, seed=seed))
        assert len(caplog.messages) == (seed >= 3)
    assert caplog.messages[0].startswith("double: none of 64 items was found so far, and the store grew by ")
    monkeypatch.setattr(memo._tiers.counts, "stats", None)
    features(items(16, seed=99))  # nothing is measured for what was said


def test_the_budget_of_a_disk_is_a_share_of_what_is_free_when_it_is_opened(tmp_path, monkeypatch):
    free = [10**9]
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=free[0]))

    def budget(**settings) -> int | None:
        with jaxkv.Memo(disk=tmp_path / "store", **settings) as memo:
            return memo.stats().disk.budget

    taken = database.LEAST_BYTES
    assert budget() == budget(disk_budget=" 50 %") == (10**9 + taken) // 2
    assert budget(disk_budget="12.5%") == (10**9 + taken) // 8 and budget(disk_budget="100%") == 10**9 + taken
    assert budget(disk_budget="1MB") == 10**6 and budget(disk_budget=None) is None
    with jaxkv.Memo(disk=tmp_path / "store") as memo:
        memo.wrap(double)(items(2000, 0))
        free[0] -= memo.stats().grown
        assert str(memo.stats()).endswith("of disk, of at most 476.9 MiB")
        source = pickle.loads(pickle.dumps(memo.wrap(double).source(items(3))))
        assert source._tiers[0].budget == memo.stats().disk.budget
    assert budget() == (10**9 + taken) // 2, "what it takes itself is no reason to take less"
    free[0] = 0
    assert jaxkv.Memo(disk=tmp_path / "full").stats().disk.budget == LEAST
    for wrong in ("0%", "101%", "%", "half%", "-5%"):
        with pytest.raises(ValueError, match=f"disk_budget is '{wrong}'; give a share"):
            budget(disk_budget=wrong)


def test_a_memo_says_what_it_is(tmp_path):
    with jaxkv.Memo(memory="1MiB", disk=tmp_path / "store") as memo:
        assert repr(memo) == f"Memo(memory='1.0 MiB', disk='{tmp_path / 'store'}')"
    assert repr(memo).endswith(", closed)")
    with pytest.raises(jaxkv.CacheError, match="this memo is closed"):
        memo.wrap(double)


def test_examples_in_another_byte_order_are_found(memo):
    examples = np.array([[1, 0], [256, 0]], ">u2")
    features = memo.wrap(lambda x: x.astype(jnp.float32) * 2)
    features.warm([examples], progress=False)
    source = features.source(examples)
    np.testing.assert_array_equal(source[0], [2, 0])
    np.testing.assert_array_equal(source[1], [512, 0])


@jax.tree_util.register_pytree_node_class
class Sized:
    """A pytree that looks at what it holds."""

    def __init__(self, array):
        self.array, self.size = array, array.shape[0]

    def tree_flatten(self):
        return (self.array,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_classes_that_look_at_what_they_hold_come_in_and_go_out(memo):
    x = items(5)
    got = memo.wrap(lambda sized: Sized(sized.array * 2))(Sized(x))
    assert got.size == 5
    np.testing.assert_array_equal(got.array, x * 2)


def test_mapped_functions_keep_their_defaults(memo):
    def single(row, scale=2.0, *, shift=1.0):
        return row * scale + shift

    x = items(4)
    np.testing.assert_array_equal(memo.wrap(jax.vmap(single))(x), jax.vmap(single)(x))
    np.testing.assert_array_equal(memo.wrap(single)(x, 3.0), x * 3 + 1)
    single.__defaults__ = (4.0,)
    np.testing.assert_array_equal(memo.wrap(single)(x), x * 4 + 1)


class Noise(linen.Module):
    @linen.compact
    def __call__(self, x, **scales):
        return (x + jax.random.normal(self.make_rng("noise"), x.shape[1:])[None]) * scales["scale"][None]


@pytest.mark.parametrize("key", [jax.random.key(1), jax.random.PRNGKey(1)])
def test_keys_and_named_arguments_that_are_shared_belong_to_all_items(memo, key):
    x, scale = items(2), np.arange(6, dtype=np.float32)
    features = memo.wrap(Noise().apply, {}, shared=["scale"])
    want = Noise().apply({}, x, scale=scale, rngs={"noise": key})
    np.testing.assert_allclose(features(x, scale=scale, rngs={"noise": key}), want, rtol=1e-6)
    assert memo.stats().items == 2


def test_scalars_of_numpy_are_scalars(memo):
    features = memo.wrap(lambda x, train, mode: x * 2 if train and mode == "a" else x)
    x = items(2)
    np.testing.assert_array_equal(features(x, np.bool_(True), np.str_("a")), x * 2)
    np.testing.assert_array_equal(features(x, True, "a"), x * 2)
    assert memo.stats().computed == 2


def test_a_call_that_is_under_way_when_the_memo_is_closed_keeps_nothing(tmp_path):
    memo = jaxkv.Memo(memory="1MiB", disk=tmp_path / "store")

    def closes(x):
        memo.close()
        return np.asarray(x)

    features = memo.wrap(
        lambda x: jax.pure_callback(closes, jax.ShapeDtypeStruct(x.shape, x.dtype), x), version="1", check=False
    )
    x = items(3)
    np.testing.assert_array_equal(features(x), x)
    assert memo.stats().memory.items == 0
    assert jaxkv.Memo(disk=tmp_path / "store").stats().disk.items == 0
    with pytest.raises(jaxkv.CacheError, match="this memo is closed"):
        memo.clear()


def test_what_always_changes_does_not_fill_the_directory_with_descriptions(tmp_path):
    with jaxkv.Memo(memory=None, disk=tmp_path / "store") as memo:
        features = memo.wrap(lambda x, scale: x * scale)
        for i in range(80):
            features(items(1), np.float32(i))
        assert memo.stats().disk.items == 80
    assert len(labels(tmp_path / "store")) == 64


def test_what_was_wrapped_is_named_and_methods_are_wrapped_with_their_object(memo):
    class Encoder:
        def encode(self, x):
            """Twice."""
            return x * 2

    features = memo.wrap(Encoder().encode)
    assert features.__name__.endswith("Encoder.encode") and features.__doc__ == "Twice."
    with pytest.raises(ValueError, match=r"Encoder\.encode is a method without its object; wrap it where that is"):
        memo(Encoder.encode)
    with pytest.raises(ValueError, match="version is 2; give a text"):
        memo.wrap(double, version=2)
    with pytest.raises(ValueError, match=r"x is a Tensor; .*; give np\.asarray of it"):
        memo.wrap(double)(type("Tensor", (), {"__array__": lambda self: items(2)})())


def test_wrapping_twice_and_coroutines_are_refused(memo):
    async def later(x):
        return x

    with pytest.raises(ValueError, match="<memoized double> is memoized already"):
        memo.wrap(memo.wrap(double))
    with pytest.raises(ValueError, match="a coroutine can't be called by JAX"):
        memo.wrap(later)


def test_what_was_cleared_is_described_again(tmp_path):
    with jaxkv.Memo(memory=None, disk=tmp_path / "store") as memo:
        features = memo.wrap(double)
        for clear in (memo.clear, features.clear, lambda: None):
            features(items(3))
            assert len(labels(tmp_path / "store")) == 1
            clear()


def test_programs_for_values_that_never_come_again_are_let_go(memo):
    features = memo.wrap(lambda x, scale: x * scale, check=False)
    x = items(1)
    for scale in range(70):
        features.namespace(x, scale)
    assert len(features._runners) == 64


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x - x.mean(axis=0, keepdims=True),
        lambda x: jnp.cumsum(x, axis=0) + len(x) * 0,
        lambda x: x / x.max(0, keepdims=True),
    ],
)
@pytest.mark.parametrize("batch", ["bucket", "full"])
def test_rows_that_depend_on_one_another_are_refused_with_the_second_item_met_one_by_one(memo, function, batch):
    features, x = memo.wrap(function, batch=batch), items(3)
    features(x[:1]), features(np.repeat(x[:1], 3, axis=0))
    with pytest.raises(ValueError, match="depends on the other rows of the batch"):
        features(x[1:2])
    with pytest.raises(ValueError, match="depends on the other rows of the batch"):
        features(x[:1])
    good = memo.wrap(lambda x: jnp.sin(x) @ jnp.ones((6, 2)), batch=batch)
    for i in range(3):
        good(x[i : i + 1])
    assert good.lookup(x) is not None


@pytest.mark.parametrize("devices", [2, 3, 4])
def test_functions_that_split_their_batch_over_devices(memo, devices):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    rows = PartitionSpec("data")
    split = memo.wrap(jax.shard_map(lambda x: jnp.sin(x) * 2, mesh=mesh, in_specs=rows, out_specs=rows))
    x = items(12)
    for part in (x[:8], x[4:9], x[9:10], x):
        np.testing.assert_allclose(split(part), np.sin(part) * 2, rtol=1e-6)
    assert memo.stats().computed == 12
    again = memo.wrap(jax.shard_map(lambda x: jnp.sin(x) * 2, mesh=mesh, in_specs=rows, out_specs=rows))
    assert again.namespace(x[:1]) == split.namespace(x), "whatever the size of the first call"
    np.testing.assert_allclose(again(x[:1] + 1), np.sin(x[:1] + 1) * 2, rtol=1e-6)
    wrong = jax.shard_map(lambda x: x - jax.lax.pmean(x, "data"), mesh=mesh, in_specs=rows, out_specs=rows)
    with pytest.raises(ValueError, match="depends on the other rows of the batch"):
        memo.wrap(wrong)(x[: 2 * devices])


def test_a_function_that_cannot_be_traced_fails_as_it_does_itself(memo):
    for rows in (99, 8):  # also if it fits the call, but not its parts
        with pytest.raises(TypeError, match="incompatible shapes") as error:
            memo.wrap(lambda x, rows=rows: x + jnp.ones((rows, 6)))(items(8))
        assert "was traced for 2 items" in error.value.__notes__[-1]


@pytest.mark.parametrize("how", ["params", "module", "captured"])
def test_parameters_that_were_donated_or_deleted_are_named_for_hits_and_misses(memo, how):
    weights, x = jnp.ones((6, 2)) * 3, items(4)
    module = nnx.Linear(6, 2, rngs=nnx.Rngs(0))
    features, name = {
        "params": lambda: (memo.wrap(lambda w, x: x @ w["layer"]["kernel"], {"layer": {"kernel": weights}}), "kernel"),
        "module": lambda: (memo.wrap(module), "kernel"),
        "captured": lambda: (memo.wrap(lambda x: x @ weights), "captures"),
    }[how]()
    features(x[:2])
    jax.jit(lambda w: w + 1, donate_argnums=0)(module.kernel[...] if how == "module" else weights)
    assert weights.is_deleted() or module.kernel.get_raw_value().is_deleted()
    for part in (x[:2], x[2:]):
        with pytest.raises(ValueError, match=f"{name}.*was deleted"):
            features(part)
        with pytest.raises(ValueError, match=f"{name}.*was deleted"):
            features.lookup(part)


def test_pickling_a_memo_names_what_to_give_in_its_place(memo):
    with pytest.raises(TypeError, match=r"Memo\(memory='16.0 MiB'\) can't be pickled.*features\.source"):
        pickle.dumps(memo)
