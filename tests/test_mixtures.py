"""`all-experts`, rank for each active expert, and what a plan says of a mixture of experts."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import error, fill, same_bits
from helpers.checkpoints import merged_on_disk
from helpers.experts import (
    MOE,
    MORE,
    check_like_dense,
    experts,
    with_expert_deltas,
)
from helpers.reference import RANK, adapted, config, dense, hold, logits, refused
from torch import Tensor, nn

import lora_inject as li

ALL = MOE | MORE
ROUTED = {"match": "all-experts"}


def stacks(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.dim() == 3}


# ------------------------------------------------------------------- the table of architectures


@pytest.mark.filterwarnings("ignore")  # of PEFT's
@pytest.mark.parametrize("family", ALL)
def test_experts_of_every_architecture(family: str, tmp_path: Path) -> None:
    """Planned, exchanged with PEFT both ways, merged on disk."""
    plain, layout = experts(family)
    plan = li.plan(plain, config("all-experts"))
    assert {site.name for site in plan.sites} == {*stacks(plain)}
    assert all(site.transposed == (layout == "in_out") for site in plan.sites)
    assert plan.n_lora == sum(RANK * len(p) * sum(p.shape[1:]) for p in stacks(plain).values())
    assert "router not adapted" in next(note for note in plan.notes if "experts, " in note)

    model = adapted(plain, "all-experts")
    li.save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours")
    assert error(logits(theirs), logits(model)) < 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    again = li.load_adapter(copy.deepcopy(plain), tmp_path / "theirs")
    assert error(logits(again), logits(model)) < 1e-5
    merged = merged_on_disk(plain, tmp_path / "ours", tmp_path)
    for name, p in stacks(with_expert_deltas(plain, model, layout)).items():
        assert error(merged.get_parameter(name), p) < 1e-6, name


@pytest.mark.parametrize("family", MORE)
def test_experts_train_and_merge_as_the_dense_model(family: str) -> None:
    check_like_dense(family, lambda layout: "all-experts")


def dbrx() -> Any:
    torch.manual_seed(0)
    inner = {"ffn_hidden_size": 6, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 8}
    sizes = {"d_model": 8, "n_heads": 2, "n_layers": 1, "vocab_size": 13, "max_seq_len": 16}
    heads = {"kv_n_heads": 1, "rope_theta": 10000.0, "clip_qkv": 8.0}
    settings = transformers.DbrxConfig(**sizes, attn_config=heads, ffn_config=inner)
    model = transformers.DbrxForCausalLM(settings)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.filterwarnings("ignore")  # of PEFT's
def test_experts_that_lie_in_one_matrix_are_adapted_as_that_matrix(tmp_path: Path) -> None:
    """DBRX: A is (rank, in) for all experts, B has the rows of each."""
    plain = dbrx().double()
    plan = li.plan(plain, config("all-experts"))
    stem = "transformer.blocks.0.ffn.experts.mlp"
    assert {site.name for site in plan.sites} == {f"{stem}.{name}" for name in ("w1", "v1", "w2")}
    assert plan.n_lora == 3 * RANK * (4 * 6 + 8)
    notes = " ".join(plan.notes)
    assert "1 block of 4 experts, 2 of them for each token; router not adapted" in notes
    assert f"the experts of a matrix have one A: '{stem}.w1'" in notes
    halved = li.plan(plain, config({"match": "all-experts", "rank": {"active": 8}}))
    assert {site.rank for site in halved.sites} == {4}
    only = config({"match": "all-experts", "only": [0]})
    refused(plain, lambda: li.inject(plain, only), li.MatchError, "a parameter of its own")

    model = adapted(plain, "all-experts")
    li.save_adapter(model, tmp_path / "ours")
    hold(plain, model, logits)
    wanted = logits(dense(plain, model))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")  # but its own forward raises
    again = li.load_adapter(copy.deepcopy(plain), tmp_path / "theirs")
    merged = merged_on_disk(plain.float(), tmp_path / "ours", tmp_path)
    for reader in (again, merged):
        assert error(logits(reader), wanted) < 1e-5


# ------------------------------------------------------------------------------- what is an expert


class Expert(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())  # type: ignore[no-any-return]


class Routed(nn.Module):
    """Experts in a list, as remote code and transformers 4 have them."""

    def __init__(self, top_k: Any = 2, n: int = 3, outputs: int = 3) -> None:
        super().__init__()
        if top_k is not None:
            self.top_k = top_k
        self.gate = nn.Linear(4, outputs, bias=False)
        self.blocks = nn.ModuleList(Expert() for _ in range(n))
        self.always = Expert()

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        y = self.always(x)
        for n, block in enumerate(self.blocks):
            y = y + (weights * (chosen == n)).sum(-1, keepdim=True) * block(x)
        return y  # type: ignore[no-any-return]


class Stacked(nn.Module):
    """A stack that no class of transformers knows."""

    def __init__(self, top_k: int | None = 2) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 3)
        self.w = nn.Parameter(torch.randn(3, 4, 4))
        self.num_experts_per_tok = top_k


LISTED = {f"0.blocks.{n}.{part}" for n in range(3) for part in ("up", "down")}


def test_experts_in_a_list_are_known_by_the_router_beside_them() -> None:
    plan = li.plan(nn.Sequential(Routed()), {"targets": ["all-experts"]})
    assert {site.name for site in plan.sites} == LISTED
    assert plan.notes[0] == (
        "1 block of 3 experts, 2 of them for each token; router not adapted: '0.gate'; "
        "shared not adapted: '0.always.up', '0.always.down'"
    )


def test_all_linear_leaves_experts_in_a_list_to_all_experts() -> None:
    model, x = nn.Sequential(Routed()).double(), torch.randn(5, 4, dtype=torch.float64)
    alone = li.plan(model, {"targets": ["all-linear"]})
    assert {site.name for site in alone.sites} > LISTED
    both = {"rank": 3, "targets": ["all-linear", {"match": "all-experts", "rank": {"active": 2}}]}
    rules = {site.name: (site.rule, site.rank) for site in li.plan(model, both).sites}
    others = ("0.gate", "0.always.up", "0.always.down")
    assert rules == dict.fromkeys(LISTED, (1, 1)) | dict.fromkeys(others, (0, 3))
    wanted = model(x)
    assert same_bits(li.inject(model, both)(x), wanted)


def of_another_shape() -> nn.Module:
    block = Routed()
    block.blocks[1] = Expert(7)
    return block


def with_a_head() -> nn.Module:
    """As many outputs as layers, and a config that says top_k for the whole model."""
    model: Any = nn.Module()
    model.config = type("Config", (), {"num_experts_per_tok": 2})()
    model.layers, model.score = nn.ModuleList(Expert() for _ in range(3)), nn.Linear(4, 3)
    return model


NO_EXPERTS = {
    "no top_k": Routed(top_k=None),
    "no router": Routed(outputs=5),
    "other shapes": of_another_shape(),
    "a head is no router": with_a_head(),
}


@pytest.mark.parametrize("block", NO_EXPERTS)
def test_a_list_without_a_router_that_chooses_is_no_experts(block: str) -> None:
    model = nn.Sequential(NO_EXPERTS[block])
    inject = lambda: li.inject(model, {"targets": ["all-experts"]})  # noqa: E731
    refused(model, inject, li.MatchError, "no experts that a router chooses")


def test_a_stack_of_an_unknown_class_is_experts_beside_a_router_and_asks_for_its_layout() -> None:
    model = nn.Sequential(Stacked())
    with pytest.raises(li.MatchError, match="which side is the input"):
        li.plan(model, {"targets": ["all-experts"]})
    plan = li.plan(model, {"targets": [{"match": "all-experts", "layout": "out_in"}]})
    assert [site.name for site in plan.sites] == ["0.w"]
    words = r"no experts .*it has '0.w'.*Name the stack by a pattern"
    with pytest.raises(li.MatchError, match=words):
        li.plan(nn.Sequential(Stacked(None)), {"targets": ["all-experts"]})


# ------------------------------------------------------------------ rank for the active experts


@pytest.mark.parametrize(("family", "rank"), [("qwen3_moe", 16), ("llama4", 32)])
def test_the_rank_of_active_experts_is_divided_by_the_models_own_number(family, rank) -> None:
    model, _ = experts(family)
    config = {"alpha": 32, "targets": [ROUTED | {"rank": {"active": 32}}]}
    plan = li.plan(model, config)
    assert {(site.rank, site.scale) for site in plan.sites} == {(rank, 32 / rank)}
    n_lora = rank * sum(len(p) * sum(p.shape[1:]) for p in stacks(model).values())
    li.inject(model, config | {"expect": {"sites": 2, "lora": n_lora}})
    assert f"rank {rank} (32 over a token's experts), scale 32/{rank}" in str(plan)
    assert li.Config.from_text(plan.config.to_yaml()) == plan.config


def test_each_block_divides_the_rank_by_its_own_number_and_takes_the_whole_part() -> None:
    model = nn.Sequential(Routed(2), Routed(3))
    plan = li.plan(model, {"targets": [ROUTED | {"rank": {"active": 9}}]})
    assert {(site.name[0], site.rank) for site in plan.sites} == {("0", 4), ("1", 3)}


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (ROUTED | {"rank": {"active": 1}}, "a token goes to 2 experts. Give active: 2 or more"),
        ({"match": "q_proj", "rank": {"active": 8}}, "does not say to how many experts"),
    ],
)
def test_a_rank_that_cannot_be_divided_is_refused(target: Any, words: str) -> None:
    model, _ = experts("mixtral")
    refused(model, lambda: li.inject(model, {"targets": [target]}), li.MatchError, words)


@pytest.mark.parametrize("targets", [["all-linear"], ["all-linear", "all-experts"], ["q_proj"]])
def test_a_plan_a_summary_and_a_card_say_that_all_linear_leaves_the_experts_out(
    targets: list[str], tmp_path: Path
) -> None:
    model, _ = experts("qwen3_moe")
    plan = li.plan(model, {"targets": targets})
    fill(li.inject(model, {"targets": targets}))
    logits(model)
    li.save_adapter(model, tmp_path / "adapter")
    said = "ll-linear leaves out the experts 'model.layers.0.mlp.experts.gate_up_proj', "
    card = (tmp_path / "adapter" / "README.md").read_text()
    for text in (" ".join(plan.notes), li.summary(model), card):
        assert (said in text) is (targets == ["all-linear"])


def test_advice_takes_experts_at_the_rank_that_the_active_ones_share() -> None:
    model, _ = experts("qwen3_moe")
    config = li.advise(model, 500)
    plan = li.plan(model, config)
    assert {site.rank for site in plan.sites if site.experts} == {config.rank // 2}
    shared = ROUTED | {"rank": {"active": config.rank}}
    assert config.to_dict()["targets"] == ["all-linear", shared]
    larger = config.to_dict() | {"rank": config.rank + 1, "expect": {"sites": plan.n_sites}}
    larger["targets"][1]["rank"]["active"] = config.rank + 1
    assert plan.n_lora <= 500 < li.plan(model, larger).n_lora


@pytest.mark.parametrize("match", ["all-experts", r"experts\.gate_up_proj"])
def test_experts_that_kernels_read_in_8_bits_are_refused(match: str) -> None:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    model: Any = experts("qwen3_moe")[0]
    model.model.layers[0].mlp.experts = fp8.FP8Experts(model.config, block_size=(4, 4))
    rule = {"match": match, "layout": "out_in"}
    words = r"gate_up_proj', .*by kernels on codes.*FineGrainedFP8Config\(dequantize=True\)"
    refused(model, lambda: li.inject(model, {"targets": [rule]}), li.LayerError, words)


def test_experts_in_mxfp4_that_kernels_read_are_refused() -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    model: Any = experts("gpt_oss")[0]
    settings = copy.copy(model.config)
    settings.hidden_size = settings.intermediate_size = 32
    model.model.layers[0].mlp.experts = mxfp4.Mxfp4GptOssExperts(settings)
    with pytest.raises(li.LayerError, match=r"gate_up_proj.*MXFP4 by kernels.*packed_experts\(\)"):
        li.plan(model, {"targets": ["all-experts"]})
