"""Runs the cells of a notebook in docs/notebooks: `conf.py` for the site, `tests/test_readme.py` for its claims.

The notebooks are MyST Markdown: Jupyter and VS Code open them through jupytext, and a diff of one can be read.
"""

from __future__ import annotations

import ast
import contextlib
import io
from typing import Any


def run(source: str, names: dict[str, Any], where: str = "cell") -> tuple[str, str]:
    """Runs a cell, and returns what a notebook shows under it: (printed text, HTML or "").

    Args:
      source: the code; if its last statement is an expression, its value is shown too.
      names: the variables of the notebook, which the cell may change.
      where: what an error names as the file.
    """
    body = ast.parse(source, where).body
    last = ast.Expression(body.pop().value) if body and isinstance(body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body, type_ignores=[]), where, "exec", dont_inherit=True), names)
        if last is not None:
            value = eval(compile(last, where, "eval", dont_inherit=True), names)
    if hasattr(value, "_repr_html_"):
        return printed.getvalue(), value._repr_html_()
    return printed.getvalue() + ("" if value is None else f"{value!r}\n"), ""
