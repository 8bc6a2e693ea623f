"""Inventories of other projects' documentation, so that the site links to JAX and Flax without a network.

Each text file here lists names, one a line, and says in its first line below which address their pages are. `conf.py`
packs them into the form that Sphinx reads. A new name is a new line; `tests/test_docs.py` says which one is missing.
"""

from __future__ import annotations

import zlib
from pathlib import Path

HERE = Path(__file__).parent
SHORT = {"jax.lax.": "lax.", "jax.numpy.": "jnp.", "flax.nnx.": "nnx.", "flax.linen.": "nn."}  # as code imports them


def read(path: Path) -> tuple[str, dict[str, tuple[str, str]]]:
    """Returns (address below which the pages are, name -> (kind, page)) of a text file."""
    first, *lines = path.read_text("utf-8").splitlines()
    found = {}
    for line in lines:
        name, kind, page = line.split()
        found[name] = (kind, page)
        for long, short in SHORT.items():
            if name.startswith(long):
                found[short + name.removeprefix(long)] = (kind, page)
    return first.split()[-1], found


def pack(project: str, names: dict[str, tuple[str, str]]) -> bytes:
    """Returns an inventory in Sphinx's format, version 2."""
    lines = "".join(f"{name} py:{kind} 1 {page} -\n" for name, (kind, page) in sorted(names.items()))
    head = f"# Sphinx inventory version 2\n# Project: {project}\n# Version: \n"
    head += "# The remainder of this file is compressed using zlib.\n"
    return head.encode() + zlib.compress(lines.encode())


def write(folder: Path) -> dict[str, tuple[str, str]]:
    """Writes each inventory, and returns what `intersphinx_mapping` needs: project -> (address, file)."""
    folder.mkdir(parents=True, exist_ok=True)
    mapping = {}
    for path in sorted(HERE.glob("*.txt")):
        address, names = read(path)
        target = folder / f"{path.stem}.inv"
        target.write_bytes(pack(path.stem, names))
        mapping[path.stem] = (address, str(target))
    return mapping
