"""What reading and attacks have found wrong on a live model, each against a plain reference."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import error, fill
from helpers.models import Tied
from helpers.reference import config, dense, llama, logits, random
from helpers.refusals import refused
from torch import Tensor, nn

import lora_inject as li

EXACT = 1e-12
LINEAR = {"rank": 2, "alpha": 3.0, "targets": ["0"]}


class ReadsTwice(nn.Module):
    """Multiplies with its matrix once as it is and once after something else was switched on."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(random(6, 5))
        self.between: Callable[[], Any] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        first = x @ self.matrix.t()
        self.between()
        return torch.cat([first, x @ self.matrix.t()])


@pytest.mark.parametrize("with_gradients", [False, True])
def test_a_second_read_in_one_forward_sees_who_takes_part_by_then(with_gradients: bool) -> None:
    model, x = ReadsTwice(), random(3, 5)
    config = {"rank": 2, "alpha": 3.0, "targets": ["matrix"]}
    for name in ("teacher", "student"):
        fill(li.inject(model, config, name), name)
    state = {name: li.adapter_state(model, name).sites["matrix"] for name in ("teacher", "student")}
    wanted = [x @ (model.get_parameter("matrix") + 1.5 * s.B @ s.A).t() for s in state.values()]
    li.activate(model, "teacher")
    model.between = lambda: li.activate(model, "student")
    with torch.set_grad_enabled(with_gradients):
        assert error(model(x), torch.cat(wanted)) < EXACT


def test_an_adapter_that_is_injected_between_two_reads_is_in_the_second() -> None:
    model, x = ReadsTwice(), random(3, 5)
    config = {"rank": 2, "alpha": 3.0, "targets": ["matrix"]}
    fill(li.inject(model, config, "first"), "first")
    first = x @ (model.get_parameter("matrix") + _delta(model, "first", "matrix")).t()
    model.between = lambda: fill(li.inject(model, config, "second"), "second")
    got = model(x)
    second = x @ (model.get_parameter("matrix") + _delta(model, "second", "matrix")).t()
    assert error(got, torch.cat([first, second])) < EXACT


def _delta(model: nn.Module, name: str, site: str) -> Tensor:
    held = li.adapter_state(model, name).sites[site]
    return held.scale * held.B @ held.A


@pytest.mark.parametrize("tokens", [1, 33])
def test_the_low_rank_of_a_16_bit_base_is_in_16_bits_for_any_number_of_tokens(tokens: int) -> None:
    # In float32 256 (1 + 2^-10) - 256 is 1/4, and in bfloat16 it is 0: exactly, in any order.
    model = nn.Sequential(nn.Linear(2, 1, bias=False, dtype=torch.bfloat16))
    nn.init.zeros_(model[0].weight)
    li.inject(model, {"rank": 1, "alpha": 1.0, "compute": "base", "targets": ["0"]})
    factors = li.adapter_parameters(model)
    with torch.no_grad():
        factors["0.lora_A"].copy_(torch.tensor([[1 + 2**-10, -1.0]]))
        factors["0.lora_B"].fill_(1.0)
    x = torch.full((tokens, 2), 256.0, dtype=torch.bfloat16)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            assert torch.equal(model(x), torch.zeros(tokens, 1, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [{}, {"dropout": 0.5}, {"slices": ["q", "k"], "adapt": ["q"]}])
def test_a_backward_inside_autocast_gives_the_gradients_of_one_outside(
    dtype: torch.dtype, rule: dict[str, Any]
) -> None:
    model = nn.Sequential(nn.Linear(4, 6)).to(dtype)
    config = {"rank": 2, "compute": "float32", "targets": [{"match": "0", **rule}]}
    parameters = li.adapter_parameters(fill(li.inject(model, config)))
    x = torch.randn(5, 4, dtype=dtype, requires_grad=True)
    gradients = []
    for inside in (True, False):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).float().square().sum()
            if inside:
                gradients.append(torch.autograd.grad(loss, [x, *parameters.values()]))
        if not inside:
            gradients.append(torch.autograd.grad(loss, [x, *parameters.values()]))
    for got, wanted in zip(*gradients, strict=True):
        assert torch.equal(got, wanted)


