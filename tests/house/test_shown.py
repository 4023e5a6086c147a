"""What a notebook or a prompt shows of the package's values."""

from torch import nn

import lora_inject as li


def test_a_notebook_keeps_columns_and_takes_no_markup_from_names() -> None:
    config = li.Config(targets=["<b>"])
    assert repr(config) == str(config)
    assert config._repr_html_().startswith("<pre>")
    assert "<b>" not in config._repr_html_()


def test_summary_counts_what_an_adapter_has_and_says_what_is_merged() -> None:
    model = li.inject(nn.Sequential(nn.Linear(2, 2)), {"rank": 4, "targets": ["0"], "bias": "all"})
    head, row, _ = li.summary(model).splitlines()
    assert "base tensors" in head
    assert row.split()[:4] == ["default", "1", "4", "1"]
    li.merge(model)
    assert "  merged x 1  no" in li.summary(model)
    assert str(li.adapters(nn.Linear(2, 2))) == "no adapters"
