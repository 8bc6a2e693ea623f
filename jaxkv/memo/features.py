"""A memoized function: called like the function, it computes only what its memo doesn't hold."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxkv.extras import need
from jaxkv.logs import log
from jaxkv.memo.call import Call
from jaxkv.memo.function import Function, State
from jaxkv.memo.hashing import SIZE, Hash
from jaxkv.memo.runner import BATCHES, Runner, Settings
from jaxkv.memo.source import Source, part
from jaxkv.memo.staging import Staging
from jaxkv.memo.tiers import Tiers

_MANY = 8
# Programs kept, and namespaces described on disk: an argument that always changes makes one for each of its values.
_MOST = 64
# What else a program depends on: settings of JAX that may be changed between two calls.
_CONFIG = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_numpy_dtype_promotion",
    "jax_threefry_partitionable",
    "jax_random_seed_offset",
)
_all: weakref.WeakSet[Features] = weakref.WeakSet()


class Features:
    """What `Memo.wrap` returns; see there.

    >>> memo = jaxkv.Memo(memory="1MiB")
    >>> features = memo.wrap(lambda w, x: x @ w, jnp.ones((2, 3)))
    >>> x = np.eye(2, dtype=np.float32)
    >>> features.lookup(x) is None
    True
    >>> features(x).shape
    (2, 3)
    >>> features.lookup(x[1:])
    array([[1., 1., 1.]], dtype=float32)
    """

    def __init__(
        self,
        tiers: Tiers,
        hashing: Hash,
        staging: Staging,
        function: Any,
        params: tuple[Any, ...],
        shared: Collection[str],
        settings: Settings,
    ) -> None:
        if settings.batch not in BATCHES:
            raise ValueError(f"batch is {settings.batch!r}, must be one of {', '.join(BATCHES)}")
        self._tiers, self._hash, self._staging = tiers, hashing, staging
        self._function = Function(function, params, [shared] if isinstance(shared, str) else shared)
        self.__name__, self.__doc__ = self._function.name, getattr(function, "__doc__", None)
        self._settings = settings
        self._asked = tiers.counts.of(self.__name__)
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._state = State(self._function)
        self._runners: dict[tuple[Any, ...], Runner] = {}
        self._namespaces: set[bytes] = set()
        self._described: dict[bytes, bool] = {}  # of these, on disk: whether as checked
        self._traced_anew = 0
        _all.add(self)

    def __repr__(self) -> str:
        return f"<memoized {self._function.name}>"

    def __reduce__(self) -> Any:
        raise TypeError(
            f"{self!r} can't be pickled: another process would need its parameters and JAX. Give it "
            "features.source(examples), which reads the computed outputs"
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the function's output, with the containers and dtypes that it has, as JAX arrays.

        Arrays have the items along their first axis. They share memory neither with what is kept nor with the inputs.

        Raises:
          NotSupportedError: under jit, grad, vmap or scan, where there is nothing to look up yet.
          ValueError: for arguments that can't be part of a key, functions that are not row by row, and in a process
            that was forked after `wrap`: JAX would wait there for threads that only the parent has.
          CacheError: after the memo was closed.
        """
        payloads, runner, call, _ = self._computed(args, kwargs)
        return jax.device_put(runner.entry.assemble(payloads), _placement(call))

    def lookup(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the output as NumPy arrays if every item is there, else None. Nothing is computed.

        A forked process can look up calls of a form that its parent has made, or named by `namespace`, before.
        """
        entry, keys, found = self._find(args, kwargs)
        return entry.assemble([found[key] for key in keys]) if all(key in found for key in keys) else None

    def contains(self, *args: Any, **kwargs: Any) -> np.ndarray:
        """Returns which items are there: bool [B]."""
        _, keys, found = self._find(args, kwargs)
        return np.array([key in found for key in keys], bool)

    def namespace(self, *args: Any, **kwargs: Any) -> str:
        """Returns the name under which the outputs of such a call are kept, in hex, as `jaxkv memo ls` shows it.

        Of the items only dtype and shape matter. It changes with the function, its parameters and its settings.
        """
        call, runner = self._prepare(args, kwargs)
        return runner.entry.namespace_of(call, self._hash).hex()

    def warm(self, batches: Iterable[Any], *, at: Any = None, progress: bool = True, **kwargs: Any) -> int:
        """Computes what is missing, batch by batch, and returns how many items that were.

        Args:
          batches: what a loader yields.
          at: None if a batch is the function's first argument; else where in it that is: a key or an index.
          progress: whether a bar is shown.
          **kwargs: the function's other arguments.

        Raises:
          ValueError: for an array in place of batches, and as a call does.
          ImportError: for the bar, if the extra jaxkv[memo] is missing.

        >>> features = jaxkv.Memo(memory="1MiB").wrap(lambda x: x + 1)
        >>> features.warm([(np.ones((4, 2)), "a"), (np.zeros((4, 2)), "b")], at=0, progress=False)
        2
        """
        if isinstance(batches, np.ndarray | jax.Array):
            raise ValueError(f"batches is an array {batches.shape}; give a list of batches, or a loader")
        computed = 0
        if progress:
            batches = need("tqdm.auto", "progress=True", "memo").tqdm(batches, desc=self._function.name, unit="batch")
        for batch in batches:
            computed += self._computed((part(batch, at),), kwargs)[-1]
        return computed

    def source(self, examples: Any, *, at: Any = None, missing: str = "raise", **kwargs: Any) -> Source:
        """Returns what data loaders read: the outputs for examples, one by one, without JAX, in any process.

        Args:
          examples: anything with `__len__` and `__getitem__` that gives one example at a time: a pytree of arrays
            without the batch axis.
          at: None if an example is the function's first argument; else where in it that is: a key or an index. The
            source gives the example with the output in its place.
          missing: what happens when an output isn't there: "raise" a KeyError, or give "none".
          **kwargs: the function's other arguments.

        >>> features = jaxkv.Memo(memory="1MiB").wrap(lambda x: x + 1)
        >>> images = np.ones((4, 2), np.float32)
        >>> features.warm([images], progress=False)
        1
        >>> features.source([{"image": image, "label": 7} for image in images], at="image")[3]
        {'image': array([2., 2.], dtype=float32), 'label': 7}
        """
        source = Source(examples, at, missing)
        call, runner = self._prepare((source.first(),), kwargs)
        return source.reading(self._tiers.each, self._hash, runner.entry, call)

    def clear(self) -> None:
        """Forgets what this process has asked of this function, whatever parameters it had.

        What other processes have asked of it, `jaxkv memo prune DIR --namespace NAME` removes.
        """
        namespaces, self._namespaces = self._namespaces, set()
        if namespaces:
            self._tiers.clear(namespaces)

    def _find(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[bytes], dict[bytes, Any]]:
        call, runner = self._prepare(args, kwargs)
        keys = self._keys(runner, call)
        return runner.entry, keys, self._tiers.read(list(dict.fromkeys(keys)), runner.entry.nbytes)

    def _computed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Runner, Call, int]:
        """Returns the bytes of each item's output, whose they are, and how many were missing and were computed."""
        if os.getpid() != self._pid:
            raise ValueError(
                f"{self!r} was called in a forked process, where JAX can't compute: its threads are in the parent. "
                "Look up what is there, by features.lookup(...) or features.source(examples), and compute in the parent"
            )
        call, runner = self._prepare(args, kwargs)
        tiers, entry = self._tiers, runner.entry
        keys = self._keys(runner, call)
        row_of = dict(zip(reversed(keys), reversed(range(call.size)), strict=True))  # the first, where some are alike
        payloads = tiers.read(list(row_of), entry.nbytes)
        missing = sorted((key for key in row_of if key not in payloads), key=row_of.__getitem__)
        hits = sum(key in payloads for key in keys)
        computed = 0

        def compute(keys: Sequence[bytes]) -> dict[bytes, bytes]:
            nonlocal computed
            computed += len(keys)
            payloads = dict(zip(keys, runner(call, [row_of[key] for key in keys]), strict=True))
            self._describe(runner, keys[0][:SIZE])
            return payloads

        unsure = payloads and not runner.checked and not tiers.is_checked(keys[0][:SIZE])
        if unsure and runner.check_found(call, [row_of[key] for key in payloads][:2]):
            self._describe(runner, keys[0][:SIZE], at_once=True)
        if missing:
            payloads |= tiers.fill(missing, entry.nbytes, compute)
        tiers.counts.add(self._asked, call.size, hits, computed)
        return [payloads[key] for key in keys], runner, call, computed

    def _describe(self, runner: Runner, namespace: bytes, *, at_once: bool = False) -> None:
        """Says what a namespace is, and whether its function was checked."""
        tiers = self._tiers
        if runner.checked:
            tiers.checked.add(namespace)
        if tiers.disk is None or self._described.get(namespace) == runner.checked:
            return
        if namespace in self._described or len(self._described) < _MOST:
            self._described[namespace] = runner.checked
            about = runner.entry.about(self._function.name, self._settings.version)
            tiers.disk.describe(namespace, about | ({"checked": True} if runner.checked else {}), at_once=at_once)

    def _keys(self, runner: Runner, call: Call) -> list[bytes]:
        keys = runner.entry.keys(call, self._hash)
        self._namespaces.update(key[:SIZE] for key in keys[:1])
        return keys

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, Runner]:
        """Returns the call, and what computes it: made anew where the function has changed since the last call."""
        call = Call.read(self._function.bind(args, kwargs), self._function.shared, self._function.groups)
        with self._lock:
            if not self._state.seen.holds(*self._function.watch()):
                old, self._state = self._state, State(self._function, self._state)
                if not self._state.one_program(old):
                    self._runners.clear()
                    self._count_trace()
            self._state.check_there(self._function.name)
            # Types, because the class of an enum may be defined anew.
            form = call.form, *map(type, call.statics), *(getattr(jax.config, name, None) for name in _CONFIG)
            runner = self._runners.get(form)
            if runner is None or runner.state is not self._state:
                self._same_process(call)
                runner = (
                    Runner(self._function, self._state, call, self._settings, self._hash, self._staging)
                    if runner is None
                    else runner.updated(self._state)
                )
                self._runners[form] = runner
                if len(self._runners) > _MOST:
                    del self._runners[next(iter(self._runners))]
        runner.check()
        return call, runner

    def _count_trace(self) -> None:
        self._traced_anew += 1
        if self._traced_anew == _MANY:
            log.warning(
                f"{self._function.name} was traced anew {_MANY} times, because settings, or what it reads from around "
                "it, keep changing; that is right, but slow: give it what changes as an argument"
            )

    def _same_process(self, call: Call) -> None:
        if os.getpid() != self._pid:
            raise ValueError(
                f"{self!r} was never called for {call.form} before this process was forked, and JAX can't be used in "
                "it; call features.namespace(...) with such items in the parent, or read features.source(examples)"
            )


def _placement(call: Call) -> Any:
    """Returns where outputs belong: with the first argument that was put somewhere, sharded as its items are."""
    for column in call.columns:
        if isinstance(column, jax.Array) and column.committed:
            sharding = column.sharding
            if isinstance(sharding, NamedSharding):
                return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))
            return sharding if isinstance(sharding, SingleDeviceSharding) else None
    return None


def _after_fork() -> None:
    for features in list(_all):  # a thread that was tracing is not in the child, and nobody waits for compilers to fork
        features._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
