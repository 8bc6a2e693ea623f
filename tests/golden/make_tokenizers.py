"""Makes tokenizers.json: what Hugging Face transformers makes of texts and conversations, with small tokenizers.

    python tests/golden/make_tokenizers.py

needs transformers. The tokenizers and templates are written down here, so that tests build them without it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

PATH = Path(__file__).with_name("tokenizers.json")
TEXTS = [
    "Hello world, hello!",
    " leading and  double  spaces \n\tand a tab",
    "naïve café → 你好 🐍👩‍👩‍👧",
    "",
    "<|user|>typed as text</s>",
    "a <|eot|>  spaces <|user|>  around",
    " ab",
    "ab</s> ab  a",
    "a <new> b<new>c New  [PAD] <|im_start|> ab<|im_end|>\n",
]
MESSAGES = {
    "one": [{"role": "user", "content": " Hello? "}],
    "system": [{"role": "system", "content": "Say little."}, {"role": "user", "content": "Hello"}],
    "turns": [
        {"role": "user", "content": "Hello", "name": None},
        {"role": "assistant", "content": "naïve 🐍 <b> & "},
        {"role": "user", "content": "And now?\n"},
    ],
}
TOOLS = [
    {"type": "function", "function": {"name": "time", "description": "Says the time, 'now' → <b>", "parameters": {}}}
]

# In the manner of Qwen and ChatML, Llama 3, Gemma, Llama 2; the last shows what else templates make use of.
CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "<|im_end|>\\n" }}
{%- endif %}
{% for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nBe helpful.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{% endif %}
"""
LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%Y") if false else "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start|>system<|sep|>\\n\\nToday: " + date_string + "\\n" + system_message + "<|eot|>" }}
{%- for message in messages %}
    {{- '<|start|>' + message['role'] + '<|sep|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant<|sep|>\\n\\n' }}{%- endif %}
"""
GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<turn>' + role + '\\n' + message['content'] | trim + '</turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{'<turn>model\\n'}}{% endif %}"""
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'] + "
    "' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
ODD = """\
{%- set state = namespace(count=0) %}
{%- set extra = dict(a=1) %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- set state.count = state.count + 1 %}
    {%- if state.count > 2 %}{% break %}{% endif %}
    {%- if 'name' in message %}named {% endif %}
    {% generation %}
    {{ message.content | tojson }} {{ tools is defined }} {{ unk_token }}{{ nothing }}{{ image_token }}
    {% endgeneration %}
{%- endfor %}
{{ state.count }} {{ extra | tojson(indent=2) }}
"""


def byte_level() -> Tokenizer:
    """BPE over bytes, as GPT-2, Llama 3 and Qwen have it; it begins a text with <|begin|>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [
        ("H", "e"),
        ("l", "l"),
        ("He", "ll"),
        ("Hell", "o"),
        ("Ġ", "w"),
        ("Ġ", "Ġ"),
        ("ä", "½"),
        ("n", "a"),
        ("Ã", "¯"),
    ]
    vocab = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|sep|>"])
    tokenizer.add_special_tokens([AddedToken("<|eot|>", rstrip=True, special=True)])
    tokenizer.add_tokens([AddedToken("<|user|>", lstrip=True, special=False, normalized=False)])
    begin = tokenizer.token_to_id("<|begin|>")
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]),
        ]
    )
    tokenizer.enable_truncation(4)  # as files carry it that were saved in training; it is not for us
    return tokenizer


def metaspace() -> Tokenizer:
    """Unigram with spaces as U+2581 and bytes for what is unknown, as Gemma and Llama 2 have it."""
    words = {"▁": -3.0, "▁Hello": -4.0, "▁world": -4.5, "▁hello": -5.0, "lo": -5.0, "▁▁": -5.5, "▁a": -5.5, "你": -6.0}
    letters = {letter: -8.0 - i / 100 for i, letter in enumerate("abcdefghijklmnopqrstuvwxyzHTSA,.!?[]/<>|ï\n")}
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((f"<0x{i:02X}>", 0.0) for i in range(256))]
    pieces += [*words.items(), *letters.items()]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<turn>", "</turn>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def pieces() -> Tokenizer:
    """BPE with spaces as U+2581 and bytes for what is unknown, as files of Llama 2 made by transformers 4 have it."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyzHTS,.!<>|/_"]
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b"), ("▁", "▁"), ("▁", "ab"), ("l", "l"), ("▁", "<")]
    names = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        *letters,
        *("".join(pair) for pair in merges),
    ]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(names))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def heard() -> Tokenizer:
    """As Whisper's: a text is framed by tokens that say what is to be done."""
    tokenizer = byte_level()
    names = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|translate|>", "<|notimestamps|>"]
    tokenizer.add_special_tokens(names)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftranscript|> <|notimestamps|> $A <|endoftext|>",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in (names[0], names[1], names[-1])],
    )
    return tokenizer


