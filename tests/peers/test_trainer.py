"""transformers' Trainer: checkpoints of the adapter alone, as good as not having stopped.

On a quantized base it trains the adapter as PEFT does, and saves and loads it.
"""

import copy
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fill
from helpers.models import tiny_llama
from helpers.refusals import refused
from helpers.training import (
    CONFIG,
    KillAt,
    KilledError,
    as_peft,
    curve,
    injected,
    llama,
    rows,
    trainer,
)
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers import trainer as trainers

import lora_inject as li

EVERY_EPOCH = {"save_strategy": "epoch", "eval_strategy": "epoch"}
LOADS_BEST = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
BEST = {"eval_strategy": "steps", "eval_steps": 2, **LOADS_BEST}
SCHEDULES: dict[str, dict[str, Any]] = {
    "steps": {},
    "steps with evaluation and the best at the end": BEST,
    "epochs, the best at the end": EVERY_EPOCH | LOADS_BEST,
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "bfloat16": {"bf16": True},
    "saved when best": BEST | {"save_strategy": "best"},
    "by Trainer alone": BEST | {"logging_steps": 2, "checkpoint": False},
}


class Plain(nn.Module):
    """A model of somebody's own, in which a random part has no file to come from."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(17, 8), nn.Linear(8, 17)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.embed(input_ids))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def plain(**changes: Any) -> Plain:
    return li.inject(Plain(), {"rank": 2, "alpha": 4, "targets": ["head"]} | changes)


def run(
    out: Path, model: Any, *callbacks: TrainerCallback, resume: bool = False, **changes: Any
) -> Trainer:
    made = trainer(out, model, *callbacks, **changes)
    made.train(resume_from_checkpoint=resume)
    return made


def losses(made: Trainer) -> list[tuple[int, str, float]]:
    return curve(made.state.log_history)


def check_same_run(one: Trainer, other: Trainer) -> None:
    assert losses(one) == losses(other)
    assert li.adapter_state(one.model) == li.adapter_state(other.model)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A run to its end, whose folder no test changes."""
    return run(tmp_path_factory.mktemp("whole"), injected())


@pytest.mark.parametrize("name", SCHEDULES)
def test_killed_and_resumed_equals_not_killed(name: str, tmp_path: Path) -> None:
    changes, out = SCHEDULES[name], tmp_path / "killed"
    unbroken = run(tmp_path / "whole", injected(), **changes)
    assert len(losses(unbroken)) >= 4
    with pytest.raises(KilledError):
        run(out, injected(), KillAt(5), **changes)
    resumed = run(out, injected(), resume=True, **changes)
    check_same_run(unbroken, resumed)
    assert unbroken.state.best_global_step == resumed.state.best_global_step
    assert names(tmp_path / "whole") == names(out)


@pytest.mark.parametrize("file", ["", "adapter.safetensors"], ids=["peft", "native"])
def test_checkpoints_of_a_plain_module_hold_the_adapter(file: str, tmp_path: Path) -> None:
    checkpoint, out = li.AdapterCheckpoint("native" if file else "peft"), tmp_path / "killed"
    unbroken = run(tmp_path / "whole", plain(), checkpoint=checkpoint)
    loaded = li.load_adapter(Plain(), tmp_path / "whole" / "checkpoint-6" / file)
    ids = torch.arange(17)[None]
    assert torch.equal(loaded(ids, ids)["loss"], unbroken.model(ids, ids)["loss"])
    with pytest.raises(KilledError):
        run(out, plain(), KillAt(3), checkpoint=checkpoint)
    check_same_run(unbroken, run(out, plain(), checkpoint=checkpoint, resume=True))
    with refused(li.StateError, "scale 2", "32"):
        run(out, plain(alpha=64), checkpoint=checkpoint, resume=True)


def test_it_holds_the_adapter_and_nothing_of_the_base(whole: Trainer) -> None:
    folder, model = Path(whole.args.output_dir, "checkpoint-6"), whole.model
    tensors = load_file(folder / "model.safetensors")
    ours = {k: v for k, v in model.state_dict().items() if "lora_" in k}
    assert tensors.keys() == ours.keys()
    assert all(torch.equal(tensors[key], ours[key]) for key in ours)
    n_bytes = 4 * sum(p.numel() for p in li.adapter_parameters(model).values())
    # Two copies of the adapter, two moments, and what does not grow with the model.
    assert sum(path.stat().st_size for path in folder.iterdir()) < 4 * n_bytes + 70_000


