"""Values of a wrong type in a call are refused in the package's own words, before any change."""

import pytest
import torch
from torch import nn

import lora_inject as li
from lora_inject.formats import read_adapter, write_adapter

Q = {"rank": 2, "targets": ["1"]}


@pytest.fixture(scope="module")
def model():
    return li.inject(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 6)), Q)


CALLS = {
    "trials": (lambda m, s: li.Trials(m, {"a": Q}), r"trial 'a': it is a dict.*Trial\(config, lr"),
    "budget as text": (lambda m, s: li.advise(m, "10k"), "it is a str. Give a whole number"),
    "budget as a float": (lambda m, s: li.advise(m, 1e3), "it is a float"),
    "weights": (lambda m, s: li.combine([s], ["a"]), "the weight of the adapter: it is a str"),
    "times text": (lambda m, s: s * "a", "multiply an adapter: it is a str. Give a number"),
    "text times": (lambda m, s: "a" * s, "multiply an adapter: it is a str"),
    "plus a number": (lambda m, s: s + 3, "2 of 2: it is an int. Give an AdapterState"),
    "sum of adapters": (lambda m, s: sum([s, s]), "add adapters, adapter 2 of 2: it is an int"),
    "minus none": (lambda m, s: s - None, "subtract adapters, adapter 2 of 2: it is None"),
    "a number minus": (lambda m, s: 3 - s, "subtract adapters, adapter 2 of 2: it is an int"),
    "cosine with text": (lambda m, s: s.cosine("a"), "adapters, adapter 2 of 2: it is a str"),
    "density": (lambda m, s: li.combine([s], method="ties", density="a"), "density: it is a str"),
    "one adapter": (lambda m, s: li.combine(s), "adapters: it is an AdapterState"),
    "one weight": (lambda m, s: li.combine([s], 0.5), "weights: it is a float"),
    "rows none": (lambda m, s: li.routed(m, None), "routed: it is None. Give .* in a list"),
    "rows as text": (lambda m, s: li.routed(m, "aa"), "routed: it is a str. Give .* in a list"),
    "rows as a dict": (lambda m, s: li.routed(m, {"a": 1}), "routed: it is a dict"),
    "rows as a set": (lambda m, s: li.routed(m, {"a", "b"}), "routed: it is a set"),
    "rows as a number": (lambda m, s: li.routed(m, 2), "routed: it is an int"),
    "name of merge": (lambda m, s: li.merge(m, name=3), "merge, name: it is an int"),
    "rename to a number": (lambda m, s: s.rename({"1": 3}), "rename '1': it is an int"),
    "select a number": (lambda m, s: s.select(3), "a pattern: it is an int"),
    "save to a zero byte": (lambda m, s: li.save_adapter(m, "a\0b"), "has a zero byte"),
    "min_kept": (lambda m, s: li.merge(m, min_kept="a"), "min_kept: it is a str"),
    "split": (lambda m, s: s.split("1", {"a": "2"}), "the width of 'a': it is a str"),
    "width below 1": (lambda m, s: s.split("1", {"a": -1, "b": 7}), "width of 'a' is -1"),
    "join to a number": (lambda m, s: s.join(1, {"1": 6}), "name: it is an int"),
    "join_experts": (lambda m, s: s.join_experts(1, 2), "pattern: it is an int"),
    "number of experts": (lambda m, s: s.join_experts("a", "2"), "n: it is a str"),
    "join": (lambda m, s: s.join("1", ["a"]), "sizes: it is a list"),
    "rename": (lambda m, s: s.rename("a"), "rename: it is a str"),
    "select": (lambda m, s: s.select("("), "it is not a regex"),
    "dtype": (lambda m, s: s.to("zz"), "dtype: it is a str"),
    "rank of truncate": (lambda m, s: s.truncate(rank=1.5), "rank: it is a float"),
    "install": (lambda m, s: li.install(m, "x", "b"), "it is a str. Give an AdapterState"),
    "load": (lambda m, s: li.load_adapter(m, None, "b"), "path: it is None"),
    "save": (lambda m, s: li.save_adapter(m, None), "path: it is None"),
    "read": (lambda m, s: read_adapter(None), "path: it is None"),
    "write": (lambda m, s: write_adapter(None, "nowhere"), "it is None. Give an AdapterState"),
    "diff": (lambda m, s: li.diff(3, 4), "it is an int"),
    "a zero byte": (
        lambda m, s: li.inject(m, "a\0b", "b"),
        "a config, path: .* has a zero byte",
    ),
    "a rank beyond memory": (lambda m, s: li.inject(m, Q | {"rank": 10**11}, "b"), "rank.*1048576"),
    "names to train": (lambda m, s: li.train_only(m, 3), "train_only: it is an int"),
    "a list of lists": (lambda m, s: li.train_only(m, [["a"]]), "it is a list. Give the name"),
    "several to eject": (lambda m, s: li.eject(m, ["default"]), "eject .*: it is a list"),
    "no rate": (lambda m, s: li.parameter_groups(m, None), "parameter_groups, lr: it is None"),
    "rate below 0": (lambda m, s: li.parameter_groups(m, {"default": -1}), "lr: it is -1"),
    "B at rest": (lambda m, s: li.parameter_groups(m, 1.0, 0), "b_lr_ratio: it is 0. Give a pos"),
    "no rate of a trial": (lambda m, s: li.Trial(Q, lr=None), "Trial.lr: it is None. Give a pos"),
    "warmup as text": (lambda m, s: li.Trial(Q, lr=1, warmup="a"), "Trial.warmup: it is 'a'"),
    "rows below 0": (
        lambda m, s: li.plan(m, Q | {"tokens": {"0": [-1]}}),
        r"\(tokens.0\[0\]\): there is no row -1. Rows are counted from 0.$",
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_value_of_a_wrong_type_is_an_error_of_this_package(model, call):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrong, message = CALLS[call]
    with pytest.raises(li.LoraInjectError, match=message):
        wrong(model, li.adapter_state(model))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
