"""Checkpoints of the adapter alone: small, whole or absent, and as good as not having stopped.

A run that ends with an exception in the middle of a step is resumed by a new Trainer on a
new model, and all that was logged must be the same, bit for bit.
"""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from training_models import (
    CONFIG,
    SIZES,
    KillAt,
    KilledError,
    curve,
    injected,
    llama,
    rows,
    trainer,
)
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer_pt_utils import safe_globals

import lora_inject as li

EVERY_EPOCH = {"save_strategy": "epoch", "eval_strategy": "epoch"}
BEST = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
}

SCHEDULES: dict[str, dict[str, Any]] = {
    "steps": {},
    "steps with evaluation and the best at the end": BEST,
    "epochs": EVERY_EPOCH,
    "epochs, the best at the end": EVERY_EPOCH
    | {"load_best_model_at_end": True, "metric_for_best_model": "loss"},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "bfloat16": {"bf16": True},
    "kept: one": BEST | {"save_total_limit": 1},
    "saved when best": BEST | {"save_strategy": "best"},
    "by Trainer alone": BEST | {"logging_steps": 2, "checkpoint": False},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer, Any]:
    """A run to its end: its folder, which no test changes, its Trainer and the model."""
    out = tmp_path_factory.mktemp("whole")
    return out, *full_run(out)


@pytest.fixture(scope="module")
def killed_at_5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("killed")
    with pytest.raises(KilledError):
        trainer(out, injected(), KillAt(5)).train()
    return out


def full_run(out: Path, **changes: Any) -> tuple[Trainer, Any]:
    model = injected()
    made = trainer(out, model, **changes)
    made.train()
    return made, model


def killed_run(out: Path, *steps: int, **changes: Any) -> tuple[Trainer, Any]:
    """Kill at each step, resuming in between, and then let it end."""
    for i, step in enumerate(steps):
        with pytest.raises(KilledError):
            trainer(out, injected(), KillAt(step), **changes).train(resume_from_checkpoint=i > 0)
    model = injected()
    made = trainer(out, model, **changes)
    made.train(resume_from_checkpoint=True)
    return made, model


@pytest.mark.parametrize("name", SCHEDULES)
def test_killed_twice_and_resumed_equals_not_killed(name: str, tmp_path: Path) -> None:
    changes = SCHEDULES[name]
    whole, model = full_run(tmp_path / "whole", **changes)
    again, model_again = killed_run(tmp_path / "killed", 4, 5, **changes)
    wanted = curve(whole.state.log_history)
    assert len(wanted) >= 4
    assert curve(again.state.log_history) == wanted
    for key, parameter in li.adapter_parameters(model).items():
        assert torch.equal(parameter, li.adapter_parameters(model_again)[key]), key
    assert whole.state.best_global_step == again.state.best_global_step
    names = [sorted(p.name for p in (tmp_path / run).iterdir()) for run in ("whole", "killed")]
    assert names[0] == names[1]


@pytest.mark.parametrize("name", ["rng_state.pth", "optimizer.pt", "model.safetensors"])
def test_the_curve_depends_on_what_is_restored(name, whole, killed_at_5, tmp_path) -> None:
    """The comparison above sees a generator, an optimizer or weights that were not restored."""
    out = shutil.copytree(killed_at_5, tmp_path / "out")
    (out / "checkpoint-4" / name).unlink()
    if name == "model.safetensors":
        (out / "checkpoint-2" / name).replace(out / "checkpoint-4" / name)
    again = trainer(out, injected())
    again.train(resume_from_checkpoint=str(out / "checkpoint-4"))
    assert curve(again.state.log_history) != curve(whole[1].state.log_history)


