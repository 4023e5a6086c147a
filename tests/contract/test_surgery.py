"""What verbs leave behind. Which adapters are active, train and are merged: the state machine."""

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOLERANCE, error, fill, same_bits, snapshot
from helpers.models import IDS, Net
from helpers.packages import loaded
from helpers.reference import gpt2_of_two_layers
from helpers.refusals import refused
from helpers.versions import TRANSFORMERS_5
from torch import Tensor, nn

import lora_inject as li
from contract.kinds import KINDS, SCALE, Host, injected

RANK2 = {"rank": 2, "alpha": 3}
FC = {**RANK2, "targets": ["fc"]}
LAYER = {**RANK2, "targets": ["layer"]}


def net(name: str = "default") -> Any:
    """A model with one adapter, whose tensors are as training might leave them."""
    return fill(li.inject(Net(), FC, name), name)


def test_eject_keeps_no_tensor_of_the_adapter_alive() -> None:
    model = injected(KINDS["linear"])
    tensor = weakref.ref(li.adapter_parameters(model)["layer.lora_A"])
    li.eject(model)
    gc.collect()
    assert tensor() is None


def test_hooks_stay_and_see_the_layer_with_its_adapter() -> None:
    """What a hook keeps is not written to later."""
    model, kept = Host(nn.Linear(5, 6)), []
    model.layer.register_forward_hook(lambda module, args, y: kept.append(y))
    model.layer.register_full_backward_hook(lambda module, inputs, _: kept.append(inputs[0]))
    fill(li.inject(model, LAYER))
    x = torch.randn(2, 5, requires_grad=True)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            y = model(x)
        assert same_bits(kept.pop(), y)
    y.square().sum().backward()
    assert torch.equal(kept.pop(), x.grad)


def test_the_class_of_an_adapted_layer_makes_plain_layers() -> None:
    assert type(type(injected(KINDS["linear"]).layer)(3, 4)) is nn.Linear


class ReadsTwice(nn.Module):
    """Reads its weight without and with gradients, and again with the adapter off."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            first = x @ self.w.exp()
        second = x @ self.w.exp()
        with li.disabled(self):
            return torch.stack([first, second, x @ self.w.exp()])


def test_a_value_that_was_formed_without_gradients_cuts_none_later() -> None:
    model = fill(li.inject(ReadsTwice(), {**RANK2, "targets": ["w"]}))
    x = torch.randn(3, 4)
    first, second, off = model(x)
    assert same_bits(first, second)
    assert same_bits(off, x @ model.get_parameter("w").exp())
    second.sum().backward()
    assert all(p.grad.any() for p in li.adapter_parameters(model).values())


@pytest.mark.skipif(not TRANSFORMERS_5, reason="transformers 4 ties by attributes: a TypeError")
def test_whoever_registers_a_read_weight_gets_the_raw_one_or_is_refused() -> None:
    model = fill(li.inject(gpt2_of_two_layers(), {**RANK2, "targets": [r"wte\.weight"]}))
    ids = torch.arange(10).view(2, 5)
    wanted, before = model(ids).logits, snapshot(model)
    model.tie_weights()
    assert snapshot(model) == before
    assert same_bits(model(ids).logits, wanted)
    raw = model.transformer.wte._parameters["weight"]
    assert model.get_parameter("transformer.wte.weight") is raw
    assert model.get_parameter("lm_head.weight") is raw
    with refused(li.LayerError, "'weight'"):
        model.transformer.wte.weight = nn.Parameter(torch.zeros(13, 8))
    assert snapshot(model) == before


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_copies_start_as_the_base_bit_for_bit(dtype: torch.dtype) -> None:
    model = Net().to(dtype)
    plain = copy.deepcopy(model)
    li.inject(model, {**FC, "train": ["head", "norm"], "bias": "all"})
    assert same_bits(model(IDS), plain(IDS))
    copies = {n: p for n, p in li.adapter_parameters(model).items() if "lora" not in n}
    assert set(copies) == {"norm.weight", "norm.bias", "head.weight", "head.bias", "fc.bias"}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.dtype for p in copies.values()} == {wide}
    assert li.adapters(model)["default"].n_parameters == 2 * 5 + 6 * 2 + 6 + 6 + 18 + 3 + 6


def test_pissa_starts_at_the_best_approximation_and_olora_at_qr() -> None:
    model = Host(nn.Linear(5, 6)).double()
    W = model.layer.weight.detach()
    U, S, Vh = torch.linalg.svd(W)
    Q, R = torch.linalg.qr(W)
    for init, due in (("pissa", (U[:, :2] * S[:2]) @ Vh[:2]), ("olora", SCALE * Q[:, :2] @ R[:2])):
        li.inject(model, {**LAYER, "init": init}, init)
        site = li.adapter_state(model, init).sites["layer"]
        assert error(SCALE * site.B @ site.A, due) < 1e-12


@pytest.mark.parametrize(
    ("init", "std"),
    [("kaiming", 3**-0.5 / 20), ("gaussian", 1 / 4), ({"normal": 0.02}, 0.02)],
    ids=str,
)
def test_inits_have_their_spread_and_follow_the_seed(init: Any, std: float) -> None:
    """kaiming_uniform_(a=sqrt(5)) over 400 inputs is uniform within 1/20."""
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model = li.inject(Host(nn.Linear(400, 40)), {**LAYER, "rank": 4, "init": init})
        drawn.append(li.adapter_parameters(model)["layer.lora_A"].detach())
    A, same, other = drawn
    assert same_bits(A, same)
    assert not same_bits(A, other)
    assert abs(float(A.std()) / std - 1) < 5 / (2 * A.numel()) ** 0.5
    assert abs(float(A.mean())) < 5 * std / A.numel() ** 0.5
    assert init != "kaiming" or 0.049 < float(A.abs().max()) <= 0.05


@pytest.mark.parametrize("target", ["fc", r"fc\.weight"])
def test_a_base_kept_in_float8_between_forwards(target: str) -> None:
    """As diffusers' layerwise casting does: each forward casts a layer, and casts it back."""
    model = li.inject(Net(), {**RANK2, "targets": [target]})
    before = [p.detach().clone() for p in li.adapter_parameters(model).values()]
    assert model.fc.to(torch.float8_e4m3fn).state_dict()["weight"].dtype == torch.float8_e4m3fn
    model.fc.to(torch.float32)
    assert all(map(same_bits, li.adapter_parameters(model).values(), before))


