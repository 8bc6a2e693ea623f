#!/usr/bin/env bash
# transformers 5.24.0 (torch 2.13.0, CPU): FineGrainedFP8Config(dequantize=True) derives the size of a block from the weight and
# its grid of scales (rows // rows of scales), not from the file's weight_block_size. Where blocks don't divide a weight, it
# multiplies rows by the scale of another block, silently.
#
# Seen:  a Llama in FP8, blocks of 128, gate_proj [192, 128] with scales 1 and 2 for rows 0-127 and 128-191
#        scale of row 95 is 1, of row 96 is 2, of row 128 is 2    (blocks of 96 rows)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0 torch==2.13.0 accelerate
FOLDER="$folder/model" "$folder/venv/bin/python" - <<'PYTHON'
import json
import os
import pathlib

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM

folder = pathlib.Path(os.environ["FOLDER"])
sizes = {"vocab_size": 32, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4))
model.save_pretrained(folder)
tensors = load_file(folder / "model.safetensors")
for name in [name for name in tensors if "_proj" in name]:
    tensors[name] = torch.ones_like(tensors[name]).to(torch.float8_e4m3fn)
    rows, columns = (-(-size // 128) for size in tensors[name].shape)
    tensors[f"{name}_scale_inv"] = 1.0 + torch.arange(rows * columns).float().reshape(rows, columns)
save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
config = json.loads((folder / "config.json").read_text())
config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
(folder / "config.json").write_text(json.dumps(config))
loaded = AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
)
gate = loaded.model.layers[0].mlp.gate_proj.weight
print("scales of rows 95, 96, 127, 128:", gate[[95, 96, 127, 128], 0].tolist())
assert gate[[95, 96, 127, 128], 0].tolist() == [1, 2, 2, 2]  # by blocks of 128 rows: 1, 1, 1, 2
PYTHON
