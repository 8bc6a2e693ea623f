"""What can be asked of the command, and how it is said in --help."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import math
import os
import platform
import textwrap
from collections.abc import Callable
from typing import Any, NoReturn

from jaxkv import __version__
from jaxkv.sizes import parse_bytes

MIN_CAPACITY = 1024  # a power of two, so that most calls share their compiled programs
DTYPES = ("float32", "bfloat16", "float16")
STORAGES = ("int8", "int4", "float8", *DTYPES)
_MOST_TOKENS = 1 << 30  # of a sequence: positions are int32
_MOST_SEED = (1 << 32) - 1  # JAX reads 32 bits

# What may be typed at one's turn in `jaxkv chat`: (command, what it does).
COMMANDS = (
    ("/help", "show these commands"),
    ("/undo", "forget the last exchange"),
    ("/reset", "forget everything but the system message"),
    ("/save FILE", "write the conversation, and its cache, to a file"),
    ("/load FILE", "go on with a conversation from such a file"),
    ("/quit", "end; so do Ctrl-D, and Ctrl-C twice"),
)


class UsageError(Exception):
    """What was asked for can't be done, whatever the machine."""


class Failure(Exception):
    """Something is missing or can't be read; the message says what, and what to do."""


class _Parser(argparse.ArgumentParser):
    def __init__(self, *, description: str, **rest: Any) -> None:
        described = textwrap.fill(description, 100)
        super().__init__(description=described, formatter_class=argparse.RawDescriptionHelpFormatter, **rest)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"jaxkv: error: {message}; see {self.prog} --help\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = self.parse_known_args(args, namespace)
        words = [word for word in rest if not word.startswith("-")]
        only_words = bool(rest) and words == rest
        if only_words and found.command == "chat":
            start = "chat takes no text here: start it and then write"
            self.exit(2, f"jaxkv: error: {start}; a checkpoint goes after --model: --model {words[0]}\n")
        if only_words and found.command == "generate":
            if found.model is None and os.path.isdir(found.prompt):
                self.exit(2, f"jaxkv: error: a checkpoint goes after --model: --model {found.prompt}\n")
            prompt = " ".join([found.prompt, *words])
            self.exit(2, f'jaxkv: error: the prompt is more than one word: put it in quotes, "{prompt}"\n')
        if rest:
            self.exit(2, f"jaxkv: error: {' '.join(rest)} is not known; see jaxkv {found.command} --help\n")
        return found


def parser() -> argparse.ArgumentParser:
    """Returns the parser; `command` names the file of this folder whose `run(args)` does what was asked for."""
    top = _Parser(
        prog="jaxkv",
        description="Continues text with a model: a checkpoint directory from Hugging Face, or the small bundled "
        "model. A cache keeps the text's keys and values, so the model never computes them twice.",
        epilog="""\
examples:
  jaxkv generate "The with statement"
  jaxkv generate "A list is" --max-new-tokens 400 --temperature 0.5 --samples 3
  head -c 300 notes.txt | jaxkv generate --greedy --quiet > continued.txt
  jaxkv generate "The with statement" --compare
  jaxkv chat
  hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B
  jaxkv info Qwen3-0.6B
  jaxkv chat --model Qwen3-0.6B

Compiled programs are kept in $JAXKV_CACHE_DIR (or $JAX_COMPILATION_CACHE_DIR; by default in the folder
jaxkv under $XDG_CACHE_HOME or ~/.cache), so that the second start is quick. You may delete them.""",
    )
    top.add_argument("--version", action=_Version, nargs=0, help="print the versions of jaxkv, JAX, Flax and Python")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    _add_generate(commands)
    _add_chat(commands)
    _add_info(commands)
    _add_doctor(commands)
    _add_memo(commands)
    return top


