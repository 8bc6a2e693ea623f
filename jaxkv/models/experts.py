"""Experts in place of an MLP: of many, each token is sent to a few."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.interpreters import mlir

from jaxkv import meshes
from jaxkv.models.mlp import ACTIVATIONS, MLP
from jaxkv.native import library
from jaxkv.native.library import GROUPS
from jaxkv.native.lowering import on_one_device, primitive

SCORES = ("softmax", "sigmoid")
_MOST_ROWS = 64  # tokens that an expert takes at once, see benchmarks/experts.py
_LEAST = 2**16  # numbers of all experts' matrices of a projection, below which native calls cost more than they bring
_MOST = 2**26  # numbers between the projections that native calls may keep: of all tokens at once, not of one block


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """The experts of a layer, and how tokens are routed to them. Frozen and hashable.

    Args:
      num_experts: how many there are, E.
      per_token: to how many of them a token is sent.
      mlp_dim: inner size of one.
      scores: what a router's logits become: "softmax" over all experts, or the "sigmoid" of each.
      normalized: whether the scores of a token's experts are divided by their sum.
      scale: factor of the scores then.
      choice_bias: whether a learned number per expert is added to its score for the choice alone (DeepSeek).
      num_groups: number of groups of equal size that the experts form, and
      groups_per_token: of how many groups a token's experts are taken: those whose best make the largest sum.
      best_of_group: how many of a group's best are summed for that (DeepSeek-V3: 2, V2: 1).
      weighs_input: whether scores multiply an expert's input instead of its output (Llama 4).
      shared_dim: None, or the inner size of an MLP that all tokens run through as well.
      shared_gate: whether what that gives is multiplied by the sigmoid of a learned projection to one number.
      beside_mlp: whether they are computed beside the layer's MLP, not in its place, both with norms of their own
        (Gemma 4).
      expert_scales: whether a learned number per expert multiplies its scores.
      use_bias: whether router and experts have biases.
      clamped: whether an expert is (up + 1) * gate * sigmoid(1.702 gate), clamped at 7 (gpt-oss), instead of
        act(gate) * up.

    Raises:
      ValueError: for sizes below 1, more experts per token than there are, or groups that don't divide.

    >>> jaxkv.models.ExpertsConfig(num_experts=8, per_token=2, mlp_dim=64).scores
    'softmax'
    """

    num_experts: int
    per_token: int
    mlp_dim: int
    scores: str = "softmax"
    normalized: bool = True
    scale: float = 1.0
    choice_bias: bool = False
    num_groups: int = 1
    groups_per_token: int = 1
    best_of_group: int = 2
    weighs_input: bool = False
    shared_dim: int | None = None
    shared_gate: bool = False
    beside_mlp: bool = False
    expert_scales: bool = False
    use_bias: bool = False
    clamped: bool = False

    def __post_init__(self) -> None:
        for name in (
            "num_experts",
            "per_token",
            "mlp_dim",
            "num_groups",
            "groups_per_token",
            "best_of_group",
            "shared_dim",
        ):
            if (size := getattr(self, name)) is not None and size < 1:
                raise ValueError(f"ExpertsConfig({name}={size}): {name} is at least 1")
        if self.per_token > self.num_experts:
            raise ValueError(f"per_token={self.per_token} is more than num_experts={self.num_experts}")
        if self.scores not in SCORES:
            raise ValueError(f"scores={self.scores!r}: known are {', '.join(SCORES)}")
        if self.num_experts % self.num_groups or self.groups_per_token > self.num_groups:
            raise ValueError(
                f"num_groups={self.num_groups} must divide num_experts={self.num_experts}, and groups_per_token="
                f"{self.groups_per_token} be at most as many"
            )
        if self.per_token > self.groups_per_token * (self.num_experts // self.num_groups):
            raise ValueError(
                f"per_token={self.per_token} experts are more than groups_per_token={self.groups_per_token} groups have"
            )


class Experts(nnx.Module):
    """Experts in place of an MLP: a router sends each token to a few of them, and what they give is added up.

    Only a token's own experts are computed: tokens are ordered by expert and taken in blocks of up to 64, so that an
    expert's weights are read once for a block, and not at all if no token needs it. In a program for one CPU the native
    library multiplies them; derivatives, and what runs elsewhere, are XLA's.

    Args:
      config: a `DecoderConfig`: width, activation and dtypes are looked at.
      experts: what they are.
      rngs: random streams of the parameters.
    """

    def __init__(self, config: Any, experts: ExpertsConfig, *, rngs: nnx.Rngs) -> None:
        count, width, hidden, dtype = experts.num_experts, config.width, experts.mlp_dim, config.param_dtype
        linear = {"param_dtype": dtype, "rngs": rngs}
        self.config, self.dtype, self.activation = experts, config.dtype, config.activation
        # In float32 whatever the model computes in: rounding would choose other experts.
        self.router = nnx.Linear(width, count, use_bias=experts.use_bias, dtype=jnp.float32, **linear)
        self.choice_bias = nnx.Param(jnp.zeros((count,), jnp.float32)) if experts.choice_bias else nnx.data(None)
        scales = nnx.Param(jnp.ones((count,), dtype)) if experts.expert_scales else nnx.data(None)
        self.expert_scales = scales
        init = nnx.initializers.lecun_normal(batch_axis=0)
        for name, sizes in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
            setattr(self, name, nnx.Param(init(rngs.params(), (count, *sizes), dtype)))
            bias = nnx.Param(jnp.zeros((count, sizes[1]), dtype)) if experts.use_bias else nnx.data(None)
            setattr(self, f"{name}_bias", bias)
        self.shared = nnx.data(None) if experts.shared_dim is None else MLP(config, experts.shared_dim, rngs=rngs)
        gate = (
            nnx.Linear(width, 1, use_bias=False, dtype=config.dtype, **linear)
            if experts.shared_gate
            else nnx.data(None)
        )
        self.shared_gate = gate

    def __call__(self, x: Any, routed: Any = None) -> Any:
        """Returns what the experts give for x [B, T, D]; the router reads `routed` [B, T, D], or x."""
        tokens = x.reshape(-1, x.shape[-1])  # [T, D]
        weights, chosen = self.route(self.router(tokens if routed is None else routed.reshape(tokens.shape)))
        total = self._routed(tokens, weights.astype(self.dtype), chosen).reshape(x.shape)
        if self.shared is not None:
            y = self.shared(x)
            total = total + (y if self.shared_gate is None else jax.nn.sigmoid(self.shared_gate(x)) * y)
        return total

    def route(self, logits: Any) -> tuple[Any, Any]:
        """Returns the weights of each token's experts and their numbers: float32 and int32 [T, per_token].

        Args:
          logits: of the router, float32 [T, E].
        """
        config = self.config
        scores = jax.nn.softmax(logits, axis=-1) if config.scores == "softmax" else jax.nn.sigmoid(logits)
        ranks = scores if self.choice_bias is None else scores + self.choice_bias[...][None, :]
        if config.num_groups > 1:
            groups = ranks.reshape(-1, config.num_groups, config.num_experts // config.num_groups)
            best = jnp.sum(
                jax.lax.top_k(groups, min(config.best_of_group, groups.shape[-1]))[0], axis=-1
            )  # [T, groups]
            _, kept = jax.lax.top_k(best, config.groups_per_token)
            is_kept = jnp.any(jnp.arange(config.num_groups)[None, :, None] == kept[:, None, :], axis=-1)
            ranks = jnp.where(is_kept[:, :, None], groups, -jnp.inf).reshape(ranks.shape)
        _, chosen = jax.lax.top_k(ranks, config.per_token)
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
        if config.normalized:
            weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + jnp.float32(1e-20))
        weights = weights * jnp.float32(config.scale)
        if self.expert_scales is not None:
            weights = weights * self.expert_scales[...].astype(weights.dtype)[chosen]
        return weights, chosen

    def _routed(self, tokens: Any, weights: Any, chosen: Any) -> Any:
        """Returns the sum of what the chosen experts [T, k] give for tokens [T, D], [T, D]."""
        names = ("gate", "up", "down") + (("gate_bias", "up_bias", "down_bias") if self.config.use_bias else ())
        operands = (tokens, weights, chosen, *(getattr(self, name)[...].astype(self.dtype) for name in names))
        form = _Form(self.config, self.activation)
        if meshes.explicit_mesh(operands) is not None or not _may_be_native(operands):
            return _in_blocks(*operands, form=form)[0]
        return _run(form, *meshes.vary_alike(operands))


class _Form(NamedTuple):
    """What experts compute."""

    config: ExpertsConfig
    activation: str

    def expert(self, x: Any, project: Callable[[Any, int], Any]) -> Any:
        """Returns what experts give for x [T, D].

        Args:
          x: their inputs.
          project: from an input and the number of a projection, 0 the gate, 1 up and 2 down, to what it gives.
        """
        gate, up = project(x, 0), project(x, 1)
        if not self.config.clamped:
            return project(ACTIVATIONS[self.activation](gate) * up, 2)
        gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
        return project((up + 1) * gate * jax.nn.sigmoid(1.702 * gate), 2)


def _may_be_native(operands: Any) -> bool:
    """Returns whether the native library has such products, and they pay, on a CPU."""
    tokens, _, chosen, gate, *_ = operands
    if tokens.dtype != gate.dtype or gate.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return False
    _, width, hidden = gate.shape
    return gate.size >= _LEAST and chosen.size * 2 * (width + hidden) <= _MOST


def _in_blocks(tokens: Any, weights: Any, chosen: Any, *params: Any, form: _Form) -> list[Any]:
    """Returns the sum of what the chosen experts give, computed in blocks of an expert's tokens, as XLA does it."""
    config = form.config
    (count, each), experts = chosen.shape, config.num_experts
    rows = _rows(count * each, experts)
    order, pairs = _ordered(chosen, experts)
    blocks = -(-pairs // rows)
    ends, first = jnp.cumsum(blocks), jnp.cumsum(pairs) - pairs
    numbers = jnp.arange(min(count * each, count * each // rows + experts), dtype=jnp.int32)
    owners = jnp.sum(ends[None, :] <= numbers[:, None], axis=1, dtype=jnp.int32)  # the expert of each block

    def one_block(total: Any, block: Any) -> tuple[Any, None]:
        number, expert = block

        def read(total: Any) -> Any:
            place = (number - ends[expert] + blocks[expert]) * rows + jnp.arange(rows, dtype=jnp.int32)
            pair = order[jnp.minimum(first[expert] + place, count * each - 1)]
            real = place < pairs[expert]
            weight = jnp.where(real, weights.ravel()[pair], 0)[:, None]
            token = pair // each
            x = tokens[token]
            part = [param[expert] for param in params]

            def project(x: Any, i: int) -> Any:
                return x @ part[i] + part[3 + i][None, :] if config.use_bias else x @ part[i]

            y = form.expert(x * weight, project) if config.weighs_input else weight * form.expert(x, project)
            return total.at[jnp.where(real, token, count)].add(y, mode="drop")

        return jax.lax.cond(number < ends[-1], read, lambda total: total, total), None

    return [jax.lax.scan(one_block, jnp.zeros_like(tokens), (numbers, owners))[0]]


def _by_library(tokens: Any, weights: Any, chosen: Any, *params: Any, form: _Form) -> list[Any]:
    """Returns the same; each projection of all pairs of a token and an expert is one call of the native library."""
    config, dtype = form.config, tokens.dtype
    order, pairs = _ordered(chosen, config.num_experts)

    def project(x: Any, i: int) -> Any:
        result = jax.typeof(x).update(shape=(x.shape[0], params[i].shape[2]), dtype=jnp.float32)
        y = jax.ffi.ffi_call(GROUPS, result)(x.astype(jnp.float32), params[i], pairs).astype(dtype)
        return y + params[3 + i][chosen.ravel()[order]] if config.use_bias else y

    x, weight = tokens[order // chosen.shape[1]], weights.ravel()[order][:, None]
    y = form.expert(x * weight, project) if config.weighs_input else weight * form.expert(x, project)
    places = jnp.zeros_like(order).at[order].set(jnp.arange(chosen.size, dtype=order.dtype), unique_indices=True)
    return [jnp.sum(y[places].reshape(*chosen.shape, -1), axis=1)]


def _ordered(chosen: Any, experts: int) -> tuple[Any, Any]:
    """Returns the pairs of a token and an expert, ordered by expert, and how many of them each expert has."""
    order = jnp.argsort(chosen.ravel(), stable=True)
    return order, jnp.sum(chosen.ravel()[:, None] == jnp.arange(experts)[None, :], axis=0, dtype=jnp.int32)  # [E]


def _lower(ctx: Any, *operands: Any, form: _Form) -> Any:
    native = on_one_device(ctx.module_context) and library.problem() is None
    routed = functools.partial(_by_library if native else _in_blocks, form=form)
    return mlir.lower_fun(routed, multiple_results=True)(ctx, *operands)


def _batched(operands: Any, axes: Any, *, form: _Form) -> Any:
    return jax.vmap(functools.partial(_in_blocks, form=form), in_axes=tuple(axes))(*operands), [0]


experts_p = primitive("jaxkv_experts", lambda tokens, *_, form: [tokens], _batched, _lower, _in_blocks)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _run(form: _Form, *operands: Any) -> Any:
    return experts_p.bind(*operands, form=form)[0]


@_run.defjvp
def _derivative(form: _Form, primals: Any, tangents: Any) -> Any:
    return jax.jvp(lambda *operands: _in_blocks(*operands, form=form)[0], primals, tangents)


def _rows(pairs: int, experts: int) -> int:
    """Returns how many tokens an expert takes at once: about as many as come to each, in a power of two."""
    rows = 1
    while rows < min(pairs / experts, _MOST_ROWS):
        rows *= 2
    return rows
