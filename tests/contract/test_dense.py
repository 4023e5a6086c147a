"""One truth: each kind of layer, in each condition, computes what its dense float64 twin does."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOLERANCE, error, fill
from helpers.refusals import refused
from torch import Tensor, nn

import lora_inject as li
from contract.conditions import CONDITIONS, Condition
from contract.kinds import KINDS, Kind, host, twin


def cases(*, refused: bool) -> list[Any]:
    return [
        pytest.param(
            kind,
            condition,
            id=f"{condition}: {kind}",
            marks=[pytest.mark.slow] if condition == "compiled" else [],
        )
        for condition, how in CONDITIONS.items()
        for kind in how.kinds
        if (kind in how.refused) is refused
    ]


def called(how: Condition, kind: Kind, model: nn.Module, inputs: list[Tensor]) -> Tensor:
    with how.around(model):
        return how.call(model, kind, inputs)


def wanted_of(
    how: Condition,
    kind: Kind,
    plain: nn.Module,
    tensors: dict[str, Tensor],
    inputs: list[Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """What the dense twin says, and the leaves of its base."""
    numbers = {"scale": how.scale, "weight": how.weight, "beside": how.beside}
    output, base = twin(kind, plain, tensors, inputs, **numbers)
    if how.rows is None:
        return output, base
    rows = torch.tensor(how.rows).view(-1, *[1] * (output.dim() - 1))
    without, _ = twin(kind, plain, tensors, inputs, weight=0.0)
    return torch.where(rows, output, without), base


def hold_to_twin(kind: str, condition: str, folder: Path, device: str = "cpu") -> None:
    """Compare outputs, and gradients of the adapter and of the inputs, with those of the twin."""
    row, how = KINDS[kind], CONDITIONS[condition]
    plain = host(row, how.born or how.dtype)
    model = fill(li.inject(copy.deepcopy(plain), {**row.config, **how.config}))
    if how.given is not None:
        state = how.given(copy.deepcopy(li.adapter_state(model)))
        li.train_only(li.install(li.eject(model), state), "default")
    tensors = li.adapter_state(model).sites[row.site].tensors
    wide = {role: t.detach().clone().double().requires_grad_() for role, t in tensors.items()}
    model = how.after(model, copy.deepcopy(plain), folder).to(device)
    plain = plain.to(how.dtype)

    inputs = [how.inputs(x).to(device) for x in row.inputs(how.dtype)]
    copies = [x.cpu().clone() for x in inputs]  # a float64 x would else be its own twin
    wide_inputs = [x.double() if x.is_floating_point() else x for x in copies]
    for x in (*inputs, *wide_inputs):
        x.requires_grad_(x.is_floating_point())
    wanted, base = wanted_of(how, row, plain, wide, wide_inputs)
    y = called(how, row, model, inputs)
    # A device sums in an order of its own.
    limit = TOLERANCE[how.rounds or how.dtype] * (1 if device == "cpu" else 4)
    assert error(y.cpu(), wanted) <= limit
    with torch.no_grad(), how.around(model):
        assert y.dtype == plain.to(device)(*inputs).dtype

    g = torch.randn(y.shape).to(y.dtype)
    wanted.backward(g.double())
    pairs = list(zip(inputs, wide_inputs, strict=True))
    if how.trains.startswith("adapter"):
        tuned = li.adapter_parameters(model, "default")
        assert {p.dtype for p in tuned.values()} == {torch.promote_types(how.dtype, torch.float32)}
        pairs += [(tuned[f"{row.site}.lora_{r}"], wide[r]) for r in "ABm" if r in wide]
    if how.trains == "adapter and base":
        pairs += [(p, base[key]) for key, p in model.named_parameters() if key in base]
    pairs = [(leaf, due) for leaf, due in pairs if due.grad is not None]
    if how.trains != "nothing" and pairs:
        y.backward(g.to(device))
        for leaf, due in pairs:
            assert (leaf.grad.dtype, leaf.grad.device) == (leaf.dtype, leaf.device)
            assert error(leaf.grad.cpu(), due.grad) <= limit
    if how.trains == "adapter":
        due = {id(leaf) for leaf, _ in pairs}
        assert all(p.grad is None or id(p) in due for p in model.parameters())


@pytest.mark.parametrize(("kind", "condition"), cases(refused=False))
def test_it_computes_and_trains_as_its_dense_twin(
    kind: str, condition: str, tmp_path: Path
) -> None:
    hold_to_twin(kind, condition, tmp_path)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize(("kind", "condition"), cases(refused=True))
def test_what_a_kind_has_not_is_refused_and_changes_nothing(
    kind: str, condition: str, tmp_path: Path
) -> None:
    row, how = KINDS[kind], CONDITIONS[condition]
    model = host(row, how.dtype)
    if how.config:
        with refused(how.refused[kind], row.site, model=model):
            li.inject(model, {**row.config, **how.config})
        return
    if how.given is not None:
        state = how.given(li.adapter_state(li.inject(host(row, how.dtype), row.config)))
        with refused(how.refused[kind], "lora_bias", model=model):
            li.install(model, state, base="any")
        return
    fill(li.inject(model, row.config))
    with refused(how.refused[kind], model=model):
        called(how, row, how.after(model, host(row), tmp_path), list(row.inputs(how.dtype)))
    assert not any(tmp_path.iterdir())


def test_the_delta_is_seen() -> None:
    """Each kind's update moves its output by more than any tolerance."""
    for name, row in KINDS.items():
        plain, inputs = host(row, torch.float64), row.inputs(torch.float64)
        model = fill(li.inject(copy.deepcopy(plain), row.config))
        assert error(plain(*inputs), model(*inputs)) > 0.05, name
