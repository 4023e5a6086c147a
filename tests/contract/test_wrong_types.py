"""A value of a wrong type or size is an error of this package, which names it and the right one."""

from collections.abc import Callable
from typing import Any

import pytest
from helpers.refusals import refused
from torch import nn

import lora_inject as li

Q = {"rank": 2, "targets": ["1"]}
HUGE = {"rank": 10**11, "targets": ["1"]}
ROWS = {"targets": ["1"], "tokens": {"0": [-1]}}
# What is called with a model of two layers and its adapter's value, and what is named.
CALLS: list[tuple[Callable[[Any, Any], Any], list[str]]] = [
    (lambda m, s: li.Trials(m, {"a": Q}), ["'a'", "dict", "Trial(config, lr"]),
    (lambda m, s: li.combine(s), ["adapters", "AdapterState"]),
    (lambda m, s: li.combine("sql"), ["adapters", "str", "list"]),
    (lambda m, s: li.combine([s], 0.5), ["weights", "float"]),
    (lambda m, s: li.routed(m, "aa"), ["routed", "str", "list"]),
    *(
        (lambda m, s, rows=rows: li.routed(m, rows), ["routed"])
        for rows in ([["default"]] * 4, [1.5, None], [{"default": "much"}, None])
    ),
    *(
        (lambda m, s, n=n: li.routed(m, ["default", None], repeat=n), ["repeat"])
        for n in ("2", 2.0, None, 0)
    ),
    (lambda m, s: li.activate(m, {"default": True}), ["'default'", "bool", "number"]),
    (lambda m, s: li.routed(m, [{"default": True}, None]), ["'default'", "bool", "number"]),
    (lambda m, s: li.Trial(Q, lr=True), ["lr", "True"]),
    (lambda m, s: li.classes.MergeOptions(min_kept=True), ["True", "bool", "0.98"]),
    (lambda m, s: li.combine([s], [True]), ["weight", "bool"]),
    (lambda m, s: li.merge(m, min_kept=True), ["min_kept", "bool"]),
    (lambda m, s: li.merge(m, name=3), ["merge, name", "int"]),
    (lambda m, s: li.algebra.subset(s, "("), ["'('", "regex"]),
    (lambda m, s: li.algebra.split(s, "1", {"a": -1, "b": 7}), ["'a'", "-1"]),
    (lambda m, s: li.algebra.as_dtype(s, "zz"), ["zz", "str"]),
    (lambda m, s: li.truncate(s, rank=1.5), ["rank", "float"]),
    (lambda m, s: li.install(m, "x", "b"), ["str", "AdapterState"]),
    (lambda m, s: li.install(m, s, "b", leave_out="1"), ["leave_out", "str", "list"]),
    (lambda m, s: li.save_adapter(m, "/dev/null/a", unused="1"), ["unused", "str", "list"]),
    (lambda m, s: li.reserve(m, "b", rank=2, targets="01"), ["targets", "'01'", "list"]),
    (lambda m, s: li.load_adapter(m, None, "b"), ["path", "None"]),
    (lambda m, s: li.save_adapter(m, "a\0b"), ["path", "zero byte"]),
    (lambda m, s: li.save_adapter("sql", m), ["Sequential", "comes first, the path second"]),
    (lambda m, s: li.write_adapter("sql", s), ["AdapterState", "comes first, the path second"]),
    (lambda m, s: li.inject(Q, m), ["the model", "dict", "first"]),
    (lambda m, s: li.extending.register_format(s, "x"), ["AdapterState", "name first"]),
    (lambda m, s: li.inject(m, HUGE, "b"), ["rank", "1048576"]),
    (lambda m, s: li.train_only(m, [["a"]]), ["list", "name"]),
    (lambda m, s: li.eject(m, ["default"]), ["eject", "list"]),
    (lambda m, s: li.parameter_groups(m, {"default": -1}), ["lr", "-1"]),
    (lambda m, s: li.parameter_groups(m, 1.0, 0), ["b_lr_ratio", "0"]),
    (lambda m, s: li.Trial(Q, lr=None), ["lr", "None"]),
    (lambda m, s: li.plan(m, ROWS), ["-1"]),
]


@pytest.mark.parametrize(("call", "named"), CALLS)
def test_a_value_of_a_wrong_type_is_an_error_of_this_package(call: Any, named: list[str]) -> None:
    model = li.inject(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 6)), Q)
    state = li.adapter_state(model)
    with refused(li.LoraInjectError, *named, model=model):
        call(model, state)
