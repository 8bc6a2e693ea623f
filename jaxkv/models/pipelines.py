"""What transformers 5 makes of tokenizer.json for some classes: vocabulary and merges are the file's, the rest its own.

Files of Llama 2 that were made by transformers 4 differ from that: they put a space before each text between special
tokens, transformers 5 before the first only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxkv.models.files import read_json

_END = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
_NAMES: dict[str, dict[str, str]] = {
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "GemmaTokenizer": {
        "unk_token": "<unk>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"),
    "GPT2Tokenizer": _END,
    "WhisperTokenizer": _END,
}
# The class of a model whose files name none.
_OF_MODELS = {
    "gemma2": "GemmaTokenizer",
    "gemma3": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
    "gpt2": "GPT2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "whisper": "WhisperTokenizer",
}
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def kind_of(directory: Path, config: Mapping[str, Any], is_byte_level: Callable[[], bool]) -> str | None:
    """Returns the class that transformers takes for a checkpoint's tokenizer, None for that of tokenizer.json as it is.

    Args:
      directory: of the checkpoint.
      config: the content of its tokenizer_config.json.
      is_byte_level: whether tokenizer.json works on bytes.

    Raises:
      ValueError: for values of the wrong kind.
    """
    model = read_json(directory / "config.json", needed=False)
    sources = {"tokenizer_config.json": config, "config.json": model}
    for name, source in sources.items():
        if not isinstance(source.get("tokenizer_class"), str | None):
            raise ValueError(
                f"{directory / name}: tokenizer_class is {source['tokenizer_class']!r}, must be the name of a class"
            )
    kind = str(config.get("tokenizer_class") or model.get("tokenizer_class") or "").removesuffix("Fast")
    family = model.get("model_type")
    if family in ("mistral", "phi3"):  # their checkpoints name classes that they were not made with
        return None
    if family == "qwen2":
        return "Qwen2Tokenizer"
    if kind == "LlamaTokenizer" and is_byte_level():
        return None
    kind = kind or (_OF_MODELS.get(family, "") if isinstance(family, str) else "")
    return kind if kind in _NAMES else None


def names_of(kind: str | None) -> Mapping[str, str]:
    """Returns the texts of named tokens that a class has by itself."""
    return _NAMES.get(kind or "", {})


def apply(tokenizer: Any, kind: str | None, config: Mapping[str, Any], texts: Mapping[str, str], where: Path) -> None:
    """Gives a `tokenizers.Tokenizer` the normalizer, pre-tokenizer and decoder of its class, in place.

    Args:
      tokenizer: as tokenizer.json has it; only one of byte pairs is changed.
      kind: the class, None for none.
      config: the content of tokenizer_config.json.
      texts: those of named tokens.
      where: the path of tokenizer_config.json.

    Raises:
      ValueError: for values of the wrong kind.
    """
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

    legacy, space = (_flag(config, name, where) for name in ("legacy", "add_prefix_space"))
    model = tokenizer.model
    if kind is None or not isinstance(model, models.BPE):
        return
    model.dropout, model.fuse_unk, model.byte_fallback, model.ignore_merges = None, False, False, False
    model.unk_token = None
    if kind == "LlamaTokenizer":
        space = space is not False
        scheme = "never" if not space else "always" if legacy else "first"
        model.fuse_unk = model.byte_fallback = True
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(content=" ", left=1)] * space)
    elif kind == "GemmaTokenizer":
        model.fuse_unk = model.byte_fallback = True
        model.unk_token = texts.get("unk_token")
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        tokenizer.decoder = decoders.ByteLevel()
        if kind == "Qwen2Tokenizer":
            tokenizer.normalizer = normalizers.NFC()
            words = pre_tokenizers.Split(Regex(_QWEN), behavior="isolated")
            units = pre_tokenizers.ByteLevel(add_prefix_space=bool(space), use_regex=False)
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, units])
        else:
            tokenizer.normalizer = None
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(space))


def _flag(config: Mapping[str, Any], name: str, where: Path) -> bool | None:
    value = config.get(name)
    if not isinstance(value, bool | None):
        raise ValueError(f"{where}: {name} is {value!r}, must be true or false")
    return value
