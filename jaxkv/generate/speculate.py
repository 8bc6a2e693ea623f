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

from collections.abc import Callable, Sequence
from typing import Any

from jaxkv.cache.cache import Cache
from jaxkv.generate.call import Call
from jaxkv.generate.drafters import checked_branches, checked_drafter
from jaxkv.generate.generation import Speculation
from jaxkv.generate.sampling import Greedy
from jaxkv.generate.stream import Stream
from jaxkv.generate.verify import Speculative


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
    num_samples: int | Sequence[int] = 1,
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
      forward, params, prompts, max_new_tokens, sampler, stop_tokens, key, num_samples: as for `generate`.
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
        was right a row makes none until guesses of one token, which cost nothing, were right so often: 1, 2, 4, up to
        32 times, and fewer again after good drafts.

    Returns:
      A Speculation.

    Raises:
      ValueError, CacheError: as `generate`; also for a draft model of another vocabulary, a draft cache of other rows
        or capacity, and caches that can't go back by a draft.
    """
    steps = stream_speculation(
        forward,
        params,
        prompts,
        cache,
        max_new_tokens=max_new_tokens,
        draft=draft,
        num_draft=num_draft,
        tree=tree,
        min_ngram=min_ngram,
        max_ngram=max_ngram,
        sampler=sampler,
        stop_tokens=stop_tokens,
        key=key,
        num_samples=num_samples,
    )
    made: Any = steps.run()
    return made


def stream_speculation(
    forward: Callable[..., Any],
    params: Any,
    prompts: Sequence[Any],
    cache: Cache,
    *,
    draft: tuple[Callable[..., Any], Any, Cache] | None = None,
    num_draft: int = 8,
    tree: Sequence[int] | None = None,
    min_ngram: int = 3,
    max_ngram: int = 5,
    **options: Any,
) -> Stream:
    """Returns an iterator over the tokens that `speculate` returns, as they come: what each step brings.

    Each `next` is one forward pass of the model, by the compiled loop of `speculate`. It gives int32 [B, N], N the most
    tokens that a row can get in a step: a row's new tokens stand in front, EMPTY (-1) behind them.

    Args:
      forward, params, prompts, cache, draft, num_draft, tree, min_ngram, max_ngram: as for `speculate`.
      **options: its other arguments: max_new_tokens, sampler, stop_tokens, key, num_samples.

    Raises:
      ValueError, CacheError: as `speculate`.

    ```python
    steps = jaxkv.stream_speculation(forward, params, [prompt], cache, max_new_tokens=100)
    for new in steps:
        print(new[0][new[0] >= 0])
    print(steps.result.accepted)
    ```
    """
    call = Call.of(forward, params, prompts, cache, **{"sampler": Greedy(), "stop_tokens": (), "key": None} | options)
    branches = checked_branches(num_draft, tree, call.cache)
    drafter, small = checked_drafter(draft, call, branches, (min_ngram, max_ngram))
    try:
        return Stream(Speculative(call, drafter, small))
    except TypeError as error:
        if branches.is_chain or "parents" not in str(error):
            raise
        raise ValueError(
            f"{error}; tree= needs a forward(params, tokens, positions, cache, parents) that gives parents to "
            "cache.begin(positions, parents=parents) and places tokens by step.depths. Without tree= a chain is drafted"
        ) from error
