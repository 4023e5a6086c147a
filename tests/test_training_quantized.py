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
from training_models import as_peft, curve, rows
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

import lora_inject as li

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("bitsandbytes")
TARGETS = ["q_proj", "v_proj"]
CONFIG = {"rank": 2, "alpha": 4, "targets": TARGETS}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FORMATS = {"nf4": NF4 | {"bnb_4bit_use_double_quant": True}, "int8": {"load_in_8bit": True}}


def llama_folder(out: Path) -> Path:
    """As large as bitsandbytes' kernels for CPUs take."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 2}
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


# PEFT's DoRA on int8 loses the scales of a weight on a CPU (`dequantize_module_weight`).
@pytest.mark.parametrize(("form", "variant"), [("nf4", "lora"), ("nf4", "dora"), ("int8", "lora")])
def test_trainer_trains_saves_and_loads_on_a_quantized_base(form, variant, tmp_path) -> None:
    folder = llama_folder(tmp_path / "llama")
    model = quantized(folder, form)
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(tmp_path, model)
    li.inject(model, CONFIG | {"variant": variant})
    ours = trainer(tmp_path, model)
    start = {k: p.detach().clone() for k, p in li.adapter_parameters(model).items()}
    ours.train()
    losses = [loss for _, _, loss in curve(ours.state.log_history)]

    peft = as_peft(quantized(folder, form), start, use_dora=variant == "dora")
    theirs = trainer(tmp_path, peft)
    theirs.train()
    wanted = [loss for _, _, loss in curve(theirs.state.log_history)]
    assert len(losses) == 3
    assert losses == pytest.approx(wanted, rel=1e-4)

    ids = torch.arange(9)[None]
    with torch.no_grad():
        served = model.eval()(ids).logits
    ours.save_model(tmp_path / "saved")
    again = li.load_adapter(quantized(folder, form), tmp_path / "saved")
    li.train_only(again, "default")  # else bitsandbytes serves by another kernel on a CPU
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, served)
    # and PEFT's file here, ours in PEFT
    theirs.save_model(tmp_path / "theirs")
    loaded = PeftModel.from_pretrained(quantized(folder, form), tmp_path / "saved")
    for one, other in (
        (li.load_adapter(quantized(folder, form), tmp_path / "theirs"), peft),
        (loaded, model),
    ):
        outputs = [each.train()(ids).logits for each in (one, other)]
        assert float((outputs[0] - outputs[1]).abs().max()) < 1e-4
    model.eval()
    merge_and_serve(again, served, tmp_path / "merged")
    li.eject(model)
    assert "_hf_peft_config_loaded" not in vars(model)
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(tmp_path, model)


def merge_and_serve(model: Any, served: torch.Tensor, folder: Path) -> None:
    """Merged into plain floats, the model is saved and loads as one that never was quantized."""
    config = model.config.quantization_config
    li.merge(model, dequantize="float32")
    assert not hasattr(model.config, "quantization_config")
    li.unmerge(model)
    assert model.config.quantization_config is config
    assert model.is_quantized
    requantized_and_saved(copy.deepcopy(model), folder / "again")
    li.merge(model, dequantize="float32", eject=True)
    model.save_pretrained(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert not getattr(plain, "is_quantized", False)
    with torch.no_grad():
        logits = plain(torch.arange(9)[None]).logits
    # bitsandbytes computes NF4 in bfloat16 when it serves, and int8 with activations in int8.
    assert float((logits - served).abs().max() / served.abs().max()) < 0.02


def requantized_and_saved(model: Any, folder: Path) -> None:
    """Quantized again in its own format, the merged model is saved and loads as it was."""
    ids = torch.arange(9)[None]
    li.merge(model, requantize=True, eject=True)
    with torch.no_grad():
        wanted = model.eval()(ids).logits
        model.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").eval()
        assert loaded.is_quantized
        # bitsandbytes rounds scales again when it saves a model that has served on this CPU.
        torch.testing.assert_close(loaded(ids).logits, wanted, rtol=0.01, atol=0.01)


def test_checkpointed_layers_of_a_quantized_base_train(tmp_path: Path) -> None:
    """Trainer turns on gradients of the inputs for whoever says that it has adapters."""
    model = quantized(llama_folder(tmp_path / "llama"), "nf4")
    fill(li.inject(model, CONFIG), std=0.02)
    how = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    before = {k: p.detach().clone() for k, p in li.adapter_parameters(model).items()}
    trainer(tmp_path, model, max_steps=1, **how).train()
    for key, parameter in li.adapter_parameters(model).items():
        assert not torch.equal(parameter, before[key]), key


def test_a_flag_of_somebody_else_stays(tmp_path: Path) -> None:
    model = quantized(llama_folder(tmp_path / "llama"), "nf4")
    model._hf_peft_config_loaded = True
    li.eject(li.inject(model, CONFIG))
    assert model._hf_peft_config_loaded is True


def test_unpacking_a_base_would_drop_its_adapters_and_is_refused(tmp_path: Path) -> None:
    model = quantized(llama_folder(tmp_path / "llama"), "nf4")
    before = model.dequantize
    li.inject(model, CONFIG)
    with pytest.raises(li.LayerError, match=r"adapters would be gone\. Call merge\(") as raised:
        model.dequantize()
    remedy = re.search(r"merge\(.*?\)", str(raised.value))
    assert remedy is not None
    eval(remedy[0], {"merge": li.merge, "model": model})
    li.eject(li.unmerge(model))
    assert model.dequantize == before
