"""Trainer on a quantized base: it trains the adapter as PEFT does, and saves and loads it."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fill
from helpers.models import tiny_llama
from peft import PeftModel
from torch import Tensor
from training_models import as_peft, curve, rows
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

import lora_inject as li

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("bitsandbytes")
CONFIG = {"rank": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FORMATS = {"nf4": NF4 | {"bnb_4bit_use_double_quant": True}, "int8": {"load_in_8bit": True}}
IDS = torch.arange(9)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As large as bitsandbytes' kernels for CPUs take."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 2}
    out = tmp_path_factory.mktemp("models") / "llama"
    tiny_llama(**sizes, vocab_size=103).save_pretrained(out)
    return out


def quantized(folder: Path, form: str) -> Any:
    how = BitsAndBytesConfig(**FORMATS[form])
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=how, dtype=torch.float32, device_map="cpu"
    )


def trainer(out: Path, model: Any, **changes: Any) -> Trainer:
    settings = {"max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1, "use_cpu": True}
    settings |= {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", **changes}
    return Trainer(model, TrainingArguments(str(out), **settings), train_dataset=rows(vocab=103))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(IDS).logits


# PEFT's DoRA on int8 loses the scales of a weight on a CPU (`dequantize_module_weight`).
@pytest.mark.parametrize(("form", "variant"), [("nf4", "lora"), ("nf4", "dora"), ("int8", "lora")])
def test_trainer_trains_saves_and_loads_on_a_quantized_base(
    form: str, variant: str, folder: Path, tmp_path: Path
) -> None:
    model = quantized(folder, form)
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(tmp_path, model)
    li.inject(model, CONFIG | {"variant": variant})
    ours = trainer(tmp_path, model)
    start = {k: p.detach().clone() for k, p in li.adapter_parameters(model).items()}
    peft = as_peft(quantized(folder, form), start, use_dora=variant == "dora")
    theirs = trainer(tmp_path, peft)
    losses = []
    for made, name in ((ours, "ours"), (theirs, "theirs")):
        made.train()
        made.save_model(tmp_path / name)
        losses.append([loss for _, _, loss in curve(made.state.log_history)])
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    served = logits(model)
    again = li.load_adapter(quantized(folder, form), tmp_path / "ours")
    li.train_only(again, "default")  # else bitsandbytes serves by another kernel on a CPU
    assert torch.equal(logits(again), served)
    # and PEFT's file here, ours in PEFT
    read = li.load_adapter(quantized(folder, form), tmp_path / "theirs")
    loaded = PeftModel.from_pretrained(quantized(folder, form), tmp_path / "ours")
    for one, other in ((read, peft), (loaded, model)):
        outputs = [each.train()(IDS).logits for each in (one, other)]
        assert float((outputs[0] - outputs[1]).abs().max()) < 1e-4
    check_merged(again, served, tmp_path)
    li.eject(model)
    assert "_hf_peft_config_loaded" not in vars(model)
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(tmp_path, model)


def check_merged(model: Any, served: Tensor, folder: Path) -> None:
    """Merged into floats, or quantized again, the model is saved and loads as what it is."""
    config = model.config.quantization_config
    li.merge(model, dequantize="float32")
    assert not hasattr(model.config, "quantization_config")
    li.unmerge(model)
    assert model.config.quantization_config is config
    assert model.is_quantized
    packed = copy.deepcopy(model)
    li.merge(packed, requantize=True, eject=True)
    wanted = logits(packed)
    packed.save_pretrained(folder / "packed")
    li.merge(model, dequantize="float32", eject=True)
    model.save_pretrained(folder / "floats")
    again = AutoModelForCausalLM.from_pretrained(folder / "packed", device_map="cpu")
    assert again.is_quantized
    # bitsandbytes rounds scales again when it saves a model that has served on this CPU.
    torch.testing.assert_close(logits(again), wanted, rtol=0.01, atol=0.01)
    plain = AutoModelForCausalLM.from_pretrained(folder / "floats")
    assert not getattr(plain, "is_quantized", False)
    # bitsandbytes computes NF4 in bfloat16 when it serves, and int8 with activations in int8.
    assert float((logits(plain) - served).abs().max() / served.abs().max()) < 0.02


def test_checkpointed_layers_of_a_quantized_base_train(folder: Path, tmp_path: Path) -> None:
    """Trainer turns on gradients of the inputs for whoever says that it has adapters."""
    model = fill(li.inject(quantized(folder, "nf4"), CONFIG), std=0.02)
    how = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    before = {k: p.detach().clone() for k, p in li.adapter_parameters(model).items()}
    trainer(tmp_path, model, max_steps=1, **how).train()
    for key, parameter in li.adapter_parameters(model).items():
        assert not torch.equal(parameter, before[key]), key


def test_unpacking_a_base_would_drop_its_adapters_and_is_refused(folder: Path) -> None:
    model = quantized(folder, "nf4")
    model._hf_peft_config_loaded = True  # somebody else's
    before = model.dequantize
    li.inject(model, CONFIG)
    with pytest.raises(li.LayerError, match=r"adapters would be gone\. Call merge\(") as raised:
        model.dequantize()
    remedy = re.search(r"merge\(.*?\)", str(raised.value))
    assert remedy is not None
    eval(remedy[0], {"merge": li.merge, "model": model})
    li.eject(li.unmerge(model))
    assert model.dequantize == before
    assert model._hf_peft_config_loaded is True
