"""An adapter_config.json that was edited: it is read as PEFT reads it, or refused.

PEFT leaves out tensors of modules that the config does not target; here that is an error.
"""

import contextlib
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fill
from helpers.adapter_states import edit_config
from torch import nn

import lora_inject as li
from lora_inject.errors import FormatError

peft = pytest.importorskip("peft")


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = {name: nn.Linear(8, 8) for name in ("q", "v", "mlp")}
    table, head = nn.Embedding(12, 8), nn.Linear(8, 3)
    return nn.Sequential(OrderedDict(table=table, **layers, head=head))


IDS = torch.arange(12)[None]
EDITS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "biases": {"bias": "all"},
    "another whole module": {"modules_to_save": ["mlp"]},
    "no whole module": {"modules_to_save": None},
    "a target as a whole module": {"modules_to_save": ["head", "v"]},
    "other rows": {"trainable_token_indices": {"table": [2, 6]}},
    "no rows": {"trainable_token_indices": None},
    "a target less": {"target_modules": ["q"]},
    "a target more": {"target_modules": ["q", "v", "mlp"]},
    "an expression for less": {"target_modules": "q"},
    "a target parameter": {"target_parameters": ["mlp.weight"]},
    "no targets": {"target_modules": [], "target_parameters": ["mlp.weight"]},
    "a target left out": {"exclude_modules": ["v"]},
    "layers": {"layers_to_transform": [0]},
}
# What means the same to PEFT, in other words.
SAME: dict[str, dict[str, Any]] = {
    "another order": {"target_modules": ["v", "q"]},
    "nothing left out": {"exclude_modules": []},
    "for training": {"inference_mode": False},
    "a task": {"task_type": "FEATURE_EXTRACTION"},
}


def ours(path: Path) -> Path:
    config = {"rank": 2, "targets": ["q", "v"], "train": ["head"], "tokens": {"table": [3, 5]}}
    return li.save_adapter(fill(li.inject(net(), config)), path, unused=[".*"])


def theirs(path: Path) -> Path:
    rows = {"table": [3, 5]}
    config = peft.LoraConfig(
        r=2, target_modules=["q", "v"], modules_to_save=["head"], trainable_token_indices=rows
    )
    model = peft.get_peft_model(net(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(path)
    return path


edited = pytest.mark.parametrize("fields", [*EDITS.values(), *SAME.values()], ids=[*EDITS, *SAME])


@edited
def test_an_edited_config_of_ours_is_refused_with_the_field(fields: Any, tmp_path: Path) -> None:
    path = edit_config(ours(tmp_path / "a"), **fields)
    refusal = pytest.raises(FormatError, match=rf"{next(iter(fields))}'.*prefer=")
    with refusal if fields in EDITS.values() else contextlib.nullcontext():
        li.load_adapter(net(), path)
    li.load_adapter(net(), path, prefer="metadata")


@edited
@pytest.mark.parametrize("by", [ours, theirs])
def test_an_edited_config_is_read_as_peft_reads_it_or_refused(
    by: Any, fields: dict[str, Any], tmp_path: Path
) -> None:
    path = edit_config(by(tmp_path / "a"), **fields)
    how = {"prefer": "config"} if by is ours else {}
    try:
        model = li.load_adapter(net(), path, **how)
    except FormatError:
        assert fields not in SAME.values()
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        due = peft.PeftModel.from_pretrained(net(), path)
    torch.testing.assert_close(model(IDS), due.get_base_model()(IDS))


def test_tensors_of_modules_that_are_no_targets_can_be_read_on_request(tmp_path: Path) -> None:
    whole = li.load_adapter(net(), theirs(tmp_path / "a"))
    path = edit_config(tmp_path / "a", target_modules=["q"])
    with pytest.raises(FormatError, match=r"'v'.*'target_modules'.*allow="):
        li.load_adapter(net(), path)
    model = li.load_adapter(net(), path, allow=["target_modules"])
    torch.testing.assert_close(model(IDS), whole(IDS))
