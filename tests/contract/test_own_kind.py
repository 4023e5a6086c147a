"""A kind of layer from outside the package is held to what the built-in ones are held to."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import error, fill, same_bits, snapshot, through_torch_save
from helpers.forks import Forks
from helpers.recomputing import RECOMPUTE
from helpers.reference import EXACT, config, hold, random, saved, with_deltas
from helpers.refusals import refused
from torch import Tensor, nn

import lora_inject as li

N_IN, N_OUT = 5, 4


class Dense(nn.Module):
    """Linear in its kernel `(in, out)`, but no `nn.Linear`."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.recompute: Any = None
        self.kernel = nn.Parameter(torch.randn(N_IN, N_OUT))
        self.offset = nn.Parameter(torch.randn(N_OUT))
        self.gain = gain

    def forward(self, x: Tensor, residual: Tensor | float = 0.0) -> Tensor:
        part = lambda x: self.gain * (x @ self.kernel)  # noqa: E731
        y = part(x) if self.recompute is None else self.recompute(part, x)
        return y + self.offset + residual


class Squared(nn.Module):
    """Not linear in its weight at all."""

    def __init__(self) -> None:
        super().__init__()
        self.recompute: Any = None
        self.table = nn.Parameter(torch.randn(N_OUT, N_IN))

    def forward(self, x: Tensor) -> Tensor:
        part = lambda x: x @ (self.table * self.table.abs()).t()  # noqa: E731
        return part(x) if self.recompute is None else self.recompute(part, x)


class LoRADense(li.extending.LoRALinear):
    """Adds to the output."""

    kind, weight_name, transposed = "test_dense", "kernel", True

    @classmethod
    def matches(cls, layer: type[nn.Module]) -> bool:
        return issubclass(layer, Dense)

    @staticmethod
    def geometry(module: nn.Module) -> li.extending.Geometry:
        return li.extending.Geometry(N_IN, N_OUT, (N_IN, N_OUT), transposed=True)

    @classmethod
    def adds_to_output(cls, module: nn.Module, *, stock: bool) -> bool:
        return isinstance(module, Dense) and module.gain == 1.0


class LoRASquared(li.extending.WeightUpdate):
    """Is read as W + delta."""

    kind, weight_name = "test_squared", "table"

    @classmethod
    def matches(cls, layer: type[nn.Module]) -> bool:
        return issubclass(layer, Squared)

    @staticmethod
    def geometry(module: nn.Module) -> li.extending.Geometry:
        return li.extending.Geometry(N_IN, N_OUT, (N_OUT, N_IN))


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    """For the rest of the process: no other test has such layers."""
    li.extending.register_kind(LoRADense)
    li.extending.register_kind(LoRASquared)


# A layer, its kind, and how its update mounts.
ROWS: dict[str, tuple[Any, str, str]] = {
    "adds": (Dense, "test_dense", "forward"),
    "reads": (Squared, "test_squared", "weight"),
    "with a gain": (lambda: Dense(2.0), "test_dense", "weight"),
}


