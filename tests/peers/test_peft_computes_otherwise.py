"""Layers where PEFT's adapter is not W + delta: PEFT's own file is refused there, in every verb.

Each case is held to PEFT itself: its outputs are others than those of the dense weight.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.refusals import refused
from torch import Tensor, nn
from zoo.build import build
from zoo.inputs import dummy_inputs
from zoo.steps import run

import lora_inject as li

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT and transformers about each other


class Normed(nn.Linear):
    """Its weight is normalized in its forward."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight), self.bias)


class Standardized(nn.Conv2d):
    """As timm's StdConv2d."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class Scaled(nn.Embedding):
    """Its gain has no name by which PEFT knows it."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 3.0


class Reads(nn.Module):
    """Computes with a weight of a child, which nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.child, self.next = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.next(F.linear(x, self.child.weight))


class Shares(nn.Module):
    """One layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.one = self.two = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


X, IDS, IMAGE = torch.randn(3, 4), torch.tensor([[0, 4]]), torch.randn(2, 4, 8, 8)


def conv(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv2d(4, 4, 3, **options))


def of_zoo(name: str) -> Callable[[], nn.Module]:
    return lambda: build(name).requires_grad_(False).eval()


Case = tuple[Callable[[], nn.Module], Any, list[str], str]
CASES: dict[str, Case] = {
    "circular": (conv(padding=1, padding_mode="circular"), IMAGE, ["0"], "pads with zeros"),
    "reflect": (conv(padding=1, padding_mode="reflect"), IMAGE, ["0"], "pads with zeros"),
    "dilated": (conv(dilation=2, padding="same"), IMAGE, ["0"], "dilated"),
    "standardized": (lambda: nn.Sequential(Standardized(4, 4, 3)), IMAGE, ["0"], "of its own"),
    "normed": (lambda: nn.Sequential(Normed(4, 4)), X, ["0"], "of its own"),
    "scaled": (lambda: nn.Sequential(Scaled(5, 4)), IDS, ["0"], "of its own"),
    "shared": (Shares, X, ["one"], "2 places"),
    "read": (Reads, X, ["child", "next"], "reads"),
    "an attention's": (of_zoo("siglip_vision_model"), None, ["out_proj"], "attention"),
    "wavlm": (of_zoo("wavlm"), None, ["q_proj"], "reads"),
    "mobilebert": (of_zoo("mobilebert"), None, ["predictions.dense"], "reads"),
}
WHEN_RUN = ("read", "wavlm", "mobilebert")  # what no object shows


def computed(model: nn.Module, make: Callable[[], nn.Module], x: Any) -> Tensor:
    if x is not None:
        return model(x).flatten()
    plain = make()
    outputs = run(model, dummy_inputs(plain, plain.config.model_type))
    return torch.cat([t.flatten() for t in outputs])


def of_peft(plain: nn.Module, targets: list[str], folder: Path) -> Any:
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets)
    wrapped = peft.get_peft_model(copy.deepcopy(plain), config).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    wrapped.create_or_update_model_card = lambda _: None
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return wrapped


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_where_peft_computes_otherwise_its_file_is_refused(case: str, tmp_path: Path) -> None:
    make, x, targets, words = CASES[case]
    torch.manual_seed(1)
    plain = make()
    theirs = computed(of_peft(plain, targets, tmp_path / "theirs"), make, x)
    value = li.read_adapter(tmp_path / "theirs", tensor_names=[*plain.state_dict()])
    native = li.write_adapter(value, tmp_path / "a.safetensors", "native")
    dense = computed(li.load_adapter(copy.deepcopy(plain), native), make, x)
    assert (theirs - dense).abs().max() > 1e-3

    verbs: list[Callable[[nn.Module], Any]] = [
        lambda model: li.load_adapter(model, tmp_path / "theirs"),
        lambda model: li.install(model, value),
        lambda model: li.install(model, li.combine([value, value])),
        lambda model: li.install(model, li.truncate(value, rank=1).state),
        lambda model: li.swap_adapter(li.load_adapter(model, native), value),
    ]
    for verb in verbs:
        model = copy.deepcopy(plain)
        with refused(li.LoraInjectError, words, "PEFT", '"native"'):
            computed(verb(model), make, x)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_site_that_peft_has_not_trained_is_the_same_for_both(case: str, tmp_path: Path) -> None:
    """What nothing calls has no gradient: its B is still zero."""
    make, x, targets, _ = CASES[case]
    plain = make()
    config = peft.LoraConfig(r=2, target_modules=targets)
    peft.get_peft_model(copy.deepcopy(plain), config).save_pretrained(
        tmp_path, save_embedding_layers=False
    )
    model = li.load_adapter(copy.deepcopy(plain), tmp_path)
    torch.testing.assert_close(computed(model, make, x), computed(plain, make, x))


@torch.no_grad()
def test_a_weight_that_peft_adapts_as_a_parameter_is_w_plus_delta_there_too(tmp_path: Path) -> None:
    plain = nn.Sequential(Normed(4, 4))
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=[], target_parameters=["0.weight"])
    wrapped = peft.get_peft_model(copy.deepcopy(plain), config).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.normal_()
    wrapped.save_pretrained(tmp_path)
    torch.testing.assert_close(li.load_adapter(plain, tmp_path)(X), wrapped(X))
