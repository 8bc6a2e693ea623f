#!/usr/bin/env bash
# transformers 5.24.0 (torch 2.13.0, CPU), Mamba2ForCausalLM: `time_step_limit` of the config clamps the time steps of a text
# that is read in one block, and has no effect on a token that is read alone, after a cache. So with a limit other than
# (0, inf) the last logits of a text depend on how it was fed.
#
# Seen:  largest difference of the last logits, whole text against all but the last token and then the last one
#        limit (0, inf)      2e-07
#        limit (0.5, 100)    3e-03
# So a checkpoint with such a limit has no one right answer; jaxkv refuses it in a hybrid's config.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0 torch==2.13.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

TEXT = torch.tensor([[3, 1, 4, 1, 5, 9]])


def difference(limit) -> float:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 8, "num_heads": 4, "head_dim": 8}
    config = Mamba2Config(**sizes, expand=2, n_groups=1, chunk_size=8, time_step_limit=limit)
    model = Mamba2ForCausalLM(config).eval()
    with torch.no_grad():
        whole = model(TEXT).logits[0, -1]
        before = model(TEXT[:, :-1], use_cache=True)
        last = model(TEXT[:, -1:], use_cache=True, cache_params=before.cache_params).logits[0, -1]
    return float((whole - last).abs().max())


without, limited = difference((0.0, float("inf"))), difference((0.5, 100.0))
print(f"limit (0, inf) {without:.0e}   limit (0.5, 100) {limited:.0e}")
assert without < 1e-5 and limited > 1e-3
PYTHON
