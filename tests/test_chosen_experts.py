"""Some experts of a stack, and factors that all share: equal to the dense model, and in files."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import error, fill, same_bits
from helpers.checkpoints import merged_on_disk
from helpers.experts import experts
from helpers.reference import EXACT, SCALE, base_state, config, logits, refused
from torch import Tensor, nn
from training_models import tokenizer

import lora_inject as li
from lora_inject.core.adapter.other_tensors import with_every_expert
from lora_inject.core.spec.meaning import meaning

ALL = {"match": "all-experts"}
PARTS = {"only": {"only": [2, 0]}, "A": {"share": "A"}, "B": {"share": "B"}}
FAMILIES = ["mixtral", "gpt_oss", "llama4"]


def factors(site: Any, n: int) -> list[tuple[Tensor, Tensor] | None]:
    """A and B of each expert, by the words of the config; None for an expert without."""
    if site.spec.only is not None:
        pairs = dict(zip(site.spec.only, zip(site.A, site.B, strict=True), strict=True))
        return [pairs.get(e) for e in range(n)]
    return [(site.A[min(e, len(site.A) - 1)], site.B[min(e, len(site.B) - 1)]) for e in range(n)]


def wide(plain: nn.Module, model: nn.Module) -> nn.Module:
    """The plain model with the dense deltas, expert by expert."""
    dense = copy.deepcopy(plain)
    for site in li.adapter_state(model).sites.values():
        W = dense.get_parameter(site.spec.weight)
        with torch.no_grad():
            for e, pair in enumerate(factors(site, len(W))):
                if pair is not None:
                    delta = SCALE * pair[1].double() @ pair[0].double()
                    W[e] += (delta.t() if site.spec.transposed else delta).to(W.dtype)
    return dense


def adapted(family: str, part: str, how: str = "eager") -> tuple[nn.Module, nn.Module]:
    plain, _ = experts(family, how)
    plain = plain.double() if how == "eager" else plain
    return plain, fill(li.inject(copy.deepcopy(plain), config(ALL | PARTS[part])))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_part_of_a_stack_equals_the_dense_model(family: str, part: str) -> None:
    plain, model = adapted(family, part)
    dense = wide(plain, model)
    assert error(logits(plain), logits(dense)) > 1e-3
    assert error(logits(model), logits(dense)) < EXACT
    weights = torch.randn(2, 4, 13, dtype=torch.float64)
    (logits(dense) * weights).sum().backward()
    (logits(model) * weights).sum().backward()
    parameters = li.adapter_parameters(model)
    for name, site in li.adapter_state(model).sites.items():
        G = dense.get_parameter(site.spec.weight).grad
        G = G.transpose(1, 2) if site.spec.transposed else G
        wanted = {"A": torch.zeros_like(site.A), "B": torch.zeros_like(site.B)}
        places = {e: i for i, e in enumerate(site.spec.only or range(len(G)))}
        for e, pair in enumerate(factors(site, len(G))):
            if pair is not None:
                wanted["A"][0 if part == "A" else places[e]] += SCALE * pair[1].T @ G[e]
                wanted["B"][0 if part == "B" else places[e]] += SCALE * G[e] @ pair[0].T
        for role, gradient in wanted.items():
            assert error(parameters[f"{name}.lora_{role}"].grad, gradient) < 1e-10
    li.merge(model)
    assert error(logits(model), logits(dense)) < EXACT
    li.unmerge(model)
    assert all(same_bits(t, plain.state_dict()[k]) for k, t in base_state(model).items())
    plain, model = adapted(family, part, "batched_mm")  # a product of all experts
    assert error(logits(model), logits(wide(plain, model))) < 2e-5


@pytest.mark.parametrize(("part", "n_a", "n_b"), [("only", 2, 2), ("A", 1, 3), ("B", 3, 1)])
def test_what_is_left_out_or_shared_takes_no_memory(part, n_a, n_b, tmp_path: Path) -> None:
    plain, model = adapted("mixtral", part)
    (up, down) = li.adapter_state(model).sites.values()
    for site in (up, down):
        assert (len(site.A), len(site.B)) == (n_a, n_b)
    counted = sum(p.numel() for p in li.adapter_parameters(model).values())
    plan = li.plan(plain, config(ALL | PARTS[part]))
    assert plan.n_lora == counted == 2 * (8 * n_a + 16 * n_b) + 2 * (8 * n_a + 8 * n_b)
    assert "hold every expert" in str(plan)  # what the default files do not keep
    li.save_adapter(model, tmp_path / "a.safetensors", format="native")
    again = li.load_adapter(copy.deepcopy(plain), tmp_path / "a.safetensors")
    for name, site in li.adapter_state(again).sites.items():
        assert meaning(site.spec) == meaning(li.adapter_state(model).sites[name].spec)
    assert same_bits(logits(again), logits(model))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", PARTS)
def test_files_of_others_have_every_expert(part: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    plain, _ = experts("mixtral")
    model = fill(li.inject(copy.deepcopy(plain), config(ALL | PARTS[part])))
    li.save_adapter(model, tmp_path / "ours")
    li.save_adapter(model, tmp_path / "a.safetensors", format="native")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours")
    assert error(logits(theirs), logits(model)) < 1e-5
    again = li.load_adapter(copy.deepcopy(plain), tmp_path / "ours")
    assert error(logits(again), logits(model)) < 1e-5
    for path in ("ours", "a.safetensors"):
        (tmp_path / f"of {path}").mkdir()
        merged = merged_on_disk(plain, tmp_path / path, tmp_path / f"of {path}")
        assert error(logits(merged), logits(model)) < 1e-5


def test_values_of_parts_are_those_of_whole_stacks() -> None:
    _, one = adapted("mixtral", "only")
    _, two = adapted("mixtral", "A")
    a, b = (with_every_expert(li.adapter_state(model)) for model in (one, two))
    both = li.adapter_state(one) + li.adapter_state(two)
    for name, site in both.sites.items():
        deltas = [s.B @ s.A for s in (site, a.sites[name], b.sites[name])]
        torch.testing.assert_close(deltas[0] * site.scale, SCALE * (deltas[1] + deltas[2]))


def test_a_state_dict_of_other_experts_is_refused() -> None:
    _, one = adapted("mixtral", "only")
    plain, _ = experts("mixtral")
    other = li.inject(plain.double(), config(ALL | {"only": [1, 2]}))
    with pytest.raises(li.StateError, match="slices, rows or a variant of its own"):
        other.load_state_dict(one.state_dict())


# ---------------------------------------------------------------------------------------- profiles


BATCHES = [{"input_ids": torch.arange(8)[None] + n} for n in (0, 3)]


def test_a_profile_counts_the_experts_that_the_router_chose() -> None:
    model, _ = experts("qwen3_moe")
    profile = li.profile_experts(model, BATCHES)
    block: Any = model.model.layers[0].mlp
    counts = torch.zeros(3, dtype=torch.long)

    def count(_: nn.Module, __: Any, out: Any) -> None:
        counts.add_(torch.bincount(out[-1].flatten(), minlength=3))

    hook = block.gate.register_forward_hook(count)
    with torch.no_grad():
        for batch in BATCHES:
            model(**batch)
    hook.remove()
    assert profile.experts == {"model.layers.0.mlp.experts": counts.tolist()}
    assert sum(counts) == 2 * 16
    assert not block.experts._forward_pre_hooks


def two_layers() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(**sizes, vocab_size=103))


def test_the_most_chosen_experts_of_each_layer_are_adapted(tmp_path: Path) -> None:
    names = [f"model.layers.{i}.mlp.experts" for i in range(2)]
    profile = li.ExpertProfile(experts={names[0]: [9, 5, 0, 1], names[1]: [0, 0, 2, 9]})
    profile.write(tmp_path / "p")
    assert li.ExpertProfile.from_yaml(tmp_path / "p") == profile
    for top, first, second in ((0.25, (0,), (3,)), (0.26, (0, 1), (2, 3))):
        plan = li.plan(two_layers(), config(ALL | {"only": str(tmp_path / "p"), "top": top}))
        assert [site.only for site in plan.sites] == [first, first, second, second]


def test_the_command_writes_a_profile(tmp_path: Path, run: Any) -> None:
    two_layers().save_pretrained(tmp_path)
    tokenizer(tmp_path)
    rows, output = tmp_path / "rows.txt", tmp_path / "profile.yaml"
    rows.write_text("1 and 1 is 2\n2 is a number\n")
    done = run("profile", tmp_path, "--data", rows, "--output", output, "--length", 6)
    assert done.code == 0, done.err
    counts = li.ExpertProfile.from_yaml(output).experts.values()
    assert [sum(each) for each in counts] == [2 * 2 * 6] * 2


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"only": [3]}, r"only: 3, but it has 3 experts, 0 to 2"),
        ({"only": "other.yaml", "top": 0.5}, "the profile has no 'model.layers.0.mlp.experts'"),
        ({"match": "q_proj", "only": [0]}, "only, but it is a linear of its own. It is for stacks"),
        ({"share": "A", "init": "pissa"}, "share, and init pissa"),
        ({"only": [0], "top": 0.5}, "top needs a profile. Give both"),
        ({"only": [1, 1]}, "repeated entry"),
        ({"only": [0], "share": "A"}, "share is for whole stacks, and only chooses of them"),
    ],
)
def test_a_choice_of_what_is_not_there_or_that_says_nothing_is_refused(
    rule: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    li.ExpertProfile(experts={"h.0": [1, 2, 3]}).write("other.yaml")
    model, _ = experts("mixtral")
    refused(model, lambda: li.inject(model, config(ALL | rule)), li.LoraInjectError, words)


def test_a_model_without_experts_has_no_profile() -> None:
    with pytest.raises(li.LayerError, match="no experts that a router chooses"):
        li.profile_experts(nn.Sequential(nn.Linear(2, 2)), [torch.ones(1, 2)])
    model, _ = experts("llama4")
    with pytest.raises(li.LayerError, match="not told which expert each token goes to"):
        li.profile_experts(model, [torch.arange(4)[None]])
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(li.LayerError, match="no batch reached an expert"):
        li.profile_experts(model, [])


@pytest.mark.parametrize("part", [{"only": [0, 2]}, {"share": "A"}, {"share": "B"}])
def test_a_file_with_every_expert_is_swapped_into_chosen_ones(part: Any, tmp_path: Path) -> None:
    plain, _ = experts("mixtral")
    rule = config(ALL | part)
    model = fill(li.inject(copy.deepcopy(plain), rule))
    wanted = logits(model)
    li.save_adapter(model, tmp_path / "a")
    slot = fill(li.inject(copy.deepcopy(plain), rule), std=0.01)
    li.swap_adapter(slot, tmp_path / "a")
    assert same_bits(logits(slot), wanted)
    other = fill(li.inject(copy.deepcopy(plain), config(ALL)))
    li.save_adapter(other, tmp_path / "b")
    words = "it updates expert 1, which" if "only" in part else "its experts have a factor"
    refused(slot, lambda: li.swap_adapter(slot, tmp_path / "b"), li.FormatError, words)
