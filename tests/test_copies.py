"""Copies and round trips in any order: pickle, deepcopy, torch.save, state dicts, files, compile.

After any sequence of round trips the model computes the same bits under every selection,
lists the same adapters, and can go on: switch, train, merge, eject.
"""

import copy
import io
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import COPIES, KINDS, error, fill, injected, same_bits, snapshot
from helpers.forks import Forks
from helpers.models import IDS, SEVERAL, Several
from torch import Tensor, nn

import lora_inject as li
from lora_inject.core.layers.survey import Survey
from lora_inject.core.layers.swapped_class import _CLASSES
from lora_inject.core.model import carried

ONE = {**SEVERAL, "alpha": 5, "targets": [*SEVERAL["targets"], "own"]}
TWO = {"rank": 1, "scaling": "rslora", "targets": ["fc", "conv"], "init": "pissa", "alpha": 2}
MIX = {"one": 0.5, "tw.o": 1.5}


def build() -> Several:
    torch.manual_seed(0)
    model = Several()
    fill(li.inject(model, ONE, "one"), "one")
    fill(li.inject(model, TWO, "tw.o"), "tw.o")
    li.train_only(model, "one")
    return li.activate(model, MIX).eval()


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


def through_files(model: Any) -> Any:
    """Each adapter saved, ejected and loaded again."""
    weights = {name: info.weight for name, info in li.adapters(model).items()}
    with tempfile.TemporaryDirectory() as parent:
        for i, name in enumerate(weights):
            li.save_adapter(model, Path(parent) / f"{i}.safetensors", name, format="native")
        li.eject(model)
        for i, name in enumerate(weights):
            li.load_adapter(model, Path(parent) / f"{i}.safetensors", name)
    li.train_only(model, "one")
    return li.activate(model, {n: w for n, w in weights.items() if w is not None})


def through_merge(model: Any) -> Any:
    li.merge(model)
    return li.unmerge(model)


def through_merged_copy(model: Any) -> Any:
    li.merge(model)
    return li.unmerge(copy.deepcopy(model))


def through_merged_pickle(model: Any) -> Any:
    li.merge(model)
    return li.unmerge(COPIES["pickle"](model))


def through_train_mode(model: Any) -> Any:
    return model.train().eval()


def through_double(model: Any) -> Any:
    return model.double().float()


ROUNDS: dict[str, Callable[[Any], Any]] = {
    **COPIES,
    "state_dict": through_state_dict,
    "files": through_files,
    "merge": through_merge,
    "merged deepcopy": through_merged_copy,
    "merged pickle": through_merged_pickle,
    "train mode": through_train_mode,
    "double": through_double,
}
SELECTIONS: tuple[Any, ...] = ("one", "tw.o", MIX, None)


def outputs(model: Any) -> list[Tensor]:
    """The current selection's output, then each selection's; the current one is put back."""
    weights = {n: i.weight for n, i in li.adapters(model).items() if i.weight is not None}
    found = [model(IDS)]
    for which in SELECTIONS:
        li.activate(model, which)
        found.append(model(IDS))
    li.activate(model, weights)
    return found


def listing(model: Any) -> dict[str, Any]:
    """What `adapters` says, apart from the rule that a site came from."""
    return {
        name: (
            {
                n: (s.rank, s.alpha, s.scale, s.slices, s.update, s.init)
                for n, s in info.sites.items()
            },
            set(info.trained),
            info.n_parameters,
            info.weight,
            info.trainable,
        )
        for name, info in li.adapters(model).items()
    }


def assert_equal(found: Any, wanted: Any) -> None:
    assert listing(found) == listing(wanted)
    for a, b in zip(outputs(found), outputs(wanted), strict=True):
        assert same_bits(a, b)
    assert {n: p.requires_grad for n, p in found.named_parameters()} == {
        n: p.requires_grad for n, p in wanted.named_parameters()
    }


