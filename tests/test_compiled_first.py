"""Compiled before or after inject."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import error, fill, same_bits
from helpers.reference import (
    EXACT,
    Block,
    config,
    dense,
    random,
    saved,
)
from torch import nn

import lora_inject as li


@pytest.mark.slow
@pytest.mark.parametrize("first", ["compile", "inject"])
def test_compiled_before_or_after_inject(first: str, tmp_path: Path) -> None:
    plain, x = nn.Sequential(Block(), Block()).double(), random(3, 4)
    model: Any = copy.deepcopy(plain)
    if first == "compile":
        model = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert error(model(x), plain(x)) < EXACT  # a graph of the plain model is there
    li.inject(model, config("up", r"down\.weight"))
    if first == "inject":
        model = torch.compile(model, backend="aot_eager", fullgraph=True)
    inner = model._orig_mod
    assert same_bits(model(x), plain(x))
    fill(model)
    wanted = dense(plain, inner)(x)
    assert error(model(x), wanted) < EXACT
    path, _ = saved(model, tmp_path, "native")
    li.merge(model)
    assert error(model(x), wanted) < EXACT
    li.unmerge(model)
    assert error(model(x), wanted) < EXACT
    li.eject(model)
    assert same_bits(model(x), plain(x))
    li.load_adapter(model, path)
    assert error(model(x), wanted) < EXACT
