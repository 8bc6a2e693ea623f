"""Pictures of strips of cells: as text for a terminal, as SVG for notebooks and pages, as a figure for papers.

What the cells mean is up to who makes the picture; here they have a kind, which gives them a color, and a text.
"""

from __future__ import annotations

import dataclasses
import html
import itertools
import os
import sys
from pathlib import Path
from typing import Any

# Kind: what the legend says, color on light and on dark ground, ANSI background, and its sign where there is no color.
KINDS = {
    "held": ("held", "#4c78a8", "#5b8fc9", 67, "#"),
    "new": ("written in this call", "#54a24b", "#6cc062", 71, "+"),
    "sink": ("sink", "#7a5195", "#a978c9", 97, "S"),
    "shared": ("shared by several rows", "#e07b39", "#f2934e", 173, "="),
    "seen": ("visible", "#4c78a8", "#5b8fc9", 67, "1"),
    "hidden": ("not visible", "none", "none", None, "."),
    "free": ("empty", "none", "none", None, "."),
}
_SIDE, _GAP, _LEFT = 22, 2, 76  # of a cell, between cells, room for labels; in pixels


@dataclasses.dataclass(frozen=True)
class Cell:
    """One square.

    Attributes:
      kind: one of `KINDS`.
      text: what stands in it; left out where there is no room.
      title: what a pointer that rests on it is told.
    """

    kind: str
    text: str = ""
    title: str = ""


@dataclasses.dataclass(frozen=True)
class Strip:
    """A line of cells with a label in front, and maybe a note behind them."""

    label: str
    cells: tuple[Cell, ...]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Panel:
    """Strips under one title; `columns` stand above the cells."""

    title: str
    strips: tuple[Strip, ...]
    columns: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, repr=False)
