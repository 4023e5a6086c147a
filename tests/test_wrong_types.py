"""Values of a wrong type in a call are refused in the package's own words, before any change."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lora_inject as li
from lora_inject.formats import read_adapter

Q = {"rank": 2, "targets": ["1"]}
# words of the refusal: a call with the model and an adapter of it
CALLS: dict[str, Callable[[Any, Any], Any]] = {
    r"trial 'a': it is a dict.*Trial\(config, lr": lambda m, s: li.Trials(m, {"a": Q}),
    "it is a str. Give a whole number": lambda m, s: li.advise(m, "10k"),
    "density: it is a str": lambda m, s: li.combine([s], method="ties", density="a"),
    "adapters: it is an AdapterState": lambda m, s: li.combine(s),
    "weights: it is a float": lambda m, s: li.combine([s], 0.5),
    "2 of 2: it is an int. Give an AdapterState": lambda m, s: s + 3,
    "add adapters, adapter 2 of 2: it is an int": lambda m, s: sum([s, s]),
    "routed: it is None. Give .* in a list": lambda m, s: li.routed(m, None),
    "routed: it is a str. Give .* in a list": lambda m, s: li.routed(m, "aa"),
    "routed: it is a set": lambda m, s: li.routed(m, {"a", "b"}),
    "merge, name: it is an int": lambda m, s: li.merge(m, name=3),
    "min_kept: it is a str": lambda m, s: li.merge(m, min_kept="a"),
    "rename '1': it is an int": lambda m, s: s.rename({"1": 3}),
    "it is not a regex": lambda m, s: s.select("("),
    "the width of 'a': it is a str": lambda m, s: s.split("1", {"a": "2"}),
    "width of 'a' is -1": lambda m, s: s.split("1", {"a": -1, "b": 7}),
    "dtype: it is a str": lambda m, s: s.to("zz"),
    "rank: it is a float": lambda m, s: s.truncate(rank=1.5),
    "it is a str. Give an AdapterState": lambda m, s: li.install(m, "x", "b"),
    "load .*path: it is None": lambda m, s: li.load_adapter(m, None, "b"),
    "save .*path: it is None": lambda m, s: li.save_adapter(m, None),
    "save .*has a zero byte": lambda m, s: li.save_adapter(m, "a\0b"),
    "read .*path: it is None": lambda m, s: read_adapter(None),
    "a config, path: .* has a zero byte": lambda m, s: li.inject(m, "a\0b", "b"),
    "rank.*1048576": lambda m, s: li.inject(m, Q | {"rank": 10**11}, "b"),
    "train_only: it is an int": lambda m, s: li.train_only(m, 3),
    "it is a list. Give the name": lambda m, s: li.train_only(m, [["a"]]),
    "eject .*: it is a list": lambda m, s: li.eject(m, ["default"]),
    "parameter_groups, lr: it is None": lambda m, s: li.parameter_groups(m, None),
    "lr: it is -1": lambda m, s: li.parameter_groups(m, {"default": -1}),
    "b_lr_ratio: it is 0. Give a pos": lambda m, s: li.parameter_groups(m, 1.0, 0),
    "Trial.lr: it is None. Give a pos": lambda m, s: li.Trial(Q, lr=None),
    "there is no row -1. Rows are counted from 0": (
        lambda m, s: li.plan(m, Q | {"tokens": {"0": [-1]}})
    ),
}


@pytest.mark.parametrize("words", CALLS)
def test_a_value_of_a_wrong_type_is_an_error_of_this_package(words: str) -> None:
    model = li.inject(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 6)), Q)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = li.adapter_state(model)
    with pytest.raises(li.LoraInjectError, match=words):
        CALLS[words](model, state)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
