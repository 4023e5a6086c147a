"""What a saved folder says of the model that it came from, as the libraries that open it use it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fill
from helpers.models import denoised, tiny_unet
from torch import Tensor, nn

import lora_inject as li

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")


SIZES = {"vocab_size": 30, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}


def saved_base(name: str, path: Path, **options: Any) -> nn.Module:
    """A base as users have it: from files, so that its config knows where it is from."""
    family = name.partition("For")[0]
    sizes = SIZES | (HEADS if family != "Bert" else {"num_attention_heads": 2}) | options
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes, pad_token_id=0)
    cls = getattr(transformers, name)
    cls(config).save_pretrained(path)
    return cls.from_pretrained(path).eval()  # type: ignore[no-any-return]


def adapted(model: nn.Module, targets: list[str], **config: Any) -> nn.Module:
    li.inject(model, {"rank": 2, "alpha": 6, "targets": targets, **config})
    torch.manual_seed(1)
    return fill(model, std=0.3)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(1, 7)[None]).logits  # type: ignore[no-any-return]


def config_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "adapter_config.json").read_text())  # type: ignore[no-any-return]


def test_transformers_finds_the_base_of_a_saved_adapter(tmp_path: Path) -> None:
    base = saved_base("LlamaForCausalLM", tmp_path / "base")
    due = logits(adapted(base, ["q_proj", "down_proj"]))
    path = li.save_adapter(base, tmp_path / "adapter")
    said = config_of(path)
    assert said["base_model_name_or_path"] == str(tmp_path / "base")
    assert said["task_type"] == "CAUSAL_LM"
    assert f"base_model: {tmp_path / 'base'}" in (path / "README.md").read_text()
    for opened in (
        transformers.AutoModelForCausalLM.from_pretrained(path),
        peft.AutoPeftModelForCausalLM.from_pretrained(path),
    ):
        assert float((logits(opened) - due).abs().max()) < 1e-6


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
    due = logits(adapted(base, ["q_proj" if "Llama" in name else "query"], train=head))
    path = li.save_adapter(base, tmp_path / "adapter")
    assert config_of(path)["task_type"] == (task if train_head else None)
    plain = type(base).from_pretrained(tmp_path / "base")
    wrapped = peft.PeftModel.from_pretrained(plain, path)
    assert float((logits(wrapped) - due).abs().max()) < 1e-6


def test_what_the_caller_says_of_the_base_stands(tmp_path: Path) -> None:
    base = adapted(saved_base("LlamaForCausalLM", tmp_path / "base"), ["q_proj"])
    path = li.save_adapter(base, tmp_path / "a", base_model="org/name", task_type=None)
    said = config_of(path)
    assert (said["base_model_name_or_path"], said["task_type"]) == ("org/name", None)


def test_a_model_of_ones_own_has_no_base_to_name(tmp_path: Path) -> None:
    model = adapted(nn.Sequential(nn.Linear(4, 4)), ["0"])
    said = config_of(li.save_adapter(model, tmp_path / "a"))
    assert (said["base_model_name_or_path"], said["task_type"]) == (None, None)


def test_the_header_holds_the_config_where_diffusers_looks_for_it(tmp_path: Path) -> None:
    """`load_lora_adapter(prefix="base_model.model")` strips the prefix and makes a LoraConfig."""
    from safetensors import safe_open

    model = adapted(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), ["0", "1"])
    path = li.save_adapter(model, tmp_path / "a")
    with safe_open(path / "adapter_model.safetensors", "pt") as file:
        said = json.loads(file.metadata()["lora_adapter_metadata"])
    fields = {key.removeprefix("base_model.model."): value for key, value in said.items()}
    config = peft.LoraConfig(**fields)
    assert (config.r, config.lora_alpha, config.target_modules) == (2, 6, {"0", "1"})


def test_diffusers_reads_the_same_alpha(tmp_path: Path) -> None:
    model = adapted(tiny_unet(), ["to_q", "to_v", "conv1"])
    path = li.save_adapter(model, tmp_path / "a")
    theirs = tiny_unet()
    theirs.load_lora_adapter(
        str(path), prefix="base_model.model", weight_name="adapter_model.safetensors"
    )
    assert float((denoised(theirs) - denoised(model)).abs().max()) < 1e-5