# PEFT asks the model for a property that transformers has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_others_read_it(whole: Trainer) -> None:
    folder, ids = Path(whole.args.output_dir, "checkpoint-6"), rows(1)[0]["input_ids"][None]
    wanted = whole.model.eval()(ids).logits
    assert torch.equal(li.load_adapter(llama(), folder).eval()(ids).logits, wanted)
    theirs = PeftModel.from_pretrained(llama(), folder).eval()
    torch.testing.assert_close(theirs(ids).logits, wanted)


def test_a_base_that_was_derived_from_is_restored(tmp_path: Path) -> None:
    """pissa starts from factors of W: the frozen start is a part of the checkpoint."""
    config = CONFIG | {"init": "pissa", "train": []}
    first = run(tmp_path, injected(config), max_steps=2).model.state_dict()
    again = run(tmp_path, injected(config), max_steps=2, resume=True).model.state_dict()
    assert all(torch.equal(again[key], tensor) for key, tensor in first.items())


class At(TrainerCallback):
    """Do something to the model, or ask for the end, after a step."""

    def __init__(self, do: Any) -> None:
        self.do = do

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.do(state.global_step, model, control)


def test_the_best_is_kept_and_loaded(tmp_path: Path) -> None:
    @torch.no_grad()
    def spoil(step: int, model: Any, _: Any) -> None:
        for parameter in li.adapter_parameters(model).values() if step > 4 else ():
            parameter.normal_(0, 20)

    made = run(tmp_path, injected(), At(spoil), save_total_limit=2, **BEST)
    evaluations = {step: loss for step, key, loss in losses(made) if key == "eval_loss"}
    best = min(evaluations, key=evaluations.__getitem__)
    assert best <= 4
    assert made.state.best_global_step == best
    assert names(tmp_path) == [f"checkpoint-{best}", "checkpoint-6"]
    kept, last = (
        load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in (best, 6)
    )
    held = {key: t for key, t in made.model.state_dict().items() if "lora_" in key}
    assert all(torch.equal(kept[key], tensor) for key, tensor in held.items())
    assert any(not torch.equal(last[key], kept[key]) for key in kept), "it holds the last step"
    assert made.evaluate()["eval_loss"] == pytest.approx(evaluations[best])


def test_early_stopping_by_transformers_own_callback(tmp_path: Path) -> None:
    made = run(tmp_path, injected(), EarlyStoppingCallback(1, 10.0), **BEST, save_total_limit=3)
    assert made.state.global_step == 4, "no step is better by 10: the second evaluation ends it"
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize(("last", "schedule"), [(2, EVERY_EPOCH), (3, {})], ids=["epochs", "steps"])
def test_a_stop_between_two_saves_is_saved(last: int, schedule: Any, tmp_path: Path) -> None:
    def stop(step: int, _: Any, control: Any) -> None:
        control.should_training_stop = control.should_training_stop or step == last

    unbroken = run(tmp_path / "whole", injected(), **schedule)
    run(tmp_path / "stopped", injected(), At(stop), **schedule)
    assert names(tmp_path / "stopped")[-1] == f"checkpoint-{last}"
    again = run(tmp_path / "stopped", injected(), resume=True, **schedule)
    assert again.state.global_step == 6
    # The evaluation at the stop has drawn random numbers.
    one, other = (
        [at for at in losses(each) if at[1] == "loss"][:last] for each in (unbroken, again)
    )
    assert one == other


@pytest.mark.parametrize("left", [None, b"", b'{"epoch": 1.5, "glo'])
def test_a_checkpoint_that_a_kill_left_half_written_is_not_resumed(
    left: bytes | None, whole: Trainer, tmp_path: Path
) -> None:
    with pytest.raises(KilledError):
        run(tmp_path, injected(), KillAt(5))
    half = tmp_path / "checkpoint-6"
    half.mkdir()
    (half / "adapter_model.safetensors").write_bytes(b"half")
    if left is not None:
        (half / "trainer_state.json").write_bytes(left)
    (tmp_path / "checkpoint-6.incomplete").mkdir()
    check_same_run(run(tmp_path, injected(), resume=True), whole)
    aside = tmp_path / "checkpoint-6.incomplete-2"
    assert (aside / "adapter_model.safetensors").read_bytes() == b"half", "nothing is thrown away"


