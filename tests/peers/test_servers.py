"""Files for servers: `portable`, and experts for vLLM and SGLang under the names of a base's files.

Tensors are held to the dense delta by each server's own steps.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fill
from helpers.expert_loaders import as_sglang_loads_it, as_vllm_loads_it
from helpers.experts import experts, moe
from helpers.reference import IDS, llama, logits
from helpers.reference import adapted as adapted_dense
from helpers.refusals import refused
from helpers.states import SITES, effect, state_of
from helpers.versions import needs_transformers_5
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora_inject as li

MODEL, PREFIX = "adapter_model.safetensors", "base_model.model."
EXPERTS = "model.layers.0.mlp.experts"


def assert_near(output: Tensor, due: Tensor) -> None:
    torch.testing.assert_close(output, due, rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------- portable


def test_a_reader_of_one_rank_and_no_alpha_computes_the_same(tmp_path: Path) -> None:
    rows = [SITES[kind].by(init="pissa") for kind in ("linear", "slices", "conv1d", "conv")]
    state, known = state_of(*rows), {row.name: row for row in rows}
    path = li.write_adapter(state, tmp_path / "a", "portable", tensor_names=None)
    config = json.loads((path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["r"] == config["lora_alpha"] == 8
    assert not config["use_rslora"]
    assert isinstance(config["target_modules"], list)
    tensors = load_file(path / MODEL)
    for name, site in state.sites.items():
        a = tensors[f"{PREFIX}{name}.lora_A.weight"].flatten(1)
        b = tensors[f"{PREFIX}{name}.lora_B.weight"].flatten(1)
        assert len(a) == b.shape[1] == 8
        due = effect(site, known[name])
        torch.testing.assert_close(b.double() @ a.double(), due, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_peft_reads_it_with_the_same_outputs(tmp_path: Path) -> None:
    from peft import PeftModel

    targets = [{"match": "q_proj", "rank": 3, "scaling": "rslora"}, "down_proj", "lm_head"]
    model = adapted_dense(llama(), *targets)
    li.save_adapter(model, tmp_path / "a", base_model="org/base")
    path = li.convert(tmp_path / "a", tmp_path / "b", "portable", dtype="float64")
    assert '"base_model_name_or_path": "org/base"' in (path / "adapter_config.json").read_text()
    theirs = PeftModel.from_pretrained(llama(), path).eval()
    torch.testing.assert_close(theirs(IDS).logits, logits(model), rtol=0, atol=1e-9)


LINEAR = state_of(SITES["linear"])
REFUSED: dict[str, tuple[li.AdapterState, dict[str, Any], list[str]]] = {
    "DoRA": (state_of(SITES["linear"].by(variant="dora")), {}, ["'dora'", "lora-inject merge"]),
    "a stack": (state_of(SITES["experts"]), {}, ["'parameter'"]),
    "a trained tensor": (li.AdapterState({}, {"n": torch.ones(1)}), {}, ["'n'"]),
    "nothing": (li.AdapterState({}), {}, ["no sites"]),
    "a rank too small": (LINEAR, {"rank": 1}, ["rank 1", "rank 2"]),
    "integers": (LINEAR, {"dtype": "int8"}, ["'int8'", "float16"]),
    "beyond float16": (state_of(SITES["linear"], size=1e5), {"dtype": "float16"}, ["float16"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_server_would_not_take_is_refused(case: str, tmp_path: Path) -> None:
    state, options, named = REFUSED[case]
    with refused(li.FormatError, *named):
        li.write_adapter(state, tmp_path / "a", "portable", **options)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------- experts as single matrices


def of(model: Any, targets: list[Any], folder: Path, to: str) -> Path:
    """An adapter of such targets in the format of a server, beside the base."""
    model.save_pretrained(folder / "base")
    fill(li.inject(model, {"rank": 3, "scaling": "rslora", "targets": targets}))
    return li.convert(li.adapter_state(model), folder / "a", to, base=folder / "base")


@needs_transformers_5
def test_experts_become_the_matrices_that_the_base_has(tmp_path: Path) -> None:
    model = moe()
    targets = [{"match": r"experts\.(gate_up|down)_proj", "rank": 2, "alpha": 3}, "q_proj"]
    path = of(model, targets, tmp_path, "vllm")
    tensors = load_file(path / MODEL)
    sites = li.adapter_state(model).sites
    gate_up = effect(sites[f"{EXPERTS}.gate_up_proj"]).float()
    down = effect(sites[f"{EXPERTS}.down_proj"]).float()
    due = {"gate_proj": gate_up[:, :8], "up_proj": gate_up[:, 8:], "down_proj": down}
    for name, deltas in due.items():
        for expert, delta in enumerate(deltas):
            key = f"{PREFIX}{EXPERTS}.{expert}.{name}"
            matrix = tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
            torch.testing.assert_close(matrix, delta, rtol=1e-5, atol=1e-5)
    assert not [f for f in li.check_adapter(path, "vllm", base=tmp_path / "base") if f.stops]
    back = li.load_adapter(moe(), path)  # transformers' older names are known
    assert_near(logits(back), logits(model))


# Experts that share a factor have one stack for each matrix.
GATE_UP = {"match": r"experts\.gate_up_proj", "rank": 2, "alpha": 3, "share": "A"}
DOWN = {"match": r"experts\.down_proj", "share": "B"}
SHARED = [GATE_UP, DOWN, "q_proj", "v_proj"]


@needs_transformers_5
def test_names_of_experts_are_those_of_the_bases_files_or_config(tmp_path: Path) -> None:
    """Mixtral's files say `block_sparse_moe.experts.0.w1`, its class has `mlp.experts`."""
    shared = of(experts("mixtral")[0], [GATE_UP, DOWN], tmp_path / "shared", "sglang")
    model = experts("mixtral")[0]
    path = of(model, ["all-experts"], tmp_path, "vllm")
    for folder, matrix in ((path, "0.w1"), (shared, "w1")):
        key = f"{PREFIX}model.layers.0.block_sparse_moe.experts.{matrix}.lora_A.weight"
        assert key in load_file(folder / MODEL)
    again = li.convert(shared, tmp_path / "c", "sglang", base=tmp_path / "base")
    assert (again / MODEL).read_bytes() == (shared / MODEL).read_bytes()
    model.config.save_pretrained(tmp_path / "config")
    state = li.adapter_state(model)
    alike = li.convert(state, tmp_path / "b", "vllm", base=tmp_path / "config")
    assert (alike / MODEL).read_bytes() == (path / MODEL).read_bytes()
    for folder in (tmp_path / "base", tmp_path / "config"):
        assert li.check_adapter(path, "vllm", base=folder) == []
    names = load_file(path / MODEL)
    wrong = {n.replace("block_sparse_moe", "moe"): t for n, t in names.items()}
    save_file(wrong, path / MODEL)
    (finding, *_) = li.check_adapter(path, "vllm", base=tmp_path / "base")
    assert "the base has no module 'model.layers.0.moe.experts'" in finding.problem


