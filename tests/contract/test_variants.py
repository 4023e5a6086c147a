"""Variants of LoRA: DoRA on every kind of layer, against dense layers in float64 and PEFT."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import peft
import pytest
import torch
from conftest import error, fill, same_bits
from helpers.forks import Forks
from helpers.merging import save_checkpoint
from helpers.models import TiedDecoder
from helpers.refusals import refused
from helpers.states import give_biases_of_b, with_biases_of_b
from safetensors.torch import load_file
from torch import Tensor, nn

import lora_inject as li


def test_dropout_is_pefts(tmp_path: Path) -> None:
    """What x keeps goes through W as well, where the gain is not 1."""
    plain = nn.Sequential(nn.Linear(5, 6))
    config = {"rank": 2, "alpha": 3, "variant": "dora", "dropout": 0.5, "targets": ["0"]}
    model = fill(li.inject(copy.deepcopy(plain), config))
    li.save_adapter(model, tmp_path / "a")
    other = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "a").train()
    x = torch.randn(4, 5)
    torch.manual_seed(1)
    ours = model.train()(x)
    torch.manual_seed(1)
    assert error(ours, other(x)) <= 1e-6


def test_what_cannot_carry_a_magnitude_refuses_it(tmp_path: Path) -> None:
    rules = [{"match": "0", "variant": "dora"}, "1"]
    mixed = li.inject(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)), {"targets": rules})
    li.save_adapter(mixed, tmp_path / "a.safetensors", format="native")
    for layout, named in (("portable", "'dora'"), ("loralib", "'dora'"), ("peft", "variant")):
        with refused(li.FormatError, named):
            li.save_adapter(mixed, tmp_path / "b", format=layout)


class Gate(li.extending.Variant):
    """Outputs have a gate that starts at 1; its role ends as that of a frozen start does."""

    name = "gate"
    roles: ClassVar[Any] = {"g0": lambda a, b: b[:-1]}
    gained = True

    def start(self, factors: Mapping[str, Tensor], norms: Any) -> Mapping[str, Tensor]:
        return {"g0": torch.ones_like(factors["B"][..., 0])}

    def gain(self, tensors: Mapping[str, Tensor], norms: Tensor) -> Tensor:
        return tensors["g0"]


def use_and_save_a_gate(folder: Path) -> None:
    li.extending.register_variant(Gate)
    net = nn.Sequential(nn.Linear(4, 6))
    model = li.inject(copy.deepcopy(net), {"rank": 1, "variant": "gate", "targets": ["0"]})
    fill(model)
    site, x = li.adapter_state(model).sites["0"], torch.randn(3, 4)
    delta = site.scale * site.B @ site.A
    weight = site.further["g0"][:, None] * (net[0].weight + delta)
    wanted = nn.functional.linear(x, weight, net[0].bias)
    assert error(model(x), wanted) <= 1e-6
    path = li.save_adapter(model, folder / "a.safetensors", format="native")
    assert same_bits(li.load_adapter(copy.deepcopy(net), path)(x), model(x))
    with refused(li.FormatError, "'gate'"):
        li.save_adapter(model, folder / "a")
    li.merge(model)
    assert error(model(x), wanted) <= 1e-6


def test_a_variant_from_outside_the_package(tmp_path: Path, forks: Forks) -> None:
    """Which only the other process has registered."""
    forks.start(use_and_save_a_gate, tmp_path).result()
    with refused(li.FormatError, "'gate'"):
        li.read_adapter(tmp_path / "a.safetensors")
    taken = {"name": "taken", "roles": {"A0": lambda a, b: b[:-1]}}  # a role that every site has
    with refused(li.LayerError, "'A0'"):
        li.extending.register_variant(type("Taken", (li.extending.Variant,), taken))


def test_a_bias_of_b_is_refused_where_it_has_no_place() -> None:
    def with_bias(**config: Any) -> li.AdapterState:
        net = li.inject(nn.Sequential(nn.Linear(4, 6)), {"rank": 1, "targets": ["0"], **config})
        return with_biases_of_b(li.adapter_state(net))

    bare, net = nn.Sequential(nn.Linear(4, 6, bias=False)), nn.Sequential(nn.Linear(4, 6))
    with refused(li.LayerError, "'0.bias'", "lora_bias", model=bare):
        li.install(bare, with_bias(), base="any")
    with refused(li.LayerError, "'bias'", model=net):
        li.install(net, with_bias(bias="adapted"), base="any")
    parts = {"match": "0", "slices": {"q": 2, "k": 4}, "adapt": ["k"]}
    with refused(li.LayerError, "'0'", "lora_bias", "slices", model=net):
        li.install(net, with_bias(targets=[parts]), base="any")


@pytest.mark.parametrize("layout", ["native", "peft"])
def test_a_bias_of_b_does_not_train(layout: str, tmp_path: Path, caplog: Any) -> None:
    """A file that has it is loaded and merged; who trains it is told, who asks for one as well."""
    plain = TiedDecoder().double()
    model = give_biases_of_b(fill(li.inject(copy.deepcopy(plain), {"rank": 1, "targets": ["fc"]})))
    path, due = tmp_path / ("a.safetensors" if layout == "native" else "a"), model(IDS)
    li.save_adapter(model, path, format=layout)
    caplog.clear()
    back = li.load_adapter(copy.deepcopy(plain), path, trainable=True)
    (told,) = caplog.messages
    assert "do not train" in told
    assert "'fc'" in told
    assert [*li.adapter_parameters(back)] == ["fc.lora_A", "fc.lora_B"]
    assert {name for name, p in back.named_parameters() if p.requires_grad} == {
        "fc.lora_A__default",
        "fc.lora_B__default",
    }
    assert same_bits(back(IDS), due)
    li.merge(back)
    assert error(back(IDS), due) <= 1e-12
    for config in ({"lora_bias": True}, {"targets": [{"match": "fc", "lora_bias": True}]}):
        with refused(li.ConfigError, "lora_bias", "does not train", "bias: adapted", model=plain):
            li.inject(plain, {"targets": ["fc"], **config})


TOKENS = {"rank": 1, "targets": ["fc"], "tokens": {"embed": [7, 2]}}
IDS = torch.tensor([[1, 2, 7, 2]])


def test_rows_that_train_are_read_in_place_of_the_bases_under_all_names() -> None:
    plain = TiedDecoder().double()
    model = li.inject(copy.deepcopy(plain), {**TOKENS, "expect": {"trainable": 2 * 4 + 8}})
    assert same_bits(model(IDS), plain(IDS))
    fill(model)
    state = li.adapter_state(model)
    assert state.rows == {"embed.weight": (7, 2), "head.weight": (7, 2)}
    rows = li.adapter_parameters(model)["embed.weight"]
    assert rows.shape == (2, 4)
    delta = state.sites["fc"].scale * state.sites["fc"].B @ state.sites["fc"].A
    table = plain.embed.weight.detach().index_copy(0, torch.tensor([7, 2]), rows)
    dense = {"embed.weight": table, "fc.weight": plain.fc.weight + delta}
    wanted = torch.func.functional_call(plain, dense, (IDS,))
    assert error(model(IDS), wanted) <= 1e-12
    grads = [torch.autograd.grad(y.square().sum(), rows)[0] for y in (model(IDS), wanted)]
    assert error(*grads) <= 1e-11
    li.merge(model)
    assert model.head.weight is model.embed.weight, "the tie stays"
    assert same_bits(model.embed.weight, table.detach())


def test_rows_of_two_adapters_are_mixed_as_copies_are() -> None:
    model = fill(li.inject(TiedDecoder(), {"tokens": {"embed": [7, 2]}}, "a"), "a")
    fill(li.inject(model, {"tokens": {"embed": [2, 3]}}, "b"), "b")
    W = model.embed.get_parameter("weight").detach().clone()
    wanted = W.clone()
    for name, weight, ids in (("a", 0.5, [7, 2]), ("b", 2.0, [2, 3])):
        rows = li.adapter_state(model, name).trained["embed.weight"]
        wanted[ids] += weight * (rows - W[ids])
    li.activate(model, {"a": 0.5, "b": 2.0})
    assert error(model.embed(IDS), wanted[IDS]) <= 1e-6
    li.merge(model)
    assert error(model.embed(IDS), wanted[IDS]) <= 1e-6


def test_peft_reads_rows_under_every_name_of_a_table(tmp_path: Path) -> None:
    """PEFT knows ties by the config of transformers only."""
    model = fill(li.inject(TiedDecoder(), TOKENS))
    li.save_adapter(model, tmp_path / "a")
    plain = li.eject(copy.deepcopy(model))
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "a").eval()
    assert error(theirs(IDS), model(IDS)) <= 1e-5
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "pos_embed": nn.Embedding(9, 4)})
    li.inject(model, {"tokens": {"^embed": [7]}})
    with refused(li.FormatError, "'pos_embed'"):
        li.save_adapter(model, tmp_path / "d")


def test_tokens_are_refused_where_they_cannot_train() -> None:
    for config, names in (
        ({"tokens": {"embed": [9]}}, ("'embed.weight'", "row 9", "9 rows")),
        ({"tokens": {"nowhere": [1]}}, ("nowhere",)),
        ({"tokens": {"fc": [1]}}, ("'fc'", "linear", "train:")),
        ({"tokens": {r"fc\.weight": [1]}}, ("'fc.weight'", "linear", "train:")),
        ({"tokens": {"embed|fc": [1]}}, ("'fc'", "linear", "train:")),
        ({"tokens": {"embed": [1]}, "targets": ["embed"]}, ("embed",)),
        ({"tokens": {"embed": [1]}, "train": ["embed"]}, ("embed", "train 1")),
    ):
        model = TiedDecoder()
        with refused(li.MatchError, *names, model=model):
            li.inject(model, config)
    whole = li.plan(TiedDecoder(), {"tokens": {"^$": [1]}})
    assert [entry.name for entry in whole.trained] == ["embed.weight"]
    with refused(li.ConfigError, "tokens.embed"):
        li.Config(tokens={"embed": [1, 1]})


MORE: dict[str, dict[str, Any]] = {
    "variant": {"variant": "dora", "targets": ["fc", "embed"]},
    "lora_bias": {"targets": ["fc"]},
    "rows": TOKENS,
}


@pytest.mark.parametrize("layout", ["native", "peft"])
@pytest.mark.parametrize("more", MORE)
def test_files_swaps_and_merges_on_disk_know_what_an_adapter_has_besides_a_and_b(
    more: str, layout: str, tmp_path: Path
) -> None:
    plain, config = TiedDecoder(), {"rank": 2, "alpha": 3, **MORE[more]}
    if more == "variant":
        plain.head.weight = nn.Parameter(plain.head.weight.clone())
    model, other = (fill(li.inject(copy.deepcopy(plain), config)) for _ in range(2))
    if more == "lora_bias":
        model, other = give_biases_of_b(model), give_biases_of_b(other)
    wanted, state = model(IDS), li.adapter_state(model)
    path = tmp_path / ("a.safetensors" if layout == "native" else "a")
    li.save_adapter(model, path, format=layout)
    again = li.load_adapter(copy.deepcopy(plain), path)
    assert same_bits(again(IDS), wanted)
    assert li.adapter_state(again).rows == state.rows
    for name, site in li.adapter_state(again).sites.items():
        assert site.tensors.keys() == state.sites[name].tensors.keys()
    if more != "rows":
        lora = li.inject(copy.deepcopy(plain), {**config, "variant": "lora"})
        with refused(li.FormatError, more, model=lora):
            li.swap_adapter(lora, path)
    if (more, layout) == ("rows", "peft"):
        return  # whose files say nothing of the rest of the table
    assert same_bits(li.swap_adapter(other, path)(IDS), wanted)
    base = save_checkpoint(tmp_path / "base", {k: t.clone() for k, t in plain.state_dict().items()})
    li.merge_checkpoint(base, [path], tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    li.merge(model)
    for key in ("embed.weight", "fc.weight", "fc.bias", "head.weight"):
        assert error(merged[key], model.get_parameter(key)) <= 1e-6


@pytest.mark.parametrize("layout", ["native", "peft"])
def test_rows_that_a_smaller_table_lacks_are_refused(layout: str, tmp_path: Path) -> None:
    path = tmp_path / ("a.safetensors" if layout == "native" else "a")
    li.save_adapter(fill(li.inject(TiedDecoder(), TOKENS)), path, format=layout)
    small = TiedDecoder()
    small.embed = nn.Embedding(5, 4)
    with refused(li.FormatError, "'embed.weight'", "resize_token_embeddings", model=small):
        li.load_adapter(small, path)
