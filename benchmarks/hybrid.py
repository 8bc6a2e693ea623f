"""A hybrid of recurrent and attending layers: milliseconds per token of jaxkv and transformers at three contexts.

The model has Qwen3-Next's form at a small size: 8 layers of width 512, three gated delta layers to one that attends,
32 experts of which a token runs through 4, beside a shared one; about 100 M parameters, float32, random. Beside it the
same model of gated delta layers alone, whose time per token must not grow with the text.

    python benchmarks/hybrid.py                                # tables
    python benchmarks/hybrid.py --out docs/data/hybrid.json    # the same, kept
    python benchmarks/hybrid.py --quick                        # tiny sizes: does it run?

Contestants, turns and the comparison of tokens are those of benchmarks/model.py. transformers runs as it is installed:
without the packages `fla` and `causal-conv1d`, which are for GPUs, it computes gated delta layers in plain torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
from typing import Any

from common import warn_if_busy
from model import Shape, measure, table

NAMES = ("jaxkv", "transformers DynamicCache", "plain read")


@dataclasses.dataclass(frozen=True)
class Hybrid(Shape):
    family: str = "qwen3_next"
    num_layers: int = 8
    width: int = 512
    num_heads: int = 8
    num_kv_heads: int = 2
    key_heads: int = 4  # of the recurrent layers, and twice as many of values
    state_dim: int = 128
    num_experts: int = 32
    experts_per_token: int = 4
    expert_dim: int = 128
    attends_every: int | None = 4  # None: no layer attends

    def of_family(self) -> dict[str, Any]:
        attends = [self.attends_every and not (i + 1) % self.attends_every for i in range(self.num_layers)]
        return {
            "layer_types": ["full_attention" if each else "linear_attention" for each in attends],
            "linear_num_key_heads": self.key_heads,
            "linear_num_value_heads": 2 * self.key_heads,
            "linear_key_head_dim": self.state_dim,
            "linear_value_head_dim": self.state_dim,
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.experts_per_token,
            "moe_intermediate_size": self.expert_dim,
            "shared_expert_intermediate_size": self.expert_dim,
        }


TINY = Hybrid(
    num_layers=2,
    width=32,
    num_heads=4,
    head_dim=8,
    key_heads=2,
    state_dim=8,
    num_experts=4,
    experts_per_token=2,
    expert_dim=16,
    attends_every=2,
    vocab_size=256,
    capacity=64,
    max_block=16,
    contexts=(8, 40),
    prefill=32,
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, help="where the numbers go (json)")
    parser.add_argument(
        "--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=f"of: {', '.join(NAMES)}"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes and two rounds: does it run?")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant at each context (default 5)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens decoded per turn (default 32)")
    parser.add_argument("--threads", type=int, default=2, help="cores to use (default 2)")
    args = parser.parse_args(argv)
    shape, rounds, tokens = (TINY, 2, 8) if args.quick else (Hybrid(), args.rounds, args.tokens)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    found, failed = {}, False
    alone = [name for name in args.only if not name.startswith("transformers")]
    for kind, one, names in (
        ("hybrid", shape, list(args.only)),
        ("recurrent layers alone", dataclasses.replace(shape, attends_every=None), alone),
    ):
        data = found[kind] = measure(one, names, rounds=rounds, tokens=tokens, threads=args.threads)
        print(f"{kind}, {data['model']['parameters'] / 1e6:.0f} M parameters\n{table(data)}\n")
        failed |= any(why.startswith("failed") for why in data["left_out"].values())
    warn_if_busy(found["hybrid"])
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
