"""`lora-inject analyze`: what it prints and writes, where, and with which exit code.

The numbers are those of a dense float64 reference made from the files.
"""

import json
import math
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import fill
from helpers.forks import program
from safetensors.torch import load_file, save_file
from torch import nn

import lora_inject as li

LEAVES = {"q_proj": (8, 8), "up": (12, 8)}
SITES = [f"h.{i}.{leaf}" for i in range(3) for leaf in LEAVES]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A base of three layers, adapters of two ranks and of another seed, as folders."""
    folder = tmp_path_factory.mktemp("analyze")
    torch.manual_seed(0)
    model: nn.Module = nn.Module()
    model.h = nn.ModuleList(
        nn.ModuleDict({leaf: nn.Linear(n, m, bias=False) for leaf, (m, n) in LEAVES.items()})
        for _ in range(3)
    )
    for name in ("base", "changed", "empty"):
        (folder / name).mkdir()
    save_file(model.state_dict(), folder / "base" / "model.safetensors")
    for name, rank in (("r2", 2), ("r4", 4), ("seed", 2)):
        li.inject(model, {"rank": rank, "alpha": 4, "targets": ["q_proj", "up"]}, name)
        li.save_adapter(fill(model, name, 0.3), folder / name, name)
    other = {name: tensor + 1 for name, tensor in li.eject(model).state_dict().items()}
    save_file(other, folder / "changed" / "model.safetensors")
    return folder


def test_json_holds_the_figures_of_a_dense_reference(run, files):
    ran = run("analyze", files / "r2", "--base", files / "base", "--json")
    assert (ran.code, ran.err) == (0, "")
    data = json.loads(ran.out, parse_constant=pytest.fail)
    W = load_file(files / "base" / "model.safetensors")
    tensors = load_file(files / "r2" / "adapter_model.safetensors")
    assert [block["site"] for block in data["blocks"]] == SITES
    for block in data["blocks"]:
        site = block["site"]
        A, B = (tensors[f"base_model.model.{site}.lora_{end}.weight"].double() for end in "AB")
        U, S, Vh = torch.linalg.svd(2 * B @ A)  # alpha 4 over rank 2
        S = S[:2].tolist()
        assert block["spectrum"]["values"] == pytest.approx(S, rel=1e-9)
        beside = data["weights"][site]
        (on_weight,) = beside["blocks"]
        assert (beside["stored"], on_weight["tensor"]) == ("float32", f"{site}.weight")
        projected = float((U[:, :2].T @ W[f"{site}.weight"].double() @ Vh[:2].T).norm())
        assert on_weight["norms"]["of_delta"] == pytest.approx(projected, rel=1e-9)
        assert on_weight["norms"]["factor"] == pytest.approx(math.hypot(*S) / projected, rel=1e-9)
        assert beside["rounded"]["bfloat16"]["kept"] == pytest.approx(1, abs=0.05)
    assert (data["comparison"], data["written"]) == (None, [])


def test_the_table_has_a_line_for_each_block_and_the_findings(run, files):
    lines = run("analyze", files / "r2", "--all").out.splitlines()
    heads = ["block", "rank", "|D|", "first", "stable", "effective", "90%", "95%", "99%"]
    assert lines[0].split() == heads
    assert [line.split()[0] for line in lines[1:7]] == SITES
    assert lines[-1] == "6 sites, 6 blocks; rank 2 holds 99% (median)"
    args = ("analyze", files / "r2", files / "r4", "--base", files / "base")
    assert run(*args, "--all").out.count("h.1.up") == 4  # blocks, weights, rounding, phi
    beside = run(*args).out
    assert beside.count("h.{0..2}.up") >= 4
    for words in ("amplification", "kept (error) after merging in", "A: phi(1,1)"):
        assert words in beside


def test_findings_are_printed_with_their_names_and_dora_is_refused(run, tmp_path):
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("a", "b")})
    for variant in ("lora", "dora"):
        li.inject(model, {"rank": 2, "variant": variant, "targets": ["a", "b"]}, variant)
        li.save_adapter(model, tmp_path / variant, variant)
    lines = run("analyze", tmp_path / "lora").out.splitlines()  # B is 0
    at = next(i for i, line in enumerate(lines) if line.startswith("inert: "))
    assert "a, b" in " ".join(lines[at : at + 3])
    ran = run("analyze", tmp_path / "dora")
    assert (ran.code, "DoRA" in ran.err) == (1, True)


def test_a_report_and_pictures_are_written(run, files, tmp_path):
    pytest.importorskip("matplotlib")
    page, folder = tmp_path / "new" / "report.html", tmp_path / "pictures"
    ran = run("analyze", files / "r2", files / "seed", "--base", files / "base",
              "--report", page, "--pictures", folder, "--json")  # fmt: skip
    assert ran.code == 0
    written = json.loads(ran.out)["written"]
    assert ran.err.splitlines() == [f"wrote {path}" for path in written]
    assert {path.name for path in folder.iterdir()} == {
        "spectra.png",
        *(f"{what}-h-{leaf}.png" for leaf in LEAVES for what in ("layers", "seeds", "weight")),
    }
    text = page.read_text(encoding="utf-8")
    assert all(site in text for site in SITES)
    assert f"<h1>{files.name}/r2</h1>" in text
    assert run("analyze", files / "r2", "--report", page).code == 0  # replaced


@pytest.mark.parametrize(
    "args",
    ["nowhere", "base", "r2 base", "r2 --base empty", "r2 --base changed"],
)
def test_what_is_refused(run, files, monkeypatch, args):
    monkeypatch.chdir(files)
    ran = run("analyze", *args.split())
    assert (ran.code, ran.out) == (1, "")
    assert "Error: " in ran.err
    if "changed" in args:
        assert run("analyze", *args.split(), "--any-base").code == 0


def interrupted_program(*args):
    def interrupt(*_args, **_kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    li.analysis.report = interrupt
    program(*args)


def test_ctrl_c_is_exit_code_130_and_leaves_nothing(files, tmp_path, forks):
    page = tmp_path / "report.html"
    done = forks.start(interrupted_program, "analyze", files / "r2", "--report", page)
    assert (done.wait(), done.out(), done.err()) == (130, "", "interrupted\n")
    assert not list(tmp_path.iterdir())
