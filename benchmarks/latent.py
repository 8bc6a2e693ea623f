"""Multi-head latent attention: bytes per token, and the time of a decode step and of a prompt, beside transformers.

    python benchmarks/latent.py                                # tables
    python benchmarks/latent.py --out docs/data/latent.json    # the same, kept
    python benchmarks/latent.py --quick                        # tiny sizes: does it run?

One layer of attention with its projections, of DeepSeek-V3's proportions: its heads, latents and rotary keys, an eighth
of its width and number of heads. A step reads one token [1, 1, D] and attends to all that is held. jaxkv runs in a
compiled loop that carries its cache, as generation does. transformers' `DeepseekV3Attention` runs as it is used, with a
`DynamicCache`, which holds latents too (until transformers 4 it held keys and values of all heads) and makes keys and
values of all heads of them in each step. Both have the same weights, and must give the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import about, count_cores, interleave, medians, say, warn_if_busy
from flax import nnx

import jaxkv
from jaxkv import Dense, Int4, Int8, LayerSpec

STORAGES: dict[str, dict[str, Any]] = {
    "float32": {"storage": Dense("float32")},
    "int8": {"storage": Int8()},
    "int8, rotary keys int4": {"storage": Int8(), "rotary_storage": Int4()},
    "int4": {"storage": Int4()},
}
THEIRS = "transformers"


@dataclasses.dataclass(frozen=True)
class Setting:
    width: int = 896
    heads: int = 16
    rank: int = 512
    rotary_dim: int = 64
    head_dim: int = 128
    value_dim: int = 128
    query_rank: int = 192
    held: int = 4000
    block: int = 500  # of the prompt


QUICK = Setting(32, 2, 16, 16, 8, 8, 12, 64, 32)


def layer(s: Setting) -> jaxkv.nnx.LatentAttention:
    return jaxkv.nnx.LatentAttention(
        s.heads,
        s.width,
        rank=s.rank,
        rotary_dim=s.rotary_dim,
        head_dim=s.head_dim,
        value_dim=s.value_dim,
        query_rank=s.query_rank,
        rotary=jaxkv.Rotary(interleaved=True),
        rngs=nnx.Rngs(0),
    )


def sizes(s: Setting) -> list[dict[str, Any]]:
    """Bytes of one more token."""
    rows = []
    for name, storages in STORAGES.items():
        spec = LayerSpec.latent(s.rank, s.rotary_dim, **storages)
        rows.append({"storage": name, "bytes": jaxkv.plan_memory([spec], 1, s.held).bytes_per_token})
    heads = LayerSpec(jaxkv.Full(), s.heads, s.head_dim + s.rotary_dim, s.value_dim)
    rows.append({"storage": "of all heads", "bytes": jaxkv.plan_memory([heads], 1, s.held).bytes_per_token})
    return rows


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def prompt(graphdef: Any, params: Any, x: Any, cache: Any) -> Any:
    cache, step = cache.begin(cache.lengths[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)[None])
    y, put = nnx.merge(graphdef, params)(x, cache.layers[0], step)
    return y, cache.with_layers([put])


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def loop(graphdef: Any, params: Any, x: Any, cache: Any, steps: Any) -> Any:
    """The same token at the same place again and again; what it gives is added to it, so that steps wait."""
    attn, place = nnx.merge(graphdef, params), cache.lengths[:, None]

    def body(_, carry):
        cache, y = carry
        cache, step = cache.begin(place)
        y, put = attn(x + 0 * y, cache.layers[0], step)
        return cache.with_layers([put]), y

    return jax.lax.fori_loop(0, steps, body, (cache, x))


def ours(s: Setting, attn: Any, x: np.ndarray, storages: dict[str, Any]) -> tuple[Any, float, np.ndarray]:
    """Returns what runs so many steps, the seconds of the prompt, and what the next token gives."""
    graphdef, params = nnx.split(jaxkv.nnx.fuse(attn))
    spec = dataclasses.replace(LayerSpec.latent(s.rank, s.rotary_dim, **storages), rotary=attn.layer_spec().rotary)
    seconds = 0.0
    for _ in range(2):  # the first one compiles
        cache = jaxkv.Cache.init([spec], 1, s.held + 1, max_block=s.block)
        begin = time.perf_counter()
        for start in range(0, s.held, s.block):
            y, cache = prompt(graphdef, params, x[:, start : start + s.block], cache)
        jax.block_until_ready(y)
        seconds = time.perf_counter() - begin
    token = jnp.asarray(x[:, s.held :])

    def run(steps: int) -> float:
        nonlocal cache, y
        begin = time.perf_counter()
        cache, y = loop(graphdef, params, token, cache, jnp.int32(steps))
        y.block_until_ready()
        cache = dataclasses.replace(cache, lengths=jnp.full((1,), s.held, jnp.int32))  # the place stays taken
        return time.perf_counter() - begin

    run(1)
    return run, seconds, np.asarray(y)


def theirs(s: Setting, attn: Any, x: np.ndarray) -> tuple[Any, float, np.ndarray]:
    import torch
    from transformers import DeepseekV3Config, DynamicCache
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

    torch.set_num_threads(count_cores())
    config = DeepseekV3Config(
        hidden_size=s.width,
        num_hidden_layers=1,
        num_attention_heads=s.heads,
        num_key_value_heads=s.heads,
        kv_lora_rank=s.rank,
        q_lora_rank=s.query_rank,
        qk_nope_head_dim=s.head_dim,
        qk_rope_head_dim=s.rotary_dim,
        v_head_dim=s.value_dim,
        max_position_embeddings=s.held + 1,
        attn_implementation="sdpa",
    )
    module, rotary = deepseek.DeepseekV3Attention(config, 0).eval(), deepseek.DeepseekV3RotaryEmbedding(config)
    params = jaxkv.state_dict(attn)
    names = {
        "q_a_proj": "query_down.kernel",
        "q_b_proj": "query_up.kernel",
        "kv_a_proj_with_mqa": "latent.kernel",
        "kv_b_proj": "expand",
        "q_a_layernorm": "query_norm.scale",
        "kv_a_layernorm": "latent_norm.scale",
    }
    state = {f"{name}.weight": np.asarray(params[key]) for name, key in names.items()}
    state = {name: w if w.ndim == 1 else w.reshape(w.shape[0], -1).T for name, w in state.items()}
    state["o_proj.weight"] = np.asarray(params["out.kernel"]).reshape(-1, s.width).T
    module.load_state_dict({name: torch.tensor(w) for name, w in state.items()})
    x = torch.tensor(x)

    @torch.inference_mode()
    def call(cache: Any, begin: int, end: int) -> Any:
        places = torch.arange(begin, end)[None]
        mask = (torch.arange(end)[None] <= places[0][:, None])[None, None] if end - begin > 1 else None
        return module(x[:, begin:end], rotary(x, places), mask, cache=cache)[0]

    cache = DynamicCache(config=config)
    begin = time.perf_counter()
    for start in range(0, s.held, s.block):
        call(cache, start, start + s.block)
    seconds = time.perf_counter() - begin

    def run(steps: int) -> float:
        total = 0.0
        for _ in range(steps):
            begin = time.perf_counter()
            call(cache, s.held, s.held + 1)
            total += time.perf_counter() - begin
            cache.crop(-1)
        return total

    y = call(cache, s.held, s.held + 1)
    cache.crop(-1)
    held = cache.layers[0]
    if held.keys.shape[-1] + held.values.shape[-1] != s.rank + s.rotary_dim:
        raise RuntimeError("this version of transformers does not keep latents")
    return run, seconds, y.numpy()


def measure(s: Setting, *, rounds: int, seconds: float) -> dict[str, Any]:
    attn = layer(s)
    x = np.random.default_rng(0).standard_normal((1, s.held + 1, s.width), dtype=np.float32)
    runs, prompts, answers = {}, {}, {}
    made = {name: functools.partial(ours, s, attn, x, storages) for name, storages in STORAGES.items()}
    for name, make in {**made, THEIRS: functools.partial(theirs, s, attn, x)}.items():
        say(name)
        try:
            runs[name], prompts[name], answers[name] = make()
        except ImportError as error:
            say(f"{name}: {error}")
    if THEIRS in answers:
        worst = float(np.abs(answers["float32"] - answers[THEIRS]).max())
        if worst > 1e-4:
            raise RuntimeError(f"jaxkv and transformers differ by {worst}")
    error = {name: float(np.linalg.norm(y - answers["float32"]) / np.linalg.norm(y)) for name, y in answers.items()}
    return {"ms": interleave(runs, rounds=rounds, seconds=seconds), "prompt_s": prompts, "error": error}


def table(found: dict[str, Any]) -> str:
    rows = {row["storage"]: row["bytes"] for row in found["bytes"]}
    lines = ["bytes of one more token                    float32 = 1"]
    lines += [f"{name:>30} {count:8,} {count / rows['float32']:8.3f}" for name, count in rows.items()]
    ms = medians(found["ms"])
    peer = ms.get(THEIRS)
    lines.append("a decode step, ms; the prompt, s; error of what the token gives; times faster than transformers")
    for name, value in ms.items():
        faster = "" if peer is None else f"{peer / value:8.1f}x"
        lines.append(f"{name:>30} {value:8.3f} {found['prompt_s'][name]:8.2f} {found['error'][name]:8.2%} {faster}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, help="where the numbers go (json)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and two rounds: does it run?")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.2, help="about how long one turn lasts")
    parser.add_argument("--held", type=int, help="tokens in the cache, a multiple of 500")
    args = parser.parse_args(argv)
    s = QUICK if args.quick else Setting()
    if args.held:
        s = dataclasses.replace(s, held=args.held)
    rounds, seconds = (2, 0.001) if args.quick else (args.rounds, args.seconds)
    found = about(("jax", "jaxlib", "numpy", "torch", "transformers"))
    found |= {"setting": dataclasses.asdict(s), "bytes": sizes(s), **measure(s, rounds=rounds, seconds=seconds)}
    print(table(found))
    warn_if_busy(found)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
