"""Adapters as values and files: casts, names, folders, comparisons and what is said of them."""

import copy
import errno
import os
import signal
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fill
from helpers.reference import llama
from helpers.refusals import refused
from safetensors.torch import save_file
from torch import Tensor, nn

import lora_inject as li

PIPELINE = {"kohya": {"component": "unet"}}


def small(name: str = "default", dtype: torch.dtype = torch.float32, **config: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 6)).to(dtype)
    return fill(li.inject(model, {"rank": 2, "targets": ["0"], **config}, name))


def effect(state: li.AdapterState, site: str = "0") -> Tensor:
    held = state.sites[site]
    return held.scale * held.B.double() @ held.A.double()


# Casts ------------------------------------------------------------------------------------------


@pytest.fixture
def faint() -> li.AdapterState:
    """An adapter whose B is all too small for float16, which counts in steps of 6e-8."""
    model = small()
    with torch.no_grad():
        li.adapter_parameters(model)["0.lora_B"].mul_(1e-9)
    return li.adapter_state(model)


def test_a_cast_that_rounds_the_update_away_is_refused(
    faint: li.AdapterState, tmp_path: Path, run: Any
) -> None:
    with refused(li.StateError, "'0'", "float16", "torch.bfloat16"):
        li.algebra.as_dtype(faint, torch.float16)
    kept = effect(li.algebra.as_dtype(faint, torch.bfloat16))
    torch.testing.assert_close(kept, effect(faint), rtol=0.02, atol=1e-11)
    for to in ("portable", "kohya"):
        with refused(li.FormatError, "site '0'", "float16"):
            li.convert(faint, tmp_path / to, to, dtype="float16", **PIPELINE.get(to, {}))
    path = li.write_adapter(faint, tmp_path / "a", "native")
    out = tmp_path / "b"
    assert run("convert", path, "--to", "portable", "--dtype", "float16", "-o", out).code != 0
    assert not out.exists()


def test_a_scale_that_is_folded_into_b_does_not_round_it_away(tmp_path: Path) -> None:
    model = small(alpha=1e-6, dtype=torch.float16)
    state = li.algebra.as_dtype(li.adapter_state(model), torch.float16)
    with refused(li.FormatError, "site '0'", "float16"):
        li.write_adapter(state, tmp_path / "a", "portable")
    path = li.write_adapter(state, tmp_path / "a", "portable", dtype="float32")
    torch.testing.assert_close(effect(li.read_adapter(path)), effect(state), rtol=1e-5, atol=0)


# Names ------------------------------------------------------------------------------------------


def test_two_names_are_swapped() -> None:
    layers = [nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)]
    state = li.adapter_state(li.inject(nn.Sequential(*layers), {"rank": 2, "targets": ["0", "2"]}))
    swapped = li.algebra.rename(state, {"0": "2", "2": "0"})
    assert {name: swapped.sites[name].spec.in_features for name in "02"} == {"0": 6, "2": 4}
    assert li.algebra.rename(swapped, {"0": "2", "2": "0"}).sites == state.sites
    deep = li.algebra.rename(state, {"0": r"model.layers.0", "2": r"model.2"})
    assert [*deep.sites] == ["model.layers.0", "model.2"]


@pytest.mark.parametrize("name", ["..", "a\0b", "\ud800", "line\nbreak"])
def test_an_adapter_is_not_written_outside_of_the_folder_that_it_is_saved_to(
    name: str, tmp_path: Path
) -> None:
    model = llama()
    li.inject(model, {"rank": 2, "targets": ["q_proj"]})
    li.save_adapter(model, tmp_path / "own", overwrite=True)
    for file in (tmp_path / "own").iterdir():
        file.rename(tmp_path / file.name)
    (tmp_path / "own").rmdir()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    li.inject(model, {"rank": 2, "targets": ["v_proj"]}, name)
    with refused(li.StateError, repr(name), "save_adapter", model=model):
        model.save_pretrained(tmp_path / "inside")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_the_system_says_of_a_folder_is_an_error_of_ours(tmp_path: Path) -> None:
    model = llama()
    li.inject(model, {"rank": 2, "targets": ["q_proj"]})
    (tmp_path / "file").write_text("a file")
    with refused(li.FormatError, "file", model=model):
        model.save_pretrained(tmp_path / "file" / "below")
    li.inject(model, {"rank": 2, "targets": ["v_proj"]}, "n" * 300)
    with refused(li.FormatError, "n" * 300, model=model):
        model.save_pretrained(tmp_path / "long")


# Paths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["merge", "verify"])
def test_links_that_form_a_loop_are_an_error_in_words(
    command: str, tmp_path: Path, run: Any
) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    base = tmp_path / "base.safetensors"
    model = small()
    state = {"0.weight": torch.randn(6, 4), "0.bias": torch.randn(6)}
    save_file(state, base)
    path = li.save_adapter(model, tmp_path / "adapter")
    words = {"merge": ("-o", tmp_path / "a"), "verify": (tmp_path / "a",)}
    ran = run(command, base, path, *words[command])
    assert ran.code == 1
    assert "loop" in ran.err
    assert "Traceback" not in ran.err


