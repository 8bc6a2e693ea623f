"""Buffers: the attention of a well-known PyTorch notebook, with its mask as a plain array, as a buffer, and computed.

    python examples/buffers.py
    python examples/buffers.py --sizes 256 1024 4096

Follows "Understanding PyTorch Buffers" (https://github.com/rasbt/LLMs-from-scratch, ch03/03_understanding-buffers) step
by step, in flax.nnx and in flax.linen, with the notebook's weights and inputs, and says where JAX is different. Two
devices are needed to see something move: where there is one accelerator or none, two are made of the CPU.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import tempfile
import time

if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):  # before JAX is imported
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2".strip()

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxkv

# "Your journey starts with one step", an embedding of three numbers per word.
INPUTS = np.array(
    [
        [0.43, 0.15, 0.89],
        [0.55, 0.87, 0.66],
        [0.57, 0.85, 0.64],
        [0.22, 0.58, 0.33],
        [0.77, 0.25, 0.10],
        [0.05, 0.80, 0.55],
    ],
    np.float32,
)
# The two models of the notebook as its state_dict() prints them (PyTorch keeps the transposed: [d_out, d_in]), and the
# context vectors that it prints for each sentence of the batch.
FIRST = {
    "W_query.weight": [[-0.2354, 0.0191, -0.2867], [0.2177, -0.4919, 0.4232]],
    "W_key.weight": [[-0.4196, -0.4590, -0.3648], [0.2615, -0.2133, 0.2161]],
    "W_value.weight": [[-0.4900, -0.3503, -0.2120], [-0.1135, -0.4404, 0.3780]],
}
FIRST_OUTPUT = [
    [-0.4519, 0.2216],
    [-0.5874, 0.0058],
    [-0.6300, -0.0632],
    [-0.5675, -0.0843],
    [-0.5526, -0.0981],
    [-0.5299, -0.1081],
]
SECOND = {
    "W_query.weight": [[-0.1362, 0.1853, 0.4083], [0.1076, 0.1579, 0.5573]],
    "W_key.weight": [[-0.2604, 0.1829, -0.2569], [0.4126, 0.4611, -0.5323]],
    "W_value.weight": [[0.4929, 0.2757, 0.2516], [0.2377, 0.4800, -0.0762]],
}
SECOND_OUTPUT = [
    [0.4772, 0.1063],
    [0.5891, 0.3257],
    [0.6202, 0.3860],
    [0.5478, 0.3589],
    [0.5321, 0.3428],
    [0.5077, 0.3493],
]


def causal_mask(length: int) -> jax.Array:
    """Ones where a word would look ahead, as the notebook's torch.triu(torch.ones(n, n), diagonal=1)."""
    return jnp.triu(jnp.ones((length, length)), k=1)


def attend(queries, keys, values, hidden, dropout):
    """Attention [B, T, d_out] of words that don't see where hidden [T, T] is True; dropout takes the weights."""
    scores = queries @ keys.swapaxes(1, 2)
    scores = jnp.where(hidden[None], -jnp.inf, scores)
    return dropout(jax.nn.softmax(scores / keys.shape[-1] ** 0.5, axis=-1)) @ values


# ---------------------------------------------------------------- nnx


