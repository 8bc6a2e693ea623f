"""Loading a checkpoint: seconds and memory of jaxkv.models.load, next to reading the same bytes.

A random Llama 3.2 of 1.2 G parameters is stored in bfloat16 and in float32, and loaded as it is and into the other
type. Beside it:

- plain read: `np.fromfile` of every tensor and the same cast by NumPy, one after the other; nothing is turned round.
- transformers: `from_pretrained` on torch.

    python benchmarks/load.py                                # a table
    python benchmarks/load.py --out docs/data/load.json      # the same, kept

All read files that lie in the system's page cache, and take turns in one process; each starts from a model that was
let go. `--cold` drops the files from the page cache first (Linux), so that the disk is read. The peak memory of jaxkv's
loading is measured in a process of its own, against one that has done all but load.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pathlib
import statistics
import tempfile
import threading
import time
from typing import Any

import numpy as np
from common import about, in_turn, say, warn_if_busy

import jaxkv

SOURCE = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
}
TINY = {**SOURCE, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
CASES = (("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float32", "float32"), ("float32", "bfloat16"))


def load_jaxkv(folder: str, dtype: str) -> Any:
    import jax

    return jax.block_until_ready(jaxkv.models.load(folder, dtype=dtype).params)


def load_plain(folder: str, dtype: str) -> Any:
    file = jaxkv.safetensors.File(pathlib.Path(folder) / "model.safetensors")
    read = {}
    for name in file:
        kind, size = file.kind(name), int(np.prod(file.shape(name)))
        read[name] = np.fromfile(file.path, kind, size, offset=file.offset(name)).astype(dtype, copy=False)
    return read


def load_transformers(folder: str, dtype: str) -> Any:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))


LOADERS = {"jaxkv": load_jaxkv, "plain read": load_plain, "transformers": load_transformers}


def forget(folder: str) -> None:
    """Takes a folder's files out of the system's page cache."""
    for path in pathlib.Path(folder).iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Largest(threading.Thread):
    """Looks at this process's own memory every millisecond (Linux) and keeps the most it saw."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.running = 0, True
        self.start()

    def run(self) -> None:
        while self.running:
            resident, shared = map(int, pathlib.Path("/proc/self/statm").read_text().split()[1:3])
            self.most = max(self.most, (resident - shared) * os.sysconf("SC_PAGE_SIZE"))
            time.sleep(0.001)

    def stop(self) -> int:
        self.running = False
        self.join()
        return self.most


def peak(folder: str, dtype: str, really: bool, pipe: Any) -> None:
    import jax

    jax.block_until_ready(jax.jit(lambda x: x.astype(dtype))(np.ones(8, np.float32)))
    largest = Largest()
    if really:
        load_jaxkv(folder, dtype)
    pipe.send(largest.stop())


def peak_bytes(folder: str, dtype: str) -> int:
    """By how much loading raises the memory of a process; pages of the mapped file, which can be taken back, apart."""
    context = multiprocessing.get_context("spawn")
    results = []
    for really in (False, True):
        ours, theirs = context.Pipe()
        process = context.Process(target=peak, args=(folder, dtype, really, theirs))
        process.start()
        results.append(ours.recv())
        process.join()
    return results[1] - results[0]


def main(argv: list[str] | None = None) -> int:
    from flax import nnx

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, help="write the times as JSON")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default 5)")
    parser.add_argument("--cold", action="store_true", help="read from the disk each time")
    parser.add_argument("--quick", action="store_true", help="a tiny model: shows that the script runs")
    arguments = parser.parse_args(argv)
    facts = about(("jax", "jaxlib", "flax", "numpy", "ml_dtypes", "torch", "transformers"))
    loaders = dict(LOADERS)
    if "transformers" not in facts["versions"] or "torch" not in facts["versions"]:
        del loaders["transformers"]
        print("left out: transformers is not installed; pip install torch transformers")
    model = jaxkv.models.init(TINY if arguments.quick else SOURCE, dtype="bfloat16", rngs=nnx.Rngs(0))
    cases = []
    for stored, dtype in CASES:
        with tempfile.TemporaryDirectory() as folder:
            jaxkv.models.save(folder, model, dtype=stored)
            file = jaxkv.safetensors.File(pathlib.Path(folder) / "model.safetensors")
            count = sum(int(np.prod(file.shape(name))) for name in file)
            seconds: dict[str, list[float]] = {name: [] for name in loaders}
            for turn in range(-1, arguments.rounds):
                say(f"{stored} to {dtype}: round {turn + 1} of {arguments.rounds}")
                for name in in_turn(list(loaders), max(turn, 0)):
                    if arguments.cold:
                        forget(folder)
                    start = time.perf_counter()
                    loaders[name](folder, dtype)
                    if turn >= 0:
                        seconds[name].append(time.perf_counter() - start)
            size = count * (2 if dtype == "bfloat16" else 4)
            case = {"stored": stored, "loaded": dtype, "model_bytes": size, "seconds": seconds}
            cases.append(case | {"file_bytes": file.path.stat().st_size, "peak_bytes": peak_bytes(folder, dtype)})
    say("")
    print(f"{count / 1e6:.0f} M parameters; medians in seconds, ratio to the plain read")
    for case in cases:
        times = {name: statistics.median(values) for name, values in case["seconds"].items()}
        shown = "  ".join(f"{name} {t:.2f} ({t / times['plain read']:.2f}x)" for name, t in times.items())
        memory = f"peak {case['peak_bytes'] / 1e6:,.0f} MB for {case['model_bytes'] / 1e6:,.0f}"
        print(f"{case['stored']} to {case['loaded']}: {shown}; {memory}")
    warn_if_busy(facts)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        settings = {"cold": arguments.cold, "rounds": arguments.rounds}
        arguments.out.write_text(json.dumps({**facts, "settings": settings, "cases": cases}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