def build(row: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(ROWS[row][0](), nn.Linear(N_OUT, 2)).double()


@pytest.mark.parametrize("row", ROWS)
def test_a_foreign_kind_holds_the_contract(row: str) -> None:
    plain, x = build(row), random(3, N_IN)
    before = snapshot(plain)
    model = li.inject(copy.deepcopy(plain), config("0"))
    (spec,) = li.adapters(model)["default"].sites.values()
    assert (spec.kind, spec.update) == ROWS[row][1:]
    assert same_bits(model(x), plain(x))
    assert isinstance(model[0], type(plain[0]))
    hold(plain, fill(model), lambda m: m(x))
    li.eject(fill(li.inject(plain, config("0"))))
    assert snapshot(plain) == before


def test_a_foreign_kind_that_adds_to_the_output_is_routed_and_takes_its_input_by_name() -> None:
    plain, x, residual = build("adds"), random(4, N_IN), random(4, N_OUT)
    model: Any = fill(li.inject(copy.deepcopy(plain), config("0")))
    wide: Any = with_deltas(plain, model)
    assert error(model[0](residual=residual, x=x), wide[0](x, residual)) < EXACT
    with li.routed(model, ["default", None, "default", None]):
        rows = model(x)
    assert error(rows[::2], wide(x)[::2]) < EXACT
    assert error(rows[1::2], plain(x)[1::2]) < EXACT


@pytest.mark.parametrize("how", [how for how in RECOMPUTE if how != "hooks"])
@pytest.mark.parametrize("row", ROWS)
def test_a_layer_that_checkpoints_its_own_product_trains_right_or_is_refused(
    row: str, how: str
) -> None:
    """The update was added twice: once by the recomputation's read, once to the output."""
    model: Any = fill(li.inject(build(row), config("0"))).train()
    x = random(3, N_IN).requires_grad_()
    leaves = [x, *li.adapter_parameters(model).values()]
    wanted = torch.autograd.grad(model(x).square().sum(), leaves)
    RECOMPUTE[how](model, x).square().sum().backward()  # the whole layer
    assert all(error(t.grad, due) < EXACT for t, due in zip(leaves, wanted, strict=True))
    for leaf in leaves:
        leaf.grad = None
    model[0].recompute = RECOMPUTE[how]
    if row == "adds" and how == "a Function":
        with refused(li.LayerError, "Dense", "torch.utils.checkpoint"):
            model(x)
        return
    model(x).square().sum().backward()
    assert all(error(t.grad, due) < EXACT for t, due in zip(leaves, wanted, strict=True))


def load_where_it_is_not_registered(plain: nn.Module, path: Path, kind: str) -> None:
    with refused(li.FormatError, "'0'", kind, "register_kind", model=plain):
        li.load_adapter(plain, path)


@pytest.mark.parametrize("row", ["adds", "reads"])
def test_a_foreign_kind_travels_and_where_its_class_is_missing_a_load_says_so(
    row: str, tmp_path: Path, forks: Forks
) -> None:
    """PEFT has no such layer."""
    plain, x, kind = build(row), random(3, N_IN), ROWS[row][1]
    model = fill(li.inject(copy.deepcopy(plain), config("0", "1")))
    path, _ = saved(model, tmp_path, "native")
    with refused(li.FormatError, "'0'", "native"):
        saved(model, tmp_path, "peft")
    for other in (through_torch_save(model), li.load_adapter(copy.deepcopy(plain), path)):
        assert same_bits(other(x), model(x))
        assert li.adapters(other)["default"].sites["0"].kind == kind
    forks.start(load_where_it_is_not_registered, plain, path, kind).result()


def test_a_foreign_kind_is_asked_before_the_built_in_ones() -> None:
    class Special(nn.Linear):
        pass

    class LoRASpecial(li.extending.LoRALinear):
        kind = "test_special"

        @classmethod
        def matches(cls, layer: type[nn.Module]) -> bool:
            return issubclass(layer, Special)

    for _ in range(2):  # the second time it takes its own place
        assert li.extending.register_kind(LoRASpecial) is LoRASpecial
    planned = li.plan(nn.Sequential(Special(3, 3), nn.Linear(3, 3)), config(r"\d"))
    assert [s.kind for s in planned.sites] == ["test_special", "linear"]


@pytest.mark.parametrize(
    ("of_its_own", "names"),
    [({}, ("Own",)), ({"kind": "linear"}, ("'linear'", "LoRALinear"))],
)
def test_what_is_not_a_kind_of_its_own_is_refused(of_its_own: Any, names: tuple[str, ...]) -> None:
    with refused(li.LayerError, *names):
        li.extending.register_kind(type("Own", (li.extending.LoRALinear,), of_its_own))
    planned = li.plan(nn.Sequential(nn.Linear(3, 3)), config("0"))
    assert [site.kind for site in planned.sites] == ["linear"]
