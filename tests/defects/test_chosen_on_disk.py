"""Adapters of some experts of a stack, or with a shared factor: merged on disk, analyzed, known."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fill
from contract.kinds import Experts
from helpers.experts import TURNED, experts
from helpers.merging import load_checkpoint
from helpers.refusals import refused
from helpers.states import effect
from helpers.versions import needs_transformers_5
from safetensors.torch import save_file
from torch import Tensor, nn

import lora_inject as li
from lora_inject.checkpoint import WeightedAdapter

pytestmark = needs_transformers_5
STACK = "model.layers.0.mlp.experts.down_proj"
RULES: dict[str, dict[str, Any]] = {
    "only two": {"only": [0, 2]}, "only one": {"only": [1]},
    "share A": {"share": "A"}, "share B": {"share": "B"},
}  # fmt: skip


def adapted(family: str, folder: Path, **rule: Any) -> tuple[Any, dict[str, Tensor]]:
    """A model with an adapter on a stack, its base saved, and the base's tensors."""
    model = experts(family)[0]
    model.save_pretrained(folder)
    rule = {"match": r"experts\.down_proj", "rank": 2, "alpha": 3.0, **rule}
    return fill(li.inject(model, {"targets": [rule]})), load_checkpoint(folder)


def delta_of(model: Any, family: str, only: Sequence[int] = range(3)) -> Tensor:
    """The update of each expert as its matrix lies; zero of those that are left out."""
    update = effect(li.adapter_state(model).sites[STACK])
    update = update.mT if family in TURNED else update
    full = update.new_zeros(3, *update.shape[1:])
    full[[*only]] = update
    return full


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])  # apart in files, and as a stack
@pytest.mark.parametrize(
    ("rule", "given"), [*zip(RULES, ("file", "value", "weighted", "file"), strict=True)]
)
def test_what_is_merged_on_disk_is_the_delta_of_the_chosen_experts(
    rule: str, family: str, given: str, tmp_path: Path
) -> None:
    model, before = adapted(family, tmp_path / "base", **RULES[rule])
    state = li.adapter_state(model)
    delta = delta_of(model, family, RULES[rule].get("only", range(3)))
    adapter: Any = WeightedAdapter(state, 2.0) if given == "weighted" else state
    if given == "file":
        adapter = li.save_adapter(model, tmp_path / "a", format="native")
    li.merge_checkpoint(tmp_path / "base", [adapter], tmp_path / "out")
    merged = load_checkpoint(tmp_path / "out")
    part = {n: t for n, t in before.items() if "experts" in n and ("w2" in n or n == STACK)}
    assert part
    for name, W in before.items():
        due = torch.zeros_like(W)
        if name in part:
            due = delta.float() if name == STACK else delta[int(name.split(".")[-3])].float()
        due = due * (2 if given == "weighted" else 1)
        torch.testing.assert_close(merged[name], W + due, rtol=0, atol=1e-5)


def test_the_report_of_a_stack_is_that_of_the_merge_in_memory(tmp_path: Path) -> None:
    """The size of W was that of the chosen experts alone, and a damaged one beside them passed."""
    model, before = adapted("gpt_oss", tmp_path / "base", only=[0, 2])
    state = replace(li.adapter_state(model), fingerprint=None)
    on_disk = li.merge_checkpoint(tmp_path / "base", [state], tmp_path / "out").tensors[STACK]
    W = before[STACK].double()
    size = float(delta_of(model, "gpt_oss", [0, 2]).norm() / W.norm())
    assert on_disk.relative == pytest.approx(size, rel=1e-5)
    damaged = before | {STACK: before[STACK].index_fill(0, torch.tensor([1]), torch.nan)}
    save_file(damaged, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with refused(li.CheckpointError, f"'{STACK}'", "NaN"):
        li.merge_checkpoint(tmp_path / "base", [state], tmp_path / "no")


@pytest.mark.parametrize("rule", RULES)
def test_an_adapter_of_chosen_experts_is_truncated_too(rule: str, tmp_path: Path) -> None:
    model, _ = adapted("mixtral", tmp_path / "base", **RULES[rule])
    cut = li.truncate(li.adapter_state(model), rank=2).state.sites[STACK]
    due = delta_of(model, "mixtral", RULES[rule].get("only", range(3)))
    torch.testing.assert_close(effect(cut), due, rtol=0, atol=1e-5)


@pytest.mark.parametrize("given", ["value", "file"])
def test_an_analysis_is_of_the_chosen_experts(given: str, tmp_path: Path, run: Any) -> None:
    model, _ = adapted("gpt_oss", tmp_path / "base", only=[1, 2])
    path = li.save_adapter(model, tmp_path / "a", format="native")
    adapter = li.adapter_state(model) if given == "value" else li.read_adapter(path)
    found = li.analysis.analyze(adapter, tmp_path / "base")
    assert [block.label for block in found.blocks] == ["expert 1", "expert 2"]
    assert [block.label for block in found.on_weight()] == ["expert 1", "expert 2"]
    for block in found.blocks:
        number = int(block.label.removeprefix("expert "))
        due = torch.linalg.svdvals(delta_of(model, "gpt_oss", [1, 2])[number])
        torch.testing.assert_close(block.spectrum.values, due[:2])
    ran = run("analyze", path, "--base", tmp_path / "base")
    assert ran.code == 0, ran.err
    assert "The delta is zero" not in ran.out + ran.err


def test_an_adapters_own_merged_base_is_told_from_its_base(tmp_path: Path) -> None:
    """Evenly spaced samples of 64 experts miss the second one."""
    model = nn.Sequential(Experts("bi,eoi->beo", 64, 4, 4))
    rule = {"match": "up", "layout": "out_in", "rank": 2, "only": [1]}
    path = li.save_adapter(fill(li.inject(model, {"targets": [rule]})), tmp_path / "a.safetensors",
                           format="native")  # fmt: skip
    li.merge(model)
    li.eject(model)
    with refused(li.FormatError, "0.up", model=model):
        li.load_adapter(model, path)
