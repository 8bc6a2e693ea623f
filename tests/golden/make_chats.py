"""Makes chats.json: what Hugging Face transformers makes of messages, of functions as tools, and of what it continues.

    python tests/golden/make_chats.py

needs transformers. Templates, messages and functions are written down here, so that tests use them without it.
"""

from __future__ import annotations

import enum
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal, Optional, Union

try:
    from .make_tokenizers import CHATML, GEMMA, LLAMA2, LLAMA3, build
except ImportError:  # run as a script
    from make_tokenizers import CHATML, GEMMA, LLAMA2, LLAMA3, build

PATH = Path(__file__).with_name("chats.json")

# In the manner of Qwen 3, DeepSeek and gpt-oss: reasoning, calls of tools, content in parts.
QWEN3 = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.reasoning_content is string %}{{- '<think>' + message.reasoning_content + '</think>' }}{%- endif %}
    {%- if message.content is string %}{{- message.content }}
    {%- else %}{%- for part in message.content %}{{- part.text }}{%- endfor %}{%- endif %}
    {%- for call in message.tool_calls or [] %}
        {{- call.function.name + ' ' }}
        {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' + ('' if enable_thinking else '<think></think>') }}
{%- endif %}
"""
TRIMMED = """\
{% for message in messages %}<|start|>{{ message['role'] }}<|sep|>{{ message['content'] | trim }}<|end|>
{% endfor %}"""
OSS = """\
{% for message in messages %}{{ '<|start|>' + message.role }}
{%- if message.thinking %}{{ '<|sep|>analysis ' + message.thinking + '<|im_end|>' }}{% endif %}
{%- for call in message.tool_calls or [] %}{{ call.function.name + call.function.arguments | tojson }}{% endfor %}
{{- message.content + ('<|eot|>' if loop.last else '<|im_end|>') }}{% endfor %}"""
TEMPLATES = {
    "chatml": CHATML,
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "qwen3": QWEN3,
    "trimmed": TRIMMED,
    "oss": OSS,
}

USER = {"role": "user", "content": "What?"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "zwö"}}}
CHATS: dict[str, list[dict[str, Any]]] = {
    "plain": [USER, {"role": "assistant", "content": "It is"}],
    "spaces": [USER, {"role": "assistant", "content": "  It is \n"}],
    "reasoning": [USER, {"role": "assistant", "content": "4", "reasoning": "2 and 2"}],
    "thinking": [USER, {"role": "assistant", "content": "4", "thinking": "2 and 2", "reasoning_content": None}],
    "both": [USER, {"role": "assistant", "content": "4", "thinking": "a", "reasoning_content": "b"}],
    "parts": [
        USER,
        {"role": "assistant", "content": [{"type": "text", "text": "It "}, {"type": "text", "text": "is "}]},
    ],
    "joined": [USER, {"role": "assistant", "content": "It is "}],  # what parts say, as one text
    "calls": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
    "twice": [{"role": "user", "content": "It is"}, {"role": "assistant", "content": "It is"}],
    "empty": [USER, {"role": "assistant", "content": ""}],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "as they are": {"add_generation_prompt": False},
    "continued": {"add_generation_prompt": False, "continue_final_message": True},
    "reasoning continued": {"add_generation_prompt": False, "continue_final_message": "reasoning_content"},
}


class Drink(enum.Enum):
    TEA = "tea"
    COFFEE = "coffee"


def functions() -> list[Any]:
    """Returns functions as users write them."""

    def add(a: int, b: int = 0) -> int:
        """Adds two numbers.

        Args:
            a: The first.
            b: The second.

        Returns:
            Their sum.
        """
        return a + b

    def nothing() -> None:
        """Does nothing."""

    def many(a: Optional[int], b: list[int], c: dict[str, float], d: Union[int, str], e: float | None = None):  # noqa: UP007, UP045
        """Takes many.

        It has a second paragraph.

        Args:
            a (int, optional): May be none,
                and its text goes on
                over lines: three of them.
            b (`list[int]`): Numbers.

            c: Sizes by name.
            d: Either.
            e: A number or none.

        Raises:
            ValueError: always.
        """

    def chosen(a: Literal["x", "y"], b: Literal[1, "z", None], c: Drink, d: str, e: bool = True) -> Drink:
        """Chooses.
        Args:
          a: One of two.
          b: One of three kinds.
          c: What to drink.
          d: As text (choices: ["red ", "green"])
          e: Whether.
        Returns:
          What was chosen.
        """

    def nested(a: list[dict[str, list[int]]], b: tuple[int, str], c: list[int] | None, d: int | list[str], e: Any):
        """Takes nested ones.

        Args:
            a: One.
            b: Two.
            c: Three.
            d: Four.
            e: Five.
        """

    def bare(a: list, b: dict, c: tuple, d: int | float | str, e: list | tuple) -> set:
        """Takes bare ones: without inner kinds

        Args:
            a: One
            b: Two
            c: Three
            d: Four
            e: Five
        """

    def late(a: "int", b: "list[str]" = ()) -> "str":  # noqa: UP037
        """Has annotations as text.

        Args:
            a: The first
            b: The second
        Returns:
            str: A text.
        """

    class Shop:
        def buy(self, what: str, *, count: int = 1) -> float:
            """Buys something.

            Args:
                what: Its name.
                count: How many.
            """
            return 0.0

    return [add, nothing, many, chosen, nested, bare, late, Shop().buy]


def wrong_functions() -> list[Any]:
    """Returns functions that have no schema."""

    def no_doc(a: int):
        pass

    def no_hint(a):
        """Doc.

        Args:
            a: One.
        """

    def not_described(a: int, b: int):
        """Doc.

        Args:
            a: One.
        """

    def custom(a: Path):
        """Doc.

        Args:
            a: One.
        """

    def single(a: tuple[int]):
        """Doc.

        Args:
            a: One.
        """

    def any_length(a: tuple[int, ...]):
        """Doc.

        Args:
            a: One.
        """

    def bad_literal(a: Literal[b"x"]):
        """Doc.

        Args:
            a: One.
        """

    return [no_doc, no_hint, not_described, custom, single, any_length, bad_literal]


def expected() -> dict[str, Any]:
    """Returns what transformers says."""
    from transformers import AutoTokenizer
    from transformers.utils import get_json_schema

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = AutoTokenizer.from_pretrained(build("llama3", Path(folder) / "tokenizer"))
    tokenizer.bos_token, tokenizer.eos_token = "<|begin|>", "<|end|>"
    texts: dict[str, str | None] = {}
    for name, template in TEMPLATES.items():
        for chat, messages in CHATS.items():
            for option, values in OPTIONS.items():
                try:
                    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **values)
                except Exception:  # noqa: BLE001  (whatever it is, it is refused)
                    text = None
                texts[f"{name}/{chat}/{option}"] = text
    for function in wrong_functions():
        try:
            get_json_schema(function)
        except Exception:  # noqa: BLE001  (of several kinds)
            continue
        raise SystemExit(f"{function.__name__} has a schema")
    return {"texts": texts, "schemas": [get_json_schema(function) for function in functions()]}


def main() -> None:
    facts = expected()
    PATH.write_text(json.dumps(facts, ensure_ascii=False, separators=(",", ":")) + "\n")
    print(f"{PATH}: {PATH.stat().st_size:,} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
