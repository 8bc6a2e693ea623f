"""How the documentation is built: `make docs`."""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective

import jaxkv

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "inventories")]
import api_pages  # noqa: E402
import cells  # noqa: E402
import inventory  # noqa: E402

project = "jaxkv"
author = "the jaxkv authors"
version = release = jaxkv.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
exclude_patterns = ["data", "inventories"]
intersphinx_mapping = inventory.write(HERE / "api" / "inventories")

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


class LinksOfNames(SphinxTransform):
    """Links names in the code of Markdown pages, such as `jaxkv.Cache` or `jax.jit`, as those of docstrings are."""

    default_priority = 500

    def apply(self, **kwargs):
        if self.env.docname.startswith("api/"):
            return
        for literal in list(self.document.findall(nodes.literal)):
            name = literal.astext().removesuffix("()")
            inside = isinstance(literal.parent, nodes.reference | addnodes.pending_xref)
            if re.fullmatch(r"(jaxkv|jax|flax|nnx|nn|jnp|lax)(\.\w+)+", name) and not inside:
                options = {"refdomain": "py", "reftype": "obj", "reftarget": name, "refexplicit": True}
                link = addnodes.pending_xref("", refdoc=self.env.docname, **options)
                literal.replace_self(link)
                link.append(literal)


class PicturesInThePage(SphinxTransform):
    """Writes pictures of caches into the page: as images they would not know whether the page is light or dark."""

    default_priority = 500

    def apply(self, **kwargs):
        for image in list(self.document.findall(nodes.image)):
            if image["uri"].startswith("figures/") and image["uri"].endswith(".svg"):
                markup = (HERE / image["uri"]).read_text("utf-8")
                named = markup.replace("<svg ", f'<svg aria-label="{html.escape(image["alt"])}" ', 1)
                image.replace_self(nodes.raw("", named, format="html"))


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
    app.add_transform(LinksOfNames)
    app.add_transform(PicturesInThePage)
    app.connect("autodoc-process-docstring", _as_restructured_text, priority=100)  # before napoleon