class Projections(nnx.Module):
    """What the three models have in common."""

    def __init__(self, d_in: int, d_out: int, dropout: float, *, rngs: nnx.Rngs):
        self.W_query = nnx.Linear(d_in, d_out, use_bias=False, rngs=rngs)
        self.W_key = nnx.Linear(d_in, d_out, use_bias=False, rngs=rngs)
        self.W_value = nnx.Linear(d_in, d_out, use_bias=False, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def attend(self, x, hidden):
        return attend(self.W_query(x), self.W_key(x), self.W_value(x), hidden, self.dropout)


class WithoutBuffer(Projections):
    def __init__(self, d_in, d_out, length, dropout=0.0, *, rngs):
        super().__init__(d_in, d_out, dropout, rngs=rngs)
        self.mask = causal_mask(length)

    def __call__(self, x):
        return self.attend(x, self.mask[: x.shape[1], : x.shape[1]] > 0)


class WithBuffer(Projections):
    def __init__(self, d_in, d_out, length, dropout=0.0, *, rngs):
        super().__init__(d_in, d_out, dropout, rngs=rngs)
        self.mask = jaxkv.Buffer(causal_mask(length))

    def __call__(self, x):
        return self.attend(x, self.mask[: x.shape[1], : x.shape[1]] > 0)


class Computed(Projections):
    def __init__(self, d_in, d_out, dropout=0.0, *, rngs):
        super().__init__(d_in, d_out, dropout, rngs=rngs)

    def __call__(self, x):
        place = jnp.arange(x.shape[1])
        return self.attend(x, place[None, :] > place[:, None])


# ---------------------------------------------------------------- linen


def projected(module, x, hidden, train: bool):
    """What the three models have in common."""
    q, k, v = (nn.Dense(module.d_out, use_bias=False, name=f"W_{name}")(x) for name in ("query", "key", "value"))
    return attend(q, k, v, hidden, nn.Dropout(module.dropout, deterministic=not train))


class LinenWithoutBuffer(nn.Module):
    d_out: int
    mask: jax.Array  # a field: linen modules have no state of their own
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        return projected(self, x, self.mask[: x.shape[1], : x.shape[1]] > 0, train)


class LinenWithBuffer(nn.Module):
    d_out: int
    length: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        mask = self.variable("buffers", "mask", causal_mask, self.length)
        return projected(self, x, mask.value[: x.shape[1], : x.shape[1]] > 0, train)


class LinenComputed(nn.Module):
    d_out: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        place = jnp.arange(x.shape[1])
        return projected(self, x, place[None, :] > place[:, None], train)


# ---------------------------------------------------------------- the steps


def from_torch(state: dict, prefix: str = "") -> dict:
    """The notebook's weights under Flax's names and in Flax's order: kernel [d_in, d_out]."""
    return {f"{prefix}{name.replace('.weight', '.kernel')}": np.array(w, np.float32).T for name, w in state.items()}


def agrees(context, printed) -> bool:
    """Whether context vectors [2, 6, 2] are the printed ones, as far as weights of four decimals say."""
    return bool(np.abs(np.asarray(context) - np.array(printed)[None]).max() < 1.5e-4)


def place(array) -> str:
    return ", ".join(sorted(f"device {device.id}" for device in array.devices()))


def two_devices() -> list[jax.Device]:
    devices = jax.devices() if len(jax.devices()) > 1 else jax.devices("cpu")
    return devices[:2]


def title(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")


def sure(fact) -> None:
    """Stops where the text would not be true."""
    if not bool(fact):
        raise SystemExit("buffers: what came out is not what is said here; which versions of JAX and Flax are these?")


def attempt(what: str, call) -> bool:
    """Runs what may fail; says whether it did. Returns whether it ran."""
    try:
        call()
    except ValueError as error:
        print(f"  {what}: ValueError: {str(error).splitlines()[0][:150]}")
        return False
    print(f"  {what}: runs")
    return True


def same_numbers(x) -> None:
    title("1. The notebook's weights give the notebook's numbers")
    d_in, d_out, length = x.shape[2], 2, x.shape[1]
    rngs = nnx.Rngs(123)
    for name, model, weights, printed in [
        ("nnx, mask a plain array", WithoutBuffer(d_in, d_out, length, rngs=rngs), FIRST, FIRST_OUTPUT),
        ("nnx, mask a buffer", WithBuffer(d_in, d_out, length, rngs=rngs), SECOND, SECOND_OUTPUT),
        ("nnx, mask computed", Computed(d_in, d_out, rngs=rngs), SECOND, SECOND_OUTPUT),
    ]:
        missing, _ = jaxkv.load_state_dict(model, from_torch(weights), strict=False)
        context = model(x)
        print(f"  {name:27} as printed: {agrees(context, printed)}   left as it was: {', '.join(missing) or 'nothing'}")
        sure(agrees(context, printed))
    for name, model, weights, printed in [
        ("linen, mask a plain array", LinenWithoutBuffer(d_out, causal_mask(length)), FIRST, FIRST_OUTPUT),
        ("linen, mask a buffer", LinenWithBuffer(d_out, length), SECOND, SECOND_OUTPUT),
        ("linen, mask computed", LinenComputed(d_out), SECOND, SECOND_OUTPUT),
    ]:
        variables = model.init(jax.random.key(123), x)
        loaded = jaxkv.load_state_dict(variables, from_torch(weights, "params."), strict=False)
        context = model.apply(loaded.variables, x)
        left = ", ".join(loaded.missing) or "nothing"
        print(f"  {name:27} as printed: {agrees(context, printed)}   left as it was: {left}")
        sure(agrees(context, printed))
    print("  context vectors of the last one, first sentence, and as printed (the weights are known to four decimals):")
    for row, want in zip(np.asarray(context[0]), printed, strict=True):
        print(f"    {row[0]:.4f} {row[1]:.4f}    {want[0]:.4f} {want[1]:.4f}")


def moving(x) -> None:
    title("2. Moving to another device")
    first, second = two_devices()
    length = x.shape[1]
    print("  PyTorch: a mask that is not a buffer stays on the CPU, and the next call is a RuntimeError.")
    print("  JAX knows two kinds of arrays. One that was never placed (uncommitted) goes wherever the others of a")
    print("  computation are; one that was placed (committed, by device_put) stays, and mixing devices is an error.\n")

    def moved_params(model):
        """Only what is trained, as one does who thinks of a model as its params."""
        nnx.update(model, jax.device_put(nnx.state(model, nnx.Param), second))
        return model

    there = jax.device_put(x, second)
    model = moved_params(WithoutBuffer(3, 2, length, rngs=nnx.Rngs(0)))
    kernel = model.W_query.kernel.get_value()
    print(f"  nnx, plain array, params moved: W_query on {place(kernel)}, mask on {place(model.mask)}")
    ran = attempt("call, mask never placed", lambda: model(there))
    sure(ran)  # JAX copies the mask over, silently and at every call
    model.mask = jax.device_put(model.mask, first)
    ran = attempt("call, mask placed on device 0", lambda: model(there))
    sure(not ran)
    model.mask = jax.device_put(model.mask, second)  # the notebook's cure: by hand, for each mask of each module
    sure(attempt("call, mask placed on device 1 by hand", lambda: model(there)))

    model = WithBuffer(3, 2, length, rngs=nnx.Rngs(0))
    nnx.update(model, jax.device_put(nnx.state(model), second))
    mask = model.mask.get_value()
    print(f"\n  nnx, buffer, nnx.state moved: mask on {place(mask)}")
    sure(mask.devices() == {second} and attempt("call", lambda: model(there)))
    print("  (nnx.state(model) has plain arrays of a module too, and they move with it: in nnx it is not moving that a")
    print("  buffer is for. It can be asked for, nnx.state(model, jaxkv.Buffer), and it is saved, see 4.)")

    linen = LinenWithoutBuffer(2, jax.device_put(causal_mask(length), first))
    variables = jax.device_put(linen.init(jax.random.key(0), x), second)
    print("\n  linen, plain array: the variables move, and the mask is not among them")
    sure(not attempt("call, mask placed on device 0", lambda: linen.apply(variables, there)))
    linen = LinenWithBuffer(2, length)
    variables = jax.device_put(linen.init(jax.random.key(0), x), second)
    mask = variables["buffers"]["mask"]
    print(f"  linen, buffer: mask on {place(mask)}")
    sure(mask.devices() == {second} and attempt("call", lambda: linen.apply(variables, there)))

    split = jax.NamedSharding(jax.sharding.Mesh(two_devices(), ("x",)), jax.P("x"))
    model = WithBuffer(3, 2, length, rngs=nnx.Rngs(0))
    model.mask.set_value(jax.device_put(model.mask.get_value(), split))
    print(
        f"\n  and a buffer can be split, here its rows: {model.mask.get_value().sharding.spec} over {place(model.mask)}"
    )


def states(x) -> None:
    title("3. state_dict")
    for name, holder in [
        ("nnx, mask a plain array", WithoutBuffer(3, 2, x.shape[1], rngs=nnx.Rngs(0))),
        ("nnx, mask a buffer", WithBuffer(3, 2, x.shape[1], rngs=nnx.Rngs(0))),
        ("linen, mask a plain array", LinenWithoutBuffer(2, causal_mask(x.shape[1])).init(jax.random.key(0), x)),
        ("linen, mask a buffer", LinenWithBuffer(2, x.shape[1]).init(jax.random.key(0), x)),
    ]:
        print(f"  {name}")
        for entry, array in jaxkv.state_dict(holder).items():
            print(f"    {entry:24} {array.dtype}{list(array.shape)}")


def saving(x, folder: pathlib.Path) -> None:
    title("4. A mask that was edited, every 1 made a 2, saved and loaded into a new model")
    length = x.shape[1]
    path = folder / "model.safetensors"

    edited, new = (WithBuffer(3, 2, length, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    edited.mask[edited.mask.get_value() == 1] = 2.0
    jaxkv.save_state(path, edited)
    jaxkv.load_state(path, new)
    print(f"  nnx, buffer:         first row {new.mask[0].tolist()}: kept")
    sure((new.mask.get_value() == 2 * causal_mask(length)).all())

    edited, new = (WithoutBuffer(3, 2, length, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    edited.mask = jnp.where(edited.mask == 1, 2.0, edited.mask)
    jaxkv.save_state(path, edited)
    jaxkv.load_state(path, new)
    print(f"  nnx, plain array:    first row {new.mask[0].tolist()}: forgotten")
    sure((new.mask == causal_mask(length)).all())

    model = LinenWithBuffer(2, length)
    variables, others = (model.init(jax.random.key(seed), x) for seed in (0, 1))
    variables["buffers"]["mask"] = jnp.where(variables["buffers"]["mask"] == 1, 2.0, variables["buffers"]["mask"])
    jaxkv.save_state(path, variables)
    others = jaxkv.load_state(path, others).variables
    print(f"  linen, buffer:       first row {others['buffers']['mask'][0].tolist()}: kept")
    sure((others["buffers"]["mask"] == 2 * causal_mask(length)).all())

    jaxkv.save_state(path, LinenWithoutBuffer(2, 2 * causal_mask(length)).init(jax.random.key(0), x))
    print(f"  linen, plain array:  not in the file, which has {', '.join(jaxkv.load_state(path))}: forgotten")
    sure("buffers.mask" not in jaxkv.load_state(path))


def costs(sizes: list[int]) -> list[tuple[int, str, float, float]]:
    title("5. But should a causal mask be a buffer? No: it is computed from the places, for nothing")

    def compiled(length: int, how: str):
        """Bytes of the program and of its arguments beside the scores, and seconds to compile."""
        mask = np.triu(np.ones((length, length), bool), k=1)
        scores = jax.ShapeDtypeStruct((1, length, length), jnp.float32)

        def constant(scores):
            return jax.nn.softmax(jnp.where(jnp.asarray(mask)[None], -jnp.inf, scores))

        def computed(scores):
            place = jnp.arange(scores.shape[1])
            return jax.nn.softmax(jnp.where((place[None, :] > place[:, None])[None], -jnp.inf, scores))

        def buffer(scores, mask):
            return jax.nn.softmax(jnp.where(mask[None], -jnp.inf, scores))

        arguments = (scores, jax.ShapeDtypeStruct(mask.shape, bool)) if how == "buffer" else (scores,)
        function = {"constant": constant, "computed": computed, "buffer": buffer}[how]
        start = time.perf_counter()
        lowered = jax.jit(function).lower(*arguments)
        lowered.compile()
        seconds = time.perf_counter() - start
        return len(lowered.as_text()), mask.nbytes if how == "buffer" else 0, seconds

    rows = []
    for length in sizes:
        for how in ("computed", "buffer", "constant"):
            program, kept, seconds = compiled(length, how)
            rows.append((length, how, program, kept))
            print(
                f"  {length:5} words, mask {how:8}: program {program / 1e6:6.2f} MB, buffers {kept / 1e6:5.1f} MB, "
                f"compiled in {1e3 * seconds:4.0f} ms"
            )
    print("  A mask that a jitted function finds outside of itself becomes a constant of its program.")
    print("  Buffers are for data: what can't be computed again, or was edited.")
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="buffers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 2048], help="lengths whose masks are compiled")
    args = parser.parse_args(argv)
    if len(two_devices()) < 2:
        parser.error("two devices are needed: XLA_FLAGS=--xla_force_host_platform_device_count=2 makes two of a CPU")
    if min(args.sizes) < 1:
        parser.error(f"--sizes {min(args.sizes)}: give lengths of at least 1")

    with jax.default_device(two_devices()[0]):
        x = jnp.stack([jnp.asarray(INPUTS)] * 2)  # [2, 6, 3]: two sentences
        same_numbers(x)
        moving(x)
        states(x)
        with tempfile.TemporaryDirectory() as folder:
            saving(x, pathlib.Path(folder))
        costs(args.sizes)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
