"""Proofs of an adapter: what they cost, and what they notice."""

import weakref
from pathlib import Path
from typing import Any

import torch
from conftest import fill
from helpers.models import tiny_llama
from torch import Tensor

import lora_inject as li

IDS = torch.arange(40).view(2, 20)


def adapted(**changes: Any) -> Any:
    model = tiny_llama(hidden_size=32, vocab_size=64, initializer_range=0.2, **changes).eval()
    return fill(li.inject(model, {"rank": 4, "alpha": 8, "targets": ["all-linear"]}), std=0.1)


def test_a_proof_holds_the_logits_of_one_strength_at_a_time(tmp_path: Path) -> None:
    """Fourteen strengths of eight prompts are gigabytes for a vocabulary of today."""
    model = adapted()
    logits: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def note(_: Any, __: Any, out: Tensor) -> None:
        logits.append(weakref.ref(out.untyped_storage()))
        alive.append(sum(each() is not None for each in logits))

    handle = model.lm_head.register_forward_hook(note)
    li.save_adapter(model, tmp_path / "a", probe=IDS)
    handle.remove()
    assert len(alive) > 10
    assert max(alive) <= len(IDS) + 1, "those of one strength, and the next that is computed"


def test_an_adapter_of_which_a_site_is_missing_is_not_with_the_adapter(tmp_path: Path) -> None:
    model = adapted(num_hidden_layers=8)
    li.save_adapter(model, tmp_path / "a", probe=IDS)
    assert li.verify_loaded(model).word == "with"
    parameters = li.adapter_parameters(model)
    Bs = [name for name in parameters if name.endswith("lora_B")]
    assert len(Bs) == 56
    for name in (Bs[0], Bs[20], Bs[55]):
        kept = parameters[name].detach().clone()
        with torch.no_grad():
            parameters[name].zero_()
        assert li.verify_loaded(model).word != "with", name
        with torch.no_grad():
            parameters[name].copy_(kept)
