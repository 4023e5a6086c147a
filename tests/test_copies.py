"""Copies: pickle, deepcopy, torch.save. That one is apart from its original: the state machine."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import COPIES, error, fill, same_bits
from contract.kinds import KINDS, injected
from helpers.forks import Forks
from helpers.reference import refused
from torch import Tensor, nn

import lora_inject as li
from lora_inject.core.layers.swapped_class import _CLASSES

every_copy = pytest.mark.parametrize("copied", COPIES.values(), ids=list(COPIES))


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


def deeper() -> Any:
    """An adapted model that was made deeper by a copy of its layer."""
    model = fill(
        li.inject(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), {"rank": 2, "targets": ["0"]})
    )
    li.activate(model, "default")  # keeps a walk of the model
    return model.append(copy.deepcopy(model[0]))


def test_a_copy_of_a_layer_beside_the_original_is_switched_with_it() -> None:
    """Its layers went on after disabled() and activate(model, None)."""
    model, x = deeper(), torch.randn(3, 4)

    def due(W: Tensor) -> Tensor:
        return torch.relu(x @ W.T + model[0].bias) @ W.T + model[0].bias

    torch.testing.assert_close(model(x), due(model[0].weight.detach()))
    W = model[0].get_parameter("weight")
    with li.disabled(model):
        torch.testing.assert_close(model(x), due(W))
    torch.testing.assert_close(li.activate(model, None)(x), due(W))


def test_a_copy_of_a_layer_is_not_left_out_in_silence(tmp_path: Path) -> None:
    """No file held its adapter, and a merged and ejected model kept it."""
    model = deeper()
    for verb in (
        lambda: li.save_adapter(model, tmp_path / "a"),
        lambda: li.merge(model),
        lambda: li.swap_adapter(model, li.AdapterState({})),
    ):
        refused(model, verb, li.StateError, r"layer '2' has it, too, .* it is a copy")
    again = {"rank": 1, "targets": ["0"]}
    refused(model, lambda: li.inject(model, again, "b"), li.StateError, "Eject those first")
    li.eject(model[2])
    assert list(li.adapter_state(model).sites) == ["0"]
    model[2] = copy.deepcopy(model[0])
    li.eject(model)
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear]


def load_and_compare(file: Path) -> None:
    assert not any(issubclass(c, nn.Linear) for c in _CLASSES.values()), "none was injected"
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
    with pytest.raises(li.LayerError, match="copy or pickle of a Short: its own __getstate__ leav"):
        copied(li.inject(nn.Sequential(Short(4, 4)), {"rank": 1, "targets": ["0"]}))


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