@pytest.mark.parametrize("name", ROUNDS)
def test_a_model_goes_on_after_each_round(name: str) -> None:
    model, wanted = ROUNDS[name](build()), build()
    for m in (model, wanted):
        li.activate(m, "one")
        optimizer = torch.optim.SGD(li.parameter_groups(m, 0.01))
        for _ in range(2):
            optimizer.zero_grad()
            m(IDS).square().mean().backward()
            optimizer.step()
        li.inject(m.eval(), {"rank": 1, "init": {"normal": 1e-9}, "targets": ["fc"]}, "three")
        li.activate(m, MIX)
    assert_equal(model, wanted)
    for m in (model, wanted):
        li.merge(m)
        li.eject(m)
        assert type(m.fc) is nn.Linear
        assert not any(hasattr(module, "_lora") for module in m.modules())
    assert same_bits(model(IDS), wanted(IDS))
    assert model.state_dict().keys() == wanted.state_dict().keys() == Several().state_dict().keys()


@pytest.mark.parametrize("name", [*COPIES, "state_dict"])
def test_a_copy_is_apart_from_its_original(name: str) -> None:
    model = build()
    before, listed, wanted = snapshot(model), li.summary(model), model(IDS)
    other = ROUNDS[name](model)
    layers = [m for _, m, _ in carried.adapted_modules(Survey(other))]
    assert len({id(m._lora.selection) for m in layers}) == 1
    li.activate(other, "one")
    li.train_only(other, "tw.o")
    fill(fill(other, "one"), "tw.o")
    li.merge(other)
    li.eject(other)
    assert snapshot(model) == before
    assert li.summary(model) == listed
    assert same_bits(model(IDS), wanted)
    last = ROUNDS[name](model)
    li.eject(model)
    assert same_bits(last(IDS), wanted)


@pytest.mark.parametrize("context", ["disabled", "routed"])
def test_a_copy_made_inside_a_context_is_whole(context: str) -> None:
    model = injected(KINDS["linear"])
    x = torch.randn(1, 5)
    wanted = model(x)
    with li.disabled(model) if context == "disabled" else li.routed(model, [None]):
        other = copy.deepcopy(model)
        base = model(x)
    for which, output in (("default", wanted), (None, base)):
        li.activate(other, which)
        assert same_bits(other(x), output)
    assert same_bits(model(x), wanted)


def test_a_copy_of_one_layer_works_alone() -> None:
    model = injected(KINDS["equal slices"])
    x = torch.randn(2, 5)
    wanted = model(x)
    for layer in (copied(model.layer) for copied in COPIES.values()):
        assert type(layer) is type(model.layer)
        assert same_bits(layer(x), wanted)
        li.activate(layer, None)
        assert not same_bits(layer(x), wanted)
        assert same_bits(model(x), wanted)
        li.eject(layer)
        assert type(layer) is nn.Linear


def test_a_copy_of_a_layer_beside_the_original_is_switched_with_it() -> None:
    """As a model is made deeper: its layers go on after disabled() and activate(model, None)."""
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model = fill(li.inject(copy.deepcopy(plain), {"rank": 2, "targets": ["0"]}))
    x = torch.randn(3, 4)
    li.activate(model, "default")  # keeps a walk of the model
    model.append(copy.deepcopy(model[0]))
    wide = model[0].weight.detach()
    due = torch.relu(x @ wide.T + plain[0].bias) @ wide.T + plain[0].bias
    deeper = nn.Sequential(*plain, copy.deepcopy(plain[0]))
    torch.testing.assert_close(model(x), due)
    with li.disabled(model):
        assert same_bits(model(x), deeper(x))
    li.activate(model, None)
    assert same_bits(model(x), deeper(x))


