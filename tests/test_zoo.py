"""Tiny instances of 317 model types of transformers, each held to the invariants.

A sample of twenty runs with the ordinary tests, the others with the marker `zoo`. `conftest.py`
prints the count that passes at the end of a run.
"""

import copy
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from conftest import script
from torch import Tensor, nn

import lora_inject as li

pytest.importorskip("transformers")

from zoo import MODEL_TYPES, SAMPLE
from zoo.build import build
from zoo.exceptions import EXCHANGED, EXEMPTIONS, Exchanged
from zoo.exchange import Exchange
from zoo.inputs import dummy_inputs
from zoo.parts import PARTS, REASONS, Part, families, read_by
from zoo.readers import READERS, Called, calls_of, readers
from zoo.steps import Calls, Ours, changed, distance, hold, make_dense, randomise_factors, run, same
from zoo.targets import ALPHA, Targets

# transformers warns of its own future and of configs as small as these.
pytestmark = pytest.mark.filterwarnings("ignore")

CASES = [
    pytest.param(name, marks=[] if name in SAMPLE else [pytest.mark.zoo]) for name in MODEL_TYPES
]


@pytest.mark.parametrize("model_type", CASES)
def test_zoo(model_type: str) -> None:
    report = hold(model_type)
    assert not report.failures, "\n".join(report.failures)
    assert not report.further, "\n".join(report.further)
    assert report.n_sites > 0


@pytest.mark.zoo
@pytest.mark.parametrize("model_type", [name for name, e in EXEMPTIONS.items() if e.dead])
def test_dead_sites_are_dead_in_the_model(model_type: str) -> None:
    """Where an exemption says that a site has no effect, the model's own weight has none either."""
    model = build(model_type).requires_grad_(False)
    calls = dummy_inputs(model, model_type)
    dead = hold(model_type).dead
    assert dead
    claimed = re.compile(EXEMPTIONS[model_type].dead or "")
    plain = run(model, calls)
    for name in dead:
        assert claimed.fullmatch(name)
        with changed(model.get_submodule(name).weight):
            assert same(plain, run(model, calls)), name


@pytest.mark.zoo
@pytest.mark.parametrize("model_type", READERS)
@torch.no_grad()
def test_methods_besides_forward_read_what_was_trained(model_type: str) -> None:
    """The reference is the plain model with the trained values, or W + delta, as its parameter."""
    plain: nn.Module = build(model_type).requires_grad_(False)
    found = readers(plain)
    calls = calls_of(plain, model_type, found)
    read = {reader.name for reader in found if (reader.path, reader.method) in called(calls)}
    train = li.inject(copy.deepcopy(plain), {"rank": 2, "targets": [], "train": whole(read)})
    wide = copy.deepcopy(plain)
    for parameter in li.adapter_parameters(train).values():
        parameter.add_(torch.randn_like(parameter) + 1)
    for name, tensor in li.adapter_state(train).trained.items():
        wide.get_parameter(name).copy_(tensor)
    assert compare(calls, plain, train, wide)
    for name in read:
        adapted, wide = copy.deepcopy(plain), copy.deepcopy(plain)
        try:
            li.inject(adapted, {"rank": 2, "alpha": ALPHA, "targets": whole([name])})
        except li.LoraInjectError:  # no matrix
            continue
        sites = li.adapter_parameters(adapted)
        randomise_factors([(sites[f"{name}.lora_A"], sites[f"{name}.lora_B"])])
        make_dense(wide, li.adapter_state(adapted))
        path, _, _ = name.rpartition(".")
        compare([call for call in calls if call.path == path], plain, adapted, wide)


@pytest.mark.zoo
@pytest.mark.parametrize("part", PARTS, ids=lambda p: f"{p.module.partition(':')[2]}.{p.method}")
@torch.no_grad()
def test_methods_of_parts_read_what_was_trained(part: Part) -> None:
    plain = part.build()
    read = read_by(plain, part.method)
    train = li.inject(copy.deepcopy(plain), {"rank": 2, "targets": [], "train": whole(read)})
    wide = copy.deepcopy(plain)
    for parameter in li.adapter_parameters(train).values():
        parameter.add_(torch.randn_like(parameter) + 1)
    for name, tensor in li.adapter_state(train).trained.items():
        wide.get_parameter(name).copy_(tensor)
    assert compare([Called("", part.method, (), part.arguments(plain))], plain, train, wide)


@pytest.mark.zoo
def test_each_family_with_a_method_besides_forward_that_reads_is_held_or_has_a_reason() -> None:
    """As the sources tell of the pinned transformers; another version may have others."""
    from transformers import CONFIG_MAPPING

    held = {CONFIG_MAPPING[name].__module__.split(".")[2] for name in READERS}
    held |= {part.module.partition("/")[0] for part in PARTS}
    assert held.isdisjoint(REASONS)
    if "transformers" not in script("versions").differences():
        assert families() - held - REASONS.keys() == set()


