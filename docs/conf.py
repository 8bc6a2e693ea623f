"""How the documentation is built: `make docs`."""

from __future__ import annotations

import pkgutil
import re
import sys
from pathlib import Path

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

import jaxkv

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import api_pages  # noqa: E402
import cells  # noqa: E402

project = "jaxkv"
author = "the jaxkv authors"
version = release = jaxkv.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
exclude_patterns = ["data"]

default_role = "py:obj"  # a public name in backquotes becomes a link; anything else stays code
suppress_warnings = ["ref.python"]  # a word such as `dtype` is an attribute of several classes
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # most are Any: the docstrings give shapes and dtypes
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False

html_theme = "sphinx_book_theme"
html_title = "jaxkv"
html_theme_options = {"show_navbar_depth": 2, "use_download_button": False, "use_fullscreen_button": False}


def _as_restructured_text(app, what, name, obj, options, lines):
    """Docstrings are plain text with code in backquotes and in fences: everything else stands for itself."""
    inside = False
    for i, line in enumerate(lines):
        if line.strip().startswith("```"):
            inside = not inside
            lines[i] = ".. code-block:: python\n" if inside else ""
        elif inside:
            lines[i] = f"    {line}"
        elif not line.lstrip().startswith((">>>", "...")):
            parts = re.split(r"(`[^`]*`)", line)
            parts[::2] = [re.sub(r"[*|]|_(?!\w)", r"\\\g<0>", part) for part in parts[::2]]
            lines[i] = "".join(parts)
    lines[:] = "\n".join(lines).split("\n")


def _in_jax(app, env, node, content):
    """Links names of JAX to its documentation, which has a page for each. An inventory of it would need a network."""
    target = node.get("reftarget", "")
    try:
        known = target.startswith("jax.") and callable(pkgutil.resolve_name(target))
    except (ImportError, AttributeError, ValueError):  # it may be any code
        known = False
    if not known:
        return None
    return nodes.reference("", "", content, refuri=f"https://docs.jax.dev/en/latest/_autosummary/{target}.html")


class CodeCell(SphinxDirective):
    """A cell of a notebook, with what it shows."""

    has_content = True
    optional_arguments = 1  # the language

    def run(self):
        source, names = "\n".join(self.content), self.env.temp_data.setdefault("names of the notebook", {})
        shown = [nodes.literal_block(source, source, language="python")]
        text, markup = cells.run(source, names, self.env.docname)
        if text:
            shown.append(nodes.literal_block(text, text, language="none", classes=["output"]))
        if markup:
            style = "overflow-x: auto; margin-bottom: 1em"
            shown.append(nodes.raw("", f'<div class="output" style="{style}">{markup}</div>', format="html"))
        return shown


def setup(app):
    app.add_directive("code-cell", CodeCell)
    api_pages.write(HERE / "api")
    app.connect("missing-reference", _in_jax)
    app.connect("autodoc-process-docstring", _as_restructured_text, priority=100)  # before napoleon
