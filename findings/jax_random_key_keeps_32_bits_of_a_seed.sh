#!/usr/bin/env bash
# jax 0.10.2, 64-bit types off (the default): jax.random.key keeps the low 32 bits of a seed and says nothing. 2**32 and 0
# are the same key, and so are -1 and 2**63 - 1. With jax_enable_x64 they are four keys, and -1 is another one than before.
# (NumPy's default_rng tells all of these seeds apart.) Seeds drawn from the clock in nanoseconds, or from a 64-bit hash,
# repeat after 2**32.
#
# Seen:  32 bits: 0 -> [0, 0]   2**32 -> [0, 0]   -1 -> [0, 4294967295]   2**63-1 -> [0, 4294967295]
#        x64:     0 -> [0, 0]   2**32 -> [1, 0]   -1 -> [4294967295, 4294967295]   2**63-1 -> [2147483647, 4294967295]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2
"$folder/venv/bin/python" - <<'PYTHON'
import jax

seeds = {"0": 0, "2**32": 2**32, "-1": -1, "2**63-1": 2**63 - 1}


def keys() -> dict[str, list[int]]:
    return {name: jax.random.key_data(jax.random.key(seed)).tolist() for name, seed in seeds.items()}


narrow = keys()
with jax.enable_x64(True):
    wide = keys()
for title, found in (("32 bits:", narrow), ("x64:", wide)):
    print(title, *(f"{name} -> {key}  " for name, key in found.items()))
assert narrow["0"] == narrow["2**32"] == [0, 0]
assert narrow["-1"] == narrow["2**63-1"] == [0, 2**32 - 1]
assert len({tuple(key) for key in wide.values()}) == 4 and wide["-1"] != narrow["-1"]
PYTHON
