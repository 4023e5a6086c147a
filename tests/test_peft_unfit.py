"""Layers in whose place PEFT's own cannot stand: nothing that PEFT reads is written, check says it.

Each case is held to PEFT itself: it raises, or its adapter does nothing, or something else.
"""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fill
from torch import Tensor, nn
from zoo.build import build
from zoo.inputs import dummy_inputs
from zoo.steps import run

import lora_inject as li
from lora_inject.core.layers.survey import Survey
from lora_inject.formats import facts_about, write_adapter

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT and transformers about each other


class Shortened(nn.Conv1d):
    """A convolution with arguments of its own."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__(width, width, size)


class Steps(nn.Module):
    """Asks a convolution for its stride, as Whisper does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)[..., :: self.conv.stride[0]]


def mamba() -> Any:
    return build("mamba")


def whisper() -> Any:
    return build("whisper")


def conv(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv1d(4, 4, 3, **options))


SOUND = torch.randn(2, 4, 12)
Case = tuple[Callable[[], nn.Module], str, str]
CASES: dict[str, Case] = {
    "read": (mamba, "dt_proj", "another module reads the weight"),
    "out_proj": (mamba, "mixer.out_proj", "it refuses every 'out_proj'"),
    "conv1d": (mamba, "mixer.conv1d", "it refuses every 'conv1d'|another module"),
    "stride 1": (whisper, "encoder.conv1", "the model reads 'stride' of the layer"),
    "stride 2": (whisper, "encoder.conv2", "the model reads 'stride' of the layer"),
    "own stride": (Steps, "conv", "the model reads 'stride' of the layer"),
    "depthwise": (conv(groups=4), "0", "the inputs of all 4 groups"),
    "groups that divide": (conv(groups=2), "0", "the inputs of all 2 groups"),
    "dilation": (conv(dilation=2), "0", "its A is not dilated"),
    "a dilation that fits": (
        conv(dilation=2, padding="same"),
        "0",
        "its A is not dilated",
    ),
    "padding": (conv(padding=1, padding_mode="circular"), "0", "pads with zeros"),
    "arguments": (
        lambda: nn.Sequential(Shortened(4, 3)),
        "0",
        "whose arguments are not a convolution's",
    ),
}
FORMATS = ("peft", "portable", "vllm")


def computed(model: nn.Module, make: Callable[[], nn.Module]) -> Tensor:
    """Return the outputs, flat, of a model that `make` made, also inside PEFT's."""
    if make in (mamba, whisper):
        return torch.cat([t.flatten() for t in run(model, dummy_inputs(make(), make.__name__))])
    return model(SOUND).flatten()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_what_peft_cannot_adapt_is_not_written_for_it(case: str, tmp_path: Path) -> None:
    make, site, words = CASES[case]
    torch.manual_seed(1)
    plain = make()
    model = fill(li.inject(copy.deepcopy(plain), {"rank": 2, "alpha": 3, "targets": [site]}))
    before, due = computed(plain, make), computed(model, make)
    assert (due - before).abs().max() > 1e-4
    for target in FORMATS:
        with pytest.raises(li.FormatError, match=rf"PEFT would load it wrong: .*({words})"):
            li.save_adapter(model, tmp_path / target, format=target)
    assert list(tmp_path.iterdir()) == []

    state = li.adapter_state(model)
    path = write_adapter(state, tmp_path / "made")  # as nobody knows the model
    try:  # what PEFT makes of it
        theirs = computed(peft.PeftModel.from_pretrained(copy.deepcopy(plain), str(path)), make)
    except (ValueError, AttributeError, RuntimeError, TypeError):
        return
    assert theirs.shape != due.shape or not torch.allclose(theirs, due, atol=1e-5)


@pytest.mark.parametrize("case", ["read", "out_proj", "conv1d", "stride 1", "stride 2"])
def test_check_says_what_peft_cannot_adapt(case: str, tmp_path: Path) -> None:
    make, site, words = CASES[case]
    model = make()
    model.save_pretrained(tmp_path / "base")
    state = li.adapter_state(li.inject(model, {"rank": 2, "targets": [site]}))
    for target in FORMATS:
        path = write_adapter(state, tmp_path / target, target)
        stops = [f for f in li.check_adapter(path, "peft", base=tmp_path / "base") if f.stops]
        assert any(re.search(words, finding.problem) for finding in stops), stops
        with pytest.raises(li.FormatError, match=words):
            li.convert(path, tmp_path / "to", target, base=tmp_path / "base")


def test_diffusers_uses_the_layers_of_peft(tmp_path: Path) -> None:
    model = li.inject(conv(groups=4)(), {"rank": 2, "targets": ["0"]})
    words = "diffusers, which uses PEFT, would load it wrong: its A reads the inputs"
    with pytest.raises(li.FormatError, match=words):
        li.save_adapter(model, tmp_path / "a", format="diffusers", component="unet")
    li.save_adapter(model, tmp_path / "a.safetensors", format="kohya", component="unet")


@torch.no_grad()
def test_what_peft_computes_the_same_beside_them_is_written(tmp_path: Path) -> None:
    for make, sites in (
        (mamba, ["in_proj", "x_proj"]),
        (whisper, ["q_proj", "fc1"]),
    ):
        plain = make()
        model = fill(li.inject(copy.deepcopy(plain), {"rank": 2, "targets": sites}))
        for target in FORMATS:
            path = li.save_adapter(model, tmp_path / make.__name__ / target, format=target)
            theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), str(path))
            torch.testing.assert_close(
                computed(theirs, make), computed(model, make), rtol=1e-4, atol=1e-5
            )


class Loops(nn.Module):
    """Uses its children in all the ways that a source shows."""

    def __init__(self) -> None:
        super().__init__()
        self.called = nn.Linear(4, 4)
        self.given = nn.Linear(4, 4)
        self.read = nn.Linear(4, 4)
        self.aliased = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.asked = nn.Linear(4, 4)
        self.members = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.numbered = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.indexed = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.called(x.to(self.called.weight.dtype))
        x = torch.utils.checkpoint.checkpoint(self.given, x, use_reentrant=False)
        fc = self.aliased
        x = x @ fc.weight.T
        for member in self.members:
            x = x @ member.weight
        for n, member in enumerate(self.numbered):
            x = member(x) + n
        return self.rest(x) * self.asked.in_features

    def rest(self, x: Tensor) -> Tensor:
        return self.indexed[0](x) @ self.read.weight

    def never(self, x: Tensor) -> Tensor:
        return self.called.weight @ self.unused.weight @ x


def test_a_source_shows_who_is_called_and_who_is_read() -> None:
    model = Loops()
    unfit = facts_about(Survey(model)).unfit
    assert unfit is not None
    layers = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert {n for n in layers if unfit(n)} == {"aliased", "read", "members.0", "members.1"}
