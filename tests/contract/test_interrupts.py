"""A verb that is interrupted at any of its lines has done all of its work or none of it."""

import copy
import dis
import functools
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import torch
from conftest import fill, snapshot
from helpers.models import IDS, OTHER, SEVERAL, Several
from pydantic_core import PydanticSerializationError
from torch import nn

import lora_inject as li

PACKAGE = Path(li.__file__).parent
FILES = {str(path) for path in PACKAGE.rglob("*.py")}


class Interrupted(BaseException):
    """Like KeyboardInterrupt, of which nobody else makes use."""


Line = tuple[CodeType, int]


@functools.cache
def _ends_of_with(code: CodeType) -> set[int]:
    """Where `with` begins to leave its context: nothing is raised there by Python itself.

    It looks for signals when a call has returned, and there a lock would stay locked for good.
    """
    steps = list(dis.get_instructions(code))
    calls = zip(steps, steps[1:], steps[2:], strict=False)
    nothing = ("LOAD_CONST", None)
    return {c[0].offset for c in calls if all((i.opname, i.argval) == nothing for i in c)}


def _traced(run: Callable[[], Any], stop_at: tuple[Line, int] | None = None) -> dict[Line, int]:
    """Run, raise when a line is reached for the given time, and return how often each was.

    With a line to stop at, only that line's function is traced, and so only its lines are counted.
    """
    lines: dict[Line, int] = {}

    def trace(frame: Any, event: str, _: Any) -> Any:
        code = frame.f_code
        if code is not stop_at[0][0] if stop_at else code.co_filename not in FILES:
            return None
        if event == "line" and frame.f_lasti not in _ends_of_with(code):
            line = (code, frame.f_lineno)
            lines[line] = lines.get(line, 0) + 1
            if (line, lines[line]) == stop_at:
                sys.settrace(None)
                raise Interrupted
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        # An interrupt as a context ends leaves it open: filters of warnings, or a `no_grad`.
        with torch.enable_grad(), warnings.catch_warnings():
            run()
    finally:
        sys.settrace(before)
        torch.set_grad_enabled(True)  # an interrupt just before no_grad is left leaves it open
    return lines


STATE = li.AdapterState({}, {"head.weight": torch.ones(2, 4)})


def _two() -> Several:
    model = Several()
    fill(li.inject(model, SEVERAL, "one"), "one")
    return fill(li.inject(model, OTHER, "two"), "two")


def _whole(model: nn.Module) -> tuple[Any, ...]:
    """What a model is to its user, with no identity of an object in it."""
    outputs = tuple(y.detach().float().numpy().tobytes() for y in model(IDS))
    values = [(n, p.requires_grad, p.detach().float().numpy().tobytes())
              for n, p in model.named_parameters(remove_duplicate=False)]  # fmt: skip
    classes = [type(module).__mro__ for module in model.modules()]
    return outputs, li.summary(model), values, classes, sorted(model.__dict__)


def _untied() -> Several:
    return fill(li.inject(Several(), {"rank": 1, "targets": ["fc", "mix"]}))


def _merged() -> Several:
    model = _two()
    li.merge(model)
    return model


@functools.cache
def _doubled() -> li.AdapterState:
    """Of the base that every model here has, by the seed."""
    torch.manual_seed(0)
    state = copy.deepcopy(li.adapter_state(_two(), "one"))
    for site in state.sites.values():
        site.B.mul_(2)
    return state


VERBS: dict[str, tuple[Callable[[], Any], Callable[[nn.Module], Any]]] = {
    # Onto a layer that has an adapter, and onto others.
    "inject": (_untied, lambda m: li.inject(m, OTHER, "new")),
    "eject": (_two, li.eject),
    "activate": (_two, lambda m: li.activate(m, "one")),
    "train_only": (_two, lambda m: li.train_only(m, "one")),
    "merge": (_two, li.merge),
    "merge and eject": (_untied, lambda m: li.merge(m, eject=True)),
    "unmerge": (_merged, li.unmerge),
    "install": (_two, lambda m: li.install(m, STATE, "new")),
    "swap_adapter": (_two, lambda m: li.swap_adapter(m, _doubled(), "one")),
}


