"""Experts for vLLM: single matrices under the names of the base's files."""

from pathlib import Path

import pytest
import torch
from conftest import fill
from helpers.adapter_states import KIND_SPECS, effect, make_state
from helpers.experts import experts, moe
from helpers.versions import needs_transformers_5
from safetensors.torch import load_file, save_file

import lora_inject as li
from lora_inject.errors import FormatError
from lora_inject.formats import write_adapter

IDS = torch.tensor([[1, 2, 3]])
PREFIX = "base_model.model."


@needs_transformers_5
def test_experts_become_the_matrices_that_the_base_has(tmp_path: Path) -> None:
    moe().save_pretrained(tmp_path / "base")
    targets = [{"match": r"experts\.(gate_up|down)_proj", "rank": 2, "alpha": 3}, "q_proj"]
    model = fill(li.inject(moe(), {"rank": 3, "scaling": "rslora", "targets": targets}))
    state = li.adapter_state(model)
    stacked = write_adapter(state, tmp_path / "stacked", base_model="org/base")
    path = li.convert(stacked, tmp_path / "a", "vllm", base=tmp_path / "base")
    assert '"base_model_name_or_path": "org/base"' in (path / "adapter_config.json").read_text()
    tensors = load_file(path / "adapter_model.safetensors")
    experts = "model.layers.0.mlp.experts"
    gate_up = effect(state.sites[f"{experts}.gate_up_proj"]).float()
    down = effect(state.sites[f"{experts}.down_proj"]).float()
    for expert in range(3):
        due = {"gate_proj": gate_up[expert, :8], "up_proj": gate_up[expert, 8:]}
        for name, delta in {**due, "down_proj": down[expert]}.items():
            key = f"{PREFIX}{experts}.{expert}.{name}"
            found = tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
            torch.testing.assert_close(found, delta, rtol=1e-5, atol=1e-5)
    assert not [f for f in li.check_adapter(path, "vllm", base=tmp_path / "base") if f.stops]
    back = li.load_adapter(moe(), path)  # transformers' older names are known
    torch.testing.assert_close(back(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_stacks_without_a_base_or_half_of_them_are_refused(tmp_path: Path) -> None:
    state = make_state(KIND_SPECS["experts"])
    with pytest.raises(FormatError, match=r"depend on the base's files.*--base"):
        write_adapter(state, tmp_path / "a", "vllm")
    with pytest.raises(FormatError, match=r'0 of its 3 experts separately.*format="peft"'):
        write_adapter(state, tmp_path / "a", "vllm", separate=lambda _: [])
    spec = KIND_SPECS["experts"].at("mlp.experts.up", "mlp.experts.up")
    path = write_adapter(make_state(spec), tmp_path / "b")
    assert "both stacks of experts" in li.check_adapter(path, "vllm")[0].problem


@needs_transformers_5
def test_experts_under_the_names_of_older_files_are_those_of_the_base(tmp_path: Path) -> None:
    """Mixtral's files say `block_sparse_moe.experts.0.w1`, its class has `mlp.experts`."""
    model, _ = experts("mixtral")
    model.save_pretrained(tmp_path / "base")
    li.save_adapter(fill(li.inject(model, {"targets": ["all-experts"]})), tmp_path / "a")
    path = li.convert(tmp_path / "a", tmp_path / "b", "vllm", base=tmp_path / "base")
    names = load_file(path / "adapter_model.safetensors")
    assert f"{PREFIX}model.layers.0.block_sparse_moe.experts.0.w1.lora_A.weight" in names
    assert li.check_adapter(path, "vllm", base=tmp_path / "base") == []
    wrong = {n.replace("block_sparse_moe", "moe"): t for n, t in names.items()}
    save_file(wrong, path / "adapter_model.safetensors")
    (found, *_) = li.check_adapter(path, "vllm", base=tmp_path / "base")
    assert "the base has no module 'model.layers.0.moe.experts'" in found.problem


@needs_transformers_5
def test_stacks_for_a_model_with_single_experts_stop_and_the_other_way_round(tmp_path) -> None:
    """vLLM 0.32 refuses those of Qwen3-MoE, and serves the base in place of Mixtral's."""
    refusal = "vLLM refuses stacks of experts for the model_type 'qwen3_moe', or ignores them"
    for family, words in (("qwen3_moe", refusal), ("gpt_oss", None)):
        model, _ = experts(family)
        model.save_pretrained(tmp_path / family)
        model = fill(li.inject(model, {"targets": ["all-experts"]}))
        path = li.save_adapter(model, tmp_path / f"{family} adapter")
        stops = [f.problem for f in li.check_adapter(path, "vllm", base=tmp_path / family)]
        assert stops == ([] if words is None else [words])
        if words is not None:
            single = li.convert(path, tmp_path / "single", "vllm", base=tmp_path / family)
            assert li.check_adapter(single, "vllm", base=tmp_path / family) == []
    assert any(
        "has stacks of experts for the model_type 'gpt_oss'" in f.problem
        for f in li.check_adapter(single, "vllm", base=tmp_path / "gpt_oss")
    )


@needs_transformers_5
def test_half_of_the_matrices_of_an_expert_are_refused(tmp_path: Path) -> None:
    """vLLM stops at them by an assertion without a word."""
    moe().save_pretrained(tmp_path / "base")
    model = fill(li.inject(moe(), {"targets": [r"experts\.down_proj"]}))
    li.save_adapter(model, tmp_path / "a.safetensors", format="native")
    with pytest.raises(FormatError, match=r"'model.layers.0.mlp.experts.0.gate_proj' is not"):
        li.convert(tmp_path / "a.safetensors", tmp_path / "b", "vllm", base=tmp_path / "base")
    whole = fill(li.inject(moe(), {"targets": ["all-experts"]}))
    li.save_adapter(whole, tmp_path / "c")
    path = li.convert(tmp_path / "c", tmp_path / "d", "vllm", base=tmp_path / "base")
    names = load_file(path / "adapter_model.safetensors")
    some = {n: t for n, t in names.items() if ".experts.1.up_proj" not in n}
    save_file(some, path / "adapter_model.safetensors")
    for base in (None, tmp_path / "base"):
        (found,) = [f for f in li.check_adapter(path, "vllm", base=base) if f.stops]
        assert "stops at 'model.layers.0.mlp.experts.1.up_proj'" in found.problem


@needs_transformers_5
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_the_config_of_a_base_is_enough_for_the_names_of_its_experts(
    family: str, tmp_path: Path
) -> None:
    model, _ = experts(family)
    model.save_pretrained(tmp_path / "base")
    model.config.save_pretrained(tmp_path / "config")
    li.save_adapter(fill(li.inject(model, {"targets": ["all-experts"]})), tmp_path / "a")
    made = {}
    for base in ("base", "config"):
        made[base] = li.convert(
            tmp_path / "a", tmp_path / f"of {base}", "vllm", base=tmp_path / base
        )
        assert li.check_adapter(made[base], "vllm", base=tmp_path / "config") == []
    tensors = {base: load_file(path / "adapter_model.safetensors") for base, path in made.items()}
    assert tensors["base"].keys() == tensors["config"].keys()
    assert all(torch.equal(tensors["config"][key], t) for key, t in tensors["base"].items())
