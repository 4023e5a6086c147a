"""Adapters that PEFT would load without a word and compute something else with: refused."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import fill, same_bits
from torch import Tensor, nn
from zoo.build import build

import lora_inject as li

CONFIG = {"rank": 2, "alpha": 3}


class Reads(nn.Module):
    """Computes with a weight of a child, which nobody calls."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child

    def forward(self, x: Tensor) -> Tensor:
        kernel: Any = self.child.weight
        return F.linear(x, kernel) if kernel.dim() == 2 else F.conv1d(x[..., None], kernel)


class Asks(nn.Module):
    """Calls a child after a look at the dtype of its weight."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child

    def forward(self, x: Tensor) -> Tensor:
        return self.child(x.to(self.child.weight.dtype))


class Standardized(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.weight - self.weight.mean(), self.bias)


class Tripled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return 3 * super().forward(ids)


class Scaled(nn.Embedding):
    """A gain under the name by which PEFT knows it."""

    def __init__(self) -> None:
        super().__init__(5, 4)
        self.register_buffer("embed_scale", torch.tensor(3.0), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


X, IDS = torch.randn(3, 4), torch.tensor([[0, 4]])
MISREAD: dict[str, tuple[Callable[[], nn.Module], str, Tensor, str]] = {
    "a layer": (lambda: Reads(nn.Linear(4, 4)), "child", X, "another module reads the weight"),
    "a kernel": (lambda: Reads(nn.Conv1d(4, 4, 1)), "child", X, "another module reads the weight"),
    "a convolution": (lambda: nn.Sequential(Standardized(4, 4, 1)), "0", X[..., None], "its own"),
    "a table": (lambda: nn.Sequential(Tripled(5, 4)), "0", IDS, "Tripled has a forward of its own"),
}


@pytest.mark.parametrize("case", MISREAD)
def test_what_peft_would_compute_otherwise_is_not_written_for_it(case: str, tmp_path: Path) -> None:
    make, site, x, words = MISREAD[case]
    model = fill(li.inject(make(), {**CONFIG, "targets": [site]}))
    due = model(x)
    for target in ("peft", "portable", "vllm", "diffusers"):
        options = {"component": "unet"} if target == "diffusers" else {}
        with pytest.raises(li.FormatError, match=rf"PEFT would load it wrong: .*{words}.*native"):
            li.save_adapter(model, tmp_path / target, format=target, **options)
    assert list(tmp_path.iterdir()) == []
    path = li.save_adapter(model, tmp_path / "a.safetensors", format="native")
    assert same_bits(li.load_adapter(li.eject(model), path)(x), due)


@pytest.mark.parametrize(
    ("make", "site", "x"),
    [
        (lambda: Asks(nn.Linear(4, 4)), "child", X),
        (lambda: Asks(nn.Conv1d(4, 4, 1)), "child", X[..., None]),
        (lambda: nn.Sequential(Scaled()), "0", IDS),
    ],
    ids=["asked for its dtype", "a kernel asked for its dtype", "a gain that PEFT knows"],
)
def test_what_peft_computes_the_same_is_written(make, site, x, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    plain = make()
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    model = fill(li.inject(plain, {**CONFIG, "targets": [site]}))
    due, path = model(x), li.save_adapter(model, tmp_path / "a")
    base = make()
    base.load_state_dict(before)
    opened = peft.PeftModel.from_pretrained(base, str(path))
    assert torch.allclose(opened(x), due, atol=1e-6)


def test_names_that_peft_would_rename_are_refused(tmp_path: Path) -> None:
    """transformers takes `mlp.shared_experts` for what its old checkpoints call `shared_expert`."""
    pytest.importorskip("transformers", "5")
    model = build("laguna")
    li.inject(model, {**CONFIG, "targets": [r"shared_experts\.up_proj"]})
    words = r"\(of its own, too\), and would look for it at .*shared_experts\.\.up_proj"
    with pytest.raises(li.FormatError, match=words):
        li.save_adapter(model, tmp_path / "a")
    li.inject(li.eject(model), {**CONFIG, "targets": ["q_proj"]})
    li.save_adapter(model, tmp_path / "a")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["laguna", "maskformer", "inkling2_text"])
def test_what_is_refused_is_what_peft_does_not_find_in_its_own_file(
    family: str, tmp_path: Path
) -> None:
    """What PEFT reads of an adapter of its own is written, and the rest refused."""
    peft = pytest.importorskip("peft")
    pytest.importorskip("transformers", "5")
    names = [site.name for site in li.plan(build(family), {"targets": ["all-linear"]}).sites]
    config = peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)
    theirs = peft.get_peft_model(build(family), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".lora_" in name:
                parameter.add_(1.0)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        read = peft.PeftModel.from_pretrained(build(family), str(tmp_path / "theirs"))
    pairs = zip(theirs.named_parameters(), read.named_parameters(), strict=True)
    moved = {n.partition(".lora_")[0] for (n, a), (_, b) in pairs if not torch.equal(a, b)}
    lost = [name for name in names if f"base_model.model.{name}" in moved]
    assert 0 < len(lost) == len(moved) < len(names)
    whole = {name: f"^{re.escape(name)}" for name in names}
    for name in (lost[0], lost[-1]):
        model = fill(li.inject(build(family), {**CONFIG, "targets": [whole[name]]}))
        with pytest.raises(li.FormatError, match="of its own, too"):
            li.save_adapter(model, tmp_path / "ours", unused=[".*"])
    kept = [whole[name] for name in names if name not in lost]
    model = fill(li.inject(build(family), {**CONFIG, "targets": kept}))
    li.save_adapter(model, tmp_path / "ours", unused=[".*"])
    again = peft.PeftModel.from_pretrained(build(family), str(tmp_path / "ours"))
    given = {n: p for n, p in again.named_parameters() if ".lora_" in n}
    for name, parameter in li.adapter_parameters(model).items():
        assert torch.equal(given[f"base_model.model.{name}.default.weight"], parameter)
