"""The nine promises of this package, one after the other, on one model of ten lines.

Each test is written out in full and uses no helper, so that it reads as a specification. The dense
reference is always `W + scale * B @ A`, computed here in float64.
"""

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_inject as li

IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
CONFIG = {"rank": 2, "alpha": 4, "targets": ["embed", "fc", "conv", "query"]}


class Model(nn.Module):
    """An embedding, a layer that is called, one whose weight is read, and a raw parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(8, 4), nn.Linear(4, 4)
        self.conv, self.query = nn.Conv1d(4, 4, 3, padding=1), nn.Parameter(torch.randn(4, 4))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.fc(self.embed(ids)) @ self.query
        return self.conv(x.mT).mT


def trained(seed: int = 0, config: Any = CONFIG) -> Model:
    """The model with one adapter, whose tensors are as training might leave them."""
    torch.manual_seed(seed)
    model = li.inject(Model().double(), config)
    for parameter in li.adapter_parameters(model).values():
        nn.init.normal_(parameter)
    return model


# ---------------------------------------------------------------------------------- 1: one truth


def test_an_adapted_layer_computes_what_the_dense_weight_would() -> None:
    model = trained()
    raw = {name: parameter.detach() for name, parameter in model.named_parameters()}
    scale = 4 / 2

    def delta(site: str) -> Tensor:
        return scale * raw[f"{site}lora_B__default"] @ raw[f"{site}lora_A__default"]

    x = F.embedding(IDS, raw["embed.weight"] + delta("embed.").T)
    x = F.linear(x, raw["fc.weight"] + delta("fc."), raw["fc.bias"])
    x = x @ (raw["query"] + delta("query__"))
    kernel = delta("conv.weight__").view(4, 4, 3)
    y = F.conv1d(x.mT, raw["conv.weight"] + kernel, raw["conv.bias"], padding=1).mT
    torch.testing.assert_close(model(IDS), y, rtol=0, atol=1e-12)


def test_whoever_reads_a_weight_gets_the_sum() -> None:
    model = trained()
    site = li.adapter_state(model).sites["fc"]
    dense = model.fc._parameters["weight"] + site.scale * site.B @ site.A
    torch.testing.assert_close(model.fc.weight * 1, dense, rtol=0, atol=1e-12)
    assert model.fc._parameters["weight"] is dict(model.named_parameters())["fc.weight"]


def test_gradients_are_those_of_the_dense_weight() -> None:
    model = trained()
    model(IDS).square().sum().backward()
    parameter = model.fc._parameters["lora_B__default"]
    got = parameter.grad[1, 0].item()
    with torch.no_grad():
        losses = []
        for step in (1e-6, -1e-6):
            parameter[1, 0] += step
            losses.append(model(IDS).square().sum())
            parameter[1, 0] -= step
    torch.testing.assert_close(got, ((losses[0] - losses[1]) / 2e-6).item(), rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------- 2: zero start


def test_right_after_inject_outputs_are_the_plain_ones_bit_for_bit() -> None:
    model = Model()
    before = model(IDS)
    li.inject(model, CONFIG)
    assert torch.equal(model(IDS), before)


# ------------------------------------------------------------------------ 3: base names do not move


def test_the_base_keeps_its_names_its_objects_and_its_classes() -> None:
    model = Model()
    before = dict(model.named_parameters())
    plain = {key: value.clone() for key, value in model.state_dict().items()}
    li.inject(model, CONFIG)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert [key for key in model.state_dict() if "lora" not in key] == list(plain)
    assert isinstance(model.fc, nn.Linear)
    model.load_state_dict(plain)  # strictly


# ----------------------------------------------------------------------------- 4: all or nothing


@pytest.mark.parametrize(
    "config",
    [
        {"rank": 2, "targets": ["fc", "no_such_layer"]},
        {"rank": 2, "targets": ["fc"], "expect": {"sites": 5}},
        {"rank": 0, "targets": ["fc"]},
    ],
)
def test_a_call_that_raises_leaves_the_model_as_it_was(config: Any) -> None:
    model = trained()
    before = model(IDS)
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    with pytest.raises(li.LoraInjectError):
        li.inject(model, config, "second")
    assert torch.equal(model(IDS), before)
    assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == classes
    assert list(li.adapters(model)) == ["default"]


# ---------------------------------------------------------------------------------- 5: exact undo


def test_eject_gives_back_the_same_model() -> None:
    model = Model()
    model.fc.weight.requires_grad_(False)
    parameters = list(model.parameters())
    keys = list(model.state_dict())
    classes = [type(module) for module in model.modules()]
    flags = [parameter.requires_grad for parameter in parameters]
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    li.eject(li.inject(model, CONFIG))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == classes
    assert [parameter.requires_grad for parameter in parameters] == flags
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes


def test_unmerge_restores_the_weights_bit_for_bit_in_16_bits() -> None:
    model = trained().to(torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        li.merge(model)
        assert not torch.equal(dict(model.named_parameters())["fc.weight"], before["fc.weight"])
        li.unmerge(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# ---------------------------------------------------------------------------------- 6: no silence


def test_what_would_make_an_adapter_inert_is_an_error() -> None:
    with pytest.raises(li.MatchError, match="fcc"):
        li.inject(Model(), {"rank": 2, "targets": ["fcc"]})
    model = trained()
    with pytest.raises(li.LayerError):
        model.fc.weight.data.clamp_(0)  # would be lost in a temporary
    with pytest.raises(li.StateError, match="default"):
        li.activate(model, "defualt")


def test_an_adapter_of_another_base_is_refused(tmp_path: Any) -> None:
    li.save_adapter(trained(0), tmp_path / "a.safetensors", format="native")
    other = Model().double()
    with pytest.raises(li.FormatError, match="base="):
        li.load_adapter(other, tmp_path / "a.safetensors")


def test_two_threads_do_not_see_each_others_rows() -> None:
    model = trained()
    alone = model(IDS)
    inside, looked = threading.Event(), threading.Event()

    def request() -> None:
        with li.disabled(model):
            inside.set()
            looked.wait()

    thread = threading.Thread(target=request)
    thread.start()
    inside.wait()
    assert torch.equal(model(IDS), alone)
    looked.set()
    thread.join()


# ------------------------------------------------------------------------- 7: structure, not names


def test_a_tie_is_known_from_the_tensor_and_not_from_a_name() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"words": nn.Embedding(8, 4), "anything": nn.Linear(4, 8, bias=False)})
    model.double()
    model["anything"].weight = model["words"].weight
    li.inject(model, {"rank": 2, "targets": ["anything"]})
    nn.init.normal_(li.adapter_parameters(model)["anything.lora_B"])
    x = torch.randn(3, 4).double()
    head, table = model["anything"](x), model["words"](torch.arange(8))
    li.merge(model)  # cuts the tie: the embedding has no update
    torch.testing.assert_close(model["anything"](x), head, rtol=0, atol=1e-12)
    assert torch.equal(model["words"](torch.arange(8)), table)


# --------------------------------------------------------------------------------- 8: round once


def test_merging_rounds_once() -> None:
    model = trained().to(torch.bfloat16)
    site = li.adapter_state(model).sites["fc"]
    weight = model.fc._parameters["weight"].detach().clone()
    exact = weight.float() + site.scale * site.B.float() @ site.A.float()
    li.merge(model)
    assert torch.equal(dict(model.named_parameters())["fc.weight"], exact.to(torch.bfloat16))


# -------------------------------------------------------------------------------- 9: any device


def test_the_arithmetic_is_the_same_operations_whatever_the_values() -> None:
    """On meta tensors there are no values to look at, and shapes come out right."""
    model = trained().to("meta")
    y = model(IDS.to("meta"))
    y.sum().backward()
    assert y.shape == (2, 3, 4)
    assert model.fc._parameters["lora_A__default"].grad.shape == (2, 4)


# --------------------------------------------------------------------- and the life of an adapter


def test_saved_loaded_switched_and_mixed_it_stays_the_same(tmp_path: Any) -> None:
    model = trained()
    alone = model(IDS)
    li.save_adapter(model, tmp_path / "a.safetensors", format="native")
    li.eject(model)
    base = model(IDS)
    li.load_adapter(model, tmp_path / "a.safetensors", "again")
    torch.testing.assert_close(model(IDS), alone, rtol=0, atol=1e-12)
    with li.disabled(model):
        assert torch.equal(model(IDS), base)
    li.activate(model, None)
    assert torch.equal(model(IDS), base)
    li.activate(model, {"again": 1.0})
    torch.testing.assert_close(model(IDS), alone, rtol=0, atol=1e-12)
