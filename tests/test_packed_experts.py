"""GPT-OSS with its experts in MXFP4 as they are stored: adapters train on them and below them.

The reference is the same checkpoint unpacked by transformers, `Mxfp4Config(dequantize=True)`.
"""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import error, fill
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_inject as li
from lora_inject.core.functional.weight import dense_delta
from lora_inject.experts.packed_experts import PackedExperts

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.quantizers.quantizer_mxfp4")
pytestmark = pytest.mark.filterwarnings("ignore")
EXPERTS = [r"experts\.gate_up_proj", r"experts\.down_proj"]
TARGETS = {"experts": EXPERTS, "attention": ["q_proj", "v_proj"], "both": [*EXPERTS, "o_proj"]}
IDS = torch.arange(24).view(2, 12)
HIDDEN, WIDE, N = 32, 64, 4


def test_older_transformers_which_would_unpack_them_is_refused(monkeypatch) -> None:
    monkeypatch.setattr("transformers.__version__", "5.23.1")
    found = r"transformers 5\.23\.1 .* Install transformers 5\.24"
    with pytest.raises(li.LayerError, match=found), li.packed_experts():
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint as GPT-OSS is published, with random codes and scales."""
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": WIDE, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 50}
    config = transformers.GptOssConfig(**sizes, num_local_experts=N, num_experts_per_tok=2)
    model = transformers.GptOssForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    out = tmp_path_factory.mktemp("gpt-oss")
    model.save_pretrained(out)
    tensors = load_file(out / "model.safetensors")
    for layer in range(2):
        for name, n_out, n_in in (("gate_up_proj", 2 * WIDE, HIDDEN), ("down_proj", HIDDEN, WIDE)):
            key, size = f"model.layers.{layer}.mlp.experts.{name}", (N, n_out, n_in // 32)
            del tensors[key]
            codes = torch.randint(0, 256, (*size, 16), dtype=torch.uint8)
            scales = torch.randint(122, 127, size, dtype=torch.uint8)
            tensors |= {f"{key}_blocks": codes, f"{key}_scales": scales}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((out / "config.json").read_text())
    said["quantization_config"] = {"quant_method": "mxfp4"}
    (out / "config.json").write_text(json.dumps(said))
    return out


def unpacked(
    folder: Path, dtype: torch.dtype = torch.float32, how: str = "eager", dequantize: bool = True
) -> Any:
    options = {"quantization_config": transformers.Mxfp4Config(dequantize=True)}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, **options if dequantize else {}
    )
    model.set_experts_implementation(how)
    return model


def load(folder: Path, dtype: torch.dtype = torch.float32, how: str = "eager") -> Any:
    with li.packed_experts():
        return unpacked(folder, dtype, how, dequantize=False)


def adapted(model: Any, targets: list[str]) -> Any:
    torch.manual_seed(1)
    return fill(li.inject(model, {"rank": 2, "alpha": 4, "targets": targets}), std=0.1)


def stacks(model: Any) -> dict[str, PackedExperts]:
    return {k: p for k, p in model.named_parameters() if isinstance(p, PackedExperts)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_values_are_those_that_transformers_unpacks(folder: Path, dtype: torch.dtype) -> None:
    model, dense = load(folder, dtype), unpacked(folder, dtype).state_dict()
    assert len(stacks(model)) == 4
    for key, stack in stacks(model).items():
        assert torch.equal(stack.dequantize(), dense[key])
        assert torch.equal(stack[1], dense[key][1])
        assert torch.equal(stack.mT[2], dense[key][2].T)
        assert stack.codes.numel() + stack.scales.numel() < 0.54 * stack.numel()


@pytest.mark.parametrize("how", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("targets", TARGETS)
def test_outputs_and_gradients_are_those_over_the_unpacked_base(
    folder: Path, how: str, targets: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []  # dimensions of what is unpacked
    plain = PackedExperts.unpacked
    monkeypatch.setattr(PackedExperts, "unpacked", lambda s: seen.append(s.dim()) or plain(s))
    runs = []
    for make in (load, unpacked):
        model = adapted(make(folder, how=how), TARGETS[targets])
        logits = model(IDS).logits
        logits.square().mean().backward()
        grads = {k: p.grad for k, p in li.adapter_parameters(model).items()}
        runs.append({"logits": logits.detach(), **grads})
    assert seen
    assert how == "batched_mm" or set(seen) == {2}, "a whole stack was unpacked"
    for key, wanted in runs[1].items():
        assert wanted.any()
        assert error(runs[0][key], wanted.double()) < 1e-5, key


def test_no_plain_tensor_can_have_the_data_of_a_packed_stack(folder: Path) -> None:
    """It would have none, and the next read of it would end the process."""
    stack, other = next(iter(stacks(load(folder)).values())), nn.Parameter(torch.zeros(2))
    with pytest.raises(RuntimeError, match="incompatible tensor type"):
        other.data = stack
    assert not other.any()
    with pytest.raises(li.LayerError, match="values are packed"), torch.no_grad():
        stack.add_(1)


def test_what_waits_for_the_backward_pass_is_packed(folder: Path) -> None:
    """The unpacked experts of all layers together would be the model that does not fit."""
    kept: list[Tensor] = []
    model = adapted(load(folder), TARGETS["both"])
    shapes = [t for s in stacks(model).values() for t in (s.shape[1:], s.shape[:0:-1])]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(IDS)
    matrices = [t for t in kept if t.shape in shapes]
    assert matrices
    assert all(isinstance(t, PackedExperts) for t in matrices)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_in_bfloat16_it_trains_as_the_unpacked_one(folder, reentrant) -> None:
    runs = []
    for make in (load, unpacked):
        model = adapted(make(folder, torch.bfloat16, "grouped_mm"), TARGETS["both"]).train()
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


@torch.no_grad()
def test_an_adapter_travels_to_the_same_base_and_no_other(folder: Path, tmp_path: Path) -> None:
    model = adapted(load(folder), TARGETS["both"])
    wanted = model(IDS).logits
    li.save_adapter(model, tmp_path / "a")
    again, other = li.load_adapter(load(folder), tmp_path / "a"), load(folder)
    assert torch.equal(again(IDS).logits, wanted)
    assert torch.equal(copy.deepcopy(again)(IDS).logits, wanted)
    next(iter(stacks(other).values())).codes.add_(1)
    with pytest.raises(li.FormatError, match="another base"):
        li.load_adapter(other, tmp_path / "a")
    li.load_adapter(unpacked(folder), tmp_path / "a", base="quantized")
    halved = again.to(torch.bfloat16)
    assert {s.dtype for s in stacks(halved).values()} == {torch.bfloat16}
    assert error(halved(IDS).logits.float(), wanted.double()) < 0.1


@torch.no_grad()
def test_merged_on_request_into_plain_floats_and_restored(folder: Path) -> None:
    model = adapted(load(folder), EXPERTS)
    kept, before, dense = stacks(model), model(IDS).logits, unpacked(folder).state_dict()
    for options in ({}, {"requantize": True}):
        with pytest.raises(li.LayerError, match=r"quantized.*Write plain floats"):
            li.merge(model, **options)
    sent = dict(li.merged_weights(model, dequantize="float32"))
    sites = li.adapter_state(model).sites
    li.merge(model, dequantize="float32")
    assert sent.keys() == dense.keys()
    for name, site in sites.items():
        merged = model.get_parameter(name)
        assert type(merged) is torch.nn.Parameter
        assert error(merged, dense[name].double() + dense_delta(site.spec, site.A, site.B)) < 1e-6
        assert torch.equal(sent[name], merged)
    assert error(model(IDS).logits, before.double()) < 1e-5
    li.unmerge(model)
    assert {k: id(s) for k, s in stacks(model).items()} == {k: id(s) for k, s in kept.items()}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"targets": EXPERTS, "init": "pissa"}, "pissa"),
        ({"targets": EXPERTS, "compute": "float32"}, "Use compute: base"),
        ({"targets": ["q_proj"], "train": EXPERTS[:1]}, "quantized"),
    ],
)
def test_what_would_need_the_whole_stack_is_refused(folder: Path, options: Any, words: str) -> None:
    with pytest.raises(li.LayerError, match=words):
        li.inject(load(folder, torch.bfloat16), {"rank": 2, **options})


def test_a_state_dict_holds_codes_and_loads_into_packed_experts_only(folder: Path) -> None:
    model, other = load(folder), load(folder)
    for stack in stacks(other).values():
        stack.codes.zero_()
    other.load_state_dict(model.state_dict())
    for key, stack in stacks(other).items():
        assert torch.equal(stack.codes, stacks(model)[key].codes)
    with pytest.raises(RuntimeError, match="values are packed"):
        other.load_state_dict(unpacked(folder).state_dict())
