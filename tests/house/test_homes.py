"""`~` in a path is the home, in whatever call; no folder `~` is made, and none is read."""

import os
from pathlib import Path

import pytest
import torch
from conftest import fill
from helpers.refusals import refused
from safetensors.torch import save_file
from torch import nn

import lora_inject as li

RULE = {"rank": 2, "targets": ["0"]}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty home; the working folder is another one."""
    for folder in ("home", "here"):
        (tmp_path / folder).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def test_what_is_written_to_a_home_is_there_and_read_from_there(home: Path) -> None:
    for folder in ("base", "tuned"):
        (home / folder).mkdir()
    plain, model = net(), fill(li.inject(net(), RULE))
    save_file(plain.state_dict(), home / "base" / "model.safetensors")
    tuned = {**plain.state_dict(), "0.weight": plain[0].weight + 1}
    save_file(tuned, home / "tuned" / "model.safetensors")
    (home / "lora.yaml").write_text("rank: 2\ntargets: ['0']")

    li.save_adapter(model, Path("~/saved"))
    li.write_adapter(li.adapter_state(model), "~/written")
    li.convert("~/saved", "~/converted", "portable", base="~/base")
    options = li.classes.MergeOptions(verify=True)
    li.merge_checkpoint("~/base", ["~/saved"], "~/merged", options=options)
    li.extract_adapter("~/base", "~/tuned", "~/extracted", rank=1)
    trials = li.Trials(net(), {"a": li.Trial(RULE, lr=1e-3)})
    trials.save("~/trials.pt")
    written = {"saved", "written", "converted", "merged", "extracted", "trials.pt"}
    there = {path.name for path in home.iterdir() if path.name[0] != "."}
    assert there == {"base", "tuned", "lora.yaml", *written}
    assert list(Path.cwd().iterdir()) == []

    assert li.load_adapter(net(), "~/saved") is not None
    assert li.swap_adapter(model, "~/saved") is model
    with refused(li.FormatError, "holds no proof"):  # which is looked for there
        li.verify_loaded(model)
    assert list(li.read_adapter("~/written").sites) == ["0"]
    assert li.check_adapter("~/saved", "peft", base="~/base") == []
    assert li.plan(net(), "~/lora.yaml").sites
    assert li.combine(["~/saved", "~/written"], [0.5, 0.5]).sites
    assert li.Trials.resume(net(), "~/trials.pt").trials == trials.trials


def test_homes_of_nobody_are_refused(home: Path) -> None:
    model, path = li.inject(net(), RULE), "~nobody-of-this-name/x"
    with refused(li.LoraInjectError, "'nobody-of-this-name'", "./~nobody", model=model):
        li.save_adapter(model, path)
    li.save_adapter(model, "./~/x")  # which can be meant
    assert list(li.read_adapter("./~/x").sites) == ["0"]
    assert [*home.iterdir()] == []
    assert [path.name for path in Path.cwd().iterdir()] == ["~"]


@pytest.mark.usefixtures("home")
class Named:
    """A path as other libraries have it: not what its text is."""

    def __init__(self, path: str | bytes) -> None:
        self.path = path

    def __fspath__(self) -> str | bytes:
        return self.path


def test_what_stands_for_a_path_is_its_path(tmp_path: Path, monkeypatch) -> None:
    """An entry of os.scandir made a folder called `<DirEntry 'a'>`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    model = li.inject(net(), RULE)
    for place in (*os.scandir(), Named("b"), Named(b"c")):
        li.save_adapter(model, place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]
    assert all(list(li.read_adapter(name).sites) == ["0"] for name in "abc")


@pytest.mark.usefixtures("home")
def test_a_misspelled_path_is_not_looked_for_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    li.save_adapter(li.inject(net(), RULE), "runs/adapter")
    with refused(li.FormatError, "'runs'", "'adapterr'", "'adapter'", "revision="):
        li.load_adapter(net(), "runs/adapterr")
    for path, options in (("runs/adapterr", {"revision": "main"}), ("user/adapter", {})):
        with refused(li.FormatError, path, "hub"):
            li.load_adapter(net(), path, **options)
