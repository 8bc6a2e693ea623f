"""The bundled model: bytes of English in the manner of the Python manual.

It is trained by `examples/train_tiny.py` on what every Python installation carries: the topics of `help()`, the
docstrings and the longer comments of the standard library. Four layers have a window, one sees all.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jaxkv.cache.spec import Full, Window
from jaxkv.models.bytes import ByteTokenizer
from jaxkv.models.decoder import Decoder, DecoderConfig
from jaxkv.models.generation import GenerationConfig
from jaxkv.models.model import Model, abstract
from jaxkv.nn.state import load_state

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
CONTEXT = 512  # bytes per sequence in training; what comes later it predicts much worse


def load(dtype: Any = "float32") -> Model:
    """Returns the trained model.

    Args:
      dtype: of its parameters and of the computation.

    >>> from jaxkv.models import tiny
    >>> model = tiny.load()
    >>> [spec.reach.size for spec in model.specs]
    [128, 128, None, 128, 128]
    >>> model.tokenizer.encode("with"), model.generation.stop_tokens, model.context
    ([119, 105, 116, 104], (0,), 512)
    """
    config = dataclasses.replace(CONFIG, dtype=dtype, param_dtype=dtype)
    module = abstract(Decoder, config)
    load_state(PATH, module)
    generation = GenerationConfig(stop_tokens=(0,), greedy=False, temperature=0.7)
    return Model.of(module, context=CONTEXT, generation=generation, make_tokenizer=ByteTokenizer)
