"""Writes rope_configs.json: how Hugging Face transformers reads what config files say of rotary embeddings.

    pip install torch transformers
    python tests/golden/make_rope_configs.py

Each case holds a config.json and, by layer type, the frequencies and the attention factor of the family's own rotary
module, for a short and for a long sequence; or the error that transformers raises. tests/test_config.py compares.
"""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path

import torch
import transformers

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
FAMILIES = {  # model_type -> (module, class, further sizes)
    "llama": ("llama", "Llama", {}),
    "qwen2": ("qwen2", "Qwen2", {}),
    "qwen3": ("qwen3", "Qwen3", {"head_dim": 8}),
    "phi3": ("phi3", "Phi3", {}),
    "gemma2": ("gemma2", "Gemma2", {"head_dim": 8}),
    "gemma3_text": ("gemma3", "Gemma3", {"head_dim": 8}),
    "gpt_oss": ("gpt_oss", "GptOss", {"head_dim": 8, "num_local_experts": 4}),
    "mixtral": ("mixtral", "Mixtral", {}),
    "olmo3": ("olmo3", "Olmo3", {}),
    "smollm3": ("smollm3", "SmolLM3", {}),
    "cohere": ("cohere", "Cohere", {}),
    "cohere2": ("cohere2", "Cohere2", {}),
    "glm4": ("glm4", "Glm4", {"head_dim": 8}),
    "glm4_moe": ("glm4_moe", "Glm4Moe", {}),
    "ernie4_5": ("ernie4_5", "Ernie4_5", {"head_dim": 8}),
}
BY_LAYER_TYPE = ("gemma3_text", "olmo3")
NEW = {"rope_type": "default", "rope_theta": 1_000_000.0}
LOCAL = {"rope_type": "default", "rope_theta": 10_000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
NO_ORIGINAL = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONG = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 3.0, 4.0]}
LINEAR = {"rope_type": "linear", "factor": 8.0}

