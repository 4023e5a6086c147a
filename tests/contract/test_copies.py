"""Copies: pickle, deepcopy, torch.save. That one is apart from its original: the state machine."""

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import COPIES, fill, same_bits
from helpers.forks import Forks
from helpers.refusals import refused
from torch import nn

import lora_inject as li
from contract.kinds import KINDS, injected

every_copy = pytest.mark.parametrize("copied", COPIES.values(), ids=list(COPIES))


@every_copy
def test_a_copy_made_inside_a_context_is_refused(copied: Any) -> None:
    """A reference for DPO that was copied inside `disabled` had its adapter on."""
    model, x = injected(KINDS["linear"]), torch.randn(1, 5)
    wanted, other = model(x), injected(KINDS["linear"])
    for context in (li.routed(model, [None]), li.disabled(model)):
        with context:
            for which in (model, model.layer):
                with refused(li.StateError, "disabled()", "eject(copy)"):
                    copied(which)
            copied(other)
            with ThreadPoolExecutor(1) as thread:  # which is in no context
                apart = thread.submit(copied, model).result()
        assert same_bits(apart(x), wanted)
    assert same_bits(copied(model)(x), wanted)


@every_copy
def test_a_copy_of_one_layer_works_alone(copied: Any) -> None:
    model, x = injected(KINDS["equal slices"]), torch.randn(2, 5)
    wanted, layer = model(x), copied(model.layer)
    assert type(layer) is type(model.layer)
    assert same_bits(layer(x), wanted)
    with refused(li.StateError, "eject"):  # no root says whose it is
        li.activate(layer, None)
    assert type(li.eject(layer)) is nn.Linear
    assert same_bits(model(x), wanted)


@pytest.mark.parametrize("looked", [True, False])
def test_a_copy_of_a_layer_is_not_left_out_in_silence(looked: bool, tmp_path: Path) -> None:
    """No file held its adapter, a merged and ejected model kept it, and it stayed on."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    fill(li.inject(model, {"rank": 2, "targets": ["0"]}))
    if looked:
        li.activate(model, "default")  # looks at all layers
    model.append(copy.deepcopy(model[0]))
    for verb in (
        lambda: li.disabled(model).__enter__(),
        lambda: li.activate(model, None),
        lambda: li.save_adapter(model, tmp_path / "a"),
        lambda: li.merge(model),
        lambda: li.swap_adapter(model, li.AdapterState({})),
    ):
        with refused(li.StateError, "'2'", model=model):
            verb()
    again = {"rank": 1, "targets": ["0"]}
    with refused(li.StateError, "'b'", model=model):
        li.inject(model, again, "b")
    li.eject(model[2])
    assert list(li.adapter_state(model).sites) == ["0"]
    model[2] = copy.deepcopy(model[0])
    li.eject(model)
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear]


def load_and_compare(file: Path) -> None:
    saved = torch.load(file, weights_only=False)
    assert torch.equal(saved["layer"](saved["x"]), saved["y"])


def test_a_pickle_is_read_in_a_process_that_never_injected(tmp_path: Path, forks: Forks) -> None:
    model, x = injected(KINDS["linear"]), torch.randn(2, 5)
    torch.save({"layer": model.layer, "x": x, "y": model(x)}, tmp_path / "m.pt")
    forks.start(load_and_compare, tmp_path / "m.pt").result()


class Short(nn.Linear):
    """A layer whose copies are built again."""

    def __getstate__(self) -> tuple[int, int]:
        return self.in_features, self.out_features

    def __setstate__(self, state: tuple[int, int]) -> None:
        super().__init__(*state)


@every_copy
def test_a_layer_that_pickles_without_its_adapters_is_refused(copied: Any) -> None:
    with refused(li.LayerError, "__getstate__"):
        copied(li.inject(nn.Sequential(Short(4, 4)), {"rank": 1, "targets": ["0"]}))
