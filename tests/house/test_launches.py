"""What an adapter costs a device: at most so many launches and bytes of one layer, and no sync."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import script
from contract.kinds import KINDS, host
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_inject as li

table = script("benchmarks.launches")
ROWS = table.ROWS


# Row -> launches and GiB that one layer of width 4096, rank 16, may take.
MOST = {
    "bf16": (12, 0.816),
    "bf16, low rank in float32": (13, 2.129),
    "bf16, dropout": (15, 1.285),
    "autocast over float32": (16, 1.379),
    "autocast, dropout": (19, 1.847),
    "float32": (8, 1.629),
    "decode, 1 token": (5, 0.032),
    "decode, 32 tokens": (5, 0.033),
    "prefill, 4,096 tokens": (5, 0.189),
    "prefill, low rank in float32": (5, 0.438),
    "bf16, two adapters": (22, 1.320),
    "bf16, DoRA": (34, 1.229),
    "decode, DoRA": (18, 0.131),
    "bf16, Conv1D": (12, 0.816),
    "bf16, two slices of three": (15, 0.756),
    "bf16, two slices of three, equal": (15, 1.445),
    "bf16, 4 of 8 experts in a loop": (42, 1.269),
    "bf16, 4 of 8 experts in a loop, forward": (21, 0.567),
    "bf16, 8 experts in a grouped product": (22, 1.785),
    "bf16, embedding": (13, 0.386),
    "float32, embedding": (9, 0.761),
    "bf16, embedding, low rank in float32": (11, 1.447),
}


@pytest.mark.parametrize("name", ROWS)
def test_launches_and_bytes_are_at_most_those_that_are_told(name: str) -> None:
    counted = table.count(ROWS[name], "lora_inject")
    launches, moved = MOST[name]
    assert counted.total <= launches, counted.launches
    assert counted.moved / table.GIB <= moved + 0.005
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


def test_buffers_of_a_module_that_trains_in_full_are_compared_once() -> None:
    """Each forward in training copied and compared all of them, for which the host waits."""
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).train()
    li.inject(model, {"rank": 2, "targets": ["0"], "train": ["1"]})
    model[1].momentum = 0.0
    model[1].num_batches_tracked = None  # it counts
    x, ways = torch.randn(4, 6), []
    for _ in range(3):
        with table.Counted() as counted:
            model(x)
        ways.append(counted.launches["clone"] + len(counted.syncs))
    assert ways[2] == 0 < ways[0], ways


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


@pytest.mark.parametrize(
    ("ranks", "base", "times", "most"),
    [
        ((4, 4, 4), [], 3, 5),
        ((4,) * 9, [], 3, 5),
        ((4, 4, 4), [None], 3, 7),
        ((8, 1, 3, 3), [None], 3, 9),
        ((4, 4, 4), [], 30, 7),
        ((4, 4, 4), [None], 30, 9),
    ],
    ids=str,
)
def test_launches_of_a_routed_layer_depend_on_no_number_of_adapters(
    ranks: Sequence[int], base: list[None], times: int, most: int
) -> None:
    """A few rows of one rank are put together one by one; else each row picks from a stack."""
    model = nn.Sequential(nn.Linear(16, 24)).eval()
    names = [f"a{i}" for i in range(len(ranks))]
    for name, rank in zip(names, ranks, strict=True):
        li.inject(model, {"rank": rank, "alpha": 2 * rank, "targets": ["0"]}, name)
    model.to("meta")
    rows = [*base, *names * times]
    x = torch.empty(len(rows), 1, 16, device="meta")
    with torch.inference_mode(), li.routed(model, rows):
        model(x)
        with table.Counted() as counted:
            model(x)
    assert counted.total <= most, counted.launches


def test_a_further_trial_adds_the_launches_of_its_own_optimizer_and_loss_alone() -> None:
    launches = script("benchmarks.rows").launches_of_trials
    two, three, five = map(launches, (2, 3, 5))
    assert five - three == 2 * (three - two) <= 2 * 42
    assert two < 300


X, H, MASK = 100 * 64 * 2, 100 * 4 * 2, 100 * 64  # bytes that a layer may keep of 100 tokens
KEPT = [((), 0), (("A",), X), (("B",), X + H), (("A", "B"), X + H)]


@pytest.mark.parametrize(
    ("roles", "options", "routed", "most"),
    [
        *((roles, {}, False, most) for roles, most in KEPT),
        *((roles, {"dropout": 0.1}, False, MASK + most) for roles, most in KEPT),
        *((roles, {"compute": "float32"}, False, most and most + H) for roles, most in KEPT),
        ((), {"variant": "dora"}, False, 0),
        ((), {"compute": "float32"}, True, 0),
    ],
)
def test_what_trains_nothing_keeps_no_more_than_a_frozen_layer(
    roles: tuple[str, ...], options: dict[str, Any], routed: bool, most: int
) -> None:
    """Below a trained adapter and in a frozen policy it kept x and h in each layer."""
    model = li.inject(nn.Sequential(nn.Linear(64, 32)), {"rank": 4, "targets": ["0"], **options})
    for name, p in li.adapter_parameters(model.bfloat16()).items():
        p.requires_grad_(name.rpartition("_")[2] in roles)
    x, kept = torch.randn(100, 64, dtype=torch.bfloat16, requires_grad=True), {}

    def pack(t: Tensor) -> Tensor:
        if 100 in t.shape:  # else it is as small as the factors
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    rows = li.routed(model, ["default"] * 100) if routed else nullcontext()
    with rows, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x).sum().backward()
    assert sum(kept.values()) <= most


def test_autocast_casts_an_input_once_where_a_mode_watches() -> None:
    """The formula, too, shares the copy between the layer and the update."""
    model = li.inject(nn.Sequential(nn.Linear(8, 6)), {"rank": 2, "targets": ["0"]})
    x, copied = torch.randn(3, 8, requires_grad=True), []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if func is torch.ops.aten._to_copy.default and args[0].shape == x.shape:
                copied.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with Casts(), torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    with Casts():
        y.sum().backward()
    assert copied == [torch.float32, torch.bfloat16], "to 16 bits, and its gradient back"
