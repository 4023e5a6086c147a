"""The page and the pictures: well-formed, complete, escaped, self-contained.

The page is read back by `html.parser`, and pictures by their own decoder, so that what is
checked is what a browser gets.
"""

from __future__ import annotations

import base64
import re
import struct
import sys
import zlib
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import lora_inject as li
from lora_inject.adapter.state import AdapterState, SiteState
from lora_inject.analysis import (
    Panel,
    across_layers,
    analyse,
    compare,
    draw_gallery,
    draw_panels,
    expected_similarity,
    figure_ranks,
    figure_seeds,
    figure_spectra,
    figure_weight,
    write_report,
    zoomed,
)
from lora_inject.analysis.report.png import encode, palette
from lora_inject.analysis.report.sections import report
from lora_inject.analysis.report.svg import bars, curves, level, strip
from lora_inject.spec.sites import SiteSpec, Slices

EVIL = '"><script>alert(1)</script>&<b>'
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Reads a page strictly: every element is closed, in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())


def adapter(*names: str, rank: int = 4, seed: int = 0, slices: Slices | None = None):
    generator = torch.Generator().manual_seed(seed)
    sites = {}
    for name in names:
        spec = SiteSpec(name, "linear", 9, 6, (6, 9), rank=rank, alpha=rank, slices=slices)
        A = torch.randn(*spec.a_shape, generator=generator)
        sites[name] = SiteState(spec, A, torch.randn(*spec.b_shape, generator=generator))
    return AdapterState(sites)


NAMES = [f"h.{i}.{kind}" for i in range(6) for kind in ("q", "v")] + ["head"]


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> str:
    """A page with every section: a base, another adapter, layers."""
    folder = tmp_path_factory.mktemp("report")
    one, two = adapter(*NAMES), adapter(*NAMES, rank=6, seed=1)
    inert = replace(one.sites["h.2.q"], B=torch.zeros(6, 4))
    one = AdapterState({**one.sites, "h.2.q": inert})
    tensors = {f"{name}.weight": torch.randn(6, 9).bfloat16() for name in NAMES}
    save_file(tensors, folder / "w.safetensors")
    found = analyse(one, folder / "w.safetensors")
    return report(found, "sql", across=across_layers(one), comparison=compare(one, two))


# -------------------------------------------------------------------------------------- the report


def test_every_element_is_closed_and_every_site_is_named(full):
    page = Page(full)
    for name in NAMES:
        assert page.words.count(name) >= 3, name
    headings = [tag for tag, _ in page.tags if tag == "h2"]
    assert len(headings) == 10
    assert "What to look at" in page.words
    assert "The delta is zero" in page.words
    assert "1: h.2.q" in page.words


def test_what_a_site_without_a_delta_has_not_is_blank(full):
    # Amplification, likeness in four formats, and the two figures of phi on the side of B.
    blanks = re.findall(r'<rect class="hx"[^>]*><title>([^<]*): -</title>', full)
    assert blanks == ["h.2.q"] * (1 + 4 + 2)


def test_the_page_stands_alone(full):
    page = Page(full)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base"}
    for tag, attributes in page.tags:
        for key in ("src", "href", "srcset", "action"):
            assert (attributes.get(key) or "data:").startswith("data:"), tag
    style = re.search(r"<style>(.*?)</style>", full, re.DOTALL)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    assert "prefers-color-scheme: dark" in style[1]
    assert 'name="viewport"' in full


def test_drawings_can_be_read_by_those_who_cannot_see_them(full):
    for tag, attributes in Page(full).tags:
        if tag == "img":
            assert attributes["alt"]
        if tag == "svg":
            assert attributes["role"] == "img"
            assert attributes["aria-label"]


