"""What is patched of torch while modules have adapters goes with the last of them."""

import copy
import gc
from typing import Any

import torch
from helpers.refusals import refused
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import checkpoint as torchs

import lora_inject as li

RANK2 = {"rank": 2, "targets": ["0"]}
PLACES = (
    (nn.Module, "load_state_dict"),
    (torchs._CheckpointFrame, "__init__"),
    (torchs.CheckpointFunction, "apply"),
    (saved_tensors_hooks, "__enter__"),
    (saved_tensors_hooks, "__exit__"),
)


def torchs_functions() -> list[Any]:
    """Return what stands in the classes themselves; None is what they inherit."""
    return [owner.__dict__.get(name) for owner, name in PLACES]


def adapted(**more: Any) -> nn.Module:
    return li.inject(nn.Sequential(nn.Linear(3, 3)), RANK2 | more)


def live_and_go() -> tuple[bool, list[bool]]:
    """Return whether a life patches, and after each step that torch has its own functions."""
    own = torchs_functions()
    model, x = adapted(), torch.ones(2, 3)
    patched = torchs_functions() != own
    torch.compile(model, backend="eager")(x)  # watches checkpoints from now on
    torch.compiler.reset()
    other = copy.deepcopy(model)
    li.eject(model)
    del model
    gc.collect()
    given_back = [torchs_functions() == own]
    li.eject(other)
    del other
    gc.collect()
    given_back.append(torchs_functions() == own)
    return patched, given_back


def test_torch_has_its_own_functions_again_after_the_last_model_with_adapters(forks) -> None:
    assert forks.start(live_and_go).result() == (True, [False, True])


def loads_under_a_wrapper() -> int:
    """Return how often a wrapper that came later was called; it must not lose a check."""
    calls = []
    model = adapted()
    ours = nn.Module.load_state_dict

    def theirs(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        return ours(self, *args, **kwargs)

    nn.Module.load_state_dict = theirs  # type: ignore[method-assign]
    li.eject(model)
    del model
    gc.collect()
    assert nn.Module.load_state_dict is theirs
    nn.Linear(2, 2).load_state_dict(nn.Linear(2, 2).state_dict())
    with refused(li.StateError, "scale 2", "8"):
        adapted().load_state_dict(adapted(alpha=4).state_dict())
    return len(calls)


def test_a_wrapper_that_somebody_puts_over_ours_stays_and_so_does_the_check(forks) -> None:
    assert forks.start(loads_under_a_wrapper).result() == 2