# As a model goes Python runs finalizers, in which it tells of an interrupt and goes on; so does
# pydantic where it asks of which of two kinds a value is that it writes.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning")
@pytest.mark.parametrize("verb", VERBS)
def test_an_interrupt_at_any_line_leaves_all_or_nothing(verb: str) -> None:
    make, act = VERBS[verb]
    torch.manual_seed(0)
    start = make()
    act(copy.deepcopy(start))  # the first run imports what the verb needs
    done = copy.deepcopy(start)
    torch.manual_seed(1)
    lines = _traced(lambda: act(done))
    after = _whole(done)
    whole = _whole(start)
    assert after != whole
    assert len(lines) > 20
    model = None
    for n, (line, times) in enumerate(lines.items()):
        if model is None:
            model = copy.deepcopy(start)
            before = snapshot(model)
        torch.manual_seed(1)
        try:
            _traced(lambda: act(model), (line, times // 2 + 1))  # noqa: B023 - runs at once
        except (Interrupted, PydanticSerializationError, UserWarning):  # pydantic tells by these
            # What is elsewhere than in the model stays there, and is seen soon enough.
            if snapshot(model) == before and (n % 8 or _whole(model) == whole):
                continue
            if verb == "unmerge" and _whole(model) != after:
                li.unmerge(model)  # what was kept is kept until all is restored
        assert _whole(model) == after, f"interrupted at {line}"
        model = None
    assert model is None or _whole(model) in (whole, after)  # the last line comes after the change


@pytest.mark.parametrize("context", [li.disabled, lambda m: li.routed(m, ["a", None])])
def test_an_interrupt_at_any_line_of_a_context_leaves_nothing_behind(context: Any) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
    wanted = fill(li.inject(model, {"rank": 2, "targets": [r"\d"]}, "a"), "a")(x)

    def run() -> None:
        with context(model):
            pass

    run()  # the first run imports what the context needs
    lines = _traced(run)
    assert len(lines) > 50
    for line, times in lines.items():
        for time in range(1, times + 1):
            with suppress(Interrupted):
                _traced(run, (line, time))
            assert torch.equal(model(x), wanted), f"interrupted at {line}"
    li.eject(model)  # which an open context would refuse


TRIALS = {
    "clipped": li.Trial({"rank": 1, "targets": ["0"]}, lr=1e-2, clip=1e-3),
    "plain": li.Trial({"rank": 2, "targets": [r"\d"]}, lr=1e-2, weight_decay=0.1),
    "diverged": li.Trial({"rank": 1, "targets": ["0"]}, lr=1e-2),
}
X = torch.ones(2, 4)


def _trials() -> li.Trials:
    """Some trials after a step, with gradients of two that no other step has taken."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double().eval()
    trials = li.Trials(model, TRIALS, loss=lambda out, b: out.square().mean() * b[0, 0])
    _step(trials)
    for name in ("clipped", "plain"):
        trials.forward_backward({name: X.double()})
    return trials


def _step(trials: li.Trials) -> None:
    batch = X.double()
    nan = batch * torch.nan if trials.n_steps["plain"] else batch
    trials.step({n: nan if n == "diverged" else batch for n in trials.running})


def _both(trials: li.Trials) -> None:
    trials.optimizer_step(["clipped", "plain"])


@pytest.mark.parametrize("act", [_step, _both])
def test_an_interrupt_at_any_line_of_a_step_leaves_all_trials_stepped_or_none(
    act: Callable[[li.Trials], None], tmp_path: Path
) -> None:
    """Some were stepped, and the gradient of the others was added to that of the next batch."""

    def held(trials: li.Trials) -> tuple[bytes, list[bool]]:
        trains = [p.requires_grad for p in trials.model.parameters()]
        return trials.save(tmp_path / "trials.pt").read_bytes(), trains

    before = held(_trials())
    done = _trials()
    lines = _traced(lambda: act(done))
    after = held(done)
    assert len(lines) > 50
    trials = None
    for line, times in lines.items():
        trials = trials or _trials()
        with suppress(Interrupted):
            _traced(lambda: act(trials), (line, times // 2 + 1))  # noqa: B023 - runs at once
        now = held(trials)
        if now != before:
            assert now == after, f"interrupted at {line}"
            trials = None


@pytest.mark.parametrize("act", [_step, _both])
def test_a_step_for_which_one_trial_has_no_memory_is_none(
    act: Callable[[li.Trials], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    trials, unhurt = _trials(), _trials()
    step, n_calls = torch.optim.AdamW.step, []

    def without_memory(optimizer: torch.optim.AdamW) -> Any:
        n_calls.append(optimizer)
        if len(n_calls) == 2:
            raise torch.OutOfMemoryError
        return step(optimizer)

    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", without_memory)
        with pytest.raises(torch.OutOfMemoryError):
            act(trials)
    assert len(n_calls) == 2
    for each in (trials, unhurt):
        act(each)
    assert repr(trials.losses) == repr(unhurt.losses)  # one of them is NaN
    for one, other in zip(trials.model.parameters(), unhurt.model.parameters(), strict=True):
        assert torch.equal(one, other)
