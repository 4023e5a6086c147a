"""Weights that are computed (weight_norm, spectral_norm): what they are computed of is adapted."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import error, fill
from helpers.reference import EXACT, SCALE, config, random, refused
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import lora_inject as li


def _weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


COMPUTED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "weight_norm": (parametrizations.weight_norm, "parametrizations.weight.original1"),
    "spectral_norm": (parametrizations.spectral_norm, "parametrizations.weight.original"),
    "orthogonal": (parametrizations.orthogonal, "parametrizations.weight.original"),
    "old weight_norm": (_weight_norm, "weight_v"),
}


@pytest.mark.parametrize("how", COMPUTED)
def test_a_linear_layer(how: str) -> None:
    compute, parameter = COMPUTED[how]

    def make() -> Any:
        torch.manual_seed(3)
        return nn.Sequential(compute(nn.Linear(6, 6).double())).eval()

    for target in ("0", r"0\.weight"):
        with pytest.raises((li.LayerError, li.MatchError)) as raised:
            li.plan(make(), config(target))
        assert target != "0" or parameter in str(raised.value)
    plain, model, x = make(), make(), random(3, 6)
    cls = type(model[0])
    fill(li.inject(model, config(parameter)))
    site = li.adapter_state(model).sites[f"0.{parameter}"]
    with torch.no_grad():
        plain.get_parameter(f"0.{parameter}").add_(SCALE * site.B @ site.A)
    assert error(model(x), plain(x)) < EXACT
    li.merge(model, eject=True)
    assert error(model(x), plain(x)) < EXACT
    assert type(model[0]) is cls


@pytest.mark.parametrize("name", ["0", "1"])
def test_a_module_some_of_whose_weights_are_computed_is_not_adapted_in_part(name: str) -> None:
    model = nn.Sequential(nn.LSTM(4, 4), nn.MultiheadAttention(4, 2))
    parametrizations.spectral_norm(model[0], "weight_hh_l0")
    parametrizations.spectral_norm(model[1], "in_proj_weight")
    words = rf"'{name}'.*computed by a parametrization.*original"
    refused(model, lambda: li.inject(model, config(name)), li.LayerError, words)


class Doubled(nn.Module):
    def forward(self, W: torch.Tensor) -> torch.Tensor:
        return 2 * W


def test_a_bias_that_is_parametrized_after_inject_is_used() -> None:
    model = fill(li.inject(nn.Sequential(nn.Linear(6, 6).double()), config("0")))
    parametrize.register_parametrization(model[0], "bias", Doubled())
    plain, x = li.eject(copy.deepcopy(model)), random(3, 6)
    site = li.adapter_state(model).sites["0"]
    with torch.no_grad():
        plain[0].weight.add_(SCALE * site.B @ site.A)
    assert error(model(x), plain(x)) < EXACT
    li.eject(model)
    assert parametrize.is_parametrized(model[0], "bias")


def test_a_trained_bias_that_is_taken_away_is_an_error() -> None:
    model = li.inject(nn.Sequential(nn.Linear(6, 6)), config("0") | {"bias": "adapted"})
    with pytest.raises(li.LayerError, match=r"replacing parameter 'bias'.*Eject the adapter first"):
        model[0].bias = None
    model(torch.ones(1, 6))


def test_a_layer_that_was_given_another_class_is_an_error_and_can_be_ejected() -> None:
    class Other(nn.Linear):
        """Knows of no adapter."""

    model = li.inject(nn.Sequential(nn.Linear(6, 6)), config("0"))
    model[0].__class__ = Other
    for verb in (li.merge, li.adapter_state, lambda m: li.inject(m, config("0"), "second")):
        refused(model, lambda v=verb: v(model), li.LayerError, "later given the class Other")
    li.eject(model)
    assert (type(model[0]), list(model.state_dict())) == (Other, ["0.weight", "0.bias"])
