"""The small model that comes with jaxkv: bytes of English in the manner of the Python manual.

It is trained by `examples/train_tiny.py` on what every Python installation carries: the topics of `help()`, the
docstrings and the longer comments of the standard library. Four layers have a window, one sees all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flax import nnx

from jaxkv.cache.spec import Full, Window
from jaxkv.models import weights
from jaxkv.models.decoder import Decoder, DecoderConfig

PATH = Path(__file__).parent / "model.safetensors"
CONFIG = DecoderConfig(
    vocab_size=256,  # bytes; byte 0 separates documents
    width=160,
    num_layers=5,
    num_heads=6,
    num_kv_heads=2,
    head_dim=32,
    mlp_dim=384,
    reaches=(Window(128), Window(128), Full()),
)


def load(dtype: Any = "float32") -> Decoder:
    """Returns the trained model.

    Args:
      dtype: of its parameters and of the computation.

    >>> from jaxkv.models import tiny
    >>> [spec.reach.size for spec in tiny.load().specs()]
    [128, 128, None, 128, 128]
    """
    config = dataclasses.replace(CONFIG, dtype=dtype, param_dtype=dtype)
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))  # shapes alone: nothing is drawn to be replaced
    nnx.update(model, weights.load(PATH, nnx.state(model)))
    return model


def encode(text: str) -> list[int]:
    """Returns the tokens of a text: its bytes in UTF-8.

    >>> encode("é!")
    [195, 169, 33]
    """
    return list(text.encode())


def decode(tokens: Iterable[int]) -> str:
    """Returns the text of tokens, with a replacement character for what is not UTF-8.

    Args:
      tokens: ints or an integer array [T]; anything outside [0, 256) is left out, as EMPTY after a text's end.

    Raises:
      TypeError: if tokens are not integers.

    >>> decode([195, 169, 33, -1])
    'é!'
    """
    return bytes(token for token in map(int, tokens) if 0 <= token < 256).decode(errors="replace")
