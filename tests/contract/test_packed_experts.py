"""Experts in MXFP4 and float8 as they are published, trained on as they are stored; and merged.

The reference is the same model with the values that the codes mean, worked out here; those of MXFP4
are what transformers unpacks.
"""

import copy
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
pytest.importorskip("accelerate")
pytest.importorskip("transformers.quantizers.quantizer_mxfp4")
pytestmark = [pytest.mark.recent, pytest.mark.filterwarnings("ignore")]

IDS = torch.arange(24).view(2, 12)
WIDE = 32
EPS = torch.finfo(torch.float32).eps
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
    "GptOss": {"num_local_experts": 4, "intermediate_size": 2 * WIDE},
}
CASES = [
    ("GptOss", "mxfp4"),
    *((family, "fp8") for family in ("Qwen3Moe", "DeepseekV3")),
]
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


def publish_mxfp4(folder: Path, plain: Path) -> None:
    """A checkpoint as GPT-OSS is published, with random codes and scales, and what they mean."""
    tensors = built(folder, "GptOss", {"quant_method": "mxfp4"})
    for name, n_out, n_in in (("gate_up_proj", 4 * WIDE, WIDE), ("down_proj", WIDE, 2 * WIDE)):
        key, size = f"model.layers.0.mlp.experts.{name}", (4, n_out, n_in // 32)
        del tensors[key]
        codes = torch.randint(0, 256, (*size, 16), dtype=torch.uint8)
        scales = torch.randint(122, 127, size, dtype=torch.uint8)
        tensors |= {f"{key}_blocks": codes, f"{key}_scales": scales}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    how = {"quantization_config": transformers.Mxfp4Config(dequantize=True), "dtype": "float32"}
    dense = transformers.GptOssForCausalLM.from_pretrained(folder, **how)
    dense.config.__dict__.pop("quantization_config", None)
    dense.save_pretrained(plain)


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


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def published(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A checkpoint with its linear layers in a form, the same with their values, and the form."""
    family, form = request.param
    folder = tmp_path_factory.mktemp("published")
    if form != "mxfp4":
        return *both(folder, family, form), form
    publish_mxfp4(folder / "packed", folder / "plain")
    return folder / "packed", folder / "plain", form


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gpt-oss")
    publish_mxfp4(out, out / "plain")
    return out


def load(folder: Path, dtype: torch.dtype = torch.float32, how: str = "eager") -> Any:
    with li.packed_experts():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.set_experts_implementation(how)
    return model


def adapted(model: Any, *targets: str) -> Any:
    torch.manual_seed(1)
    config = {"rank": 2, "alpha": 4, "targets": ["all-experts", *targets]}
    return fill(li.inject(model, config), std=0.1)


def stacks(model: Any) -> dict[str, Any]:
    """The parameters that hold codes."""
    return {k: p for k, p in model.named_parameters() if type(p) is not nn.Parameter}


def deltas(model: Any) -> dict[str, Tensor]:
    """The dense delta of each stack, as its weight lies."""
    sites = li.adapter_state(model).sites.values()
    each = {s.spec.weight: (s.spec, SCALE * s.B.double() @ s.A.double()) for s in sites}
    return {name: d.mT if spec.transposed else d for name, (spec, d) in each.items()}


def ids_of(stacks: dict[str, Any]) -> dict[str, int]:
    return {key: id(stack) for key, stack in stacks.items()}


# --------------------------------------------------------------------------------------- as loaded


def test_the_values_are_those_that_the_codes_mean(published: Any) -> None:
    packed, plain, form = published
    model, dense = load(packed, torch.float64), load(plain, torch.float64).state_dict()
    assert not getattr(model, "is_quantized", False)
    assert len(stacks(model)) == 2
    for key, stack in stacks(model).items():
        assert error(stack.dequantize(), dense[key]) < EPS
        assert torch.equal(stack[1], stack.dequantize()[1])
        assert torch.equal(stack.mT[2], stack.dequantize()[2].T)
        assert not stack.requires_grad
        assert form != "mxfp4" or stack.codes.numel() + stack.scales.numel() < 0.54 * stack.numel()
    with torch.no_grad():
        assert error(model(IDS).logits, load(plain, torch.float64)(IDS).logits) < 1e-6
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
    model, dense = adapted(load(packed, dtype, how), "o_proj"), load(plain, torch.float64)
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


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_in_bfloat16_it_trains_as_the_unpacked_one(folder, reentrant) -> None:
    runs = []
    for of in (folder, folder / "plain"):
        model = adapted(load(of, torch.bfloat16, "grouped_mm"), "o_proj").train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        optimizer = torch.optim.SGD(li.adapter_parameters(model).values(), lr=1.0)
        for _ in range(2):
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(li.adapter_parameters(model))
    for key, wanted in runs[1].items():
        assert error(runs[0][key], wanted.double()) < 2e-2, key


def test_what_waits_for_the_backward_pass_is_packed(folder: Path) -> None:
    """The unpacked experts of all layers together would be the model that does not fit."""
    kept: list[Tensor] = []
    model = adapted(load(folder), "o_proj")
    shapes = [t for s in stacks(model).values() for t in (s.shape[1:], s.shape[:0:-1])]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(IDS)
    matrices = [t for t in kept if t.shape in shapes]
    assert matrices
    packed = type(next(iter(stacks(model).values())))
    assert all(isinstance(t, packed) for t in matrices)


# ------------------------------------------------------------------------------ loaded and merged


@torch.no_grad()
def test_an_adapter_travels_to_the_same_base_and_is_merged_into_floats(
    published: Any, tmp_path: Path
) -> None:
    packed, plain, _ = published
    model = adapted(load(packed), "o_proj")
    wanted, held = model(IDS).logits, stacks(model)
    li.save_adapter(model, tmp_path / "a")
    again = li.load_adapter(load(packed), tmp_path / "a")
    assert same_bits(again(IDS).logits, wanted)
    assert same_bits(copy.deepcopy(again)(IDS).logits, wanted)
    for key, stack in stacks(again.to(torch.bfloat16)).items():
        assert same_bits(stack.dequantize(), held[key].dequantize().to(torch.bfloat16))
    dense = li.load_adapter(load(plain), tmp_path / "a", base="quantized")
    assert error(dense(IDS).logits, wanted.double()) < 1e-4

    with refused(li.LayerError, "experts", "dequantize"):
        li.merge(model)
    sent = dict(li.merged_weights(model, dequantize="float32"))
    due = dict(load(plain).named_parameters())
    assert sent.keys() == due.keys()
    changes = deltas(model)
    li.merge(model, dequantize="float32")
    for name in held:
        merged = model.get_parameter(name)
        assert type(merged) is nn.Parameter
        assert error(merged, due[name].double() + changes[name]) < 1e-6
        assert torch.equal(sent[name], merged)
    assert error(model(IDS).logits, wanted.double()) < 1e-4
    li.unmerge(model)
    assert ids_of(stacks(model)) == ids_of(held)


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
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "floats", dtype="float32")
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


# --------------------------------------------------------------------------------------- refusals


def test_a_block_of_scales_that_two_matrices_would_share_is_refused(tmp_path: Path) -> None:
    said = {"quant_method": "fp8", "weight_block_size": [24, 16]}
    publish(tmp_path, lambda w: fp8(w, (24, 16)), said)
    with refused(li.LayerError, "experts", "64"):
        load(tmp_path)


def test_older_transformers_which_would_unpack_them_is_refused(monkeypatch) -> None:
    monkeypatch.setattr("transformers.__version__", "5.23.1")
    with refused(li.LayerError, "5.23.1", "5.24"), li.packed_experts():
        pass


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"targets": ["all-experts"], "init": "pissa"}, "pissa"),
        ({"targets": ["all-experts"], "compute": "float32"}, "compute: base"),
        ({"targets": ["q_proj"], "train": [r"experts\.gate_up_proj"]}, "gate_up_proj"),
    ],
)
def test_what_would_need_the_whole_stack_is_refused(folder: Path, options: Any, name: str) -> None:
    model = load(folder, torch.bfloat16)
    with refused(li.LayerError, name):
        li.inject(model, {"rank": 2, **options})
    assert not li.adapters(model)


def test_codes_are_another_base_and_are_never_taken_for_floats(
    folder: Path, tmp_path: Path
) -> None:
    """A plain tensor with their data would have none: the next read would end the process."""
    model, other = load(folder), load(folder)
    path = li.save_adapter(adapted(load(folder)), tmp_path / "a")
    stack, plain = next(iter(stacks(other).values())), nn.Parameter(torch.zeros(2))
    with pytest.raises(RuntimeError, match="incompatible tensor type"):
        plain.data = stack
    assert not plain.any()
    with refused(li.LayerError, "packed"), torch.no_grad():
        stack.add_(1)
    stack.codes.add_(1)
    with refused(li.FormatError, "gate_up_proj"):
        li.load_adapter(other, path)
    other.load_state_dict(model.state_dict())
    for key, stack in stacks(other).items():
        assert torch.equal(stack.codes, stacks(model)[key].codes)
    with pytest.raises(RuntimeError, match="values are packed"):
        other.load_state_dict(load(folder / "plain").state_dict())
