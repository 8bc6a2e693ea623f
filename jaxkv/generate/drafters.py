"""The arguments of `speculate` that say what drafts, and how much: checked on the host."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxkv.cache.arguments import checked_size
from jaxkv.cache.cache import Cache
from jaxkv.errors import CacheError
from jaxkv.generate import checks
from jaxkv.generate.branches import Branches
from jaxkv.generate.call import Call
from jaxkv.generate.draft import Small
from jaxkv.generate.lookup import Lookup
from jaxkv.generate.programs import Form
from jaxkv.kinds import kind_of


def checked_branches(num_draft: Any, tree: Any, cache: Cache) -> Branches:
    """Returns the form of a draft, checked."""
    widths: Any = (1,) * checked_size("speculate", "num_draft", num_draft, 1) if tree is None else tree
    if not isinstance(widths, tuple | list) or not widths or not all(_is_count(width) for width in widths):
        raise ValueError(
            f"tree is {tree!r}; give how many tokens follow each one, level by level, for instance tree=(3, 2, 1)"
        )
    branches = Branches(tuple(map(int, widths)))
    _check_states("cache", cache, branches)
    if cache.max_block < branches.size:
        cures = [f"Cache.init(max_block={branches.size})"] if branches.size <= cache.capacity else []
        what, less = f"num_draft is {num_draft}", f"num_draft={cache.max_block - 1}"
        if tree is not None:
            what, less = f"tree is {branches.widths}", "a smaller tree"
        cures += [less] if cache.max_block > 1 else []
        raise ValueError(
            f"{what}, so a block is {branches.size} tokens, and the cache takes blocks of {cache.max_block}: give "
            f"{', or '.join(cures or ['a cache of more capacity'])}"
        )
    return branches


def _check_states(name: str, cache: Cache, branches: Branches) -> None:
    """Raises ValueError unless recurrent layers of a cache, if it has any, can go back by a draft."""
    back = branches.size - 1
    if not cache.recurrent:
        return
    if not branches.is_chain:
        raise ValueError(
            f"tree is {branches.widths}, and the {name} has layers of {cache.recurrent[0].reach}: a state is that of "
            "one text, not of several branches; give num_draft and no tree"
        )
    if cache.slack < back:
        less = f", or give num_draft={cache.slack}" if cache.slack else ""
        raise ValueError(
            f"a draft of which nothing is taken is {back} tokens, and the {name} keeps a state of "
            f"{cache.recurrent[0].reach} after each of the last {cache.slack}: make the cache with slack={back}, by "
            f"Cache.init or model.init_cache{less}. model.generate makes such a cache if speculate is given in the "
            "first turn"
        )


def _is_count(width: Any) -> bool:
    return isinstance(width, int | np.integer) and not isinstance(width, bool) and bool(width >= 1)


def checked_drafter(draft: Any, call: Call, branches: Branches, ngrams: tuple[Any, Any]) -> tuple[Any, Any]:
    """Returns what drafts, and None or its params, its cache and what that holds of the texts [P]; all checked."""
    cache, vocab_size = call.cache, call.vocab_size
    min_ngram = checked_size("speculate", "min_ngram", ngrams[0], 1)
    max_ngram = checked_size("speculate", "max_ngram", ngrams[1], min_ngram)
    if draft is None:
        return Lookup(branches, min_ngram, max_ngram), None
    if not isinstance(draft, tuple | list) or len(draft) != 3:
        raise ValueError(
            f"draft is {kind_of(draft)}; give (forward, params, cache) of the draft model, or None to look "
            "drafts up in the text"
        )
    forward, params, small = draft
    try:
        prompts = [text if text.size else None for text in call.texts]
        prompts += [None] * (cache.num_rows - len(prompts))
        small, _, held, draft_vocab_size = checks.check_call(forward, params, prompts, small)
    except (ValueError, CacheError) as error:
        raise type(error)(f"draft: {error}") from error
    if draft_vocab_size != vocab_size:
        raise ValueError(
            f"the draft model has a vocabulary of {draft_vocab_size} tokens, the model one of {vocab_size}; a draft is "
            "made of the model's own tokens: take a draft model with the same tokenizer"
        )
    own = {id(leaf) for leaf in jax.tree.leaves(cache)}
    if any(id(leaf) in own for leaf in jax.tree.leaves(small)):
        raise ValueError(
            "the draft's cache is the model's own, or shares arrays with it, and both are donated; make one for each "
            "with Cache.init"
        )
    drafter, back = Small(forward, branches, Form.of(small)), branches.size - 1
    for name in ("num_rows", "capacity"):
        here, there = getattr(cache, name), getattr(small, name)
        if here != there:
            raise ValueError(
                f"the draft's cache has {name} {there}, the model's cache {here}; make them alike: "
                f"Cache.init(specs, num_rows={cache.num_rows}, capacity={cache.capacity}, slack={back})"
            )
    if small.max_block < drafter.block:
        raise ValueError(
            f"the draft model reads blocks of {drafter.block} tokens, and its cache takes {small.max_block}; give "
            f"Cache.init(max_block={drafter.block})"
        )
    _check_states("draft's cache", small, branches)
    goes_back = max(small.max_block, small.slack)
    if goes_back < back and any(group.wraps for group in small.groups):
        raise ValueError(
            f"the draft's cache can go back {goes_back} tokens in its rings, and a draft of which nothing is taken is "
            f"{back}; give Cache.init(slack={back}), or a smaller draft"
        )
    return drafter, (params, small, held[: len(call.texts)])
