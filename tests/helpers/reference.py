"""Tiny models in float64, adapted, and the dense reference that they are held to."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import error, fill, same_bits
from contract.kinds import ALPHA, RANK, SCALE
from helpers.models import tiny, tiny_llama
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM

import lora_inject as li

EXACT = 1e-12  # float64
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def llama(**options: Any) -> LlamaForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "vocab_size": 13, "initializer_range": 0.3}
    return tiny_llama(**sizes | options).eval().double()


def gpt2_of_two_layers(**options: Any) -> GPT2LMHeadModel:
    sizes = {"n_embd": 8, "vocab_size": 13, "initializer_range": 0.3}
    return tiny(GPT2LMHeadModel, **sizes | options).eval()


def config(*targets: Any, **options: Any) -> dict[str, Any]:
    return {"rank": RANK, "alpha": ALPHA, "targets": list(targets), **options}


def adapted(plain: Any, *targets: Any, **options: Any) -> Any:
    """A copy of the plain model with one adapter, none of whose tensors is zero."""
    return fill(li.inject(copy.deepcopy(plain), config(*targets, **options)))


def deltas(model: nn.Module, name: str = "default") -> Iterator[tuple[str, Tensor]]:
    """Yield the name of each adapted weight and `scale * B @ A`, as the weight lies."""
    for site in li.adapter_state(model, name).sites.values():
        delta = SCALE * site.B.detach().double() @ site.A.detach().double()
        delta = delta.t() if site.spec.transposed else delta
        yield site.spec.weight, delta.reshape(site.spec.weight_shape)


def dense(
    plain: nn.Module, model: nn.Module, name: str = "default", weight: float = 1.0
) -> nn.Module:
    """A float64 copy of the plain model with `W + weight * scale * B @ A` in place of each W.

    Every adapted weight gets a tensor of its own, as if nothing had been tied.
    """
    wide = copy.deepcopy(plain).double()
    for key, delta in deltas(model, name):
        path, _, last = key.rpartition(".")
        owned = wide.get_submodule(path)._parameters
        owned[last] = nn.Parameter((owned[last] + weight * delta).detach())
    return wide


def with_deltas(plain: nn.Module, model: nn.Module, name: str = "default") -> nn.Module:
    """A float64 copy of the plain model with the dense deltas in its weights; ties stay tied."""
    wide = copy.deepcopy(plain).double()
    parameters = dict(wide.named_parameters(remove_duplicate=False))
    for key, delta in deltas(model, name):
        parameters[key].data += delta
    return wide


Run = Callable[[nn.Module], Tensor]


def hold(plain: nn.Module, model: nn.Module, run: Run) -> None:
    """Hold a float64 model to its dense reference: output, gradients, merged and restored."""
    wanted = run(dense(plain, model))
    assert error(run(plain), wanted) > 0.01
    assert error(run(model), wanted) < EXACT
    hold_gradients(plain, model, run)
    bits = {key: t.clone() for key, t in model.state_dict().items()}
    li.merge(model)
    assert error(run(model), wanted) < EXACT
    li.unmerge(model)
    assert all(same_bits(t, bits[key]) for key, t in model.state_dict().items())


def hold_gradients(plain: nn.Module, model: nn.Module, run: Run) -> None:
    """Compare each gradient, along a random direction, with differences of the dense reference."""
    step = 1e-5
    output = run(model)
    weights = torch.randn_like(output)
    parameters = li.adapter_parameters(model)
    gradients = torch.autograd.grad((output * weights).sum(), list(parameters.values()))
    for parameter, gradient in zip(parameters.values(), gradients, strict=True):
        direction, measured = torch.randn_like(parameter), 0.0
        for moved in (step, -step):
            with torch.no_grad():
                parameter.add_(direction, alpha=moved)
                measured += float((run(dense(plain, model)) * weights).sum()) / (2 * moved)
                parameter.sub_(direction, alpha=moved)
        slope = float((gradient * direction).sum())
        assert slope == pytest.approx(measured, rel=1e-6, abs=1e-6)


def saved(model: nn.Module, folder: Path, layout: str) -> tuple[Path, Path]:
    """Save an adapter; return the path to load, and the file that holds the tensors."""
    path = folder / ("a.safetensors" if layout == "native" else "a")
    li.save_adapter(model, path, format=layout)
    return path, path if layout == "native" else path / "adapter_model.safetensors"


def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def base_state(model: nn.Module) -> dict[str, Tensor]:
    return {key: t for key, t in model.state_dict().items() if "lora_" not in key}
