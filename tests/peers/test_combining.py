"""Combination of adapters: the methods of PEFT's `add_weighted_adapter`, with PEFT's results."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.states import effect
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import lora_inject as li

WEIGHTS = [0.7, -0.4]
NAMES = ("wte", "fc", "conv")
METHODS = ("cat", "linear", "svd", "ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd")
METHODS += ("dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd")
CASES = [*((method, "total") for method in METHODS), ("ties", "frequency")]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte, self.fc, self.conv = nn.Embedding(9, 6), nn.Linear(6, 8), nn.Conv2d(2, 4, 3)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[li.AdapterState]]:
    """PEFT's model with two adapters, and the same as our values."""
    torch.manual_seed(0)
    options = {"r": 3, "target_modules": list(NAMES), "init_lora_weights": False}
    model = get_peft_model(Net(), LoraConfig(lora_alpha=6, **options), "one")
    model.add_adapter("two", LoraConfig(lora_alpha=2, **options))
    folder: Path = tmp_path_factory.mktemp("peft")
    model.save_pretrained(folder)
    return model, [li.read_adapter(folder / name) for name in ("one", "two")]


def filled(state: li.AdapterState, value: float, *, update: bool) -> li.AdapterState:
    """The same adapter with each tensor, or each update as a whole, all one value."""
    sites = {}
    for name, site in state.sites.items():
        A, B = torch.full_like(site.A, value), torch.full_like(site.B, value)
        if update:
            A, B = torch.zeros_like(A), torch.zeros_like(B)
            A[0], B[:, 0] = 1.0, value / site.scale
        sites[name] = site.of(site.spec, {"A": A, "B": B})
    return li.AdapterState(sites)


def masks(states: list[li.AdapterState], *, update: bool) -> list[Tensor]:
    """What we keep of each tensor, or of each update, in the order in which PEFT asks."""
    how = {"method": "dare_linear_svd", "rank": 9} if update else {"method": "dare_linear"}
    kept = {}
    for k in (0, 1):
        ones = [filled(state, float(i == k), update=update) for i, state in enumerate(states)]
        for name, site in li.combine(ones, [1.0, 1.0], density=0.5, **how).sites.items():
            for t, tensor in enumerate([effect(site)] if update else [site.A, site.B]):
                kept[name, t, k] = tensor.abs() > 0.1
    tensors = range(1 if update else 2)
    return [kept[name, t, k] for name in NAMES for t in tensors for k in (0, 1)]


@pytest.mark.parametrize(("method", "signs"), CASES)
@pytest.mark.filterwarnings("ignore:.*target.*")
def test_every_method_gives_what_peft_gives(
    theirs: Any, method: str, signs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, states = theirs
    if method.startswith("dare"):
        asked = iter(masks(states, update=method.endswith("svd")))

        def drawn(like: Tensor) -> Tensor:
            """Our mask, which PEFT has turned for an embedding and folded for a convolution."""
            mask = next(asked)
            mask = mask if mask.shape == like.flatten(1).shape else mask.T
            return mask.reshape(like.shape).to(like.dtype)

        monkeypatch.setattr(torch, "bernoulli", drawn)
    how = {} if method in ("cat", "svd", "linear") else {"density": 0.5}
    if "new" in model.peft_config:
        model.delete_adapter("new")
    model.add_weighted_adapter(
        ["one", "two"], WEIGHTS, "new", method, **how, majority_sign_method=signs
    )
    combined = li.combine(states, WEIGHTS, method=method, **how, majority_sign=signs)
    for name in NAMES:
        layer, site = model.base_model.model.get_submodule(name), combined.sites[name]
        due = layer.get_delta_weight("new").detach().double()
        found = effect(site).T if name == "wte" else effect(site)
        assert (found.reshape(due.shape) - due).norm() <= 2e-6 * due.norm(), name
        assert site.spec.rank == (6 if method == "cat" else 3)
