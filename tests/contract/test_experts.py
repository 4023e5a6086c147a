"""Mixtures of experts: what is one, whole stacks and parts of them, ranks and files."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import error, fill, same_bits
from helpers.experts import MOE, MORE, expert_rule, experts
from helpers.merging import load_checkpoint, merge, merged_model
from helpers.quantized import dequantized, quantized
from helpers.reference import EXACT, RANK, SCALE, adapted, base_state, config, logits
from helpers.refusals import refused
from helpers.states import effect
from safetensors.torch import save_file
from torch import Tensor, nn

import lora_inject as li

pytestmark = [pytest.mark.recent, pytest.mark.filterwarnings("ignore")]  # warnings of PEFT

FLOAT32 = 2e-5  # of the largest logit, after some twenty roundings of sums of few terms
ALL = {"match": "all-experts"}
PARTS = {"all": {}, "only": {"only": [2, 0]}, "A": {"share": "A"}, "B": {"share": "B"}}
CASES = [(family, "all") for family in MOE]
CASES += [(family, part) for family in ("mixtral", "gpt_oss") for part in ("only", "A", "B")]


def stacks(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.dim() == 3}


def expert(site: Any, e: int) -> tuple[int, int] | None:
    """Which factors A and B an expert has, by the words of the config; None where it has none."""
    if site.spec.only is not None:
        return (site.spec.only.index(e),) * 2 if e in site.spec.only else None
    return min(e, len(site.A) - 1), min(e, len(site.B) - 1)


def with_deltas(plain: nn.Module, *models: nn.Module) -> nn.Module:
    """The plain model with the dense deltas of some models, expert by expert."""
    wide = copy.deepcopy(plain)
    for site in (s for model in models for s in li.adapter_state(model).sites.values()):
        W = wide.get_parameter(site.spec.weight)
        for e in range(len(W)):
            if (pair := expert(site, e)) is not None:
                delta = SCALE * site.B[pair[1]].double() @ site.A[pair[0]].double()
                W.data[e] += (delta.T if site.spec.transposed else delta).to(W.dtype)
    return wide


def check_gradients(model: nn.Module, wide: nn.Module, limit: float) -> None:
    """dL/dA and dL/dB follow from the dense dL/dW by hand: scale B^T G and scale G A^T."""
    weights = torch.randn(1, 5, 13, dtype=torch.float64)
    for each in (model, wide):
        (few(each) * weights).sum().backward()
    parameters = li.adapter_parameters(model)
    for name, site in li.adapter_state(model).sites.items():
        due = {"A": torch.zeros_like(site.A), "B": torch.zeros_like(site.B)}
        G = wide.get_parameter(site.spec.weight).grad
        for e, g in enumerate(G.mT if site.spec.transposed else G):
            if (pair := expert(site, e)) is not None:
                due["A"][pair[0]] += SCALE * site.B[pair[1]].T @ g
                due["B"][pair[1]] += SCALE * g @ site.A[pair[0]].T
        for role, gradient in due.items():
            assert error(parameters[f"{name}.lora_{role}"].grad, gradient) < limit


# ------------------------------------------------------------ stacks, whole or some experts of them


def few(model: nn.Module) -> Tensor:
    """For fewer tokens than a matrix has rows or columns."""
    return model(torch.arange(5)[None]).logits


@pytest.mark.parametrize("how", ["eager", "batched_mm", "default"])
@pytest.mark.parametrize(("family", "part"), CASES)
def test_in_each_way_to_multiply_it_is_the_dense_model_and_no_delta_is_kept(
    family: str, part: str, how: str
) -> None:
    """By default transformers multiplies all experts by one grouped kernel, in float32."""
    is_exact = how == "eager"
    plain = experts(family, how)[0].to(torch.float64 if is_exact else torch.float32)
    model = li.inject(copy.deepcopy(plain), config(ALL | PARTS[part]))
    assert not is_exact or same_bits(few(model), few(plain))
    wide, kept = with_deltas(plain, fill(model)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        outputs = few(model)
    assert error(few(plain), few(wide)) > 1e-3
    limit = EXACT if is_exact else FLOAT32
    assert error(outputs, few(wide)) < limit
    check_gradients(model, wide, 100 * limit)
    assert li.unreached(model, lambda: few(model)) == []
    if how != "batched_mm":  # where transformers gathers an expert for each token
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        new = [t.shape[-2:] for t in kept if t.untyped_storage().data_ptr() not in own]
        matrices = [m.shape for p in stacks(plain).values() for m in (p[0], p[0].T)]
        assert not [shape for shape in new if shape in matrices]
    li.merge(model)
    assert error(few(model), few(wide)) < limit
    li.unmerge(model)
    assert all(same_bits(t, plain.state_dict()[k]) for k, t in base_state(model).items())


@pytest.mark.parametrize("family", MOE | MORE)
def test_batched_products_begin_at_the_base(family: str) -> None:
    model, _ = experts(family, "batched_mm", hidden_size=64)
    with torch.no_grad():
        plain = few(model)
        assert same_bits(few(li.inject(model, config("all-experts"))), plain)


@pytest.mark.parametrize(("part", "n_a", "n_b"), [("only", 2, 2), ("A", 1, 3), ("B", 3, 1)])
def test_what_is_left_out_or_shared_takes_no_memory_and_others_get_it_in_full(
    part: str, n_a: int, n_b: int, tmp_path: Path
) -> None:
    plain, rule = experts("mixtral")[0], config(ALL | PARTS[part])
    model = fill(li.inject(copy.deepcopy(plain), rule))
    forms = [(s.spec.only, len(s.A), len(s.B)) for s in li.adapter_state(model).sites.values()]
    assert {form[1:] for form in forms} == {(n_a, n_b)}
    plan, counted = (
        li.plan(plain, rule),
        sum(map(Tensor.numel, li.adapter_parameters(model).values())),
    )
    assert plan.n_lora == counted == 2 * (8 * n_a + 16 * n_b) + 2 * (8 * n_a + 8 * n_b)
    assert "hold every expert" in str(plan), "what PEFT's file does not keep"

    native = li.save_adapter(model, tmp_path / "a.safetensors", format="native")
    again = li.load_adapter(copy.deepcopy(plain), native)
    assert same_bits(logits(again), logits(model))
    sites = li.adapter_state(again).sites.values()
    assert [(s.spec.only, len(s.A), len(s.B)) for s in sites] == forms
    ours = li.save_adapter(model, tmp_path / "ours")
    for read in (peft.PeftModel.from_pretrained, li.load_adapter):
        assert error(logits(read(copy.deepcopy(plain), ours)), logits(model)) < 1e-5
    for path in (ours, native):
        (tmp_path / f"of {path.name}").mkdir()
        merged = merged_model(plain, path, tmp_path / f"of {path.name}")
        assert error(logits(merged), logits(model)) < 1e-5

    slot = fill(li.inject(copy.deepcopy(plain), rule), std=0.01)
    li.swap_adapter(slot, native)
    assert same_bits(logits(slot), logits(model))
    with refused(li.FormatError, "experts.gate_up_proj", model=slot):
        li.swap_adapter(slot, ours)  # which has every expert


def deltas_of(plain: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """The dense delta of each stack in float64."""
    wide = stacks(with_deltas(copy.deepcopy(plain).double(), model))
    return {name: (p - plain.get_parameter(name)).detach() for name, p in wide.items()}


def saved_with_adapter(family: str, folder: Path, rule: dict[str, Any]) -> tuple[Any, Any]:
    """A model whose files are in `base`, and a copy with an adapter of its experts."""
    plain = experts(family)[0]
    plain.save_pretrained(folder / "base")
    return plain, fill(li.inject(copy.deepcopy(plain), config(ALL | rule)))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])  # apart in files, and as a stack
@pytest.mark.parametrize(("part", "weight"), [("only", None), ("only", 2), ("A", 2), ("B", None)])
def test_merged_on_disk_it_is_the_dense_delta_of_each_part_of_a_stack(
    part: str, weight: int | None, family: str, tmp_path: Path, run: Any
) -> None:
    """A value as it is, and a file with a weight."""
    plain, model = saved_with_adapter(family, tmp_path, PARTS[part])
    base, out = tmp_path / "base", tmp_path / "out"
    if weight is None:
        merge(base, [li.adapter_state(model)], out)
    else:
        path = li.save_adapter(model, tmp_path / "a", format="native")
        assert run("merge", base, path, "-w", weight, "-o", out, "--verify").code == 0
    deltas, merged = deltas_of(plain, model), type(plain).from_pretrained(out)
    for name, W in plain.named_parameters():
        due = W.double() + (weight or 1) * deltas.get(name, torch.zeros_like(W))
        found = merged.get_parameter(name).double()
        torch.testing.assert_close(found, due, rtol=0, atol=1e-5)


def test_the_report_of_a_stack_is_that_of_all_its_experts(tmp_path: Path) -> None:
    """The size of W was that of the chosen experts alone, and a damaged one beside them passed."""
    plain, model = saved_with_adapter("gpt_oss", tmp_path, {"only": [0, 2]})
    state = replace(li.adapter_state(model), fingerprint=None)
    report = merge(tmp_path / "base", [state], tmp_path / "out")
    tensors = load_checkpoint(tmp_path / "base")
    for name, delta in deltas_of(plain, model).items():
        size = float(delta.norm() / tensors[name].double().norm())
        assert report.tensors[name].relative == pytest.approx(size, rel=1e-5)
        damaged = tensors | {name: tensors[name].index_fill(0, torch.tensor([1]), torch.nan)}
        save_file(damaged, tmp_path / "base" / "model.safetensors", {"format": "pt"})
        with refused(li.CheckpointError, f"'{name}'", "NaN"):
            merge(tmp_path / "base", [state], tmp_path / "no")


@pytest.mark.parametrize("part", PARTS)
def test_an_adapter_of_a_part_of_a_stack_is_truncated_to_one_of_all_experts(part: str) -> None:
    plain = experts("mixtral")[0]
    model = fill(li.inject(copy.deepcopy(plain), config(ALL | PARTS[part])))
    cut = li.truncate(li.adapter_state(model), rank=RANK).state.sites
    for name, due in deltas_of(plain, model).items():
        torch.testing.assert_close(effect(cut[name]), due, rtol=0, atol=1e-5)


@pytest.mark.parametrize("given", ["value", "file"])
def test_an_analysis_is_of_the_chosen_experts(given: str, tmp_path: Path, run: Any) -> None:
    plain, model = saved_with_adapter("gpt_oss", tmp_path, {"only": [1, 2]})
    path = li.save_adapter(model, tmp_path / "a", format="native")
    adapter = li.adapter_state(model) if given == "value" else li.read_adapter(path)
    found = li.analysis.analyze(adapter, tmp_path / "base")  # noqa: TID251 - a public name
    deltas = deltas_of(plain, model)
    for blocks in (found.blocks, found.on_weight()):
        assert [block.label for block in blocks] == ["expert 1", "expert 2"] * 2
    for block in found.blocks:
        delta = deltas[block.site][int(block.label.removeprefix("expert "))]
        torch.testing.assert_close(block.spectrum.values, torch.linalg.svdvals(delta)[:RANK])
    ran = run("analyze", path, "--base", tmp_path / "base")
    assert ran.code == 0, ran.err
    assert "The delta is zero" not in ran.out + ran.err


def test_parts_of_stacks_are_added_as_their_dense_deltas() -> None:
    plain = experts("mixtral")[0].double()
    one, two = (
        li.inject(copy.deepcopy(plain), config(ALL | PARTS[part])) for part in ("only", "A")
    )
    both = li.install(
        copy.deepcopy(plain), li.combine([li.adapter_state(fill(net)) for net in (one, two)])
    )
    assert error(logits(both), logits(with_deltas(plain, one, two))) < EXACT
    other = li.inject(plain, config(ALL | {"only": [1, 2]}))
    with refused(li.StateError, "experts.gate_up_proj", model=other):
        other.load_state_dict(one.state_dict())


@pytest.mark.parametrize("family", MOE | MORE)
def test_experts_of_every_architecture_are_planned_exchanged_and_merged_model(
    family: str, tmp_path: Path
) -> None:
    plain, layout = experts(family)
    plan = li.plan(plain, config("all-experts"))
    assert {site.name for site in plan.sites} == {*stacks(plain)}
    assert all(site.transposed == (layout == "in_out") for site in plan.sites)
    assert plan.n_lora == sum(RANK * len(p) * sum(p.shape[1:]) for p in stacks(plain).values())
    if family in MOE:
        bare = config(r"experts\.(gate_up_proj|down_proj)")
        assert li.plan(plain, bare).sites == li.plan(plain, config(expert_rule(layout))).sites

    model = adapted(plain, "all-experts")
    li.save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours")
    assert error(logits(theirs), logits(model)) < 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    again = li.load_adapter(copy.deepcopy(plain), tmp_path / "theirs")
    assert error(logits(again), logits(model)) < 1e-5
    merged = merged_model(plain, tmp_path / "ours", tmp_path)
    for name, p in stacks(with_deltas(plain, model)).items():
        assert error(merged.get_parameter(name), p) < 1e-6, name


# ------------------------------------------------------------------------------ what is an expert


class Expert(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class Routed(nn.Module):
    """Experts in a list, as remote code and transformers 4 have them."""

    def __init__(self, top_k: Any = 2, outputs: int = 3) -> None:
        super().__init__()
        if top_k is not None:
            self.top_k = top_k
        self.gate = nn.Linear(4, outputs, bias=False)
        self.blocks = nn.ModuleList(Expert() for _ in range(3))
        self.always = Expert()

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        y = self.always(x)
        for n, block in enumerate(self.blocks):
            y = y + (weights * (chosen == n)).sum(-1, keepdim=True) * block(x)
        return y


class Stacked(nn.Module):
    """A stack that no class of transformers knows."""

    def __init__(self, top_k: int | None = 2) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 3)
        self.w = nn.Parameter(torch.randn(3, 4, 4))
        self.num_experts_per_tok = top_k


LISTED = {f"0.blocks.{n}.{part}" for n in range(3) for part in ("up", "down")}


def test_experts_in_a_list_are_known_by_the_router_beside_them_and_left_to_all_experts() -> None:
    model, x = nn.Sequential(Routed()).double(), torch.randn(5, 4, dtype=torch.float64)
    plan = li.plan(model, {"targets": ["all-experts"]})
    assert {site.name for site in plan.sites} == LISTED
    alone = li.plan(model, {"targets": ["all-linear"]})
    assert {site.name for site in alone.sites} > LISTED
    both = {"rank": 3, "targets": ["all-linear", ALL | {"rank": {"active": 2}}]}
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


NO_EXPERTS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "no top_k": (lambda: Routed(top_k=None), ["all-experts"]),
    "no router": (lambda: Routed(outputs=5), ["all-experts"]),
    "other shapes": (of_another_shape, ["all-experts"]),
    "a head is no router": (with_a_head, ["all-experts"]),
    "a stack without top_k": (lambda: Stacked(None), ["all-experts", "0.w"]),
    "a stack of an unknown layout": (Stacked, ["0.w", "layout"]),
}


@pytest.mark.parametrize("block", NO_EXPERTS)
def test_what_no_router_chooses_is_no_experts_and_a_layout_is_asked_for(block: str) -> None:
    make, names = NO_EXPERTS[block]
    model = nn.Sequential(make())
    with refused(li.MatchError, *names, model=model):
        li.inject(model, {"targets": ["all-experts"]})


def test_a_stack_of_an_unknown_class_is_experts_beside_a_router() -> None:
    rule = {"targets": [ALL | {"layout": "out_in"}]}
    assert [site.name for site in li.plan(nn.Sequential(Stacked()), rule).sites] == ["0.w"]


# ------------------------------------------------------------------- rank for the active experts


@pytest.mark.parametrize(("family", "rank"), [("qwen3_moe", 16), ("llama4", 32)])
def test_the_rank_of_active_experts_is_divided_by_the_models_own_number(family, rank) -> None:
    model, _ = experts(family)
    config = {"alpha": 32, "targets": [ALL | {"rank": {"active": 32}}]}
    plan = li.plan(model, config)
    assert {(site.rank, site.scale) for site in plan.sites} == {(rank, 32 / rank)}
    n_lora = rank * sum(len(p) * sum(p.shape[1:]) for p in stacks(model).values())
    li.inject(model, config | {"expect": {"sites": 2, "lora": n_lora}})
    assert f"rank {rank} (32 over a token's experts), scale 32/{rank}" in str(plan)
    assert li.Config.from_text(plan.config.to_yaml()) == plan.config


def test_each_block_divides_the_rank_by_its_own_number_and_takes_the_whole_part() -> None:
    model = nn.Sequential(Routed(2), Routed(3))
    plan = li.plan(model, {"targets": [ALL | {"rank": {"active": 9}}]})
    assert {(site.name[0], site.rank) for site in plan.sites} == {("0", 4), ("1", 3)}


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


# -------------------------------------------------------------------------------------- refusals

STACK = "experts.gate_up_proj"
REFUSED: dict[str, tuple[dict[str, Any], type[li.LoraInjectError], list[str]]] = {
    "no such expert": (ALL | {"only": [3]}, li.MatchError, [STACK, "3 experts, 0 to 2"]),
    "by a file": (
        ALL | {"only": "p.yaml", "top": 0.5}, li.ConfigError, ["only: [0, 3]", "chosen-experts.md"],
    ),
    "a choice of a linear layer": ({"match": "q_proj", "only": [0]}, li.MatchError, ["q_proj"]),
    "shared factors from the weight": (
        ALL | {"share": "A", "init": "pissa"}, li.MatchError, ["share", "pissa"],
    ),
    "a share of a list": (
        ALL | {"only": [0], "top": 0.5}, li.ConfigError, ["only: [0, 3]", "chosen-experts.md"],
    ),
    "an expert twice": (ALL | {"only": [1, 1]}, li.ConfigError, ["only"]),
    "chosen and shared": (ALL | {"only": [0], "share": "A"}, li.ConfigError, ["share", "only"]),
    "dropout": (ALL | {"dropout": 0.1}, li.MatchError, [STACK, "dropout"]),
    "less rank than experts": (
        ALL | {"rank": {"active": 1}}, li.MatchError, ["2 experts", "active: 2"],
    ),
    "active rank of a linear layer": (
        {"match": "q_proj", "rank": {"active": 8}}, li.MatchError, ["q_proj"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_rule_that_fits_no_stack_or_says_nothing_is_refused(case: str) -> None:
    rule, kind, names = REFUSED[case]
    model, _ = experts("mixtral")
    with refused(kind, *names, model=model):
        li.inject(model, config(rule))


def in_8_bits() -> Any:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    model: Any = experts("qwen3_moe")[0]
    model.model.layers[0].mlp.experts = fp8.FP8Experts(model.config, block_size=(4, 4))
    return model


def in_mxfp4() -> Any:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    model: Any = experts("gpt_oss")[0]
    settings = copy.copy(model.config)
    settings.hidden_size = settings.intermediate_size = 32
    model.model.layers[0].mlp.experts = mxfp4.Mxfp4GptOssExperts(settings)
    return model


@pytest.mark.parametrize(
    ("make", "match", "remedy"),
    [
        (in_8_bits, "all-experts", "FineGrainedFP8Config(dequantize=True)"),
        (in_8_bits, r"experts\.gate_up_proj", "FineGrainedFP8Config(dequantize=True)"),
        (in_mxfp4, "all-experts", "Mxfp4Config(dequantize=True)"),
    ],
)
def test_experts_whose_codes_kernels_read_are_refused(make: Any, match: str, remedy: str) -> None:
    model = make()
    with refused(li.LayerError, "gate_up_proj", remedy):
        li.plan(model, {"targets": [{"match": match, "layout": "out_in"}]})


def test_beside_experts_in_float8_adapters_train_where_they_compute_with_a_backward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reference is the same model with the values; the kernel, for GPUs, is by hand."""
    model, dense = in_8_bits(), experts("qwen3_moe")[0]
    block, packed = dense.model.layers[0].mlp.experts, model.model.layers[0].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        codes, scales = zip(*(quantized(w, (4, 4)) for w in getattr(block, name)), strict=True)
        getattr(packed, name).data = torch.stack(codes)
        getattr(packed, f"{name}_scale_inv").data = torch.stack(scales)
        values = [dequantized(*each, (4, 4)) for each in zip(codes, scales, strict=True)]
        getattr(block, name).data = torch.stack(values)

    def kernel(x: Tensor, weight: Tensor, scales: Tensor, *_: Any) -> Tensor:
        return x.detach() @ dequantized(weight, scales, (4, 4)).T

    monkeypatch.setattr("transformers.integrations.finegrained_fp8.fp8_linear", kernel)
    packed.requires_grad_(False)
    grads = []
    for each in (model, dense):
        torch.manual_seed(1)
        fill(li.inject(each, config("q_proj")))
        few(each).square().sum().backward()
        grads.append([p.grad for p in li.adapter_parameters(each).values()])
    for grad, due in zip(*grads, strict=True):
        assert error(grad, due.double()) < FLOAT32
    model.set_experts_implementation("batched_mm")
    with refused(li.LayerError, "mlp.experts", 'set_experts_implementation("grouped_mm")'):
        li.parameter_groups(model, 1e-3)
