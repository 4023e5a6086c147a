"""Ways in which PEFT 0.21.2 was seen to fail and that no other test shows: right here, or refused.

What is right is held to a dense float64 reference, gradients to finite differences of it.
"""

import copy
from pathlib import Path

import pytest
import torch
from conftest import error, same_bits
from helpers.reference import EXACT, adapted, config, dense, hold, llama, logits, random, saved
from helpers.refusals import refused
from safetensors.torch import load_file
from torch import Tensor, nn

import lora_inject as li


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


def test_attention_matched_with_its_own_child_is_adapted_once_or_refused(tmp_path: Path) -> None:
    plain, x = Attention().double(), random(2, 3, 8)
    bare = copy.deepcopy(plain)
    overlapping = config("attn", "out_proj")
    with refused(li.MatchError, "rule 2", "rule 1", model=bare):
        li.inject(bare, overlapping)
    model = adapted(plain, "out_proj", "attn")
    assert {*li.adapters(model)["default"].sites} == {"attn.out_proj", "attn.in_proj_weight"}
    hold(plain, model, lambda m: m(x))
    _, file = saved(model, tmp_path, "native")
    shapes = sorted(tuple(t.shape) for t in load_file(file).values())
    assert shapes == [(2, 8), (2, 8), (8, 2), (24, 2)]


def test_adapters_changed_while_merged_do_not_change_what_unmerge_restores() -> None:
    plain = llama()
    model = adapted(plain, "q_proj")
    held = [p for n, p in model.named_parameters() if "lora_" in n]
    before = logits(model)
    li.merge(model)
    with torch.no_grad():
        for parameter in held:
            parameter.mul_(3.0)
    assert error(logits(model), before) < EXACT
    li.unmerge(model)
    kept = {key: t for key, t in model.state_dict().items() if "lora_" not in key}
    assert all(same_bits(t, kept[key]) for key, t in plain.state_dict().items())


def test_statistics_of_a_base_in_pefts_files_are_refused_by_what_they_are(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    plain = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    config = peft.LoraConfig(target_modules=["0"], modules_to_save=["1"])
    peft.get_peft_model(copy.deepcopy(plain), config).save_pretrained(tmp_path)
    with refused(li.FormatError, "'1.", "buffer", model=plain):
        li.load_adapter(plain, tmp_path)


@pytest.mark.parametrize("layer", [nn.GELU(), nn.Conv1d(2, 2, 1), nn.RNN(4, 4)])
def test_an_adapted_model_is_exported(layer: nn.Module) -> None:
    plain = nn.Sequential(nn.Linear(5, 4), layer).double()
    model, x = adapted(plain, *([r"\d"] if [*layer.parameters()] else ["0"])), random(2, 5)

    def run(m: nn.Module) -> Tensor:
        y = m(x)
        return y[0] if isinstance(y, tuple) else y

    exported = torch.export.export(model.eval(), (x,)).module()
    assert error(run(exported), run(dense(plain, model))) < EXACT


def test_pissa_over_a_base_without_values_is_refused() -> None:
    model = llama().to("meta")
    before = [(n, id(m), type(m)) for n, m in model.named_modules()]
    with refused(li.LayerError, "pissa"):
        li.inject(model, config("q_proj", init="pissa"))
    assert [(n, id(m), type(m)) for n, m in model.named_modules()] == before
