"""A state dict of the paper's library, from training layers to a merged checkpoint."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_inject.cli import app

lora = pytest.importorskip("loralib")

OPTIONS = ("--alpha", "6", "--fan-in-fan-out", "c_attn", "--enable-lora", "1,0,1")


class Net(nn.Module):
    """GPT-2's fused layer as loralib adapts it, a plain one, and a head that is trained."""

    def __init__(self, *, adapted):
        super().__init__()
        if adapted:
            self.c_attn = lora.MergedLinear(
                8, 24, r=2, lora_alpha=6, enable_lora=[True, False, True], fan_in_fan_out=True
            )
            self.c_proj = lora.Linear(8, 8, r=2, lora_alpha=6)
        else:
            self.c_attn = lora.MergedLinear(8, 24, fan_in_fan_out=True)
            self.c_proj = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        q, k, v = self.c_attn(x).chunk(3, -1)
        return self.head(self.c_proj(torch.tanh(q) * k + v))


def run(*arguments):
    with pytest.raises(SystemExit) as left:
        app([str(argument) for argument in arguments], prog_name="lora-inject")
    return left.value.code or 0


@pytest.fixture
def case(tmp_path):
    torch.manual_seed(0)
    plain, adapted = Net(adapted=False), Net(adapted=True)
    (tmp_path / "base").mkdir()
    save_file(
        {k: v.contiguous() for k, v in plain.state_dict().items()},
        tmp_path / "base" / "model.safetensors",
    )
    adapted.load_state_dict(plain.state_dict(), strict=False)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or name.startswith("head"):
            nn.init.normal_(parameter, std=0.3)
    tensors = lora.lora_state_dict(adapted)
    tensors |= {k: v for k, v in adapted.state_dict().items() if k.startswith("head.")}
    return tmp_path, plain, adapted, tensors


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_merged_equals_the_layers_of_loralib(case, suffix):
    folder, plain, adapted, tensors = case
    file, pickled = folder / f"a{suffix}", suffix == ".bin"
    (torch.save if pickled else save_file)(tensors, file)
    options = (*OPTIONS, "--allow-pickle") if pickled else OPTIONS
    assert run("merge", folder / "base", file, "-o", folder / "out", *options) == 0
    plain.load_state_dict(load_file(folder / "out" / "model.safetensors"))
    x = torch.randn(4, 8)
    torch.testing.assert_close(plain(x), adapted.train()(x), rtol=1e-5, atol=1e-5)
    assert run("verify", folder / "base", file, folder / "out", *options) == 0


def test_what_the_file_does_not_hold_is_asked_for(case, capsys):
    folder, _, _, tensors = case
    save_file(tensors, folder / "a.safetensors")
    torch.save(tensors, folder / "a.bin")
    out = ("-o", folder / "out")
    assert run("merge", folder / "base", folder / "a.safetensors", *out) == 1
    assert "Pass --alpha" in capsys.readouterr().err
    assert run("merge", folder / "base", folder / "a.bin", *out, *OPTIONS) == 1
    assert "is a pickle. Pass --allow-pickle" in capsys.readouterr().err
    flags = ("--alpha", "6", "--enable-lora", "yes")
    assert run("merge", folder / "base", folder / "a.safetensors", *out, *flags) == 2
    assert "--enable-lora" in capsys.readouterr().err
    assert run("merge", folder / "base", folder / "a.safetensors", *out, "--alpha", "6") == 1
    assert "enable_lora" in capsys.readouterr().err
    assert not Path(folder / "out").exists()


def test_options_of_loralib_without_a_file_of_it_are_wrong_usage(tmp_path, capsys):
    for name in ("base", "folder"):
        (tmp_path / name).mkdir()
    save_file({"w": torch.ones(2, 2)}, tmp_path / "base" / "model.safetensors")
    base = tmp_path / "base" / "model.safetensors"
    arguments = (base, tmp_path / "folder", "-o", tmp_path / "out")
    assert run("merge", *arguments, "--alpha", "6") == 2
    assert "no adapter has a format with this option" in capsys.readouterr().err


def test_inspect_and_analyze_read_what_merge_reads(case, capsys):
    folder, _, _, tensors = case
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "lora.safetensors")
    for command in ("inspect", "analyze"):
        assert run(command, folder / "lora.safetensors") == 1
        assert "Pass --alpha" in capsys.readouterr().err
        assert run(command, folder / "lora.safetensors", *OPTIONS) == 0
        assert "2 sites" in capsys.readouterr().out
    assert run("inspect", folder / "lora.safetensors", *OPTIONS, "--base", folder / "base") == 0
    shutil.copy(folder / "lora.safetensors", folder / "without-ending")
    assert run("inspect", folder / "without-ending", *OPTIONS, "--format", "loralib") == 0