def numbered(make: Any, *tokens: dict[str, Any] | str, config: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns a tokenizer_config.json whose added_tokens_decoder has further tokens behind those of tokenizer.json."""
    tokenizer = make()
    kinds = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    known = {
        i: {kind: getattr(token, kind) for kind in kinds} for i, token in tokenizer.get_added_tokens_decoder().items()
    }
    for i, token in enumerate(tokens, tokenizer.get_vocab_size()):
        known[i] = {"content": token, "special": True} if isinstance(token, str) else token
    return {"added_tokens_decoder": {str(i): token for i, token in known.items()}, **(config or {})}


def following(make: Any, *texts: str) -> dict[str, int]:
    """Returns an added_tokens.json of tokens behind those of tokenizer.json."""
    return {text: i for i, text in enumerate(texts, make().get_vocab_size())}


LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

# name: (tokenizer, tokenizer_config.json, further files)
KINDS: dict[str, tuple[Any, dict[str, Any], dict[str, str]]] = {
    "qwen": (
        byte_level,
        {
            "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True},
            "bos_token": None,
            "add_bos_token": False,
            "chat_template": CHATML,
        },
        {},
    ),
    "llama3": (byte_level, {"bos_token": "<|begin|>", "eos_token": "<|eot|>", "chat_template": LLAMA3}, {}),
    "gemma": (
        metaspace,
        {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True},
        {"chat_template.jinja": GEMMA},
    ),
    "llama2": (metaspace, {"bos_token": "<s>", "eos_token": "</s>", "chat_template": LLAMA2}, {}),
    "odd": (
        metaspace,
        {
            "unk_token": "<unk>",
            "eos_token": "</s>",
            "extra_special_tokens": {"image_token": "<turn>"},
            "add_eos_token": True,
            "chat_template": [{"name": "default", "template": ODD}, {"name": "tool_use", "template": CHATML}],
        },
        {},
    ),
    "files": (
        byte_level,
        {"eos_token": "<|user|>"},
        {"chat_template.jinja": ODD, "additional_chat_templates/tool_use.jinja": CHATML},
    ),
    # Tokens that only the other files know.
    "fine_tune": (
        pieces,
        numbered(
            pieces,
            "<|im_start|>",
            {"content": "<|im_end|>", "special": False, "normalized": False, "rstrip": True},
            {"content": "<new>", "lstrip": True, "single_word": True, "normalized": True, "special": False},
            {"content": "New", "single_word": True, "normalized": False},
            config={"eos_token": "<|im_end|>", "chat_template": CHATML, "pad_token": "[PAD]"},
        ),
        {},
    ),
    "reflagged": (
        byte_level,
        {
            "added_tokens_decoder": {
                str(byte_level().token_to_id("<|eot|>")): {"content": "<|eot|>", "lstrip": True, "special": False},
                str(byte_level().token_to_id("<|user|>")): {"content": "<|user|>", "special": True},
            },
            "eos_token": "<|eot|>",
            "pad_token": {"__type": "AddedToken", "content": "[PAD]", "lstrip": True, "special": True},
        },
        {},
    ),
    "added_file": (
        pieces,
        {"chat_template": CHATML, "additional_special_tokens": ["<new>"]},
        {
            "added_tokens.json": json.dumps(following(pieces, "<new>", "<|im_end|>", "<|im_start|>", "New")),
            "special_tokens_map.json": json.dumps({"eos_token": {"content": "<|im_end|>", "lstrip": False}}),
        },
    ),
    "map_file": (
        byte_level,
        {},
        {
            "special_tokens_map.json": json.dumps(
                {
                    "additional_special_tokens": ["<new>", "New"],
                    "pad_token": {"content": "[PAD]", "lstrip": True, "normalized": True},
                }
            )
        },
    ),
    "extra_list": (byte_level, {"extra_special_tokens": ["<new>", "<|im_start|>", "New"]}, {}),
    "extra_dict": (pieces, {"extra_special_tokens": {"new": "<new>", "x_token": "New"}, "boi_token": "[PAD]"}, {}),
    # Classes whose pipeline is not that of tokenizer.json.
    "llama_class": (pieces, {**LLAMA, "legacy": False}, {}),
    "llama_legacy": (pieces, {**LLAMA, "legacy": True, "tokenizer_class": "LlamaTokenizerFast"}, {}),
    "llama_null": (pieces, {**LLAMA, "legacy": None, "add_bos_token": False, "add_eos_token": True}, {}),
    "llama_no_space": (pieces, {**LLAMA, "add_prefix_space": False}, {}),
    "llama_names": (pieces, {"tokenizer_class": "LlamaTokenizer", "chat_template": LLAMA2}, {}),
    "llama_fine_tune": (
        pieces,
        numbered(pieces, "<|im_start|>", "<|im_end|>", config={**LLAMA, "eos_token": "<|im_end|>"}),
        {"config.json": '{"model_type": "llama"}'},
    ),
    "llama_bytes": (byte_level, {"tokenizer_class": "LlamaTokenizer", "bos_token": "<|begin|>"}, {}),
    "mistral": (pieces, LLAMA, {"config.json": '{"model_type": "mistral"}'}),
    "phi3": (pieces, LLAMA, {"config.json": '{"model_type": "phi3"}'}),
    "gemma_class": (pieces, {"tokenizer_class": "GemmaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}, {}),
    "gemma3": (pieces, {"tokenizer_class": None}, {"config.json": '{"model_type": "gemma3_text"}'}),
    "qwen2": (byte_level, LLAMA, {"config.json": '{"model_type": "qwen2"}'}),
    "qwen3": (byte_level, {"tokenizer_class": None}, {"config.json": '{"model_type": "qwen3"}'}),
    "gpt2": (
        byte_level,
        {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True, "eos_token": "<|end|>"},
        {"config.json": '{"model_type": "gpt2"}'},
    ),
    "whisper": (heard, {"tokenizer_class": "WhisperTokenizer"}, {"config.json": '{"model_type": "whisper"}'}),
    "gpt_oss": (
        byte_level,
        {"eos_token": "<|end|>", "bos_token": "<|begin|>"},
        {"config.json": '{"model_type": "gpt_oss"}'},
    ),
}


def build(kind: str, directory: Path) -> Path:
    """Writes a tokenizer as a checkpoint carries it, and returns the directory."""
    tokenizer, config, files = KINDS[kind]
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer().save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    if config["tokenizer_class"] is None:
        del config["tokenizer_class"]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)
    return directory


def expected(kind: str, directory: Path) -> dict[str, Any]:
    """Returns what transformers says."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    kinds = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    added = {i: [getattr(token, kind) for kind in kinds] for i, token in tokenizer.added_tokens_decoder.items()}
    facts: dict[str, Any] = {"added": sorted([i, *token] for i, token in added.items()), "texts": [], "chats": {}}
    facts["named"] = tokenizer.special_tokens_map
    for text in TEXTS:
        framed, plain = tokenizer.encode(text), tokenizer.encode(text, add_special_tokens=False)
        shown = tokenizer.decode(framed), tokenizer.decode(framed, skip_special_tokens=True)
        facts["texts"].append([framed, plain, *shown])
    if tokenizer.chat_template is None:
        return facts
    for name, messages in MESSAGES.items():
        for prompt in (True, False):
            for tools in (None, TOOLS):
                key = f"{name}{' prompt' * prompt}{' tools' * (tools is not None)}"
                options = {"add_generation_prompt": prompt, "tools": tools}
                try:
                    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
                    tokens = tokenizer.apply_chat_template(messages, return_dict=False, **options)
                    facts["chats"][key] = [text, tokens]
                except Exception as error:  # noqa: BLE001  (whatever it is, it is refused)
                    facts["chats"][key] = [str(error), None]
    return facts


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        facts = {kind: expected(kind, build(kind, Path(folder) / kind)) for kind in KINDS}
    PATH.write_text(json.dumps(facts, ensure_ascii=False, separators=(",", ":")) + "\n")
    print(f"{PATH}: {PATH.stat().st_size:,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
