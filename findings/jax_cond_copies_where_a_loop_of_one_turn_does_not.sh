#!/usr/bin/env bash
# jax 0.10.2, XLA's CPU backend: a donated buffer is the carry of a while_loop, and its body changes it only if a condition
# holds. Written as lax.cond(p, f, lambda c: c, carry), the update is in place as long as f writes and reads the buffer
# once; if f does that twice, the compiled loop has a temporary as large as the buffer, 4 MiB here. The same f in a
# lax.while_loop of at most one turn, `while p: carry, p = f(carry), False`, needs none. So "run a step only if ..." is
# cheaper as a loop than as a branch. (jax 0.12.0 gives the same for this program.)
#
# Seen:  temporaries of the compiled program in bytes, buffer 4,194,304
#        f writes once:    cond     8,608   loop of one turn   8,480
#        f writes twice:   cond 4,203,040   loop of one turn   8,608
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
from jax import lax

SIZE = 1024


def write_and_read(i):
    def change(carry):
        buffer, total = carry
        buffer = lax.dynamic_update_slice_in_dim(buffer, jnp.full((1, SIZE), 1.0) + total, i % SIZE, 0)
        return buffer, (buffer @ jnp.ones((SIZE, 1))).sum()

    return change


def twice(i):
    return lambda carry: write_and_read(i + 1)(write_and_read(i)(carry))


def branch(condition, change, carry):
    return lax.cond(condition, change, lambda carry: carry, carry)


def loop_of_one_turn(condition, change, carry):
    turn = lax.while_loop(lambda c: c[0], lambda c: (jnp.bool_(False), change(c[1])), (condition, carry))
    return turn[1]


def temporaries(if_form, change):
    def program(buffer, count):
        def body(carry):
            i, buffer, total = carry
            return i + 1, *if_form(total < 1e9, change(i), (buffer, total))

        return lax.while_loop(lambda carry: carry[0] < count, body, (jnp.int32(0), buffer, jnp.float32(0)))[1]

    shapes = jax.ShapeDtypeStruct((SIZE, SIZE), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    return jax.jit(program, donate_argnums=0).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


found = {(name, form.__name__): temporaries(form, change)
         for name, change in (("once", write_and_read), ("twice", twice))
         for form in (branch, loop_of_one_turn)}
for (name, form), size in found.items():
    print(f"f writes {name}, {form}: {size:,}")
whole = SIZE * SIZE * 4
assert found["twice", "branch"] >= whole
assert all(size < whole // 100 for key, size in found.items() if key != ("twice", "branch"))
PYTHON