# name -> (model_type, fields)
CASES = {
    "the recipe of Qwen's card": (
        "qwen3",
        {"rope_scaling": YARN, "rope_theta": 1_000_000, "max_position_embeddings": 64},
    ),
    "the recipe with another length": (
        "qwen3",
        {"rope_scaling": YARN, "rope_theta": 1_000_000, "max_position_embeddings": 80},
    ),
    "the recipe beside what transformers 5 wrote": ("qwen3", {"rope_scaling": YARN, "rope_parameters": NEW}),
    "both, and a theta at the top": ("qwen3", {"rope_scaling": YARN, "rope_parameters": NEW, "rope_theta": 5e5}),
    "both, and a theta inside": (
        "qwen3",
        {"rope_scaling": {**YARN, "rope_theta": 5e5}, "rope_parameters": NEW, "rope_theta": 2e5},
    ),
    "an empty rope_scaling beside rope_parameters": ("qwen3", {"rope_scaling": {}, "rope_parameters": NEW}),
    "a null rope_scaling beside rope_parameters": ("qwen3", {"rope_scaling": None, "rope_parameters": NEW}),
    "an empty rope_scaling alone": ("qwen2", {"rope_scaling": {}, "rope_theta": 5e5}),
    "empty rope_parameters": ("qwen2", {"rope_parameters": {}, "rope_theta": 5e5}),
    "rope_parameters without theta": ("qwen2", {"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5}),
    "the original length at the top": ("llama", {"rope_scaling": NO_ORIGINAL, "original_max_position_embeddings": 32}),
    "the original length at both places": ("llama", {"rope_scaling": YARN, "original_max_position_embeddings": 32}),
    "the original length nowhere": ("llama", {"rope_scaling": NO_ORIGINAL}),
    "llama3 with the original length at both places": (
        "llama",
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 32},
    ),
    "yarn without a factor": ("llama", {"rope_scaling": {**YARN, "factor": None}}),
    "yarn of integers": ("llama", {"rope_scaling": {**YARN, "factor": 4, "beta_fast": 16, "beta_slow": 2}}),
    "yarn with mscale": ("llama", {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}}),
    "yarn with zero for its defaults": (
        "llama",
        {"rope_scaling": {**YARN, "mscale": 0.0, "mscale_all_dim": 0.5, "beta_fast": 0}},
    ),
    "yarn that is not truncated": ("llama", {"rope_scaling": {**YARN, "truncate": False}}),
    "the old name of rope_type": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "both names of rope_type": ("llama", {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}}),
    "the default with a factor": ("llama", {"rope_scaling": {"rope_type": "default", "factor": 8.0}}),
    "a part, in a family that rotates all": ("llama", {"partial_rotary_factor": 0.5}),
    "a part inside, in a family that rotates all": (
        "qwen2",
        {"rope_parameters": {**NEW, "partial_rotary_factor": 0.5}},
    ),
    "a part at the top": ("phi3", {"partial_rotary_factor": 0.5}),
    "a part inside": ("phi3", {"rope_parameters": {**NEW, "partial_rotary_factor": 0.25}}),
    "a part at both places": (
        "phi3",
        {"partial_rotary_factor": 0.5, "rope_parameters": {**NEW, "partial_rotary_factor": 0.25}},
    ),
    "longrope": ("phi3", {"rope_scaling": {"type": "longrope", **LONG}, "original_max_position_embeddings": 32}),
    "longrope as yarn": ("phi3", {"rope_scaling": {"type": "yarn", **LONG}, "original_max_position_embeddings": 32}),
    "longrope of another factor": (
        "phi3",
        {"rope_scaling": {"type": "longrope", "factor": 8.0, **LONG}, "original_max_position_embeddings": 32},
    ),
    "longrope with the original length at both places": (
        "phi3",
        {
            "rope_scaling": {"type": "longrope", "original_max_position_embeddings": 16, **LONG},
            "original_max_position_embeddings": 32,
        },
    ),
    "longrope with the original length inside alone": (
        "phi3",
        {"rope_scaling": {"type": "longrope", "original_max_position_embeddings": 16, **LONG}},
    ),
    "longrope in another family": (
        "llama",
        {"rope_scaling": {"type": "longrope", "original_max_position_embeddings": 16, **LONG}},
    ),
    "gemma3 says nothing": ("gemma3_text", {}),
    "gemma3 as it was written at first": (
        "gemma3_text",
        {"rope_scaling": LINEAR, "rope_theta": 5e5, "rope_local_base_freq": 2e4},
    ),
    "gemma3 by layer type": (
        "gemma3_text",
        {"rope_parameters": {"full_attention": {**LINEAR, "rope_theta": 5e5}, "sliding_attention": LOCAL}},
    ),
    "gemma3 with both": (
        "gemma3_text",
        {"rope_parameters": {"full_attention": NEW, "sliding_attention": LOCAL}, "rope_scaling": YARN},
    ),
    "gemma3 with a null layer type": (
        "gemma3_text",
        {"rope_parameters": {"full_attention": NEW, "sliding_attention": None}},
    ),
    "gemma3 with windows alone": (
        "gemma3_text",
        {"rope_parameters": {"sliding_attention": {**LINEAR, "rope_theta": 2e4}}},
    ),
    "gemma3 with the original length at the top": (
        "gemma3_text",
        {
            "rope_parameters": {"full_attention": {**NO_ORIGINAL, "rope_theta": 1e4}, "sliding_attention": LOCAL},
            "original_max_position_embeddings": 16,
        },
    ),
    "gemma3 with thetas at the top": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "default"},
                "sliding_attention": {"rope_type": "default"},
            },
            "rope_theta": 5e5,
            "rope_local_base_freq": 2e4,
        },
    ),
    "gemma2 with linear scaling": ("gemma2", {"rope_scaling": LINEAR}),
    "gpt-oss says nothing": ("gpt_oss", {}),
    "gpt-oss with nulls": ("gpt_oss", {"rope_parameters": None, "rope_scaling": None}),
    "gpt-oss with empty rope_parameters": ("gpt_oss", {"rope_parameters": {}}),
    "gpt-oss with another scaling": ("gpt_oss", {"rope_scaling": NO_ORIGINAL}),
    "gpt-oss with another theta": ("gpt_oss", {"rope_theta": 5e4}),
    "mixtral says nothing": ("mixtral", {}),
    "olmo3 says nothing": ("olmo3", {}),
    "olmo3 as it is published": ("olmo3", {"rope_scaling": YARN, "rope_theta": 500_000}),
    "olmo3 by layer type": ("olmo3", {"rope_parameters": {"full_attention": NEW, "sliding_attention": LOCAL}}),
    "olmo3 by layer type, beside a scaling": (
        "olmo3",
        {"rope_parameters": {"full_attention": NEW, "sliding_attention": LOCAL}, "rope_scaling": YARN},
    ),
    "smollm3 says nothing": ("smollm3", {}),
    "cohere says nothing": ("cohere", {}),
    "cohere2 says nothing": ("cohere2", {}),
    "cohere2 with yarn": ("cohere2", {"rope_scaling": YARN, "rope_theta": 50_000}),
    "glm4 says nothing": ("glm4", {}),
    "glm4 turned as a whole": ("glm4", {"partial_rotary_factor": 1.0}),
    "glm4 with a part inside": ("glm4", {"rope_parameters": {**NEW, "partial_rotary_factor": 0.25}}),
    "glm4_moe says nothing": ("glm4_moe", {}),
    "glm4_moe with yarn": ("glm4_moe", {"rope_scaling": YARN, "rope_theta": 1_000_000}),
    "ernie says nothing": ("ernie4_5", {}),
    # What transformers refuses, or can't run.
    "layer types in a family that has one way": (
        "gemma2",
        {"rope_parameters": {"full_attention": NEW, "sliding_attention": LOCAL}},
    ),
    "linear without a factor": ("llama", {"rope_scaling": {"type": "linear"}}),
    "llama3 without its factors": ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}),
    "a part that is scaled, in a family that rotates all": (
        "llama",
        {"partial_rotary_factor": 0.5, "rope_scaling": LINEAR},
    ),
    "gemma3 with both, one of them flat": ("gemma3_text", {"rope_parameters": NEW, "rope_scaling": YARN}),
    "no dictionary": ("llama", {"rope_scaling": "yarn"}),
    "a list": ("llama", {"rope_parameters": [1]}),
}


