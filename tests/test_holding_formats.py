"""Which formats can hold an adapter is said before it is trained, and one call always works."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import fill
from helpers.models import IDS, Several

import lora_inject as li
from lora_inject.errors import FormatError

ROOT = {"rank": 2, "targets": ["mix", "fc"]}  # PEFT has no place for parameters of the root
PLAIN = {"rank": 2, "targets": ["fc"]}
CALL = 'save_adapter(model, path, format="native")'
SAID = "save_adapter cannot write this as 'peft': site 'mix'"


def test_the_plan_and_the_summary_say_what_the_default_format_cannot_hold() -> None:
    text = " ".join(str(li.plan(Several(), ROOT)).split())
    assert f"note: {SAID}" in text
    assert CALL in text
    assert "save_adapter" not in str(li.plan(Several(), PLAIN))
    model = li.inject(li.inject(Several(), ROOT, "hard"), PLAIN, "easy")
    (line,) = [line for line in li.summary(model).splitlines() if "save_adapter" in line]
    assert line.startswith(f"hard: {SAID}")


def test_the_message_names_the_call_that_works(tmp_path: Path) -> None:
    plain = Several()
    model = fill(li.inject(copy.deepcopy(plain), ROOT))
    with pytest.raises(FormatError) as raised:
        li.save_adapter(model, tmp_path / "out")
    assert CALL in str(raised.value)
    written = li.save_adapter(model, tmp_path / "out", format="native")
    assert written == tmp_path / "out.safetensors"
    with pytest.raises(FormatError, match=r"out\.safetensors"):
        li.load_adapter(plain, tmp_path / "out")
    torch.testing.assert_close(li.load_adapter(plain, written)(IDS), model(IDS))
    for name, options in (("out.bin", {}), ("versions", {"version": 3})):
        with pytest.raises(FormatError, match=r"does not end in \.safetensors|version"):
            li.save_adapter(model, tmp_path / name, format="native", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"]
