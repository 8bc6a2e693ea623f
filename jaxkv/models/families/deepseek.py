"""DeepSeek-V2, V3 (R1, Kimi K2) and V3.2: latent attention, of chosen tokens; experts in groups beside a shared MLP."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jaxkv.models.decoder import DecoderConfig
from jaxkv.models.experts import ExpertsConfig
from jaxkv.models.families import llama, rope
from jaxkv.models.families.fields import (
    FLAG,
    HEADS,
    LENGTH,
    MAX_LAYERS,
    POSITIVE,
    VOCABULARY,
    WIDTH,
    Choice,
    Field,
    Fields,
    List,
    Number,
)
from jaxkv.models.families.mixtures import NUM_EXPERTS, QWEN_EXPERTS, STACKED, chosen, shared_expert
from jaxkv.models.families.reach import each_layer
from jaxkv.models.families.table import Family, Ignored, Tensor, linear, norm
from jaxkv.models.latent import LatentConfig
from jaxkv.nn.indexer import Indexer
from jaxkv.nn.rotary import YarnScaling

_LAYER, _OURS = "model.layers.{}", "layers.{}"


def routed_fields(
    count: int, per_token: Any, size: int, groups: Any, shared: int, dense: int, scale: float
) -> dict[str, Field]:
    """Returns the fields that `routed` reads.

    Args:
      count, per_token, size, groups, shared, dense, scale: what counts where the file has none: experts, how many a
        token is sent to (a Field of its own), their size, (groups, how many are taken), shared ones, first layers
        without experts, the factor of the scores.
    """
    return {
        "n_routed_experts": dataclasses.replace(
            NUM_EXPERTS, kind=HEADS, default=count, also=("num_experts", "num_local_experts")
        ),
        "num_experts_per_tok": per_token,
        "moe_intermediate_size": Field(WIDTH, size),
        "n_group": Field(HEADS, groups[0]),
        "topk_group": Field(HEADS, groups[1]),
        "n_shared_experts": Field(Number(1, 2**10, whole=True), shared),
        "first_k_dense_replace": Field(Number(0, MAX_LAYERS, whole=True), dense),
        "mlp_layer_types": Field(List(Choice({"dense": False, "sparse": True}), MAX_LAYERS), None),
        "routed_scaling_factor": Field(POSITIVE, scale),
    }


def routed(fields: Fields, groups: int, kept: int, **rest: Any) -> tuple[ExpertsConfig | None, ...]:
    """Returns the experts of each layer; the first ones have none.

    Args:
      fields: with those of `routed_fields` among them.
      groups: in how many groups the experts lie.
      kept: of how many of them a token's experts are taken.
      **rest: of ExpertsConfig.
    """
    count, each = chosen(fields, "n_routed_experts")
    fewest = rest.get("best_of_group", 2)
    if count % groups or count < fewest * groups:
        raise fields.wrong(
            "n_group", f'it must divide the {count} in "n_routed_experts", and leave {fewest} to a group'
        )
    if kept > groups or each > kept * (count // groups):
        raise fields.wrong(
            "topk_group",
            f'it must be at most the {groups} in "n_group", with room for the {each} in "num_experts_per_tok"',
        )
    experts = ExpertsConfig(
        count,
        each,
        fields["moe_intermediate_size"],
        scale=fields["routed_scaling_factor"],
        num_groups=groups,
        groups_per_token=kept,
        shared_dim=fields["moe_intermediate_size"] * fields["n_shared_experts"],
        **rest,
    )
    dense = fields["first_k_dense_replace"]
    kinds = each_layer(fields, lambda i: i >= dense, "mlp_layer_types")
    return tuple(experts if kind else None for kind in kinds)


def sigmoid_routed(fields: Fields) -> tuple[ExpertsConfig | None, ...]:
    """Returns the experts of each layer as DeepSeek-V3 chooses them."""
    return routed(
        fields,
        fields["n_group"],
        fields["topk_group"],
        scores="sigmoid",
        normalized=fields["norm_topk_prob"],
        choice_bias=True,
    )


def _decoder(
    fields: Fields,
    experts: Any,
    *,
    mlp_bias: bool = False,
    interleaved: bool = True,
    indexer: Indexer | None = None,
) -> DecoderConfig:
    heads, dim = fields["num_attention_heads"], fields["qk_rope_head_dim"]
    if dim % 2:
        raise fields.unsupported("qk_rope_head_dim", "dimensions are rotated in pairs")
    rotary = rope.rotary(fields, dim, interleaved=interleaved)
    return DecoderConfig(
        vocab_size=fields["vocab_size"],
        width=fields["hidden_size"],
        num_layers=fields["num_hidden_layers"],
        num_heads=heads,
        head_dim=fields["qk_nope_head_dim"],
        mlp_dim=fields["intermediate_size"],
        norm_eps=fields["rms_norm_eps"],
        tied=fields["tie_word_embeddings"],
        latent=LatentConfig(fields["kv_lora_rank"], dim, fields["v_head_dim"], fields["q_lora_rank"], indexer),
        rotary=rotary,
        attention_scale=(fields["qk_nope_head_dim"] + dim) ** -0.5 * _growth(rotary.scaling) ** 2,
        activation=fields["hidden_act"],
        use_bias=llama.biases(fields["attention_bias"], mlp_bias),
        experts=experts,
    )


def _growth(scaling: Any) -> float:
    """Returns what YaRN multiplies the scores by, beside what it does to queries and keys; its root."""
    if not isinstance(scaling, YarnScaling) or not scaling.mscale_all_dim or scaling.factor <= 1:
        return 1.0
    return 0.1 * scaling.mscale_all_dim * math.log(scaling.factor) + 1.0


def _deepseek_v2(fields: Fields) -> DecoderConfig:
    groups = (1, 1)
    if fields["topk_method"] == "group_limited_greedy":
        for name in ("n_group", "topk_group"):
            if fields[name] is None:
                raise fields.wrong("topk_method", f'it needs "{name}"')
        groups = fields["n_group"], fields["topk_group"]
    # "norm_topk_prob" has no effect, as in transformers
    experts = routed(fields, *groups, best_of_group=1, normalized=False)
    return _decoder(fields, experts, mlp_bias=fields["mlp_bias"])


def _deepseek_v3(fields: Fields) -> DecoderConfig:
    return _decoder(fields, sigmoid_routed(fields), interleaved=fields["rope_interleave"])


def _deepseek_v32(fields: Fields) -> DecoderConfig:
    if fields["index_head_dim"] < fields["qk_rope_head_dim"]:
        must = f'it must be at least the {fields["qk_rope_head_dim"]} in "qk_rope_head_dim", which are rotated'
        raise fields.wrong("index_head_dim", must)
    indexer = Indexer(fields["index_n_heads"], fields["index_head_dim"], fields["index_topk"])
    return _decoder(fields, sigmoid_routed(fields), indexer=indexer)


_FIELDS = {
    **{name: field for name, field in llama.FIELDS.items() if name not in ("num_key_value_heads", "head_dim")},
    "kv_lora_rank": Field(WIDTH, 512),
    "q_lora_rank": Field(WIDTH, 1536, null=None),
    "qk_nope_head_dim": Field(WIDTH, 128),
    "qk_rope_head_dim": Field(WIDTH, 64),
    "v_head_dim": Field(WIDTH, 128),
    "attention_bias": Field(FLAG, False),
}
ROUTER_BIAS = Tensor(f"{_LAYER}.mlp.gate.e_score_correction_bias", (f"{_OURS}.mlp.choice_bias",), exact=True)
_ATTENTION = (
    *linear(f"{_LAYER}.self_attn.q_proj", f"{_OURS}.attention.query"),
    *linear(f"{_LAYER}.self_attn.q_a_proj", f"{_OURS}.attention.query_down"),
    *norm(f"{_LAYER}.self_attn.q_a_layernorm", f"{_OURS}.attention.query_norm"),
    *linear(f"{_LAYER}.self_attn.q_b_proj", f"{_OURS}.attention.query_up"),
    *linear(f"{_LAYER}.self_attn.kv_a_proj_with_mqa", f"{_OURS}.attention.latent"),
    *norm(f"{_LAYER}.self_attn.kv_a_layernorm", f"{_OURS}.attention.latent_norm"),
    Tensor(f"{_LAYER}.self_attn.kv_b_proj.weight", (f"{_OURS}.attention.expand",), "out_in", 1),
    *linear(f"{_LAYER}.self_attn.o_proj", f"{_OURS}.attention.out", num_inner=2),
)
_TENSORS = (
    llama.EMBEDDING,
    *_ATTENTION,
    *llama.MLP,
    *QWEN_EXPERTS,
    *shared_expert(f"{_LAYER}.mlp.shared_experts"),
    *llama.NORMS,
    llama.HEAD,
)
DEEPSEEK_V2 = Family(
    _deepseek_v2,
    {
        **_FIELDS,
        "vocab_size": Field(VOCABULARY, 102_400),
        **routed_fields(64, Field(HEADS), 1407, (None, None), 2, 0, 1.0),
        "topk_method": Field(Choice({name: name for name in ("greedy", "group_limited_greedy")}), "greedy"),
        "mlp_bias": Field(FLAG, False),
    },
    _TENSORS,
    others=STACKED,
    ignored=llama.IGNORED,
)
_PREDICTING = Ignored(  # the layer behind the last one
    r"model\.layers\.(61)\..*",
    "not read, it predicts further tokens",
    lambda config, layer, x: layer < config.num_layers,
)
_V3_FIELDS = {
    **_FIELDS,
    "vocab_size": Field(VOCABULARY, 129_280),
    **routed_fields(256, Field(HEADS, 8), 2048, (8, 4), 1, 3, 2.5),
    "norm_topk_prob": Field(FLAG, True),
}
DEEPSEEK_V3 = Family(
    _deepseek_v3,
    {
        **_V3_FIELDS,
        "max_position_embeddings": Field(LENGTH, 4096),
        "rope_interleave": Field(FLAG, True),
    },
    (*_TENSORS, ROUTER_BIAS),
    others=STACKED,
    ignored=(*llama.IGNORED, _PREDICTING),
)
_INDEXER = f"{_LAYER}.self_attn.indexer"
DEEPSEEK_V32 = Family(
    _deepseek_v32,
    {
        **_V3_FIELDS,
        "max_position_embeddings": Field(LENGTH, 163_840),
        "q_lora_rank": Field(WIDTH, 1536),
        "index_n_heads": Field(HEADS, 64),
        "index_head_dim": Field(WIDTH, 128),
        "index_topk": Field(LENGTH, 2048),
        "mlp_bias": Field(FLAG, False, only=(False,)),
    },
    (
        *_TENSORS,
        ROUTER_BIAS,
        *linear(f"{_INDEXER}.wq_b", f"{_OURS}.attention.index_query"),
        *linear(f"{_INDEXER}.wk", f"{_OURS}.attention.index_key"),
        *norm(f"{_INDEXER}.k_norm", f"{_OURS}.attention.index_norm"),
        *linear(f"{_INDEXER}.weights_proj", f"{_OURS}.attention.index_weights"),
    ),
    others=STACKED,
    ignored=(*llama.IGNORED, _PREDICTING),
)
