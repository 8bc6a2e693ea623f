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
from jaxkv.nn.native import MOST_QUERIES
from jaxkv.nn.product import MOST_TOKENS


def run(args: argparse.Namespace) -> int:
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "flax", "numpy"))
    devices = Counter(device.device_kind for device in jax.devices())
    facts = {
        "versions": f"jaxkv {__version__}, {packages}, Python {platform.python_version()}",
        "devices": ", ".join(f"{count} x {kind}" for kind, count in devices.items()),
        "native": _native(),
        **_parts(),
        "sums": _sums(),
    }
    for name, fact in facts.items():
        write(f"{name:<12} {fact}\n")
    return 0


def _native() -> str:
    if jax.default_backend() != "cpu":
        return f"not used: the native library is for CPUs, and here the default is {jax.default_backend()}"
    reason = library.problem()
    passed = f"; the library of {library.WHEEL} is left alone: {why}" if (why := library.wheel_problem()) else ""
    if reason:
        return f"not there: {reason}{passed}"
    return f"a library with {library.instruction_set()} instructions, {library.origin()}{passed}"


def _parts() -> dict[str, str]:
    """What the native library computes here, by what it is part of; the library has tested each part."""
    parts = {
        "attention": f"native for up to {MOST_QUERIES} tokens of a row at a time; as XLA compiles it for more",
        "products": f"native for 2 to {MOST_TOKENS} tokens (1 too in 16 bits); as XLA compiles it for others",
        "experts": "native, in one call for all tokens of a block; as XLA compiles it for small matrices",
        "rows": "native where take and copy_prefix move them, on one CPU device",
        "memories": "native: those of gated delta and Mamba-2 layers, on one CPU device",
    }
    there = jax.default_backend() == "cpu" and library.problem() is None
    return parts if there else dict.fromkeys(parts, "as XLA compiles it")


def _sums() -> str:
    error = wrong_sum()
    if error is None:
        return "right: this jaxlib's CPU backend computes a known sum as it should"
    off = f"{error:.0e} times the largest number" if math.isfinite(error) else "more than any number"
    return (
        f"wrong: this jaxlib's CPU backend is off by {off} in (matmul(x, broadcast(c)) * x).sum(-1); "
        "jaxkv does not use it. Take another jaxlib, or XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type= (slower)"
    )
