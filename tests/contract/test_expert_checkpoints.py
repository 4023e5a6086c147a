"""Checkpoints of experts in float8 and NVFP4 as they are published, merged on disk.

The reference is the same model with the values that the codes mean, worked out here.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import error, fill, same_bits
from helpers.merging import load_checkpoint
from helpers.quantized import Block, dequantized, quantized
from helpers.refusals import refused
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_inject as li

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.quantizers.quantizer_mxfp4")
pytestmark = [pytest.mark.recent, pytest.mark.filterwarnings("ignore")]

WIDE = 32
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
SCALE = 2.0  # alpha / rank, by hand

# ------------------------------------------------------------------------ how they are published

Stored = tuple[dict[str, Tensor], Tensor]  # what lies in the file by its ending; the values


def fp8(w: Tensor, block: Block = (16, 16)) -> Stored:
    codes, scales = quantized(w, block)
    return {"weight": codes, "weight_scale_inv": scales}, dequantized(codes, scales, block)


def fp8_rows(w: Tensor) -> Stored:
    codes, scales = quantized(w, (1, w.shape[1]))
    scales = scales.bfloat16()
    return {"weight": codes, "weight_scale": scales}, codes.float() * scales.float()


def fp8_whole(w: Tensor) -> Stored:
    codes, scales = quantized(w, tuple(w.shape))
    stored = {"weight": codes, "weight_scale": scales.view(()), "input_scale": torch.ones(())}
    return stored, codes.float() * scales


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
}
ON_DISK = [("Qwen3Moe", form) for form in FORMS] + [("DeepseekV3", "nvfp4")]


def built(folder: Path, family: str, said: Any) -> dict[str, Tensor]:
    """Write a model with random weights that says how it is quantized; return its tensors."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | FAMILIES[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text()) | {"quantization_config": said}
    (folder / "config.json").write_text(json.dumps(settings))
    return load_file(folder / "model.safetensors")


def publish(
    folder: Path, quantize: Callable[[Tensor], Stored], said: Any, family: str = "Qwen3Moe"
) -> dict[str, Tensor]:
    """Write a checkpoint with its linear layers in a form; return the values that it means."""
    stored = built(folder, family, said)
    values = dict(stored)
    for name in [n for n in stored if ".mlp." in n and n.endswith("proj.weight")]:
        parts, values[name] = quantize(stored.pop(name))
        stored |= {name.removesuffix("weight") + end: t.clone() for end, t in parts.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    return values


def both(folder: Path, family: str, form: str) -> tuple[Path, Path]:
    """A checkpoint with its linear layers in a form, and the same with their values."""
    plain, packed = folder / "plain", folder / "packed"
    values = publish(packed, *FORMS[form], family)
    (packed / "hf_quant_config.json").write_text("{}")
    settings = json.loads((packed / "config.json").read_text())
    del settings["quantization_config"]
    plain.mkdir()
    (plain / "config.json").write_text(json.dumps(settings))
    save_file(values, plain / "model.safetensors", {"format": "pt"})
    return packed, plain


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


def adapted(model: Any) -> Any:
    torch.manual_seed(1)
    return fill(li.inject(model, {"rank": 2, "alpha": 4, "targets": ["all-experts"]}), std=0.1)


def deltas(model: Any) -> dict[str, Tensor]:
    """The dense delta of each stack, as its weight lies."""
    sites = li.adapter_state(model).sites.values()
    each = {s.spec.weight: (s.spec, SCALE * s.B.double() @ s.A.double()) for s in sites}
    return {name: d.mT if spec.transposed else d for name, (spec, d) in each.items()}


@pytest.mark.parametrize(("family", "form"), ON_DISK)
def test_merged_on_disk_into_floats_or_quantized_again(family: str, form: str, tmp_path) -> None:
    """Held to the dense stacks with their deltas; again, it is as near as the format allows."""
    packed, plain = both(tmp_path, family, form)
    model, dense = adapted(load(plain)), load(plain)
    state = li.adapter_state(model)
    exact = {name: dense.get_parameter(name) + d for name, d in deltas(model).items()}
    options = li.classes.MergeOptions(dequantize="float32", verify=True, any_base=True)
    li.merge_checkpoint(packed, [state], tmp_path / "floats", options=options)
    assert load_checkpoint(tmp_path / "floats").keys() == load_checkpoint(plain).keys()
    assert not (tmp_path / "floats" / "hf_quant_config.json").exists()
    assert "quantization_config" not in (tmp_path / "floats" / "config.json").read_text()
    merged = load(tmp_path / "floats")
    for name, W in exact.items():
        assert error(merged.get_parameter(name), W) < 1e-6, name

    options = li.classes.MergeOptions(requantize=True, verify=True, any_base=True)
    report = li.merge_checkpoint(packed, [state], tmp_path / "again", options=options)
    assert {row.action for row in report.tensors.values()} == {"folded"}
    before, after = load_checkpoint(packed), load_checkpoint(tmp_path / "again")
    assert before.keys() == after.keys()
    changed = {name for name in before if not same_bits(before[name], after[name])}
    stored = ("weight", "weight_packed", "weight_scale", "weight_scale_inv")
    assert all("experts" in name and name.endswith(stored) for name in changed)
    for name, W in exact.items():
        block, _, which = name.rpartition(".")
        parts = ("gate", "up") if "gate" in which else ("down",)
        for i, w in enumerate(W.float()):
            for part, due in zip(parts, w.chunk(len(parts)), strict=True):
                found = decoded(after, f"{block}.{i}.{part}_proj.")
                wanted = FORMS[form][0](due)[1]
                assert error(found, due.double()) < 1.3 * error(wanted, due.double()), name
    if form.startswith("nvfp4"):  # one scale for all, beyond which a sum would be clipped
        for site in state.sites.values():
            site.A.mul_(100)
        with refused(li.CheckpointError, "requantize"):
            li.merge_checkpoint(packed, [state], tmp_path / "more", options=options)
        assert not (tmp_path / "more").exists()


def decoded(tensors: dict[str, Tensor], at: str) -> Tensor:
    """What the stored parts of a matrix mean."""
    codes = tensors.get(f"{at}weight_packed", tensors.get(f"{at}weight"))
    scales = tensors.get(f"{at}weight_scale_inv", tensors.get(f"{at}weight_scale")).float()
    if codes.dtype == torch.float8_e4m3fn:
        scales = scales.reshape(-1, 1) if scales.dim() < 2 else scales
        high, wide = (n // parts for n, parts in zip(codes.shape, scales.shape, strict=True))
        return dequantized(codes, scales, (high, wide))
    if (divisor := tensors.get(f"{at}weight_global_scale")) is not None:
        scales = scales / divisor
    else:
        scales = scales * tensors[f"{at}weight_scale_2"]
    four = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).long()
    values = torch.tensor(E2M1)[four & 7] * (1 - 2 * (four >> 3))
    return values * scales.repeat_interleave(16, 1)
