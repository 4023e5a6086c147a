"""Which formats can hold an adapter is said before it is trained, and one call always works."""

from pathlib import Path

import pytest
import torch
from conftest import fill
from torch import nn

import lora_inject as li
from lora_inject.errors import FormatError


class Attention(nn.Module):
    """Computes with parameters of the root, for which PEFT has no place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(4, 4))
        self.out = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x @ self.w.T)  # type: ignore[no-any-return]


ROOT = {"rank": 2, "targets": [{"match": "w", "layout": "out_in"}, "out"]}
PLAIN = {"rank": 2, "targets": ["out"]}


def test_the_plan_says_what_the_default_format_cannot_hold() -> None:
    text = " ".join(str(li.plan(Attention(), ROOT)).split())
    assert "note: save_adapter cannot write this as 'peft': site 'w'" in text
    assert 'save_adapter(model, path, format="native")' in text
    assert "save_adapter" not in str(li.plan(Attention(), PLAIN))


def test_the_summary_says_it_right_after_inject() -> None:
    model = li.inject(Attention(), ROOT, "hard")
    li.inject(model, PLAIN, "easy")
    lines = [line for line in li.summary(model).splitlines() if "save_adapter" in line]
    assert len(lines) == 1
    assert lines[0].startswith("hard: save_adapter cannot write this as 'peft': site 'w'")


def test_the_message_names_the_call_that_works(tmp_path: Path) -> None:
    model = fill(li.inject(Attention(), ROOT))
    x = torch.randn(2, 4)
    due = model(x)
    path = tmp_path / "out"
    with pytest.raises(FormatError) as raised:
        li.save_adapter(model, path)
    call = str(raised.value).partition("native: ")[2].rstrip(".") or str(raised.value)
    assert 'save_adapter(model, path, format="native")' in call
    written = li.save_adapter(model, path, format="native")
    assert written == tmp_path / "out.safetensors"
    with pytest.raises(FormatError, match=r"out\.safetensors"):
        li.load_adapter(Attention(), path)
    torch.testing.assert_close(li.load_adapter(Attention(), written)(x), due)


def test_an_ending_of_something_else_is_refused(tmp_path: Path) -> None:
    model = li.inject(Attention(), PLAIN)
    with pytest.raises(FormatError, match=r"does not end in \.safetensors"):
        li.save_adapter(model, tmp_path / "out.bin", format="native")


def test_versions_are_folders(tmp_path: Path) -> None:
    model = li.inject(Attention(), PLAIN)
    with pytest.raises(FormatError, match="version"):
        li.save_adapter(model, tmp_path / "out", format="native", version=3)
    assert not (tmp_path / "out").exists()
