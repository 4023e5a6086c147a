"""Gradient checkpointing of adapted models works, or says what to call."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from conftest import error, fill, refusal
from helpers.recomputing import RECOMPUTE, Foreign
from helpers.reference import gpt2_of_two_layers
from helpers.refusals import refused
from torch import nn
from torch.utils.checkpoint import (
    CheckpointError,
    CheckpointFunction,
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import lora_inject as li
from contract.kinds import ALPHA, RANK

CONFIG = {"rank": RANK, "alpha": ALPHA}


@pytest.mark.parametrize("targets", [["c_attn", "c_proj"], ["wte"], [r"c_fc\.weight"]], ids=str)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool, targets: list[str]) -> None:
    """Works, or says what to call: with frozen embeddings the reentrant mode passes no gradient."""
    model = fill(li.inject(gpt2_of_two_layers(), {**CONFIG, "targets": targets})).train()
    ids = torch.arange(10).view(2, 5)
    model(ids, labels=ids).loss.backward()
    wanted = {n: p.grad for n, p in li.adapter_parameters(model).items()}
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # another name in newer versions
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    told = refusal(lambda: model(ids, labels=ids).loss.backward(), li.LayerError)
    if told is not None:  # newer versions of transformers call it themselves
        assert reentrant
        assert "enable_input_require_grads" in str(told)
        model.enable_input_require_grads()
        model(ids, labels=ids).loss.backward()
    for name, parameter in li.adapter_parameters(model).items():
        assert error(parameter.grad, wanted[name]) < 1e-5


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("frozen", ["nothing", "lora_A"])
@pytest.mark.parametrize(
    "config",
    [{"targets": ["0"]}, {"targets": [r"0\.weight"]}, {"train": ["0"]}, {"bias": "all"}],
    ids=str,
)
def test_gradient_checkpointing_never_trains_in_vain(config: dict[str, Any], frozen: str) -> None:
    model = fill(li.inject(nn.Sequential(nn.Linear(5, 5)), {**CONFIG, **config}))
    for name, parameter in li.adapter_parameters(model).items():
        parameter.requires_grad_(not name.endswith(frozen))
    x = torch.randn(2, 5)
    contexts = [nullcontext(), li.routed(model, ["default", None])]
    for context in contexts if config == {"targets": ["0"]} else contexts[:1]:
        with context, refused(li.LayerError, "use_reentrant=False", "enable_input_require_grads()"):
            checkpoint(model, x, use_reentrant=True)
    checkpoint(model.eval(), x, use_reentrant=True)


ATEN = torch.ops.aten
SAVED = {
    "mm": {ATEN.mm.default},  # torchtitan's policy, of its matrix products
    "products": {ATEN.mm.default, ATEN.addmm.default, ATEN.bmm.default, ATEN.baddbmm.default},
    "everything": None,
}


class Two(nn.Module):
    """Linear layers with and without bias, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 12, bias=False), nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).tanh())


def selectively(model: nn.Module, saved: str, allow: bool, x: torch.Tensor) -> torch.Tensor:
    ops = SAVED[saved]

    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keeps = ops is None or op in ops
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(
        create_selective_checkpoint_contexts, policy, allow_cache_entry_mutation=allow
    )
    return checkpoint(model, x, use_reentrant=False, context_fn=contexts)  # type: ignore[no-any-return]


RULES: list[dict[str, Any]] = [
    {},
    {"dropout": 0.1},
    {"init": "pissa"},
    {"variant": "dora"},
    {"slices": {"a": 3, "b": 3}, "adapt": ["b"]},
    {"slices": {"a": 2, "b": 1, "c": 3}, "adapt": ["a", "c"]},
    {"match": r"(up|down)\.weight"},
]
# The dtype, the limit of the error, and the shape of the inputs: many tokens, and one.
CALLS = [(torch.float64, 1e-12, (3, 20, 6)), (torch.bfloat16, 2e-2, (1, 1, 6))]


@pytest.mark.parametrize(("dtype", "limit", "shape"), CALLS, ids=str)
@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_selective_checkpoints_change_no_gradient(saved, rule, dtype, limit, shape) -> None:
    sites = "down" if "slices" in rule else "up|down"
    compute = "base" if "match" in rule else "float32"
    config = {"rank": 2, "compute": compute, "targets": [{"match": sites, **rule}]}
    model = fill(li.inject(Two().to(dtype), config)).train()
    x, tuned = torch.randn(shape).to(dtype), list(li.adapter_parameters(model).values())
    grads = []
    for run in (model, *(partial(selectively, model, saved, allow) for allow in (False, True))):
        torch.manual_seed(1)
        grads.append(torch.autograd.grad(run(x).square().sum(), tuned))
    for one, *others in zip(*grads, strict=True):
        assert all(error(one, other) < limit for other in others)