def test_every_name_is_escaped():
    """Names come from files of others."""
    slices = Slices(((EVIL, 3), ("k", 3)), (EVIL,))
    state = adapter(f"h.0.{EVIL}", f"h.1.{EVIL}", slices=slices)
    text = report(
        analyse(state),
        EVIL,
        across=across_layers(state),
        comparison=compare(state, state),
        other=EVIL,
    )
    page, plain = Page(text), Page(report(analyse(adapter("h.0.q")), "plain"))
    assert "<script" not in text
    tags, harmless = {tag for tag, _ in page.tags}, {tag for tag, _ in plain.tags}
    assert tags == harmless | {"img"}
    keys = {key for _, attributes in page.tags for key in attributes}
    assert keys == {key for _, attributes in plain.tags for key in attributes} | {"src", "alt"}
    assert f"h.0.{EVIL}" in "".join(page.text)


def test_the_alone_page_has_no_word_of_w():
    text = report(analyse(adapter(*NAMES)), "alone")
    page = Page(text)
    assert "without its base" in page.words
    assert "After rounding" not in page.words
    assert "amplification" not in page.words.lower()


def test_an_adapter_that_does_nothing_has_a_page():
    state = adapter("a")
    zero = AdapterState({"a": replace(state.sites["a"], B=torch.zeros(6, 4))})
    page = Page(report(analyse(zero), "zero", comparison=compare(zero, zero)))
    assert "does nothing" in page.words


def test_nothing_to_look_at_is_said():
    spec = SiteSpec("a", "linear", 9, 6, (6, 9), rank=2, alpha=2)
    state = AdapterState({"a": SiteState(spec, torch.eye(2, 9), torch.eye(6, 2))})
    assert "Nothing stands out." in Page(report(analyse(state), "good")).words


def test_writing_replaces_and_is_whole(tmp_path):
    path = tmp_path / "new" / "report.html"
    write_report(path, "one")
    assert write_report(path, "two \u03c6").read_text(encoding="utf-8") == "two \u03c6"
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    with pytest.raises(li.FormatError, match="it is a directory"):
        write_report(tmp_path, "x")


# -------------------------------------------------------------------------------------- drawings


