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

    def forward(self, x: Tensor, residual: Tensor | float = 0.0) -> Tensor:
        return self.gain * (x @ self.kernel) + self.offset + residual


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
        self.layer, self.after = layer, nn.Linear(N_OUT, 2)

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
    """Is read as W + delta."""

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


def test_a_foreign_kind_that_adds_to_the_output_is_routed_and_takes_its_input_by_name() -> None:
    plain, x, residual = build("test_dense"), random(4, N_IN), random(4, N_OUT)
    model: Any = fill(li.inject(copy.deepcopy(plain), config("layer")))
    wide: Any = with_deltas(plain, model)
    wanted = wide.layer(x, residual)
    assert error(model.layer(residual=residual, x=x), wanted) < EXACT
    assert error(model.layer(x, residual), wanted) < EXACT
    with li.routed(model, ["default", None, "default", None]):
        rows = model(x)
    assert error(rows[::2], wide(x)[::2]) < EXACT
    assert error(rows[1::2], plain(x)[1::2]) < EXACT


@pytest.mark.parametrize("row", ["test_dense", "test_squared"])
def test_a_foreign_kind_travels_and_where_its_class_is_missing_a_load_says_so(
    row: str, tmp_path: Path
) -> None:
    """PEFT has no such layer."""
    plain, x = build(row), random(3, N_IN)
    model = fill(li.inject(copy.deepcopy(plain), config("layer", "after")))
    torch.save(model, tmp_path / "model.pt")
    path, _ = saved(model, tmp_path, "native")
    others = [copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)]
    others.append(li.load_adapter(copy.deepcopy(plain), path))
    with pytest.raises(li.FormatError, match="'layer'") as raised:
        saved(model, tmp_path, "peft")
    assert "native" in raised.value.remedy
    for other in others:
        assert same_bits(other(x), model(x))
        assert li.adapters(other)["default"].sites["layer"].kind == row
    KINDS[:] = [each for each in KINDS if not each.kind.startswith("test_")]
    words = rf"'layer'.*{row}.*not registered here.*register_kind"
    refused(plain, lambda: li.load_adapter(plain, path), li.FormatError, words)


def test_a_foreign_kind_is_asked_before_the_built_in_ones() -> None:
    class Special(nn.Linear):
        pass

    class LoRASpecial(LoRALinear):
        kind = "test_special"

        @classmethod
        def matches(cls, layer: type[nn.Module]) -> bool:
            return issubclass(layer, Special)

    assert register_kind(LoRASpecial) is LoRASpecial
    n_rows = len(KINDS)
    register_kind(LoRASpecial)
    assert len(KINDS) == n_rows, "it takes its own place"
    planned = li.plan(nn.Sequential(Special(3, 3), nn.Linear(3, 3)), config(r"\d"))
    assert [s.kind for s in planned.sites] == ["test_special", "linear"]


@pytest.mark.parametrize(
    ("base", "of_its_own", "words"),
    [
        (LoRALinear, {}, "not an Adapted class with a kind of its own"),
        (nn.Module, {"kind": "test_no_carrier"}, "not an Adapted class with a kind of its own"),
        (LoRALinear, {"kind": "linear"}, "kind 'linear' is taken by .*LoRALinear"),
        (LoRALinear, {"kind": "test_dense"}, "kind 'test_dense' is taken by .*LoRADense"),
    ],
    ids=["no kind", "no carrier", "taken", "taken by another"],
)
def test_what_is_not_a_kind_of_its_own_is_refused(base: Any, of_its_own: Any, words: str) -> None:
    before = list(KINDS)
    with pytest.raises(li.LayerError, match=words):
        register_kind(type("Own", (base,), of_its_own))
    assert before == KINDS
