"""Writes mxfp4/: a tiny random gpt-oss whose experts are in MXFP4, and what transformers computes from it.

    pip install torch transformers accelerate
    python tests/golden/make_mxfp4.py

The layout is that of openai/gpt-oss-20b: "..._blocks" and "..._scales" in uint8 beside tensors in bfloat16, in two
files, with the blocks of a tensor in one of them and its scales in the other. Scales go down to 2**-127.
expected.safetensors has
what transformers makes of it in float32: `tokens` [24], `logits` [24, V], and of the first expert `unpacked`, bfloat16
[D, 2 I].
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import make_families
import torch
import transformers
from safetensors.torch import save_file

FOLDER = Path(__file__).parent / "mxfp4"
CONFIG = {
    **make_families.GPT_OSS,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_local_experts": 3,
    "tie_word_embeddings": True,
}
QUANTIZATION = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
NUMBERS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def pack(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the blocks [E, N, D / 32, 16] and the scales [E, N, D / 32] of a tensor [E, D, N]."""
    x = x.transpose(1, 2)
    x = x.reshape(*x.shape[:2], -1, 32).contiguous()
    exponents = (x.abs().amax(-1).log2().floor() - 2).clamp(-127, 127)
    x = x / 2 ** exponents[..., None]
    codes = (x.abs()[..., None] - NUMBERS).abs().argmin(-1) + 8 * (x < 0)
    return (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8), (exponents + 127).to(torch.uint8)


def write() -> None:
    model = make_families.build("gpt_oss", CONFIG, seed=0)
    with torch.no_grad():
        experts = model.model.layers[0].mlp.experts
        experts.gate_up_proj[0, :32, :8] *= 2.0**-100
        experts.down_proj[1, :, :4] = 0
    model.config.dtype = torch.bfloat16
    model.config.save_pretrained(FOLDER)
    path = FOLDER / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": QUANTIZATION}, indent=2) + "\n")
    files: list[dict[str, torch.Tensor]] = [{}, {}]
    for name, tensor in model.state_dict().items():
        if name.endswith(("gate_up_proj", "down_proj")):
            files[0][f"{name}_blocks"], files[1][f"{name}_scales"] = pack(tensor)
        elif name != "lm_head.weight":  # which is tied
            files["layers.1" in name][name] = tensor.bfloat16().contiguous()
    weight_map = {}
    for i, tensors in enumerate(files, 1):
        file = f"model-{i:05}-of-00002.safetensors"
        save_file(tensors, FOLDER / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (FOLDER / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1) + "\n"
    )


@torch.no_grad()
def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    write()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        FOLDER, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = torch.randint(make_families.VOCAB, (1, make_families.PROMPT), generator=torch.Generator().manual_seed(0))
    facts = {
        "tokens": tokens[0].int(),
        "logits": model(tokens).logits[0],
        "unpacked": model.model.layers[0].mlp.experts.gate_up_proj[0].bfloat16(),
    }
    save_file({name: fact.contiguous() for name, fact in facts.items()}, FOLDER / "expected.safetensors")
    print(f"{sum(path.stat().st_size for path in FOLDER.iterdir()):,} bytes")


if __name__ == "__main__":
    main()
