"""Layers and names that PEFT would load wrong or not at all: nothing that it reads is written.

Each case is held to PEFT itself: it raises, or its adapter does nothing, or something else.
"""

import contextlib
import copy
import re
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import fill, same_bits
from helpers.refusals import refused
from torch import Tensor, nn
from zoo.build import build
from zoo.inputs import dummy_inputs
from zoo.steps import run

import lora_inject as li

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT and transformers about each other


class Reads(nn.Module):
    """Computes with a weight of a child, which nobody calls."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child

    def forward(self, x: Tensor) -> Tensor:
        kernel: Any = self.child.weight
        return F.linear(x, kernel) if kernel.dim() == 2 else F.conv1d(x[..., None], kernel)


class Hides(Reads):
    """The same, where no source shows it, and only the forward does."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, attrgetter("weight")(self.child))


class Standardized(nn.Conv1d):
    """A forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.weight - self.weight.mean(), self.bias)


class Scaled(nn.Embedding):
    """A gain under the name by which PEFT knows it."""

    def __init__(self) -> None:
        super().__init__(5, 4)
        self.register_buffer("embed_scale", torch.tensor(3.0), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


def mamba() -> Any:
    return build("mamba")


def whisper() -> Any:
    return build("whisper")


def conv(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv1d(4, 4, 3, **options))


SOUND, X = torch.randn(2, 4, 12), torch.randn(3, 4)
Case = tuple[Callable[[], nn.Module], str, str]
OF_LIBRARY: dict[str, Case] = {
    "read": (mamba, "dt_proj", "reads"),
    "out_proj": (mamba, "mixer.out_proj", "'out_proj'"),
}
CASES: dict[str, Case] = OF_LIBRARY | {
    "groups": (conv(groups=2), "0", "2 groups"),
    "dilation": (conv(dilation=2, padding="same"), "0", "dilated"),
    "padding": (conv(padding=1, padding_mode="circular"), "0", "zeros"),
    "a layer that is read": (lambda: Reads(nn.Linear(4, 4)), "child", "reads"),
    "read in a way of its own": (lambda: Hides(nn.Linear(4, 4)), "child", "reads"),
    "a kernel that is read": (lambda: Reads(nn.Conv1d(4, 4, 1)), "child", "reads"),
    "its own forward": (lambda: nn.Sequential(Standardized(4, 4, 1)), "0", "its own"),
}  # fmt: skip
FORMATS = ("peft", "portable", "vllm")
READ = ("a layer that is read", "a kernel that is read", "read in a way of its own")
INPUTS = {**dict.fromkeys(READ, X), "its own forward": X[..., None]}


def computed(model: nn.Module, make: Callable[[], nn.Module], x: Tensor = SOUND) -> Tensor:
    """Return the outputs, flat, of a model that `make` made, also inside PEFT's."""
    if make in (mamba, whisper):
        return torch.cat([t.flatten() for t in run(model, dummy_inputs(make(), make.__name__))])
    return model(x).flatten()


def site_of(model: nn.Module) -> str:
    return next(iter(li.adapter_state(model).sites))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_what_peft_cannot_adapt_is_not_written_for_it(case: str, tmp_path: Path) -> None:
    make, site, words = CASES[case]
    torch.manual_seed(1)
    plain = make()
    model = fill(li.inject(copy.deepcopy(plain), {"rank": 2, "alpha": 3, "targets": [site]}))
    x = INPUTS.get(case, SOUND)
    before, due = computed(plain, make, x), computed(model, make, x)
    assert (due - before).abs().max() > 1e-4
    for target in FORMATS:
        with refused(li.FormatError, f"'{site_of(model)}'", words, model=model):
            li.save_adapter(model, tmp_path / target, format=target)
    assert list(tmp_path.iterdir()) == []
    native = li.save_adapter(model, tmp_path / "a.safetensors", format="native")
    assert same_bits(computed(li.load_adapter(copy.deepcopy(plain), native), make, x), due)

    state = li.adapter_state(model)
    path = li.write_adapter(state, tmp_path / "made")  # as nobody knows the model
    try:  # what PEFT makes of it
        read = peft.PeftModel.from_pretrained(copy.deepcopy(plain), str(path))
        theirs = computed(read, make, x)
    except (ValueError, AttributeError, RuntimeError, TypeError):
        return
    assert theirs.shape != due.shape or not torch.allclose(theirs, due, atol=1e-5)


def test_an_attribute_of_a_layer_that_the_model_reads_is_not_looked_for(tmp_path: Path) -> None:
    """PEFT says so itself: its layer has no stride, which Whisper reads."""
    model = li.inject(whisper(), {"rank": 2, "targets": ["encoder.conv2"]})
    fill(model)
    computed(model, whisper)
    path = li.save_adapter(model, tmp_path / "a")
    with pytest.raises(AttributeError, match="stride"):
        computed(peft.PeftModel.from_pretrained(whisper(), str(path)), whisper)


@pytest.mark.parametrize("case", ["out_proj"])
def test_check_says_what_peft_cannot_adapt(case: str, tmp_path: Path) -> None:
    make, site, words = CASES[case]
    model = make()
    model.save_pretrained(tmp_path / "base")
    state = li.adapter_state(li.inject(model, {"rank": 2, "targets": [site]}))
    for target in FORMATS:
        path = li.write_adapter(state, tmp_path / target, target)
        stops = [f for f in li.check_adapter(path, "peft", base=tmp_path / "base") if f.stops]
        assert any(words in finding.problem for finding in stops), stops
        with refused(li.FormatError, words):
            li.convert(path, tmp_path / "to", target, base=tmp_path / "base")


def test_diffusers_uses_the_layers_of_peft(tmp_path: Path) -> None:
    model = li.inject(conv(groups=4)(), {"rank": 2, "targets": ["0"]})
    with refused(li.FormatError, "'0'", "diffusers"):
        li.save_adapter(model, tmp_path / "a", format="diffusers", component="unet")
    li.save_adapter(model, tmp_path / "a.safetensors", format="kohya", component="unet")


def test_a_gain_that_peft_knows_is_written(tmp_path: Path) -> None:
    plain, ids = nn.Sequential(Scaled()), torch.tensor([[0, 4]])
    model = fill(li.inject(copy.deepcopy(plain), {"rank": 2, "alpha": 3, "targets": ["0"]}))
    theirs = peft.PeftModel.from_pretrained(plain, str(li.save_adapter(model, tmp_path / "a")))
    assert torch.allclose(theirs(ids), model(ids), atol=1e-6)


def test_what_is_refused_is_what_peft_does_not_find_in_its_own_file(tmp_path: Path) -> None:
    pytest.importorskip("transformers", "5")
    names = [site.name for site in li.plan(build("laguna"), {"targets": ["all-linear"]}).sites]
    config = peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)
    theirs = peft.get_peft_model(build("laguna"), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".lora_" in name:
                parameter.add_(1.0)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        read = peft.PeftModel.from_pretrained(build("laguna"), str(tmp_path / "theirs"))
    pairs = zip(theirs.named_parameters(), read.named_parameters(), strict=True)
    moved = {n.partition(".lora_")[0] for (n, a), (_, b) in pairs if not torch.equal(a, b)}
    lost = [name for name in names if f"base_model.model.{name}" in moved]
    assert 0 < len(lost) == len(moved) < len(names)
    for name in names:
        model = li.inject(build("laguna"), {"rank": 2, "targets": [f"^{re.escape(name)}"]})
        refusal = refused(li.FormatError, f"'{name}'")
        with refusal if name in lost else contextlib.nullcontext():
            li.save_adapter(model, tmp_path / name, unused=[".*"])
