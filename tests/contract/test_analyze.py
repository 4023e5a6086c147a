"""`lora-inject analyze`: its figures against the files, its page and its pictures."""

import html
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fill
from helpers.merging import save_checkpoint
from helpers.modules import tree
from helpers.states import Site, state_of
from safetensors.torch import load_file
from torch import nn

import lora_inject as li

LEAVES = {"q_proj": 8, "up": 12}
NAMES = [f"h.{i}.{leaf}" for i in range(3) for leaf in LEAVES]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of three layers, two adapters of it, and another base."""
    folder = tmp_path_factory.mktemp("analyze")
    torch.manual_seed(0)
    model = tree({name: nn.Linear(8, LEAVES[name[4:]], bias=False) for name in NAMES})
    save_checkpoint(folder / "base", model.state_dict())
    save_checkpoint(folder / "changed", {n: t + 1 for n, t in model.state_dict().items()})
    for name in ("one", "two"):
        li.inject(model, {"rank": 2, "alpha": 4, "targets": ["q_proj", "up"]}, name)
        li.save_adapter(fill(model, name, 0.3), folder / name, name)
    return folder


def test_json_holds_the_figures_of_the_files(run: Any, files: Path) -> None:
    ran = run("analyze", files / "one", "--base", files / "base", "--json")
    assert (ran.code, ran.err) == (0, "")
    data = json.loads(ran.out, parse_constant=pytest.fail)
    W = load_file(files / "base" / "model.safetensors")
    tensors = load_file(files / "one" / "adapter_model.safetensors")
    assert [block["site"] for block in data["blocks"]] == NAMES
    for block in data["blocks"]:
        name = block["site"]
        A, B = (tensors[f"base_model.model.{name}.lora_{end}.weight"].double() for end in "AB")
        U, S, Vh = torch.linalg.svd(2 * B @ A)  # alpha 4 over rank 2
        S = S[:2].tolist()
        assert block["spectrum"]["values"] == pytest.approx(S, rel=1e-9)
        beside = data["weights"][name]
        (on_weight,) = beside["blocks"]
        assert (beside["stored"], on_weight["tensor"]) == ("float32", f"{name}.weight")
        projected = float((U[:, :2].T @ W[f"{name}.weight"].double() @ Vh[:2].T).norm())
        assert on_weight["norms"]["of_delta"] == pytest.approx(projected, rel=1e-9)
        assert on_weight["norms"]["factor"] == pytest.approx(math.hypot(*S) / projected, rel=1e-9)
        assert beside["rounded"]["bfloat16"]["kept"] == pytest.approx(1, abs=0.05)
    assert (data["comparison"], data["written"]) == (None, [])


def test_table_page_and_pictures_show_every_site_and_load_nothing(run, files, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    page, folder = tmp_path / "new" / "report.html", tmp_path / "pictures"
    ran = run("analyze", files / "one", files / "two", "--base", files / "base", "--all",
              "--report", page, "--pictures", folder)  # fmt: skip
    assert ran.code == 0
    assert all(ran.out.count(name) == 4 for name in NAMES)  # block, weight, rounding, overlap
    assert "6 sites, 6 blocks; rank 2 holds 99% (median)" in ran.out
    drawn = {f"{what}-h-{leaf}.png" for leaf in LEAVES for what in ("spectra", "phi")}
    assert drawn < {path.name for path in folder.iterdir()}
    text = page.read_text(encoding="utf-8")
    assert all(text.count(name) >= 3 for name in NAMES)
    assert str(files) not in text, "a page may be mailed"
    assert not re.search(r"<(script|link|iframe|object|base)|(src|href)=\"(?!data:|#)", text)
    assert not re.search(r"url\((?!#)|@import", text)
    assert run("analyze", files / "one", "--report", page).code == 0  # replaced


def test_every_name_in_a_page_is_escaped(run: Any, tmp_path: Path) -> None:
    """Names come from files of others."""
    pytest.importorskip("matplotlib")
    evil = '"><script>&'
    rows = [
        Site(f"h.{i}.{evil}", lambda: nn.Linear(9, 6), 6, {"slices": ["q", "k"], "adapt": ["q"]})
        for i in range(2)
    ]
    path = li.write_adapter(state_of(*rows), tmp_path / evil.replace("/", ""), "native")
    page = tmp_path / "page.html"
    assert run("analyze", path, path, "--report", page).code == 0
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


def test_findings_are_printed_with_their_names_and_dora_is_refused(
    run: Any, tmp_path: Path
) -> None:
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("a", "b")})
    for variant in ("lora", "dora"):
        li.inject(model, {"rank": 2, "variant": variant, "targets": ["a", "b"]}, variant)
        li.save_adapter(model, tmp_path / variant, variant)
    told = run("analyze", tmp_path / "lora").out.partition("inert: ")[2]  # B is 0
    assert "a, b" in " ".join(told.split())
    ran = run("analyze", tmp_path / "dora")
    assert (ran.code, "DoRA" in ran.err) == (1, True)


def test_another_base_is_refused_unless_it_is_allowed(run: Any, files: Path) -> None:
    args = ("analyze", files / "one", "--base", files / "changed")
    ran = run(*args)
    assert (ran.code, ran.out, "another base" in ran.err) == (1, "", True)
    assert run(*args, "--any-base").code == 0
