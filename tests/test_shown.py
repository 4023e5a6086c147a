"""What a notebook or a prompt shows of the package's values, and what completion offers."""

import inspect
from typing import Any

import pytest
import torch
from torch import nn

import lora_inject as li

CONFIG = {"rank": 4, "targets": [r"\d"]}


def injected() -> nn.Module:
    return li.inject(nn.Sequential(nn.Linear(8, 8), nn.GRU(8, 8), nn.Linear(8, 4)), CONFIG)


def values() -> dict[str, Any]:
    model = injected()
    half = li.inject(nn.Sequential(nn.Linear(8, 8)).bfloat16(), {"targets": ["0"]})
    with torch.no_grad():
        half[0].lora_B__default.fill_(1.0)
    return {
        "config": li.Config.from_dict(CONFIG),
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
    assert "<" not in repr(value)
    html = value._repr_html_()
    assert html.startswith("<pre>")
    assert html.endswith("</pre>")
    assert str(value).splitlines()[-1] in html.replace("&#x27;", "'").replace("&gt;", ">")


def test_markup_in_a_name_is_text_in_a_notebook() -> None:
    assert "<b>" not in li.Config(targets=["<b>"])._repr_html_()


def test_summary_is_text_and_has_a_column_of_base_tensors_only_where_some_train() -> None:
    model = injected()
    assert "base tensors" not in li.summary(model).splitlines()[0]
    model = li.inject(nn.Sequential(nn.Linear(2, 2)), {**CONFIG, "bias": "adapted"})
    head, row, total = li.summary(model).splitlines()
    assert "base tensors" in head
    assert total.startswith("trainable: ")
    assert row.split()[:4] == ["default", "1", "4", "1"]


def test_a_site_shows_its_numbers_and_no_values() -> None:
    sites = li.adapter_state(injected()).sites
    assert repr(sites["0"]) == "SiteState('0', linear, 8 -> 8, rank 4)"


def test_what_the_weights_hold_is_listed_as_merged() -> None:
    model = injected()
    before = li.summary(model)
    li.merge(model)
    assert li.adapters(model)["default"].merged
    assert "  merged x 1  no" in li.summary(model)
    li.unmerge(model)
    assert not li.adapters(model)["default"].merged
    assert li.summary(model) == before


def test_a_model_without_adapters_lists_none() -> None:
    assert str(li.adapters(nn.Linear(2, 2))) == "no adapters"
    assert dict(li.adapters(nn.Linear(2, 2))) == {}


def test_a_layer_with_several_sites_of_an_adapter_names_it_once() -> None:
    assert "(1): GRU(8, 8, lora={default: r=4 x2})" in repr(injected())


def test_a_layer_without_a_description_of_its_own_begins_with_its_adapters() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3, 3))

    model = li.inject(
        nn.Sequential(Plain()), {"rank": 2, "targets": [{"match": "w", "layout": "out_in"}]}
    )
    assert repr(model[0]) == "Plain(lora={default: r=2})"


def test_signatures_say_types_and_nothing_of_how_they_are_checked() -> None:
    text = str(inspect.signature(li.Config))
    assert "rank: int = 8" in text
    assert "function" not in text
    assert "Annotated" not in text


def test_completion_offers_public_names_only() -> None:
    offered = {name for name in dir(li) if not name.startswith("__")}
    assert offered == {*li.__all__, "analysis"} - {"__version__"}
