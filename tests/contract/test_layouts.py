"""What the shapes of a weight mean: several axes, stacks, what a class states, and odd ranks."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fill
from helpers.models import tiny, tiny_llama
from helpers.reference import adapted, hold, random
from helpers.refusals import refused
from helpers.versions import needs_transformers_5
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GptOssForCausalLM

import lora_inject as li

# Axes of a weight, its shape, and what an einsum makes of it.
EINSUMS: dict[str, tuple[dict[str, list[int]], tuple[int, ...], str]] = {
    "in, out": ({"in": [0], "out": [1]}, (6, 4), "...d,dh->...h"),
    "in, out x out": ({"in": [0], "out": [1, 2]}, (6, 4, 3), "...d,dhk->...hk"),
    "out, in x in": ({"in": [1, 2], "out": [0]}, (6, 4, 3), "...hk,dhk->...d"),
    "in x in, out": ({"in": [0, 1], "out": [2]}, (4, 3, 6), "...hk,hkd->...d"),
    "out x out, in": ({"in": [2], "out": [0, 1]}, (4, 3, 6), "...d,hkd->...hk"),
    "stack, in, out x out": ({"in": [1], "out": [2, 3]}, (2, 6, 4, 3), "...ed,edhk->...ehk"),
}


class Einsum(nn.Module):
    def __init__(self, shape: tuple[int, ...], formula: str) -> None:
        super().__init__()
        self.formula = formula
        self.Wq = nn.Parameter(torch.randn(shape, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum(self.formula, x, self.Wq)


def dense(W: Tensor, axes: dict[str, list[int]], A: Tensor, B: Tensor) -> Tensor:
    """W + 1.5 * B @ A, by moving the axes to (stack, out, in) and back."""
    stack = [axis for axis in range(W.dim()) if axis not in (*axes["in"], *axes["out"])]
    order = [*stack, *axes["out"], *axes["in"]]
    moved = (1.5 * B @ A).reshape([W.shape[axis] for axis in order])
    return W + moved.permute([order.index(axis) for axis in range(W.dim())])


@pytest.mark.parametrize("name", EINSUMS)
def test_several_axes_are_one_matrix_in_memory_and_on_disk(name: str, tmp_path: Path) -> None:
    axes, shape, formula = EINSUMS[name]
    letters, sizes = formula.split(",")[0].removeprefix("..."), iter(shape)
    length = dict(zip(formula.split(",")[1].split("->")[0], sizes, strict=True))
    x = random(5, *(length[letter] for letter in letters))
    plain = nn.Sequential(Einsum(shape, formula))
    config = {"rank": 2, "alpha": 3, "targets": [{"match": "Wq", "layout": axes}]}
    model = fill(li.inject(copy.deepcopy(plain), config))
    A, B = li.adapter_parameters(model).values()
    a, b = (t.detach().double().requires_grad_() for t in (A, B))
    W = dense(plain[0].Wq.detach(), axes, a, b)
    wanted, y = torch.einsum(formula, x, W), model(x)
    torch.testing.assert_close(y, wanted)
    wanted.square().sum().backward()
    y.square().sum().backward()
    torch.testing.assert_close((A.grad, B.grad), (a.grad, b.grad), check_dtype=False)
    li.merge(model)
    torch.testing.assert_close(model(x), wanted)
    li.unmerge(model)

    path = li.save_adapter(model, tmp_path / "own.safetensors", format="native")
    assert torch.equal(li.load_adapter(copy.deepcopy(plain), path)(x), y)
    wrong = nn.Sequential(Einsum((*shape[:-1], 7), formula))
    with refused(li.FormatError, "'0.Wq'"):
        li.load_adapter(wrong, path)
    if len(shape) > 2:
        with refused(li.FormatError, "'0.Wq'", 'format="native"'):
            li.save_adapter(model, tmp_path / "peft")
    (tmp_path / "base").mkdir()
    save_file({"0.Wq": plain[0].Wq.detach()}, tmp_path / "base" / "model.safetensors")
    li.merge_checkpoint(tmp_path / "base", [path], tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")["0.Wq"]
    torch.testing.assert_close(merged, W.detach())
    assert torch.equal(li.eject(model)[0].Wq, plain[0].Wq)


@pytest.mark.parametrize("target", ["0", r"0\.weight"])
def test_a_rank_above_the_smaller_side_computes_w_plus_delta(target: str) -> None:
    plain, x = nn.Sequential(nn.Linear(6, 1)).double(), random(3, 6)
    hold(plain, adapted(plain, target, rank=4, alpha=6), lambda m: m(x))


# What a model states


@needs_transformers_5
def test_the_layout_of_experts_is_the_one_that_transformers_class_states() -> None:
    """Square experts: nothing but the class tells (in, out) from (out, in)."""
    plain = tiny(GptOssForCausalLM).eval()
    rule = r"experts\.(gate_up|down)_proj"
    for site in li.plan(plain, {"targets": [rule]}).sites:
        assert site.transposed
        assert (site.in_features, site.out_features) == site.weight_shape[1:]
    with refused(li.MatchError, "in_out"):
        li.plan(plain, {"targets": [{"match": rule, "layout": "out_in"}]})


def test_all_linear_leaves_out_the_head_that_the_model_gives() -> None:
    causal: Any = tiny_llama()
    plan = li.plan(causal, {"targets": ["all-linear"]})
    assert plan.n_sites == 14
    assert "all-linear leaves out the output head 'lm_head'" in plan.notes
    causal.odd = nn.Linear(16, 32)
    causal.get_output_embeddings = lambda: causal.odd  # known by the object, not by its name
    plan = li.plan(causal, {"targets": ["all-linear"]})
    assert "all-linear leaves out the output head 'odd'" in plan.notes
    assert "odd" not in [site.name for site in plan.sites]
    plan = li.plan(nn.Sequential(causal.model.layers), {"targets": ["all-linear"]})
    assert any("the model states no output head" in note for note in plan.notes)
