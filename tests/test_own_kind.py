"""A kind of layer from outside the package: one class, one call of `register_kind`.

A foreign kind is held to what the built-in ones are held to, both ways: zero start,
the dense float64 reference, merge, eject, files in both formats, and refusals that name it.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import error, fill, same_bits, snapshot
from helpers.reference import EXACT, SCALE, config, random, refused, saved, with_deltas
from torch import Tensor, nn

import lora_inject as li
from lora_inject import Geometry, LoRALinear, WeightUpdate, register_kind
from lora_inject.core.layers.kinds import KINDS

N_IN, N_OUT = 5, 4


class Dense(nn.Module):
    """Linear in its kernel `(in, out)`, but no `nn.Linear`."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(N_IN, N_OUT))
        self.offset = nn.Parameter(torch.randn(N_OUT))
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * (x @ self.kernel) + self.offset


class Squared(nn.Module):
    """Not linear in its weight at all."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(N_OUT, N_IN))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.table * self.table.abs()).t()


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.after = nn.Linear(N_OUT, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.layer(x))


class LoRADense(LoRALinear):
    """Adds to the output."""

    kind, weight_name, transposed = "test_dense", "kernel", True

    @classmethod
    def matches(cls, layer: type[nn.Module]) -> bool:
        return issubclass(layer, Dense)

    @staticmethod
    def geometry(module: nn.Module) -> Geometry:
        return Geometry(N_IN, N_OUT, (N_IN, N_OUT), transposed=True)

    @classmethod
    def adds_to_output(cls, module: nn.Module, *, stock: bool) -> bool:
        return isinstance(module, Dense) and module.gain == 1.0


class LoRASquared(WeightUpdate):
    """Attached the weight."""

    kind, weight_name = "test_squared", "table"

    @classmethod
    def matches(cls, layer: type[nn.Module]) -> bool:
        return issubclass(layer, Squared)

    @staticmethod
    def geometry(module: nn.Module) -> Geometry:
        return Geometry(N_IN, N_OUT, (N_OUT, N_IN))


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    before = list(KINDS)
    register_kind(LoRADense)
    register_kind(LoRASquared)
    yield
    KINDS[:] = before


ROWS: dict[str, tuple[Any, str, str]] = {
    "test_dense": (Dense, "forward", "kernel"),
    "test_squared": (Squared, "weight", "table"),
    "test_dense with a gain": (lambda: Dense(2.0), "weight", "kernel"),
}


def build(row: str) -> Net:
    torch.manual_seed(0)
    return Net(ROWS[row][0]()).double()


@pytest.mark.parametrize("row", ROWS)
def test_a_foreign_kind_holds_the_contract(row: str) -> None:
    plain, x = build(row), random(3, N_IN)
    before = snapshot(plain)
    model = li.inject(copy.deepcopy(plain), config("layer"))
    (spec,) = li.adapters(model)["default"].sites.values()
    assert (spec.kind, spec.update) == (row.split(maxsplit=1)[0], ROWS[row][1])
    assert same_bits(model(x), plain(x))
    assert isinstance(model.layer, type(plain.layer))
    assert [k for k in model.state_dict() if "lora_" not in k] == [*plain.state_dict()]

    fill(model)
    wide = with_deltas(plain, model)
    assert error(plain(x), wide(x)) > 0.01
    for training in (True, False):
        assert error(model.train(training)(x), wide(x)) < EXACT
    gradients(row, model, wide, x)

    li.merge(model)
    assert error(model(x), wide(x)) < EXACT
    li.unmerge(model)
    raw, first = model.layer._parameters[ROWS[row][2]], plain.layer._parameters[ROWS[row][2]]
    assert same_bits(raw, first)
    li.eject(fill(li.inject(plain, config("layer"))))
    assert snapshot(plain) == before


def gradients(row: str, model: nn.Module, wide: Net, x: Tensor) -> None:
    """dL/dA and dL/dB from the dense dL/dW, by hand."""
    model(x).square().sum().backward()
    wide(x).square().sum().backward()
    G = getattr(wide.layer, ROWS[row][2]).grad
    G = G.t() if G.shape == (N_IN, N_OUT) else G
    parameters = li.adapter_parameters(model)
    A, B = parameters["layer.lora_A"], parameters["layer.lora_B"]
    assert error(A.grad, SCALE * B.t() @ G) < EXACT
    assert error(B.grad, SCALE * G @ A.t()) < EXACT


def test_a_foreign_forward_mount_is_routed_and_switched() -> None:
    plain, x = build("test_dense"), random(4, N_IN)
    model = fill(li.inject(copy.deepcopy(plain), config("layer")))
    both = model(x)
    with li.routed(model, ["default", None, "default", None]):
        rows = model(x)
    assert error(rows[::2], both[::2]) < EXACT
    assert error(rows[1::2], plain(x)[1::2]) < EXACT
    with li.disabled(model):
        assert same_bits(model(x), plain(x))


class Multiplied(nn.Module):
    """What nn.Linear computes, in a class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(N_OUT, N_IN))
        self.bias = nn.Parameter(torch.randn(N_OUT))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t() + self.bias


