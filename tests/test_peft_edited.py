"""An adapter_config.json that was edited: it is read as PEFT reads it, or refused.

The tensors say which sites there are; PEFT asks the config, and leaves out tensors of modules that
it does not target. So a config that no longer fits its tensors is an error.
"""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fill
from helpers.adapter_states import edit_config
from torch import Tensor, nn

import lora_inject as li
from lora_inject.errors import FormatError

peft = pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(12, 8)
        self.q, self.v, self.mlp = (nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.head(self.mlp(self.v(self.q(x).relu())))  # type: ignore[no-any-return]


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
    return li.save_adapter(fill(li.inject(Net(), config)), path, unused=[".*"])


def theirs(path: Path) -> Path:
    rows = {"table": [3, 5]}
    config = peft.LoraConfig(
        r=2, target_modules=["q", "v"], modules_to_save=["head"], trainable_token_indices=rows
    )
    model = peft.get_peft_model(Net(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("fields", EDITS.values(), ids=EDITS)
def test_an_edited_config_of_ours_is_refused_with_the_field(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    path = edit_config(ours(tmp_path / "a"), **fields)
    with pytest.raises(FormatError, match=rf"{next(iter(fields))}'.*prefer="):
        li.load_adapter(Net(), path)
    li.load_adapter(Net(), path, prefer="metadata")


@pytest.mark.parametrize("fields", SAME.values(), ids=SAME)
def test_other_words_for_the_same_are_read(fields: dict[str, Any], tmp_path: Path) -> None:
    li.load_adapter(Net(), edit_config(ours(tmp_path / "a"), **fields))


@pytest.mark.parametrize("by", [ours, theirs])
@pytest.mark.parametrize("fields", [*EDITS.values(), *SAME.values()], ids=[*EDITS, *SAME])
def test_an_edited_config_is_read_as_peft_reads_it_or_refused(
    by: Any, fields: dict[str, Any], tmp_path: Path
) -> None:
    path = edit_config(by(tmp_path / "a"), **fields)
    how = {"prefer": "config"} if by is ours else {}
    try:
        model = li.load_adapter(Net(), path, **how)
    except FormatError:
        assert fields not in SAME.values()
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        due = peft.PeftModel.from_pretrained(Net(), path)
    torch.testing.assert_close(model(IDS), due.get_base_model()(IDS))


def test_tensors_of_modules_that_are_no_targets_can_be_read_on_request(tmp_path: Path) -> None:
    whole = li.load_adapter(Net(), theirs(tmp_path / "a"))
    path = edit_config(tmp_path / "a", target_modules=["q"])
    with pytest.raises(FormatError, match=r"'v'.*'target_modules'.*allow="):
        li.load_adapter(Net(), path)
    model = li.load_adapter(Net(), path, allow=["target_modules"])
    torch.testing.assert_close(model(IDS), whole(IDS))
