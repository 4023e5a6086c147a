"""The report and the pictures: well-formed, complete, escaped, self-contained.

The page is read back by `html.parser`, so that what is checked is what a browser gets.
"""

import datetime as dt
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from safetensors.torch import save_file

import lora_inject as li
from lora_inject.analysis import (
    analyze,
    compare,
    draw_similarity,
    draw_spectra,
    report,
)
from lora_inject.analysis.report.search_page import search_report
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
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
    analysis, date = analyze(one, folder / "w.safetensors"), dt.date(2026, 1, 2)
    return report(analysis, one, "sql", comparison=compare(one, two), other="style", date=date)


def test_the_page_says_what_the_adapter_is_and_names_every_site(full):
    page = Page(full)
    for name in NAMES:
        assert page.words.count(name) >= 3, name
    for said in ("rank4", "alpha4", "scale1", "date2026-01-02", "h.{0..5}.q\u00d76"):
        assert said in page.words.replace(" ", ""), said
    assert "Compared with style" in page.words
    assert "pytest-of" not in full, "a page may be mailed: no path of this machine is in it"
    assert "The delta is zero" in page.words
    # Nothing is left to hovering, and drawings are described to those who cannot see them.
    drawings = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert all(drawing["role"] == "img" and drawing["aria-label"] for drawing in drawings)
    heads = {attributes["data-head"] for tag, attributes in page.tags if tag == "td"}
    assert {"|D|", "first", "effective", "99%", "amplification", "|D|/|W|", "bfloat16",
            "A: phi(1,1)", "B: whole"} <= heads  # fmt: skip


def test_the_page_stands_alone(full):
    page = Page(full)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base"}
    for tag, attributes in page.tags:
        for key in ("src", "href", "xlink:href", "srcset", "action"):
            assert (attributes.get(key) or "data:").startswith(("data:", "#")), tag
    assert not re.search(r"url\((?!#)|@import", full)


def test_every_name_is_escaped():
    """Names come from files of others."""
    slices = Slices(((EVIL, 3), ("k", 3)), (EVIL,))
    evil, plain = adapter(f"h.0.{EVIL}", f"h.1.{EVIL}", slices=slices), adapter("h.0.q", "h.1.q")
    text = report(analyze(evil), evil, EVIL, comparison=compare(evil, evil), other=EVIL)
    page, usual = Page(text), page_of(plain, "plain", comparison=compare(plain, plain))
    assert "<script" not in text
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in usual.tags}
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    assert "\x1b" not in text
    assert EVIL.replace("\x1b", "\\x1b") in "".join(page.text)


def page_of(state, name, **more):
    return Page(report(analyze(state), state, name, **more))


def test_the_page_of_an_adapter_that_does_nothing_or_that_is_sound_says_so():
    state = adapter("a")
    site = state.sites["a"]
    zero = AdapterState({"a": replace(site, B=torch.zeros(6, 4))})
    assert "does nothing" in page_of(zero, "zero", comparison=compare(zero, zero)).words
    sound = AdapterState({"a": replace(site, A=torch.eye(4, 9), B=torch.eye(6, 4))})
    words = page_of(sound, "sound").words
    assert "Nothing stands out." in words
    assert "amplification" not in words.lower(), "without a base"


def test_the_figures_of_the_paper_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    grid, square = torch.rand(8, 64), torch.rand(8, 8)
    labels, title = ("i (r=8)", "j"), "$a_b$ & <c>"
    draw_similarity({"$q_1$": grid}, tmp_path / "3.png", labels=labels, zoom=True, title=title)
    draw_similarity({"q": square, "v": square}, tmp_path / "4.png", baseline=square)
    draw_similarity({"a": square, "b": torch.zeros(0, 2)}, tmp_path / "8.png")  # a blank one
    draw_spectra({"a": torch.tensor([3.0, 1.0]), "b": torch.zeros(2)}, tmp_path / "s.png")
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert len(list(tmp_path.iterdir())) == 4


def test_nothing_to_draw_and_nothing_to_draw_with_is_said(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    with pytest.raises(li.StateError, match="there is nothing to draw"):
        draw_similarity({"a": torch.zeros(0, 3)}, tmp_path / "x.png")
    with pytest.raises(li.StateError, match="there is nothing to draw"):
        draw_spectra({"a": torch.zeros(3)}, tmp_path / "x.png")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(li.StateError, match="pip install matplotlib"):
        draw_similarity({"a": torch.rand(2, 3)}, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_the_page_of_a_search_has_the_config_every_trial_and_its_losses():
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    space = {"targets": {"all": ["all-linear"]}, "rank": [1, 2], "lr": [1e-3, 1e-2, 1e30],
             "budget": {"steps": 16, "parameters": 33}}  # fmt: skip
    batch = (torch.randn(8, 4), torch.randn(8, 2))
    search = li.search(model, space, [batch], [batch, batch], forward=lambda b: model(b[0]),
                       loss=lambda out, b: (out - b[1]).square().mean())  # fmt: skip
    page = Page(search_report(search, EVIL, date=dt.date(2026, 1, 2)))
    assert [tag for tag, _ in page.tags].count("svg") == 2 * len(search.rungs)
    assert "script" not in {tag for tag, _ in page.tags}
    for words in ("2026-01-02", search.best, *search.candidates, "stopped", "3 over the budget"):
        assert words in page.words
    assert all(line in page.text for line in search.to_yaml().splitlines())
