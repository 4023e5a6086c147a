"""Stacks of experts: their start, and the file of a profile."""

from pathlib import Path

import pytest
import torch
from conftest import same_bits
from helpers.experts import MOE, MORE, experts
from helpers.versions import needs_transformers_5

import lora_inject as li

IDS = torch.arange(12).view(3, 4)


@needs_transformers_5
@pytest.mark.parametrize("family", [*MOE, *MORE])
def test_batched_products_of_experts_begin_at_the_base(family: str) -> None:
    model, _ = experts(family, "batched_mm", hidden_size=64)
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