def _add_generate(commands: Any) -> None:
    command = commands.add_parser(
        "generate",
        help="continue a text",
        description="Continues a text and shows each token at once. Standard error reports the time to the first "
        "token, tokens per second, the sampling settings, and the size of the cache. Sampling follows the checkpoint's "
        "generation_config.json: greedy unless it has do_sample. Options override it.",
        epilog="""\
examples:
  jaxkv generate "The with statement"                   the same every time: the seed is 0
  jaxkv generate "The with statement" --seed 1 -n 400   another text, and longer
  jaxkv generate "A list is" --greedy                   always the most probable next token
  jaxkv generate "A list is" --samples 4 --top-p 0.9    four texts, decoded together in one cache
  echo "An iterator" | jaxkv generate -q                prompt from standard input, no report
  jaxkv generate "A list is" --compare                  what the cache saves
  jaxkv generate "A list is" --beams 4                  the most probable text that four beams find
  jaxkv generate "A list is" --best-of 8 --samples 2    the best two of eight, with one prefill
  jaxkv generate -q --speculate lookup < old.py         fewer steps for texts that repeat themselves
  jaxkv generate --prompts prompts.txt --json > out.jsonl   one prompt per line, one JSON per text
  jaxkv generate --model Qwen3-0.6B "Once"              with a checkpoint and its sampling settings""",
    )
    command.set_defaults(command="generate")
    add = command.add_argument
    add(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        help="the text to continue; without it, or with -, standard input",
    )
    _add_decoding(command, "200", f"enough for prompt and text, at least {MIN_CAPACITY:,}")
    samples_help = "number of texts for each prompt (default: 1); with --beams and --best-of, the best N"
    add("--samples", type=_count, default=1, metavar="N", help=samples_help)
    prompts_help = "continue each line of this file (- for standard input); skips empty lines"
    add("--prompts", metavar="FILE", help=prompts_help)
    rows_help = "number of texts decoded at once (default: all samples of one prompt, 8 with --prompts)"
    add("--rows", type=_count, metavar="N", help=rows_help)
    speculate_help = (
        "speculative decoding: draft several tokens and check them in one step. The text is the same, in fewer steps. "
        "lookup drafts from the text itself, DIR is a small checkpoint with the same vocabulary"
    )
    add("--speculate", metavar="lookup|DIR", help=speculate_help)
    json_help = "print one JSON object for each text: line (with --prompts), prompt, text, tokens, reason, score"
    add("--json", action="store_true", help=json_help)
    add("--beams", type=_count, metavar="N", help="search for the most probable text with N beams, all in one cache")
    best_help = "draw N texts and print the one whose tokens are the most probable on average"
    add("--best-of", type=_count, metavar="N", help=best_help)
    layout_help = (
        "memory layout of the cache: a row for each text, or a pool of pages, so that the texts of --beams and "
        "--best-of share their common prefix (default: pages with these two, else rows)"
    )
    add("--layout", choices=("rows", "pages"), help=layout_help)
    add("--watch", action="store_true", help="show in the terminal how the cache fills while the model writes")
    add("--trace", metavar="FILE", help="write an HTML page that shows the cache step by step, with a slider")
    add(
        "--compare",
        action="store_true",
        help="decode greedily with a cache and without, at several lengths; compare the tokens and the times",
    )
    add("-q", "--quiet", action="store_true", help="no report on standard error")


def _add_chat(commands: Any) -> None:
    command = commands.add_parser(
        "chat",
        help="chat with a model",
        description="You write a line. The model answers if its checkpoint has a chat template; otherwise it continues "
        "the text. The cache keeps the conversation, so each turn only computes new tokens; a note after each turn "
        "says how many tokens the cache saved. When the cache is full, the chat forgets the oldest part. (The bundled "
        "model only continues text: it was not trained to answer.)",
        epilog=f"""\
at your turn:
{describe_commands()}
at the model's turn:
  Ctrl-C        stop it; its text so far stays""",
    )
    command.set_defaults(command="chat")
    _add_decoding(
        command, "1,024 with a chat template and 120 without", f"4,096 with a chat template, else {MIN_CAPACITY:,}"
    )
    session_help = (
        "continue the conversation in this file, if it exists, and keep it there after each turn: its messages and its "
        "cache, so that nothing is prefilled again"
    )
    command.add_argument("--session", metavar="FILE", help=session_help)
    command.add_argument("--system", metavar="TEXT", help="a system message: instructions to the model")
    command.add_argument("-q", "--quiet", action="store_true", help="no notes on standard error")


def _add_doctor(commands: Any) -> None:
    command = commands.add_parser(
        "doctor",
        help="show versions, devices and the form of attention, and check for known faults",
        description="Prints versions, devices, the form of attention, whether the native kernel for CPUs is there, "
        "and if not, why, and whether this jaxlib computes a known sum wrong. Builds the kernel if it is not there.",
    )
    command.set_defaults(command="doctor")


