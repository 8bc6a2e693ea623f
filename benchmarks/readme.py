"""Writes the figures of README.md from docs/data/model.json, so that none is typed by hand.

    python benchmarks/readme.py            # after benchmarks/model.py --out docs/data/model.json
    python benchmarks/readme.py --check    # only says whether they are up to date

They are medians over the rounds of one run. The picture above them is drawn by benchmarks/decode.py.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import statistics
import textwrap
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
PARAGRAPH = re.compile(r"^On \w+ CPU cores,.*?\n\n", re.MULTILINE | re.DOTALL)
COUNTS = {1: "one", 2: "two", 4: "four", 8: "eight"}


def paragraph(data: dict[str, Any]) -> str:
    """Returns the paragraph of README.md that has figures, from the times that benchmarks/model.py measured."""
    contexts = sorted(data["decode_ms_per_token"], key=int)

    def times(name: str) -> str:
        """The fastest of those whose names begin so, at each context."""
        cells = (data["decode_ms_per_token"][context] for context in contexts)
        found = (min(statistics.median(ms) for key, ms in cell.items() if key.startswith(name)) for cell in cells)
        return " / ".join(f"{ms:.1f}" for ms in found)

    cores = data["device"]["cores"]
    lengths = " / ".join(f"{int(context):,}" for context in contexts)
    text = (
        f"On {COUNTS.get(cores, cores)} CPU cores, a {data['model']['parameters'] / 1e6:.0f} M Llama decodes in "
        f"{times('jaxkv')} ms per token at {lengths} tokens of context; llama.cpp takes {times('llama.cpp')}, "
        f"transformers on torch {times('transformers')} ([how we measured](docs/benchmarks.md))."
    )
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False) + "\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if README.md is out of date")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    old = readme.read_text("utf-8")
    [_] = PARAGRAPH.findall(old)
    new = PARAGRAPH.sub(paragraph(json.loads((ROOT / "docs/data/model.json").read_text("utf-8"))), old)
    if arguments.check and old != new:
        raise SystemExit("README.md is out of date; run: python benchmarks/readme.py")
    if not arguments.check:
        readme.write_text(new, "utf-8")


if __name__ == "__main__":
    main()
