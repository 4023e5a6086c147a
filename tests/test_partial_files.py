"""Files that are damaged or incomplete, scales and adapters that travel in several rounds."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import (
    ALPHA,
    RANK,
    Host,
    fill,
    same_bits,
    snapshot,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_inject as li

CONFIG = {"rank": RANK, "alpha": ALPHA}


def test_alpha_lost(tmp_path: Path) -> None:
    rules = [
        {"match": "before", "rank": 1, "alpha": 5},
        {"match": "layer", "rank": 2, "alpha": 0.5, "scaling": "rslora"},
    ]
    wanted = {"before": 5.0, "layer": 0.5 / math.sqrt(2)}
    plain = Host(nn.Linear(5, 6))
    model = fill(li.inject(copy.deepcopy(plain), {"alpha": 99, "targets": rules}))
    x, x2 = torch.randn(3, 5), torch.randn(3, 2)
    li.save_adapter(model, tmp_path / "a")
    other = copy.deepcopy(plain)
    fill(
        li.inject(other, {"rank": 1, "alpha": 7, "targets": ["layer", "before"]}, "older"), "older"
    )
    li.load_adapter(other, tmp_path / "a", "newer")
    for loaded, name in ((model, "default"), (other, "newer"), (copy.deepcopy(other), "newer")):
        sites = li.adapter_state(loaded, name).sites
        assert {n: site.scale for n, site in sites.items()} == wanted
        li.activate(loaded, name)
        assert same_bits(loaded(x), model(x))
        assert same_bits(loaded.before(x2), model.before(x2))
    assert li.adapter_state(other, "older").sites["layer"].scale == 7.0
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    config["lora_alpha"] = 12345
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    # A side file that contradicts the tensors is neither believed nor ignored in silence.
    with pytest.raises(li.FormatError, match=r"(?i)alpha"):
        li.load_adapter(copy.deepcopy(plain), tmp_path / "a", "again")


def _drop(tensors: dict[str, Tensor]) -> None:
    del tensors[next(k for k in tensors if "lora_B" in k and "layer" in k)]


def _add(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.nowhere.lora_A.weight"] = torch.ones(2, 5)
    tensors["base_model.model.nowhere.lora_B.weight"] = torch.ones(6, 2)


def _stray(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.layer.lora_magnitude_vector"] = torch.ones(6)


def _misshape(tensors: dict[str, Tensor]) -> None:
    key = next(k for k in tensors if "lora_B" in k and "layer" in k)
    tensors[key] = torch.ones(7, 2)


def _misrank(tensors: dict[str, Tensor]) -> None:
    key = next(k for k in tensors if "lora_A" in k and "layer" in k)
    tensors[key] = torch.ones(1, 5)


@pytest.mark.parametrize("damage", [_drop, _add, _stray, _misshape, _misrank])
def test_partial_load(damage: Callable[[dict[str, Tensor]], None], tmp_path: Path) -> None:
    plain = Host(nn.Linear(5, 6))
    model = fill(li.inject(copy.deepcopy(plain), {**CONFIG, "targets": ["layer", "before"]}))
    li.save_adapter(model, tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path)  # as peft itself would write it, without our metadata
    before = snapshot(plain)
    with pytest.raises(li.FormatError):
        li.load_adapter(plain, tmp_path / "a")
    assert snapshot(plain) == before


def test_partial_load_by_an_argument_that_names_what_is_let_go(tmp_path: Path) -> None:
    config = {**CONFIG, "targets": ["layer", "before"], "train": ["after"]}
    plain = Host(nn.Linear(5, 6))
    model = fill(li.inject(copy.deepcopy(plain), config))
    li.save_adapter(model, tmp_path / "a")
    with pytest.raises(li.FormatError, match="matches nothing"):
        li.load_adapter(plain, tmp_path / "a", leave_out=["aftr"])
    li.load_adapter(plain, tmp_path / "a", leave_out=["before", "after"])
    info = li.adapters(plain)["default"]
    assert (list(info.sites), info.trained) == (["layer"], ())


def test_train_eval(tmp_path: Path) -> None:
    config = {**CONFIG, "dropout": 0.5, "targets": ["layer"]}
    model = fill(li.inject(Host(nn.Linear(5, 6)).eval(), config))
    x = torch.randn(50, 5)
    li.save_adapter(model, tmp_path / "a")
    loaded = li.load_adapter(li.eject(copy.deepcopy(model)), tmp_path / "a")
    for m in (model, loaded):
        assert not m.layer.training
        assert same_bits(m(x), m(x)), "dropout is active in an eval model"
        m.train()
        assert not same_bits(m(x), m(x))
        m.eval()
        assert same_bits(m(x), m(x))
    assert same_bits(loaded(x), model(x))