CHANGES: dict[str, Callable[[nn.Module, li.AdapterState], Any]] = {
    "merge": lambda model, _: li.merge(model),
    "eject": lambda model, _: li.eject(model, "default"),
    "swap": lambda model, other: li.swap_adapter(model, other),
}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("beside", ["nothing", "another adapter on another layer"])
def test_a_change_before_the_backward_is_refused_there(
    beside: str, change: str, training: bool, reentrant: bool
) -> None:
    """Where the last adapter of a layer was ejected, the plain layer ran again in its place."""
    model, other = (
        fill(li.inject(Two().double(), {"rank": 2, "targets": ["up", "down"]})) for _ in range(2)
    )
    if beside != "nothing":
        li.inject(model, {"rank": 2, "targets": ["down"]}, "beside")
        li.activate(model, "default")
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    loss = checkpoint(model.train(training).up, x, use_reentrant=reentrant).square().sum()
    CHANGES[change](model, li.adapter_state(other))
    with pytest.raises((li.StateError, CheckpointError)):
        loss.backward()


# ------------------------------------------------------- checkpoints that are none of torch's


def of_two_adapters() -> Any:
    model = Two().double()
    for name in ("a", "b"):
        fill(li.inject(model, {"rank": 2, "targets": ["up", "down"]}, name), name)
    li.activate(model, "a")
    li.train_only(model, ["a", "b"])
    return model


