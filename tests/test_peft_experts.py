"""Mixtures of experts, exchanged with PEFT both ways: a file means what PEFT computes from it.

Every model has square experts (hidden size equal to intermediate size), so that no shape tells
which way round a stack lies. Adapters of transformers 4 have single experts, and other names.
"""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import merged_on_disk
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_inject as li
from lora_inject.errors import FormatError
from lora_inject.formats import read_adapter

transformers = pytest.importorskip("transformers", "5")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")


TINY = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
}
ROUTED = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
GROUPED = ROUTED | {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
LOW_RANK = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}

# What the class is called, and the sizes that are its own.
STACKED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_oss": ("GptOss", {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "mixtral": ("Mixtral", {"num_local_experts": 3}),
    "llama4": ("Llama4", {"num_local_experts": 3, "interleave_moe_layer_step": 1}),
    "aria": ("AriaText", {"moe_num_experts": 4, "moe_num_shared_experts": 1}),
}
WITH_DENSE_LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3Moe", ROUTED | {"num_experts": 4, "mlp_only_layers": [0]}),
    "deepseek_v3": (
        "DeepseekV3",
        GROUPED | LOW_RANK | {"n_routed_experts": 4, "head_dim": 4, "v_head_dim": 8},
    ),
    "glm4_moe": ("Glm4Moe", GROUPED | {"n_routed_experts": 4}),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    ),
}


def build(kind: str) -> nn.Module:
    name, sizes = (STACKED | WITH_DENSE_LAYERS)[kind]
    config = "Llama4Text" if name == "Llama4" else name
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{config}Config")(**TINY | sizes)
    )
    for parameter in model.parameters():
        if parameter.ndim == 3:
            nn.init.normal_(parameter, 0, 0.2)
    return model.eval()  # type: ignore[no-any-return]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(12).reshape(2, 6)).logits  # type: ignore[no-any-return]


def off(found: Tensor, due: Tensor) -> float:
    return float((found - due).abs().max())


