"""The families of models that can be loaded, by the "model_type" of their config.json. docs/families.md adds one."""

from __future__ import annotations

from jaxkv.models.families.gemma import GEMMA2, GEMMA3, GEMMA3_TEXT
from jaxkv.models.families.gpt2 import GPT2
from jaxkv.models.families.gpt_oss import GPT_OSS
from jaxkv.models.families.llama import LLAMA, MISTRAL, PHI3, QWEN2, QWEN3
from jaxkv.models.families.whisper import WHISPER

FAMILIES = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "phi3": PHI3,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3_TEXT,
    "gemma3": GEMMA3,
    "gpt2": GPT2,
    "gpt_oss": GPT_OSS,
    "whisper": WHISPER,
}
