"""Writes fp8/: a tiny random DeepSeek-V3 in FP8 by blocks, as it is published, and what transformers computes from it.

    pip install torch transformers accelerate
    python tests/golden/make_fp8.py

The blocks are of 4 x 8, so that each weight has several, and divide all weights: transformers' `dequantize=True` takes
other blocks than the file's where they don't.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import make_families
import torch
import transformers
from safetensors.torch import load_file, save_file

FOLDER = Path(__file__).parent / "fp8"
BLOCK = (4, 8)
CONFIG = {**make_families.CASES["deepseek_v3"][1], "q_lora_rank": 16}
QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": list(BLOCK),
}


def scaled(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the numbers of a weight in FP8 and the scales of its blocks."""
    rows, columns = x.shape
    blocks = x.reshape(rows // BLOCK[0], BLOCK[0], columns // BLOCK[1], BLOCK[1])
    scales = blocks.abs().amax((1, 3)) / 448
    return (blocks / scales[:, None, :, None]).reshape(x.shape).to(torch.float8_e4m3fn), scales


def write() -> None:
    model = make_families.build("deepseek_v3", CONFIG, seed=0)
    make_families.write(FOLDER, model, {"tokens": torch.zeros(1)})
    path = FOLDER / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": QUANTIZATION}, indent=2) + "\n")
    tensors = {}
    for name, tensor in load_file(FOLDER / "model.safetensors").items():
        if name.endswith(("_proj.weight", "_proj_with_mqa.weight")):
            tensors[name], tensors[f"{name}_scale_inv"] = scaled(tensor.float())
        else:
            tensors[name] = tensor
    save_file(tensors, FOLDER / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    write()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        FOLDER,
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=transformers.FineGrainedFP8Config(dequantize=True, weight_block_size=BLOCK),
    ).eval()
    tokens = torch.randint(make_families.VOCAB, (1, make_families.PROMPT), generator=torch.Generator().manual_seed(0))
    facts = {"tokens": tokens[0].int(), "logits": model(tokens).logits[0].float()}
    save_file({name: fact.contiguous() for name, fact in facts.items()}, FOLDER / "expected.safetensors")
    print(f"{sum(path.stat().st_size for path in FOLDER.iterdir()):,} bytes")


if __name__ == "__main__":
    main()
