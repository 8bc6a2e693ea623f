"""Chat templates are run here, under a limit of time and memory: in a process of its own, kept from turn to turn.

Limits within a process leak: one multiplication of a text, one filter with a wide indent, and it hangs or is killed.
"""

from __future__ import annotations

import atexit
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxkv.extras import need
from jaxkv.models import sandbox

_START = 60.0  # seconds that Python may take to start


class Refusal(ValueError):
    """A template refuses what it was given; in another form it may take it."""


@dataclasses.dataclass(frozen=True)
class TemplateLimit:
    """How much a chat template may take.

    Attributes:
      seconds: longest time for one text; None runs templates in this process, without any limit.
      megabytes: most memory, on Linux; a fourth of it is the longest text, everywhere.
    """

    seconds: float | None = 10.0
    megabytes: int = 512

    def __post_init__(self) -> None:
        if self.seconds is not None and not 0 < self.seconds < 1e6:
            raise ValueError(f"seconds is {self.seconds!r}, must be above 0 and below a million, or None for no limit")
        if not 0 < self.megabytes < 1 << 20:
            raise ValueError(f"megabytes is {self.megabytes!r}, must be above 0 and below a million")


def render(template: str, where: str, variables: Mapping[str, Any], given: Iterable[str], limit: TemplateLimit) -> str:
    """Returns the text of a template.

    Args:
      template: the template.
      where: what it is called in errors.
      variables: what it may read; JSON.
      given: the names of those that it must read.
      limit: what it may take.

    Raises:
      ImportError: without the extra `jaxkv[models]`.
      Refusal: if it refuses the variables.
      ValueError: if it can't be read, never reads a variable that was given, or takes too much.
    """
    if importlib.util.find_spec("jinja2") is None:
        need("jinja2", "a chat template", "models")
    given = list(given)
    most = limit.megabytes << 18  # characters
    asked = json.dumps({"template": template, "variables": dict(variables), "given": given, "most": most})
    if limit.seconds is None:
        answer = sandbox.render(**json.loads(asked))
    else:
        answer = _process.ask(asked.encode(), limit.seconds, limit.megabytes << 20)
    match answer:
        case {"text": text}:
            return str(text)
        case {"syntax": why}:
            raise ValueError(f"{where} can't be read: {why}")
        case {"refused": why}:
            raise Refusal(f"{where} refuses these messages: {why}")
        case {"unread": reads}:
            unread = ", ".join(name for name in given if name not in reads)
            known = ", ".join(name for name in reads if name not in ("messages", "add_generation_prompt"))
            raise ValueError(f"{where} never reads {unread}; it reads {known or 'messages only'}")
        case {"size": what}:
            limited = f"{limit.megabytes} MB of memory" if what == "memory" else f"{most:,} characters"
            raise ValueError(
                f"{where} takes more than its limit, {limited}; if you trust it, give it more: "
                f"tokenizer.template_limit = TemplateLimit(megabytes={4 * limit.megabytes})"
            )
        case {"late": seconds}:
            raise ValueError(
                f"{where} takes longer than its limit, {seconds:g} s; if you trust it, give it more: "
                f"tokenizer.template_limit = TemplateLimit(seconds={6 * seconds:g})"
            )
        case {"no_process": why}:
            raise ValueError(
                f"{where} can't run in a process of its own ({why}); if you trust it, run it in this one, without a "
                "limit: tokenizer.template_limit = TemplateLimit(seconds=None)"
            )
    raise ValueError(f"{where} ended the process that ran it ({answer.get('died')}); does it nest too deeply?")


class _Process:
    """The process that runs templates: started when it is first asked, anew when it had to be ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: Any = None  # subprocess.Popen[bytes] | None

    def ask(self, asked: bytes, seconds: float, most_bytes: int) -> dict[str, Any]:
        request = b'{"seconds": %f, "most_bytes": %d, "render": %b}\n' % (seconds, most_bytes, asked)
        with self._lock:
            if self._running is None or self._running.poll() is not None:
                self.end()
                try:
                    self._running = _start()
                    # Its path is told, so that it needs no `site`.
                    ready = self._exchange(json.dumps([path for path in sys.path if path]).encode() + b"\n", _START)
                except OSError as error:
                    return {"no_process": error.strerror or str(error)}
                if "ready" not in ready:
                    return {"no_process": f"{sys.executable}: {ready}"}
            return self._exchange(request, seconds)

    def _exchange(self, line: bytes, seconds: float) -> dict[str, Any]:
        """Returns the answer to a line; without one the process is ended."""
        running = self._running
        late = threading.Event()

        def end() -> None:
            late.set()
            running.kill()

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        answer = b""
        try:
            while line:
                line = line[running.stdin.write(line) :]
            while not answer.endswith(b"\n") and (more := running.stdout.read(1 << 20)):
                answer += more
        except OSError:
            pass  # it has ended, by the timer or by itself
        finally:
            timer.cancel()
            if not answer.endswith(b"\n"):
                self.end()
        if answer.endswith(b"\n"):
            return dict(json.loads(answer))
        return {"late": seconds} if late.is_set() else {"died": f"exit status {running.returncode}"}

    def end(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.kill()
            running.communicate()


def _start() -> subprocess.Popen[bytes]:
    if not sys.executable or getattr(sys, "frozen", False):
        raise OSError("this program is not run by a Python that could be started again")
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(Path(sandbox.__file__))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,  # what a buffer holds, and its lock, a fork would have too
        start_new_session=True,  # Ctrl-C is not for it
        creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
    )


_process = _Process()
atexit.register(lambda: _process.end())


def _forget() -> None:
    """In a fork: leaves the process to the one who started it, and the lock, which another thread may hold for ever."""
    global _process
    running, _process = _process._running, _Process()
    if running is not None:
        running.returncode = 0  # it is not ours to wait for
        running.stdin.close()
        running.stdout.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
