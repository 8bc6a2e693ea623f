"""How errors say what kind of thing was given."""

from __future__ import annotations

from typing import Any


def kind_of(value: Any) -> str:
    """Returns the name of a value's type with its article.

    >>> kind_of(3), kind_of("text"), kind_of(np.ones(2))
    ('an int', 'a str', 'an ndarray')
    """
    name = type(value).__name__
    return f"an {name}" if name.lower().startswith((*"aeio", "nd")) else f"a {name}"