@pytest.mark.parametrize("verb", ["inject another", "train_only"])
def test_a_gradient_of_before_moves_nothing_that_a_verb_froze(verb: str) -> None:
    """An optimizer steps whatever has a gradient, whether or not it requires one."""
    model, kept = Net(), set()
    fill(li.inject(model, FC, "one"), "one")
    fill(li.inject(model, FC, "two"), "two")
    li.train_only(model, ["one", "two"])
    li.activate(model, {"one": 1.0, "two": 1.0})
    model(IDS).sum().backward()
    if verb == "train_only":
        li.train_only(model, "two")
        kept = {"fc.lora_A__two", "fc.lora_B__two"}
    else:
        li.inject(model, FC, "three")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == kept


def flags(model: nn.Module) -> dict[str, tuple[bool, int | None]]:
    """Whether each parameter requires a gradient, and which gradient it has."""
    named = model.named_parameters()
    return {n: (p.requires_grad, None if p.grad is None else id(p.grad)) for n, p in named}


def required(model: nn.Module) -> set[str]:
    return {name for name, (requires, _) in flags(model).items() if requires}


FROZEN: dict[str, Callable[[Any, Path], Any]] = {
    "load": lambda m, path: li.load_adapter(m, path, "frozen", base="any"),
    "install": lambda m, path: li.install(m, li.read_adapter(path), "frozen", base="any"),
    "reserve": lambda m, _: li.reserve(m, "frozen", rank=2),
}


@pytest.mark.parametrize("verb", FROZEN)
@pytest.mark.parametrize("first", [True, False])
def test_what_does_not_train_changes_no_flag_and_no_gradient_of_anybody(
    first: bool, verb: str, tmp_path: Path
) -> None:
    """Also of what the user trains by hand, before, and when it leaves again."""
    path = li.save_adapter(net(), tmp_path / "a")
    model = Net()
    if not first:
        li.inject(model, {**FC, "targets": ["fc", "embed"]})
    model.norm.weight.requires_grad_(True)
    model(IDS).sum().backward()
    before = flags(model)
    assert before["norm.weight"][1] is not None
    FROZEN[verb](model, path)
    assert before.items() <= flags(model).items()
    model.norm.weight.requires_grad_(False)
    li.eject(model, "frozen")
    assert flags(model) == before | {"norm.weight": (False, before["norm.weight"][1])}


