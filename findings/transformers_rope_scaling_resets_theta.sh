#!/usr/bin/env bash
# transformers 5.24.0: a config that has "rope_parameters" (as version 5 writes it) and gets "rope_scaling" added by hand
# (as model cards tell one to, for long contexts) loses its rope_theta: it becomes 10,000, without a word.
#
# Seen:  alone 1000000.0    with rope_scaling beside it 10000.0
# The same two fields in a config of the older form, where rope_theta stands at the top level, keep 1,000,000.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0
mkdir "$folder/model"
"$folder/venv/bin/python" - "$folder/model" <<'PYTHON'
import json
import pathlib
import sys

from transformers import AutoConfig, Qwen2Config

folder = pathlib.Path(sys.argv[1])
yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def theta() -> float:
    return AutoConfig.from_pretrained(folder).rope_parameters["rope_theta"]


Qwen2Config(rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0}).save_pretrained(folder)
path = folder / "config.json"
new = json.loads(path.read_text())
alone = theta()
path.write_text(json.dumps(new | {"rope_scaling": yarn}))
beside = theta()
old = {name: value for name, value in new.items() if name != "rope_parameters"}
path.write_text(json.dumps(old | {"rope_theta": 1_000_000.0, "rope_scaling": yarn}))
print("alone", alone, " with rope_scaling beside it", beside, " older form", theta())
assert (alone, beside, theta()) == (1_000_000.0, 10_000.0, 1_000_000.0)
PYTHON