def whole(names: Iterable[str]) -> list[str]:
    return [f"^{re.escape(name)}" for name in sorted(names)]


def called(calls: Iterable[Called]) -> set[tuple[str, str]]:
    return {(call.path, call.method) for call in calls}


def compare(calls: list[Called], plain: nn.Module, model: nn.Module, wide: nn.Module) -> int:
    """Hold each call of the model to the dense one; return how many of them differ from the base.

    A call may not depend on the parameter: `mask_time_prob` may mask nothing.
    """
    n_moved = 0
    for call in calls:
        wanted = call.on(wide)
        assert distance(wanted, call.on(model)) < 1e-5, call[:2]
        n_moved += distance(wanted, call.on(plain)) > 1e-4
    return n_moved


@pytest.mark.parametrize("model_type", CASES)
def test_adapters_are_exchanged_with_peft(model_type: str) -> None:
    """PEFT's all-linear and experts read by us, ours read by PEFT, with the same outputs."""
    pytest.importorskip("peft")
    wanted = EXCHANGED.get(model_type, Exchanged("none"))
    exchange = Exchange(model_type)
    assert exchange.read_by_us() == wanted.by_us
    assert exchange.read_by_peft() == wanted.by_peft


@torch.no_grad()
def _nudge(model: nn.Module) -> None:
    """Change one weight of the base in its last bits."""
    weight = model.get_submodule("model.layers.0.self_attn.q_proj")._parameters["weight"]
    weight[0, 0] = weight[0, 0] * (1 + 2**-20)


class _Nonzero(Ours):
    def inject(self, model: nn.Module, targets: Targets, calls: Calls) -> nn.Module:
        super().inject(model, targets, calls)
        randomise_factors(self.factors(model).values())
        return model


class _Unfrozen(Ours):
    def inject(self, model: nn.Module, targets: Targets, calls: Calls) -> nn.Module:
        super().inject(model, targets, calls)
        model.get_submodule("model.norm").requires_grad_(True)
        return model


class _Left(Ours):
    def inject(self, model: nn.Module, targets: Targets, calls: Calls) -> nn.Module:
        fewer = Targets(dict(list(targets.modules.items())[1:]), targets.experts)
        return super().inject(model, fewer, calls)


class _Inert(Ours):
    def factors(self, model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
        factors = super().factors(model)
        name = next(iter(factors))
        module = model.get_submodule(name)
        raw = module._parameters["weight"]
        module.forward = lambda x: nn.functional.linear(x, raw, module.bias)
        return factors


class _Twice(Ours):
    def inject(self, model: nn.Module, targets: Targets, calls: Calls) -> nn.Module:
        return li.inject(model, {**targets.config(), "alpha": 2 * ALPHA})


class _Half(Ours):
    def load(self, fresh: nn.Module, path: Path) -> nn.Module:
        return li.activate(super().load(fresh, path), {"default": 0.5})


class _Merged(Ours):
    def merge(self, model: nn.Module) -> None:
        li.merge(model, name={"default": 1.5})


class _Drift(Ours):
    def unmerge(self, model: nn.Module) -> None:
        super().unmerge(model)
        _nudge(model)


class _Remainder(Ours):
    def eject(self, model: nn.Module) -> nn.Module:
        super().eject(model)
        _nudge(model)
        return model


class _Key(Ours):
    def eject(self, model: nn.Module) -> nn.Module:
        super().eject(model)
        model.register_parameter("left", nn.Parameter(torch.zeros(1)))
        return model


class _Flags(Ours):
    def eject(self, model: nn.Module) -> nn.Module:
        return super().eject(model).requires_grad_(False)


DEFECTS = {
    _Nonzero: "zero start",
    _Unfrozen: "freezing",
    _Left: "sites",
    _Inert: "effect",
    _Twice: "adapted equals dense",
    _Half: "load: same outputs",
    _Merged: "merged equals unmerged",
    _Drift: "unmerge: same values",
    _Remainder: "eject: same values",
    _Key: "eject: same keys",
    _Flags: "eject: same requires_grad",
}


@pytest.mark.parametrize("library", DEFECTS)
def test_the_steps_find_defects(library: type[Ours]) -> None:
    report = hold("llama", library())
    found = report.failures + report.further
    assert any(failure.startswith(DEFECTS[library]) for failure in found), found


def test_the_list() -> None:
    assert len(MODEL_TYPES) == len(set(MODEL_TYPES)) == 317
    assert len(SAMPLE) == len(set(SAMPLE)) == 20
    assert len(EXEMPTIONS) <= 20
    assert set(SAMPLE) | set(EXEMPTIONS) | set(EXCHANGED) <= set(MODEL_TYPES)
    assert len(EXCHANGED) <= 22
    assert not set(SAMPLE) & set(EXEMPTIONS)
    assert all(len(e.reason) > 20 and (e.dead or e.untying) for e in EXEMPTIONS.values())
