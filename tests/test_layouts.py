"""What the shapes of a weight mean: several axes, stacks, what a class states, and odd ranks."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import tiny_gpt_oss
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel, LlamaConfig

import lora_inject as li
from lora_inject.checkpoint import WeightedAdapter, merge_checkpoint

# Axes of a weight, its shape, and what an einsum makes of it.
EINSUMS: dict[str, tuple[dict[str, list[int]], tuple[int, ...], str]] = {
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


def dense(W: Tensor, axes: dict[str, list[int]], A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W + scale * B @ A, by moving the axes to (stack, out, in) and back."""
    stack = [axis for axis in range(W.dim()) if axis not in (*axes["in"], *axes["out"])]
    order = [*stack, *axes["out"], *axes["in"]]
    moved = (scale * B @ A).reshape([W.shape[axis] for axis in order])
    return W + moved.permute([order.index(axis) for axis in range(W.dim())])


@pytest.fixture(params=EINSUMS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Sequential, dict[str, list[int]], Tensor]:
    torch.manual_seed(0)
    axes, shape, formula = EINSUMS[request.param]
    names = formula.split(",")[0].removeprefix("...")
    sizes = dict(zip(formula.split(",")[1].split("->")[0], shape, strict=True))
    x = torch.randn(5, *(sizes[name] for name in names), dtype=torch.float64)
    return nn.Sequential(Einsum(shape, formula)), axes, x


def adapted(plain: nn.Module, axes: Any) -> tuple[nn.Module, Tensor, Tensor]:
    rule = {"match": "Wq", "layout": axes}
    model = li.inject(copy.deepcopy(plain), {"rank": 2, "alpha": 3, "targets": [rule]})
    A, B = li.adapter_parameters(model).values()
    nn.init.normal_(B)
    return model, A, B


def test_several_axes_are_one_matrix_forward_backward_and_merged(case: Any) -> None:
    plain, axes, x = case
    model, A, B = adapted(plain, axes)
    a, b = A.detach().double().requires_grad_(), B.detach().double().requires_grad_()
    W = dense(plain[0].Wq.detach(), axes, a, b, 1.5)
    wanted = torch.einsum(plain[0].formula, x, W)
    got = model(x)
    torch.testing.assert_close(got, wanted)
    wanted.square().sum().backward()
    got.square().sum().backward()
    torch.testing.assert_close((A.grad, B.grad), (a.grad, b.grad), check_dtype=False)
    li.merge(model)
    torch.testing.assert_close(model(x), wanted)
    li.unmerge(model)
    assert torch.equal(li.eject(model)[0].Wq, plain[0].Wq)


def test_several_axes_survive_a_save_and_a_load_or_peft_is_refused(case, tmp_path) -> None:
    plain, axes, x = case
    model, _, _ = adapted(plain, axes)
    with pytest.raises(li.FormatError, match="dimensions"):
        li.save_adapter(model, tmp_path / "peft")
    li.save_adapter(model, tmp_path / "own.safetensors", format="native")
    loaded = li.load_adapter(copy.deepcopy(plain), tmp_path / "own.safetensors")
    assert torch.equal(loaded(x), model(x))
    wrong = nn.Sequential(Einsum((*plain[0].Wq.shape[:-1], 7), plain[0].formula))
    with pytest.raises(li.FormatError, match="features in the file"):
        li.load_adapter(wrong, tmp_path / "own.safetensors")


@pytest.mark.parametrize("update", ["forward", "weight"])
def test_a_rank_above_the_smaller_side_computes_w_plus_delta(update: str) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 1)).double()
    target = "0" if update == "forward" else r"0\.weight"
    model = li.inject(copy.deepcopy(plain), {"rank": 4, "alpha": 6, "targets": [target]})
    A, B = li.adapter_parameters(model).values()
    nn.init.normal_(B)
    x = torch.randn(3, 6, dtype=torch.float64)
    W = plain[0].weight + 1.5 * B.double() @ A.double()
    wanted = nn.functional.linear(x, W, plain[0].bias)
    torch.testing.assert_close(model(x), wanted)
    li.merge(model)
    torch.testing.assert_close(model(x), wanted)


# What a model states


def test_the_layout_of_experts_is_the_one_that_transformers_class_states() -> None:
    """Square experts: nothing but the class tells (in, out) from (out, in)."""
    plain = tiny_gpt_oss()
    rule = r"experts\.(gate_up|down)_proj"
    for site in li.plan(plain, {"targets": [rule]}).sites:
        assert site.transposed
        assert (site.in_features, site.out_features) == site.weight_shape[1:]
    with pytest.raises(li.MatchError, match="a layout other than in_out"):
        li.plan(plain, {"targets": [{"match": rule, "layout": "out_in"}]})


def test_all_linear_leaves_out_the_head_that_the_model_gives() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    llama = LlamaConfig(**sizes, num_attention_heads=2)
    causal = AutoModelForCausalLM.from_config(llama)
    plan = li.plan(causal, {"targets": ["all-linear"]})
    assert plan.n_sites == 7
    assert "all-linear leaves out the output head 'lm_head'" in plan.notes
    causal.set_output_embeddings(nn.Identity())
    causal.odd = nn.Linear(16, 32)
    causal.get_output_embeddings = lambda: causal.odd  # known by the object, not by its name
    plan = li.plan(causal, {"targets": ["all-linear"]})
    assert "all-linear leaves out the output head 'odd'" in plan.notes
    assert "odd" not in [site.name for site in plan.sites]
    bert = BertModel(BertConfig(**sizes, num_attention_heads=2), add_pooling_layer=False)
    plan = li.plan(bert, {"targets": ["all-linear"]})
    assert plan.n_sites == 6
    assert any("the model states no output head" in note for note in plan.notes)


def test_a_buffer_is_not_a_name_that_matched_nothing() -> None:
    with pytest.raises(li.MatchError, match=r"matches only buffers: '0\.running_mean'"):
        li.plan(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)), {"targets": ["running_mean"]})


def test_several_axes_are_merged_into_a_file(case: Any, tmp_path: Path) -> None:
    plain, axes, _ = case
    model, A, B = adapted(plain, axes)
    base = tmp_path / "base"
    base.mkdir()
    save_file({"0.Wq": plain[0].Wq.detach()}, base / "model.safetensors")
    merge_checkpoint(base, [WeightedAdapter(li.adapter_state(model))], tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")["0.Wq"]
    wanted = dense(plain[0].Wq.detach(), axes, A.detach().double(), B.detach().double(), 1.5)
    torch.testing.assert_close(merged, wanted)
