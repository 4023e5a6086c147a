"""Copies: pickle, deepcopy, torch.save, state dicts; a copy is whole, and apart from its original.

What a copy goes on to compute and to list after any verbs holds the state machine.
"""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import COPIES, KINDS, error, fill, injected, same_bits, snapshot
from helpers.forks import Forks
from helpers.models import IDS, OTHER, SEVERAL, Several
from torch import nn

import lora_inject as li
from lora_inject.core.layers.swapped_class import _CLASSES

every_copy = pytest.mark.parametrize("copied", COPIES.values(), ids=list(COPIES))


def build() -> Several:
    torch.manual_seed(0)
    model = Several()
    fill(li.inject(model, SEVERAL, "one"), "one")
    fill(li.inject(model, OTHER, "tw.o"), "tw.o")
    li.train_only(model, "one")
    return li.activate(model, {"one": 0.5, "tw.o": 1.5}).eval()


def through_state_dict(model: Any) -> Any:
    """Into another model with the same adapters and other values."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    return other


@pytest.mark.parametrize("copied", [*COPIES.values(), through_state_dict])
def test_a_copy_is_apart_from_its_original(copied: Any) -> None:
    model = build()
    before, listed, wanted = snapshot(model), li.summary(model), model(IDS)
    other, last = copied(model), copied(model)
    li.activate(other, "one")
    li.train_only(other, "tw.o")
    fill(fill(other, "one"), "tw.o")
    li.merge(other)
    li.eject(other)
    assert snapshot(model) == before
    assert li.summary(model) == listed
    assert same_bits(model(IDS), wanted)
    li.eject(model)
    assert same_bits(last(IDS), wanted)


@every_copy
def test_a_copy_made_inside_a_context_is_whole(copied: Any) -> None:
    model, x = injected(KINDS["linear"]), torch.randn(1, 5)
    wanted = model(x)
    with li.routed(model, [None]):
        other, base = copied(model), model(x)
    for which, output in (("default", wanted), (None, base)):
        assert same_bits(li.activate(other, which)(x), output)
    assert same_bits(model(x), wanted)


@every_copy
def test_a_copy_of_one_layer_works_alone(copied: Any) -> None:
    model, x = injected(KINDS["equal slices"]), torch.randn(2, 5)
    wanted, layer = model(x), copied(model.layer)
    assert type(layer) is type(model.layer)
    assert same_bits(layer(x), wanted)
    assert not same_bits(li.activate(layer, None)(x), wanted)
    assert same_bits(model(x), wanted)
    assert type(li.eject(layer)) is nn.Linear


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_copies_and_pickles(kind: str) -> None:
    model, inputs = injected(KINDS[kind]), KINDS[kind].inputs(torch.float32)
    wanted = model(*inputs)
    for copied in (*COPIES.values(), copy.copy):
        assert same_bits(copied(model)(*inputs), wanted)


def deeper() -> tuple[nn.Sequential, nn.Sequential]:
    """A model, and an adapted copy that was made deeper by a copy of its layer."""
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model = fill(li.inject(copy.deepcopy(plain), {"rank": 2, "targets": ["0"]}))
    li.activate(model, "default")  # keeps a walk of the model
    model.append(copy.deepcopy(model[0]))
    return nn.Sequential(*plain, copy.deepcopy(plain[0])), model


def test_a_copy_of_a_layer_beside_the_original_is_switched_with_it() -> None:
    """Its layers went on after disabled() and activate(model, None)."""
    plain, model = deeper()
    x, W = torch.randn(3, 4), model[0].weight.detach()
    due = torch.relu(x @ W.T + plain[0].bias) @ W.T + plain[0].bias
    torch.testing.assert_close(model(x), due)
    with li.disabled(model):
        assert same_bits(model(x), plain(x))
    li.activate(model, None)
    assert same_bits(model(x), plain(x))


def test_a_copy_of_a_layer_is_not_left_out_in_silence(tmp_path: Path) -> None:
    """No file held its adapter, and a merged and ejected model kept it."""
    _, model = deeper()
    before = snapshot(model)
    for verb in (
        lambda: li.save_adapter(model, tmp_path / "a"),
        lambda: li.merge(model),
        lambda: li.swap_adapter(model, li.AdapterState({})),
    ):
        with pytest.raises(li.StateError, match=r"layer '2' has it, too, .* it is a copy"):
            verb()
    with pytest.raises(li.StateError, match="Eject those first"):
        li.inject(model, {"rank": 1, "targets": ["0"]}, "b")
    assert snapshot(model) == before
    li.eject(model[2])
    assert list(li.adapter_state(model).sites) == ["0"]
    model[2] = copy.deepcopy(model[0])
    li.eject(model)
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert len(model.state_dict()) == 4


def load_and_compare(file: Path) -> None:
    assert not any(issubclass(c, nn.Linear) for c in _CLASSES.values()), "none was injected"
    saved = torch.load(file, weights_only=False)
    assert torch.equal(saved["layer"](saved["x"]), saved["y"])
    assert type(saved["layer"]) is not nn.Linear


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


class Whole(nn.Linear):
    """A layer that changes what it pickles."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "noted": 1}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({key: value for key, value in state.items() if key != "noted"})


@every_copy
def test_a_layer_that_pickles_without_its_adapters_is_refused(copied: Any) -> None:
    config = {"rank": 1, "targets": ["0"]}
    with pytest.raises(li.LayerError, match="copy or pickle of a Short: its own __getstate__ leav"):
        copied(li.inject(nn.Sequential(Short(4, 4)), config))
    model, x = fill(li.inject(nn.Sequential(Whole(4, 4)), config)), torch.ones(1, 4)
    assert same_bits(copied(model)(x), model(x))


# ------------------------------------------------------------------------------------------ compile

COMPILED = ["linear", "conv1d", "embedding", "unequal slices", "conv 2d", "own linear forward",
            "turned experts", "scaled embedding"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", COMPILED)
def test_compiled_forward_and_backward_without_a_graph_break(kind: str) -> None:
    torch._dynamo.reset()
    model, inputs = injected(KINDS[kind]), KINDS[kind].inputs(torch.float32)
    tensors = [*li.adapter_parameters(model).values()]
    tensors += [x.requires_grad_() for x in inputs if x.is_floating_point()]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ys = [run(*inputs) for run in (model, compiled)]
    g = torch.randn_like(ys[0])
    grads = [torch.autograd.grad(y, tensors, g) for y in ys]
    assert error(ys[1], ys[0]) < 1e-5
    assert all(error(one, other) < 1e-5 for one, other in zip(*grads, strict=True))
    with torch.no_grad():
        assert error(compiled(*inputs), ys[0]) < 1e-5