def test_training_a_loaded_adapter_freezes_the_base_until_it_is_ejected(tmp_path: Path) -> None:
    path = li.save_adapter(net(), tmp_path / "a")
    model = Net()
    model(IDS).sum().backward()
    li.load_adapter(model, path, base="any")
    li.save_adapter(model, tmp_path / "again")  # it is not what trains
    li.train_only(model, "default")
    assert required(model) == {"fc.lora_A__default", "fc.lora_B__default"}
    assert all(grad is None for requires, grad in flags(model).values() if not requires)
    assert required(li.eject(model)) == required(Net())


def test_a_frozen_adapter_on_a_base_that_nobody_trains_leaves_nothing_to_train(
    tmp_path: Path,
) -> None:
    """Whoever takes it for trainable is told by torch, and does not train the base instead."""
    model = li.load_adapter(Net(), li.save_adapter(net(), tmp_path / "a"), base="any")
    with pytest.raises(RuntimeError, match="does not require grad"):
        model(IDS).sum().backward()
    assert required(li.eject(model)) == required(Net())


@pytest.mark.parametrize("by_hand", [True, False])
def test_eject_gives_flags_as_they_were_before_the_first_inject(by_hand: bool) -> None:
    """Whatever was set in between, by hand or by further adapters."""
    model = Net()
    model.norm.weight.requires_grad_(not by_hand)
    before = flags(model)
    li.inject(model, FC)
    model.norm.weight.requires_grad_(by_hand)
    li.inject(model, FC, "second")
    model.norm.weight.requires_grad_(by_hand)
    model(IDS).sum().backward()
    li.eject(li.eject(model, "default"))
    assert flags(model) == before


def test_a_verb_that_raises_keeps_the_gradients() -> None:
    model = net()
    model(IDS).sum().backward()
    with refused(li.LayerError, "'fc'", model=model):
        li.inject(model, FC, "b", probe=int)
    with refused(li.StateError, "train_only", "'b'", model=model):
        li.train_only(model, ["default", "b"])


def without(state: dict[str, Tensor], *parts: str) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if not all(part in k for part in parts)}


@pytest.mark.parametrize(
    "parts", [("lora_A__one", "fc"), ("fc", "__one"), ("head", "__one"), ("norm.weight",)], ids=str
)
def test_half_an_adapter_or_base_does_not_load_strictly_and_one_of_two_does(parts) -> None:
    model = li.inject(Net(), {**FC, "targets": ["fc", "embed"], "train": ["head"]}, "one")
    li.inject(model, FC, "two")
    state = model.state_dict()
    half = without(state, *parts)
    with pytest.raises((RuntimeError, li.StateError), match=r"Missing key|not this one"):
        model.load_state_dict(half, strict=True)
    for whole in (state, without(state, "__two"), without(state, "__one"), without(state, "lora")):
        model.load_state_dict(whole, strict=True)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**state, "fc.lora_A__other": torch.ones(2)})


@pytest.mark.parametrize("into", ["a part of the injected root", "the parent of it"])
def test_half_an_adapter_does_not_load_strictly_above_or_below_its_root(into: str) -> None:
    part = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    parent = nn.Sequential(part)
    target, root = (part, parent) if into.startswith("a part") else (parent, part)
    plain = target.state_dict()
    li.inject(root, {"rank": 1, "targets": [r"\d"]})
    target.load_state_dict(plain, strict=True)
    target.load_state_dict(target.state_dict(), strict=True)
    with refused(li.StateError, "default"):
        target.load_state_dict(without(target.state_dict(), "0.lora"), strict=True)


