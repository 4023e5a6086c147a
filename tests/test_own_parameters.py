"""A parameter that trains is read as it was trained by every method, not by `forward` alone.

The methods that users call of models that everybody trains, and of classes of their own. The
reference is the plain model with the trained values in its parameter.
"""

import copy
import inspect
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import error, fill
from helpers.reference import with_deltas
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_inject as li

D, V = 6, 11
X = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, D)
EXACT = 1e-12  # float64
FLOAT32 = 1e-5


def trained(plain: nn.Module, *names: str) -> tuple[Any, Any]:
    """A model whose adapter has moved some parameters, and the plain one with their values."""
    model = li.inject(copy.deepcopy(plain), {"rank": 2, "targets": [], "train": [*names]})
    wanted: Any = copy.deepcopy(plain)
    moved = li.adapter_parameters(model)
    assert len(moved) == len(names)
    with torch.no_grad():
        for parameter in moved.values():
            parameter.add_(torch.randn_like(parameter))
        for name in names:
            wanted.get_parameter(name).copy_(li.adapter_state(model).trained[name])
    return model, wanted


# --------------------------------------------------------------------------------- transformers


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Builds a tiny model of a class, and inputs for it."""
    pytest.importorskip("transformers")
    from zoo import build as building
    from zoo.inputs import dummy_inputs

    def make(model_type: str, cls: str) -> tuple[Any, dict[str, Any]]:
        monkeypatch.setitem(building.CLASSES, model_type, cls)
        model = building.build(model_type)
        (inputs,) = dummy_inputs(model, model_type)
        return model, inputs

    return make


def steps(model: Any, inputs: dict[str, Any]) -> Tensor:
    """The logits of two generated tokens, after a picture."""
    picture, n_images = 7, len(inputs["pixel_values"])
    model.config.image_token_id = picture
    ids = torch.tensor([[picture] * model.query_tokens.shape[1] + [1, 2]] * n_images)
    given = {"pixel_values": inputs["pixel_values"], "input_ids": ids}
    if "qformer_input_ids" in inspect.signature(model.generate).parameters:
        given["qformer_input_ids"] = ids[:, -2:]
    options: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "output_scores": True}
    options |= {"return_dict_in_generate": True, "eos_token_id": None, "pad_token_id": 0}
    return torch.stack(model.generate(**given, **options).scores)


def features(method: str, *names: str) -> Callable[[Any, dict[str, Any]], Tensor]:
    def run(model: Any, inputs: dict[str, Any]) -> Tensor:
        given = {name: inputs[name] for name in names}
        return tensors_of(getattr(model, method)(**given))

    return run


def tensors_of(output: Any) -> Tensor:
    from zoo.steps import tensors_in

    return torch.cat([t.double().flatten() for t in tensors_in(output)])


IMAGES = ("pixel_values", "image_sizes")
METHODS: dict[str, tuple[str, str, str, Callable[[Any, dict[str, Any]], Tensor]]] = {
    "BLIP-2, generate": ("blip-2", "Blip2ForConditionalGeneration", "query_tokens", steps),
    "BLIP-2, image": (
        "blip-2",
        "Blip2ForConditionalGeneration",
        "query_tokens",
        features("get_image_features", "pixel_values"),
    ),
    "BLIP-2, Q-Former": (
        "blip-2",
        "Blip2Model",
        "query_tokens",
        features("get_qformer_features", "pixel_values"),
    ),
    "InstructBLIP, generate": (
        "instructblip",
        "InstructBlipForConditionalGeneration",
        "query_tokens",
        steps,
    ),
    "LLaVA-NeXT, image": (
        "llava_next",
        "LlavaNextModel",
        "image_newline",
        features("get_image_features", *IMAGES),
    ),
}


@pytest.mark.filterwarnings("ignore")  # transformers' of configs as small as these
@pytest.mark.parametrize("method", METHODS)
def test_a_method_of_transformers_reads_what_was_trained(method: str, zoo: Any) -> None:
    model_type, cls, parameter, run = METHODS[method]
    plain, inputs = zoo(model_type, cls)
    model, wanted = trained(plain, parameter)
    with torch.no_grad():
        found = run(model, inputs)
        assert error(run(plain, inputs), found) > 1e-3
        assert error(found, run(wanted, inputs)) < FLOAT32


class Vision(nn.Module):
    """The embedding of a ViT, and timm's and DINOv2's way to its inner layers."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, 4, D))
        self.blocks = nn.ModuleList(nn.Linear(D, D) for _ in range(3))

    def _tokens(self, x: Tensor) -> Tensor:
        return x[None] + self.pos_embed

    def forward(self, x: Tensor) -> Tensor:
        return self.get_intermediate_layers(x)[-1]

    def get_intermediate_layers(self, x: Tensor) -> tuple[Tensor, ...]:
        layers, x = [], self._tokens(x)
        for block in self.blocks:
            x = block(x).tanh()
            layers.append(x)
        return tuple(layers)


