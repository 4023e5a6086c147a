"""An adapter in memory as PEFT has it, against PEFT itself and against the file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import error, fill
from helpers.models import IDS, tiny_llama
from safetensors.torch import load_file
from torch import nn

import lora_inject as li

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")

CONFIG = {
    "rank": 2,
    "alpha": 6,
    "targets": [{"match": "q_proj", "rank": 4}, {"match": "down_proj", "alpha": 3}, "o_proj"],
}


def adapted(config: dict[str, Any] = CONFIG, **changes: Any) -> Any:
    return fill(li.inject(tiny_llama(**changes), config))


def of_peft(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
    """PEFT's model of a config and tensors in memory."""
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**config))
    missed = peft.set_peft_model_state_dict(model, tensors)
    assert not missed.unexpected_keys
    return model.eval()


def test_it_is_what_peft_has_in_memory() -> None:
    model = adapted().eval()
    tensors, config = li.peft_state(model)
    theirs = of_peft(config, tensors)
    with torch.no_grad():
        assert error(theirs(IDS).logits, model(IDS).logits) < 1e-5
    wanted = peft.get_peft_model_state_dict(theirs)
    assert tensors.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(tensors[key], tensor)
    stated = theirs.peft_config["default"]
    for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"):
        assert config[key] == getattr(stated, key)
    assert set(config["target_modules"]) == set(stated.target_modules)


@pytest.mark.parametrize("portable", [False, True])
def test_it_is_what_a_file_has(portable: bool, tmp_path: Path) -> None:
    model = adapted()
    tensors, config = li.peft_state(model, portable=portable)
    folder = li.save_adapter(model, tmp_path / "a", format="portable" if portable else "peft")
    wanted = load_file(folder / "adapter_model.safetensors")
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[key], wanted[key]) for key in wanted)
    assert config == json.loads((folder / "adapter_config.json").read_text())
    if portable:
        assert config["r"] == config["lora_alpha"] == 4
        assert not config["rank_pattern"]
        assert not config["alpha_pattern"]


def test_its_tensors_are_the_receivers_own() -> None:
    model = adapted()
    tensors, _ = li.peft_state(model)
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in tensors.values())
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    fill(model)
    assert all(torch.equal(tensors[key], before[key]) for key in before)


def test_its_dtype_and_device_are_those_asked_for() -> None:
    model = adapted().bfloat16()
    assert {t.dtype for t in li.peft_state(model)[0].values()} == {torch.float32}
    full, _ = li.peft_state(model, portable=True)
    half, _ = li.peft_state(model, portable=True, dtype=torch.bfloat16, device="cpu")
    assert all(torch.equal(half[key], full[key].bfloat16()) for key in full)
    there = li.peft_state(model, device="meta")[0]
    assert {tensor.device.type for tensor in there.values()} == {"meta"}


def test_dora_and_trained_tensors_come_along() -> None:
    config = {"rank": 2, "variant": "dora", "targets": ["q_proj"], "train": ["lm_head"]}
    model = adapted(config).eval()
    theirs = of_peft(*reversed(li.peft_state(model)))
    with torch.no_grad():
        assert error(theirs(IDS).logits, model(IDS).logits) < 1e-5


def refused(run: Any) -> str:
    with pytest.raises(li.LoraInjectError) as raised:
        run()
    return f"{type(raised.value).__name__}: {raised.value}"


def test_what_a_receiver_would_misread_is_refused() -> None:
    model = adapted()
    assert "the model's adapters are: 'default'" in refused(lambda: li.peft_state(model, "other"))
    asked = "FormatError: peft_state of 'default', dtype: it is "
    assert refused(lambda: li.peft_state(model, dtype=torch.int8)) == (  # type: ignore[arg-type]
        f"{asked}torch.int8. Give a floating point dtype."
    )
    assert refused(lambda: li.peft_state(model, dtype="bf16")).startswith(  # type: ignore[arg-type]
        f"{asked}a str"
    )
    with torch.no_grad():
        li.adapter_parameters(model)["model.layers.0.self_attn.q_proj.lora_A"].fill_(1e6)
    said = refused(lambda: li.peft_state(model, dtype=torch.float16))
    assert "q_proj.lora_A.weight': its values are not finite in torch.float16" in said
    with torch.no_grad():
        li.adapter_parameters(model)["model.layers.0.self_attn.q_proj.lora_A"].fill_(float("nan"))
    assert "NaN or infinite" in refused(lambda: li.peft_state(model))
    whole = fill(li.inject(nn.Sequential(nn.Linear(4, 4)), {"rank": 2, "targets": ["0"]}))
    li.merge(whole)
    assert "merged" in refused(lambda: li.peft_state(whole))


def test_a_device_that_is_none_is_refused_in_words() -> None:
    model = li.inject(nn.Sequential(nn.Linear(4, 4)), {"targets": ["0"]})
    with pytest.raises(li.FormatError, match=r"device 'gpu'.*Give one, such as 'cpu'"):
        li.peft_state(model, device="gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device")
def test_a_device_that_is_not_there_is_refused_in_words() -> None:
    model = li.inject(nn.Sequential(nn.Linear(4, 4)), {"targets": ["0"]})
    fill(model)
    with pytest.raises(li.FormatError, match=r"device 'cuda'.*Give one, such as 'cpu'"):
        li.peft_state(model, device="cuda")
