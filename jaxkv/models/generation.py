"""How a model's makers want it to be sampled: `generation_config.json`."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Defaults for generation; None where the checkpoint says nothing."""

    stop_tokens: tuple[int, ...] = ()
