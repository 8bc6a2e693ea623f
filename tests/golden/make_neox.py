"""Writes neox.safetensors: a tiny random GPT-NeoX of Hugging Face transformers, and what it computes.

    pip install torch transformers
    python tests/golden/make_neox.py

It has the weights under their names there (numbers of bfloat16, so that the file is small), `tokens` [12], `logits`
[12, V] in float32 and `greedy` [100], how transformers' `generate` goes on. Seeds are tried until the best two logits
lie at least 1e-3 apart at every step.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

PATH = Path(__file__).parent / "neox.safetensors"
CONFIG = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "rotary_pct": 0.25,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
}
PROMPT, NEW, GAP = 12, 100, 1e-3


def make(seed: int) -> transformers.GPTNeoXForCausalLM:
    """Returns a model whose weights are bfloat16 numbers in float32, large enough to tell tokens apart."""
    torch.manual_seed(seed)
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**CONFIG)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 0.3 if name.endswith("weight") else 0.1
            drawn = torch.randn_like(weight) * scale + (1 if "norm.weight" in name else 0)
            weight.copy_(drawn.bfloat16().float())
    return model


@torch.no_grad()
def main() -> None:
    for seed in range(100):
        model = make(seed)
        tokens = torch.randint(0, CONFIG["vocab_size"], (1, PROMPT))
        greedy = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW, do_sample=False)
        best = model(greedy).logits[0, PROMPT - 1 : -1].topk(2).values
        if (best[:, 0] - best[:, 1]).min() > GAP and len(set(greedy[0, PROMPT:].tolist())) > 4:
            break
    weights = {name: weight.bfloat16() for name, weight in model.named_parameters()}
    facts = {"tokens": tokens[0].int(), "logits": model(tokens).logits[0], "greedy": greedy[0, PROMPT:].int()}
    save_file(weights | facts, PATH, metadata={"seed": str(seed), "transformers": transformers.__version__})
    print(f"{PATH.name}: seed {seed}, {PATH.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
