"""Writes rotary.json: what Hugging Face transformers computes, for tests/test_rotary.py.

    pip install torch transformers
    python tests/golden/make_rotary.py

Each case holds the arguments of jaxkv's Rotary, transformers' frequencies and attention factor, and q after rotation.
Half-split cases run Phi's modules (the ones with a partial dimension), interleaved ones GPT-J's.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import transformers
from transformers.models.gptj import modeling_gptj
from transformers.models.phi import modeling_phi

POSITIONS = [0, 1, 30, 101]
HEADS = 1

# name -> (head_dim, arguments of Rotary, rope_parameters of transformers)
CASES = {
    "default": (16, {"theta": 10_000.0}, {"rope_type": "default"}),
    "theta of Gemma 3": (16, {"theta": 1_000_000.0}, {"rope_type": "default"}),
    "partial": (20, {"theta": 10_000.0, "dim": 8}, {"rope_type": "default", "partial_rotary_factor": 0.4}),
    "linear": (
        16,
        {"theta": 10_000.0, "scaling": {"LinearScaling": {"factor": 8.0}}},
        {"rope_type": "linear", "factor": 8.0},
    ),
    "llama 3.1": (
        128,
        {"theta": 500_000.0, "scaling": {"Llama3Scaling": {}}},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "llama 3.2": (
        64,
        {"theta": 500_000.0, "scaling": {"Llama3Scaling": {"factor": 32.0}}},
        {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "yarn": (
        64,
        {"theta": 10_000.0, "scaling": {"YarnScaling": {"factor": 16.0, "original_length": 4096}}},
        {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096},
    ),
    "yarn, partial": (
        64,
        {"theta": 10_000.0, "dim": 32, "scaling": {"YarnScaling": {"factor": 4.0, "original_length": 2048}}},
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 2048,
            "partial_rotary_factor": 0.5,
        },
    ),
    "yarn of gpt-oss": (
        64,
        {
            "theta": 150_000.0,
            "scaling": {"YarnScaling": {"factor": 32.0, "original_length": 4096, "truncate": False}},
        },
        {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
    ),
    "yarn of DeepSeek": (
        64,
        {
            "theta": 10_000.0,
            "scaling": {"YarnScaling": {"factor": 40.0, "original_length": 4096, "mscale": 1.0, "mscale_all_dim": 0.5}},
        },
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
        },
    ),
    "yarn, own factors": (
        32,
        {
            "theta": 10_000.0,
            "scaling": {
                "YarnScaling": {
                    "factor": 4.0,
                    "original_length": 1024,
                    "beta_fast": 16.0,
                    "beta_slow": 2.0,
                    "attention_factor": 1.5,
                }
            },
        },
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 1024,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "attention_factor": 1.5,
        },
    ),
    "interleaved": (16, {"theta": 10_000.0, "interleaved": True}, None),
    "interleaved, partial": (16, {"theta": 10_000.0, "dim": 8, "interleaved": True}, None),
}


def half_split(head_dim: int, theta: float, parameters: dict, x: torch.Tensor) -> tuple:
    """Returns (frequencies, attention factor, x rotated)."""
    config = transformers.PhiConfig(
        hidden_size=head_dim * HEADS,
        num_attention_heads=HEADS,
        max_position_embeddings=131_072,
        rope_parameters={"rope_theta": theta, "partial_rotary_factor": 1.0, **parameters},
    )
    module = modeling_phi.PhiRotaryEmbedding(config)
    cos, sin = module(x, torch.tensor([POSITIONS]))
    dim = cos.shape[-1]
    turned, _ = modeling_phi.apply_rotary_pos_emb(x[..., :dim], x[..., :dim], cos, sin, unsqueeze_dim=2)
    return module.inv_freq, float(module.attention_scaling), torch.cat([turned, x[..., dim:]], dim=-1)


def interleaved(dim: int, x: torch.Tensor) -> tuple:
    """Returns the same for GPT-J, whose theta is 10,000."""
    table = modeling_gptj.create_sinusoidal_positions(max(POSITIONS) + 1, dim)[POSITIONS][None]
    sin, cos = table.chunk(2, dim=-1)
    turned = modeling_gptj.apply_rotary_pos_emb(x[..., :dim], sin, cos)
    frequencies = 1.0 / (10_000 ** (torch.arange(0, dim, 2) / dim))
    return frequencies, 1.0, torch.cat([turned, x[..., dim:]], dim=-1)


def main() -> None:
    cases = []
    for name, (head_dim, arguments, parameters) in CASES.items():
        shape = (1, len(POSITIONS), HEADS, head_dim)
        x = ((torch.arange(math.prod(shape)) * 37 % 101 - 50) / 32).reshape(shape)  # the test makes the same
        if parameters is None:
            frequencies, factor, y = interleaved(arguments.get("dim", head_dim), x)
        else:
            frequencies, factor, y = half_split(head_dim, arguments["theta"], parameters, x)
        cases.append(
            {
                "name": name,
                "rotary": arguments,
                "attention_factor": factor,
                "frequencies": [float(f"{f:.7g}") for f in frequencies.tolist()],
                "shape": shape,
                "rotated": [round(v, 5) for v in y.flatten().tolist()],
            }
        )
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    lines = ",\n".join(json.dumps(case) for case in cases)
    head = json.dumps({"made_by": "tests/golden/make_rotary.py", "versions": versions, "positions": POSITIONS})
    Path(__file__).with_name("rotary.json").write_text(head[:-1] + ', "cases": [\n' + lines + "\n]}\n")


if __name__ == "__main__":
    main()
