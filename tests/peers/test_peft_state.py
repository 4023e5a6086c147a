"""What PEFT, transformers and diffusers make of what they are handed: a folder, or tensors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import error, fill
from helpers.faults import content
from helpers.models import IDS, denoised, tiny_llama, tiny_unet
from helpers.reference import logits
from helpers.refusals import refused
from helpers.states import metadata
from safetensors.torch import load_file
from torch import nn

import lora_inject as li

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")

# ------------------------------------------------------------------------------ tensors in memory

TARGETS = [{"match": "q_proj", "rank": 4}, {"match": "down_proj", "alpha": 3}, "o_proj"]
CONFIG = {"rank": 2, "alpha": 6, "targets": TARGETS}
DORA = {"rank": 2, "variant": "dora", "targets": ["q_proj"], "train": ["lm_head"]}


def adapted(config: dict[str, Any] = CONFIG) -> Any:
    return fill(li.inject(tiny_llama(), config)).eval()


@pytest.mark.parametrize("given", [CONFIG, DORA], ids=["ranks and alphas", "DoRA and a head"])
def test_it_is_what_peft_has_in_memory(given: dict[str, Any]) -> None:
    model = adapted(given)
    tensors, config = li.peft_state(model)
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**config)).eval()
    assert not peft.set_peft_model_state_dict(theirs, tensors).unexpected_keys
    with torch.no_grad():
        assert error(theirs(IDS).logits, model(IDS).logits) < 1e-5
    wanted = peft.get_peft_model_state_dict(theirs)
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[key], tensor) for key, tensor in wanted.items())


@pytest.mark.parametrize("portable", [False, True])
def test_it_is_what_a_file_has(portable: bool, tmp_path: Path) -> None:
    model = adapted()
    tensors, config = li.peft_state(model, portable=portable)
    folder = li.save_adapter(model, tmp_path / "a", format="portable" if portable else "peft")
    wanted = load_file(folder / "adapter_model.safetensors")
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[key], wanted[key]) for key in wanted)
    assert config == config_of(folder)


def test_its_tensors_are_the_receivers_own_in_the_dtype_and_on_the_device_asked_for() -> None:
    model = adapted().bfloat16()
    tensors, _ = li.peft_state(model)
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in tensors.values())
    half, _ = li.peft_state(model, dtype=torch.bfloat16, device="cpu")
    assert all(torch.equal(half[key], tensors[key].bfloat16()) for key in tensors)
    there, _ = li.peft_state(model, device="meta")
    assert {tensor.device.type for tensor in there.values()} == {"meta"}
    fill(model)
    assert all(torch.equal(tensors[key], before[key]) for key in before)


MISREAD: dict[str, tuple[float | None, dict[str, Any], list[str]]] = {
    "integers": (None, {"dtype": torch.int8}, ["dtype", "torch.int8"]),
    "beyond float16": (1e6, {"dtype": torch.float16}, ["q_proj.lora_A.weight'", "torch.float16"]),
    "NaN": (float("nan"), {}, ["q_proj'", "NaN"]),
}


@pytest.mark.parametrize("case", MISREAD)
def test_what_a_receiver_would_misread_is_refused(case: str) -> None:
    value, options, named = MISREAD[case]
    model = adapted()
    if value is not None:
        A = li.adapter_parameters(model)["model.layers.0.self_attn.q_proj.lora_A"]
        torch.nn.init.constant_(A, value)
    with refused(li.LoraInjectError, *named, model=model):
        li.peft_state(model, **options)


def test_an_adapter_that_is_merged_is_not_handed_on() -> None:
    model = adapted()
    li.merge(model)
    with refused(li.StateError, "merged", model=model):
        li.peft_state(model)


# ----------------------------------------------------------------------------------------- a folder

SIZES = {"vocab_size": 30, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "pad_token_id": 0}


def saved_base(name: str, path: Path) -> nn.Module:
    """A base as users have it: from files, so that its config knows where it is from."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    cls(cls.config_class(**SIZES)).save_pretrained(path)
    return cls.from_pretrained(path).eval()  # type: ignore[no-any-return]


def with_adapter(model: nn.Module, targets: list[str], **config: Any) -> nn.Module:
    return fill(li.inject(model, {"rank": 2, "alpha": 6, "targets": targets, **config}), std=0.3)


def config_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "adapter_config.json").read_text())  # type: ignore[no-any-return]


def test_transformers_and_peft_find_the_base_of_a_saved_adapter(tmp_path: Path) -> None:
    base = saved_base("LlamaForCausalLM", tmp_path / "base")
    due = logits(with_adapter(base, ["q_proj", "down_proj"]))
    path = li.save_adapter(base, tmp_path / "adapter")
    told = config_of(path)
    assert told["base_model_name_or_path"] == str(tmp_path / "base")
    assert told["task_type"] == "CAUSAL_LM"
    assert f"base_model: {tmp_path / 'base'}" in (path / "README.md").read_text()
    for opened in (
        transformers.AutoModelForCausalLM.from_pretrained(path),
        peft.AutoPeftModelForCausalLM.from_pretrained(path),
    ):
        assert error(logits(opened), due) < 5e-6
    told = config_of(li.save_adapter(base, tmp_path / "b", base_model="org/name", task_type=None))
    assert (told["base_model_name_or_path"], told["task_type"]) == ("org/name", None)
    own = with_adapter(nn.Sequential(nn.Linear(4, 4)), ["0"])
    told = config_of(li.save_adapter(own, tmp_path / "own"))
    assert (told["base_model_name_or_path"], told["task_type"]) == (None, None)


