"""What a notebook or a prompt shows of the package's values, and what completion offers."""

import inspect
from typing import Any

import pytest
import torch
from torch import nn

import lora_inject as li

CONFIG = {"rank": 4, "targets": [r"\d"]}


def injected() -> nn.Module:
    return li.inject(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), CONFIG)


def values() -> dict[str, Any]:
    model = injected()
    half = li.inject(nn.Sequential(nn.Linear(8, 8)).bfloat16(), {"targets": ["0"]})
    with torch.no_grad():
        half[0].lora_B__default.fill_(1.0)
    return {
        "config": li.Config(targets=["<b>"]),
        "plan": li.plan(nn.Linear(8, 8), {"targets": ["^$"]}),
        "adapters": li.adapters(model),
        "summary": li.summary(model),
        "state": li.adapter_state(model),
        "merge": li.merge(half),
    }


@pytest.mark.parametrize("name", list(values()))
def test_a_value_shows_what_print_shows_and_a_notebook_keeps_its_columns(name: str) -> None:
    value = values()[name]
    assert repr(value) == str(value)
    assert len(repr(value)) < 600
    html = value._repr_html_()
    assert html.startswith("<pre>")
    assert html.endswith("</pre>")
    assert "<b>" not in html  # markup in a name is text
    assert str(value).splitlines()[-1] in html.replace("&#x27;", "'").replace("&gt;", ">")


def test_summary_has_a_column_of_base_tensors_only_where_some_train_and_says_what_is_merged() -> (
    None
):
    model = injected()
    before = li.summary(model)
    assert "base tensors" not in before.splitlines()[0]
    li.merge(model)
    assert "  merged x 1  no" in li.summary(model)
    li.unmerge(model)
    assert li.summary(model) == before
    model = li.inject(nn.Sequential(nn.Linear(2, 2)), {**CONFIG, "bias": "adapted"})
    head, row, total = li.summary(model).splitlines()
    assert "base tensors" in head
    assert total.startswith("trainable: ")
    assert row.split()[:4] == ["default", "1", "4", "1"]
    assert str(li.adapters(nn.Linear(2, 2))) == "no adapters"


def test_completion_offers_public_names_only_and_signatures_say_types() -> None:
    assert "rank: int = 8" in str(inspect.signature(li.Config))
    offered = {name for name in dir(li) if not name.startswith("__")}
    assert offered == {*li.__all__, "analysis"} - {"__version__"}
