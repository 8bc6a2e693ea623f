"""Writes families/whisper/: a tiny random Whisper checkpoint, and what Hugging Face transformers computes from it.

    pip install torch transformers
    python tests/golden/make_whisper.py

The folder is a checkpoint as `save_pretrained` writes it (bfloat16), and expected.safetensors. Of each of two
recordings, i = 0 and 1, it holds, computed in float32,

- `features.i` [frames, num_mel_bins], `tokens.i` [T], and `logits.i` [T, V];
- `greedy.i` [64]: the best tokens, one after the other.

Whisper reads recordings of one length only. The second one is shorter: it is computed by the same weights in a model
that reads recordings of its length.

Seeds are tried, for minutes, until the best two logits lie at least 1e-3 apart at every step, and the text is not the
same few tokens. tests/test_whisper.py makes another setting (ODD) anew where transformers is installed.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

FOLDER = Path(__file__).parent / "families" / "whisper"
VOCAB, NEW, GAP = 96, 64, 1e-3
LENGTHS = ((40, 12), (26, 5))  # frames and tokens of the two

CONFIG: dict[str, Any] = {
    "vocab_size": VOCAB,
    "num_mel_bins": 8,
    "d_model": 24,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_layers": 3,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 40,
    "max_source_positions": 20,
    "max_target_positions": 80,
    "decoder_start_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "begin_suppress_tokens": None,
}
ODD = {
    **CONFIG,
    "num_mel_bins": 5,
    "d_model": 30,
    "encoder_attention_heads": 2,
    "encoder_layers": 1,
    "encoder_ffn_dim": 20,
    "decoder_attention_heads": 3,
    "decoder_layers": 2,
    "activation_function": "relu",
}


def build(config: dict[str, Any], seed: int) -> Any:
    """Returns a model of bfloat16 numbers in float32, large enough to tell tokens and recordings apart."""
    model = transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(**config, attn_implementation="eager")
    )
    model = model.float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "layer_norm" in name:
                parameter.copy_((1.0 if name.endswith("weight") else 0.0) + 0.2 * noise)
            elif "embed_tokens" in name:  # it scores too, and must not outweigh the layers
                parameter.copy_(0.3 * noise)
            elif "encoder.embed_positions" not in name:
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
                parameter.copy_(1.5 * fan_in**-0.5 * noise)
            parameter.copy_(parameter.bfloat16().float())
    return model


def for_frames(model: Any, frames: int) -> Any:
    """Returns the model with the same weights that reads recordings of so many frames."""
    config = copy.deepcopy(model.config)
    config.max_source_positions = frames // 2
    shorter = transformers.WhisperForConditionalGeneration(config).float().eval()
    state = model.state_dict()
    state["model.encoder.embed_positions.weight"] = state["model.encoder.embed_positions.weight"][: frames // 2]
    shorter.load_state_dict(state)
    return shorter


@torch.no_grad()
def expected(model: Any, seed: int, new: int = NEW) -> dict[str, torch.Tensor] | None:
    """Returns what is written into expected.safetensors; None if a greedy token is not clear, or all are the same."""
    generator = torch.Generator().manual_seed(1000 + seed)
    facts = {}
    for i, (frames, length) in enumerate(LENGTHS):
        features = torch.randn(frames, model.config.num_mel_bins, generator=generator)
        tokens = torch.randint(model.config.vocab_size, (length,), generator=generator)
        reader = for_frames(model, frames)
        encoded = reader.model.encoder(features.T[None])

        def logits(tokens: torch.Tensor, reader: Any = reader, encoded: Any = encoded) -> torch.Tensor:
            return reader(encoder_outputs=encoded, decoder_input_ids=tokens[None], use_cache=False).logits[0]

        text = tokens
        for _ in range(new):
            best = logits(text)[-1].topk(2)
            if best.values[0] - best.values[1] < GAP:
                return None
            text = torch.cat([text, best.indices[:1]])
        greedy = text[length:]
        if len(set(greedy.tolist())) < min(new, 8):
            return None
        facts |= {f"features.{i}": features, f"tokens.{i}": tokens.int(), f"logits.{i}": logits(tokens)}
        facts[f"greedy.{i}"] = greedy.int()
    return facts


def make(config: dict[str, Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    """Returns the model of the first seed whose texts are clear, and what is expected of it."""
    for seed in range(200):
        model = build(config, seed)
        if (facts := expected(model, seed)) is not None:
            return model, facts
    raise RuntimeError("no seed gave clear texts")


def write(folder: Path, model: Any, facts: dict[str, torch.Tensor]) -> None:
    """Writes a checkpoint in bfloat16 and expected.safetensors."""
    shutil.rmtree(folder, ignore_errors=True)
    model.bfloat16().save_pretrained(folder)
    save_file({name: fact.contiguous() for name, fact in facts.items()}, folder / "expected.safetensors")


if __name__ == "__main__":
    made, of_it = make(CONFIG)
    write(FOLDER, made, of_it)
    print(f"{sum(path.stat().st_size for path in FOLDER.iterdir()):,} bytes")
    print([len(set(of_it[f"greedy.{i}"].tolist())) for i in range(2)])
