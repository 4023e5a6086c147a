"""`save_pretrained` of an adapted model writes its adapters; Trainer's, in test_publishing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import COPIES, fill, same_bits
from helpers.models import tiny_llama

import lora_inject as li

transformers = pytest.importorskip("transformers")
CONFIG = {"rank": 2, "alpha": 3, "targets": ["q_proj", "down_proj"]}


def base() -> Any:
    return tiny_llama(num_hidden_layers=1).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(6).view(1, 6)).logits


def adapted() -> Any:
    return fill(li.inject(base(), CONFIG))


def assert_loads(path: Path, model: Any) -> None:
    assert same_bits(logits(li.load_adapter(base(), path)), logits(model))


@pytest.mark.parametrize("again", [lambda m: m, *COPIES.values()], ids=["itself", *COPIES])
def test_it_writes_the_adapter_which_loads_onto_the_base(again: Any, tmp_path: Path) -> None:
    model = again(adapted())
    model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert_loads(tmp_path, model)


def test_a_part_with_save_pretrained_writes_what_it_carries(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"lm": base()})
    fill(li.inject(model, CONFIG))
    model["lm"].save_pretrained(tmp_path)
    assert_loads(tmp_path, model["lm"])


def test_several_adapters_are_laid_out_as_by_peft(tmp_path: Path) -> None:
    model = adapted()
    fill(li.inject(model, CONFIG, "other"), "other")
    others = {"tokenizer.json": "{}", "README.md": "# Mine"}
    for name, text in others.items():
        (tmp_path / name).write_text(text)
    for _ in range(2):
        model.save_pretrained(tmp_path)
    assert all((tmp_path / name).read_text() == text for name, text in others.items())
    assert_loads(tmp_path / "other", model)
    assert_loads(tmp_path, li.activate(model, "default"))


def test_a_merged_model_says_how_it_is_written(tmp_path: Path) -> None:
    model = adapted()
    wanted = logits(model)
    li.merge(model)
    with pytest.raises(li.StateError, match=r"merged into the weights\. Call eject\(model\)"):
        model.save_pretrained(tmp_path / "a")
    li.eject(model).save_pretrained(tmp_path / "b")
    read = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "b").eval()
    assert torch.allclose(logits(read), wanted, atol=1e-5)


def test_eject_gives_the_method_back_and_what_it_cannot_do_is_refused(tmp_path: Path) -> None:
    model = adapted()
    with pytest.raises(li.StateError, match=r"Call model\.push_to_hub"):
        model.save_pretrained(tmp_path, push_to_hub=True)
    li.inject(model, CONFIG, "other")
    li.eject(model, "other")
    assert "save_pretrained" in model.__dict__
    li.eject(model)
    assert "save_pretrained" not in model.__dict__
    with pytest.raises(li.StateError, match=r"no longer in memory\. Keep it in a variable"):
        adapted().save_pretrained(tmp_path)
