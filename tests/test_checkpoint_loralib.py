"""A state dict of the paper's library, from training layers to a merged checkpoint."""

import shutil

import pytest
import torch
from helpers.checkpoints import save_checkpoint
from safetensors.torch import load_file, save_file
from torch import nn

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


@pytest.fixture
def case(tmp_path):
    torch.manual_seed(0)
    plain, adapted = Net(adapted=False), Net(adapted=True)
    save_checkpoint(tmp_path / "base", {k: v.contiguous() for k, v in plain.state_dict().items()})
    adapted.load_state_dict(plain.state_dict(), strict=False)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or name.startswith("head"):
            nn.init.normal_(parameter, std=0.3)
    tensors = lora.lora_state_dict(adapted)
    tensors |= {k: v for k, v in adapted.state_dict().items() if k.startswith("head.")}
    return tmp_path, plain, adapted, tensors


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_merged_equals_the_layers_of_loralib(run, case, suffix):
    folder, plain, adapted, tensors = case
    file, pickled = folder / f"a{suffix}", suffix == ".bin"
    (torch.save if pickled else save_file)(tensors, file)
    options = (*OPTIONS, "--allow-pickle") if pickled else OPTIONS
    assert run("merge", folder / "base", file, "-o", folder / "out", *options).code == 0
    plain.load_state_dict(load_file(folder / "out" / "model.safetensors"))
    x = torch.randn(4, 8)
    torch.testing.assert_close(plain(x), adapted.train()(x), rtol=1e-5, atol=1e-5)
    assert run("verify", folder / "base", file, folder / "out", *options).code == 0


def test_what_the_file_does_not_hold_is_asked_for(run, case):
    folder, _, _, tensors = case
    save_file(tensors, folder / "a.safetensors")
    torch.save(tensors, folder / "a.bin")
    for file, options, code, words in (
        ("a.safetensors", (), 1, "Pass --alpha"),
        ("a.bin", OPTIONS, 1, "is a pickle. Pass --allow-pickle"),
        ("a.safetensors", ("--alpha", "6", "--enable-lora", "yes"), 2, "--enable-lora"),
        ("a.safetensors", ("--alpha", "6"), 1, "enable_lora"),
    ):
        found = run("merge", folder / "base", folder / file, "-o", folder / "out", *options)
        assert (found.code, words in found.err) == (code, True), found.err
    assert not (folder / "out").exists()


def test_options_of_loralib_without_a_file_of_it_are_wrong_usage(run, tmp_path):
    for name in ("base", "folder"):
        (tmp_path / name).mkdir()
    base = tmp_path / "base" / "model.safetensors"
    save_file({"w": torch.ones(2, 2)}, base)
    found = run("merge", base, tmp_path / "folder", "-o", tmp_path / "out", "--alpha", "6")
    assert found.code == 2
    assert "no adapter has a format with this option" in found.err


def test_inspect_and_analyze_read_what_merge_reads(run, case):
    folder, _, _, tensors = case
    file = folder / "lora.safetensors"
    save_file({k: v.contiguous() for k, v in tensors.items()}, file)
    for command in ("inspect", "analyze"):
        assert "Pass --alpha" in run(command, file).err
        assert "2 sites" in run(command, file, *OPTIONS).out
    assert run("inspect", file, *OPTIONS, "--base", folder / "base").code == 0
    shutil.copy(file, folder / "without-ending")
    assert run("inspect", folder / "without-ending", *OPTIONS, "--format", "loralib").code == 0
