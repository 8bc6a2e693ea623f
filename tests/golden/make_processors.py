"""Writes processors.json: what the logits processors of Hugging Face transformers make of some logits.

    pip install torch transformers
    python tests/golden/make_processors.py

`logits` [V] are the same for all cases. Each case is the `config` of a generation_config.json and its `rows`, each
[tokens, prompt length, limit, logits after the processors that `generate` would make of the config], None for -inf.
`whisper` is the same for whole texts: a config, and the greedy tokens of families/whisper for its first recording.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

V, PROMPT, LIMIT = 16, 4, 10
SAMPLED = {"do_sample": True, "top_k": 0}  # without it transformers takes 50
STOPS = {"eos_token_id": [2, 7]}
CONFIGS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3},
    {"bad_words_ids": [[3], [2], [4, 5], [1, 4, 6]], **STOPS},
    {"sequence_bias": [[[3], -1.5], [[4, 5], 2.5], [[1, 4, 5], -0.5], [[9, 9, 9, 9, 9, 9, 1], 1.0]]},
    {"min_length": 6, **STOPS},
    {"min_new_tokens": 3, **STOPS},
    {"min_new_tokens": 3},
    {"suppress_tokens": [1, 5, 8]},
    {"begin_suppress_tokens": [0, 6], "suppress_tokens": [6, 9]},
    {"forced_bos_token_id": 5, "begin_suppress_tokens": [0, 6], "suppress_tokens": [4]},
    {"forced_eos_token_id": 2, **STOPS},
    {"forced_eos_token_id": [2, 3], "suppress_tokens": [3]},
    {**SAMPLED, "temperature": 0.6, "top_k": 5, "top_p": 0.8, "min_p": 0.1},
    {
        **SAMPLED,
        **STOPS,
        "temperature": 1.7,
        "top_k": 9,
        "top_p": 0.95,
        "repetition_penalty": 1.4,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[4, 6]],
        "sequence_bias": [[[4], 1.25]],
        "min_new_tokens": 2,
        "suppress_tokens": [11],
        "begin_suppress_tokens": [10],
    },
]
WHISPER: list[dict[str, Any]] = [
    {"suppress_tokens": [38, 63], "begin_suppress_tokens": [37, 71], "forced_eos_token_id": 7},
    {"forced_bos_token_id": 11, "no_repeat_ngram_size": 2, "repetition_penalty": 1.2},
]
NEW = 24
TEXTS = [[1, 4, 5, 4], [1, 4, 5, 4, 5, 1, 4], [9, 9, 1, 1, 4], [3], [4, 5, 4, 5, 1, 4, 5, 1, 4]]


def main() -> None:
    torch.manual_seed(0)
    logits = (torch.randn(V) * 2).tolist()
    logits = [round(x, 3) for x in logits]
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = transformers.LlamaForCausalLM(config)
    cases = []
    for given in CONFIGS:
        rows = []
        for text in TEXTS:
            prompt_length = min(PROMPT, len(text))
            generation = transformers.GenerationConfig(**given, max_length=LIMIT, pad_token_id=0)
            model._prepare_special_tokens(generation, device="cpu")
            made = model._get_logits_processor(generation, input_ids_seq_length=prompt_length, device="cpu")
            out = made(torch.tensor([text]), torch.tensor([logits]))[0].tolist()
            rows.append([text, prompt_length, LIMIT, [None if x == float("-inf") else round(x, 6) for x in out]])
        cases.append({"config": given, "rows": rows})
    folder = Path(__file__).parent / "families" / "whisper"
    whisper = transformers.WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    features = load_file(folder / "expected.safetensors")["features.0"].T[None]
    texts = []
    for given in WHISPER:
        generation = transformers.GenerationConfig(
            **given, max_new_tokens=NEW, pad_token_id=0, decoder_start_token_id=1
        )
        generate = transformers.GenerationMixin.generate  # Whisper's own cuts recordings of half a minute
        tokens = generate(whisper, features, generation_config=generation, do_sample=False)[0].tolist()
        texts.append({"config": given, "tokens": tokens[1:]})
    target = Path(__file__).parent / "processors.json"
    lines = ",\n".join(json.dumps(case) for case in cases)
    target.write_text(f'{{"logits": {json.dumps(logits)},\n"cases": [\n{lines}\n],\n"whisper": {json.dumps(texts)}}}\n')
    print(f"{target}: transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
