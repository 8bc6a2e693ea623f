"""Granite 4: most layers are Mamba-2, every few one attends; experts beside a shared one, or an MLP."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxkv.models.decoder import DecoderConfig
from jaxkv.models.experts import ExpertsConfig
from jaxkv.models.families import llama, rope
from jaxkv.models.families.fields import (
    FLAG,
    HEADS,
    MAX_LAYERS,
    WIDTH,
    Choice,
    Field,
    Fields,
    List,
    Number,
    Problems,
)
from jaxkv.models.families.granite import FACTORS, GRANITEMOE
from jaxkv.models.families.mixtures import chosen
from jaxkv.models.families.reach import FULL, each_layer
from jaxkv.models.families.table import Family, Tensor, linear, norm
from jaxkv.models.mixers import Mamba2Config

_LAYER, _OURS = "model.layers.{}", "layers.{}"
_MAMBA = "mamba"


@dataclasses.dataclass(frozen=True)
class NoLimit:
    """The limits of a time step, where there are none: 0 and infinity, as JSON or as transformers writes it."""

    def read(self, name: str, value: Any, problems: Problems) -> Any:
        if value not in ([0.0, float("inf")], [0.0, {"__float__": "Infinity"}]):
            problems.unsupported(name, value, "only 0 and infinity are, since transformers itself clamps blocks alone")


@dataclasses.dataclass(frozen=True)
class AutoOr:
    """A size, or "auto" for what others make of it."""

    def read(self, name: str, value: Any, problems: Problems) -> Any:
        return None if value == "auto" else HEADS.read(name, value, problems)


def mamba2(fields: Fields, width: int, eps: float) -> Mamba2Config:
    """Returns the Mamba-2 layers of a hybrid, by the fields that Granite 4 and Bamba share."""
    heads, head_dim, groups = fields["mamba_n_heads"], fields["mamba_d_head"], fields["mamba_n_groups"]
    inner = fields["mamba_expand"] * width
    if inner % heads or (head_dim is not None and head_dim * heads != inner):
        raise fields.wrong("mamba_n_heads", f'with "mamba_d_head" it must make up the {inner} of "mamba_expand"')
    if heads % groups:
        raise fields.wrong("mamba_n_groups", f'it must divide the {heads} in "mamba_n_heads"')
    return Mamba2Config(
        heads,
        inner // heads,
        fields["mamba_d_state"],
        groups,
        fields["mamba_d_conv"],
        eps,
        use_bias=fields["mamba_proj_bias"],
        conv_bias=fields["mamba_conv_bias"],
    )


MAMBA_FIELDS = {
    "mamba_n_heads": Field(HEADS, 128),
    "mamba_n_groups": Field(HEADS, 1),
    "mamba_d_state": Field(HEADS, 256),
    "mamba_d_head": Field(AutoOr(), "auto"),
    "mamba_d_conv": Field(Number(2, 1024, whole=True), 4),
    "mamba_expand": Field(HEADS, 2),
    "mamba_conv_bias": Field(FLAG, True),
    "mamba_proj_bias": Field(FLAG, False),
    "time_step_limit": Field(NoLimit(), None),
}


def mamba2_tensors(file: str, ours: str) -> tuple[Tensor, ...]:
    """Returns the tensors of Mamba-2 layers."""
    return (
        *linear(f"{file}.in_proj", f"{ours}.in_proj"),
        Tensor(f"{file}.conv1d.weight", (f"{ours}.conv.kernel",), "reversed"),
        Tensor(f"{file}.conv1d.bias", (f"{ours}.conv.bias",)),
        Tensor(f"{file}.A_log", (f"{ours}.a_log",)),
        Tensor(f"{file}.D", (f"{ours}.d",)),
        Tensor(f"{file}.dt_bias", (f"{ours}.dt_bias",)),
        *norm(f"{file}.norm", f"{ours}.norm"),
        *linear(f"{file}.out_proj", f"{ours}.out_proj"),
    )


def _granite_hybrid(fields: Fields) -> DecoderConfig:
    shared = llama.sizes(fields)
    inner = fields["shared_intermediate_size"]
    kinds = each_layer(fields, lambda i: _MAMBA)
    experts = None
    if fields["num_local_experts"]:
        count, each = chosen(fields, "num_local_experts")
        if not each:
            raise fields.wrong("num_experts_per_tok", 'it must be at least 1 where "num_local_experts" is')
        experts = ExpertsConfig(count, each, shared["mlp_dim"], shared_dim=inner)
    mamba = mamba2(fields, shared["width"], shared["norm_eps"])
    turns = fields["position_embedding_type"] == "rope"
    return DecoderConfig(
        **{**shared, "mlp_dim": inner},
        mixers=tuple(None if kind == FULL else mamba for kind in kinds),
        rotary=rope.rotary(fields, shared["head_dim"]) if turns else None,
        activation=fields["hidden_act"],
        use_bias=llama.biases(fields["attention_bias"]),
        experts=experts,
        embed_scale=fields["embedding_multiplier"],
        attention_scale=fields["attention_multiplier"],
        residual_scale=fields["residual_multiplier"],
        logit_scale=1 / fields["logits_scaling"],
    )


_SHARED = f"{_LAYER}.shared_mlp"
GRANITE_HYBRID = Family(
    _granite_hybrid,
    {
        **llama.FIELDS,
        **FACTORS,
        **MAMBA_FIELDS,
        "num_local_experts": Field(Number(0, 2**14, whole=True), 8),
        "num_experts_per_tok": Field(Number(0, 2**14, whole=True), 2),
        "shared_intermediate_size": Field(WIDTH, 1024),
        "position_embedding_type": Field(Choice({"rope": "rope", "nope": "nope"}), None),
        "layer_types": Field(
            List(
                Choice({"mamba": _MAMBA, "linear_attention": _MAMBA, FULL: FULL, "attention": FULL}),
                MAX_LAYERS,
            ),
            None,
            also=("layers_block_type",),
        ),
    },
    (
        *GRANITEMOE.tensors,
        *mamba2_tensors(f"{_LAYER}.mamba", f"{_OURS}.mixer"),
        # Beside experts it is one more of them, without any the MLP.
        *linear(f"{_SHARED}.input_linear", f"{_OURS}.mlp.shared.gate", f"{_OURS}.mlp.shared.up"),
        *linear(f"{_SHARED}.output_linear", f"{_OURS}.mlp.shared.down"),
        *linear(f"{_SHARED}.input_linear", f"{_OURS}.mlp.gate", f"{_OURS}.mlp.up"),
        *linear(f"{_SHARED}.output_linear", f"{_OURS}.mlp.down"),
    ),
    renames=GRANITEMOE.renames,
    ignored=llama.IGNORED,
)
