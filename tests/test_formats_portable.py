"""`portable`: a PEFT folder that even those who read one rank and no alpha apply right."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapter_states import KIND_SPECS, effect, make_site, make_state
from helpers.reference import IDS, adapted, llama, logits
from safetensors.torch import load_file

import lora_inject as li
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.errors import FormatError
from lora_inject.formats import losses_of, read_adapter, write_adapter

MODEL = "adapter_model.safetensors"


def test_a_reader_of_one_rank_and_no_alpha_computes_the_same(tmp_path: Path) -> None:
    state = make_state(
        *(KIND_SPECS[k] for k in ("linear", "slices", "conv1d", "conv")), derived=True
    )
    path = write_adapter(state, tmp_path / "a", "portable", tensor_names=None)
    config = json.loads((path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["r"] == config["lora_alpha"] == 8
    assert not config["use_rslora"]
    assert isinstance(config["target_modules"], list)
    tensors = load_file(path / MODEL)
    for name, site in state.sites.items():
        a = tensors[f"base_model.model.{name}.lora_A.weight"].flatten(1)
        b = tensors[f"base_model.model.{name}.lora_B.weight"].flatten(1)
        assert len(a) == b.shape[1] == 8
        torch.testing.assert_close((b.double() @ a.double()), effect(site), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_peft_reads_it_with_the_same_outputs(tmp_path: Path) -> None:
    from peft import PeftModel

    plain = llama()
    model = adapted(
        plain, {"match": "q_proj", "rank": 3, "scaling": "rslora"}, "down_proj", "lm_head"
    )
    li.save_adapter(model, tmp_path / "a")
    path = li.convert(tmp_path / "a", tmp_path / "b", "portable", dtype="float64")
    theirs = PeftModel.from_pretrained(llama(), path).eval()
    torch.testing.assert_close(theirs(IDS).logits, logits(model), rtol=0, atol=1e-9)


def of_dora() -> AdapterState:
    spec = dataclasses.replace(KIND_SPECS["linear"], variant="dora")
    plain = make_site(spec)
    return AdapterState({spec.name: dataclasses.replace(plain, further={"m": torch.ones(7)})})


@pytest.mark.parametrize(
    ("state", "options", "words"),
    [
        (of_dora(), {}, "cannot hold 'm' of the variant 'dora'.*lora-inject merge"),
        (make_state(KIND_SPECS["experts"]), {}, "cannot hold a site of kind 'parameter'"),
        (
            make_state(KIND_SPECS["linear"], trained={"n": torch.ones(1)}),
            {},
            "trained tensors.*'n'",
        ),
        (AdapterState({}), {}, "no sites"),
        (make_state(KIND_SPECS["linear"]), {"rank": 1}, "rank 1 is asked for.*rank 2"),
        (make_state(KIND_SPECS["linear"]), {"dtype": "int8"}, "dtype is 'int8'.*float16"),
        (
            AdapterState({"h.0.fc": make_site(KIND_SPECS["linear"], dtype=torch.float64)}),
            {"dtype": "float16"},
            "",
        ),
    ],
)
def test_what_a_server_would_not_take_is_refused(state, options, words, tmp_path) -> None:
    if not words:  # 1e6 is no float16
        state.sites["h.0.fc"].B.mul_(1e6)
        words = "not finite in torch.float16"
    with pytest.raises(FormatError, match=words):
        write_adapter(state, tmp_path / "a", "portable", **options)
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_is_lost_in_what_it_wrote(run: Any, tmp_path: Path) -> None:
    state = make_state(KIND_SPECS["slices"], config={"rank": 2})
    write_adapter(state, tmp_path / "a", base_model="org/base", task_type="CAUSAL_LM")
    words = ("convert", tmp_path / "a", tmp_path / "b", "--to", "portable")
    done = run(*words)
    assert done.code == 0
    assert "portable: the config is left out" in done.err
    assert "slices of fused projections become pairs" in done.err
    config = json.loads((tmp_path / "b/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == ("org/base", "CAUSAL_LM")
    again = run(*words)
    assert again.code == 1
    assert "it exists already" in again.err
    assert "left out" not in again.err

    def stop(words: str) -> None:
        raise InterruptedError(words)

    with pytest.raises(InterruptedError, match="left out"):
        li.convert(tmp_path / "a", tmp_path / "c", "portable", tell=stop)
    assert (tmp_path / "c").exists()
    other = run("convert", tmp_path / "a", "c", "--to", "peft", "--dtype", "f")
    assert (other.code, "Known are float16, bfloat16" in " ".join(other.err.split())) == (2, True)
    assert effect(read_adapter(tmp_path / "b").sites["h.0.qkv"]).shape == (8, 5)


@pytest.mark.parametrize(
    ("numbers", "layout", "due"),
    [
        ([(2, 2.0), (2, 2.0)], "portable", []),
        ([(2, 4.0), (2, 4.0)], "portable", ["scales are folded into B"]),
        ([(2, 4.0), (2, 4.0)], "mlx", []),
        ([(2, 2.0), (3, 3.0)], "portable", ["ranks are padded with zeros"]),
        ([(2, 2.0), (3, 3.0)], "gguf", []),
        ([(2, 4.0), (3, 3.0)], "mlx", ["scales are folded into B", "ranks are padded with zeros"]),
        ([(2, 4.0), (3, 3.0)], "kohya", []),
    ],
)
def test_only_numbers_that_change_are_said_to_change(numbers, layout, due) -> None:
    specs = [
        SiteSpec(name, "linear", 4, 6, (6, 4), rank, alpha)
        for name, (rank, alpha) in zip("ab", numbers, strict=True)
    ]
    assert losses_of(make_state(*specs), layout) == due
