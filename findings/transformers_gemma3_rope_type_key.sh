#!/usr/bin/env bash
# transformers 5.24.0, Gemma 3: a rope dictionary that names its kind by "type" (the key of transformers 4) is not scaled.
# Other families understand "type": here it is kept, "rope_type" stays "default", and the factor has no effect.
#
# Seen:  Gemma 3 'type': default   Gemma 3 'rope_type': linear   Llama 'type': linear
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0
"$folder/venv/bin/python" - <<'PYTHON'
from transformers import Gemma3TextConfig, LlamaConfig

kinds = {}
for key in ("type", "rope_type"):
    config = Gemma3TextConfig(rope_scaling={key: "linear", "factor": 8.0})
    kinds[f"Gemma 3 {key!r}"] = config.rope_parameters["full_attention"]["rope_type"]
kinds["Llama 'type'"] = LlamaConfig(rope_scaling={"type": "linear", "factor": 8.0}).rope_parameters["rope_type"]
print("   ".join(f"{name}: {kind}" for name, kind in kinds.items()))
assert list(kinds.values()) == ["default", "linear", "linear"]
PYTHON