@pytest.fixture(params=["pipe", "socket", "device"])
def no_file(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """What is neither a file nor a folder; who opens it and waits is interrupted."""
    path = tmp_path / f"{request.param}.yaml"
    if request.param == "pipe":
        os.mkfifo(path)
    elif request.param == "device":
        path.symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as bound:
        if request.param == "socket":
            bound.bind(str(path))
        signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waits"))
        signal.alarm(20)
        yield path
        signal.alarm(0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def test_what_is_no_file_is_refused_before_it_is_opened(
    no_file: Path, tmp_path: Path, run: Any
) -> None:
    """A pipe was waited for, and endless data read until the memory was full."""
    adapter = li.save_adapter(small(), tmp_path / "adapter")
    (tmp_path / "lora.yaml").write_text("targets: [q_proj]")
    for words in (
        ("plan", no_file, adapter),
        ("plan", tmp_path / "lora.yaml", no_file),
        ("inspect", no_file),
        ("merge", no_file, adapter, "-o", tmp_path / "out"),
        ("rename", adapter, "a=b", "--output", no_file),
        ("profile", adapter, "--data", no_file, "--output", tmp_path / "out"),
    ):
        ran = run(*words)
        assert ran.code == 1
        assert "neither a file nor a folder" in ran.err
    for call in (
        lambda: li.inject(small(), no_file, "b"),
        lambda: li.load_adapter(small(), no_file, "b"),
    ):
        with refused(li.LoraInjectError, no_file.name, "neither a file nor a folder"):
            call()


def test_a_mount_that_cannot_sync_a_folder_does_not_fail_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As some network and FUSE mounts: EINVAL for folders only."""

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", fsync)
    model = small()
    for format_name in ("peft", "native"):
        path = li.save_adapter(model, tmp_path / format_name, format=format_name)
        assert li.read_adapter(path).sites == li.adapter_state(model).sites


def test_how_many_versions_are_kept_asks_for_a_version(tmp_path: Path) -> None:
    model = small()
    with refused(li.FormatError, "keep", "version", model=model):
        li.save_adapter(model, tmp_path / "a", keep=3)
    assert not (tmp_path / "a").exists()


def test_a_file_that_nobody_wrote_is_not_said_to_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another writer's file was there at the link, and is gone again."""

    def link(*_: Any) -> None:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    monkeypatch.setattr(os, "link", link)
    with refused(li.FormatError, "sql"):
        li.save_adapter(small(), tmp_path / "sql.safetensors", format="native")
    assert not (tmp_path / "sql.safetensors").exists()


@pytest.mark.parametrize("format_name", ["peft", "native"])
def test_what_a_killed_save_left_goes_with_the_next_one(format_name: str, tmp_path: Path) -> None:
    """After a day: younger ones may be of a save that goes on."""
    name = "sql" if format_name == "peft" else "sql.safetensors"
    names = (f".{name}.0123456789ab.tmp", f".{name}.ba9876543210.tmp", ".else.0123456789ab.tmp")
    left, young, other = (tmp_path / each for each in names)
    for folder in (left, young, other):
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"half")
    os.utime(left, (10**9, 10**9))
    os.utime(other, (10**9, 10**9))
    li.save_adapter(small(), tmp_path / "sql", format=format_name)
    assert {path.name for path in tmp_path.iterdir()} == {name, young.name, other.name}


class Wrapper(nn.Module):
    """Calls what is inside as PEFT's layers do."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.base_layer = inside

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x)


@pytest.mark.parametrize("inside", [nn.Linear(4, 6), nn.Sequential(nn.Linear(4, 6))])
@pytest.mark.parametrize("format_name", ["peft", "portable"])
def test_a_module_called_base_layer_is_written_as_it_can_be_read(
    format_name: str, inside: nn.Module, tmp_path: Path
) -> None:
    plain = nn.Sequential(Wrapper(copy.deepcopy(inside)))
    model = fill(li.inject(copy.deepcopy(plain), {"rank": 2, "targets": ["all-linear"]}))
    path = li.save_adapter(model, tmp_path / "a", format=format_name)
    x = torch.randn(3, 4)
    loaded = li.load_adapter(plain, path)
    torch.testing.assert_close(loaded(x), model(x))


# Comparisons and what is said -------------------------------------------------------------------


def test_equal_values_are_said_to_be_equal_after_a_trip_through_other_programs(
    tmp_path: Path, run: Any
) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(64, 64))
    fill(li.inject(model, {"rank": 8, "alpha": 16, "dropout": 0.05, "targets": ["0"]}))
    path = li.save_adapter(model, tmp_path / "a")
    there = li.convert(path, tmp_path / "there", "kohya", component="unet")
    compared = li.diff(path, there)
    assert compared.distance == 0
    assert [site.distance for site in compared.sites.values()] == [0.0]
    assert compared.cosine == pytest.approx(1, abs=1e-15)
    assert not compared.equal  # the dropout is another
    said = run("diff", path, there).out
    assert "equal values" in said
    assert "not equal" not in said
    assert "|one - two| = 0," in said
    with torch.no_grad():
        li.adapter_parameters(model)["0.lora_A"][0, 0] *= 1 + 2**-20
    other = li.save_adapter(model, tmp_path / "b")
    assert 0 < li.diff(path, other).distance < 1e-3
    assert "not equal" in run("diff", path, other).out


@pytest.mark.parametrize("key", [
    "r", "lora_alpha", "target_modules", "lora_dropout", "use_rslora", "modules_to_save",
    "exclude_modules", "layers_to_transform", "target_parameters", "peft_type", "use_dora",
])  # fmt: skip
def test_a_key_of_peft_in_a_config_hints_at_what_reads_pefts(key: str) -> None:
    with refused(li.ConfigError, f"'{key}'", "lora_inject.from_peft"):
        li.Config.from_dict({"targets": ["q"], key: 8})
    with pytest.raises(li.ConfigError) as raised:
        li.Config.from_dict({"targets": ["q"], "rnak": 8})
    assert "from_peft" not in str(raised.value)
