"""Trains the bundled byte-level model, on English that every Python installation carries.

    python examples/train_tiny.py --minutes 60 --out runs/tiny
    python examples/train_tiny.py --minutes 60 --out runs/tiny --resume

Ctrl-C stops after the current step and keeps a checkpoint; a second one stops at once. OUT gets the checkpoint, the
weights (model.safetensors, float16), and the loss (curve.json, curve.png).
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
import math
import pathlib
import re
import signal
import sys
import sysconfig
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

try:
    import matplotlib
    import optax
    import tqdm
except ImportError as error:
    sys.exit(f"train_tiny: {error.name} is not installed; pip install optax tqdm matplotlib")

import jaxkv
from jaxkv import safetensors
from jaxkv.models import ByteTokenizer, Decoder, DecoderConfig, tiny

# Tests, tables, programs that other programs wrote or that are bundled: little English, or none.
SKIPPED = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "lib2to3",
    "encodings",
    "ensurepip",
    "turtledemo",
    "pydoc_data",
}
TOKENIZER = ByteTokenizer()
PROMPTS = ("The with statement", "Return the ", "A class is ")


class Refused(Exception):
    """What was asked can't be done; the message is for the person who asked."""


# ---------------------------------------------------------------- text


def documents() -> list[tuple[str, str]]:
    """Returns (kind, text) of every document: the topics of help(), docstrings, and comments of several lines."""
    found = [("topic", text) for text in importlib.import_module("pydoc_data.topics").topics.values()]
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED & set(parts) or parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        try:
            source = path.read_text("utf-8")
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue
        found += [("docstring", text) for text in docstrings(tree, ".".join(parts))]
        found += [("comment", text) for text in comments(source)]
    for name in sorted(sys.builtin_module_names):
        found += [("docstring", text) for text in builtin_docstrings(importlib.import_module(name), name, depth=2)]
    kinds: dict[str, str] = {}
    for kind, text in found:
        text = "\n".join(line.rstrip() for line in text.strip().splitlines())
        if len(text) >= 40:
            kinds.setdefault(text, kind)
    return [(kind, text) for text, kind in kinds.items()]