def _add_info(commands: Any) -> None:
    command = commands.add_parser(
        "info",
        help="describe a model, and the memory of its cache",
        description="Describes a checkpoint, or the bundled model: parameters, layers and their reaches (attention "
        "patterns), bytes of cache per token, and the longest text that fits into memory. Reads no weights.",
        epilog="""\
examples:
  jaxkv info                                         the bundled model
  jaxkv info Qwen3-0.6B --memory 8GB                 on another machine
  jaxkv info Qwen3-0.6B --rows 8 --context 32k       8 texts at once, of up to 32,000 tokens
  jaxkv info Qwen3-0.6B --storage int8               a cache of 8 bits per number
  jaxkv info Qwen3-0.6B --rows 8 --layout pages      a pool of pages that 8 texts share""",
    )
    command.set_defaults(command="info")
    directory_help = "directory of a checkpoint (default: the bundled model)"
    command.add_argument("directory", nargs="?", metavar="DIR", help=directory_help)
    command.add_argument("-m", "--model", metavar="DIR", help="the same as DIR")
    memory_help = "memory for parameters and cache (default: the free memory of this machine)"
    command.add_argument("--memory", type=_size, metavar="SIZE", help=memory_help)
    rows_help = "number of texts in the cache at once (default: 1)"
    command.add_argument("--rows", type=_count, default=1, metavar="N", help=rows_help)
    capacity_help = "tokens of each text (default: the model's context length)"
    command.add_argument("--context", "--capacity", dest="capacity", type=_tokens, metavar="N", help=capacity_help)
    _add_storage(command)
    layout_help = "memory layout of the cache: a row for each text, or a pool of pages for all texts (default: rows)"
    command.add_argument("--layout", choices=("rows", "pages"), default="rows", help=layout_help)


def _add_memo(commands: Any) -> None:
    command = commands.add_parser(
        "memo",
        help="list, check or shrink the disk store of a memo",
        description="Lists, checks or shrinks the directory in which a memo keeps its outputs: jaxkv.Memo(disk=DIR). "
        "Other programs may use the directory at the same time.",
        epilog="""\
examples:
  jaxkv memo ls features                     list the functions with outputs in the store
  jaxkv memo stat features                   its size, and how much of it could be freed
  jaxkv memo verify features                 read and check every record
  jaxkv memo prune features --to 20GiB       remove the least recently used outputs""",
    )
    actions = command.add_subparsers(metavar="{ls,stat,verify,prune}", required=True)

    def add_action(name: str, help: str, description: str, epilog: str) -> argparse.ArgumentParser:
        action = actions.add_parser(name, help=help, description=description, epilog=f"examples:\n{epilog}")
        action.set_defaults(command="memo", action=name)
        action.add_argument("directory", metavar="DIR", help="the memo's directory: its disk= argument")
        return action

    add_action(
        "ls",
        "list the functions with outputs in the store",
        "Lists the functions with outputs in the store, the most recently used first. Each line shows a namespace (one "
        "function with its weights and settings), the number of items, their bytes, the time of the last write (with "
        "the policies lru and mru: of the last use), and the input and output of one item. On a terminal lines are cut "
        "to its width; in a file or a pipe they are whole.",
        "  jaxkv memo ls features\n  jaxkv memo ls features | cat",
    )
    add_action(
        "stat",
        "show the size of the store",
        "Shows the number of items and bytes, and of bytes that belong to no item. Reads no payloads.",
        "  jaxkv memo stat features",
    )
    add_action(
        "verify",
        "check every record",
        "Reads every record and compares it with its checksum. The exit status is 1 if any is damaged. A memo never "
        "returns a damaged record: it counts as a miss, and is computed again.",
        "  jaxkv memo verify features",
    )
    prune = add_action(
        "prune",
        "shrink the store",
        "Removes outputs, a few records at a time, so that other programs need not wait. You may stop it at any time: "
        "the store stays valid.",
        """\
  jaxkv memo prune features --to 20GiB             remove the least recently used outputs
  jaxkv memo prune features --to 0                 remove everything
  jaxkv memo prune features --namespace 3f2a91c0   remove all outputs of one function
  jaxkv memo prune features --damaged              remove damaged records, and files that belong to none""",
    )
    prune.add_argument("--to", type=_size_or_0, metavar="SIZE", help="keep at most this much, such as 20GiB, or 0")
    namespace_help = "remove this namespace (its first characters are enough); repeat it for several"
    prune.add_argument("--namespace", action="append", default=[], metavar="NAME", help=namespace_help)
    prune.add_argument("--damaged", action="store_true", help="read every record and remove what is damaged")


