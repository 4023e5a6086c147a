"""What is patched of torch while modules have adapters goes with the last of them."""

import copy
import gc
from typing import Any

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils import checkpoint as torchs

import lora_inject as li

PLACES = (
    (nn.Module, "get_parameter"),
    (torchs._CheckpointFrame, "__init__"),
    (torchs.CheckpointFunction, "apply"),
    (torch.utils, "swap_tensors"),
    (torch, "to_dlpack"),
    (torch.utils.dlpack, "to_dlpack"),
    (WeightNorm, "apply"),
    (WeightNorm, "remove"),
    (SpectralNorm, "remove"),
    (BasePruningMethod, "remove"),
)


def torchs_functions() -> list[Any]:
    """Return what stands in the classes themselves; None is what they inherit."""
    return [owner.__dict__.get(name) for owner, name in PLACES]


def adapted() -> nn.Module:
    return li.inject(nn.Sequential(nn.Linear(3, 3)), {"rank": 2, "targets": ["0"]})


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


def reads_under_a_wrapper() -> int:
    """Return how often a wrapper that came later was called; it must not lose ours."""
    calls = []
    model = adapted()
    ours = nn.Module.get_parameter

    def theirs(self: nn.Module, target: str) -> Any:
        calls.append(target)
        return ours(self, target)

    nn.Module.get_parameter = theirs  # type: ignore[method-assign]
    li.eject(model)
    del model
    gc.collect()
    assert nn.Module.get_parameter is theirs
    plain, again = nn.Linear(2, 2), adapted()
    assert plain.get_parameter("weight") is plain.weight
    assert again.get_parameter("0.weight") is dict(again.named_parameters())["0.weight"]
    return len(calls)


def test_a_wrapper_that_somebody_puts_over_ours_stays_and_so_does_ours(forks) -> None:
    assert forks.start(reads_under_a_wrapper).result() == 2