def test_it_holds_the_adapter_and_nothing_of_the_base(whole: Any) -> None:
    out, _, model = whole
    folder = out / "checkpoint-6"
    tensors = load_file(folder / "model.safetensors")
    ours = {k: v for k, v in model.state_dict().items() if "lora_" in k}
    assert tensors.keys() == ours.keys()
    assert all(torch.equal(tensors[key], ours[key]) for key in ours)
    n_bytes = 4 * sum(p.numel() for p in li.adapter_parameters(model).values())
    states = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    assert sum(t.numel() for s in states.values() for t in s.values()) * 4 < 2.1 * n_bytes
    # Two copies of the adapter, two moments, and what does not grow with the model.
    assert sum(path.stat().st_size for path in folder.iterdir()) < 4 * n_bytes + 70_000
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(folder / name, weights_only=True)
    with safe_globals():  # of numpy, by transformers
        torch.load(folder / "rng_state.pth", weights_only=True)
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 6


# PEFT asks the model for a property that transformers has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_others_read_it(whole: Any) -> None:
    out, _, model = whole
    ids = rows(1)[0]["input_ids"][None]
    wanted = model.eval()(ids).logits
    ours = li.load_adapter(llama(), out / "checkpoint-6")
    assert torch.equal(ours.eval()(ids).logits, wanted)
    theirs = PeftModel.from_pretrained(llama(), out / "checkpoint-6").eval()
    torch.testing.assert_close(theirs(ids).logits, wanted)


def test_in_the_native_format(tmp_path: Path) -> None:
    model = injected()
    native = li.AdapterCheckpoint(format="native")
    trainer(tmp_path, model, checkpoint=native, max_steps=2).train()
    file = tmp_path / "checkpoint-2" / "adapter.safetensors"
    ids = rows(1)[0]["input_ids"][None]
    loaded = li.load_adapter(llama(), file).eval()
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def test_a_base_that_was_derived_from_is_restored(tmp_path: Path) -> None:
    """pissa starts from factors of W: the frozen start is a part of the checkpoint."""
    config = CONFIG | {"init": "pissa", "train": []}
    model = injected(config)
    trainer(tmp_path, model, max_steps=2).train()
    assert any("A0" in key for key in load_file(tmp_path / "checkpoint-2" / "model.safetensors"))
    again = injected(config)
    trainer(tmp_path, again, max_steps=2).train(resume_from_checkpoint=True)
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


# -------------------------------------------------------------------- which are kept, which is best


def test_the_best_is_kept_and_loaded(tmp_path: Path) -> None:
    class Worsen(TrainerCallback):
        """From step 5 on the adapter is spoilt, so an early step is the best."""

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            if state.global_step > 4:
                with torch.no_grad():
                    for parameter in li.adapter_parameters(model).values():
                        parameter.normal_(0, 20)

    model = injected()
    made = trainer(tmp_path, model, Worsen(), save_total_limit=2, **BEST)
    made.train()
    evaluations = {e["step"]: e["eval_loss"] for e in made.state.log_history if "eval_loss" in e}
    best = min(evaluations, key=lambda step: evaluations[step])
    assert best <= 4
    assert made.state.best_global_step == best
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [f"checkpoint-{best}", "checkpoint-6"]
    kept = load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors")
    held = {key: t for key, t in model.state_dict().items() if "lora_" in key}
    assert all(torch.equal(kept[key], tensor) for key, tensor in held.items())
    last = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert any(not torch.equal(last[key], kept[key]) for key in kept), "it holds the last step"
    assert made.evaluate()["eval_loss"] == pytest.approx(evaluations[best])


def test_early_stopping_by_transformers_own_callback(tmp_path: Path) -> None:
    made = trainer(tmp_path, injected(), EarlyStoppingCallback(1, 10.0), **BEST, save_total_limit=3)
    made.train()
    assert made.state.global_step == 4, "no step is better by 10: the second evaluation ends it"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]


