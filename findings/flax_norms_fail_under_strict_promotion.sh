#!/usr/bin/env bash
# flax 0.12.8 with jax 0.10.2 and jax_numpy_dtype_promotion="strict": nnx.RMSNorm, LayerNorm and GroupNorm with
# dtype=bfloat16 raise TypePromotionError for a bfloat16 input, whatever param_dtype is: inside they compute in float32, and
# promote to it implicitly. nnx.Linear with dtype=bfloat16 works.
#
# Seen:  RMSNorm TypePromotionError   LayerNorm TypePromotionError   GroupNorm TypePromotionError   Linear bfloat16
# So a bfloat16 model made of Flax's norms can't be run in the strict mode; jaxkv's modules have norms of their own.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2 flax==0.12.8
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
from flax import nnx

jax.config.update("jax_numpy_dtype_promotion", "strict")
x = jnp.ones((2, 4), jnp.bfloat16)
LAYERS = {
    "RMSNorm": lambda **kind: nnx.RMSNorm(4, **kind),
    "LayerNorm": lambda **kind: nnx.LayerNorm(4, **kind),
    "GroupNorm": lambda **kind: nnx.GroupNorm(4, num_groups=2, **kind),
    "Linear": lambda **kind: nnx.Linear(4, 4, **kind),
}
seen = {}
for name, make in LAYERS.items():
    for param_dtype in (jnp.float32, jnp.bfloat16):
        try:
            out = make(dtype=jnp.bfloat16, param_dtype=param_dtype, rngs=nnx.Rngs(0))(x)
            seen.setdefault(name, set()).add(out.dtype.name)
        except Exception as error:
            seen.setdefault(name, set()).add(type(error).__name__)
print(seen)
error = {"TypePromotionError"}
assert seen == {"RMSNorm": error, "LayerNorm": error, "GroupNorm": error, "Linear": {"bfloat16"}}
PYTHON
