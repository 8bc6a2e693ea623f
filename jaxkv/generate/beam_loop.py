"""The compiled beam search: one `while_loop` over a donated cache, which follows its beams by `take`.

Beam b of prompt p is row b * P + p of the cache: the prompts themselves are the first P rows. What the beams wrote is
kept as a trellis, (token, beam it came from) per step, so that a step moves no texts.

The rules are those of transformers' beam search: per prompt the `num_beams` best continuations are looked at; those of
them that end become candidates; the search goes on with the `num_beams` best that don't end.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv.cache.spec import EMPTY
from jaxkv.generate.generation import FULL, INF, LENGTH, NAN, RUNNING, STOP
from jaxkv.generate.history import History


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rules:
    """What may change without another program."""

    stops: Any  # int32 [S, L], as `loop.decode` takes them
    limits: Any  # int32 [P], most new tokens
    length_penalty: Any  # float32 scalar
    once_full: Any  # bool scalar: a prompt ends as soon as it has num_beams candidates
    at_best: Any  # bool scalar: or when no beam can beat them at its best length; else at its length so far


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ended:
    """The best texts of each prompt that have ended, best first."""

    score: Any  # float32 [P, n], -inf: there is none
    reason: Any  # int32 [P, n], index into REASONS
    length: Any  # int32 [P, n], tokens
    beam: Any  # int32 [P, n], the beam of the step before the last token
    token: Any  # int32 [P, n], its last one
    log_prob: Any  # float32 [P, n], of that

    @classmethod
    def none(cls, num_prompts: int, n: int) -> Ended:
        zeros = jnp.zeros((num_prompts, n), jnp.int32)
        score = jnp.full(zeros.shape, -jnp.inf, jnp.float32)
        return cls(score, zeros, zeros, zeros, zeros, jnp.zeros_like(score))

    @property
    def rank(self) -> Any:
        """int32 [P, n]: 0 for those that ended by a stop token or the limit, 1 for those cut short, 2 for none."""
        proper = (self.reason == STOP) | (self.reason == LENGTH)
        return jnp.where(self.score == -jnp.inf, 2, jnp.where(proper, 0, 1)).astype(jnp.int32)

    def best(self, n: int) -> Ended:
        """Returns the n best; of equal ones the first."""
        order = jnp.lexsort((-self.score, self.rank))[:, :n]
        return jax.tree.map(lambda x: jnp.take_along_axis(x, order, 1), self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beams:
    """What the loop carries beside the cache."""

    score: Any  # float32 [P, n], sum of the log-probabilities; -inf: no such beam
    token: Any  # int32 [P, n], the last of each, not yet in the cache
    log_prob: Any  # float32 [P, n], of that
    parent: Any  # int32 [P, n], the beam it came from
    recent: Any  # int32 [P, n, L - 1], the last tokens that were generated, EMPTY in front
    position: Any  # int32 [P], where the next tokens go
    done: Any  # bool [P]
    count: Any  # int32 scalar, steps so far
    ended: Ended
    tokens: Any  # int32 [N, P, n], of each step
    log_probs: Any  # float32 [N, P, n]
    parents: Any  # int32 [N, P, n]
    history: Any  # a History of [n * P, ...], in the order of rows; None unless the sampler needs it


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(3, 4))
def search(fixed: Any, params: Any, rules: Rules, cache: Any, beams: Any) -> tuple[Any, Any]:
    """Returns leaves of the cache and of the Beams after every prompt has ended; given as leaves too."""
    step = functools.partial(_step, fixed.forward, fixed.sampler, params, rules)
    carry = fixed.cache.build(cache), fixed.state.build(beams)
    cache, beams = jax.lax.while_loop(lambda carry: ~carry[1].done.all(), lambda carry: step(*carry), carry)
    return fixed.cache.flatten(cache), fixed.state.flatten(beams)


def _step(forward: Any, sampler: Any, params: Any, rules: Rules, cache: Any, beams: Beams) -> tuple[Any, Beams]:
    num_prompts, n = beams.score.shape
    prompts = jnp.arange(num_prompts, dtype=jnp.int32)[:, None]
    live = ~beams.done[:, None] & (beams.score > -jnp.inf)
    positions = jnp.where(live, beams.position[:, None], EMPTY)
    tokens = _column(beams.token, cache.num_rows, 0)
    logits, cache = forward(params, tokens, _column(positions, cache.num_rows, EMPTY), cache)
    logits = of_rows(logits[:, 0], num_prompts, n).astype(jnp.float32)  # [P, n, V]
    ok = of_rows(cache.ok, num_prompts, n)
    wrong = jnp.where(jnp.isnan(logits).any(-1), NAN, jnp.where(jnp.isinf(logits.max(-1)), INF, RUNNING))
    wrong = jnp.where(ok, wrong, FULL)

    log_probs = jax.nn.log_softmax(logits)
    total = beams.score[:, :, None] + _adjusted(sampler, log_probs, beams.history)
    goes_on = (live & (wrong == RUNNING))[:, :, None] & (total > -jnp.inf)  # not what is NaN
    total = jnp.where(goes_on, total, -jnp.inf)
    ends = _ends(beams.recent, rules.stops, total.shape[-1])
    count = beams.count + 1
    last = (count >= rules.limits)[:, None]

    def picked(total: Any) -> tuple[Any, Any, Any]:
        score, at = jax.lax.top_k(total.reshape(num_prompts, -1), n)
        at = at.astype(jnp.int32)
        return score, at // total.shape[-1], at % total.shape[-1]

    def penalized(score: Any, length: Any) -> Any:
        return score / jnp.maximum(length, 1).astype(jnp.float32) ** rules.length_penalty

    score, beam, token = picked(total)
    stopped = ends[prompts, beam, token]
    over = (stopped | last) & (score > -jnp.inf)
    new = Ended(
        score=jnp.where(over, penalized(score, count), -jnp.inf),
        reason=jnp.where(stopped, STOP, LENGTH),
        length=jnp.full_like(beam, count),
        beam=beam,
        token=token,
        log_prob=log_probs[prompts, beam, token],
    )
    cut = Ended(
        score=jnp.where(live & (wrong != RUNNING), penalized(beams.score, beams.count), -jnp.inf),
        reason=wrong,
        length=jnp.full_like(beam, beams.count),
        beam=beams.parent,
        token=beams.token,
        log_prob=beams.log_prob,
    )
    ended = jax.tree.map(lambda *x: jnp.concatenate(x, 1), beams.ended, new, cut).best(n)

    score, beam, token = jax.lax.cond(
        over.any(),
        lambda: picked(jnp.where(ends | last[:, :, None], -jnp.inf, total)),
        lambda: (score, beam, token),
    )
    enough = ended.rank[:, -1] == 0
    at_best = rules.at_best & (rules.length_penalty > 0)
    possible = penalized(score[:, 0], jnp.where(at_best, rules.limits, count))
    hopeless = possible <= jnp.where(enough, ended.score[:, -1], -jnp.inf)  # so is a prompt without a beam
    done = beams.done | hopeless | (enough & rules.once_full)

    there = score > -jnp.inf
    own = jnp.arange(cache.num_rows, dtype=jnp.int32)
    sources = jnp.where(there, beam * num_prompts + prompts, cache.num_rows)  # a beam that is not there holds nothing
    sources = jnp.where(done[:, None], of_rows(own, num_prompts, n), sources)
    sources = jnp.concatenate([to_rows(sources), own[n * num_prompts :]])
    if n > 1:
        cache = jax.lax.cond((sources != own).any(), lambda: cache.take(sources), lambda: cache)

    def follow(new: Any, old: Any) -> Any:
        return jnp.where(done.reshape(-1, *[1] * (old.ndim - 1)), old, new)

    log_prob = log_probs[prompts, beam, token]
    history = beams.history
    if history is not None:
        chosen = to_rows(jnp.where(there & ~done[:, None], token, EMPTY))
        history = jax.tree.map(lambda x: x[sources[: n * num_prompts]], history)
        history = jax.vmap(History.append)(history, chosen)
    recent = jnp.concatenate([beams.recent[prompts, beam], token[:, :, None]], -1)[:, :, 1:]
    beams = Beams(
        score=follow(score, beams.score),
        token=follow(token, beams.token),
        log_prob=follow(log_prob, beams.log_prob),
        parent=follow(beam, beams.parent),
        recent=follow(recent, beams.recent),
        position=follow(beams.position + 1, beams.position),
        done=done,
        count=count,
        ended=ended,
        tokens=_note(beams.tokens, token, beams.count),
        log_probs=_note(beams.log_probs, log_prob, beams.count),
        parents=_note(beams.parents, beam, beams.count),
        history=history,
    )
    return cache, beams


def of_rows(x: Any, num_prompts: int, n: int) -> Any:
    """Returns x [R, ...] of the beams' rows as [P, n, ...]."""
    return x[: n * num_prompts].reshape(n, num_prompts, *x.shape[1:]).swapaxes(0, 1)


