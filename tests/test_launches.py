"""What an adapter costs a device: at most so many launches and bytes of one layer, and no sync."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import KINDS, host, script
from helpers.calls import python_calls
from torch import Tensor, nn

import lora_inject as li
from lora_inject.core.layers import sending
from lora_inject.rows import by_row, routing

table = script("benchmarks.launches")
ROWS = table.ROWS


def on_the_page(name: str) -> dict[str, float]:
    """What docs/performance.md says of one layer of width 4096, rank 16."""
    page = Path(__file__).parents[1] / "docs" / "performance" / "results.json"
    lines = json.loads(page.read_text())["rows"]["launches"]["lines"]
    ours = [line for line in lines if (line["case"], line["variant"]) == (name, "lora_inject")]
    return {line["metric"]: line["mid"] for line in ours}


@pytest.mark.parametrize("name", ROWS)
def test_launches_and_bytes_are_at_most_those_of_the_page(name: str) -> None:
    counted = table.count(ROWS[name], "lora_inject")
    most = on_the_page(name)
    assert counted.total <= most["launches"], counted.launches
    assert counted.moved / table.GIB <= most["GiB moved"] + 0.005
    assert counted.syncs == []
    assert counted.on_cpu == [] or ROWS[name].autocast  # whose fake tensors are on the CPU


@pytest.mark.parametrize("name", [n for n in ROWS if "decode" not in n and "autocast" not in n])
def test_launches_do_not_depend_on_the_number_of_tokens(name: str) -> None:
    few = table.count(replace(ROWS[name], tokens=16), "lora_inject")
    assert few.launches == table.count(ROWS[name], "lora_inject").launches


def test_the_counter_sees_syncs() -> None:
    x = torch.ones(4, 8)
    with table.Counted() as counted:
        assert x[x > 1].sum().item() == 0
    assert {*counted.syncs} == {"index", "_local_scalar_dense"}


def _on_meta(kind: str, **config: Any) -> tuple[nn.Module, list[Tensor]]:
    row = KINDS[kind]
    model = host(row, torch.bfloat16)
    for name in ("one", "two"):
        li.inject(model, {**row.config, **config}, name)
    return model.to("meta"), [x.to("meta") for x in row.inputs(torch.bfloat16)]


def _watch(model: nn.Module, inputs: Sequence[Tensor], *, grad: bool = True) -> None:
    """Run a step, which must wait for nothing and meet no CPU tensor, as a CUDA graph asks."""
    with torch.set_grad_enabled(grad):
        model(*inputs)  # the first forward sends rows to the device
        with table.Counted() as counted:
            y = model(*inputs)
            if grad:
                y.backward(torch.ones_like(y))
    assert (counted.syncs, counted.on_cpu) == ([], [])


OPTIONS = [{}, {"dropout": 0.1}, {"compute": "float32"}, {"init": "pissa"}, {"variant": "dora"}]
FORWARD = [name for name, kind in KINDS.items() if kind.update == "forward"]


@pytest.mark.parametrize(
    ("kind", "options"),
    [(kind, {}) for kind in KINDS] + [(kind, one) for kind in FORWARD for one in OPTIONS[1:]],
    ids=str,
)
def test_no_sync_and_no_cpu_tensor_between_inject_and_eject(
    kind: str, options: dict[str, Any]
) -> None:
    model, inputs = _on_meta(kind, **options)
    li.activate(model, "two" if "variant" in options else {"one": 1.0, "two": -0.5})
    _watch(model, inputs)
    _watch(model, inputs, grad=False)
    with li.disabled(model):
        _watch(model, inputs, grad=False)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv1d", "unequal slices", "embedding", "conv 2d"])
def test_routed_rows_need_no_sync_and_no_cpu_tensor(kind: str, options: dict[str, Any]) -> None:
    if kind == "conv 2d" and options.keys() & {"dropout", "variant"}:
        pytest.skip("a convolution has no dropout, and its gain cannot be routed")
    model, (x,) = _on_meta(kind, **options)
    with li.routed(model, ["two", None, "one", "two"][: len(x)]):
        for grad in (False, True):
            _watch(model, [x], grad=grad)
            if kind in FORWARD:
                _watch(model, [x[:, :1]], grad=grad)


def test_rows_are_sent_once_for_each_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another stream does not wait for a copy, and would read what is not there yet."""
    streams, sent = iter("aaaabbbaa" * 3), Mock(wraps=sending.sent)
    net = li.inject(nn.Sequential(nn.Linear(8, 8)), {"rank": 2, "targets": ["0"]}, "one")
    monkeypatch.setattr(by_row, "queue_of", lambda _: next(streams))
    monkeypatch.setattr(routing, "sent", sent)
    with li.routed(net, ["one", None]):
        for _ in range(5):
            net(torch.randn(2, 8))
    assert sent.call_count == 2 * 2  # all rows, and one for each run of equal ones


@pytest.mark.parametrize("ranks", [(4, 4, 4), (8, 1, 3, 3)], ids=str)
def test_launches_of_a_routed_layer_depend_on_no_number_and_no_rank(ranks: Sequence[int]) -> None:
    model = nn.Sequential(nn.Linear(16, 24)).eval()
    names = [f"a{i}" for i in range(len(ranks))]
    for name, rank in zip(names, ranks, strict=True):
        li.inject(model, {"rank": rank, "alpha": 2 * rank, "targets": ["0"]}, name)
    model.to("meta")
    x = torch.empty(10, 1, 16, device="meta")
    with torch.inference_mode(), li.routed(model, [None, *names * 3][:10]):
        model(x)
        with table.Counted() as counted:
            model(x)
    assert counted.total <= 9, counted.launches


def test_a_token_enters_few_functions_of_the_package() -> None:
    net = li.inject(nn.Sequential(nn.Linear(8, 8)), {"rank": 2, "targets": ["0"]}).eval()
    x = torch.randn(1, 8)
    with torch.inference_mode():
        net(x)  # what is chosen is looked up once
        assert python_calls(lambda: net[0](x), inside="/lora_inject/") <= 8


def test_a_step_of_trials_takes_as_many_launches_for_any_number_of_one_shape() -> None:
    launches = script("benchmarks.sharing").launches_of_trials
    assert launches(2) == launches(5) < 320