def randomize(parameters: Iterator[nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def adapted_by_peft(kind: str, path: Path, keep: Callable[[str], bool]) -> Tensor:
    """Save PEFT's adapter of the stacks that `keep` names, and return its outputs."""
    model = build(kind)
    stacks = [name for name, p in model.named_parameters() if p.ndim == 3 and keep(name)]
    config = peft.LoraConfig(target_parameters=stacks, target_modules=["q_proj"], r=2)
    wrapped = peft.get_peft_model(model, config)
    randomize(p for name, p in wrapped.named_parameters() if "lora_" in name)
    wrapped.save_pretrained(path)
    return logits(wrapped)


STACKS = {
    "both": lambda name: True,
    "second": lambda name: name.endswith(("down_proj", "fc2.weight")),
}


@pytest.mark.parametrize("stacks", STACKS)
@pytest.mark.parametrize("kind", STACKED)
def test_stacks_of_peft_are_read_and_written_again(kind: str, stacks: str, tmp_path: Path) -> None:
    due = adapted_by_peft(kind, tmp_path / "peft", STACKS[stacks])
    assert off(logits(build(kind)), due) > 0.1
    model = li.load_adapter(build(kind), tmp_path / "peft")
    assert off(logits(model), due) < 1e-5
    li.save_adapter(model, tmp_path / "ours")
    assert off(logits(li.load_adapter(build(kind), tmp_path / "ours")), due) < 1e-5
    assert off(logits(peft.PeftModel.from_pretrained(build(kind), tmp_path / "ours")), due) < 1e-5


@pytest.mark.parametrize("kind", ["gpt_oss", "mixtral"])
def test_stacks_of_peft_are_merged_on_disk(kind: str, tmp_path: Path) -> None:
    due = adapted_by_peft(kind, tmp_path / "peft", STACKS["both"])
    assert off(logits(merged_on_disk(build(kind), tmp_path / "peft", tmp_path)), due) < 1e-5


def test_square_stacks_are_refused_where_nothing_says_which_way_round(tmp_path: Path) -> None:
    adapted_by_peft("gpt_oss", tmp_path, STACKS["second"])
    with pytest.raises(FormatError, match=r"does not say whether .* pass transposed_modules"):
        read_adapter(tmp_path)
    turned = [f"model.layers.{n}.mlp.experts" for n in range(2)]
    sites = read_adapter(tmp_path, transposed_modules=turned).sites
    assert all(site.spec.transposed for name, site in sites.items() if "experts" in name)


@pytest.mark.parametrize("kind", WITH_DENSE_LAYERS)
def test_peft_adapts_dense_layers_beside_experts(kind: str, tmp_path: Path) -> None:
    """PEFT on transformers 5 takes every target called gate_proj, up_proj, ... for experts."""
    pattern = r"(self_attn|mlp|shared_experts?)\.(?!gate_up)\w+_proj(_with_mqa)?"
    model = li.inject(build(kind), {"rank": 2, "alpha": 4, "targets": [pattern]})
    randomize(iter(li.adapter_parameters(model).values()))
    due = logits(model)
    dense = [name for name in li.adapter_state(model).sites if name.endswith(".up_proj")]
    assert dense
    li.save_adapter(model, tmp_path / "ours")
    assert off(logits(build(kind)), due) > 0.1
    assert off(logits(peft.PeftModel.from_pretrained(build(kind), tmp_path / "ours")), due) < 1e-5
    for prefer in (None, "config"):
        again = li.load_adapter(build(kind), tmp_path / "ours", prefer=prefer)
        assert off(logits(again), due) < 1e-5


def test_square_stacks_are_refused_where_no_version_of_peft_is_given(tmp_path: Path) -> None:
    """PEFT before 0.18 wrote none, and took A and B the other way round."""
    adapted_by_peft("mixtral", tmp_path, STACKS["second"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    del config["peft_version"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"matrices are square .* as 'peft_version'"):
        li.load_adapter(build("mixtral"), tmp_path)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_targets_that_peft_renamed_are_read(kind: str, tmp_path: Path) -> None:
    """PEFT turns w1, w2, w3 into `gate_up_proj` and `down_proj`, with no module before them."""
    experts = ["w1", "w2", "w3"] if kind == "mixtral" else ["gate_proj", "up_proj", "down_proj"]
    model = build(kind)
    config = peft.LoraConfig(target_modules=["q_proj", *experts], r=2)
    wrapped = peft.get_peft_model(model, config)
    randomize(p for name, p in wrapped.named_parameters() if "lora_" in name)
    wrapped.save_pretrained(tmp_path)
    assert off(logits(li.load_adapter(build(kind), tmp_path)), logits(wrapped)) < 1e-5
    with pytest.raises(FormatError, match=r"experts': .* not say which pair is whose.*--base"):
        read_adapter(tmp_path)


class OneExpert(nn.Module):
    """A stack of one matrix, as Inkling's shared experts are."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(1, 6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.up[0].t()


def test_a_stack_of_one_matrix_is_read_as_a_stack(tmp_path: Path) -> None:
    plain, x = nn.Sequential(OneExpert(), nn.Linear(6, 3)), torch.randn(2, 4)
    config = peft.LoraConfig(target_parameters=["0.up"], target_modules=["1"], r=2)
    wrapped = peft.get_peft_model(copy.deepcopy(plain), config)
    randomize(p for name, p in wrapped.named_parameters() if "lora_" in name)
    wrapped.save_pretrained(tmp_path)
    model = li.load_adapter(plain, tmp_path)
    assert li.adapter_state(model).sites["0.up"].A.shape == (1, 2, 4)
    assert off(model(x), wrapped(x)) < 1e-5


# Adapters of transformers 4 ---------------------------------------------------------------------

# The block's old name, the old names of its layers, and which layers of the model have experts.
SINGLE: dict[str, tuple[str, tuple[str, ...], list[int], int]] = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2"), [0, 1], 3),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj"), [1], 4),
}


def write_old(path: Path, widths: dict[str, int], targets: list[str]) -> Path:
    """A PEFT folder whose modules have these names, and so many features on both sides."""
    path.mkdir()
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, width in widths.items():
        for side, shape in (("A", (2, width)), ("B", (width, 2))):
            key = f"base_model.model.{name}.lora_{side}.weight"
            tensors[key] = torch.randn(shape, generator=generator) * 0.3
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": targets}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("kind", SINGLE)
def test_single_experts_become_stacks(kind: str, tmp_path: Path) -> None:
    block, leaves, layers, n = SINGLE[kind]
    widths = {f"model.layers.{layer}.self_attn.q_proj": 16 for layer in layers}
    for layer in layers:
        experts = f"model.layers.{layer}.{block}.experts"
        widths |= {f"{experts}.{expert}.{leaf}": 16 for expert in range(n) for leaf in leaves}
    path = write_old(tmp_path / "old", widths, ["q_proj", *leaves])
    due = logits(peft.PeftModel.from_pretrained(build(kind), path))
    assert off(logits(build(kind)), due) > 0.1
    model = li.load_adapter(build(kind), path)
    assert off(logits(model), due) < 1e-5
    li.save_adapter(model, tmp_path / "new")
    assert off(logits(peft.PeftModel.from_pretrained(build(kind), tmp_path / "new")), due) < 1e-5
    assert off(logits(merged_on_disk(build(kind), path, tmp_path)), due) < 1e-5


def test_a_stack_has_zeros_where_an_expert_has_no_adapter(tmp_path: Path) -> None:
    name = "model.layers.0.block_sparse_moe.experts"
    old = write_old(tmp_path / "old", {f"{name}.0.w1": 16, f"{name}.2.w3": 16}, ["w1", "w3"])
    sites = read_adapter(old).sites
    model: Any = li.load_adapter(build("mixtral"), old)
    dense: Any = build("mixtral")
    with torch.no_grad():
        stack = dense.model.layers[0].mlp.experts.gate_up_proj
        for expert, leaf, rows in ((0, "w1", slice(16)), (2, "w3", slice(16, 32))):
            site = sites[f"{name}.{expert}.{leaf}"]
            stack[expert, rows] += 3 * site.B @ site.A
    assert off(logits(model), logits(dense)) < 1e-5


@pytest.mark.parametrize(
    ("expert", "dora", "words"),
    [(7, False, "of which it would be a part"), (1, True, "which cannot hold the m of each")],
)
def test_experts_that_a_stack_cannot_hold_are_refused(expert, dora, words, tmp_path) -> None:
    """A magnitude of each expert has no place on a stack; without it, the model is another."""
    name = f"model.layers.0.block_sparse_moe.experts.{expert}.w1"
    path = write_old(tmp_path / "old", {name: 16}, ["w1"])
    file, config = path / "adapter_model.safetensors", path / "adapter_config.json"
    if dora:
        magnitude = {f"base_model.model.{name}.lora_magnitude_vector": torch.ones(16)}
        save_file(load_file(file) | magnitude, file)
        config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    with pytest.raises(FormatError, match=words):
        li.load_adapter(build("mixtral"), path)


def llava() -> Any:
    torch.manual_seed(0)
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TINY),
        vision_config=transformers.CLIPVisionConfig(**vision),
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def test_names_of_llava_before_4_52_are_the_class_s_names_now(tmp_path: Path) -> None:
    old = {f"language_model.model.layers.{n}.self_attn.q_proj": 16 for n in range(2)}
    old["vision_tower.vision_model.encoder.layers.0.self_attn.v_proj"] = 8
    path = write_old(tmp_path / "old", old, ["q_proj", "v_proj"])
    model: Any = li.load_adapter(llava(), path)
    assert {*li.adapter_state(model).sites} == {
        "model.language_model.layers.0.self_attn.q_proj",
        "model.language_model.layers.1.self_attn.q_proj",
        "model.vision_tower.encoder.layers.0.self_attn.v_proj",
    }
    tensors, dense = read_adapter(path).sites, llava()
    with torch.no_grad():
        for n in range(2):
            site = tensors[f"language_model.model.layers.{n}.self_attn.q_proj"]
            layer = dense.model.language_model.layers[n].self_attn.q_proj
            layer.weight.add_(3 * site.B @ site.A)
    assert off(logits(model), logits(dense)) < 1e-5


def test_two_names_of_one_site_are_refused(tmp_path: Path) -> None:
    names = ("language_model.model", "model.language_model")
    old = {f"{start}.layers.0.self_attn.q_proj": 16 for start in names}
    path = write_old(tmp_path / "old", old, ["q_proj"])
    with pytest.raises(FormatError, match="q_proj': two tensors of the adapter are this one"):
        li.load_adapter(llava(), path)


def test_names_that_nobody_knows_are_refused(tmp_path: Path) -> None:
    path = write_old(tmp_path / "old", {"model.layers.0.attention.q": 16}, ["q"])
    with pytest.raises(FormatError, match="the model has no such module"):
        li.load_adapter(build("mixtral"), path)
