"""`lora-inject analyze`: what it prints and writes, where, and with which exit code.

The numbers are those of a dense float64 reference made from the files.
"""

import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import fill
from helpers.forks import program
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lora_inject as li

SHAPES = {f"h.{i}.{leaf}.weight": shape for i in range(3)
          for leaf, shape in (("q_proj", (8, 8)), ("up", (12, 8)))}  # fmt: skip


class Layer(torch.nn.Module):
    """Two linear layers of different shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.up = torch.nn.Linear(8, 8, False), torch.nn.Linear(8, 12, False)


class Model(torch.nn.Module):
    """Three layers."""

    def __init__(self) -> None:
        super().__init__()
        self.h = torch.nn.ModuleList(Layer() for _ in range(3))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A base, adapters of two ranks and of another seed, as folders."""
    folder = tmp_path_factory.mktemp("analyze")
    torch.manual_seed(0)
    model = Model()
    (folder / "base").mkdir()
    save_file(model.state_dict(), folder / "base" / "model.safetensors")
    for name, rank in (("r2", 2), ("r4", 4), ("seed", 2)):
        li.inject(model, {"rank": rank, "alpha": 4, "targets": ["q_proj", "up"]}, name)
        li.save_adapter(fill(model, name, 0.3), folder / name, name)
    li.eject(model)
    with torch.no_grad():
        model.h[0].q_proj.weight.add_(1)
    (folder / "changed").mkdir()
    save_file(model.state_dict(), folder / "changed" / "model.safetensors")
    return folder


def dense(folder: Path, rank: int) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name in SHAPES:
        key = "base_model.model." + name.replace(".weight", ".lora_{}.weight")
        A, B = tensors[key.format("A")], tensors[key.format("B")]
        found[name] = 4 / rank * (B.double() @ A.double())
    return found


def test_json_holds_the_figures_of_a_dense_reference(run, files):
    found = run("analyze", files / "r2", "--base", files / "base", "--json")
    assert (found.code, found.err) == (0, "")
    data = json.loads(found.out, parse_constant=pytest.fail)
    W = load_file(files / "base" / "model.safetensors")
    deltas = dense(files / "r2", 2)
    assert data["n_sites"] == 6
    for block in data["blocks"]:
        name = f"{block['site']}.weight"
        S = torch.linalg.svdvals(deltas[name])[:2].tolist()
        assert block["spectrum"]["values"] == pytest.approx(S, rel=1e-9)
        beside = data["weights"][block["site"]]
        assert beside["stored"] == "float32"
        (norms,) = beside["blocks"]
        assert norms["tensor"] == name
        norms = norms["norms"]
        U, _, Vh = torch.linalg.svd(deltas[name])
        projected = float((U[:, :2].T @ W[name].double() @ Vh[:2].T).norm())
        assert norms["of_delta"] == pytest.approx(projected, rel=1e-9)
        assert norms["factor"] == pytest.approx(math.hypot(*S) / projected, rel=1e-9)
        assert beside["rounded"]["bfloat16"]["kept"] == pytest.approx(1, abs=0.05)
    assert data["comparison"] is None
    assert data["written"] == []


def test_the_table_has_a_line_for_each_block_and_the_findings(run, files):
    found = run("analyze", files / "r2", "--all")
    assert (found.code, found.err) == (0, "")
    lines = found.out.splitlines()
    heads = ["block", "rank", "|D|", "first", "stable", "effective", "90%", "95%", "99%"]
    assert lines[0].split() == " ".join(heads).split()
    assert [line.split()[0] for line in lines[1:7]] == [n.removesuffix(".weight") for n in SHAPES]
    assert lines[-1] == "6 sites, 6 blocks; rank 2 holds 99% (median)"
    args = ("analyze", files / "r2", files / "r4", "--base", files / "base")
    assert run(*args, "--all").out.count("h.1.up") == 4  # blocks, weights, rounding, phi
    beside = run(*args).out
    assert beside.count("h.{0..2}.up") >= 4
    assert "amplification" in beside
    assert "kept (error) after merging in" in beside
    assert "A: phi(1,1)" in beside


def test_two_adapters_are_compared(run, files):
    data = json.loads(run("analyze", files / "r2", files / "r4", "--json").out)
    pairs = data["comparison"]["pairs"]
    assert [pair["site"] for pair in pairs] == [name.removesuffix(".weight") for name in SHAPES]
    one, two = (load_file(files / name / "adapter_model.safetensors") for name in ("r2", "r4"))
    key = "base_model.model.h.0.q_proj.lora_A.weight"
    tops = [torch.linalg.svd(t[key].double()).Vh[:1] for t in (one, two)]
    assert pairs[0]["right"]["phi"][0][0] == pytest.approx(float((tops[0] @ tops[1].T) ** 2))
    assert (len(pairs[0]["right"]["phi"]), len(pairs[0]["right"]["phi"][0])) == (2, 4)


def test_findings_are_printed_with_their_names(run, files, tmp_path):
    folder = shutil.copytree(files / "r4", tmp_path / "zero")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for layer in (0, 1):
        tensors[f"base_model.model.h.{layer}.q_proj.lora_B.weight"].zero_()
    save_file(tensors, path, metadata)
    lines = run("analyze", folder).out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("inert: "))
    assert "  2: h.{0..1}.q_proj" in lines[at + 1 : at + 3]


def test_a_report_and_pictures_are_written(run, files, tmp_path):
    pytest.importorskip("matplotlib")
    page, folder = tmp_path / "new" / "report.html", tmp_path / "pictures"
    found = run("analyze", files / "r2", files / "seed", "--base", files / "base",
                "--report", page, "--pictures", folder, "--json")  # fmt: skip
    assert found.code == 0
    written = json.loads(found.out)["written"]
    assert found.err.splitlines() == [f"wrote {path}" for path in written]
    names = {path.name for path in folder.iterdir()}
    assert names == {"spectra.png", *(f"{what}-h-{kind}.png" for kind in ("q_proj", "up")
                                      for what in ("layers", "seeds", "weight"))}  # fmt: skip
    text = page.read_text(encoding="utf-8")
    for name in SHAPES:
        assert name.removesuffix(".weight") in text
    assert f"<h1>{files.name}/r2</h1>" in text
    assert run("analyze", files / "r2", "--report", page).code == 0  # replaced


# ----------------------------------------------------------------------------------------- refusals


def test_what_is_refused(run, files, tmp_path):
    for args in (
        (tmp_path / "nowhere",),
        (files / "base",),
        (files / "r2", files / "base"),
        (files / "r2", "--base", tmp_path),
        (files / "r2", "--base", files / "changed"),
    ):
        found = run("analyze", *args)
        assert (found.code, found.out) == (1, ""), args
        assert "Error: " in found.err
    found = run("analyze", files / "r2", "--base", files / "changed", "--any-base")
    assert found.code == 0


def test_without_matplotlib_nothing_is_computed_first(run, files, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("lora_inject.analysis.analyze", pytest.fail)
    found = run("analyze", files / "r2", "--pictures", tmp_path / "p")
    assert (found.code, found.out) == (1, "")
    assert "pip install matplotlib" in found.err
    assert not (tmp_path / "p").exists()


def test_dora_is_refused(run, files, tmp_path):
    folder = shutil.copytree(files / "r2", tmp_path / "dora")
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, shape in SHAPES.items():
        key = "base_model.model." + name.replace(".weight", ".lora_magnitude_vector")
        tensors[key] = torch.ones(shape[0])
    save_file(tensors, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    found = run("analyze", folder, "--base", files / "base")
    assert found.code == 1
    assert "DoRA" in found.err


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
