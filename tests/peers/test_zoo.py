"""Tiny instances of 317 model types of transformers, each held to the invariants.

A sample of twenty runs with the ordinary tests, the others with the marker `zoo`.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lora_inject as li

pytest.importorskip("transformers")

from zoo import MODEL_TYPES, SAMPLE, steps
from zoo.build import build
from zoo.exceptions import EXCHANGED, EXEMPTIONS, Exchanged
from zoo.exchange import Exchange
from zoo.inputs import dummy_inputs
from zoo.steps import Held, changed, randomise_factors, run, same
from zoo.targets import ALPHA

# transformers warns of its own future and of configs as small as these.
pytestmark = pytest.mark.filterwarnings("ignore")

CASES = [
    pytest.param(name, marks=[] if name in SAMPLE else [pytest.mark.zoo]) for name in MODEL_TYPES
]


@pytest.mark.parametrize("model_type", CASES)
def test_zoo(model_type: str) -> None:
    held = Held(model_type)
    assert not held.failures, "\n".join(held.failures)


@pytest.mark.zoo
@pytest.mark.parametrize("model_type", [name for name, e in EXEMPTIONS.items() if e.dead])
def test_dead_sites_are_dead_in_the_model(model_type: str) -> None:
    """Where an exemption says that a site has no effect, the model's own weight has none either."""
    model = build(model_type).requires_grad_(False)
    calls = dummy_inputs(model, model_type)
    dead = Held(model_type).dead
    assert dead
    plain = run(model, calls)
    for name in dead:
        with changed(model.get_submodule(name).weight):
            assert same(plain, run(model, calls)), name


@pytest.mark.parametrize("model_type", CASES)
def test_adapters_are_exchanged_with_peft(model_type: str) -> None:
    """PEFT's all-linear and experts read by us, ours read by PEFT, with the same outputs."""
    pytest.importorskip("peft")
    wanted = EXCHANGED.get(model_type, Exchanged("none"))
    exchange = Exchange(model_type)
    assert exchange.read_by_us() == wanted.by_us
    assert exchange.read_by_peft() == wanted.by_peft


# --------------------------------------------------------------------- do the steps find defects


def inert(model: nn.Module, *_: Any) -> None:
    """Let the layer forget its adapter."""
    module = model.get_submodule("model.layers.0.self_attn.q_proj")
    raw = module._parameters["weight"]
    module.forward = lambda x: nn.functional.linear(x, raw, module.bias)


def freeze_one(model: nn.Module, *_: Any) -> None:
    for A, _ in [*steps.factors(model).values()][:1]:
        A.requires_grad_(False)


def nudge(model: nn.Module) -> None:
    """Change a weight of the base in its last bits."""
    model.get_submodule("model.layers.0.self_attn.q_proj")._parameters["weight"].data *= 1 + 2**-20


INJECT, MERGE = li.inject, li.merge
# Step that must fail, the verb after which something is spoiled, and how.
DEFECTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "zero start": ("inject", lambda m, *_: randomise_factors(steps.factors(m).values())),
    "freezing": ("inject", freeze_one),
    "sites": ("inject", lambda m, *_: INJECT(li.eject(m), {"targets": ["q_proj"]})),
    "effect": ("inject", inert),
    "adapted equals dense": (
        "inject", lambda m, config: INJECT(li.eject(m), config | {"alpha": 2 * ALPHA}),
    ),
    "load: same outputs": ("load_adapter", lambda m, _: li.activate(m, {"default": 0.5})),
    "merged equals unmerged": ("merge", lambda m: MERGE(li.unmerge(m), name={"default": 1.5})),
    "unmerge: same values": ("unmerge", nudge),
    "eject: same values": ("eject", nudge),
    "eject: same keys": ("eject", lambda m: m.register_parameter("p", nn.Parameter(torch.ones(1)))),
    "eject: same requires_grad": ("eject", lambda m: m.requires_grad_(False)),
}  # fmt: skip


@pytest.mark.parametrize("step", DEFECTS)
def test_the_steps_find_defects(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    verb, spoil = DEFECTS[step]
    real, spoiling = getattr(li, verb), [False]

    def spoiled(model: nn.Module, *others: Any, **options: Any) -> Any:
        result = real(model, *others, **options)
        if not spoiling[0]:  # a defect may use the verb itself
            spoiling[0] = True
            spoil(model, *others)
            spoiling[0] = False
        return result

    monkeypatch.setattr(li, verb, spoiled)
    held = Held("llama")
    assert any(failure.startswith(step) for failure in held.failures), held.failures


def test_the_list() -> None:
    assert len(set(MODEL_TYPES)) == 317
    assert len(set(SAMPLE) - EXEMPTIONS.keys()) == 20
    assert {*SAMPLE, *EXEMPTIONS, *EXCHANGED} <= set(MODEL_TYPES)
    assert len(EXEMPTIONS) <= 20
    assert len(EXCHANGED) <= 22
    assert all(len(e.reason) > 20 and (e.dead or e.untying) for e in EXEMPTIONS.values())
