"""`beam_search`: the most likely texts, found by one compiled loop that prefills each prompt once.

>>> table = jnp.log(jnp.array([[0.1, 0.5, 0.4], [0.4, 0.3, 0.3], [0.01, 0.9, 0.09]]))  # a "model": P(next | last)
>>> spec = jaxkv.LayerSpec(jaxkv.Full(), num_kv_heads=1, head_dim=1)
>>> def forward(params, tokens, positions, cache):
...     cache, step = cache.begin(positions)
...     x = jnp.ones((*tokens.shape, 1, 1))                  # a real model: projections, then layer.put and attend
...     layers = [layer.put(step, x, x) for layer in cache.layers]
...     return params[tokens], cache.with_layers(layers)
>>> cache = jaxkv.Cache.init([spec], num_rows=2, capacity=16)
>>> found = beam_search(forward, table, [[0]], cache, num_beams=2, num_return=2, max_new_tokens=2, length_penalty=0)
>>> found.tokens.tolist(), np.exp(found.scores).round(2)  # 0.4 * 0.9 is more than 0.5 * 0.4, where 0.5 led
([[[2, 1], [1, 0]]], array([[0.36, 0.2 ]], dtype=float32))
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.cache.cache import Cache
from jaxkv.cache.spec import EMPTY
from jaxkv.generate import checks
from jaxkv.generate.beam_loop import Beams, Ended, Rules, search
from jaxkv.generate.candidates import Candidates, check_copies, padded, prepared
from jaxkv.generate.generation import REASONS
from jaxkv.generate.history import History
from jaxkv.generate.programs import Fixed, Form
from jaxkv.generate.reading import blocks, ends, last_positions, mark_ends, read_block
from jaxkv.generate.sampling import Greedy, Sampler
from jaxkv.meshes import beside


def beam_search(
    forward: Callable[..., Any],
    params: Any,
    prompts: Sequence[Any],
    cache: Cache,
    *,
    num_beams: int,
    max_new_tokens: int | Sequence[int],
    num_return: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    sampler: Sampler = Greedy(),
    stop_tokens: Sequence[Any] | int = (),
) -> Candidates:
    """Returns the most likely continuations of each prompt that a beam search finds, and the cache to go on from.

    As transformers' beam search: at each step the `num_beams` best continuations of a prompt are looked at; those of
    them that end become candidates, and the search goes on with the `num_beams` best that don't end. A candidate's
    score is the sum of its log-probabilities over its number of tokens to the power of `length_penalty`.

    Runs on the host, not under `jit`. Each prompt is prefilled once, in the blocks of `generate`; then one compiled
    loop decodes. Beams share what they have in common where the cache's layout shares, else `take` copies it.

    Args:
      forward, params: as for `jaxkv.generate`.
      prompts: P of them, each a sequence of token numbers; None: none, its rows stay idle. What row i holds of prompt i
        is not computed again.
      cache: of `num_beams` rows for each prompt, or more: beam b of prompt i is row b * P + i. What the rows from P on
        hold is forgotten, but for rows behind the last beam. It is donated: go on with `result.cache`.
      num_beams: continuations followed at a time; 1 is greedy.
      max_new_tokens: most tokens of a text, 1 or more; one number, or one per prompt.
      num_return: how many texts of each prompt, at most `num_beams`.
      length_penalty: above 0 favors longer texts, below 0 shorter ones; 0 ranks by the sum itself.
      early_stopping: when a prompt ends before the limit. True: as soon as there are `num_beams` candidates. False: if
        no beam can beat them as it is. "never": if none can at its best length, which is a safe bound.
      sampler: a greedy one, whose rules (penalties, `NoRepeat`, `Suppress`, ...) change the log-probabilities of each
        beam by what that beam holds.
      stop_tokens: as for `jaxkv.generate`.

    Returns:
      Candidates, [P, num_return]. A beam that does not fit into the cache, or a full pool of pages, ends there as
      "full", with its tokens; "nan" and "inf" are as for `generate`. They come after all that ended by themselves.

    Raises:
      ValueError, CacheError: as `jaxkv.generate`; and for fewer than 1 beam, more rows than the cache has, `num_return`
        above `num_beams`, a sampler that draws.
    """
    n = check_copies("num_beams", num_beams, prompts, cache)
    _check_numbers(n, num_return, length_penalty, early_stopping)
    num_prompts = len(prompts)
    cache, texts, held, vocab_size = checks.check_call(forward, params, padded(prompts, cache), cache)
    texts, promised = texts[:num_prompts], cache.shared is not None
    limits = np.minimum(checks.check_max_new_tokens(max_new_tokens, num_prompts), cache.capacity + 1)
    stops = checks.check_stop_tokens(stop_tokens, vocab_size)
    _check_rules(sampler)
    cache, last = prepared(cache, texts, n), last_positions(texts)
    rules = Rules(
        stops=jnp.asarray(stops),
        limits=jnp.asarray(limits),
        length_penalty=jnp.float32(length_penalty),
        once_full=jnp.asarray(early_stopping is True),
        at_best=jnp.asarray(early_stopping == "never"),
    )
    beams = _begin(texts, last, n, stops.shape[1] - 1, cache.capacity + 1)
    if sampler.needs_history:
        beams = dataclasses.replace(beams, history=_histories(texts, limits, n, vocab_size, cache.capacity + 1))
    beams = beside(cache, jax.tree.map(jnp.array, beams))
    form, state = Form.of(cache), Form.of(beams)
    reading, searching = Fixed(forward, None, form, None), Fixed(forward, sampler, form, state)
    leaves, beam_leaves = tuple(jax.tree.leaves(cache)), tuple(jax.tree.leaves(beams))
    search.eval_shape(searching, params, rules, leaves, beam_leaves)  # what fails in it fails before the cache is lost

    def read(histories: Sequence[np.ndarray], begin: np.ndarray, leaves: Any) -> Any:
        end = np.array([history.size for history in histories])
        for tokens, positions, _ in blocks(histories, np.minimum(begin, end), end, cache.max_block):
            (leaves,) = read_block(reading, params, tokens, positions, leaves)
        return leaves

    own = np.arange(cache.num_rows, dtype=np.int32)
    others = (own >= num_prompts) & (own < n * num_prompts)
    with checks.failures_told("the beam search"):
        leaves = read([text[:-1] for text in texts], held[:num_prompts], leaves)
        if cache.recurrent:
            (leaves,) = mark_ends(form, ends(texts, cache.num_rows), leaves)
        leaves, beam_leaves = search(searching, params, rules, leaves, beam_leaves)
        beams, lengths = jax.device_get((state.build(beam_leaves), form.build(leaves).lengths))
        tokens, log_probs = _of_ended(beams, int(limits.max()))
        best = [np.append(text, row[0][row[0] >= 0])[:-1] for text, row in zip(texts, tokens, strict=True)]
        sources, kept = own.copy(), np.full_like(own, cache.capacity)
        sources[others] = cache.num_rows
        for i, (row, length) in enumerate(_nearest(best, texts, beams, lengths)):
            sources[i], kept[i] = row, length
        leaves = _settle(form, sources, kept, leaves)
        leaves = read(best, np.asarray(form.build(leaves).lengths)[:num_prompts], leaves)
        cache = form.build(leaves) if promised else form.build(leaves).sharing(0)
        lengths, ok = (np.asarray(x)[:num_prompts] for x in (cache.lengths, cache.ok))
        checks.check_lengths(lengths, np.where(ok, [text.size for text in best], 0))
    scores = beams.ended.score[:, :num_return]
    names = [[REASONS[i] for i in row] for row in beams.ended.reason[:, :num_return]]
    reasons = tuple(
        ("idle",) * num_return if not text.size else tuple(np.where(row == -np.inf, "none", name).tolist())
        for text, row, name in zip(texts, scores, names, strict=True)
    )
    tokens, log_probs = tokens[:, :num_return], log_probs[:, :num_return]
    return Candidates(tokens, (tokens != EMPTY).sum(2, dtype=np.int32), log_probs, scores, reasons, cache)


def _check_numbers(num_beams: int, num_return: Any, length_penalty: Any, early_stopping: Any) -> None:
    whole = isinstance(num_return, int | np.integer) and not isinstance(num_return, bool)
    if not whole or not 1 <= num_return <= num_beams:
        raise ValueError(f"num_return is {num_return!r}; give a whole number from 1 to num_beams, which is {num_beams}")
    real = isinstance(length_penalty, numbers.Real) and not isinstance(length_penalty, bool)
    if not real or not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty is {length_penalty!r}; give a finite number, such as 1.0")
    if early_stopping is not True and early_stopping is not False and early_stopping != "never":
        raise ValueError(f'early_stopping is {early_stopping!r}; give True, False or "never"')


def _check_rules(sampler: Any) -> None:
    if not isinstance(sampler, Sampler) or not sampler.greedy:
        raise ValueError(
            f"sampler is {sampler!r}; a beam search does not sample: give a greedy one of jaxkv.sampling, such as "
            "RepetitionPenalty(1.1) | Greedy(), whose rules it obeys"
        )
    checks.check_sampler(sampler, None, 1)


def _begin(texts: Sequence[np.ndarray], last: np.ndarray, n: int, recent: int, most: int) -> Beams:
    """Returns the state before the first step: one beam for each prompt, in NumPy."""
    num_prompts = len(texts)
    zeros = np.zeros((num_prompts, n), np.int32)
    score = np.full(zeros.shape, -np.inf, np.float32)
    score[:, 0] = 0
    trellis = np.zeros((most, *zeros.shape), np.int32)
    return Beams(
        score=score,
        token=zeros + np.array([[text[-1] if text.size else 0] for text in texts], np.int32),
        log_prob=np.zeros_like(score),
        parent=zeros,
        recent=np.full((*zeros.shape, recent), EMPTY, np.int32),
        position=last,
        done=np.array([not text.size for text in texts]),
        count=np.int32(0),
        ended=Ended.none(num_prompts, n),
        tokens=trellis,
        log_probs=trellis.astype(np.float32),
        parents=trellis,
        history=None,
    )


def _histories(texts: Sequence[np.ndarray], limits: np.ndarray, n: int, vocab_size: int, most: int) -> History:
    """Returns what each beam holds, in the order of rows, in NumPy."""
    rows = [
        History.of(text, vocab_size, size=most, limit=text.size + limit)
        for text, limit in zip(texts, limits, strict=True)
    ]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows * n)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _settle(form: Form, sources: Any, lengths: Any, leaves: Any) -> Any:
    """Returns the cache with row r being the first lengths[r] tokens of row sources[r], and ok."""
    cache = form.build(leaves).take(sources).rewind(lengths)
    return form.flatten(cache.retry(~cache.ok))


def _of_ended(beams: Beams, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens [P, n, width] and their log-probabilities, of the texts that have ended."""
    ended = beams.ended
    before = np.maximum(ended.length - 1, 0)
    tokens, log_probs = _traced(beams, before, ended.beam, width)
    some = ((ended.length > 0) & (ended.score > -np.inf))[:, :, None]
    last = some & (np.arange(width) == before[:, :, None])
    tokens = np.where(last, ended.token[:, :, None], np.where(some, tokens, EMPTY))
    return tokens, np.where(last, ended.log_prob[:, :, None], np.where(some, log_probs, 0))