class Picture:
    """Some panels, one below the other. A notebook draws it; `print` writes it as text; `save` writes a file.

    >>> strip = Strip("row 0", (Cell("held", "0"), Cell("held", "1"), Cell("free")))
    >>> print(Picture((Panel("Full()", (strip,)),)))
    Full()
      row 0   0 1 .
    <BLANKLINE>
      # held   . empty
    """

    panels: tuple[Panel, ...]

    def __str__(self) -> str:
        color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        return self.text(color=color)

    __repr__ = __str__

    def text(self, *, color: bool = False) -> str:
        """Returns the picture as lines of text; with color as a terminal of 256 colors draws it."""
        lines = []
        for panel in self.panels:
            lines.append(panel.title)
            label = max([len(strip.label) for strip in panel.strips], default=0)
            texts = [cell.text for strip in panel.strips for cell in strip.cells]
            width = max([len(text) for text in [*texts, *panel.columns]] + [1])
            if panel.columns:
                heads = " ".join(name.rjust(width) for name in panel.columns)
                lines.append(f"  {'':{label}}   {heads}".rstrip())
            for strip in panel.strips:
                cells = " ".join(_cell_text(cell, width, color) for cell in strip.cells)
                lines.append(f"  {strip.label:{label}}   {cells}   {strip.note}".rstrip())
            lines.append("")
        lines.append("  " + "   ".join(f"{_cell_text(Cell(kind), 1, color)} {KINDS[kind][0]}" for kind in self._kinds))
        return "\n".join(lines)

    @property
    def svg(self) -> str:
        """The picture as one SVG element. It follows the reader's choice of light or dark."""
        parts, y, widest = [], 0, 0
        for panel in self.panels:
            y += 18
            widest = max(widest, 7 * len(panel.title))
            parts.append(f'<text class="t" x="0" y="{y - 4}">{html.escape(panel.title)}</text>')
            if panel.columns:
                for i, name in enumerate(panel.columns):
                    x = _LEFT + i * (_SIDE + _GAP) + _SIDE / 2
                    parts.append(
                        f'<text class="c" transform="translate({x + 3:g},{y + 62}) rotate(-90)">'
                        f"{html.escape(name[:9])}</text>"
                    )
                y += 66
            for strip in panel.strips:
                parts.append(f'<text class="l" x="0" y="{y + 15}">{html.escape(strip.label)}</text>')
                for i, cell in enumerate(strip.cells):
                    parts.append(_cell_svg(cell, _LEFT + i * (_SIDE + _GAP), y))
                end = _LEFT + len(strip.cells) * (_SIDE + _GAP)
                if strip.note:
                    parts.append(f'<text class="l" x="{end + 6}" y="{y + 15}">{html.escape(strip.note)}</text>')
                    end += 6 + 7 * len(strip.note)
                widest = max(widest, end)
                y += _SIDE + _GAP
            y += 10
        x = 0
        for kind in self._kinds:
            parts.append(_cell_svg(Cell(kind), x, y))
            parts.append(f'<text class="l" x="{x + _SIDE + 6}" y="{y + 15}">{KINDS[kind][0]}</text>')
            x += _SIDE + 24 + 7 * len(KINDS[kind][0])
        width, height = max(widest, x), y + _SIDE + 4
        return (
            f'<svg class="jaxkv" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img" style="max-width:100%;height:auto"><style>{_STYLE}</style>'
            f"{''.join(parts)}</svg>"
        )

    def _repr_html_(self) -> str:
        return f'<div style="overflow-x:auto">{self.svg}</div>'

    def figure(self) -> Any:
        """Returns the picture as a matplotlib figure.

        Raises:
          ImportError: without matplotlib, with the command that installs it.
        """
        try:
            from matplotlib.figure import Figure
            from matplotlib.patches import Patch, Rectangle
        except ImportError as error:
            raise ImportError("a figure needs matplotlib: pip install matplotlib") from error
        columns = max([len(strip.cells) for panel in self.panels for strip in panel.strips], default=1)
        heights = [max(len(panel.strips), 1) for panel in self.panels]
        figure = Figure(figsize=(1.6 + 0.26 * columns, 0.5 + sum(0.28 * height + 0.7 for height in heights)))
        axes = figure.subplots(len(self.panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axis, panel in zip(axes, self.panels, strict=True):
            for y, strip in enumerate(panel.strips):
                for x, cell in enumerate(strip.cells):
                    face = KINDS[cell.kind][1]
                    axis.add_patch(Rectangle((x, y), 0.92, 0.92, facecolor=face, edgecolor="#9a9a9a", linewidth=0.5))
                    if len(cell.text) <= 3:
                        ink = "black" if face == "none" else "white"
                        axis.text(x + 0.46, y + 0.5, cell.text, ha="center", va="center", fontsize=6, color=ink)
                axis.text(len(strip.cells) + 0.3, y + 0.5, strip.note, va="center", fontsize=6)
            axis.set(xlim=(-0.1, columns), ylim=(len(panel.strips), -0.1), xticks=[], aspect="equal")
            axis.set_yticks([y + 0.46 for y in range(len(panel.strips))], [strip.label for strip in panel.strips])
            axis.set_title(panel.title, fontsize=9, loc="left")
            axis.tick_params(length=0, labelsize=7)
            axis.spines[:].set_visible(False)
        patches = [Patch(facecolor=KINDS[k][1], edgecolor="#9a9a9a", label=KINDS[k][0]) for k in self._kinds]
        figure.legend(handles=patches, loc="lower center", ncols=len(patches), fontsize=7, frameon=False)
        return figure

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the picture to a file: .svg, .html, .txt, or what matplotlib can write (.png, .pdf).

        Raises:
          ValueError: for a name without a suffix.
          ImportError: if it takes matplotlib and there is none.
        """
        path = Path(path)
        if path.suffix == "":
            raise ValueError(f"save: {str(path)!r} has no suffix; end it with .svg, .html, .txt, .png or .pdf")
        if path.suffix == ".svg":
            path.write_text(self.svg, "utf-8")
        elif path.suffix == ".html":
            path.write_text(f"{_PAGE}{self._repr_html_()}", "utf-8")
        elif path.suffix == ".txt":
            path.write_text(self.text() + "\n", "utf-8")
        else:
            self.figure().savefig(path, dpi=150, bbox_inches="tight")

    @property
    def _kinds(self) -> list[str]:
        used = {cell.kind for panel in self.panels for strip in panel.strips for cell in strip.cells}
        return [kind for kind in KINDS if kind in used]


def _rules(*rules: str) -> str:
    """Returns CSS rules for this picture alone: the style of an SVG in a page is one of the whole page."""
    return "".join(f".jaxkv {rule}" for rule in rules)


_PAGE = (  # of a file: as wide as a phone, and dark where its reader likes it dark
    "<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'>"
    "<meta name=color-scheme content='light dark'><title>jaxkv</title>"
)
_LIGHT = (
    "text{font-family:system-ui,sans-serif;fill:currentColor;font-size:11px}",  # in a page, that of its text
    ".t{font-weight:600;font-size:12px}",
    "rect{stroke:#9a9a9a;stroke-width:.7}",
    ".n{fill:#fff!important;font-size:9px;text-anchor:middle}",
    ".e{font-size:9px;text-anchor:middle}",
    *(f".{kind}{{fill:{light}}}" for kind, (_, light, _, _, _) in KINDS.items()),
)
_DARK = (
    ".free{stroke:#666}",
    ".hidden{stroke:#666}",
    *(f".{kind}{{fill:{dark}}}" for kind, (_, _, dark, _, _) in KINDS.items()),
)
_FILE = ":root.jaxkv{{color:{}}}"  # a file by itself, which has no page around it
_STYLE = (
    f"{_FILE.format('#222')}{_rules(*_LIGHT)}"
    f"@media (prefers-color-scheme:dark){{{_FILE.format('#ddd')}{_rules(*_DARK)}}}"
)


def _cell_svg(cell: Cell, x: float, y: float) -> str:
    title = f"<title>{html.escape(cell.title)}</title>" if cell.title else ""
    square = f'<rect class="{cell.kind}" x="{x:g}" y="{y:g}" width="{_SIDE}" height="{_SIDE}" rx="3">{title}</rect>'
    if not cell.text or len(cell.text) > 4:
        return square
    ink = "e" if KINDS[cell.kind][1] == "none" else "n"
    return f'{square}<text class="{ink}" x="{x + _SIDE / 2:g}" y="{y + 14:g}">{html.escape(cell.text)}</text>'


def _cell_text(cell: Cell, width: int, color: bool) -> str:
    _, _, _, ansi, sign = KINDS[cell.kind]
    text = (cell.text or sign).rjust(width)
    if not color or ansi is None:
        return text
    return f"\x1b[48;5;{ansi}m\x1b[38;5;231m{text if cell.text else ' ' * width}\x1b[0m"


def runs(numbers: Any) -> str:
    """Returns ascending whole numbers as runs.

    >>> runs([0, 1, 2, 5])
    '0-2, 5'
    """
    parts = []
    for _, group in itertools.groupby(enumerate(numbers), lambda item: item[1] - item[0]):
        run = [int(number) for _, number in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ", ".join(parts)
