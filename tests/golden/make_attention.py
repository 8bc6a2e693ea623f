"""Writes attention.safetensors: attentions of PyTorch and transformers, and what they compute.

    pip install torch transformers
    python tests/golden/make_attention.py

Of each kind: its weights under their own names, `x` [2, 5, 8] and `y` [2, 5, 8] under a causal mask, float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GPT2Config, LlamaConfig, Phi3Config, Qwen3Config
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

WIDTH, HEADS, LENGTH = 8, 4, 5
MASK = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)


def config(kind: Any, **fields: Any) -> Any:
    made = kind(hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=2, pad_token_id=0, **fields)
    made._attn_implementation = "eager"
    return made


def main() -> None:
    torch.manual_seed(0)
    gpt2 = GPT2Config(n_embd=WIDTH, n_head=HEADS)
    gpt2._attn_implementation = "eager"
    rotated = {
        "llama": (LlamaAttention, config(LlamaConfig, head_dim=4)),
        "qwen3": (Qwen3Attention, config(Qwen3Config, head_dim=4)),
        "phi3": (Phi3Attention, config(Phi3Config)),
    }
    modules = {
        "torch": torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True),
        "gpt2": GPT2Attention(gpt2, layer_idx=0),
        **{name: kind(made, layer_idx=0) for name, (kind, made) in rotated.items()},
    }
    tensors = {}
    for name, module in modules.items():
        module.eval()
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
        x = torch.randn(2, LENGTH, WIDTH)
        with torch.no_grad():
            if name == "torch":
                y, _ = module(x, x, x, attn_mask=MASK)
            elif name == "gpt2":
                y = module(x, attention_mask=MASK[None, None])[0]
            else:
                positions = torch.arange(LENGTH)[None]
                rotary = LlamaRotaryEmbedding(rotated[name][1])(x, positions)
                y = module(x, position_embeddings=rotary, attention_mask=MASK[None, None])[0]
        for key, tensor in {**module.state_dict(), "x": x, "y": y}.items():
            tensors[f"{name}/{key}"] = tensor.contiguous()
    save_file(tensors, Path(__file__).parent / "attention.safetensors")


if __name__ == "__main__":
    main()
