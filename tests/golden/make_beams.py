"""Writes beams.json: what the beam search of Hugging Face transformers finds with checkpoints of families/.

    pip install torch transformers
    python tests/golden/make_beams.py

For each family the `prompts`, and `cases`: the `config` that `generate` got, which prompts, and what it `found` for
each: `texts` (new tokens, up to a stop token) and their `scores`, best first. Prompts of several lengths are padded on
the left, all in one batch. A case with rules about what a text holds goes by itself, since those rules count the
padding in, and for one family only.

Only what is the same in float32 and float64 is kept, so that rounding decides nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

FOLDER = Path(__file__).parent
FAMILIES = ("llama3", "gemma3")
PAD, NUM_BEAMS = 0, 4
STOPS = {"eos_token_id": [5, 17, 33, 41, 58, 64, 77, 90]}
ALL, ONE = (0, 1, 2), (1,)
CASES: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    (ALL, {"num_return_sequences": 4, "max_new_tokens": 12}),
    (ALL, {"num_return_sequences": 3, "max_new_tokens": 20, **STOPS}),
    (ALL, {"max_new_tokens": 20, "early_stopping": True, **STOPS}),
    (ALL, {"num_return_sequences": 2, "max_new_tokens": 20, "length_penalty": 0.0, **STOPS}),
    (ALL, {"max_new_tokens": 20, "length_penalty": 2.0, "early_stopping": "never", **STOPS}),
    (ALL, {"max_new_tokens": 20, "length_penalty": -0.7, **STOPS}),
    (ALL, {"max_new_tokens": 40, "eos_token_id": [5]}),
    (
        ONE,
        {
            "num_return_sequences": 3,
            "max_new_tokens": 12,
            "repetition_penalty": 1.3,
            "no_repeat_ngram_size": 2,
            "bad_words_ids": [[26], [41, 3]],
            "suppress_tokens": [9],
            "min_new_tokens": 6,
            "forced_eos_token_id": 5,
            **STOPS,
        },
    ),
]


def main() -> None:
    made: dict[str, Any] = {}
    for family in FAMILIES:
        folder = FOLDER / "families" / family
        golden = load_file(folder / "expected.safetensors")
        prompts = [golden["tokens"].tolist(), golden["short"].tolist(), golden["tokens"].tolist()[5:16]]
        models = [
            transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
            for dtype in (torch.float32, torch.float64)
        ]
        cases = []
        for which, given in CASES:
            if which is ONE and family != FAMILIES[0]:
                continue
            config = {"num_beams": NUM_BEAMS, **given}
            found, exact = (search(model, [prompts[i] for i in which], config) for model in models)
            same = [a["texts"] == b["texts"] for a, b in zip(found, exact, strict=True)]
            print(family, config, "same in float64:", same, "lengths:", [list(map(len, a["texts"])) for a in found])
            kept = [i for i, good in enumerate(same) if good]
            case = {"config": config, "prompts": [which[i] for i in kept], "found": [exact[i] for i in kept]}
            cases.append(case)
        made[family] = {"prompts": prompts, "cases": cases}
    lines = [
        f'"{family}": {{"prompts": {json.dumps(one["prompts"])}, "cases": [\n'
        + ",\n".join(json.dumps(case) for case in one["cases"])
        + "\n]}"
        for family, one in made.items()
    ]
    (FOLDER / "beams.json").write_text("{" + ",\n".join(lines) + "}\n")
    print(f"{FOLDER / 'beams.json'}: transformers {transformers.__version__}")


@torch.no_grad()
def search(model: Any, prompts: list[list[int]], config: dict[str, Any]) -> list[dict[str, Any]]:
    longest, n = max(map(len, prompts)), config.get("num_return_sequences", 1)
    tokens = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(
        tokens,
        attention_mask=mask,
        pad_token_id=PAD,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **config,
    )
    stops = set(config.get("eos_token_id", ()))
    texts = []
    for row in out.sequences[:, longest:].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
        texts.append(row[:end])
    scores = [round(score, 6) for score in out.sequences_scores.tolist()]
    return [{"texts": texts[i * n : (i + 1) * n], "scores": scores[i * n : (i + 1) * n]} for i in range(len(prompts))]


if __name__ == "__main__":
    main()