def test_inner_layers_of_a_vision_model_have_the_trained_positions() -> None:
    model, wanted = trained(Vision().double(), "pos_embed")
    for found, right in zip(
        model.get_intermediate_layers(X), wanted.get_intermediate_layers(X), strict=True
    ):
        assert error(found, right) < EXACT


# ------------------------------------------------------------------------- classes of the user's


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


class Threaded(Policy):
    """A forward that reads in a thread of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self.in_a_thread(x)


class Called(Policy):
    """A class that is called in its own way, past nn.Module's."""

    def __call__(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(x + self.prompt[1], self.head.weight)


WAYS: dict[str, tuple[type[Policy], Callable[[Any], Tensor]]] = {
    "a soft prompt": (Policy, lambda m: m.head(torch.cat([m.prompt, X]))),
    "log_prob": (Policy, lambda m: m.log_prob(X, 3)),
    "predict": (Policy, lambda m: m.predict(X)),
    "a thread": (Policy, lambda m: m.in_a_thread(X)),
    "a thread that a forward started": (Threaded, lambda m: m(X)),
    "its own __call__": (Called, lambda m: m(X)),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_method_of_any_name_reads_what_was_trained(way: str) -> None:
    cls, run = WAYS[way]
    torch.manual_seed(0)
    plain = cls().double()
    model, wanted = trained(plain, "prompt")
    assert error(run(model), run(wanted)) < EXACT
    assert error(run(plain), run(wanted)) > 1e-3
    model = fill(
        li.inject(copy.deepcopy(plain), {"rank": 2, "alpha": 3.0, "targets": ["prompt", "head"]})
    )
    wide = with_deltas(plain, model)
    assert error(run(model), run(wide)) < EXACT
    assert error(run(plain), run(wide)) > 1e-3


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_called_from_a_users_function_has_the_right_gradients(reentrant: bool) -> None:
    """Its forward computed W and its backward W + delta: gradients were off by 26."""
    torch.manual_seed(0)
    plain = Policy().double()
    config = {"rank": 2, "alpha": 3.0, "targets": ["head"], "train": ["prompt"]}
    model = fill(li.inject(copy.deepcopy(plain), config))
    x = X.clone().requires_grad_()

    def loss(by: Callable[..., Tensor]) -> list[Tensor]:
        y = by(lambda x: F.linear((x + model.prompt[0]).tanh(), model.head.weight).exp(), x)
        leaves = [x, *li.adapter_parameters(model).values()]
        model.zero_grad()
        x.grad = None
        y.square().sum().backward()
        return [y.detach(), *(p.grad.clone() for p in leaves if p.grad is not None)]

    wanted = loss(lambda run, x: run(x))
    found = loss(lambda run, x: checkpoint(run, x, use_reentrant=reentrant))
    assert len(found) == len(wanted) == 5
    assert all(error(a, b) < EXACT for a, b in zip(found, wanted, strict=True))
    wide: Any = with_deltas(plain, model)
    with torch.no_grad():
        wide.prompt.copy_(li.adapter_state(model).trained["prompt"])
        dense = F.linear((X + wide.prompt[0]).tanh(), wide.head.weight).exp()
    assert error(found[0], dense) < EXACT