def test_a_checkpoint_of_a_plain_module_without_its_adapter_is_half_written(tmp_path: Path) -> None:
    run(tmp_path, plain(), max_steps=4)
    for path in (tmp_path / "checkpoint-4").glob("adapter*"):
        path.unlink()
    trainer(tmp_path, plain(), max_steps=4)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4.incomplete"]


HALVES = {"match": "q_proj", "slices": {"a": 8, "b": 8}, "adapt": ["a"]}
SLICED = CONFIG | {"targets": [HALVES]}
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "slices": (SLICED, SLICED | {"targets": [HALVES | {"adapt": ["b"]}]}, "slices"),
    "other targets": (CONFIG, CONFIG | {"targets": ["q_proj", "up_proj"]}, "up_proj"),
}


@pytest.mark.parametrize("checkpoint", [None, False], ids=["the callback", "Trainer alone"])
@pytest.mark.parametrize("other", OTHERS)
def test_a_run_is_not_resumed_under_other_numbers(
    other: str, checkpoint: Any, tmp_path: Path
) -> None:
    config, changed, name = OTHERS[other]
    run(tmp_path, injected(config), checkpoint=checkpoint, max_steps=2)
    with refused(li.StateError, name):
        run(tmp_path, injected(changed), checkpoint=checkpoint, max_steps=4, resume=True)
    same = run(tmp_path, injected(config), checkpoint=checkpoint, max_steps=4, resume=True)
    assert same.state.global_step == 4


def of_a_folder() -> Any:
    return li.inject(plain(), {"rank": 2, "targets": [r".*head"]}, "a/b")


def with_more_that_trains() -> Any:
    model = injected()
    model.lm_head.weight.requires_grad_(True)
    return model


def idle() -> Any:
    model = injected()
    li.train_only(model, None)
    return model


# Before the first step, and not after hours at the first save.
NOT_STARTED: dict[str, tuple[Any, list[str]]] = {
    "a name that is no folder": (of_a_folder, ["'a/b'"]),
    "parameters that would not be saved": (with_more_that_trains, ["'lm_head.weight'"]),
    "no adapter": (llama, ["adapter"]),
    # Torch says it in the first backward: a tensor does not require grad.
    "merged": (lambda: merged(injected()), ["'default'", "unmerge"]),
    "nothing that trains": (idle, ["default", "train_only"]),
}


def merged(model: Any) -> Any:
    li.merge(model)
    return model


@pytest.mark.parametrize("case", NOT_STARTED)
def test_what_would_train_in_vain_is_refused_before_the_first_step(case, tmp_path: Path) -> None:
    make, names = NOT_STARTED[case]
    made = trainer(tmp_path, make())
    with refused(li.StateError, *names):
        made.train()
    assert made.state.global_step == 0
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("step", "frozen"), [(0, "nothing"), (2, "nothing"), (0, "lora_A")])
def test_a_layer_that_the_model_never_uses_is_refused(step, frozen, tmp_path: Path) -> None:
    """In the first step by the callback, and without it when Trainer saves."""
    model: Any = llama()
    model.spare = nn.Linear(16, 16)
    li.inject(model, CONFIG | {"targets": ["q_proj", "spare"]})
    for name, parameter in li.adapter_parameters(model).items():
        parameter.requires_grad_(not name.endswith(frozen))
    made = trainer(tmp_path, model, checkpoint=None if step == 0 else False)
    with refused(li.StateError, "'default'", "'spare'"):
        made.train()
    assert made.state.global_step == step
    assert not any(tmp_path.rglob("adapter*"))
    allowed = li.AdapterCheckpoint(unused=["spare"])
    run(tmp_path / "allowed", model, checkpoint=allowed, max_steps=2)
    assert (tmp_path / "allowed" / "checkpoint-2" / "adapter_model.safetensors").is_file()


def test_only_one_of_two_adapters_may_train(tmp_path: Path) -> None:
    model = li.inject(injected(), {"targets": ["o_proj"]}, "second")
    li.train_only(model, "second")
    before = {k: p.clone() for k, p in li.adapter_parameters(model, "default").items()}
    run(tmp_path, model, max_steps=2)
    after = li.adapter_parameters(model, "default")
    assert all(torch.equal(before[key], after[key]) for key in before)
    loaded = li.load_adapter(llama(), tmp_path / "checkpoint-2" / "second")
    assert li.adapters(loaded)["default"].sites.keys() == li.adapters(model)["second"].sites.keys()