def pixels(data: bytes) -> tuple[list[list[int]], list[bytes], bytes]:
    """Decode a palette PNG without filters: indices, colours, transparency; checks the sums."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        (check,) = struct.unpack(">I", data[at + 8 + size : at + 12 + size])
        assert check == zlib.crc32(kind + body)
        chunks[kind], at = body, at + 12 + size
    columns, rows, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (depth, colour) == (8, 3)
    raw = zlib.decompress(chunks[b"IDAT"])
    lines = [raw[i * (columns + 1) : (i + 1) * (columns + 1)] for i in range(rows)]
    assert all(line[0] == 0 for line in lines)
    table = chunks[b"PLTE"]
    return (
        [list(line[1:]) for line in lines],
        [table[i : i + 3] for i in range(0, len(table), 3)],
        chunks[b"tRNS"],
    )


def test_a_grid_becomes_the_png_of_its_numbers():
    grid = torch.tensor([[0.0, 0.5, 1.0], [float("nan"), -1.0, 2.0]])
    indices, colours, alpha = pixels(encode(grid))
    assert indices == [[0, 127, 254], [255, 0, 254]]
    assert colours[:255] == [bytes(colour) for colour in palette()]
    assert alpha[:255] == b"\xff" * 255
    assert alpha[255] == 0


def test_the_pages_pictures_are_the_grids(full):
    one, two = adapter(*NAMES), adapter(*NAMES, rank=6, seed=1)
    uri = re.search(r'src="data:image/png;base64,([^"]+)" alt="phi of h.0.q, side of A"', full)
    assert uri is not None
    indices, _, _ = pixels(base64.b64decode(uri[1]))
    phi = compare(one, two).pairs[0].right.phi
    assert indices == (phi * 254).round().int().tolist()


def test_the_scale_of_colour_has_ends_and_a_blank():
    assert [level(v, 0, 1) for v in (-1, 0, 0.5, 1, 2)] == ["h0", "h0", "h8", "h15", "h15"]
    assert level(float("nan"), 0, 1) == level(float("inf"), 0, 1) == "hx"
    assert level(3, 3, 3) == "h15"


def test_drawings_take_what_there_is():
    assert strip([], 0, 1, "none").count("<rect") == 0
    assert bars([(float("nan"), "a", "a"), (2.0, "b", "b")], "x").count("<rect") == 1
    assert "<polyline" in curves([([1.0, 0.1, 0.0], "a")], "x")
    for drawing in (curves([], "x"), curves([([], "a")], "x"), bars([], "x")):
        assert not re.search(r"nan|inf", drawing)


def test_a_curve_falls_by_its_decades():
    drawing = curves([([1.0, 0.1, 0.01], "a")], "x")
    points = re.search(r'points="([^"]+)"', drawing)
    assert points is not None
    heights = [float(point.split(",")[1]) for point in points[1].split()]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.11)


# --------------------------------------------------------------------------------------- pictures


def size(path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_the_zoom_is_the_corner_where_j_is_at_most_i():
    grid = expected_similarity(3, 8, 20)
    found = zoomed(grid)
    assert found.shape == (3, 3)
    for i in range(3):
        for j in range(3):
            assert bool(found[i, j].isnan()) == (j > i)
            assert j > i or float(found[i, j]) == float(grid[i, j])


@pytest.mark.parametrize("title", ["", "$a_b$ & <c>"])
def test_the_figures_of_the_paper(tmp_path, title):
    pytest.importorskip("matplotlib")
    grid = expected_similarity(8, 64, 768)
    square = expected_similarity(8, 8, 768)
    one = figure_ranks({"$q_1$": grid}, tmp_path / "new" / "3.png", ("i (r=8)", "j"), title=title)
    two = figure_ranks({"q": grid, "v": grid}, tmp_path / "6.png")
    assert size(two)[1] > 1.5 * size(one)[1]  # a row for each
    four = figure_seeds({"q": square, "v": square}, tmp_path / "4.png", square, title=title)
    seven = figure_seeds({str(i): square for i in range(4)}, tmp_path / "7.png", square)
    assert size(seven)[1] > 1.5 * size(four)[1]  # five panels in rows of three
    figure_weight({"r = 4": expected_similarity(100, 4, 768)}, tmp_path / "8.png", square)
    figure_spectra({"a": torch.tensor([3.0, 1.0]), "b": torch.zeros(2)}, tmp_path / "s.png")
    assert len(list(tmp_path.rglob("*.png"))) == 6


@pytest.mark.parametrize("grids", [{}, {"a": torch.zeros(0, 3)}])
def test_nothing_to_draw_is_said(tmp_path, grids):
    pytest.importorskip("matplotlib")
    with pytest.raises(li.StateError, match="there is nothing to draw"):
        figure_seeds(grids, tmp_path / "x.png")
    with pytest.raises(li.StateError, match="there is nothing to draw"):
        figure_spectra({name: torch.zeros(3) for name in grids}, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_a_blank_panel_beside_others(tmp_path):
    pytest.importorskip("matplotlib")
    grid: Tensor = expected_similarity(2, 2, 4)
    rows = [[Panel(grid, "a"), Panel(torch.zeros(0, 2), "b")], [Panel(grid)]]
    assert size(draw_panels(rows, tmp_path / "x.png"))


def test_without_matplotlib_it_is_said_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(li.StateError, match=r"pip install 'lora-inject\[analysis\]'"):
        figure_ranks({"a": expected_similarity(2, 3, 9)}, tmp_path / "x.png")


@pytest.mark.parametrize(("rank", "prefix"), [(4, "seeds"), (6, "ranks")])
def test_the_gallery(tmp_path, rank, prefix):
    pytest.importorskip("matplotlib")
    one, two = adapter(*NAMES), adapter(*NAMES, rank=rank, seed=1)
    drawn = draw_gallery(tmp_path, one, comparison=compare(one, two))
    names = {path.name for path in drawn}
    assert names == {"spectra.png", "layers-h-q.png", "layers-h-v.png", f"{prefix}-h-q.png",
                     f"{prefix}-h-v.png", f"{prefix}-head.png"}  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == names
