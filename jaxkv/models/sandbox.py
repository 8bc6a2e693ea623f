"""Where chat templates run: they are code from elsewhere. This file is run as a script, in a process of its own.

What templates find here follows Hugging Face transformers 5. https://huggingface.co/docs/transformers/chat_templating
It imports nothing of jaxkv, so that the process starts within a tenth of a second.
"""

from __future__ import annotations

import datetime
import functools
import json
import math
import signal
import sys
from collections.abc import Callable
from typing import Any

_ROOM = 64 << 20  # bytes of address space that Python and jinja2 may still take before a template gets any


def render(template: str, variables: dict[str, Any], given: list[str], most: int) -> dict[str, Any]:
    """Returns {"text": ...}, or what is wrong: {"syntax"|"unread"|"refused"|"size": ...}.

    Args:
      template: a chat template.
      variables: what it may read.
      given: the variables that must be read: if one is not, the answer is {"unread": [all that the template reads]}.
      most: characters of the longest text.
    """
    import jinja2

    try:
        compiled, reads = _compiled(template)
        if not reads.issuperset(given):
            return {"unread": sorted(reads)}
        text = compiled.render(variables)
    except jinja2.TemplateSyntaxError as error:
        return {"syntax": f"{error.message} (its line {error.lineno})"}
    except MemoryError:
        return {"size": "memory"}
    except Exception as error:  # noqa: BLE001  (whatever it is, the template raised it)
        return {"refused": str(error) or type(error).__name__}
    return {"text": text} if len(text) <= most else {"size": "text"}


@functools.lru_cache(16)
def _compiled(template: str) -> tuple[Any, frozenset[str]]:
    from jinja2 import meta

    environment = _environment()
    parsed = environment.parse(template)
    return environment.from_string(template), frozenset(meta.find_undeclared_variables(parsed))


@functools.cache
def _environment() -> Any:
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """{% generation %} marks what an assistant says, which matters in training only."""

        tags = {"generation"}  # noqa: RUF012  (as jinja2 has it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    class PublicNamespace(Namespace):
        """jinja2's `namespace`, closed to names by which templates reach into Python."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, *rest = args
            for name in (values := dict(*rest, **kwargs)):
                _check_public(name)
            Namespace.__init__(self, values)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_public(name)
            super().__setitem__(name, value)

    class Dict:
        """`dict`, without the rest of the type."""

        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    def _check_public(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a chat template may not set {name!r} on a namespace")

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        # jinja2's own escapes HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    environment.globals["namespace"] = PublicNamespace
    environment.globals["dict"] = Dict()
    return environment


def _serve() -> None:
    """Answers requests, one JSON object a line, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who asked
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.path[:] = json.loads(requests.readline())
    _environment()  # before memory is limited
    answers.write(b'{"ready": true}\n')
    answers.flush()

    alarm: Callable[[int], object] = getattr(signal, "alarm", lambda seconds: None)
    for line in requests:
        request = json.loads(line)
        _limit(request["most_bytes"])
        alarm(math.ceil(request["seconds"]) + 1)  # if nobody is left who would end this process
        try:
            answer = json.dumps(render(**request["render"])).encode()
        except MemoryError:
            answer = b'{"size": "memory"}'
        alarm(0)
        answers.write(answer + b"\n")
        answers.flush()


def _limit(most_bytes: int) -> None:
    """Limits the memory of this process, where the system can."""
    try:
        import resource

        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _ROOM + most_bytes, resource.getrlimit(resource.RLIMIT_AS)[1]))
    except (ImportError, OSError, ValueError):
        pass


if __name__ == "__main__":
    _serve()
