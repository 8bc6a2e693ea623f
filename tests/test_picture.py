"""Pictures of caches and masks: what stands in which cell, and that every form of a picture can be read."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import treescope

import jaxkv
from jaxkv import Cache, Chunk, Cross, Full, LayerSpec, Pages, Window
from jaxkv.picture import KINDS, Cell, Panel, Picture, Strip


def cache_of(*reaches, num_rows=2, capacity=16, **options):
    return Cache.init([LayerSpec(reach, 1, 2) for reach in reaches], num_rows, capacity, max_block=4, **options)


def filled(cache, length=10):
    for start in range(0, length, 2):
        cache, step = cache.begin(jnp.array([[start, start + 1], [start, -1]]))
    return cache, step


def lines(picture, title):
    text = picture.text().split("\n")
    begin = next(i for i, line in enumerate(text) if line.startswith(title)) + 1
    return [line.split() for line in text[begin : text.index("", begin)]]


def test_a_full_layer_shows_positions_in_order_and_gaps():
    cache, _ = filled(cache_of(Full()))
    assert lines(jaxkv.show(cache), "1 layer Full()") == [
        ["row", "0", *"0123456789......"],
        ["row", "1", *"0.2.4.6.8......."],
    ]


def test_a_ring_shows_sinks_first_and_then_the_order_in_which_tokens_lie():
    cache, _ = filled(cache_of(Window(3, sinks=1)))
    [row, _] = lines(jaxkv.show(cache), "1 layer Window")
    assert row == ["row", "0", "0", "7", "8", "9", "4", "5", "6", "lost", "1-3"]
    [panel] = jaxkv.show(cache).panels
    assert "lost 1-3</text>" in jaxkv.show(cache).svg
    assert [cell.kind for cell in panel.strips[0].cells] == ["sink"] + ["held"] * 6


def test_pages_show_who_has_which_and_what_is_free():
    cache, _ = filled(cache_of(Full(), layout=Pages(num_pages=8, page_size=4)))
    cache = cache.copy_prefix(0, 1, 4)
    picture = jaxkv.show(cache)
    row0, row1 = lines(picture, "1 layer Full(): pages by row")
    assert len(row0) == 2 + 3 and len(row1) == 2 + 1
    assert row0[2] == row1[2]  # shared
    assert "5 of 8 pages free" in picture.text()
    kinds = {cell.text: cell.kind for cell in picture.panels[-1].strips[0].cells}
    assert kinds[row0[2]] == "shared" and sorted(kinds.values()).count("free") == 5


def test_a_long_row_shows_several_slots_in_each_cell():
    cache, _ = filled(cache_of(Full(), capacity=4096))
    [panel] = jaxkv.show(cache, rows=[0]).panels
    [strip] = panel.strips
    assert len(strip.cells) <= 48
    assert strip.cells[0].title == "slots 0-85: positions 0-9" and strip.cells[1].kind == "free"


def test_an_encoders_output_is_shown_by_place():
    cache, _ = cache_of(Cross(4), Full()).begin_cross(jnp.array([3, -1]))
    assert lines(jaxkv.show(cache), "1 layer Cross(size=4)") == [["row", "0", *"012."], ["row", "1", *"...."]]


@pytest.mark.parametrize("reach", [Full(), Window(3), Chunk(4)], ids=str)
def test_a_mask_is_the_one_that_get_gives(reach):
    cache, step = filled(cache_of(reach))
    layer = cache.layers[0]
    [panel] = jaxkv.show_mask(step, layer).panels
    _, _, mask = layer.get(step)
    held = np.asarray(step.groups[0].kv_positions)[0]
    want = {
        (q, int(p)): bool(mask[0, 0, t, s])
        for t, q in enumerate((8, 9))
        for s, p in enumerate(held)
        if p != jaxkv.EMPTY
    }
    got = {
        (int(strip.label), int(column)): cell.kind == "seen"
        for strip in panel.strips
        for column, cell in zip(panel.columns, strip.cells, strict=True)
    }
    assert got == want


def test_a_mask_says_tokens_beside_positions():
    cache, step = cache_of(Full()).begin(jnp.array([[0, 1], [-1, -1]]))
    picture = jaxkv.show_mask(step, cache.layers[0], tokens=["a", "<b>"])
    assert "1 <b>" in picture.text()
    assert "1 &lt;b&gt;" in picture.svg


def test_svg_is_well_formed_and_has_a_square_for_each_cell():
    cache, step = filled(cache_of(Full(), Window(3, sinks=1)))
    for picture in (jaxkv.show(cache), jaxkv.show_mask(step, cache.layers[1])):
        root = ElementTree.fromstring(picture.svg)
        squares = [x for x in root.iter() if x.tag.endswith("rect")]
        cells = sum(len(strip.cells) for panel in picture.panels for strip in panel.strips)
        assert len(squares) == cells + len({x.get("class") for x in squares})
        assert {x.get("class") for x in squares} <= set(KINDS)


def test_notebooks_show_the_picture_and_traced_or_donated_caches_their_repr():
    cache, step = filled(cache_of(Full()))
    assert "<svg" in cache._repr_html_() and "written in this call" in step._repr_html_()
    seen = []
    jax.make_jaxpr(lambda cache: seen.append(cache._repr_html_()) or 0)(cache)
    assert seen[0].startswith("<pre>Cache(")
    donated = jax.jit(lambda cache: cache.reset(cache.ok), donate_argnums=0)
    donated(cache)
    assert cache._repr_html_().startswith("<pre>Cache(")


def test_treescope_which_nnx_display_is_offers_the_picture():
    cache, step = filled(cache_of(Full()))
    for node in (cache, step):
        shown = treescope.render_to_html(node, compressed=False)
        assert "Rich HTML representation" in shown and "<svg" in shown


def test_colors_are_for_terminals_only(capsys):
    picture = Picture((Panel("p", (Strip("s", (Cell("held", "3"), Cell("free"))),)),))
    assert "\x1b[48;5;67m" in picture.text(color=True)
    assert "\x1b" not in str(picture)
    assert re.sub(r"\x1b\[[\d;]*m", "", picture.text(color=True)).split() == ["p", "s", "3", ".", "held", ".", "empty"]


def test_the_style_of_a_picture_is_for_nothing_else_in_its_page():
    picture = Picture((Panel("p", (Strip("s", (Cell("held", "3"),)),)),))
    style = re.search(r"<style>(.*)</style>", picture.svg).group(1)
    rules = re.sub(r"@media [^{]*", "", style)
    assert all(
        rule.lstrip("{").startswith((".jaxkv ", ":root.jaxkv")) for rule in re.findall(r"[^{}]+(?={[^{}]*})", rules)
    )
    assert 'class="jaxkv"' in picture.svg


def test_files_are_written_by_their_suffix(tmp_path):
    cache, _ = filled(cache_of(Full()))
    picture = jaxkv.show(cache)
    for suffix, begin in {"svg": b"<svg", "html": b"<!doctype", "txt": b"1 layer", "png": b"\x89PNG"}.items():
        picture.save(tmp_path / f"cache.{suffix}")
        assert (tmp_path / f"cache.{suffix}").read_bytes().startswith(begin)
    with pytest.raises(ValueError, match=r"no suffix; end it with \.svg"):
        picture.save(tmp_path / "cache")


@pytest.mark.parametrize("page", ["pictures.md", "one_idea.md"])
def test_the_pictures_in_the_docs_are_those_that_their_code_draws(page, tmp_path, monkeypatch, capsys):
    docs = Path(__file__).parent.parent / "docs"
    text = (docs / page).read_text("utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {}
    for language, code in blocks:
        if language == "python":
            exec(code, names)
    assert capsys.readouterr().out == "".join(shown for language, shown in blocks if not language)
    drawn = {path.name: path.read_text("utf-8") for path in tmp_path.iterdir()}
    assert sorted(drawn) == sorted(re.findall(r"\(figures/(.*?\.svg)\)", text))
    assert drawn == {name: (docs / "figures" / name).read_text("utf-8") for name in drawn}


def test_wrong_rows_are_named():
    cache, step = filled(cache_of(Full()))
    with pytest.raises(ValueError, match="no row 2; the cache has rows 0 to 1"):
        jaxkv.show(cache, rows=[2])
    with pytest.raises(ValueError, match="no batch row 5; the step has 0 to 1"):
        jaxkv.show_mask(step, cache.layers[0], row=5)