def gradients(model: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the input and of both adapters, zeros where there is none; they are cleared."""
    named = {"x": x}
    for name in ("a", "b"):
        named |= {f"{name} {k}": p for k, p in li.adapter_parameters(model, name).items()}
    found = {}
    for name, p in named.items():
        found[name] = torch.zeros_like(p) if p.grad is None else p.grad
        p.grad = None
    return found


def in_turn(model: Any, x: torch.Tensor, forward: Any, run: Any) -> torch.Tensor:
    """A forward of both adapters' rows."""
    with li.routed(model, ["a", "b", None]):
        y: torch.Tensor = forward(run, x)
    return y


def then_another(model: Any, x: torch.Tensor, forward: Any, run: Any) -> torch.Tensor:
    y: torch.Tensor = forward(run, x)
    li.activate(model, "b")
    return y


def not_adapted(model: Any, x: torch.Tensor, forward: Any, run: Any) -> torch.Tensor:
    with li.disabled(model):
        y: torch.Tensor = forward(run, x)
    return y


def both(model: Any, x: torch.Tensor, forward: Any, run: Any) -> torch.Tensor:
    y: torch.Tensor = forward(run, x)
    with li.routed(model, ["b", "b", "b"]):
        return y + forward(run, x)


def swapped(model: Any, x: torch.Tensor, forward: Any, run: Any) -> torch.Tensor:
    y: torch.Tensor = forward(run, x)
    other = {"rank": 2, "targets": ["up", "down"]}
    li.swap_adapter(model, li.adapter_state(fill(li.inject(Two().double(), other))), "a")
    return y


CHANGED = {"routed": in_turn, "activated": then_another, "disabled": not_adapted, "both": both}


@pytest.mark.parametrize("changed", CHANGED)
@pytest.mark.parametrize("how", ["torch's", "torch's, reentrant"])
def test_a_recomputation_of_torchs_trains_what_took_part_in_its_forward(
    how: str, changed: str
) -> None:
    model = of_two_adapters()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    found = []
    for forward in (lambda run, x: run(x), RECOMPUTE[how]):
        li.activate(model, "a")
        CHANGED[changed](model, x, forward, model).square().sum().backward()
        found.append(gradients(model, x))
    assert all(error_of(found[1][name], t) < 1e-12 for name, t in found[0].items())


FOREIGN = [("a Function", changed) for changed in [*CHANGED, "swapped"]]
FOREIGN += [("hooks", changed) for changed in CHANGED if changed != "activated"]


@pytest.mark.parametrize(("how", "changed"), FOREIGN)
def test_another_recomputation_is_refused_where_something_else_takes_part_by_then(
    how: str, changed: str
) -> None:
    """It trained other adapters than its forward had used, without an error."""
    model = of_two_adapters()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    loss = (CHANGED | {"swapped": swapped})[changed](model, x, RECOMPUTE[how], model).square().sum()
    with pytest.raises(li.StateError, match=r"swap_adapter|torch\.utils\.checkpoint"):
        loss.backward()
    RECOMPUTE["a Function"](model, x).sum().backward()  # the next step has nothing of this one


@pytest.mark.parametrize("changed", ["routed", "disabled", "both"])
def test_another_recomputation_of_compiled_layers_is_refused(changed: str) -> None:
    model = of_two_adapters()
    for layer in (model.up, model.down):
        layer.compile(backend="eager")
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    loss = CHANGED[changed](model, x, RECOMPUTE["a Function"], model).square().sum()
    with pytest.raises(Exception, match=r"torch\.utils\.checkpoint"):  # in dynamo's own class
        loss.backward()


def error_of(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / (wanted.abs().max() + 1))


def evaluated(model: Any, x: torch.Tensor) -> None:
    """What steps of DPO and evaluations do between a forward and its backward."""
    with torch.no_grad(), li.disabled(model):
        model(x)
        Foreign.apply(model, x)
    with li.disabled(model), torch.no_grad():
        model(x)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("how", RECOMPUTE)
def test_a_recomputation_under_the_selection_of_its_forward_is_right(
    how: str, inside: bool
) -> None:
    model = of_two_adapters()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    due = []
    for forward in (lambda run, x: run(x), RECOMPUTE[how]):
        for step in range(2):
            li.activate(model, "ab"[step])
            with li.routed(model, ["a", "b", "a"]) if inside else nullcontext():
                y = forward(model, x)
                if not inside and how != "hooks":
                    evaluated(model, x.detach())
                y.square().sum().backward()
            due.append(gradients(model, x))
    for one, other in zip(due[:2], due[2:], strict=True):
        assert all(error_of(other[name], t) < 1e-12 for name, t in one.items())


def test_a_class_derived_from_torchs_checkpoint_is_run_as_itself() -> None:
    """Its own forward was left out while anything had adapters."""

    class Mine(CheckpointFunction):
        ran = 0

        @staticmethod
        def forward(ctx: Any, run: Any, preserve: bool, *args: Any) -> Any:
            Mine.ran += 1
            return CheckpointFunction.forward(ctx, run, preserve, *args)

    model = of_two_adapters()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    with li.routed(model, ["a", "b", None]):
        y = Mine.apply(model, True, x)
    assert Mine.ran == 1
    with pytest.raises(li.StateError, match=r"torch\.utils\.checkpoint"):
        y.sum().backward()


def hooks_that_run_modules(model: Any, x: torch.Tensor) -> None:
    """Without gradients, as in each backward; with them where nothing may be taken for another."""
    seen = []
    y = model(x)
    y.register_hook(lambda g: seen.append(model(x.detach())))
    y.sum().backward()
    assert error(seen[0], y) < 1e-12
    x.grad = None


def penalty(model: Any, x: torch.Tensor) -> None:
    """A gradient is differentiated, which runs no forward again."""
    y = model(x)
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    y.register_hook(lambda g: g + 0 * model(x.detach()))
    (y.sum() + g.square().sum()).backward()
    x.grad = None


class Calling(nn.Module):
    def __init__(self, run: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x)


def nested(model: Any, x: torch.Tensor) -> None:
    """Torch's own checkpoints, one in the other."""
    for reentrant in (True, False):
        inner = partial(checkpoint, model.up, use_reentrant=not reentrant)
        both = nn.Sequential(Calling(inner), model.down)
        y = checkpoint(both, x, use_reentrant=reentrant)
        with torch.no_grad(), li.disabled(model):
            model(x)
        y.sum().backward()
        x.grad = None


@pytest.mark.parametrize("use", [hooks_that_run_modules, penalty, nested])
def test_what_runs_no_other_recomputation_is_not_refused(use: Any) -> None:
    model = of_two_adapters()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    for around in (nullcontext(), li.routed(model, ["a", None, "b"]), li.disabled(model)):
        with around:
            use(model, x)
    use(model, x)
    with torch.enable_grad(), li.disabled(model):
        Foreign.apply(model, x)  # of which no backward follows
    use(model, x)
