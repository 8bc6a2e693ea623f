"""`best_of`: several samples of each prompt, which is prefilled once, and the best of them.

>>> table = jnp.log(jnp.array([[0.1, 0.5, 0.4], [0.4, 0.3, 0.3], [0.01, 0.9, 0.09]]))  # a "model": P(next | last)
>>> spec = jaxkv.LayerSpec(jaxkv.Full(), num_kv_heads=1, head_dim=1)
>>> def forward(params, tokens, positions, cache):
...     cache, step = cache.begin(positions)
...     x = jnp.ones((*tokens.shape, 1, 1))                  # a real model: projections, then layer.put and attend
...     layers = [layer.put(step, x, x) for layer in cache.layers]
...     return params[tokens], cache.with_layers(layers)
>>> cache = jaxkv.Cache.init([spec], num_rows=8, capacity=16)
>>> found = best_of(forward, table, [[0, 1, 2]], cache, n=8, max_new_tokens=4, key=jax.random.key(0))
>>> found.tokens.shape, bool((np.diff(found.scores[0]) <= 0).all())
((1, 8, 4), True)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxkv.cache.cache import Cache
from jaxkv.generate import checks
from jaxkv.generate.call import Call
from jaxkv.generate.candidates import Candidates, check_copies, prepared
from jaxkv.generate.loop import Plain
from jaxkv.generate.programs import Form
from jaxkv.generate.reading import take_rows
from jaxkv.generate.sampling import Sampler, Temperature
from jaxkv.generate.stream import Stream


def best_of(
    forward: Callable[..., Any],
    params: Any,
    prompts: Sequence[Any],
    cache: Cache,
    *,
    n: int,
    max_new_tokens: int | Sequence[int],
    sampler: Callable[..., Any] = Temperature(1.0),
    by: str = "mean",
    stop_tokens: Sequence[Any] | int = (),
    key: Any = None,
) -> Candidates:
    """Returns n samples of each prompt, ranked by how likely the model finds them, and the cache to go on from.

    Runs on the host, not under `jit`. Each prompt is prefilled once, in the blocks of `generate`, and its row is taken
    n times: on Pages that moves integers only. Then the loop of `generate` decodes all rows: the samples are those that
    it gives with `num_samples=n` and the same key.

    Args:
      forward, params: as for `jaxkv.generate`.
      prompts: P of them, each a sequence of token numbers; None: none, its rows stay idle. What row i holds of prompt i
        is not computed again.
      cache: of n rows for each prompt, or more: sample j of prompt i is drawn in row i * n + j. What the rows from P on
        hold is forgotten, but for rows behind the last sample. It is donated: go on with `result.cache`.
      n: samples of each prompt.
      max_new_tokens: most tokens of a sample, 1 or more; one number, or one per prompt.
      sampler, stop_tokens: as for `jaxkv.generate`; not a greedy sampler, whose samples are all the same.
      by: what is best: "mean" or "sum" of the log-probabilities of a sample's tokens under the model's own
        distribution. The sum favors short ones.
      key: PRNG key, from `jax.random.key(seed)`.

    Returns:
      Candidates, [P, n]. Samples that ended for another reason than "stop" or "length" come last, those without a
      token at the very end.

    Raises:
      ValueError, CacheError: as `jaxkv.generate`; and for n below 1, more rows than the cache has, a greedy sampler, or
        another `by`.
    """
    n = check_copies("n", n, prompts, cache)
    if by not in ("mean", "sum"):
        raise ValueError(f'by is {by!r}; give "mean" or "sum"')
    if n > 1 and isinstance(sampler, Sampler) and sampler.greedy:
        raise ValueError(
            f"sampler {sampler} is greedy, so all {n} samples would be the same; give Temperature(0.8), or "
            "temperature=0.8 to a Model"
        )
    num_prompts = len(prompts)
    limits, behind = checks.check_max_new_tokens(max_new_tokens, num_prompts).tolist(), 0
    if isinstance(cache, Cache):
        behind = cache.num_rows - n * num_prompts
    call = Call.of(
        forward,
        params,
        [*prompts, *[None] * behind],
        cache,
        max_new_tokens=[*limits, *[1] * behind],
        sampler=sampler,
        stop_tokens=stop_tokens,
        key=key,
        num_samples=[*[n] * num_prompts, *[1] * behind],
    )
    promised = call.cache.shared is not None
    rows = np.arange(call.cache.num_rows, dtype=np.int32)
    samples = rows[: n * num_prompts].reshape(num_prompts, n)
    call = dataclasses.replace(call, cache=prepared(call.cache, call.texts[:num_prompts], n))
    made = Stream(Plain(call)).run()
    sums = made.log_probs.sum(1)
    scores = sums if by == "sum" else sums / np.maximum(made.lengths, 1)
    scores = np.where(made.lengths > 0, scores, -np.inf).astype(np.float32)
    proper = np.isin(made.reasons, ("stop", "length"))
    order = np.stack([row[np.lexsort((-scores[row], ~proper[row]))] for row in samples])  # rows of each prompt, [P, n]
    rows[: order.size] = order.T.ravel()
    form = Form.of(made.cache)
    with checks.failures_told("sorting the samples"):
        (leaves,) = take_rows(form, rows, tuple(jax.tree.leaves(made.cache)))
        cache = form.build(leaves) if promised else form.build(leaves).sharing(0)
    reasons = tuple(tuple(made.reasons[i] for i in row) for row in order)
    return Candidates(made.tokens[order], made.lengths[order], made.log_probs[order], scores[order], reasons, cache)
