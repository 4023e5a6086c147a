"""Experts in float8 and in NVFP4 as they are published: trained on as they are stored, and merged.

The reference is the same model in float64 with the values that the codes mean, worked out here.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import error, fill, same_bits
from helpers.checkpoints import load_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_inject as li
from lora_inject.checkpoint import MergeOptions, merge_checkpoint, verify_checkpoint
from lora_inject.core.functional.weight import dense_delta
from lora_inject.experts.packed_experts import PackedExperts

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.arange(24).view(2, 12)
WIDE = 32
EPS = torch.finfo(torch.float32).eps
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]

# ------------------------------------------------------------------------- how they are published

Stored = tuple[dict[str, Tensor], Tensor]  # what lies in the file by its ending; the values


def in_blocks(w: Tensor, high: int, wide: int) -> tuple[Tensor, Tensor, Tensor]:
    """Float8 by blocks: codes, scales, values."""
    grid = [(i, j) for i in range(0, w.shape[0], high) for j in range(0, w.shape[1], wide)]
    codes, values, scales = torch.empty_like(w), torch.empty_like(w), []
    for i, j in grid:
        at = slice(i, i + high), slice(j, j + wide)
        scale = w[at].abs().max() / 448
        codes[at] = w[at] / scale
        values[at] = codes[at].to(torch.float8_e4m3fn).float() * scale
        scales.append(scale)
    return codes.to(torch.float8_e4m3fn), torch.stack(scales).view(-(-len(w) // high), -1), values


def fp8(w: Tensor) -> Stored:
    codes, scales, values = in_blocks(w, 16, 16)
    return {"weight": codes, "weight_scale_inv": scales}, values


def fp8_rows(w: Tensor) -> Stored:
    codes, scales, _ = in_blocks(w, 1, w.shape[1])
    scales = scales.bfloat16()
    return {"weight": codes, "weight_scale": scales}, codes.float() * scales.float()


def fp8_whole(w: Tensor) -> Stored:
    codes, scales, values = in_blocks(w, *w.shape)
    stored = {"weight": codes, "weight_scale": scales.view(()), "input_scale": torch.ones(())}
    return stored, values


def four_bits(w: Tensor, whole: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """NVFP4: codes, float8 scales, values; `whole` is multiplied."""
    groups = w.view(len(w), -1, 16)
    scales = (groups.abs().amax(2) / 6 / whole).to(torch.float8_e4m3fn)
    step = (scales.float() * whole)[..., None]
    sizes = torch.tensor(E2M1)
    nearest = ((groups / step).abs()[..., None] - sizes).abs().argmin(-1)
    values = (sizes[nearest] * groups.sign() * step).view_as(w)
    codes = (nearest + 8 * (groups < 0)).view(len(w), -1, 2)
    return (codes[..., 0] + 16 * codes[..., 1]).to(torch.uint8), scales, values


def compressed(w: Tensor) -> Stored:
    divisor = (448 * 6 / w.abs().max()).reshape(1)
    codes, scales, values = four_bits(w, 1 / divisor)
    stored = {"weight_packed": codes, "weight_scale": scales, "weight_global_scale": divisor}
    return stored | {"input_global_scale": torch.ones(1)}, values


def modelopt(w: Tensor) -> Stored:
    factor = w.abs().max() / (448 * 6)
    codes, scales, values = four_bits(w, factor)
    stored = {"weight": codes, "weight_scale": scales, "weight_scale_2": factor}
    return stored | {"input_scale": torch.ones(())}, values


FORMS: dict[str, tuple[Callable[[Tensor], Stored], dict[str, Any]]] = {
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [16, 16]}),
    "fp8 of rows": (fp8_rows, {"quant_method": "compressed-tensors", "format": "float-quantized"}),
    "fp8 of all": (fp8_whole, {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "nvfp4": (compressed, {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}),
    "nvfp4 of modelopt": (modelopt, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
}
SIZES = {"hidden_size": WIDE, "intermediate_size": WIDE, "num_hidden_layers": 1, "vocab_size": 40}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "moe_intermediate_size": 2 * WIDE}
SIZES |= {"head_dim": 16, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16}
GROUPED = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 0, "n_group": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {"num_experts": 4},
    "DeepseekV3": {**GROUPED, **LATENT, "v_head_dim": 16, "topk_group": 1},
    "Glm4Moe": {**GROUPED, "topk_group": 1},
}
CASES = [("Qwen3Moe", form) for form in FORMS]
CASES += [(family, form) for family in ("DeepseekV3", "Glm4Moe") for form in ("fp8", "nvfp4")]


def publish(
    folder: Path, quantize: Callable[[Tensor], Stored], said: Any, family: str = "Qwen3Moe"
) -> dict[str, Tensor]:
    """Write a checkpoint with its linear layers in a form; return the values that it means."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | FAMILIES[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    values = dict(stored)
    for name in [n for n in stored if ".mlp." in n and n.endswith("proj.weight")]:
        parts, values[name] = quantize(stored.pop(name))
        stored |= {name.removesuffix("weight") + end: t.clone() for end, t in parts.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text()) | {"quantization_config": said}
    (folder / "config.json").write_text(json.dumps(settings))
    return values


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def published(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A checkpoint with its linear layers in a form, the same with their values, and the form."""
    family, form = request.param
    plain, packed = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("packed")
    values = publish(packed, *FORMS[form], family)
    (packed / "hf_quant_config.json").write_text("{}")
    settings = json.loads((packed / "config.json").read_text())
    del settings["quantization_config"]
    (plain / "config.json").write_text(json.dumps(settings))
    save_file(values, plain / "model.safetensors", {"format": "pt"})
    return packed, plain, form


def load(folder: Path, dtype: torch.dtype = torch.float64, how: str = "eager") -> Any:
    with li.packed_experts():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.set_experts_implementation(how)
    return model


def adapted(model: Any, *targets: str) -> Any:
    torch.manual_seed(1)
    config = {"rank": 2, "alpha": 4, "targets": ["all-experts", *targets]}
    return fill(li.inject(model, config), std=0.1)


def stacks(model: Any) -> dict[str, PackedExperts]:
    return {k: p for k, p in model.named_parameters() if isinstance(p, PackedExperts)}


# ------------------------------------------------------------------------------------------ loaded


def test_the_values_are_those_that_the_codes_mean(published: Any) -> None:
    packed, plain, form = published
    model, dense = load(packed), load(plain).state_dict()
    assert not getattr(model, "is_quantized", False)
    assert len(stacks(model)) == 2
    for key, stack in stacks(model).items():
        assert error(stack.dequantize(), dense[key]) < EPS
        assert torch.equal(stack[1], stack.dequantize()[1])
        assert not stack.requires_grad
    with torch.no_grad():
        wanted = load(plain)(IDS).logits
        assert error(model(IDS).logits, wanted) < 1e-6
    if form == "fp8":  # which transformers can unpack itself
        theirs = transformers.AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float64)
        for key, stack in stacks(model).items():
            assert torch.equal(stack.dequantize().float(), theirs.get_parameter(key).float())


# torch's grouped product takes no float64.
WAYS = {"eager": (torch.float64, 1e-12), "batched_mm": (torch.float64, 1e-12)}
WAYS["grouped_mm"] = (torch.float32, 1e-5)


@pytest.mark.parametrize("how", WAYS)
def test_outputs_and_gradients_are_those_of_the_dense_model(published: Any, how: str) -> None:
    packed, plain, _ = published
    dtype, near = WAYS[how]
    model, dense = adapted(load(packed, dtype, how), "o_proj"), load(plain)
    with torch.no_grad():  # exactly what the codes mean
        for key, parameter in dense.named_parameters():
            held = model.get_parameter(key)
            parameter.copy_(held.dequantize() if key in stacks(model) else held)
    li.install(dense, li.adapter_state(model), base="any")
    li.train_only(dense, "default")
    results = []
    for each in (model, dense):
        embedded = dense.get_input_embeddings()(IDS).detach().to(each.dtype).requires_grad_()
        logits = each(inputs_embeds=embedded).logits
        logits.square().mean().backward()
        grads = {k: p.grad for k, p in li.adapter_parameters(each).items()}
        results.append({"logits": logits.detach(), "of x": embedded.grad, **grads})
    for key, wanted in results[1].items():
        assert wanted.any()
        assert error(results[0][key], wanted) < near, key


def test_an_adapter_travels_and_is_merged_into_floats(published: Any, tmp_path: Path) -> None:
    packed, plain, _ = published
    model = adapted(load(packed, torch.float32))
    li.save_adapter(model, tmp_path / "a")
    again = li.load_adapter(load(packed, torch.float32), tmp_path / "a")
    with torch.no_grad():
        wanted = model(IDS).logits
        assert same_bits(again(IDS).logits, wanted)
        dense = li.load_adapter(load(plain, torch.float32), tmp_path / "a", base="quantized")
        assert error(dense(IDS).logits, wanted.double()) < 1e-4
    held = stacks(model)
    with pytest.raises(li.LayerError, match="quantized"):
        li.merge(model)
    li.merge(model, dequantize="float32")
    with torch.no_grad():
        assert error(model(IDS).logits, wanted.double()) < 1e-4
    li.unmerge(model)
    assert {k: id(s) for k, s in stacks(model).items()} == {k: id(s) for k, s in held.items()}


# ------------------------------------------------------------------------------------------ on disk


def test_merged_on_disk_into_floats_or_quantized_again(published: Any, tmp_path: Path) -> None:
    """Held to the dense stacks with their deltas; again, it is as near as the format allows."""
    packed, plain, form = published
    state, dense = li.adapter_state(adapted(load(packed, torch.float32))), load(plain)
    exact = {
        name: dense.get_parameter(name) + dense_delta(site.spec, site.A, site.B)
        for name, site in state.sites.items()
    }
    options = MergeOptions(dequantize="float32")
    merge_checkpoint(packed, [state], tmp_path / "floats", options=options)
    assert load_checkpoint(tmp_path / "floats").keys() == load_checkpoint(plain).keys()
    assert not (tmp_path / "floats" / "hf_quant_config.json").exists()
    assert "quantization_config" not in (tmp_path / "floats" / "config.json").read_text()
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "floats", dtype="float32")
    for name, W in exact.items():
        assert error(merged.get_parameter(name), W) < 1e-6, name
    assert verify_checkpoint(packed, [state], tmp_path / "floats", options=options).problems == ()

    options = MergeOptions(requantize=True)
    report = merge_checkpoint(packed, [state], tmp_path / "again", options=options)
    assert {row.action for row in report.tensors.values()} == {"folded"}
    before, after = load_checkpoint(packed), load_checkpoint(tmp_path / "again")
    assert before.keys() == after.keys()
    changed = {name for name in before if not same_bits(before[name], after[name])}
    stored = ("weight", "weight_packed", "weight_scale", "weight_scale_inv")
    assert all("experts" in name and name.endswith(stored) for name in changed)
    packed_stacks = stacks(load(tmp_path / "again"))
    for name, W in exact.items():
        due = torch.stack([quantized_as_stored(w.float(), FORMS[form][0]) for w in W])
        assert error(packed_stacks[name].dequantize(), W) < 1.1 * error(due.double(), W), name
    assert verify_checkpoint(packed, [state], tmp_path / "again", options=options).problems == ()
    if form.startswith("nvfp4"):  # one scale for all, beyond which a sum would be clipped
        for site in state.sites.values():
            site.A.mul_(100)
        with pytest.raises(li.CheckpointError, match=r"requantize .*merged, it has values up to"):
            merge_checkpoint(packed, [state], tmp_path / "more", options=options)
        assert not (tmp_path / "more").exists()


def quantized_as_stored(w: Tensor, quantize: Callable[[Tensor], Stored]) -> Tensor:
    """Gate and up are stored each on its own."""
    halves = w.chunk(2) if len(w) == 4 * WIDE else (w,)
    return torch.cat([quantize(half)[1] for half in halves])


# ----------------------------------------------------------------------------------------- refused


def in_a_block_that_gate_and_up_would_share(w: Tensor) -> dict[str, Tensor]:
    return dict(zip(("weight", "weight_scale_inv"), in_blocks(w, 24, 16)[:2], strict=True))


@pytest.mark.parametrize(
    ("quantize", "block", "words"),
    [
        (
            lambda w: compressed(w)[0] | {"weight_zero_point": w[0, :1]}, None,
            r"experts\.\w+_proj'.*stored as .*weight_zero_point .* stay packed in MXFP4",
        ),
        (
            in_a_block_that_gate_and_up_would_share, [24, 16],
            "has 64 outputs, and 24 of them share a scale",
        ),
    ],
)  # fmt: skip
def test_what_does_not_stay_packed_is_refused(quantize, block, words, tmp_path: Path) -> None:
    said = {"quant_method": "fp8" if block else "compressed-tensors", "weight_block_size": block}
    publish(tmp_path, lambda w: (quantize(w), w), said)
    with pytest.raises(li.LayerError, match=words):
        load(tmp_path)
