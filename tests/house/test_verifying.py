"""Verifying finds what a mistake in the code that merges would do: each is made here."""

from pathlib import Path

import pytest
import torch
from helpers.merging import adapter_of, merge, save_checkpoint
from helpers.refusals import refused
from torch import Tensor

import lora_inject as li
from lora_inject.checkpoint import pieces
from lora_inject.checkpoint.places import Places

MISTAKES = {
    "another tensor": (Places, "rule", lambda self, name: name.replace("0.", "1.")),
    "transposed": (pieces.Delta, "over_", lambda self, *at: self.true(*at).T.clone()),
    "not scaled": (pieces.Delta, "over_", lambda self, *at: self.true(*at).mul_(0.999)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_the_merge_is_found(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors: dict[str, Tensor] = {f"{n}.weight": torch.randn(16, 16) for n in "01"}
    base = save_checkpoint(tmp_path / "base", tensors)
    state = adapter_of(tensors, "0")
    merge(base, [state], tmp_path / "right")
    owner, name, wrong = MISTAKES[mistake]
    monkeypatch.setattr(owner, "true", getattr(owner, name), raising=False)
    monkeypatch.setattr(owner, name, wrong)
    with refused(li.CheckpointError, "verify the merged checkpoint", ".weight'"):
        merge(base, [state], tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
