"""Experts computed for their own tokens alone, against the usual loop that runs all tokens through all of them.

    python benchmarks/experts.py [--rounds 5] [--quick]

Of a layer of experts of the proportions of Qwen3-30B-A3B at a quarter of its width, for some numbers of tokens: the
median time of each way, and their ratio within this run. `jax.lax.ragged_dot` stands beside them for few tokens alone:
on a CPU it is a product with every expert.
"""

from __future__ import annotations

import argparse

import common  # before jaxkv, which may not be installed
import jax
import jax.numpy as jnp
from flax import nnx

from jaxkv.models import DecoderConfig, ExpertsConfig
from jaxkv.models.experts import Experts


def all_experts(module, x):
    """Every token through every expert, weighted by 0 where it was not sent."""
    weights, chosen = module.route(module.router(x[0]))
    count = x.shape[1]
    spread = jnp.zeros((count, module.config.num_experts)).at[jnp.arange(count)[:, None], chosen].set(weights)

    def one(total, expert):
        weight, gate, up, down = expert
        return total + weight[:, None] * ((jax.nn.silu(x[0] @ gate) * (x[0] @ up)) @ down), None

    parts = (module.gate[...], module.up[...], module.down[...])
    return jax.lax.scan(one, jnp.zeros_like(x[0]), (spread.T, *parts))[0]


def ragged(module, x):
    """Tokens ordered by expert, and JAX's product of ragged groups."""
    weights, chosen = module.route(module.router(x[0]))
    order = jnp.argsort(chosen.ravel())
    sizes = jnp.bincount(chosen.ravel(), length=module.config.num_experts).astype(jnp.int32)
    owners = order // chosen.shape[1]
    gate, up = (jax.lax.ragged_dot(x[0][owners], part[...], sizes) for part in (module.gate, module.up))
    y = jax.lax.ragged_dot(jax.nn.silu(gate) * up, module.down[...], sizes)
    return jnp.zeros_like(x[0]).at[owners].add(y * weights.ravel()[order][:, None])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    arguments = parser.parse_args(argv)
    width, hidden, experts, each = (16, 8, 8, 2) if arguments.quick else (512, 192, 128, 8)
    config = DecoderConfig(vocab_size=8, width=width, num_layers=1, num_heads=1)
    module = Experts(config, ExpertsConfig(experts, each, hidden), rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(module)
    facts = common.about(("jax", "jaxlib"))
    common.warn_if_busy(facts)
    print(f"{experts} experts of {width} x {hidden}, {each} for a token, float32; {facts}")
    for count in (1, 8) if arguments.quick else (1, 8, 64, 512):
        x = jax.random.normal(jax.random.key(count), (1, count, width))
        ways = {"own tokens": lambda m, x: m(x)[0], "all tokens": all_experts}
        if count <= 8:
            ways["ragged_dot"] = ragged
        runs, results = {}, {}
        for name, way in ways.items():
            run = jax.jit(lambda state, x, way=way: way(nnx.merge(graphdef, state), x))
            results[name] = run(state, x)
            runs[name] = common.timed(lambda run=run, x=x: jax.block_until_ready(run(state, x)))
        for name, result in results.items():
            if not jnp.allclose(result, results["own tokens"], atol=1e-3):
                raise RuntimeError(f"{name} gives other numbers")
        times = common.interleave(runs, rounds=arguments.rounds, seconds=0.01 if arguments.quick else 0.5)
        medians = common.medians(times)
        told = ", ".join(f"{name} {ms:.2f} ms ({ms / medians['own tokens']:.1f}x)" for name, ms in medians.items())
        print(f"{count:5} tokens: {told}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
