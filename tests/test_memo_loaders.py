"""What a memo holds is read in the worker processes of data loaders: forked ones, spawned ones, grain's and torch's."""

from __future__ import annotations

import multiprocessing
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv

COUNT = 12
X = np.random.default_rng(0).integers(-9, 9, (COUNT, 5)).astype(np.float32)  # products of whole numbers don't round
WEIGHTS = np.arange(15, dtype=np.float32).reshape(5, 3)
RIGHT = X @ WEIGHTS

# Workers are forked beside JAX's threads; a source uses none of them, which is what is tested.
pytestmark = [
    pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]
METHODS = [method for method in ("fork", "spawn") if method in multiprocessing.get_all_start_methods()]


def backbone(weights, x):
    return x @ weights


@pytest.fixture
def memo(tmp_path):
    with jaxkv.Memo(disk=tmp_path / "features") as memo:
        yield memo


@pytest.fixture
def features(memo):
    return memo.wrap(backbone, jnp.asarray(WEIGHTS))


held = None  # in a worker: the source, given to it once


def hold(source):
    global held
    held = source


def ask(numbers):
    """Runs in a worker: examples by number, and what the process did to get them."""
    try:
        rows = [held[number] for number in numbers]
    except KeyError as error:
        rows = str(error)
    return rows, len(held), os.getpid(), list(jax._src.xla_bridge._backends)


@pytest.mark.parametrize("method", METHODS)
def test_workers_read_what_was_computed_before_they_began_and_after(method, memo, features):
    assert features.warm([X[:8]], progress=False) == 8
    with multiprocessing.get_context(method).Pool(1, hold, (features.source(X),)) as pool:
        rows, length, worker, backends = pool.apply(ask, (range(8),))
        np.testing.assert_array_equal(rows, RIGHT[:8])
        assert length == COUNT and worker != os.getpid()
        assert method == "fork" or not backends, "a worker needs no device, and must not take one"
        missing, *_ = pool.apply(ask, ([9],))
        assert "example 9" in missing and "warm" in missing
        features(X)
        rows, *_ = pool.apply(ask, (range(COUNT),))
        np.testing.assert_array_equal(rows, RIGHT)
        pool.close()
        pool.join()
    assert memo.stats().computed == COUNT


def test_a_batch_of_examples_is_looked_up_at_once_and_each_example_fetched_once(memo, features, monkeypatch):
    features.warm([X[:8]], progress=False)
    fetched, asked = [], []

    class Examples(list):
        def __getitem__(self, index):
            fetched.append(index)
            return super().__getitem__(index)

    source = features.source(Examples({"x": x, "label": i} for i, x in enumerate(X)), at="x", missing="none")
    for tier in source._tiers:
        usual = tier.read
        monkeypatch.setattr(tier, "read", lambda keys, nbytes, usual=usual: asked.append(keys) or usual(keys, nbytes))
    fetched.clear()
    rows = source.__getitems__([3, 0, 9, -1, 3])
    assert [row["label"] for row in rows] == [3, 0, 9, COUNT - 1, 3] and fetched == [3, 0, 9, -1, 3]
    np.testing.assert_array_equal([rows[0]["x"], rows[1]["x"], rows[4]["x"]], [RIGHT[3], RIGHT[0], RIGHT[3]])
    assert rows[2]["x"] is None and rows[3]["x"] is None
    assert [len(keys) for keys in asked] == [4, 2][: len(source._tiers)]
    with pytest.raises(IndexError, match="and 1000 is none of them"):
        source.__getitems__([0, 1000])


@pytest.mark.skipif("fork" not in METHODS, reason="this system can't fork")
def test_what_is_only_in_memory_comes_along_in_a_fork():
    memo = jaxkv.Memo(memory="1MiB")
    features = memo.wrap(backbone, jnp.asarray(WEIGHTS))
    features(X)
    reader, writer = multiprocessing.get_context("fork").Pipe(duplex=False)
    source = features.source(X)
    child = os.fork()
    if child == 0:
        try:
            writer.send((np.stack([source[i] for i in range(COUNT)]), features.lookup(X)))
        finally:
            os._exit(0)
    writer.close()
    one_by_one, at_once = reader.recv()
    os.waitpid(child, 0)
    np.testing.assert_array_equal(one_by_one, RIGHT)
    np.testing.assert_array_equal(at_once, RIGHT)


@pytest.mark.skipif("fork" not in METHODS, reason="this system can't fork")
@pytest.mark.parametrize("checked", [True, False])
def test_a_forked_child_computes_and_checks_nothing_and_says_so(memo, features, checked):
    features(X[: 4 if checked else 1])
    reader, writer = multiprocessing.get_context("fork").Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # JAX would wait for threads that are not there
        try:
            said = []
            for call in (lambda: features(X[:1]), lambda: features(X), lambda: features.warm([X], progress=False)):
                try:
                    call()
                except ValueError as error:
                    said.append(str(error))
            writer.send((said, features.lookup(X[:1]), features.contains(X[:5]), memo.stats().computed))
        finally:
            os._exit(0)
    writer.close()
    said, looked_up, there, computed = reader.recv()
    os.waitpid(child, 0)
    assert len(said) == 3 and all("forked process" in message and "features.lookup" in message for message in said)
    np.testing.assert_array_equal(looked_up, RIGHT[:1])
    assert there.sum() == computed == (4 if checked else 1)


# The libraries of others; torch is not part of what the tests install.


@pytest.fixture
def grain():
    """grain, whose workers ask for flags that only a program started by absl has read."""
    flags = pytest.importorskip("absl.flags")
    flags.FLAGS.mark_as_parsed()
    return pytest.importorskip("grain")


def labeled():
    return [{"image": row, "label": number} for number, row in enumerate(X)]


def assert_whole_epoch(batches):
    """Every example once, with its own features beside its own label."""
    labels = np.concatenate([np.asarray(batch["label"]) for batch in batches])
    images = np.concatenate([np.asarray(batch["image"]) for batch in batches])
    assert sorted(labels) == list(range(COUNT))
    np.testing.assert_array_equal(images, RIGHT[labels])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_grains_data_loader_reads_a_source(workers, grain, features):
    features(X)
    sampler = grain.samplers.IndexSampler(COUNT, grain.sharding.ShardOptions(0, 1), shuffle=True, num_epochs=1, seed=1)
    loader = grain.DataLoader(
        data_source=features.source(labeled(), at="image"),
        sampler=sampler,
        operations=[grain.transforms.Batch(3)],
        worker_count=workers,
    )
    assert_whole_epoch(list(loader))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_grains_datasets_read_a_source(grain, features):
    features(X)
    source = features.source(labeled(), at="image")
    dataset = grain.MapDataset.source(source).shuffle(seed=1).batch(3).to_iter_dataset()
    assert_whole_epoch(list(dataset))
    assert_whole_epoch(list(dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=1))))


@pytest.mark.parametrize("method", [None, *METHODS])
def test_torchs_data_loader_reads_a_source(method, features):
    data = pytest.importorskip("torch.utils.data")
    features(X)
    source = features.source(labeled(), at="image")
    loader = data.DataLoader(
        source, batch_size=3, shuffle=True, num_workers=2 if method else 0, multiprocessing_context=method
    )
    assert_whole_epoch(list(loader))