def test_stacks_without_a_base_or_half_of_them_are_refused(tmp_path: Path) -> None:
    state = state_of(SITES["experts"])
    for options, named in (({}, "--base"), ({"separate": lambda _: []}, 'format="peft"')):
        with refused(li.FormatError, named):
            li.write_adapter(state, tmp_path / "a", "vllm", **options)
    path = li.write_adapter(state_of(SITES["experts"].at("mlp.experts.up")), tmp_path / "b")
    assert "both stacks" in li.check_adapter(path, "vllm")[0].problem


@needs_transformers_5
def test_stacks_for_a_model_with_single_experts_stop_and_the_other_way_round(tmp_path) -> None:
    """vLLM 0.32 refuses those of Qwen3-MoE, and serves the base in place of Mixtral's."""
    refusal = "vLLM refuses stacks of experts for the model_type 'qwen3_moe', or ignores them"
    single = of(experts("qwen3_moe")[0], ["all-experts"], tmp_path / "qwen3_moe", "vllm")
    of(experts("gpt_oss")[0], ["all-experts"], tmp_path / "gpt_oss", "peft")
    for family, stops in (("qwen3_moe", [refusal]), ("gpt_oss", [])):
        model = fill(li.inject(experts(family)[0], {"targets": ["all-experts"]}))
        path = li.save_adapter(model, tmp_path / f"{family} stack")
        findings = li.check_adapter(path, "vllm", base=tmp_path / family / "base")
        assert [f.problem for f in findings if f.stops] == stops
    findings = li.check_adapter(single, "vllm", base=tmp_path / "gpt_oss" / "base")
    assert any("has stacks of experts for the model_type 'gpt_oss'" in f.problem for f in findings)


