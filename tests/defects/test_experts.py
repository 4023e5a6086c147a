"""Stacks of experts: their start, and the file of a profile."""

from pathlib import Path

import pytest
import torch
from conftest import same_bits
from helpers.experts import experts
from transformers import MixtralConfig, MixtralForCausalLM

import lora_inject as li

IDS = torch.arange(12).view(3, 4)


def test_batched_products_of_experts_begin_at_the_base() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 31}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    settings = MixtralConfig(**sizes, **heads, num_local_experts=8)
    settings._experts_implementation = "batched_mm"
    model = MixtralForCausalLM(settings).eval()
    with torch.no_grad():
        plain = model(IDS).logits
        li.inject(model, {"rank": 2, "targets": ["all-experts"]})
        assert same_bits(model(IDS).logits, plain)


def test_a_profile_is_written_to_a_path_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model, _ = experts("mixtral")
    written = li.profile_experts(model, [{"input_ids": IDS}]).write("~/profile.yaml")
    assert written == tmp_path / "profile.yaml"
    assert "experts" in written.read_text()
