"""An adapter as a value: it compares by content, copies, pickles and prints short."""

import copy
import dataclasses
from types import MappingProxyType

import pytest
import torch
from conftest import COPIES
from torch import nn

import lora_inject as li
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.spec.sites import signed_pairs


def _state(init: str = "pissa") -> AdapterState:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    li.inject(net, {"rank": 2, "init": init, "targets": ["0"], "train": [r"2\.bias"]})
    return li.adapter_state(net)


@pytest.mark.parametrize("copied", [copy.copy, *COPIES.values()])
def test_a_copy_is_equal_with_read_only_mappings_too(copied):
    state = dataclasses.replace(_state(), base_copies=MappingProxyType({"w": torch.ones(2)}))
    assert copied(state) == state


def test_equality_looks_at_every_tensor_its_dtype_and_every_number():
    state = _state()
    assert state == _state()
    site = state.sites["0"]
    other = [
        dataclasses.replace(site, A=site.A + 1),
        dataclasses.replace(site, B0=site.B0 + 1),
        dataclasses.replace(site, A0=None, B0=None),
        dataclasses.replace(site, B=site.B.double()),
        dataclasses.replace(site, spec=dataclasses.replace(site.spec, alpha=3.0)),
    ]
    for changed in other:
        assert changed != site
        assert dataclasses.replace(state, sites={"0": changed}) != state
    assert dataclasses.replace(state, sites={"1": site}) != state
    assert dataclasses.replace(state, trained={"2.bias": torch.ones(4)}) != state
    assert dataclasses.replace(state, fingerprint=None) != state
    assert state != "a state"
    with pytest.raises(TypeError, match="unhashable"):
        hash(state)


def test_its_repr_counts_and_prints_no_values():
    assert repr(_state()) == "AdapterState(1 site, rank 2, 1 trained tensor, 32 parameters)"
    shown = "AdapterState(0 sites, rank 0, 0 trained tensors, 0 parameters)"
    assert repr(AdapterState({})) == shown


def test_the_signed_pairs_of_a_frozen_start_add_up_to_nothing_at_the_start():
    site = _state("olora").sites["0"]
    assert torch.equal(sum(sign * B @ A for A, B, sign in site.pairs), torch.zeros(8, 6))
    assert list(site.tensors) == ["A", "B", "A0", "B0"]
    assert signed_pairs("A", "B", None, None) == (("A", "B", 1.0),)
