"""Writes tied.safetensors: a PyTorch model with tied weights, by the safetensors package's `save_model`.

    pip install torch safetensors
    python tests/golden/make_tied.py

`save_model` writes each array once; its other names stand in the metadata alone. The numbers are 0, 1, 2, ...
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_model


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(2, 3, bias=False)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(4, 2)
        self.blocks = torch.nn.ModuleList([Block()] * 3)
        self.head = torch.nn.Linear(2, 4, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor([7]))


def main() -> None:
    model = Model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape))
    save_model(model, str(Path(__file__).with_name("tied.safetensors")), metadata={"format": "pt"})


if __name__ == "__main__":
    main()
