"""`jaxkv doctor`: what runs here, and what is wrong with it."""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import platform
from collections import Counter

import jax

from jaxkv import __version__
from jaxkv.cli.terminal import write
from jaxkv.native import library
from jaxkv.nn.explain import wrong_sum
from jaxkv.nn.product import MOST_TOKENS


def run(args: argparse.Namespace) -> int:
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "flax", "numpy"))
    devices = Counter(device.device_kind for device in jax.devices())
    facts = {
        "versions": f"jaxkv {__version__}, {packages}, Python {platform.python_version()}",
        "devices": ", ".join(f"{count} x {kind}" for kind, count in devices.items()),
        "attention": _attention(),
        "products": _products(),
        "sums": _sums(),
    }
    for name, fact in facts.items():
        write(f"{name:<12} {fact}\n")
    return 0


def _attention() -> str:
    if jax.default_backend() != "cpu":
        return f"as XLA compiles it for {jax.default_backend()}; the native kernel is for CPUs"
    reason = library.problem()
    passed = f"; the library of {library.WHEEL} is left alone: {why}" if (why := library.wheel_problem()) else ""
    if reason:
        return f"as XLA compiles it, without the native kernel: {reason}{passed}"
    return f"the native kernel with {library.instruction_set()} instructions, {library.origin()}{passed}"


def _products() -> str:
    if jax.default_backend() != "cpu" or library.problem():
        return "as XLA compiles them"
    tokens = f"2 to {MOST_TOKENS} tokens (1 too in bfloat16 and float16)"
    return f"of {tokens} with a matrix: the native library; others as XLA compiles them"


def _sums() -> str:
    error = wrong_sum()
    if error is None:
        return "right: this jaxlib's CPU backend computes a known sum as it should"
    off = f"{error:.0e} times the largest number" if math.isfinite(error) else "more than any number"
    return (
        f"wrong: this jaxlib's CPU backend is off by {off} in (matmul(x, broadcast(c)) * x).sum(-1); "
        "jaxkv does not use it. Take another jaxlib, or XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type= (slower)"
    )