def to_rows(x: Any) -> Any:
    """Returns x [P, n, ...] in the order of rows, [n * P, ...]."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])


def _column(x: Any, num_rows: int, rest: int) -> Any:
    """Returns x [P, n] for all rows of the cache, [R, 1]: `rest` for those that are not beams'."""
    rows = to_rows(x)
    return jnp.pad(rows, (0, num_rows - rows.shape[0]), constant_values=rest)[:, None]


def _adjusted(sampler: Any, log_probs: Any, history: Any) -> Any:
    """Returns log-probabilities [P, n, V] after the rules of the sampler, as transformers applies them."""
    flat = to_rows(log_probs)
    adjust: Callable[..., Any] = sampler.adjust
    flat = jax.vmap(lambda x: adjust(x, None))(flat) if history is None else jax.vmap(adjust)(flat, history)
    return of_rows(flat, *log_probs.shape[:2])


def _ends(recent: Any, stops: Any, vocab_size: int) -> Any:
    """Returns which tokens would complete a stop sequence, bool [P, n, V]; recent int32 [P, n, L - 1], stops [S, L]."""
    before, last = stops[None, None, :, :-1], stops[:, -1]
    same = (before == EMPTY) | (recent[:, :, None] == before)  # [P, n, S, L - 1]
    ends = jnp.zeros((*recent.shape[:2], vocab_size), bool)
    return ends.at[:, :, jnp.where(last >= 0, last, vocab_size)].max(same.all(-1), mode="drop")


def _note(trellis: Any, x: Any, i: Any) -> Any:
    return jax.lax.dynamic_update_index_in_dim(trellis, x, i, 0)
