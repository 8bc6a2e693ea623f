"""What a model may be given to go on from: texts, messages or tokens, one or many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

_POSSIBLE = (
    "give a text, a list of messages ({'role': ..., 'content': ...}), a list of token numbers, or a list of such, with "
    "None for an idle row"
)


def is_one(prompts: Any) -> bool:
    """Returns whether this is one prompt, rather than a list of them.

    Raises:
      ValueError: for what is neither.
    """
    if isinstance(prompts, str):
        return True
    if isinstance(prompts, np.ndarray | jax.Array):
        return prompts.ndim == 1
    if isinstance(prompts, Mapping | bytes | bytearray) or not isinstance(prompts, Sequence) or not prompts:
        raise ValueError(f"prompts is {_shown(prompts)}; {_POSSIBLE}")
    return _is_tokens(prompts) or is_messages(prompts)


def tokens_of(prompt: Any, tokenizer: Any, chat: Mapping[str, Any]) -> Any:
    """Returns the tokens of one prompt; None stays None.

    Args:
      prompt: a text, messages or tokens.
      tokenizer: a function that returns the tokenizer, for those that need it.
      chat: variables for the chat template.
    """
    if prompt is None or isinstance(prompt, np.ndarray | jax.Array) or _is_tokens(prompt):
        return prompt
    if isinstance(prompt, str):
        tokens = tokenizer().encode(prompt)
        if not tokens:
            raise ValueError("a prompt is empty: it has no tokens; give some text to continue")
        return tokens
    if is_messages(prompt):
        return tokenizer().chat(prompt, **chat)
    raise ValueError(f"a prompt is {_shown(prompt)}; {_POSSIBLE}")


def _is_tokens(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and bool(prompt) and all(isinstance(x, int | np.integer) for x in prompt)


def is_messages(prompt: Any) -> bool:
    """Returns whether a prompt is a conversation."""
    return isinstance(prompt, Sequence) and bool(prompt) and all(isinstance(x, Mapping) for x in prompt)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
