"""The caches that memo.py compares, each around the same function: the mean of each channel, one product."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import count_cores

import jaxkv
from jaxkv import aligned
from jaxkv.memo.hashing import Hash

os.environ.setdefault("TORCHCACHE_LOG_LEVEL", "ERROR")  # it warns of each item that has no place


@dataclasses.dataclass(frozen=True)
class Setting:
    batch: int = 64
    shape: tuple[int, ...] = (3, 224, 224)
    features: int = 1024
    layers: int = 150  # of the backbone that is named: two leaves each
    width: int = 128
    items: int = 2048  # of the shuffled epochs
    epochs: int = 6


QUICK = Setting(4, (3, 16, 16), 8, 3, 8, 64, 2)


class Inputs:
    """One batch, changed in place for a miss. Aligned as torch aligns its own, so that JAX need not copy it either."""

    def __init__(self, setting: Setting) -> None:
        self.x = aligned.empty((setting.batch, *setting.shape), np.float32)
        self.x[:] = np.random.default_rng(0).random(self.x.shape, np.float32)
        self.first = self.x.reshape(setting.batch, -1)[:, 0]
        self.given = 0

    def renew(self, part: int = 1) -> None:
        """Makes items new, one of so many, also to torchcache, which reads the integer part of the first word."""
        count = len(self.first[::part])
        self.first[::part] = np.arange(self.given, self.given + count) + 1
        self.given += count


def weights(setting: Setting) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((setting.shape[0], setting.features), np.float32)


# The contestants: `call` computes or finds, `alone` only computes, `hash` only finds the keys. All give NumPy arrays or
# tensors that are ready.


class Jaxkv:
    """Memo.wrap on a pure function, with one tier."""

    tiers = ("memory", "disk")

    def __init__(self, setting: Setting, inputs: Inputs, tier: str, folder: str) -> None:
        kept = {"w": jnp.asarray(weights(setting))}

        def fn(kept, x):
            return jnp.mean(x, (2, 3)) @ kept["w"]

        where = {"memory": "1GiB", "disk": None} if tier == "memory" else {"memory": None, "disk": folder}
        self.memo = jaxkv.Memo(**where)
        features, compiled, x = self.memo.wrap(fn, kept), jax.jit(fn), inputs.x
        digests = Hash("xxh3_128")
        self.call = lambda: jax.block_until_ready(features(x))
        self.alone = lambda: jax.block_until_ready(compiled(kept, x))
        self.hash = lambda: digests.rows([x])


class Torchcache:
    """The decorator on a module, with one tier."""

    tiers = ("memory", "disk")

    def __init__(self, setting: Setting, inputs: Inputs, tier: str, folder: str) -> None:
        import torch
        from torchcache import torchcache

        pool = torch_pool(setting)
        where = {"persistent": True, "persistent_cache_dir": folder, "max_memory_cache_size": 0}
        cached = torchcache(**(where if tier == "disk" else {}))(pool)()
        alone, x = pool(), torch.from_numpy(inputs.x)
        hash_of = cached.cache_instance.hash_tensor
        self.call = lambda: cached(x)
        self.alone = lambda: alone(x)
        self.hash = lambda: hash_of(torch.cat([x.flatten(1)], dim=1))  # as its hook does


def torch_pool(setting: Setting) -> Any:
    import torch

    torch.set_num_threads(count_cores())
    torch.set_grad_enabled(False)

    class Pool(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.from_numpy(weights(setting)), requires_grad=False)

        def forward(self, x):
            return x.mean((2, 3)) @ self.w

    return Pool


class Joblib:
    """joblib.Memory on a function of the whole batch: another order of the items is another batch."""

    tiers = ("disk",)
    per_item = False

    def __init__(self, setting: Setting, inputs: Inputs, tier: str, folder: str) -> None:
        import joblib
        import torch

        pool, x = torch_pool(setting)(), inputs.x

        def features(batch):
            return pool(torch.from_numpy(batch)).numpy()

        def feature(item):
            return features(item[None])[0]

        cached = joblib.Memory(folder, verbose=0).cache(feature if self.per_item else features)
        self.alone = lambda: features(x)
        if self.per_item:
            self.call = lambda: np.stack([cached(item) for item in x])
            self.hash = lambda: [joblib.hash(item) for item in x]
        else:
            self.call = lambda: cached(x)
            self.hash = lambda: joblib.hash(x)


class JoblibItems(Joblib):
    per_item = True


class Diskcache:
    """diskcache.Cache, keyed by hand."""

    tiers = ("disk",)

    def __init__(self, setting: Setting, inputs: Inputs, tier: str, folder: str) -> None:
        import diskcache
        import torch

        pool, x = torch_pool(setting)(), inputs.x
        cache = diskcache.Cache(folder, eviction_policy="none")

        def keys():
            return [hashlib.blake2b(item, digest_size=16).digest() for item in x]

        def call():
            names = keys()
            found = [cache.get(name) for name in names]
            missing = [i for i, value in enumerate(found) if value is None]
            if missing:
                some = x if len(missing) == len(x) else x[missing]
                with cache.transact():
                    for i, row in zip(missing, pool(torch.from_numpy(some)).numpy(), strict=True):
                        found[i] = row.tobytes()
                        cache.set(names[i], found[i])
            return np.stack([np.frombuffer(value, np.float32) for value in found])

        self.call, self.hash = call, keys
        self.alone = lambda: pool(torch.from_numpy(x)).numpy()


CONTESTANTS = {
    "jaxkv": Jaxkv,
    "torchcache": Torchcache,
    "joblib, batch": Joblib,
    "joblib, items": JoblibItems,
    "diskcache": Diskcache,
}