def _add_decoding(command: argparse.ArgumentParser, max_new_tokens: str, capacity: str) -> None:
    add = command.add_argument
    model_help = "directory of a checkpoint (default: the small bundled model)"
    add("-m", "--model", metavar="DIR", help=model_help)
    dtype_help = "dtype of parameters, computation and cache (default: float32 on a CPU, else the checkpoint's)"
    add("--dtype", choices=DTYPES, help=dtype_help)
    _add_storage(command)
    devices_help = "divide the model's heads, MLPs and vocabulary over N local devices (default: one device)"
    add("--devices", type=_count, metavar="N", help=devices_help)
    length_help = f"at most N new tokens (default: that of generation_config.json, else {max_new_tokens})"
    add("-n", "--max-new-tokens", type=_tokens, metavar="N", help=length_help)
    for name, (kind, metavar, help) in SAMPLING.items():
        add(option(name), type=kind, metavar=metavar, help=help)
    add("--greedy", action="store_true", help="always the most probable token")
    add("--seed", type=_seed, default=0, metavar="N", help="another seed gives another text (default: 0)")
    capacity_help = f"tokens that the cache can hold (default: {capacity}, but at most the model's context length)"
    add("--capacity", type=_tokens, metavar="N", help=capacity_help)


def _add_storage(command: argparse.ArgumentParser) -> None:
    storage_help = (
        f"storage of the cache (KV quantization): {', '.join(STORAGES)}; two with a comma for keys and values, such as "
        "int8,int4 (default: the dtype of the computation)"
    )
    command.add_argument("--storage", type=_storage, metavar="NAME", help=storage_help)


def _storage(text: str) -> str:
    names = text.split(",")
    if len(names) > 2 or not set(names) <= set(STORAGES):
        possible = ", ".join(STORAGES)
        raise argparse.ArgumentTypeError(
            f"{text!r} does not name a storage; give one of {possible}, or two for keys and values, such as int8,int4"
        )
    return text


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _size_or_0(text: str) -> int:
    return 0 if text.strip() == "0" else _size(text)


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number; give one such as 0.8")
    return number


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number; give one such as 40") from None


def _between(least: int, most: int | None, what: str) -> Callable[[str], int]:
    def read(text: str) -> int:
        number = int(text) if text.isdecimal() and len(text) < 20 else -1
        if number < least or (most is not None and number > most):
            possible = f"{least:,} or more" if most is None else f"a whole number from {least:,} to {most:,}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}; give {possible}")
        return number

    return read


def _tokens(text: str) -> int:
    """Returns a number of tokens, such as 4096, 128k (128,000) or 128Ki (131,072)."""
    with contextlib.suppress(ValueError):
        text = str(parse_bytes(text)) if text.lower().endswith(("k", "ki")) else text
    return _number_of_tokens(text)


_count = _between(1, None, "a count")
_number_of_tokens = _between(1, _MOST_TOKENS, "a number of tokens")
_seed = _between(0, _MOST_SEED, "a seed")

# What makes a sampler: the argument of jaxkv.sampling.sampler and so the name of the option, its kind, and its help.
SAMPLING: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "temperature": (_number, "T", "below 1: more predictable text; above 1: less"),
    "top_k": (_whole, "K", "choose among the K most probable tokens"),
    "top_p": (_number, "P", "choose among the fewest tokens that together have probability P"),
    "min_p": (_number, "P", "leave out tokens less probable than P times the most probable one"),
    "repetition_penalty": (_number, "R", "above 1: tokens that have occurred become less probable"),
    "frequency_penalty": (_number, "A", "above 0: the more often a token was written, the less probable it becomes"),
    "presence_penalty": (_number, "A", "above 0: tokens that were written become less probable"),
    "no_repeat_ngram_size": (_whole, "N", "no sequence of N tokens occurs twice in the text"),
    "min_new_tokens": (_whole, "N", "the text does not end before it has N new tokens"),
}
DRAWING = ("temperature", "top_k", "top_p", "min_p")  # what greedy decoding has no use for


def option(name: str) -> str:
    """Returns the option of an argument."""
    return f"--{name.replace('_', '-')}"


def describe_commands() -> str:
    return "\n".join(f"  {command:<12}  {what}" for command, what in COMMANDS)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        jax, flax = importlib.metadata.version("jax"), importlib.metadata.version("flax")
        print(f"jaxkv {__version__} (jax {jax}, flax {flax}, Python {platform.python_version()})")
        parser.exit()
