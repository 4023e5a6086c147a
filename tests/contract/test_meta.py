"""Models that are built on the meta device, and get memory and values later."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fill, same_bits
from helpers.models import IDS, Net
from helpers.refusals import refused
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

import lora_inject as li

LORA: dict[str, Any] = {"rank": 2, "alpha": 3, "targets": ["fc", r"head\.weight", "embed"]}
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "dora": LORA | {"targets": ["fc", "head"], "variant": "dora"},
    "copies": {"rank": 2, "targets": ["fc"], "train": ["norm", "head"]},
    "rows": {"rank": 2, "targets": ["fc"], "tokens": {"embed": [1, 3]}},
}


def on_meta(config: dict[str, Any] = LORA) -> Net:
    with torch.device("meta"):
        return li.inject(Net(), config)


def emptied(model: nn.Module) -> nn.Module:
    """With memory that holds what no forward may use."""
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
    return model


def reset(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


WAYS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "emptied, then loaded": lambda m, base: emptied(m).load_state_dict(base),
    "emptied, reset, then loaded": lambda m, base: reset(emptied(m)).load_state_dict(base),
    "assigned": lambda m, base: m.load_state_dict(base, assign=True),
    "emptied, then loaded as a distributed checkpoint": lambda m, base: set_model_state_dict(
        emptied(m), base, options=StateDictOptions(strict=False)
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("config", CONFIGS)
def test_it_starts_as_the_plain_model_whose_values_it_gets(config: str, way: str) -> None:
    torch.manual_seed(1)
    plain = Net()
    model = on_meta(CONFIGS[config])
    WAYS[way](model, plain.state_dict())
    assert same_bits(model(IDS), plain(IDS))
    torch.manual_seed(1)
    at_once = li.adapter_parameters(li.inject(copy.deepcopy(plain), CONFIGS[config]))
    for key, parameter in li.adapter_parameters(model).items():
        due = at_once[key].detach()
        assert parameter.requires_grad
        assert parameter.shape == due.shape
        if due.std() == 0 or not key.endswith(("lora_A", "lora_B")):  # what is not random
            torch.testing.assert_close(parameter, at_once[key])
        else:
            assert 0.1 < parameter.std() / due.std() < 10, key  # of a few numbers
    model(IDS).square().sum().backward()
    assert all(p.grad is not None for p in li.adapter_parameters(model).values())


def routed(model: nn.Module) -> Any:
    with li.routed(model, ["default"] * 2):
        return model(IDS)


USES: dict[str, Callable[[Any], Any]] = {
    "forward": lambda m: m(IDS),
    "routed": routed,
    "compiled": lambda m: torch.compile(m, backend="eager")(IDS),
    "a copy": lambda m: copy.deepcopy(m)(IDS),
    "a pickle": lambda m: pickle.loads(pickle.dumps(m))(IDS),
    "merge": li.merge,
    "adapter_state": li.adapter_state,
    "save": lambda m: li.save_adapter(m, "never"),
}


def used(config: dict[str, Any]) -> nn.Module:
    model = li.inject(Net(), config)
    model(IDS)
    return model


EMPTIED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "made on meta": on_meta,
    "sent to meta": lambda config: li.inject(Net(), config).to("meta"),
    "emptied in place": used,
}


@pytest.mark.parametrize("how", EMPTIED)
@pytest.mark.parametrize("use", USES)
def test_what_nothing_has_started_is_not_used(use: str, how: str) -> None:
    config = LORA | {"targets": ["fc"]} if use == "routed" else LORA
    model = emptied(EMPTIED[how](config))
    with pytest.raises((li.LayerError, RuntimeError), match="load_state_dict"):
        USES[use](model)  # torch.compile tells of it in an error of its own
    with li.disabled(model):
        model(IDS)
    model.load_state_dict(Net().state_dict())
    assert torch.isfinite(model(IDS)).all()


@pytest.mark.parametrize("target", ["fc", r"fc\.weight"])
def test_a_whole_state_dict_and_swap_adapter_give_values(target: str) -> None:
    config = LORA | {"targets": [target]}
    source = fill(li.inject(Net(), config))
    wanted, state, whole = source(IDS), li.adapter_state(source), source.state_dict()
    base = li.eject(copy.deepcopy(source)).state_dict()
    model = emptied(on_meta(config))
    model.load_state_dict(whole)
    assert same_bits(model(IDS), wanted)
    model = on_meta(config)
    model.load_state_dict(whole, assign=True)
    assert same_bits(model(IDS), wanted)
    model, other = emptied(on_meta(config)), emptied(on_meta(config))
    model.load_state_dict(base)
    for key, parameter in other.named_parameters():  # value by value, as some loaders write
        if key in base:
            parameter.data.copy_(base[key])
    for each in (model, other):
        li.swap_adapter(each, state)
        assert same_bits(each(IDS), wanted)


def test_an_adapter_that_is_loaded_onto_meta_has_no_values_either(tmp_path: Path) -> None:
    source = fill(li.inject(Net(), LORA))
    path = li.save_adapter(source, tmp_path / "a")
    with torch.device("meta"):
        model = Net()
    model = emptied(li.load_adapter(model, path, base="any"))
    with refused(li.LayerError, "'embed'", "load_state_dict"):
        model(IDS)
    li.eject(model).load_state_dict(li.eject(copy.deepcopy(source)).state_dict())
    assert same_bits(li.load_adapter(model, path)(IDS), source(IDS))
