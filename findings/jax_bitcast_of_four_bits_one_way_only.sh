#!/usr/bin/env bash
# jax and jaxlib 0.10.2 with XLA_FLAGS=--xla_cpu_use_fusion_emitters=false, on a CPU: a float32 converted to float4_e2m1fn
# and bitcast to uint4 in one program is refused ("Invalid LLVM IR", a bitcast of i8 to i4). The way back (uint4 to
# float4_e2m1fn to float32) compiles, and so does the first one without the flag.
#
# Seen:  without the flag: there ok, back ok   with it: there INTERNAL, back ok
# So jaxkv's tests compile the programs of 4-bit floats with XLA's own choice of emitters, and never with this flag.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2
cat > "$folder/four.py" <<'PYTHON'
import jax
import jax.numpy as jnp

FOUR = jnp.float4_e2m1fn


def there(x):
    return jax.lax.bitcast_convert_type(x.astype(FOUR), jnp.uint4).astype(jnp.uint8)


def back(codes):
    return jax.lax.bitcast_convert_type(codes.astype(jnp.uint4), FOUR).astype(jnp.float32)


seen = []
for function, numbers in ((there, jnp.arange(16.0).reshape(4, 4)), (back, jnp.arange(16, dtype=jnp.uint8))):
    try:
        jax.block_until_ready(jax.jit(function)(numbers))
        seen.append(f"{function.__name__} ok")
    except jax.errors.JaxRuntimeError as error:
        seen.append(f"{function.__name__} {str(error).split(':')[0]}")
print(", ".join(seen))
PYTHON
export JAX_PLATFORMS=cpu
without=$("$folder/venv/bin/python" "$folder/four.py" 2> /dev/null)
with=$(XLA_FLAGS=--xla_cpu_use_fusion_emitters=false "$folder/venv/bin/python" "$folder/four.py" 2> /dev/null)
echo "without the flag: $without   with it: $with"
[ "$without" = "there ok, back ok" ] && [ "$with" = "there INTERNAL, back ok" ]