def test_no_run_of_two_trainers_says_that_the_base_is_missing(tmp_path, monkeypatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(trainers.logger, "warning", lambda text, *_: told.append(text))
    shared = li.AdapterCheckpoint()
    made = [trainer(tmp_path / name, injected(), checkpoint=shared) for name in "ab"]
    for each in made:
        each.train()
    for each in (*made, made[0]):
        each.train(resume_from_checkpoint=True)
    assert not [words for words in told if "missing keys" in words]


class Unfreeze(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        if state.global_step == 1:
            model.lm_head.weight.requires_grad_(True)


def test_what_begins_to_train_in_a_run_is_refused_before_it_is_left_out(tmp_path: Path) -> None:
    with refused(li.StateError, "lm_head.weight", "train"):
        run(tmp_path, injected(), Unfreeze())
    assert not (tmp_path / "checkpoint-2" / "adapter_config.json").exists()


def test_a_checkpoint_that_lacks_a_part_of_the_base_is_still_reported(tmp_path: Path) -> None:
    model = injected()
    made = trainer(tmp_path, model)
    base = {k: t for k, t in model.state_dict().items() if "lora_" not in k}
    adapter = {k: t for k, t in model.state_dict().items() if "lora_" in k}
    assert model.load_state_dict(adapter).missing_keys == []
    base.pop("model.norm.weight")
    assert model.load_state_dict(base | adapter, strict=False).missing_keys == ["model.norm.weight"]
    taken_out = next(key for key in adapter if "lora_B" in key)
    del adapter[taken_out]
    assert model.load_state_dict(adapter, strict=False).missing_keys == [taken_out]
    del made  # with which goes what it has forgiven
    adapter = {k: t for k, t in model.state_dict().items() if "lora_" in k}
    assert model.load_state_dict(adapter, strict=False).missing_keys


# ------------------------------------------------------------------------------- quantized bases

QV = {"rank": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
FORMATS = {"nf4": NF4, "int8": {"load_in_8bit": True}}
IDS = torch.arange(9)[None]
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="pip install bitsandbytes"
)


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


def on_a_quantized_base(out: Path, model: Any, **changes: Any) -> Trainer:
    settings = {"max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1, "use_cpu": True}
    settings |= {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", **changes}
    return Trainer(model, TrainingArguments(str(out), **settings), train_dataset=rows(vocab=103))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(IDS).logits


# PEFT's DoRA on int8 loses the scales of a weight on a CPU (`dequantize_module_weight`).
@needs_bitsandbytes
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("form", "variant"), [("nf4", "lora"), ("nf4", "dora"), ("int8", "lora")])
def test_trainer_trains_saves_and_loads_on_a_quantized_base(
    form: str, variant: str, folder: Path, tmp_path: Path
) -> None:
    model = quantized(folder, form)
    with pytest.raises(ValueError, match="purely quantized"):
        on_a_quantized_base(tmp_path, model)
    li.inject(model, QV | {"variant": variant})
    ours = on_a_quantized_base(tmp_path, model)
    start = {k: p.detach().clone() for k, p in li.adapter_parameters(model).items()}
    peft = as_peft(quantized(folder, form), start, use_dora=variant == "dora")
    losses = []
    for made, name in ((ours, "ours"), (on_a_quantized_base(tmp_path, peft), "theirs")):
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
    with pytest.raises(ValueError, match="purely quantized"):
        on_a_quantized_base(tmp_path, model)


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


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore")
def test_checkpointed_layers_of_a_quantized_base_train(folder: Path, tmp_path: Path) -> None:
    """Trainer turns on gradients of the inputs for whoever says that it has adapters."""
    model = fill(li.inject(quantized(folder, "nf4"), QV), std=0.02)
    how = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    before = {k: p.detach().clone() for k, p in li.adapter_parameters(model).items()}
    on_a_quantized_base(tmp_path, model, max_steps=1, **how).train()
    for key, parameter in li.adapter_parameters(model).items():
        assert not torch.equal(parameter, before[key]), key


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore")
def test_unpacking_a_base_would_drop_its_adapters_and_is_refused(folder: Path) -> None:
    model = quantized(folder, "nf4")
    model._hf_peft_config_loaded = True  # somebody else's
    before = model.dequantize
    li.inject(model, QV)
    with refused(li.LayerError, "merge(") as raised:
        model.dequantize()
    remedy = re.search(r"merge\(.*?\)", str(raised.value))
    assert remedy is not None
    eval(remedy[0], {"merge": li.merge, "model": model})
    li.eject(li.unmerge(model))
    assert model.dequantize == before
    assert model._hf_peft_config_loaded is True