def test_a_copy_of_a_layer_is_not_left_out_in_silence(tmp_path: Path) -> None:
    """No file held its adapter, and a merged and ejected model kept it."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    fill(li.inject(model, {"rank": 2, "targets": ["0"]}))
    model.append(copy.deepcopy(model[0]))
    before = snapshot(model)
    for verb in (
        lambda: li.save_adapter(model, tmp_path / "a"),
        lambda: li.adapter_state(model),
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
    model = injected(KINDS["linear"])
    x = torch.randn(2, 5)
    torch.save({"layer": model.layer, "x": x, "y": model(x)}, tmp_path / "m.pt")
    forks.start(load_and_compare, tmp_path / "m.pt").result()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_copies_and_pickles(kind: str) -> None:
    if "own" in kind or "inside" in kind or "scaled" in kind or KINDS[kind].site != "layer":
        model: nn.Module = injected(KINDS[kind])
    else:
        model = injected(KINDS[kind]).layer
    inputs = KINDS[kind].inputs(torch.float32)
    wanted = model(*inputs)
    for other in (copy.deepcopy(model), COPIES["pickle"](model), copy.copy(model)):
        assert same_bits(other(*inputs), wanted)
    with torch.no_grad():
        assert error(model(*inputs), wanted) < 1e-5


# ------------------------------------------------------------------------------------------ compile

COMPILED = ["linear", "conv1d", "embedding", "unequal slices", "conv 2d", "own linear forward",
            "turned experts", "scaled embedding"]  # fmt: skip


@pytest.fixture
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("kind", COMPILED)
def test_compiled_forward_and_backward_without_a_graph_break(kind: str) -> None:
    model = injected(KINDS[kind])
    inputs = [
        x.requires_grad_() if x.is_floating_point() else x
        for x in KINDS[kind].inputs(torch.float32)
    ]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = model(*inputs)
    g = torch.randn_like(y)
    y.backward(g)
    tensors = [*li.adapter_parameters(model).values(), *(x for x in inputs if x.requires_grad)]
    wanted = [t.grad for t in tensors]
    for t in tensors:
        t.grad = None
    found = compiled(*inputs)
    assert error(found, y) < 1e-5
    found.backward(g)
    for t, grad in zip(tensors, wanted, strict=True):
        assert error(t.grad, grad) < 1e-5
    with torch.no_grad():
        assert error(compiled(*inputs), y) < 1e-5


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
def test_switching_under_compile_gives_the_right_numbers() -> None:
    model = build()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    found = []
    for which in ("one", None, MIX):
        li.activate(model, which)
        wanted = model(IDS)
        assert error(compiled(IDS), wanted) < 1e-5
        found.append(wanted)
    with li.disabled(model):
        assert error(compiled(IDS), found[1]) < 1e-5
    assert error(found[0], found[1]) > 1e-2
    assert error(found[2], found[0]) > 1e-2
    li.merge(model)
    assert error(compiled(IDS), wanted) < 1e-5
    li.unmerge(model)
    assert error(compiled(IDS), wanted) < 1e-5


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
def test_verbs_reach_through_the_compiled_wrapper() -> None:
    model = build()
    compiled = torch.compile(model, backend="eager")
    li.activate(compiled, "one")
    assert li.adapters(model)["one"].active
    assert list(li.adapters(compiled)["one"].sites) == list(li.adapters(model)["one"].sites)
    before = snapshot(model)
    li.merge(compiled)
    li.unmerge(compiled)
    assert snapshot(model) == before


def test_verbs_reach_through_torchs_averaged_model() -> None:
    model = build()
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    assert li.adapter_state(average, "one").sites == li.adapter_state(model, "one").sites


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


@pytest.mark.parametrize("through", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_layer_that_pickles_without_its_adapters_is_refused(through) -> None:
    config = {"rank": 1, "targets": ["0"]}
    with pytest.raises(li.LayerError, match="copy or pickle of a Short: its own __getstate__ leav"):
        through(li.inject(nn.Sequential(Short(4, 4)), config))
    model, x = fill(li.inject(nn.Sequential(Whole(4, 4)), config)), torch.ones(1, 4)
    assert same_bits(through(model)(x), model(x))