@pytest.mark.parametrize("name", ["..", "a\0b", "\ud800", "line\nbreak"])
def test_save_pretrained_writes_no_adapter_outside_of_its_folder(name: str, tmp_path: Path) -> None:
    model = with_adapter(tiny_llama(), ["q_proj"])
    li.save_adapter(model, tmp_path)
    before = content(tmp_path)
    li.inject(model, {"rank": 2, "targets": ["v_proj"]}, name)
    with refused(li.StateError, repr(name), "save_adapter", model=model):
        model.save_pretrained(tmp_path / "inside")
    assert content(tmp_path) == before


SAVES: dict[str, Callable[[Any, Path], Any]] = {
    "native": lambda model, path: li.save_adapter(model, path / "a.safetensors", format="native"),
    "PEFT": lambda model, path: li.save_adapter(model, path / "a"),
    "save_pretrained": lambda model, path: model.save_pretrained(path / "a"),
    "a server": lambda model, path: li.peft_state(model, "default"),
}


@pytest.mark.parametrize("how", SAVES)
def test_a_head_that_trains_beside_the_adapter_is_not_left_out_of_its_file(
    how: str, tmp_path: Path
) -> None:
    model = adapted()
    model(IDS)
    model.lm_head.weight.requires_grad_(True)
    with refused(li.StateError, "lm_head.weight", "train", model=model):
        SAVES[how](model, tmp_path)
    assert not list(tmp_path.iterdir())
    model.lm_head.weight.requires_grad_(False)
    SAVES[how](model, tmp_path)


def test_what_the_system_says_of_a_folder_is_an_error_of_ours(tmp_path: Path) -> None:
    model = with_adapter(tiny_llama(), ["q_proj"])
    (tmp_path / "file").write_text("a file")
    with refused(li.FormatError, "file", model=model):
        model.save_pretrained(tmp_path / "file" / "below")
    li.inject(model, {"rank": 2, "targets": ["v_proj"]}, "n" * 300)
    with refused(li.FormatError, "n" * 300, model=model):
        model.save_pretrained(tmp_path / "long")


def test_an_adapter_is_not_counted_twice_by_the_methods_of_transformers(tmp_path: Path) -> None:
    model = with_adapter(tiny_llama().eval(), ["q_proj"])
    path = li.save_adapter(model, tmp_path / "a")
    wanted = logits(model)
    for method in (model.load_adapter, model.model.load_adapter):
        with refused(li.StateError, "lora_inject.load_adapter", model=model):
            method(str(path))
    for method in (model.disable_adapters, model.enable_adapters, model.set_adapter):
        with refused(li.StateError, "lora_inject.", model=model):
            method("default")
    li.eject(model).load_adapter(str(path))  # as before
    assert error(logits(model), wanted) < 1e-6


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("LlamaForSequenceClassification", "SEQ_CLS"),
        ("BertForSequenceClassification", "SEQ_CLS"),
        ("BertForTokenClassification", "TOKEN_CLS"),
        ("BertForMaskedLM", None),
    ],
)
@pytest.mark.parametrize("train_head", [True, False])
def test_the_task_changes_no_output_in_peft(name, task, train_head, tmp_path) -> None:
    """PEFT looks for the heads of classification tasks in every file of theirs."""
    base = saved_base(name, tmp_path / "base")
    head = [r"(score|classifier)\..*"] if train_head and task else []
    due = logits(with_adapter(base, ["q_proj" if "Llama" in name else "query"], train=head))
    path = li.save_adapter(base, tmp_path / "adapter")
    assert config_of(path)["task_type"] == (task if train_head else None)
    wrapped = peft.PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), path)
    assert error(logits(wrapped), due) < 5e-6


def test_the_header_holds_the_config_where_diffusers_looks_for_it(tmp_path: Path) -> None:
    """`load_lora_adapter(prefix="base_model.model")` strips the prefix and makes a LoraConfig."""
    model = with_adapter(tiny_unet(), ["to_q", "to_v", "conv1"])
    path = li.save_adapter(model, tmp_path / "a")
    name = "adapter_model.safetensors"
    told = json.loads(metadata(path / name)["lora_adapter_metadata"])
    assert (told["base_model.model.r"], told["base_model.model.lora_alpha"]) == (2, 6)
    theirs = tiny_unet()
    theirs.load_lora_adapter(str(path), prefix="base_model.model", weight_name=name)
    assert error(denoised(theirs), denoised(model)) < 8e-6