def docstrings(tree: ast.AST, name: str):
    """Yields the docstrings of a module and all in it, each under its qualified name."""
    if isinstance(tree, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(tree)
        if text:
            yield f"{name}\n\n{text}"
    for child in ast.iter_child_nodes(tree):
        inner = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        yield from docstrings(child, f"{name}.{child.name}" if inner else name)


def comments(source: str):
    """Yields the comments of three lines or more that look like prose."""
    for match in re.finditer(r"(?:^[ \t]*#[^\n]*\n){3,}", source, re.MULTILINE):
        text = "\n".join(re.sub(r"^[ \t]*#+ ?", "", line) for line in match.group().splitlines())
        if len(text) >= 120 and sum(c.isalpha() or c == " " for c in text) > 0.88 * len(text):
            yield text


def builtin_docstrings(value, name: str, depth: int):
    """Yields the docstrings of what is written in C."""
    text = inspect.getdoc(value)
    if text:
        yield f"{name}\n\n{text}"
    if depth and (inspect.isclass(value) or inspect.ismodule(value)):
        for key, inner in sorted(vars(value).items()):
            if not key.startswith("__") and callable(inner):
                yield from builtin_docstrings(inner, f"{name}.{key}", depth - 1)


def tidy(text: str) -> str:
    """Returns a text without underlines and rules of tables, which a small model would go on with forever."""
    return "\n".join(line for line in text.splitlines() if not re.fullmatch(r"[-*=~^+|_.#\"' ]{4,}", line))


def corpus(topics: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Returns the bytes to train on and the held-out ones (2 % of the documents), uint8, each document after a byte 0.

    Args:
      topics: how often the topics of help() come in the bytes to train on.
    """
    train, held_out = [], []
    for kind, text in documents():
        digest = hashlib.md5(text.encode(), usedforsecurity=False).digest()
        piece = [0, *TOKENIZER.encode(tidy(text))]
        if digest[0] % 50 == 0:
            held_out.append((digest, piece))
        else:
            for copy in range(topics if kind == "topic" else 1):
                train.append((hashlib.md5(digest + bytes([copy]), usedforsecurity=False).digest(), piece))
    # In the order of their digests: shuffled, and the same everywhere.
    joined = [[byte for _, piece in sorted(part) for byte in piece] + [0] for part in (train, held_out)]
    return np.array(joined[0], np.uint8), np.array(joined[1], np.uint8)


def batch(data: np.ndarray, step: int, size: int, length: int) -> np.ndarray:
    """Returns the batch of a step, int32 [size, length + 1]; a byte comes once per epoch, cut differently each time.

    It depends on nothing but the arguments, so a resumed run goes on with the data it would have had.
    """
    count = (len(data) - 1) // length - 1
    rows = []
    for index in range(step * size, (step + 1) * size):
        epoch, place = divmod(index, count)
        first, order = _epoch(epoch, count, length)
        begin = first + order[place] * length
        rows.append(data[begin : begin + length + 1])
    return np.stack(rows).astype(np.int32)


@functools.lru_cache(maxsize=2)
def _epoch(epoch: int, count: int, length: int) -> tuple[int, np.ndarray]:
    random = np.random.default_rng(epoch)
    return int(random.integers(length)), random.permutation(count)


# ---------------------------------------------------------------- training


def optimizer() -> optax.GradientTransformation:
    """Returns Muon for the matrices and Adam for the rest; the train step multiplies the learning rate in."""

    def matrices(params):
        def axes(path, leaf):
            name = jax.tree_util.keystr(path)
            if leaf.ndim < 2 or "embed" in name:
                return None
            inputs = leaf.ndim - 1 if "'out'" in name else 1  # out is [N, H, D], the others [D, ...]
            return optax.contrib.MuonDimensionNumbers(tuple(range(inputs)), tuple(range(inputs, leaf.ndim)))

        return jax.tree_util.tree_map_with_path(axes, params)

    muon = optax.contrib.muon(
        1.0,
        weight_decay=0.02,
        consistent_rms=0.2,
        adam_b2=0.98,
        adam_learning_rate=1.0,
        muon_weight_dimension_numbers=matrices,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


def learning_rate(progress: float, peak: float) -> float:
    """Returns the rate: up over the first 2 % of the run, then down to zero in a straight line."""
    return peak * min(1.0, progress / 0.02 + 1e-3) * max(0.0, 1.0 - progress)


def make_functions(config: DecoderConfig):
    """Returns init(key) -> (params, opt_state), train_step, and evaluate, compiled. Params are nested dicts."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    update = optimizer()

    def loss(params, tokens):  # nats per byte
        logits = nnx.merge(graph, params)(tokens[:, :-1]).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @jax.jit
    def init(key):
        params = nnx.to_pure_dict(nnx.state(Decoder(config, rngs=nnx.Rngs(key))))
        for layer in params["layers"].values():  # so that every layer starts as the identity
            for part in layer.values():
                for name in {"out", "out_proj", "down"} & part.keys():
                    part[name]["kernel"] = jnp.zeros_like(part[name]["kernel"])
        return params, update.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, opt_state, tokens, rate):
        value, grads = jax.value_and_grad(loss)(params, tokens)
        updates, opt_state = update.update(grads, opt_state, params)
        return jax.tree.map(lambda p, u: p + rate * u, params, updates), opt_state, value

    return init, train_step, jax.jit(loss)


def sample(config: DecoderConfig, params, prompt: str, count: int) -> str:
    """Returns a prompt as the model continues it."""
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    forward, _ = jaxkv.nnx.functional(model)
    history = [0, *TOKENIZER.encode(prompt)]
    cache = jaxkv.Cache.init(model.specs(), num_rows=1, capacity=512, max_block=64)
    result = jaxkv.generate(
        forward,
        params,
        [history],
        cache,
        max_new_tokens=count,
        sampler=jaxkv.sampling.Temperature(0.7),
        stop_tokens=[0],
        key=jax.random.key(0),
    )
    return TOKENIZER.decode(history[1:] + result.tokens[0].tolist())


# ---------------------------------------------------------------- the run


def save_checkpoint(path: pathlib.Path, params, opt_state, facts: dict) -> None:
    leaves = {f"params.{i}": leaf for i, leaf in enumerate(jax.tree.leaves(params))}
    leaves |= {f"optimizer.{i}": leaf for i, leaf in enumerate(jax.tree.leaves(opt_state))}
    safetensors.write(path, leaves, metadata={"facts": json.dumps(facts)})


def load_checkpoint(path: pathlib.Path, params, opt_state):
    file = safetensors.File(path)

    def fill(name, tree):
        leaves, structure = jax.tree.flatten(tree)
        return jax.tree.unflatten(structure, [jnp.array(file[f"{name}.{i}"]) for i in range(len(leaves))])

    return fill("params", params), fill("optimizer", opt_state), json.loads(file.metadata["facts"])


def plot(curve: list[dict], path: pathlib.Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
    millions = [point["bytes"] / 1e6 for point in curve]
    axes.plot(millions, [point["train"] for point in curve], label="training", color="tab:gray")
    axes.plot(millions, [point["held_out"] for point in curve], label="held out", color="tab:blue", marker=".")
    axes.set(xlabel="million bytes read", ylabel="bits per byte", xlim=(0, None), title="The bundled model")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train_tiny", description=(__doc__ or "").splitlines()[0])
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, help="train for so long, in all (default 60)")
    budget.add_argument("--steps", type=int, help="train for so many steps, in all; a resumed run is then the same run")
    parser.add_argument("--batch", type=int, default=4, help="sequences per step (default 4)")
    parser.add_argument("--length", type=int, default=512, help="bytes per sequence (default 512)")
    parser.add_argument("--rate", type=float, default=5e-3, help="highest learning rate (default 0.005)")
    parser.add_argument("--width", type=int, default=tiny.CONFIG.width, help="width of the model (default %(default)s)")
    parser.add_argument("--layers", type=int, default=tiny.CONFIG.num_layers, help="its layers (default %(default)s)")
    parser.add_argument("--every", type=int, default=150, help="steps between checkpoints and samples (default 150)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/tiny"), help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument(
        "--plot", nargs=2, type=pathlib.Path, metavar=("JSON", "PNG"), help="draw a curve.json, no more"
    )
    args = parser.parse_args(argv)
    for name in ("minutes", "steps", "batch", "length", "rate", "width", "layers", "every"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"--{name} is {value}; give more than 0")
    if args.steps is None and args.minutes is None:
        args.minutes = 60.0
    return args


def train(args: argparse.Namespace) -> int:
    checkpoint = args.out / "checkpoint.safetensors"
    if args.resume and not checkpoint.exists():
        raise Refused(f"no checkpoint in {args.out}; leave out --resume to start a run there")
    if not args.resume and checkpoint.exists():
        raise Refused(f"{args.out} holds a run; add --resume to go on with it, or name another --out")
    args.out.mkdir(parents=True, exist_ok=True)

    config = dataclasses.replace(tiny.CONFIG, width=args.width, num_layers=args.layers)
    init, train_step, evaluate = make_functions(config)
    run = {name: getattr(args, name) for name in ("batch", "length", "rate", "width", "layers")}
    facts = {"run": run, "python": sys.version.split()[0], "step": 0, "seconds": 0.0, "curve": []}
    if args.resume:
        try:
            facts = json.loads(safetensors.File(checkpoint).metadata["facts"])
        except (ValueError, KeyError) as error:
            raise Refused(f"{error}; delete it to start anew") from error
        changed = [f"--{name} {facts['run'][name]}, not {run[name]}" for name in run if run[name] != facts["run"][name]]
        if changed:
            raise Refused(f"the run in {args.out} has {', '.join(changed)}; resume it with the same")
        params, opt_state, facts = load_checkpoint(checkpoint, *jax.eval_shape(init, jax.random.key(0)))
    else:
        params, opt_state = init(jax.random.key(0))
    facts["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(params))

    data, held_out = corpus()
    facts["corpus"] = {"train": len(data), "held_out": len(held_out)}
    print(f"{len(data):,} bytes to train on, {len(held_out):,} held out; {facts['parameters']:,} parameters")
    starts = range(0, len(held_out) - args.length, args.length)
    checks = np.stack([held_out[i : i + args.length + 1] for i in starts]).astype(np.int32)

    def held_out_bits(rows: np.ndarray) -> float:
        size = min(16, len(rows))
        groups = [rows[i : i + size] for i in range(0, len(rows) - size + 1, size)]
        return round(float(np.mean([evaluate(params, group) for group in groups])) / math.log(2), 4)

    def keep() -> None:
        save_checkpoint(checkpoint, params, opt_state, facts)
        jaxkv.save_state(args.out / "model.safetensors", params, dtype="float16")
        (args.out / "curve.json").write_text(json.dumps(facts, indent=1) + "\n")
        plot(facts["curve"], args.out / "curve.png")

    def measure(losses: list) -> None:
        train_bits = round(float(np.mean(jax.device_get(losses))) / math.log(2), 4)
        some = checks[:: max(1, len(checks) // 32)]  # the same ones each time
        point = {"step": facts["step"], "bytes": facts["step"] * args.batch * args.length}
        point |= {"seconds": round(facts["seconds"]), "train": train_bits, "held_out": held_out_bits(some)}
        facts["curve"].append(point)
        keep()
        tqdm.tqdm.write(f"step {point['step']}: {train_bits} bits per byte, held out {point['held_out']}")

    stop = False

    def interrupted(*_) -> None:
        nonlocal stop
        stop = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the next Ctrl-C ends at once

    before = signal.signal(signal.SIGINT, interrupted)
    losses: list = []
    spent, began = facts["seconds"], time.monotonic()
    bar = tqdm.tqdm(total=100, bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}", mininterval=1)
    try:
        while not stop:
            progress = facts["step"] / args.steps if args.steps else facts["seconds"] / (60 * args.minutes)
            bar.update(min(100.0, 100 * progress) - bar.n)
            if progress >= 1:
                break
            tokens = batch(data, facts["step"], args.batch, args.length)
            rate = jnp.float32(learning_rate(progress, args.rate))
            params, opt_state, value = train_step(params, opt_state, tokens, rate)
            losses.append(value)
            facts["step"] += 1
            if facts["step"] % 10 == 0:
                bar.set_postfix_str(f"step {facts['step']}, {float(value) / math.log(2):.3f} bits per byte")
            facts["seconds"] = spent + time.monotonic() - began
            if facts["step"] % args.every == 0:
                measure(losses)
                losses = []
                prompt = PROMPTS[facts["step"] // args.every % len(PROMPTS)]
                tqdm.tqdm.write(sample(config, params, prompt, 200) + "\n")
        if losses:
            measure(losses)
        if not stop:
            facts["held_out_bits"] = held_out_bits(checks)
            keep()
            tqdm.tqdm.write(f"all that was held out: {facts['held_out_bits']} bits per byte")
    finally:
        bar.close()
        signal.signal(signal.SIGINT, before)
    if stop:
        print(f"train_tiny: stopped after step {facts['step']}; add --resume to go on", file=sys.stderr)
        return 130
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        if args.plot:
            plot(json.loads(args.plot[0].read_text())["curve"], args.plot[1])
            return 0
        return train(args)
    except KeyboardInterrupt:
        print("train_tiny: stopped; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    except (OSError, Refused) as error:
        print(f"train_tiny: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
