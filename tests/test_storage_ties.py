"""Parameters over the same memory are tied, and no merge writes a part of another's."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import error, fill, same_bits, snapshot
from helpers.reference import with_deltas
from torch import Tensor, nn

import lora_inject as li

V, D = 7, 5
IDS = torch.tensor([[0, 3, 5], [2, 6, 1]])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(V, D)
        self.head = nn.Linear(D, V, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.emb(ids))


def assigned(model: Any) -> None:
    """What a tied checkpoint gives, loaded with `assign=True`."""
    W = model.emb.weight.detach()
    model.load_state_dict({"emb.weight": W, "head.weight": W}, assign=True)


TIES: dict[str, Callable[[Any], None]] = {
    "assign": assigned,
    "another Parameter": lambda m: setattr(m.head, "weight", nn.Parameter(m.emb.weight)),
    "data": lambda m: setattr(m.head.weight, "data", m.emb.weight.data),
}


@pytest.mark.parametrize("targets", [["head"], ["emb"], ["head", "emb"]], ids=str)
@pytest.mark.parametrize("tie", TIES)
def test_merging_unties_and_unmerging_ties_again(tie: str, targets: list[str]) -> None:
    torch.manual_seed(0)
    plain = Tied().double()
    TIES[tie](plain)
    assert plain.head.weight is not plain.emb.weight
    assert plain.head.weight.data_ptr() == plain.emb.weight.data_ptr()
    model: Any = fill(li.inject(plain, {"rank": 2, "alpha": 3.0, "targets": targets}))
    wide: Any = copy.deepcopy(model)
    li.eject(wide)
    wide.head.weight = nn.Parameter(wide.head.weight.detach().clone())
    wide = with_deltas(wide, model)
    assert error(model(IDS), wide(IDS)) < 1e-12
    before, emb = snapshot(model), model.emb._parameters["weight"].detach().clone()
    li.merge(model)
    assert error(model(IDS), wide(IDS)) < 1e-12
    if targets == ["head"]:
        assert same_bits(model.emb._parameters["weight"], emb)
    li.unmerge(model)
    assert snapshot(model) == before
    head, table = (m._parameters["weight"] for m in (model.head, model.emb))
    assert head.data_ptr() == table.data_ptr()


def test_a_trained_copy_is_read_under_both_names() -> None:
    torch.manual_seed(0)
    model = Tied().double()
    TIES["assign"](model)
    li.inject(model, {"targets": [], "train": [r"emb\.weight"]})
    with torch.no_grad():
        li.adapter_parameters(model)["emb.weight"].normal_()
    T = li.adapter_parameters(model)["emb.weight"]
    assert error(model(IDS), T[IDS] @ T.t()) < 1e-12


def test_merging_into_memory_that_overlaps_in_part_is_refused() -> None:
    model = Tied()
    whole = torch.randn(2 * V, D)
    model.emb.weight, model.head.weight = nn.Parameter(whole[:V]), nn.Parameter(whole[3 : V + 3])
    for name, other in (("head", "emb"), ("emb", "head")):
        fill(li.inject(model, {"rank": 2, "targets": [name]}))
        before = snapshot(model)
        with pytest.raises(li.LayerError, match=rf"'{name}\.weight'.*memory.*'{other}\.weight'"):
            li.merge(model)
        assert snapshot(model) == before
        li.eject(model)


@pytest.mark.parametrize("rows", [V, 2])
def test_merging_into_memory_that_a_buffer_holds_is_refused(rows: int) -> None:
    model = Tied()
    model.register_buffer("kept", model.head.weight.detach()[:rows])
    fill(li.inject(model, {"rank": 2, "targets": ["head"]}))
    before = snapshot(model)
    with pytest.raises(li.LayerError, match=r"'head\.weight'.*memory.*'kept'"):
        li.merge(model)
    assert snapshot(model) == before


def test_neighbors_in_one_buffer_are_not_tied() -> None:
    model = Tied()
    whole = torch.randn(2 * V, D)
    model.emb.weight, model.head.weight = nn.Parameter(whole[:V]), nn.Parameter(whole[V:])
    li.inject(model, {"rank": 2, "targets": ["head", "emb"]})
    assert li.plan(model, {"rank": 1, "targets": ["head"]}).tied == ()


@pytest.mark.parametrize("untie", ["merge", "load"])
def test_eject_gives_the_flag_back_under_every_name_of_a_tie(untie: str) -> None:
    model = Tied()
    model.head.weight = model.emb.weight
    fill(li.inject(model, {"rank": 2, "targets": ["head"]}))
    if untie == "merge":
        li.merge(model)
    else:
        values = {name: torch.randn(V, D) for name in ("emb.weight", "head.weight")}
        model.load_state_dict(values, assign=True)
    li.eject(model)
    assert model.head.weight is not model.emb.weight
    assert model.head.weight.requires_grad
    assert model.emb.weight.requires_grad
