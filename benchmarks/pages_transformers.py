"""transformers' samples, beams and prompt lookup, for benchmarks/pages.py: on torch, in a process of their own."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import multiprocessing
import time
from typing import Any

_model: Any = None


class Peer:
    """transformers' `generate` on a checkpoint; `None` where it is not installed: `Peer.there()`."""

    def __init__(self, folder: str, threads: int):
        context = multiprocessing.get_context("spawn")
        self.pool = concurrent.futures.ProcessPoolExecutor(
            1, mp_context=context, initializer=_load, initargs=(folder, threads)
        )

    @staticmethod
    def there() -> bool:
        return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))

    def __call__(self, prompt: Any, new: int, script: Any = None, **options: Any) -> tuple[float, list[list[int]]]:
        """Returns the seconds and the new tokens of each text; `script`: what the model is made to write."""
        return self.pool.submit(_generate, list(map(int, prompt)), new, script, options).result()

    def close(self) -> None:
        self.pool.shutdown()


def _load(folder: str, threads: int) -> None:
    global _model
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    _model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    _model.eval()


def _generate(prompt: list[int], new: int, script: Any, options: dict[str, Any]) -> tuple[float, list[list[int]]]:
    import torch
    import transformers

    def dictate(held: Any, scores: Any) -> Any:
        return scores.index_fill(1, torch.tensor([script[min(held.shape[1], len(script) - 1)]]), 1e4)

    if script is not None:
        options = {**options, "logits_processor": transformers.LogitsProcessorList([_Rule(dictate)])}
    tokens = torch.tensor([prompt])
    begin = time.perf_counter()
    with torch.inference_mode():
        out = _model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, min_new_tokens=new, **options
        )
    return time.perf_counter() - begin, out[:, len(prompt) :].tolist()


class _Rule:
    """A logits processor that calls a function."""

    def __init__(self, function: Any):
        self.function = function

    def __call__(self, held: Any, scores: Any) -> Any:
        return self.function(held, scores)
