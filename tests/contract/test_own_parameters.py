"""A parameter that trains is read as it was trained by every method, not by `forward` alone."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import error, fill
from helpers.reference import EXACT, config, with_deltas
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_inject as li

D, V = 6, 11
X = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, D)


def trained(plain: nn.Module, name: str) -> tuple[Any, Any]:
    """A model whose adapter has moved a parameter, and the plain one with its values."""
    model = li.inject(copy.deepcopy(plain), {"rank": 2, "targets": [], "train": [name]})
    wanted: Any = copy.deepcopy(plain)
    (moved,) = li.adapter_parameters(model).values()
    with torch.no_grad():
        moved.add_(torch.randn_like(moved))
        wanted.get_parameter(name).copy_(moved)
    return model, wanted


@pytest.mark.filterwarnings("ignore")  # transformers' of configs as small as these
def test_a_method_of_transformers_reads_what_was_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo import build as building
    from zoo.inputs import dummy_inputs
    from zoo.steps import tensors_in

    monkeypatch.setitem(building.CLASSES, "llava_next", "LlavaNextModel")
    plain: Any = building.build("llava_next")
    (inputs,) = dummy_inputs(plain, "llava_next")
    images = {name: inputs[name] for name in ("pixel_values", "image_sizes")}

    def run(model: Any) -> Tensor:
        output = model.get_image_features(**images)
        return torch.cat([t.double().flatten() for t in tensors_in(output)])

    model, wanted = trained(plain, "image_newline")
    with torch.no_grad():
        assert error(run(plain), run(model)) > 1e-3
        assert error(run(model), run(wanted)) < 1e-5  # float32


class Policy(nn.Module):
    """A soft prompt, and methods that users call in place of the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.randn(2, D))
        self.head = nn.Linear(D, V)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.prompt, x]).tanh())

    def log_prob(self, x: Tensor, action: int) -> Tensor:
        return F.log_softmax(F.linear(x + self.prompt[0], self.head.weight), -1)[..., action]

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        return self.head((x + self.prompt.mean(0)).tanh())

    def in_a_thread(self, x: Tensor) -> Tensor:
        results: list[Tensor] = []
        worker = threading.Thread(target=lambda: results.append(self.predict(x)))
        worker.start()
        worker.join()
        return results[0]


class Called(Policy):
    """A class that is called in its own way, past nn.Module's, and reads in a thread."""

    def __call__(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.in_a_thread(x) + F.linear(x + self.prompt[1], self.head.weight)


WAYS: dict[str, tuple[type[Policy], Callable[[Any], Tensor]]] = {
    "a soft prompt": (Policy, lambda m: m.head(torch.cat([m.prompt, X]))),
    "log_prob": (Policy, lambda m: m.log_prob(X, 3)),
    "predict": (Policy, lambda m: m.predict(X)),
    "a thread": (Policy, lambda m: m.in_a_thread(X)),
    "its own __call__": (Called, lambda m: m(X)),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_method_of_any_name_reads_what_was_trained(way: str) -> None:
    cls, run = WAYS[way]
    plain = cls().double()
    model, wanted = trained(plain, "prompt")
    assert error(run(model), run(wanted)) < EXACT
    assert error(run(plain), run(wanted)) > 1e-3


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_called_from_a_users_function_has_the_right_gradients(reentrant: bool) -> None:
    """Its forward computed W and its backward W + delta: gradients were off by 26."""
    plain = Policy().double()
    model = fill(li.inject(copy.deepcopy(plain), config("head", train=["prompt"])))
    x = X.clone().requires_grad_()
    leaves = [x, *li.adapter_parameters(model).values()]

    def run(x: Tensor, of: Any = model) -> Tensor:
        return F.linear((x + of.prompt[0]).tanh(), of.head.weight).exp()

    y, wanted = checkpoint(run, x, use_reentrant=reentrant), run(x)
    due = torch.autograd.grad(wanted.square().sum(), leaves)
    y.square().sum().backward()
    assert len(leaves) == 4
    assert all(error(leaf.grad, wanted) < EXACT for leaf, wanted in zip(leaves, due, strict=True))
    wide: Any = with_deltas(plain, model)
    with torch.no_grad():
        wide.prompt.copy_(li.adapter_state(model).trained["prompt"])
        assert error(y, run(X, wide)) < EXACT
