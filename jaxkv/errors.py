"""The errors of jaxkv. Wrong arguments raise ValueError; what a cache can't do raises one of these."""

from __future__ import annotations


class CacheError(Exception):
    """Base of all errors that are jaxkv's own."""


class CacheFullError(CacheError):
    """A sequence did not fit: it took no tokens, and its earlier ones are intact."""


class NotSupportedError(CacheError):
    """The operation is not possible with the given layers, or a checkpoint needs a feature that jaxkv does not have."""