def _traced(beams: Beams, lengths: np.ndarray, beam: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens [P, k, width] and log-probabilities of texts of these lengths that end with these beams [P, k]."""
    tokens = np.full((*lengths.shape, width), EMPTY, np.int32)
    log_probs = np.zeros(tokens.shape, np.float32)
    prompts = np.arange(len(lengths))[:, None]
    for i in reversed(range(lengths.max(initial=0))):
        there = i < lengths
        tokens[:, :, i] = np.where(there, beams.tokens[i][prompts, beam], EMPTY)
        log_probs[:, :, i] = np.where(there, beams.log_probs[i][prompts, beam], 0)
        beam = np.where(there, beams.parents[i][prompts, beam], beam)
    return tokens, log_probs


def _nearest(
    best: Sequence[np.ndarray], texts: Sequence[np.ndarray], beams: Beams, lengths: np.ndarray
) -> Iterator[tuple[int, int]]:
    """Yields, per prompt, the row that holds most of its best text from the start, and how many tokens of it."""
    num_prompts, n = beams.score.shape
    count = beams.position - last_positions(texts)  # steps in which each prompt's beams went on
    beam = np.broadcast_to(np.arange(n), (num_prompts, n))
    written, _ = _traced(beams, np.broadcast_to(count[:, None], beam.shape), beam, max(int(count.max()), 1))
    for i, (text, wanted) in enumerate(zip(texts, best, strict=True)):
        if not text.size:
            yield i, np.iinfo(np.int32).max  # stays as it is
            continue
        rows = np.arange(n) * num_prompts + i
        same = [_num_same(np.append(text, own[own >= 0]), wanted) for own in written[i]]
        held = np.minimum(same, lengths[rows])
        yield int(rows[held.argmax()]), int(held.max())


def _num_same(a: np.ndarray, b: np.ndarray) -> int:
    """Returns how many tokens two texts have in common from the start."""
    size = min(a.size, b.size)
    differs = np.flatnonzero(a[:size] != b[:size])
    return int(differs[0]) if differs.size else size
