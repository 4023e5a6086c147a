"""The models that are measured, and how each peer puts adapters onto them.

Everybody gets the same model with the same targets, r = 8 and alpha = 16, and is used as
its documentation says. Weights are random: no time here depends on their values.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_inject import inject

RANK, ALPHA = 8, 16
LLAMA = r"(?:q|k|v|o|gate|up|down)_proj"
GPT2 = r"h\.\d+\.(?:attn|mlp)\.(?:c_attn|c_proj|c_fc)"


@contextmanager
def quiet() -> Any:
    """Silence the peers' advice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def llama(dtype: torch.dtype = torch.float32, *, device: str | None = None, **sizes: Any) -> Any:
    """Return a Llama for causal language modeling: 124M parameters unless sizes say otherwise."""
    from transformers import LlamaConfig, LlamaForCausalLM

    usual = {
        "vocab_size": 50257,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    with torch.device(device or torch.get_default_device()):
        return LlamaForCausalLM(LlamaConfig(**(usual | sizes))).to(dtype)


def gpt2(dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    """Return a GPT-2 without dropout of its own: 124M parameters unless sizes say otherwise."""
    from transformers import GPT2Config, GPT2LMHeadModel

    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**(off | sizes))).to(dtype)


def targets_of(model: nn.Module) -> str:
    """Return the pattern of all linear layers in the blocks."""
    return GPT2 if type(model).__name__.startswith("GPT2") else LLAMA


def with_lora(model: Any, **config: Any) -> Any:
    """Return the model with adapters of this package on all linear layers of its blocks."""
    usual = {"rank": RANK, "alpha": ALPHA, "targets": [targets_of(model)]}
    return inject(model, usual | config)


def with_peft(model: Any, rank: int = RANK, **config: Any) -> Any:
    """Return the model with PEFT's adapters on the same layers."""
    from peft import LoraConfig, get_peft_model

    conv1d = type(model).__name__.startswith("GPT2")
    usual = {"target_modules": f".*{targets_of(model)}", "fan_in_fan_out": conv1d}
    with quiet():
        settings = LoraConfig(r=rank, lora_alpha=ALPHA, **(usual | config))
        return get_peft_model(model, settings)


def with_bare(model: Any, targets: str | None = None, rows: int | None = None) -> Any:
    """Return the model with no more than the operations that the mathematics needs.

    One thin product each way for each of A and B, and what adds them: no checks, one adapter, one
    dtype, nothing that can be changed later. It is what our own rows are judged by.

    Args:
        model: The model, which is changed.
        targets: A pattern of the names of its layers; by default what everybody's rows adapt.
        rows: Give each of so many rows of a batch factors of its own, for inference.
    """
    pattern = re.compile(rf"(?:.*\.)?(?:{targets or targets_of(model)})$")
    model.requires_grad_(False)
    for path, module in list(model.named_modules()):
        if pattern.match(path):
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, _BareLayer(module, rows))
    return model


class _BareLayer(nn.Module):
    def __init__(self, plain: Any, rows: int | None) -> None:
        super().__init__()
        self.weight, self.bias = plain.weight, plain.bias
        self.transposed = not isinstance(plain, nn.Linear)
        n_in, n_out = plain.weight.shape if self.transposed else plain.weight.shape[::-1]
        lead = () if rows is None else (rows,)
        self.A = nn.Parameter(torch.randn(*lead, RANK, n_in) / n_in**0.5)
        self.B = nn.Parameter(torch.zeros(*lead, n_out, RANK))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.t() if self.transposed else self.weight
        if not torch.is_grad_enabled():
            return _bare(x, weight, self.bias, self.A, self.B)[0]
        found: Tensor = _Bare.apply(x, weight, self.bias, self.A, self.B)  # type: ignore[no-untyped-call]
        return found


def _bare(
    x: Tensor, weight: Tensor, bias: Any, A: Tensor, B: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output, and what its backward needs."""
    y = F.linear(x, weight, bias)
    A, B = A.to(x.dtype), B.to(x.dtype)
    if A.dim() == 3:  # a row, a pair of factors
        h = torch.bmm(x, A.mT)
        return y.baddbmm_(h, B.mT, alpha=ALPHA / RANK), A, B, h
    h = x.reshape(-1, x.shape[-1]) @ A.t()
    y.view(-1, y.shape[-1]).addmm_(h, B.t(), alpha=ALPHA / RANK)
    return y, A, B, h


class _Bare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Any, A: Tensor, B: Tensor) -> Tensor:
        y, A, B, h = _bare(x, weight, bias, A, B)
        ctx.save_for_backward(x, weight, A, B, h)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, h = ctx.saved_tensors
        g2, x2 = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        gh = g2 @ B
        gA, gB = (gh.t() @ x2).float() * (ALPHA / RANK), (g2.t() @ h).float() * (ALPHA / RANK)
        gx = (g2 @ weight).addmm_(gh, A, alpha=ALPHA / RANK).view_as(x)
        return gx, None, None, gA, gB


def frozen(model: Any) -> Any:
    """Return the floor: nothing trains, and the output of the embedding requires a gradient."""
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda _m, _i, out: out.requires_grad_())
    return model


def training_step(model: Any, ids: Tensor, *, optimize: bool = True) -> Callable[[], None]:
    """Return one step of training: forward, backward, and AdamW on what trains.

    AdamW is the fused one for everybody, as transformers' Trainer has it by default.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained and optimize else None
    model.train()

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def randomise(parameters: Iterable[Tensor], std: float = 0.02) -> None:
    """Give adapters values, so that none is zero."""
    generator = torch.Generator("cpu").manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator, device="cpu") * std)


class Grove(nn.Module):
    """A tree of so many small linear layers, a thousand in a block, as a mixture of experts has."""

    def __init__(self, n_sites: int, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            _Patch(min(1000, n_sites - start), width) for start in range(0, n_sites, 1000)
        )


class _Patch(nn.Module):
    def __init__(self, n_sites: int, width: int) -> None:
        super().__init__()
        names = ("gate_proj", "up_proj", "down_proj", "router_proj")
        self.experts = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(width, width, bias=False) for name in names})
            for _ in range(n_sites // len(names))
        )


class Stack(nn.Module):
    """Linear layers one after the other."""

    def __init__(self, n: int, width: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(n))
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x