def test_a_weight_of_numpy_is_a_number_as_any_other() -> None:
    model = fill(li.inject(nn.Sequential(nn.Linear(4, 6)).double(), LINEAR))
    x, before = random(3, 4), copy.deepcopy(model[0])
    li.activate(model, {"default": np.float32(0.5)})
    wanted = F.linear(x, _raw(before) + 0.5 * _delta(model, "default", "0"), before.bias)
    assert error(model(x), wanted) < EXACT
    for none in (np.float64("nan"), -float("inf"), 1e300):  # a forward in float32 overflows
        with refused(li.StateError, "default", model=model):
            li.activate(model, {"default": none})


def _raw(layer: nn.Module) -> Tensor:
    return dict(layer.named_parameters())["weight"].detach()


def test_every_name_of_named_parameters_is_one_of_get_parameter() -> None:
    model = li.inject(nn.Sequential(nn.Linear(4, 6), nn.LSTM(6, 3)), {**LINEAR, "targets": ["0"]})
    for name, parameter in model.named_parameters():
        assert model.get_parameter(name) is parameter, name


def test_the_best_values_so_far_are_not_lost_by_swapping_them_in_from_the_model() -> None:
    model = fill(li.inject(nn.Sequential(nn.Linear(4, 6)), LINEAR))
    best = li.adapter_state(model)
    with refused(li.LoraInjectError, "default", "copy", model=model):
        li.swap_adapter(model, best)
    kept = copy.deepcopy(best)
    wanted = {key: t.detach().clone() for key, t in li.adapter_parameters(model).items()}
    for tensor in li.adapter_parameters(model).values():
        nn.init.zeros_(tensor)
    li.swap_adapter(model, kept)
    for key, tensor in li.adapter_parameters(model).items():
        assert torch.equal(tensor, wanted[key]), key


def _two_layers() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    return fill(li.inject(model, {**LINEAR, "targets": ["0", "1"]}))


@pytest.mark.parametrize("at_once", [True, False])
def test_no_plain_model_is_left_whose_own_class_would_tie_again_what_merge_has_untied(
    at_once: bool,
) -> None:
    model = fill(li.inject(Tied().double(), {"rank": 2, "targets": ["head"]}))
    if not at_once:
        li.merge(model)
    with refused(li.LoraInjectError, "head.weight", "embed.weight", model=model):
        li.merge(model, eject=True) if at_once else li.eject(model)


def _enter_and_leave(model: nn.Module) -> None:
    with li.disabled(model):
        pass


@pytest.mark.parametrize(
    "verb",
    [
        lambda model: li.adapter_state(model),
        lambda model: li.merge(model),
        lambda model: li.activate(model, "default"),
        _enter_and_leave,
    ],
)
def test_every_verb_tells_that_a_layer_was_replaced_after_inject(
    verb: Callable[[nn.Module], Any],
) -> None:
    model = _two_layers()
    model[1] = nn.Linear(4, 4).double()
    with refused(li.StateError, "1", model=model):
        verb(model)


def test_an_adapter_is_not_counted_twice_by_the_method_of_transformers(tmp_path: Path) -> None:
    model = llama()
    path = li.save_adapter(
        fill(li.inject(copy.deepcopy(model), config("q_proj"))), tmp_path / "a", unused=[".*"]
    )
    li.load_adapter(model, path)
    wanted = logits(dense(llama(), model))
    for method in (model.load_adapter, model.model.load_adapter):
        with refused(li.StateError, "lora_inject.load_adapter", model=model):
            method(str(path))
    for method in (model.disable_adapters, model.enable_adapters, model.set_adapter):
        with refused(li.StateError, "lora_inject.", model=model):
            method("default")
    assert error(logits(model), wanted) < 1e-6
    li.eject(model).load_adapter(str(path))  # as before
    assert error(logits(model), wanted) < 1e-6