def test_a_stop_between_two_saves_is_saved(tmp_path: Path) -> None:
    class Ask(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = control.should_training_stop or state.global_step == 2

    whole, _ = full_run(tmp_path / "whole", **EVERY_EPOCH)
    stopped = trainer(tmp_path / "stopped", injected(), Ask(), **EVERY_EPOCH)
    stopped.train()
    assert [p.name for p in (tmp_path / "stopped").iterdir()] == ["checkpoint-2"]
    again = trainer(tmp_path / "stopped", injected(), **EVERY_EPOCH)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    # The evaluation at the stop has drawn random numbers.
    logs = (run.state.log_history for run in (whole, again))
    one, other = ([entry for entry in curve(log) if entry[1] == "loss"][:2] for log in logs)
    assert one == other


# ---------------------------------------------------------------------------------- whole or absent


@pytest.mark.parametrize("left", [None, b"", b'{"epoch": 1.5, "glo'])
def test_a_checkpoint_that_a_kill_left_half_written_is_not_resumed(
    left: bytes | None, whole: Any, killed_at_5: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(killed_at_5, tmp_path / "killed")
    half = out / "checkpoint-6"
    half.mkdir()
    (half / "adapter_model.safetensors").write_bytes(b"half")
    if left is not None:
        (half / "trainer_state.json").write_bytes(left)
    (out / "checkpoint-6.incomplete").mkdir()
    again = trainer(out, injected())
    again.train(resume_from_checkpoint=True)
    assert curve(again.state.log_history) == curve(whole[1].state.log_history)
    aside = out / "checkpoint-6.incomplete-2"
    assert (aside / "adapter_model.safetensors").read_bytes() == b"half", "nothing is thrown away"


# --------------------------------------------------------------------- resuming with another config

HALVES = {"match": "q_proj", "slices": {"a": 8, "b": 8}, "adapt": ["a"]}
SLICED = CONFIG | {"targets": [HALVES]}
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "alpha": (CONFIG, CONFIG | {"alpha": 64}, "scale 2 .* and 32 here"),
    "slices": (SLICED, SLICED | {"targets": [HALVES | {"adapt": ["b"]}]}, "slices"),
    "rank": (CONFIG, CONFIG | {"rank": 4, "alpha": 8}, "rank 2 .* and 4 here"),
    "other targets": (CONFIG, CONFIG | {"targets": ["q_proj", "up_proj"]}, "no such site here"),
    "more targets": (SLICED, CONFIG | {"targets": [HALVES, "k_proj"]}, "no such site there"),
}


@pytest.mark.parametrize("checkpoint", [None, False], ids=["the callback", "Trainer alone"])
@pytest.mark.parametrize("other", OTHERS)
def test_a_run_is_not_resumed_under_other_numbers(
    other: str, checkpoint: Any, tmp_path: Path
) -> None:
    config, changed, words = OTHERS[other]
    trainer(tmp_path, injected(config), checkpoint=checkpoint, max_steps=2).train()
    model = injected(changed)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    again = trainer(tmp_path, model, checkpoint=checkpoint, max_steps=4)
    with pytest.raises(li.StateError, match=words):
        again.train(resume_from_checkpoint=True)
    assert all(torch.equal(p, before[key]) for key, p in model.named_parameters())
    same = trainer(tmp_path, injected(config), checkpoint=checkpoint, max_steps=4)
    same.train(resume_from_checkpoint=True)
    assert same.state.global_step == 4


# ---------------------------------------------------------------------- a model of somebody's own


class Plain(torch.nn.Module):
    """A model of somebody's own, in which a random part has no file to come from."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = torch.nn.Embedding(17, 8), torch.nn.Linear(8, 17)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.embed(input_ids))
        return {"loss": torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def plain(**changes: Any) -> Plain:
    return li.inject(Plain(), {"rank": 2, "alpha": 4, "targets": ["head"]} | changes)


@pytest.mark.parametrize("file", ["", "adapter.safetensors"])
def test_checkpoints_of_a_plain_module_hold_the_adapter(file: str, tmp_path: Path) -> None:
    def run(out: Path, model: Plain, *callbacks: Any, **how: Any) -> tuple[Trainer, Plain]:
        made = trainer(out, model, *callbacks, checkpoint=li.AdapterCheckpoint(kind))
        made.train(**how)
        return made, model

    kind = "native" if file else "peft"
    whole, model = run(tmp_path / "whole", plain())
    loaded = li.load_adapter(Plain(), tmp_path / "whole" / "checkpoint-6" / file)
    ids = torch.arange(17)[None]
    assert torch.equal(loaded(ids, ids)["loss"], model(ids, ids)["loss"])
    with pytest.raises(KilledError):
        run(tmp_path / "killed", plain(), KillAt(3))
    again, resumed = run(tmp_path / "killed", plain(), resume_from_checkpoint=True)
    assert curve(again.state.log_history) == curve(whole.state.log_history)
    for key, parameter in li.adapter_parameters(model).items():
        assert torch.equal(parameter, li.adapter_parameters(resumed)[key]), key
    with pytest.raises(li.StateError, match=r"scale 2 .* and 32 here"):
        run(tmp_path / "killed", plain(alpha=64), resume_from_checkpoint=True)


def test_a_checkpoint_of_a_plain_module_without_its_adapter_is_half_written(tmp_path: Path) -> None:
    trainer(tmp_path, plain(), max_steps=4).train()
    for path in (tmp_path / "checkpoint-4").glob("adapter*"):
        path.unlink()
    trainer(tmp_path, plain(), max_steps=4)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoint-2", "checkpoint-4.incomplete"}


@pytest.mark.parametrize("make", [plain, injected])
def test_adapters_whose_names_are_no_folders_are_refused_before_the_first_step(
    make: Any, tmp_path: Path
) -> None:
    """Not after hours, at the first save."""
    model = li.inject(make(), {"rank": 2, "targets": [r".*head"]}, "a/b")
    made = trainer(tmp_path, model)
    with pytest.raises(li.StateError, match="'a/b' is not that of a folder"):
        made.train()
    assert made.state.global_step == 0


# -------------------------------------------------------------------------- refusals, and the model


def test_parameters_that_would_not_be_saved_are_refused(tmp_path: Path) -> None:
    model = injected()
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(li.StateError, match=r"1 parameters .* 'lm_head\.weight'"):
        trainer(tmp_path, model).train()
    assert not list(tmp_path.iterdir())
    with pytest.raises(li.StateError, match="has no adapter"):
        trainer(tmp_path, llama()).train()


def test_a_model_of_which_nothing_can_train_is_refused_in_words(tmp_path: Path) -> None:
    """Torch says it in the first backward: a tensor does not require grad."""
    model = injected()
    li.merge(model)
    with pytest.raises(li.StateError, match=r"'default' is merged .* Call unmerge\(model\) first"):
        trainer(tmp_path, model).train()
    li.train_only(li.unmerge(model), None)
    with pytest.raises(li.StateError, match=r"none .* trains \(default\).*Call train_only"):
        trainer(tmp_path, model).train()
    assert not list(tmp_path.iterdir())
    li.train_only(model, "default")
    trainer(tmp_path, model, max_steps=1).train()


@pytest.mark.parametrize(("step", "frozen"), [(0, "nothing"), (2, "nothing"), (0, "lora_A")])
def test_a_layer_that_the_model_never_uses_is_refused(step, frozen, tmp_path: Path) -> None:
    """In the first step by the callback, and without it when Trainer saves."""
    model: Any = llama()
    model.spare = torch.nn.Linear(16, 16)
    li.inject(model, CONFIG | {"targets": ["q_proj", "spare"]})
    for name, parameter in li.adapter_parameters(model).items():
        parameter.requires_grad_(not name.endswith(frozen))
    words = r"(train|save) adapter 'default': .* reached 'spare'"
    made = trainer(tmp_path, model, checkpoint=None if step == 0 else False)
    with pytest.raises(li.StateError, match=words):
        made.train()
    assert made.state.global_step == step
    assert not any(tmp_path.rglob("adapter*"))
    allowed = li.AdapterCheckpoint(unused=["spare"])
    trainer(tmp_path / "allowed", model, checkpoint=allowed, max_steps=2).train()
    assert (tmp_path / "allowed" / "checkpoint-2" / "adapter_model.safetensors").is_file()


def test_a_head_that_is_read_and_not_called_trains(tmp_path: Path) -> None:
    """MobileBERT's decoder, whose weight is concatenated with another."""
    from transformers import MobileBertConfig, MobileBertForMaskedLM

    sizes = {**SIZES, "embedding_size": 8, "intra_bottleneck_size": 8, "num_attention_heads": 2}
    config = MobileBertConfig(vocab_size=17, num_feedforward_networks=1, **sizes)
    model = li.inject(MobileBertForMaskedLM(config), {"rank": 2, "targets": ["query", "decoder"]})
    native = li.AdapterCheckpoint(format="native")  # PEFT would not compute it
    trainer(tmp_path, model, checkpoint=native, max_steps=2).train()
    found = li.read_adapter(tmp_path / "checkpoint-2" / "adapter.safetensors").sites
    assert not any(site.is_zero for site in found.values())


def test_only_one_of_two_adapters_may_train(tmp_path: Path) -> None:
    model = li.inject(injected(), {"targets": ["o_proj"]}, "second")
    li.train_only(model, "second")
    before = {k: p.clone() for k, p in li.adapter_parameters(model, "default").items()}
    trainer(tmp_path, model, max_steps=2).train()
    after = li.adapter_parameters(model, "default")
    assert all(torch.equal(before[key], after[key]) for key in before)
    loaded = li.load_adapter(llama(), tmp_path / "checkpoint-2" / "second")
    assert li.adapters(loaded)["default"].sites.keys() == li.adapters(model)["second"].sites.keys()


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    plain = llama()
    model = llama()
    hooks = len(model._load_state_dict_post_hooks)
    li.inject(model, CONFIG)
    trainer(tmp_path, model, max_steps=2).train()
    assert len(model._load_state_dict_post_hooks) == hooks
    li.eject(model)
    assert all(torch.equal(plain.state_dict()[k], t) for k, t in model.state_dict().items())


def test_a_checkpoint_that_lacks_a_part_of_the_base_is_still_reported(tmp_path: Path) -> None:
    model = injected()
    trainer(tmp_path, model)
    base = {k: t for k, t in model.state_dict().items() if "lora_" not in k}
    adapter = {k: t for k, t in model.state_dict().items() if "lora_" in k}
    assert model.load_state_dict(adapter).missing_keys == []
    base.pop("model.norm.weight")
    assert model.load_state_dict(base | adapter, strict=False).missing_keys == ["model.norm.weight"]
    taken_out = next(key for key in adapter if "lora_B" in key)
    del adapter[taken_out]
    assert model.load_state_dict(adapter, strict=False).missing_keys == [taken_out]


def test_without_optimizer_if_so_asked(tmp_path: Path) -> None:
    trainer(tmp_path, injected(), max_steps=2, save_only_model=True).train()
    names = {p.name for p in (tmp_path / "checkpoint-2").iterdir()}
    assert "model.safetensors" in names
    assert not names & {"optimizer.pt", "scheduler.pt", "rng_state.pth"}


def test_the_callback_answers_every_event_and_nothing_else() -> None:
    callback = li.AdapterCheckpoint()
    for event in vars(TrainerCallback):
        if event.startswith("on_"):
            assert callable(getattr(callback, event))
    with pytest.raises(AttributeError, match="once"):
        _ = callback.once
    assert pickle.loads(pickle.dumps(callback)).format == "peft"
