"""Trains a head on the features of a frozen Flax backbone, for several shuffled epochs: without jaxkv.Memo, with it,
and with it once more in a new process that finds the features on disk.

    python examples/frozen_backbone.py                                      # about 20 seconds on two cores
    python examples/frozen_backbone.py --images 128 --size 32 --epochs 2    # a few seconds
    python examples/frozen_backbone.py --disk features                      # keeps them: the next run finds them

The pictures are gratings in noise, eight directions to tell apart; the backbone is a residual network whose random
weights stay as they are; the head is a linear layer that optax trains. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen

try:
    import optax
except ImportError as error:
    sys.exit(
        f"frozen_backbone: {error.name} is not installed; pip install optax tqdm matplotlib xxhash blake3 zstandard"
    )

import jaxkv

CLASSES = 8


class Backbone(linen.Module):
    """A small residual network: pictures [B, size, size, 3] to features [B, 480], the mean of what each stage sees."""

    widths: tuple[int, ...] = (32, 64, 128, 256)

    @linen.compact
    def __call__(self, x):
        seen = []
        for width in self.widths:
            x = linen.Conv(width, (3, 3), strides=2)(x)
            x = x + linen.Conv(width, (3, 3))(linen.gelu(linen.LayerNorm()(x)))
            seen.append(jnp.mean(linen.gelu(linen.LayerNorm()(x)), axis=(1, 2)))
        return jnp.concatenate(seen, axis=-1)


def pictures(count: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns gratings in noise, [count, size, size, 3] float32, and the class of each: its direction."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(CLASSES, size=count)
    angle = (labels * np.pi / CLASSES)[:, None, None, None]
    rows, columns = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
    along = np.cos(angle) * rows[None, :, :, None] + np.sin(angle) * columns[None, :, :, None]
    wave = rng.uniform(5, 8, (count, 1, 1, 1))
    phase = rng.uniform(0, 2 * np.pi, (count, 1, 1, 3))
    grating = np.sin(2 * np.pi * along / wave + phase) * rng.uniform(0.5, 1, (count, 1, 1, 3))
    return (grating + 0.6 * rng.standard_normal((count, size, size, 3))).astype(np.float32), labels


def train(features: Callable[[Any], Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Trains a head on `features` of the pictures and returns losses, held-out accuracy and seconds of each epoch."""
    x, labels = pictures(args.images, args.size, seed=1)
    held_x, held_labels = pictures(args.images // 4, args.size, seed=2)
    head, optimizer = linen.Dense(CLASSES), optax.adam(1e-2)

    @jax.jit
    def step(params, state, inputs, labels):
        def loss_of(params):
            logits = head.apply(params, inputs)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, gradient = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, loss

    @jax.jit
    def count_right(params, inputs, labels):
        return jnp.sum(jnp.argmax(head.apply(params, inputs), axis=-1) == labels)

    params = head.init(jax.random.key(4), jnp.zeros((1, sum(Backbone.widths))))
    state, rng, epochs = optimizer.init(params), np.random.default_rng(3), []
    for _ in range(args.epochs):
        begin = time.perf_counter()
        order = rng.permutation(args.images)  # another one each epoch, the same ones in each run
        losses, right = [], 0
        for chosen in order[: args.images - args.images % args.batch].reshape(-1, args.batch):
            params, state, loss = step(params, state, features(x[chosen]), labels[chosen])
            losses.append(loss)
        for i in range(0, len(held_x), args.batch):
            right += int(count_right(params, features(held_x[i : i + args.batch]), held_labels[i : i + args.batch]))
        seconds = time.perf_counter() - begin
        epochs.append({"losses": list(map(float, losses)), "accuracy": right / len(held_x), "seconds": seconds})
    return epochs


def backbone(size: int) -> tuple[Backbone, Any]:
    """The network, and weights that are the same in every process: as if from a checkpoint."""
    network, rng = Backbone(), np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key == "kernel":
            return rng.standard_normal(leaf.shape, np.float32) / np.float32(np.sqrt(np.prod(leaf.shape[:-1])))
        return np.full(leaf.shape, path[-1].key == "scale", np.float32)

    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    return network, jax.device_put(jax.tree.map_with_path(draw, shapes))


def without(args: argparse.Namespace) -> list[dict[str, Any]]:
    network, variables = backbone(args.size)
    apply = jax.jit(network.apply)
    return train(lambda x: apply(variables, x), args)


def remembered(args: argparse.Namespace) -> dict[str, Any]:
    """Trains with what is in the folder; returns the epochs, and what the memo says about itself."""
    network, variables = backbone(args.size)
    with jaxkv.Memo(memory="256MiB", disk=args.disk) as memo:
        # "full": what is missing is computed in batches of the full size, so that it rounds as it does without a memo.
        features = memo.wrap(network.apply, variables, batch="full")
        return {"epochs": train(features, args), "stats": str(memo.stats())}


def restarted(args: argparse.Namespace) -> dict[str, Any]:
    """The same in a process of its own, which knows nothing but the folder."""
    options = [f"--{name}={getattr(args, name)}" for name in ("images", "size", "batch", "epochs", "disk")]
    command = [sys.executable, __file__, *options, "--report"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    lines = [f"{'':5}" + "".join(f"{name:>28}" for name in runs)]
    lines.append("epoch" + f"{'loss':>10}{'accuracy':>10}{'s':>8}" * len(runs))
    for number, epochs in enumerate(zip(*runs.values(), strict=True), 1):
        cells = (f"{np.mean(e['losses']):10.5f}{e['accuracy']:10.3f}{e['seconds']:8.3f}" for e in epochs)
        lines.append(f"{number:5}{''.join(cells)}")
    return "\n".join(lines)


def compare(args: argparse.Namespace) -> int:
    print(f"{args.images} pictures of {args.size} x {args.size}, {args.epochs} epochs; the first one compiles, too")
    plain, first = without(args), remembered(args)
    again = restarted(args)
    runs = {"without a memo": plain, "with jaxkv.Memo": first["epochs"], "after a restart": again["epochs"]}
    print(table(runs))
    print(f"with jaxkv.Memo: {first['stats']}")
    print(f"after a restart: {again['stats']}")
    each = {name: statistics.median(epoch["seconds"] for epoch in epochs[1:]) for name, epochs in runs.items()}
    faster = [f"{each['without a memo'] / seconds:.0f} times faster {name}" for name, seconds in list(each.items())[1:]]
    print(f"epochs after the first: {', '.join(faster)}")
    losses = [np.concatenate([epoch["losses"] for epoch in epochs]) for epochs in runs.values()]
    worst = max(np.abs(losses[0] - other).max() for other in losses[1:])
    print(f"losses of all steps: {'the same, bit by bit' if worst == 0 else f'equal within {worst:.1e}'}")
    if worst > 1e-4 * losses[0].max():
        print("frozen_backbone: the losses differ by more than rounding", file=sys.stderr)
        return 1
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="frozen_backbone", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images", type=int, default=1024, help="to train on (default 1024); a fourth more is held out"
    )
    parser.add_argument("--size", type=int, default=64, help="their height and width (default 64)")
    parser.add_argument("--batch", type=int, default=64, help="pictures per step (default 64)")
    parser.add_argument("--epochs", type=int, default=6, help="each in an order of its own (default 6)")
    parser.add_argument("--disk", type=pathlib.Path, help="keep the features there (default: nowhere)")
    parser.add_argument("--report", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name, least in (("images", 8), ("size", 16), ("batch", 1), ("epochs", 2)):
        if getattr(args, name) < least:
            parser.error(f"--{name} is {getattr(args, name)}; give at least {least}")
    args.batch = min(args.batch, args.images)
    if args.report:
        print(json.dumps(remembered(args)))
        return 0
    if args.disk:
        return compare(args)
    with tempfile.TemporaryDirectory() as folder:
        args.disk = pathlib.Path(folder) / "features"
        return compare(args)


if __name__ == "__main__":
    sys.exit(main())
