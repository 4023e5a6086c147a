"""The report and the pictures: well-formed, complete, escaped, self-contained.

The page is read back by `html.parser`, so that what is checked is what a browser gets.
"""

import datetime as dt
import re
import struct
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from safetensors.torch import save_file

import lora_inject as li
from lora_inject.analysis import (
    analyze,
    compare,
    draw_gallery,
    draw_similarity,
    draw_spectra,
    report,
    write_report,
)
from lora_inject.analysis.drawings import _corner, lines_figure
from lora_inject.analysis.report.search_page import search_report
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.spec.site_tables import Listing
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.core.spec.slices import Slices

EVIL = '\x1b[2J"><script>alert(1)</script>&<b>'
VOID = {"meta"}


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
    """A page with every section: a base, another adapter, layers, an inert site."""
    folder = tmp_path_factory.mktemp("report")
    one, two = adapter(*NAMES), adapter(*NAMES, rank=6, seed=1)
    inert = replace(one.sites["h.2.q"], B=torch.zeros(6, 4))
    one = AdapterState({**one.sites, "h.2.q": inert})
    tensors = {f"{name}.weight": torch.randn(6, 9).bfloat16() for name in NAMES}
    save_file(tensors, folder / "w.safetensors")
    found = analyze(one, folder / "w.safetensors")
    date = dt.date(2026, 1, 2)
    return report(found, one, "sql", comparison=compare(one, two), other="style", date=date)


def test_the_page_says_what_the_adapter_is_and_names_every_site(full):
    page = Page(full)
    for name in NAMES:
        assert page.words.count(name) >= 3, name
    for said in ("rank4", "alpha4", "scale1", "date2026-01-02", "h.{0..5}.q \u00d76"):
        assert said in page.words.replace(" ", "") or said in page.words, said
    assert "Compared with style" in page.words
    assert "pytest-of" not in full, "a page may be mailed: no path of this machine is in it"
    assert "The delta is zero" in page.words
    assert [tag for tag, _ in page.tags].count("h2") == 9


def test_the_page_stands_alone(full):
    page = Page(full)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base"}
    for tag, attributes in page.tags:
        for key in ("src", "href", "xlink:href", "srcset", "action"):
            assert (attributes.get(key) or "data:").startswith(("data:", "#")), tag
    assert not re.search(r"url\((?!#)|@import", full)
    assert "prefers-color-scheme:dark" in full
    assert 'name="viewport"' in full


def test_what_a_drawing_shows_is_a_number_in_a_table_too(full):
    """Nothing is left to hovering, and drawings say what they are to those who cannot see them."""
    page = Page(full)
    assert full.count("<title") == 1
    for tag, attributes in page.tags:
        if tag == "svg":
            assert attributes["role"] == "img"
            assert attributes["aria-label"]
    heads = {attributes["data-head"] for tag, attributes in page.tags if tag == "td"}
    assert {"|D|", "first", "effective", "99%", "amplification", "|D|/|W|", "bfloat16",
            "A: phi(1,1)", "B: whole"} <= heads  # fmt: skip


def test_every_name_is_escaped():
    """Names come from files of others."""
    slices = Slices(((EVIL, 3), ("k", 3)), (EVIL,))
    state = adapter(f"h.0.{EVIL}", f"h.1.{EVIL}", slices=slices)
    text = report(analyze(state), state, EVIL, comparison=compare(state, state), other=EVIL)
    page, plain_state = Page(text), adapter("h.0.q", "h.1.q")
    plain = Page(report(analyze(plain_state), plain_state, "plain",
                        comparison=compare(plain_state, plain_state)))  # fmt: skip
    assert "<script" not in text
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in plain.tags}
    assert not any(key.startswith("on") for _, found in page.tags for key in found)
    assert "\x1b" not in text
    assert EVIL.replace("\x1b", "\\x1b") in "".join(page.text)


def test_the_page_of_an_adapter_alone_has_no_word_of_w():
    state = adapter(*NAMES)
    page = Page(report(analyze(state), state, "alone"))
    assert "the adapter alone" in page.words
    assert "After rounding" not in page.words
    assert "amplification" not in page.words.lower()


def test_an_adapter_that_does_nothing_has_a_page():
    state = adapter("a")
    zero = AdapterState({"a": replace(state.sites["a"], B=torch.zeros(6, 4))})
    page = Page(report(analyze(zero), zero, "zero", comparison=compare(zero, zero)))
    assert "does nothing" in page.words


def test_nothing_to_look_at_is_said():
    spec = SiteSpec("a", "linear", 9, 6, (6, 9), rank=2, alpha=2)
    state = AdapterState({"a": SiteState(spec, torch.eye(2, 9), torch.eye(6, 2))})
    assert "Nothing stands out." in Page(report(analyze(state), state, "good")).words