def test_adapter_parameters_and_groups() -> None:
    model = Net()
    li.inject(model, {**FC, "targets": ["fc", "embed"], "train": ["head"]}, "sql")
    low_rank = ["embed.lora_A", "embed.lora_B", "fc.lora_A", "fc.lora_B"]
    assert list(li.adapter_parameters(model)) == [*low_rank, "head.weight", "head.bias"]
    li.inject(model, FC, "style")
    assert {"sql:fc.lora_A", "style:fc.lora_A"} <= set(li.adapter_parameters(model))

    def grouped(rates: Any, ratio: float) -> list[Any]:
        groups = li.parameter_groups(model, rates, b_lr_ratio=ratio)
        required = {id(p) for p in model.parameters() if p.requires_grad}
        assert {id(p) for g in groups for p in g["params"]} == required
        return [(g["name"], g["lr"], len(g["params"])) for g in groups]

    li.train_only(model, "sql")
    assert grouped(0.1, 16) == [("lora_A", 0.1, 2), ("lora_B", 1.6, 2), ("lora_T", 0.1, 2)]
    li.train_only(model, ["sql", "style"])
    assert grouped({"sql": 0.1, "style": 0.2}, 4) == [
        ("sql:lora_A", 0.1, 2),
        ("sql:lora_B", 0.4, 2),
        ("sql:lora_T", 0.1, 2),
        ("style:lora_A", 0.2, 1),
        ("style:lora_B", 0.8, 1),
    ]
    for rates in ({"sql": 0.1}, {"sql": 0.1, "style": 0.2, "stile": 0.3}):
        with refused(li.StateError, "'sql'", "'style'"):
            li.parameter_groups(model, rates)


def merged() -> Any:
    model = net("sql")
    li.merge(model)
    return model


# Of other verbs that a merged model refuses the state machine knows.
UNKNOWN: dict[str, Callable[[Any], Any]] = {
    "eject": lambda m: li.eject(m, "sqll"),
    "train_only": lambda m: li.train_only(m, "sqll"),
    "activate": lambda m: li.activate(m, "sqll"),
    "adapter_state": lambda m: li.adapter_state(m, "sqll"),
    "merge": lambda m: li.merge(m, name="sqll"),
}


REFUSED: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], tuple[str, ...]]] = {
    "activate without any": (Net, lambda m: li.activate(m, None), ("activate",)),
    "disabled without any": (Net, lambda m: li.disabled(m).__enter__(), ("disabled",)),
    "inject into merged": (merged, lambda m: li.inject(m, FC, "x"), ("'x'", "unmerge(model)")),
    "disabled of merged": (merged, lambda m: li.disabled(m).__enter__(), ("unmerge(model)",)),
    "eject one of merged": (merged, lambda m: li.eject(m, "sql"), ("'sql'", "unmerge(model)")),
    "unmerge what is not": (net, li.unmerge, ("unmerge",)),
    "a part without": (lambda: net().norm, li.merge, ("module",)),
    "several roots": (lambda: nn.ModuleList([net(), net()]), li.merge, ("module",)),
    **{
        f"{verb} of an unknown name": (lambda: net("sql"), act, (verb, "'sqll'", "'sql'"))
        for verb, act in UNKNOWN.items()
    },
}


@pytest.mark.parametrize("state", REFUSED)
def test_what_cannot_be_done_in_this_state_is_refused(state: str) -> None:
    make, act, names = REFUSED[state]
    model = make()
    with refused(li.StateError, *names, model=model):
        act(model)


def test_a_weight_that_is_unpacked_by_the_first_forward_is_refused_until_then(monkeypatch) -> None:
    """As compressed-tensors leaves a linear layer that it has compressed."""
    loaded(monkeypatch, "compressed_tensors.quantization")
    layer = nn.Linear(8, 8)
    layer.quantization_scheme = object()
    layer.weight_packed = nn.Parameter(torch.zeros(8, 1, dtype=torch.int32), requires_grad=False)
    weight = layer.weight
    del layer.weight
    net = nn.Sequential(layer)
    with refused(li.LayerError, "'0'"):
        li.inject(net, {"rank": 2, "targets": ["0"]})
    layer.weight = weight
    li.inject(net, {"rank": 2, "targets": ["0"]})


def test_the_collector_of_the_process_is_as_it_was_after_a_verb() -> None:
    usual = gc.get_threshold()
    li.inject(nn.Sequential(nn.Linear(4, 4)), {"rank": 2, "targets": ["0"]})
    with refused(li.MatchError, "no_such_layer"):
        li.plan(nn.Sequential(nn.Linear(4, 4)), {"targets": ["no_such_layer"]})
    assert gc.get_threshold() == usual
