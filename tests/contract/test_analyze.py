"""`lora-inject analyze`: its page; the figures are those of `analysis.analyze`."""

import base64
import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fill
from helpers.merging import save_checkpoint
from helpers.modules import tree
from helpers.states import Site, state_of
from torch import nn

import lora_inject as li

LEAVES = {"q_proj": 8, "up": 12}
NAMES = [f"h.{i}.{leaf}" for i in range(2) for leaf in LEAVES]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of two layers, an adapter of it, one that is inert, and another base."""
    folder = tmp_path_factory.mktemp("analyze")
    torch.manual_seed(0)
    model = tree({name: nn.Linear(8, LEAVES[name[4:]], bias=False) for name in NAMES})
    save_checkpoint(folder / "base", model.state_dict())
    save_checkpoint(folder / "changed", {n: t + 1 for n, t in model.state_dict().items()})
    for name in ("one", "inert"):
        li.inject(model, {"rank": 2, "alpha": 4, "targets": ["q_proj", "up"]}, name)
        li.save_adapter(model if name == "inert" else fill(model, name, 0.3), folder / name, name)
    return folder


def test_json_holds_the_figures_and_the_base_must_be_the_adapters(run: Any, files: Path) -> None:
    args = ("analyze", files / "one", "--base", files / "base", "--json")
    ran = run(*args)
    assert (ran.code, ran.err) == (0, "")
    data = json.loads(ran.out, parse_constant=pytest.fail)
    one = li.read_adapter(files / "one")
    due = li.analysis.analyze(one, files / "base")  # noqa: TID251 - a public name
    assert data == {**json.loads(json.dumps(due.to_dict())), "written": []}
    ran = run(*args[:3], files / "changed")
    assert (ran.code, ran.out, "another base" in ran.err) == (1, "", True)
    assert run(*args[:3], files / "changed", "--any-base").code == 0


def test_table_and_page_show_every_site_and_load_nothing(run, files, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    page = tmp_path / "report.html"
    page.write_text("an older one")
    ran = run("analyze", files / "one", "--base", files / "base", "--all", "--report", page)
    assert ran.code == 0
    assert all(ran.out.count(name) == 3 for name in NAMES)  # block, weight, rounding
    assert "4 sites, 4 blocks; rank 2 holds 99% (median)" in ran.out
    text = page.read_text(encoding="utf-8")
    image = r'<img alt="Spectra of h\.\*\.(\w+)" src="data:image/png;base64,(.*?)">'
    drawn = re.findall(image, text)
    assert [leaf for leaf, _ in drawn] == [*LEAVES]
    assert all(base64.b64decode(png).startswith(b"\x89PNG") for _, png in drawn)
    assert all(text.count(name) >= 3 for name in NAMES)
    assert str(files) not in text, "a page may be mailed"
    assert not re.search(r"<(script|link|iframe|object|base)|(src|href)=\"(?!data:)", text)
    assert not re.search(r"url\(|@import", text)


def test_every_name_in_a_page_is_escaped(run: Any, tmp_path: Path) -> None:
    """Names come from files of others."""
    pytest.importorskip("matplotlib")
    evil = '"><script>&'
    rule = {"slices": ["q", "k"], "adapt": ["q"]}
    row = Site(f"h.0.{evil}", lambda: nn.Linear(9, 6), 6, rule)
    path = li.write_adapter(state_of(row), tmp_path / evil.replace("/", ""), "native")
    page = tmp_path / "page.html"
    assert run("analyze", path, "--report", page).code == 0
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert not re.search(r'="[^"<>]*"><script', text), "it ends no attribute"
    assert evil in html.unescape(text)


def test_a_page_without_matplotlib_is_refused_before_anything_is_computed(
    run: Any, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ran = run("analyze", files / "one", "--report", tmp_path / "page.html")
    assert (ran.code, ran.out) == (1, "")
    assert "pip install matplotlib" in ran.err


def test_findings_are_printed_with_their_names_and_dora_is_refused(run, files, tmp_path) -> None:
    told = run("analyze", files / "inert").out.partition("inert: ")[2]  # B is 0
    assert "h.{0..1}.q_proj, h.{0..1}.up" in told
    model = nn.Sequential(nn.Linear(4, 4))
    li.inject(model, {"rank": 2, "variant": "dora", "targets": ["0"]})
    ran = run("analyze", li.save_adapter(model, tmp_path / "dora"))
    assert (ran.code, "DoRA" in ran.err) == (1, True)
