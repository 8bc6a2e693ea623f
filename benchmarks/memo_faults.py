"""Whose answers are wrong, shown by running: torchcache 0.6 and jaxkv.Memo are asked the same. Run by memo.py --faults.

Each case calls a frozen function through the cache, first with something else, then with what is asked, and holds the
answer against the function's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from common import say
from flax import nnx

import jaxkv

CASES: dict[str, Callable[[Side], str]] = {}


def case(said: str) -> Callable[[Callable[[Side], str]], Any]:
    def register(function: Callable[[Side], str]) -> Any:
        CASES[said] = function
        return function

    return register


@dataclasses.dataclass
class Side:
    """One of the two caches.

    Attributes:
      xp: jax.numpy or torch: the cases say their functions once, in what both have.
      array: makes an array of it from NumPy's.
      cache: (function(weights, ...), weights, options) -> the cached function, and one that loads other weights.
      images: how many random ones.
    """

    xp: Any
    array: Callable[[np.ndarray], Any]
    cache: Callable[..., tuple[Callable[..., Any], Callable[[np.ndarray], None]]]
    images: int


def jaxkv_side(images: int) -> Side:
    def cache(function: Any, weights: np.ndarray, *, disk: Any = None, dtype: Any = None) -> Any:
        memo = jaxkv.Memo(memory=None if disk else "64MiB", disk=disk)
        options = {"output_dtype": dtype}
        held = [memo.wrap(function, jnp.asarray(weights), **options)]

        def load(weights: np.ndarray) -> None:
            held[0] = memo.wrap(function, jnp.asarray(weights), **options)

        return (lambda *args, **kwargs: held[0](*args, **kwargs)), load

    return Side(jnp, lambda x: x, cache, images)


def torchcache_side(images: int) -> Side:
    import torch
    from torchcache import torchcache

    torch.set_grad_enabled(False)

    def cache(function: Any, weights: np.ndarray, *, disk: Any = None, dtype: Any = None) -> Any:
        class Frozen(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weights = torch.nn.Parameter(torch.tensor(weights), requires_grad=False)

            def forward(self, *args: Any, **kwargs: Any) -> Any:
                return function(self.weights, *args, **kwargs)

        where = {"persistent": True, "persistent_cache_dir": disk, "max_memory_cache_size": 0} if disk else {}
        module = torchcache(**where, cache_dtype=getattr(torch, dtype) if dtype else None)(Frozen)()
        return module, lambda weights: module.load_state_dict({"weights": torch.tensor(weights)})

    return Side(torch, torch.from_numpy, cache, images)


RNG = np.random.default_rng(0)
WEIGHTS = RNG.standard_normal((3, 4)).astype(np.float32)


def project(weights: Any, x: Any) -> Any:
    """Features of pictures: the mean of each channel, times weights."""
    return x.mean((2, 3)) @ weights


def verdict(got: Any, right: Any) -> str:
    got, right = np.asarray(got, np.float64), np.asarray(right, np.float64)
    if got.shape != right.shape:
        return f"WRONG: shape {got.shape}, not {right.shape}"
    if np.allclose(got, right, rtol=1e-3, atol=1e-6 * np.abs(right).max()):
        return "right"
    worst = np.argmax(np.abs(got - right))
    return f"WRONG: {got.flat[worst]:.4g}, not {right.flat[worst]:.4g}"


def pictures(count: int, size: int, rng: np.random.Generator = RNG) -> np.ndarray:
    return rng.standard_normal((count, 3, size, size), np.float32)


@case("a picture that differs between the samples")
def between(side: Side) -> str:
    first = pictures(1, 224)
    second = first.copy()
    second.reshape(-1)[np.arange(second.size) % 15 != 0] += 1
    cached, _ = side.cache(project, WEIGHTS)
    cached(side.array(first))
    return verdict(cached(side.array(second)), project(WEIGHTS, second))


@case("random pictures of 32 x 32")
def many(side: Side) -> str:
    cached, _ = side.cache(project, WEIGHTS)
    rng, wrong = np.random.default_rng(1), 0
    for _ in range(side.images // 1000):
        some = pictures(1000, 32, rng)
        got = np.asarray(cached(side.array(some)))
        wrong += int((np.abs(got - project(WEIGHTS, some)).max(1) > 1e-3).sum())
    return f"WRONG: {wrong:,} of {side.images:,}" if wrong else f"right, all {side.images:,}"


@case("small numbers (1e-5)")
def small(side: Side) -> str:
    first, second = np.float32(1e-5) * pictures(2, 8)[:, None]
    cached, _ = side.cache(project, WEIGHTS)
    cached(side.array(first))
    return verdict(cached(side.array(second)), project(WEIGHTS, second))


@case("another shape, the same numbers")
def shape(side: Side) -> str:
    def first_row(weights: Any, x: Any) -> Any:
        return x[:, 0]

    x = RNG.integers(0, 9, (1, 4, 4)).astype(np.float32)
    cached, _ = side.cache(first_row, WEIGHTS)
    cached(side.array(x))
    return verdict(cached(side.array(x.reshape(1, 2, 8))), x.reshape(1, 2, 8)[:, 0])


@case("another dtype, the same numbers")
def dtype(side: Side) -> str:
    def twice(weights: Any, x: Any) -> Any:
        return x + x

    x = np.array([[200, 1]])
    cached, _ = side.cache(twice, WEIGHTS)
    cached(side.array(x.astype(np.uint8)))
    return verdict(cached(side.array(x.astype(np.int32))), 2 * x)


@case("whole numbers in, fractions out, asked again")
def integers(side: Side) -> str:
    def third(weights: Any, x: Any) -> Any:
        return x / 3

    x = np.array([[1, 2]], np.int32)
    cached, _ = side.cache(third, WEIGHTS)
    cached(side.array(x))
    return verdict(cached(side.array(x)), x / 3)


@case("other weights loaded")
def loaded(side: Side) -> str:
    x = pictures(1, 8)
    cached, load = side.cache(project, WEIGHTS)
    cached(side.array(x))
    load(2 * WEIGHTS)
    return verdict(cached(side.array(x)), project(2 * WEIGHTS, x))


@case("scale=2, shift=3 and then scale=3, shift=2")
def scalars(side: Side) -> str:
    def affine(weights: Any, x: Any, scale: int, shift: int) -> Any:
        return x * scale + shift

    x = np.full((1, 2), 4, np.float32)
    cached, _ = side.cache(affine, WEIGHTS)
    cached(side.array(x), scale=2, shift=3)
    return verdict(cached(side.array(x), scale=3, shift=2), 3 * x + 2)


@case("left=x, right=y and then right=x, left=y")
def named(side: Side) -> str:
    def minus(weights: Any, left: Any, right: Any) -> Any:
        return left - right

    x, y = RNG.integers(0, 9, (2, 1, 5)).astype(np.float32)
    cached, _ = side.cache(minus, WEIGHTS)
    cached(left=side.array(x), right=side.array(y))
    return verdict(cached(right=side.array(x), left=side.array(y)), y - x)


@case("training mode, then evaluation mode")
def mode(side: Side) -> str:
    x = np.ones((1, 4), np.float32)
    if side.xp is jnp:

        class Doubling(nnx.Module):
            def __init__(self) -> None:
                self.deterministic = False

            def __call__(self, x: Any) -> Any:
                return x if self.deterministic else 2 * x

        module = Doubling()
        cached = jaxkv.Memo(memory="1MiB").wrap(module)
    else:

        def doubling(weights: Any, x: Any) -> Any:
            return 2 * x if module.training else x

        cached, _ = side.cache(doubling, WEIGHTS)
        module = cached
    cached(side.array(x))
    module.eval()
    return verdict(cached(side.array(x)), x)


@case("an answer kept while the next is asked")
def kept(side: Side) -> str:
    batches = [side.array(x) for x in pictures(2, 8)[:, None]]
    cached, _ = side.cache(project, WEIGHTS)
    for x in batches:
        cached(x)
    first = cached(batches[0])
    cached(batches[1])
    return verdict(first, project(WEIGHTS, np.asarray(batches[0])))


@case("kept as bfloat16: computed against found")
def cast(side: Side) -> str:
    x = side.array(pictures(1, 8))
    cached, _ = side.cache(project, WEIGHTS, dtype="bfloat16")
    computed, found = (np.asarray(side.xp.asarray(cached(x), dtype=side.xp.float32)).copy() for _ in range(2))
    return "the same" if np.array_equal(computed, found) else f"DIFFERENT: {computed.flat[0]:.6g}, {found.flat[0]:.6g}"


@case("8 threads with batches of their own")
def threads(side: Side) -> str:
    batches = pictures(8, 16)[:, None]
    cached, _ = side.cache(project, WEIGHTS)
    for x in batches:
        cached(side.array(x))
    wrong = [0] * len(batches)

    def ask(number: int) -> None:
        for _ in range(250):
            try:
                got = np.array(cached(side.array(batches[number])))
                wrong[number] += verdict(got, project(WEIGHTS, batches[number])) != "right"
            except Exception:  # noqa: BLE001 an answer that doesn't come is counted as well
                wrong[number] += 1

    workers = [threading.Thread(target=ask, args=(number,)) for number in range(len(batches))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return f"WRONG: {sum(wrong):,} of 2,000" if sum(wrong) else "right, all 2,000"


@case("a file of the store that was cut short")
def cut(side: Side) -> str:
    x = pictures(1, 8)
    with tempfile.TemporaryDirectory() as folder:
        cached, _ = side.cache(project, WEIGHTS, disk=folder)
        cached(side.array(x))
        for path in pathlib.Path(folder).rglob("*"):
            if path.suffix in (".br", ".db"):
                with path.open("r+b") as file:
                    file.truncate(path.stat().st_size - 8)
        try:
            return verdict(cached(side.array(x)), project(WEIGHTS, x))
        except Exception as error:  # noqa: BLE001 whatever comes is the finding
            return f"RAISES {type(error).__name__}"


def main(*, quick: bool) -> int:
    """Prints the table; returns 1 if jaxkv is wrong anywhere."""
    images = 2000 if quick else 50_000
    sides = {"jaxkv": jaxkv_side(images)}
    with contextlib.suppress(ModuleNotFoundError):
        sides = {"torchcache": torchcache_side(images)} | sides
    if "torchcache" not in sides:
        print("left out: torchcache: it is not installed")
    wide = max(map(len, CASES)) + 2
    print(f"{'':{wide}}" + "".join(f"{name:34}" for name in sides))
    failed = False
    for said, run in CASES.items():
        say(said)
        answers = {name: run(side) for name, side in sides.items()}
        failed |= not answers["jaxkv"].startswith(("right", "the same"))
        print(f"{said:{wide}}" + "".join(f"{answer:34}" for answer in answers.values()))
    return int(failed)
