"""Training: what is saved is what has trained, whatever trains beside it, and for every run."""

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.trainer
from conftest import fill
from helpers.reference import IDS, llama, random
from helpers.refusals import refused
from helpers.training import injected, trainer
from torch import Tensor, nn
from transformers import ContinuousBatchingConfig, GenerationConfig, TrainerCallback

import lora_inject as li

CONFIG = {"rank": 2, "alpha": 3.0, "targets": ["0"]}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What Trainer warns of."""
    words: list[str] = []
    monkeypatch.setattr(transformers.trainer.logger, "warning", lambda text, *_: words.append(text))
    return words


def test_no_run_of_two_trainers_says_that_the_base_is_missing(tmp_path, told) -> None:
    shared = li.AdapterCheckpoint()
    first = trainer(tmp_path / "1", injected(), checkpoint=shared)
    second = trainer(tmp_path / "2", injected(), checkpoint=shared)
    for made in (first, second):
        made.train()
    told.clear()
    for made in (first, second, first):
        made.train(resume_from_checkpoint=True)
    assert not [words for words in told if "missing keys" in words]


class Unfreeze(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        if state.global_step == 1:
            model.lm_head.weight.requires_grad_(True)


def test_what_begins_to_train_in_a_run_is_refused_before_it_is_left_out(tmp_path: Path) -> None:
    made = trainer(tmp_path, injected(), Unfreeze())
    with refused(li.StateError, "lm_head.weight", "train"):
        made.train()
    assert not (tmp_path / "checkpoint-2" / "adapter_config.json").exists()


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
    model = fill(li.inject(llama(), {"rank": 2, "targets": ["q_proj"]}))
    model(IDS)
    model.lm_head.weight.requires_grad_(True)
    with refused(li.StateError, "lm_head.weight", "train", model=model):
        SAVES[how](model, tmp_path)
    assert not list(tmp_path.iterdir())
    model.lm_head.weight.requires_grad_(False)
    SAVES[how](model, tmp_path)


class Parts(nn.Module):
    """Gives its layer, which an adapter is on, away in containers of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4).double()])

    @property
    def in_a_list(self) -> list[nn.Module]:
        return [self.layers[0]]

    @property
    def in_a_dict(self) -> dict[str, tuple[nn.Module]]:
        return {"only": (self.layers[0],)}

    @property
    def in_a_partial(self) -> Any:
        return functools.partial(self.forward)

    def both(self) -> tuple[nn.Module, int]:
        return self.layers[0], 1

    def one_by_one(self, inputs: Tensor) -> Iterator[Tensor]:
        yield self(inputs)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers[0](inputs)


WAYS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a list": lambda model, x: model.in_a_list[0](x),
    "a tuple in a dict": lambda model, x: model.in_a_dict["only"][0](x),
    "a partial": lambda model, x: model.in_a_partial(x),
    "a method that returns several": lambda model, x: model.both()[0](x),
    "an index of a ModuleList": lambda model, x: model.layers[0](x),
    "a loop over a ModuleList": lambda model, x: next(layer(x) for layer in model.layers),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_parts_of_a_reference_compute_without_adapters(way: str) -> None:
    model, x = Parts(), random(2, 4)
    plain = model(x)
    fill(li.inject(model, CONFIG))
    assert not torch.equal(WAYS[way](model, x), plain)
    assert torch.equal(WAYS[way](li.reference(model), x), plain)


def test_a_reference_refuses_a_method_that_computes_later() -> None:
    model = li.inject(Parts(), CONFIG)
    with refused(li.StateError, "reference", "one_by_one", "disabled"):
        li.reference(model).one_by_one(random(2, 4))


@pytest.mark.parametrize("context", [li.disabled, lambda model: li.routed(model, ["default"] * 2)])
def test_generation_in_a_thread_of_its_own_does_not_forget_the_context(context: Any) -> None:
    model = fill(li.inject(llama().float(), {"rank": 2, "targets": ["q_proj"]}))
    config = GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=0, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=16)  # else most of the memory

    def generate() -> dict[str, Any]:
        return model.generate_batch([[1, 2, 3], [4, 5]], config, small)

    with context(model), refused(li.StateError, "activate"):
        generate()
    assert len(generate()) == 2
    plain = copy.deepcopy(model)
    assert "init_continuous_batching" not in li.eject(plain).__dict__