class LoRAMultiplied(LoRALinear):
    kind = "test_multiplied"

    @classmethod
    def matches(cls, layer: type[nn.Module]) -> bool:
        return issubclass(layer, Multiplied)

    @staticmethod
    def geometry(module: nn.Module) -> Geometry:
        return Geometry(N_IN, N_OUT, (N_OUT, N_IN))

    @classmethod
    def adds_to_output(cls, module: nn.Module, *, stock: bool) -> bool:
        return isinstance(module, Multiplied)


@pytest.mark.parametrize("more", [{}, {"bias": "all"}, {"variant": "dora", "bias": "all"}], ids=str)
def test_a_foreign_kind_that_multiplies_is_routed_as_linear_layers_are(more) -> None:
    register_kind(LoRAMultiplied)
    model, x = nn.Sequential(Multiplied()), random(3, 6, N_IN)
    for name in "ab":
        fill(li.inject(model.double(), {"rank": 2, "targets": ["0"], **more}, name), name)
    wanted = []
    for i, name in enumerate(["a", "b", None]):
        li.activate(model, name)
        wanted.append(model(x[i : i + 1]))
    with li.routed(model, ["a", "b", None]):
        assert error(model(x), torch.cat(wanted)) < EXACT


@pytest.mark.parametrize("row", ["test_dense", "test_squared"])
def test_a_foreign_kind_copies_and_pickles(row: str, tmp_path: Path) -> None:
    model, x = fill(li.inject(build(row), config("layer"))), random(3, N_IN)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (copy.deepcopy(model), again):
        assert same_bits(other(x), model(x))
        assert li.adapters(other)["default"].sites == li.adapters(model)["default"].sites


@pytest.mark.parametrize("row", ["test_dense", "test_squared"])
def test_a_foreign_kind_travels_in_the_native_format(row: str, tmp_path: Path) -> None:
    plain, x = build(row), random(3, N_IN)
    model = fill(li.inject(copy.deepcopy(plain), config("layer", "after")))
    path, _ = saved(model, tmp_path, "native")
    again = li.load_adapter(copy.deepcopy(plain), path)
    assert same_bits(again(x), model(x))
    assert li.adapters(again)["default"].sites["layer"].kind == row


@pytest.mark.parametrize("row", ["test_dense", "test_squared"])
def test_a_foreign_kind_travels_in_a_peft_folder_or_is_refused(row: str, tmp_path: Path) -> None:
    """PEFT has no such layer: it is written only where it comes back right."""
    plain, x = build(row), random(3, N_IN)
    model = fill(li.inject(copy.deepcopy(plain), config("layer")))
    try:
        path, _ = saved(model, tmp_path, "peft")
    except li.FormatError as raised:
        assert "'layer'" in str(raised)  # noqa: PT017 - refused, or right
        assert "native" in raised.remedy  # noqa: PT017
        assert [*tmp_path.iterdir()] == []
        return
    assert same_bits(li.load_adapter(copy.deepcopy(plain), path)(x), model(x))


@pytest.mark.parametrize("row", ["test_dense", "test_squared"])
@pytest.mark.parametrize("layout", ["native", "peft"])
def test_where_the_class_is_missing_a_load_says_so(row: str, layout: str, tmp_path: Path) -> None:
    plain = build(row)
    model = fill(li.inject(copy.deepcopy(plain), config("layer")))
    try:
        path, _ = saved(model, tmp_path, layout)
    except li.FormatError:
        assert layout == "peft"
        return
    KINDS[:] = [row for row in KINDS if not row.kind.startswith("test_")]
    words = rf"'layer'.*{row}.*not registered here.*register_kind"
    refused(plain, lambda: li.load_adapter(plain, path), li.FormatError, words)
    register_kind(LoRADense)
    register_kind(LoRASquared)
    assert len(li.adapters(li.load_adapter(plain, path))["default"].sites) == 1


def test_a_foreign_kind_is_asked_before_the_built_in_ones() -> None:
    class Special(nn.Linear):
        pass

    class LoRASpecial(LoRALinear):
        kind = "test_special"

        @classmethod
        def matches(cls, layer: type[nn.Module]) -> bool:
            return issubclass(layer, Special)

    assert register_kind(LoRASpecial) is LoRASpecial
    planned = li.plan(nn.Sequential(Special(3, 3), nn.Linear(3, 3)), config(r"\d"))
    assert [s.kind for s in planned.sites] == ["test_special", "linear"]


def test_registering_the_same_class_again_replaces_it() -> None:
    n_rows = len(KINDS)
    register_kind(LoRADense)
    register_kind(LoRADense)
    assert len(KINDS) == n_rows


class NoKind(LoRALinear):
    pass


class NoCarrier(nn.Module):
    kind = "test_no_carrier"


class Taken(LoRALinear):
    kind = "linear"


class TakenForeign(LoRALinear):
    kind = "test_dense"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (NoKind, "not an Adapted class with a kind of its own"),
        (NoCarrier, "not an Adapted class with a kind of its own"),
        (Taken, "kind 'linear' is taken by .*LoRALinear"),
        (TakenForeign, "kind 'test_dense' is taken by .*LoRADense"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_what_is_not_a_kind_of_its_own_is_refused(row: Any, words: str) -> None:
    before = list(KINDS)
    with pytest.raises(li.LayerError, match=words):
        register_kind(row)
    assert before == KINDS
