"""The families of models that can be loaded, by the "model_type" of their config.json. docs/families.md adds one."""

from __future__ import annotations

from jaxkv.models.families.cohere import COHERE, COHERE2
from jaxkv.models.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from jaxkv.models.families.ernie import ERNIE4_5
from jaxkv.models.families.exaone import EXAONE4
from jaxkv.models.families.gemma import GEMMA, GEMMA2, GEMMA3, GEMMA3_TEXT
from jaxkv.models.families.gemma4 import GEMMA4, GEMMA4_TEXT
from jaxkv.models.families.glm import GLM4, GLM4_MOE
from jaxkv.models.families.gpt2 import GPT2
from jaxkv.models.families.gpt_oss import GPT_OSS
from jaxkv.models.families.granite import GRANITE, GRANITEMOE
from jaxkv.models.families.granite_hybrid import GRANITE_HYBRID
from jaxkv.models.families.lfm2 import LFM2
from jaxkv.models.families.llama import LLAMA, MISTRAL, PHI3, QWEN2, QWEN3
from jaxkv.models.families.llama4 import LLAMA4, LLAMA4_TEXT
from jaxkv.models.families.mixtures import MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE
from jaxkv.models.families.olmo import OLMO2, OLMO3
from jaxkv.models.families.qwen3_next import QWEN3_NEXT
from jaxkv.models.families.seed_oss import SEED_OSS
from jaxkv.models.families.smollm3 import SMOLLM3
from jaxkv.models.families.whisper import WHISPER

FAMILIES = {
    "llama": LLAMA,
    "llama4_text": LLAMA4_TEXT,
    "llama4": LLAMA4,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "qwen2": QWEN2,
    "qwen2_moe": QWEN2_MOE,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "qwen3_next": QWEN3_NEXT,
    "phi3": PHI3,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3_TEXT,
    "gemma3": GEMMA3,
    "gemma4_text": GEMMA4_TEXT,
    "gemma4": GEMMA4,
    "olmo2": OLMO2,
    "olmo3": OLMO3,
    "olmoe": OLMOE,
    "smollm3": SMOLLM3,
    "cohere": COHERE,
    "cohere2": COHERE2,
    "granite": GRANITE,
    "granitemoe": GRANITEMOE,
    "granitemoehybrid": GRANITE_HYBRID,
    "glm4": GLM4,
    "glm4_moe": GLM4_MOE,
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v3": DEEPSEEK_V3,
    "ernie4_5": ERNIE4_5,
    "exaone4": EXAONE4,
    "seed_oss": SEED_OSS,
    "lfm2": LFM2,
    "gpt2": GPT2,
    "gpt_oss": GPT_OSS,
    "whisper": WHISPER,
}