@needs_transformers_5
def test_half_of_the_matrices_of_an_expert_are_refused(tmp_path: Path) -> None:
    """vLLM stops at them by an assertion without a word."""
    with refused(li.FormatError, f"'{EXPERTS}.0.gate_proj'"):
        of(moe(), [r"experts\.down_proj"], tmp_path / "half", "vllm")
    path = of(moe(), ["all-experts"], tmp_path, "vllm")
    names = load_file(path / MODEL)
    save_file({n: t for n, t in names.items() if ".experts.1.up_proj" not in n}, path / MODEL)
    for base in (None, tmp_path / "base"):
        (finding,) = [f for f in li.check_adapter(path, "vllm", base=base) if f.stops]
        assert f"stops at '{EXPERTS}.1.up_proj'" in finding.problem


# ------------------------------------------- experts that share a factor: `experts.w1`, `w2`, `w3`


@needs_transformers_5
def test_servers_compute_what_the_model_does_with_the_option_that_check_names(tmp_path) -> None:
    model = moe()
    path = of(model, SHARED, tmp_path, "sglang")
    sites = li.adapter_state(model).sites  # of a shared factor there is one for all
    due = [effect(sites[f"{EXPERTS}.{n}"]).float() for n in ("gate_up_proj", "down_proj")]
    for loads in (as_sglang_loads_it, as_vllm_loads_it):
        torch.testing.assert_close(loads(load_file(path / MODEL), 3), due, rtol=1e-5, atol=1e-5)
    assert_near(logits(li.load_adapter(moe(), path)), logits(model))
    options = {"sglang": "--experts-shared-outer-loras", "vllm": "--enable-moe-shared-loras"}
    for client, option in options.items():
        (finding,) = li.check_adapter(path, client, base=tmp_path / "base")
        assert (finding.stops, finding.fix) == (False, f"Start it with {option}")
    for client in ("peft", "llama.cpp", "diffusers"):
        assert li.check_adapter(path, client, base=tmp_path / "base")[0].stops


@needs_transformers_5
def test_a_config_targets_the_matrices_of_experts_and_nothing_else(tmp_path: Path) -> None:
    path = of(moe(), [GATE_UP, DOWN], tmp_path, "sglang")
    config = json.loads((path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "gate_proj", "up_proj"]


OTHERWISE: dict[str, tuple[list[Any], list[str]]] = {
    "an A of each": ([{"match": GATE_UP["match"]}, DOWN], ["w1'", "vllm"]),
    "a B of each": ([GATE_UP, {"match": DOWN["match"]}], ["w2'", "share: B"]),
    "the other factor": ([GATE_UP | {"share": "B"}, DOWN], ["w1'"]),
    "a stack less": ([GATE_UP], ["all stacks of the block"]),
}


@needs_transformers_5
@pytest.mark.parametrize("case", OTHERWISE)
def test_experts_that_share_otherwise_are_refused(case: str, tmp_path: Path) -> None:
    targets, named = OTHERWISE[case]
    with refused(li.FormatError, *named):
        of(moe(), targets, tmp_path, "sglang")
    assert not (tmp_path / "a").exists()