def rotations(source: dict) -> dict:
    """Returns {layer type: [frequencies short, long, attention factor]} of the family's rotary module."""
    folder, name, _ = FAMILIES[source["model_type"]]
    config = transformers.AutoConfig.for_model(**copy.deepcopy(source))
    modeling = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    module = getattr(modeling, f"{name}RotaryEmbedding")(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found = {}
    for kind in ["full_attention", "sliding_attention"] if source["model_type"] in BY_LAYER_TYPE else [None]:
        kinds, prefix = ([kind], f"{kind}_") if kind else ([], "")
        seen = []
        for length in (4, 120):
            x = torch.zeros(1, 1, length, head_dim)
            cos, sin = module(x, torch.arange(length)[None], *kinds)
            modeling.apply_rotary_pos_emb(x, x, cos, sin)  # fails if the sizes don't fit
            seen.append([float(f"{f:.7g}") for f in getattr(module, f"{prefix}inv_freq").tolist()])
        found[kind or "all"] = [*seen, float(getattr(module, f"{prefix}attention_scaling"))]
    return found


def main() -> None:
    transformers.logging.set_verbosity_error()
    lines = []
    for name, (model_type, fields) in CASES.items():
        source = {"model_type": model_type, **SIZES, **FAMILIES[model_type][2], **fields}
        case = {"name": name, "config": source}
        try:
            case["rotations"] = rotations(source)
        except Exception as error:  # noqa: BLE001
            case["refused"] = type(error).__name__
        print(name, case.get("rotations", case.get("refused")))
        lines.append(json.dumps(case))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    head = json.dumps({"made_by": "tests/golden/make_rope_configs.py", "versions": versions})
    Path(__file__).with_name("rope_configs.json").write_text(
        head[:-1] + ', "cases": [\n' + ",\n".join(lines) + "\n]}\n"
    )


if __name__ == "__main__":
    main()
