"""`speculate`: the tokens of `generate` in fewer steps of the model.

>>> table = jnp.eye(4)[(jnp.arange(4) + 1) % 4]             # a "model": after token n comes n + 1, and 0 after 3
>>> spec = jaxkv.LayerSpec(jaxkv.Full(), num_kv_heads=1, head_dim=1)
>>> def forward(params, tokens, positions, cache):
...     cache, step = cache.begin(positions)
...     x = jnp.ones((*tokens.shape, 1, 1))                  # a real model: projections, then layer.put and attend
...     layers = [layer.put(step, x, x) for layer in cache.layers]
...     return params[tokens], cache.with_layers(layers)
>>> cache = jaxkv.Cache.init([spec], num_rows=1, capacity=32)
>>> result = speculate(forward, table, [[0, 1, 2, 3, 0, 1, 2]], cache, max_new_tokens=12, num_draft=5)
>>> result.tokens, result.steps
(array([[3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]], dtype=int32), array([2], dtype=int32))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.cache.cache import Cache
from jaxkv.cache.spec import EMPTY
from jaxkv.generate import checks
from jaxkv.generate.drafters import checked_branches, checked_drafter
from jaxkv.generate.generation import IDLE, REASONS, RUNNING, Generation
from jaxkv.generate.history import History
from jaxkv.generate.programs import Fixed, Form
from jaxkv.generate.reading import blocks, last_positions, read_block
from jaxkv.generate.sampling import Greedy
from jaxkv.generate.verify import State, run
from jaxkv.meshes import beside


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Speculation(Generation):
    """A Generation, with the drafts that were accepted.

    Attributes:
      drafted: int32 [B], tokens that were drafted for each row.
      accepted: int32 [B], those of them that the model would have chosen itself.
      steps: int32 [B], forward passes of the model that each row took part in; `generate` takes one per token.
      draft_cache: of the draft model, to go on with: it holds the beginning of what `cache` holds. None without one.
    """

    drafted: np.ndarray
    accepted: np.ndarray
    steps: np.ndarray
    draft_cache: Any


def speculate(
    forward: Callable[..., Any],
    params: Any,
    prompts: Sequence[Any],
    cache: Cache,
    *,
    max_new_tokens: int | Sequence[int],
    draft: tuple[Callable[..., Any], Any, Cache] | None = None,
    num_draft: int = 8,
    tree: Sequence[int] | None = None,
    min_ngram: int = 3,
    max_ngram: int = 5,
    sampler: Callable[..., Any] = Greedy(),
    stop_tokens: Sequence[Any] | int = (),
    key: Any = None,
) -> Speculation:
    """Returns what `generate` returns, in fewer steps: what comes next is guessed, and the model checks many guesses at
    once.

    A draft of up to `num_draft` tokens is made for each row, by a small model or by looking up where the row's last
    tokens stood before. One forward pass of the model then reads the draft, and the sampler chooses at each of its
    places, with the key of that row and position; the draft counts up to where it chooses something else. So for
    whatever sampler, penalties and functions of your own among them, the tokens are those that `generate` chooses with
    the same key, and their distribution is the sampler's. (Logits of one token and of a block differ by rounding, so a
    choice that hangs on the last bits may differ.) Rows keep different numbers of tokens in the same step.

    All of it is one compiled loop. Where no row has a draft, a step is one of `generate`.

    Args:
      forward, params, prompts, max_new_tokens, sampler, stop_tokens, key: as for `generate`.
      cache: as for `generate`. It is donated. A block is the last token and the draft, so its `max_block` must be above
        the draft's size; a ring goes back as far as a block is long.
      draft: None to look drafts up in the row's own text, for texts that repeat what is there: edits, extracts, code.
        Or (forward, params, cache) of a small model with the same vocabulary, for any text. Its cache has as many rows
        and as much capacity as `cache`, and, if it has rings, a `slack` of the draft's size. It is donated too; it
        holds the beginning of each prompt, or nothing.
      num_draft: most tokens of a draft, 1 or more.
      tree: None, or for several drafts at once how many tokens follow each one, level by level: (3, 2, 1) is three
        first tokens, six second ones and six third ones, 15 in all, read in one pass, of which one branch is kept;
        num_draft is then not read. A model that drafts gives what it draws and what is most likely besides; a lookup
        what followed in several places. forward, and the draft model's, must take `parents=` as a fifth argument, hand
        it to `cache.begin(positions, parents=parents)`, and place tokens by `step.depths`, as `jaxkv.nnx.functional`
        of a `jaxkv.models.Decoder` does.
      min_ngram, max_ngram: without a draft model, at least and at most so many last tokens are looked up: the place
        where most of them stand is taken, and of equal ones the latest. After a draft of which less than a quarter
        was right a row makes none for some tokens: 2, 4, 8, up to 32, and fewer again after good ones.

    Returns:
      A Speculation.

    Raises:
      ValueError, CacheError: as `generate`; also for a draft model of another vocabulary, a draft cache of other rows
        or capacity, and caches that can't go back by a draft.
    """
    cache, checked, held, vocab_size = checks.check_call(forward, params, prompts, cache)
    branches = checked_branches(num_draft, tree, cache)
    drafter, small = checked_drafter(draft, cache, prompts, vocab_size, branches, (min_ngram, max_ngram))
    most = cache.capacity + 1  # the last one is what does not fit any more
    limits = np.minimum(checks.check_max_new_tokens(max_new_tokens, cache.num_rows), most)
    stops = checks.check_stop_tokens(stop_tokens, vocab_size)
    key = checks.check_sampler(sampler, key, vocab_size)
    begin = last_positions(checked)
    start = _begin(checked, limits, most, sampler, vocab_size, drafter.pauses[0])
    start = beside(cache, jax.tree.map(jnp.array, start))
    form = Form.of(start)
    fixed = Fixed(forward, sampler, Form.of(cache), form)
    draft_params = None if small is None else small[0]
    given = fixed, drafter, params, draft_params, jnp.asarray(stops), jnp.asarray(limits), jnp.asarray(begin), key
    leaves, state_leaves = (tuple(jax.tree.leaves(tree)) for tree in (cache, start))
    draft_leaves = () if small is None else tuple(jax.tree.leaves(small[1]))
    # What fails in the loop fails here, before a cache is donated.
    try:
        run.eval_shape(*given, leaves, draft_leaves, state_leaves)
    except TypeError as error:
        if branches.is_chain or "parents" not in str(error):
            raise
        raise ValueError(
            f"{error}; tree= needs a forward(params, tokens, positions, cache, parents) that gives parents to "
            "cache.begin(positions, parents=parents) and places tokens by step.depths. Without tree= a chain is drafted"
        ) from error
    with checks.failures_told("decoding"):
        leaves = _read(forward, params, checked, np.minimum(held, begin), cache)
        if small is not None:
            draft_leaves = _read(drafter.forward, draft_params, checked, np.minimum(small[2], begin), small[1])
        leaves, draft_leaves, state_leaves = run(*given, leaves, draft_leaves, state_leaves)
        cache, state = fixed.cache.build(leaves), jax.device_get(form.build(state_leaves))
        checks.check_lengths(np.asarray(cache.lengths), np.where(state.position > begin, state.position, 0))
    checks.check_sampled(sampler, state.token, state.reason, vocab_size)
    size = int(limits.max())
    tokens, log_probs = np.full((len(begin), size), EMPTY, np.int32), np.zeros((len(begin), size), np.float32)
    lengths = state.position - begin
    for row, (at, n) in enumerate(zip(begin + 1, lengths, strict=True)):
        tokens[row, :n], log_probs[row, :n] = state.text[row, at:][:n], state.log_probs[row, at:][:n]
    return Speculation(
        tokens=tokens,
        lengths=lengths,
        log_probs=log_probs,
        reasons=tuple(REASONS[i] for i in state.reason),
        cache=cache,
        drafted=state.drafted,
        accepted=state.accepted,
        steps=state.steps,
        draft_cache=None if drafter.form is None else drafter.form.build(draft_leaves),
    )


def _begin(
    prompts: list[np.ndarray], limits: np.ndarray, most: int, sampler: Any, vocab_size: int, pause: int
) -> State:
    """Returns the state before the first step, in NumPy."""
    zeros = np.zeros(len(prompts), np.int32)
    text = np.full((len(prompts), most), EMPTY, np.int32)
    for row, prompt in enumerate(prompts):
        text[row, : prompt.size] = prompt
    history = None
    if getattr(sampler, "needs_history", False):
        rows = [
            History.of(prompt, vocab_size, size=most, limit=prompt.size + limit)
            for prompt, limit in zip(prompts, limits, strict=True)
        ]
        history = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
    return State(
        token=np.array([prompt[-1] if prompt.size else 0 for prompt in prompts], np.int32),
        position=last_positions(prompts),
        reason=np.array([RUNNING if prompt.size else IDLE for prompt in prompts], np.int32),
        text=text,
        log_probs=np.zeros(text.shape, np.float32),
        history=history,
        wait=zeros,
        pause=np.full_like(zeros, pause),
        drafted=zeros,
        accepted=zeros,
        steps=zeros,
    )


def _read(forward: Any, params: Any, prompts: list[np.ndarray], read: np.ndarray, cache: Cache) -> tuple[Any, ...]:
    """Returns the leaves of the cache after the prompts but for their last tokens."""
    form = Form.of(cache)
    fixed, leaves = Fixed(forward, None, form, None), tuple(jax.tree.leaves(cache))
    for tokens, positions, _ in blocks(prompts, read, last_positions(prompts), cache.max_block):
        (leaves,) = read_block(fixed, params, tokens, positions, leaves)
    return leaves
