"""PEFT's own list of small models with LoRA: what of it is loaded, merged and saved back.

The list is `TEST_CASES` of peft 0.21.2, tests/test_custom_models.py, but for variants that only
change how a model trains (VeLoRA) or what a file needs of the base (KaSA, MiCA, MonteCLoRA).
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import error
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora_inject as li

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of what it does by itself

DORA, BIAS = {"use_dora": True}, {"lora_bias": True, "lora_alpha": 32}
ROWS = {"trainable_token_indices": {"emb": [0, 10]}}


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__()
        self.add_module("lin0", nn.Linear(10, 20))
        self.add_module("relu", nn.ReLU())
        self.add_module("lin1", nn.Linear(20, 2))


class EmbConv1D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.conv1d, self.lin0 = nn.Embedding(20, 5), Conv1D(1, 5), nn.Linear(2, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lin0(torch.relu(self.conv1d(self.emb(ids))).flatten(1))


def conv(layer: Callable[[], nn.Module], name: str, width: int) -> Callable[[], nn.Module]:
    """A convolution and a linear layer behind it."""

    def make() -> nn.Module:
        net = nn.Sequential()
        net.add_module(name, layer())
        net.add_module("relu", nn.ReLU())
        net.add_module("flat", nn.Flatten())
        net.add_module("lin0", nn.Linear(width, 2))
        return net

    return make


class Mha(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha, self.lin0 = nn.MultiheadAttention(10, 2), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(self.mha(x, x, x)[0])


class Parameters(nn.Module):
    """Layers whose weights are read."""

    class Held(nn.Module):
        def __init__(self, n_in: int, n_out: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(n_in, n_out))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1 = self.Held(10, 20), self.Held(20, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(torch.relu(self.lin0(x)))


IMAGE, CUBE = (2, 5, 10, 10), (2, 5, 6, 6, 6)
Case = tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any]]
CONV2D = conv(lambda: nn.Conv2d(5, 10, 3), "conv2d", 640)
GROUPS = conv(lambda: nn.Conv2d(5, 5, 3, groups=5), "conv2d", 320)
GROUPS2 = conv(lambda: nn.Conv2d(5, 10, 3, groups=5), "conv2d", 640)
CONV3D = conv(lambda: nn.Conv3d(5, 10, 3), "conv3d", 640)
POINT3D = conv(lambda: nn.Conv3d(5, 10, 1), "conv3d", 2160)
CONV1D = conv(lambda: nn.Conv1d(1, 1, 2), "conv1d", 9)


def targets(*names: str, **options: Any) -> dict[str, Any]:
    return {"target_modules": list(names), **options}


MLP = (3, 10)
CASES: dict[str, Case] = {
    "MLP 1": (Mlp, MLP, {"target_modules": "lin0"}),
    "MLP 2": (Mlp, MLP, targets("lin0")),
    "MLP 3": (Mlp, MLP, targets("lin1")),
    "MLP 4": (Mlp, MLP, targets("lin0", "lin1")),
    "MLP 5": (Mlp, MLP, targets("lin0", modules_to_save=["lin1"])),
    "MLP 6": (Mlp, MLP, targets("lin0", lora_alpha=4, lora_dropout=0.1)),
    "MLP 7 DoRA": (Mlp, MLP, targets("lin0", **DORA)),
    "MLP 8 DoRA": (Mlp, MLP, targets("lin0", "lin1", **DORA)),
    "MLP 9 DoRA": (Mlp, MLP, {"target_modules": "lin1", **DORA, "lora_alpha": 32}),
    "EmbConv1D 1": (EmbConv1D, (), targets("conv1d")),
    "EmbConv1D 2": (EmbConv1D, (), targets("emb")),
    "EmbConv1D 3": (EmbConv1D, (), targets("emb", "conv1d")),
    "EmbConv1D 1 DoRA": (EmbConv1D, (), targets("conv1d", **DORA)),
    "EmbConv1D 2 DoRA": (EmbConv1D, (), targets("emb", **DORA)),
    "EmbConv1D 3 DoRA": (EmbConv1D, (), targets("emb", "conv1d", **DORA)),
    "EmbConv1D 1 tokens": (EmbConv1D, (), targets("conv1d", **ROWS)),
    "Conv1d": (CONV1D, (2, 1, 10), targets("conv1d")),
    "Conv1d DoRA": (CONV1D, (2, 1, 10), targets("conv1d", **DORA)),
    "Conv2d 1": (CONV2D, IMAGE, targets("conv2d")),
    "Conv2d 2": (CONV2D, IMAGE, targets("conv2d", "lin0")),
    "Conv2d 1 DoRA": (CONV2D, IMAGE, targets("conv2d", **DORA)),
    "Conv2d 2 DoRA": (CONV2D, IMAGE, targets("conv2d", "lin0", **DORA)),
    "Conv2d groups": (GROUPS, IMAGE, targets("conv2d", r=5)),
    "Conv2d groups 2": (GROUPS2, IMAGE, targets("conv2d", r=5)),
    "Conv2d groups DoRA": (GROUPS, IMAGE, targets("conv2d", r=5, **DORA)),
    "Conv2d groups 2 DoRA": (GROUPS2, IMAGE, targets("conv2d", r=5, **DORA)),
    "Conv3d 1": (CONV3D, CUBE, targets("conv3d")),
    "Conv3d 2": (CONV3D, CUBE, targets("conv3d", "lin0")),
    "Conv3d 1 DoRA": (CONV3D, CUBE, targets("conv3d", **DORA)),
    "Conv3d 2 DoRA": (CONV3D, CUBE, targets("conv3d", "lin0", **DORA)),
    "Conv3d 1x1": (POINT3D, CUBE, targets("conv3d")),
    "Conv3d 1x1 DoRA": (POINT3D, CUBE, targets("conv3d", **DORA)),
    "MLP 1 bias": (Mlp, MLP, targets("lin0", "lin1", **BIAS)),
    "Conv2d 1 bias": (CONV2D, IMAGE, targets("conv2d", **BIAS)),
    "Conv3d 1 bias": (CONV3D, CUBE, targets("conv3d", **BIAS)),
    "MHA 1": (Mha, (3, 2, 10), targets("mha")),
    "MHA 2": (Mha, (3, 2, 10), targets("mha", "lin0")),
    "parameters 1": (Parameters, MLP, {"target_parameters": ["lin0.weight"]}),
    "parameters 2": (Mlp, MLP, targets("lin0", target_parameters=["lin1.weight"])),
}


def made(case: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """The plain model, PEFT's with an adapter all of whose tensors have moved, and an input."""
    torch.manual_seed(0)
    make, shape, options = CASES[case]
    plain = make().eval()
    x = torch.randn(shape) if shape else torch.arange(10).view(5, 2)
    config = peft.LoraConfig(**{"r": 4, "init_lora_weights": False, **options})
    model: Any = peft.get_peft_model(copy.deepcopy(plain), config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_magnitude" in name:
                p.mul_(0.5 + torch.rand_like(p))
            elif p.requires_grad:
                p.normal_(0.0, 0.3)
    return plain, model, x


# B works in groups on what A has made of all channels: a map that the weight of a convolution in
# groups has no place for, so that PEFT does not merge it either. The norms of its DoRA are those of
# a product of other shapes, laid out anew (tuners/lora/dora.py).
REFUSED = [f"Conv2d groups{end}" for end in ("", " 2", " DoRA", " 2 DoRA")]


@pytest.mark.parametrize("case", [case for case in CASES if case not in REFUSED])
def test_pefts_own_cases_are_loaded_merged_and_saved_back(case: str, tmp_path: Path) -> None:
    plain, theirs, x = made(case)
    wanted = theirs(x).detach()
    assert error(plain(x), wanted) > 1e-3
    theirs.save_pretrained(tmp_path / "theirs")
    model: Any = li.load_adapter(copy.deepcopy(plain), tmp_path / "theirs").eval()
    assert error(model(x), wanted) <= 1e-5
    li.save_adapter(model, tmp_path / "ours")
    for prefer in ("metadata", "config"):
        mine: Any = li.load_adapter(copy.deepcopy(plain), tmp_path / "ours", prefer=prefer).eval()
        assert error(mine(x), wanted) <= 1e-5
    again: Any = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours").eval()
    assert error(again(x), wanted) <= 1e-5
    if case.startswith("MHA"):  # whose merge adds an update twice, as its forward does
        assert error(again.merge_and_unload()(x), wanted) <= 1e-5
    li.merge(model, eject=True)
    assert error(model(x), wanted) <= 1e-5


@pytest.mark.parametrize("case", REFUSED)
def test_pefts_own_cases_that_are_refused(case: str, tmp_path: Path) -> None:
    plain, theirs, _ = made(case)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(li.FormatError, match="grouped convolutions"):
        li.load_adapter(plain, tmp_path)