def test_many_sites_of_one_kind_are_one_row_until_all_are_asked_for():
    rows = Listing(
        ("site", "rank", "kept", "error"),
        (
            ("h.0.q [a]", 4, 0.5, 1.0),
            ("h.1.q [a]", 4, 0.25, 3.0),
            ("h.3.q [a]", 4, None, 2.0),
            ("h.0.e [expert 0 a]", 4, (1.0, 0.5), 0.0),
            ("h.0.e [expert 1 a]", 4, (3.0, 0.5), 0.0),
            ("h.0.q [b]", 8, 0.5, 0.0),
        ),
        {"kept": min},
    )
    assert rows.by_kind().text() == [
        ("h.{0..1,3}.q [a] x3", "4", "0.25", "2"),
        ("h.0.e [expert * a] x2", "4", "1 (0.5)", "0"),
        ("h.0.q [b]", "8", "0.5", "0"),
    ]
    assert len(rows.text()) == 6


def test_writing_replaces_and_is_whole(tmp_path):
    path = tmp_path / "new" / "report.html"
    write_report(path, "one")
    assert write_report(path, "two \u03c6").read_text(encoding="utf-8") == "two \u03c6"
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    with pytest.raises(li.FormatError, match="it is a directory"):
        write_report(tmp_path, "x")


# --------------------------------------------------------------------------------------- pictures


def size(path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_the_zoom_is_the_corner_where_j_is_at_most_i():
    grid = torch.rand(3, 8)
    found = _corner(grid)
    blank = torch.ones(3, 3).triu(1).bool()
    assert torch.equal(found.isnan(), blank)
    assert torch.equal(found[~blank], grid[:, :3][~blank])


def test_the_figures_of_the_paper(tmp_path):
    pytest.importorskip("matplotlib")
    title = "$a_b$ & <c>"
    grid, square = torch.rand(8, 64), torch.rand(8, 8)
    labels = ("i (r=8)", "j")
    one = draw_similarity({"$q_1$": grid}, tmp_path / "new" / "3.png", labels=labels, zoom=True,
                          title=title)  # fmt: skip
    two = draw_similarity({"q": grid, "v": grid}, tmp_path / "6.png", zoom=True)
    assert size(two)[1] > 1.5 * size(one)[1]  # a row for each
    four = draw_similarity({"q": square, "v": square}, tmp_path / "4.png", baseline=square)
    many = {str(i): square for i in range(4)}
    seven = draw_similarity(many, tmp_path / "7.png", baseline=square)
    assert size(seven)[1] > 1.5 * size(four)[1]  # five panels in rows of three
    blank = {"a": square, "b": torch.zeros(0, 2)}  # beside others
    draw_similarity(blank, tmp_path / "8.png")
    draw_spectra({"a": torch.tensor([3.0, 1.0]), "b": torch.zeros(2)}, tmp_path / "s.png")
    assert len(list(tmp_path.rglob("*.png"))) == 6


@pytest.mark.parametrize("grids", [{}, {"a": torch.zeros(0, 3)}])
def test_nothing_to_draw_is_said(tmp_path, grids):
    pytest.importorskip("matplotlib")
    with pytest.raises(li.StateError, match="there is nothing to draw"):
        draw_similarity(grids, tmp_path / "x.png")
    with pytest.raises(li.StateError, match="there is nothing to draw"):
        draw_spectra({name: torch.zeros(3) for name in grids}, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_it_is_said_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(li.StateError, match="pip install matplotlib"):
        draw_similarity({"a": torch.rand(2, 3)}, tmp_path / "x.png")


@pytest.mark.parametrize(("rank", "prefix"), [(4, "seeds"), (6, "ranks")])
def test_the_gallery(tmp_path, rank, prefix):
    pytest.importorskip("matplotlib")
    names = ("h.0.q", "h.1.q", "h.0.v", "h.1.v", "head")
    one, two = adapter(*names), adapter(*names, rank=rank, seed=1)
    drawn = draw_gallery(tmp_path, one, comparison=compare(one, two))
    names = {path.name for path in drawn}
    assert names == {"spectra.png", "layers-h-q.png", "layers-h-v.png", f"{prefix}-h-q.png",
                     f"{prefix}-h-v.png", f"{prefix}-head.png"}  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == names


def test_the_page_of_a_search_has_the_config_every_trial_and_its_losses():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    space = {"targets": {"all": ["all-linear"]}, "rank": [1, 2], "lr": [1e-3, 1e-2, 1e30],
             "budget": {"steps": 16, "parameters": 33}}  # fmt: skip
    batch = (torch.randn(8, 4), torch.randn(8, 2))
    found = li.search(model, space, [batch], [batch, batch], forward=lambda b: model(b[0]),
                      loss=lambda out, b: (out - b[1]).square().mean())  # fmt: skip
    page = Page(search_report(found, EVIL, date=dt.date(2026, 1, 2)))
    assert [tag for tag, _ in page.tags].count("svg") == 2 * len(found.rungs)
    assert "script" not in {tag for tag, _ in page.tags}
    for words in ("2026-01-02", found.best, *found.candidates, "stopped", "3 over the budget"):
        assert words in page.words
    assert all(line in page.text for line in found.to_yaml().splitlines())


def test_a_name_has_one_color_in_figures_among_the_same_names():
    pytest.importorskip("matplotlib")
    all_names, one = ({name: [(0.0, 1.0)] for name in names} for names in ("abc", "b"))
    drawn = (lines_figure(lines, "x", "y", among=all_names) for lines in (all_names, one))
    lines = [{line.get_label(): line for line in figure.axes[0].lines}["b"] for figure in drawn]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 1
