"""A callback that makes runs of transformers' Trainer safe to kill and resume.

Trainer writes its checkpoints through `save_pretrained`, which writes the adapters (`stand_ins`),
and resumes from them. The callback also logs at each save, keeps half-written checkpoints from
being resumed, and refuses parameters that would not be saved.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lora_inject.core.layers.survey import Survey, unwrapped
from lora_inject.core.model.buffers import check_buffers
from lora_inject.core.model.gradients import check_live_inputs
from lora_inject.core.model.training import adapter_parameters, modules_that_train
from lora_inject.core.model.used import refuse_unused
from lora_inject.core.roots.root import Injected, check_unmerged, entries, find_root, has_gradient
from lora_inject.errors import StateError
from lora_inject.integrations.stand_ins import (
    CHECKPOINT,
    SAVE,
    adapter_files,
    adapter_tensors,
    folders_of,
    write_files,
)

_ASKED = "train with AdapterCheckpoint"


class AdapterCheckpoint:
    """A callback for transformers' Trainer: a killed run resumes with the same results.

    - Every saved step is also logged, so a resumed run logs the same losses. A run that is stopped
      early is saved.
    - When the Trainer is made, half-written checkpoints in `args.output_dir` are renamed to
      `checkpoint-N.incomplete`.
    - Resuming does not warn that checkpoints of adapters lack the base.
    - What the first step did not use, or got no gradient, is an error at once. Lists of layers, all
      of which may be dropped at random, are asked when they are saved.

    Schedules, file names, rotation, best model and resuming are left to Trainer. PEFT and
    `load_adapter` can read each `checkpoint-N`, also of a model that is none of transformers'; of
    such a model Trainer saves the base as well.

    Args:
        format: Format of the copy that `load_adapter` reads: `peft`, or `native` for adapters that
            PEFT's files cannot express.
        unused: Patterns of sites that may be without use in the first step, such as those of a part
            that only later batches reach; see `save_adapter`.
        sends_merged: For TRL with `use_vllm`: its trainer sends merged weights, as
            docs/cookbook/trl-vllm.md makes it do.

    Raises:
        StateError: At the start of training: the model has no adapter, or none that trains, or is
            merged, or parameters outside of adapters train, which would not be saved, or TRL is to
            disable dropout and adapters have one of their own, or to send vLLM weights without
            the adapters. In the first step: a site of an adapter that trains is inert, or buffers
            of the base moved (BatchNorm's statistics). At a save: parameters outside of adapters
            have begun to train.

    Examples:
        >>> import tempfile, torch, lora_inject as li
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from transformers import PrinterCallback, Trainer, TrainingArguments
        >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        >>> config = LlamaConfig(**sizes, num_attention_heads=2, vocab_size=16)
        >>> model = li.inject(LlamaForCausalLM(config), {"rank": 2, "targets": ["q_proj"]})
        >>> rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
        >>> settings = {"max_steps": 2, "save_steps": 1, "use_cpu": True, "report_to": "none"}
        >>> settings |= {"disable_tqdm": True, "dataloader_pin_memory": False}
        >>> with tempfile.TemporaryDirectory() as out:
        ...     args = TrainingArguments(out, **settings)
        ...     trainer = Trainer(model, args, train_dataset=rows, callbacks=[AdapterCheckpoint()])
        ...     trainer.remove_callback(PrinterCallback)
        ...     _ = trainer.train()
        ...     sorted(path.name for path in Path(out).iterdir())
        ['checkpoint-1', 'checkpoint-2']
    """

    def __init__(
        self,
        format: str = "peft",  # noqa: A002
        *,
        unused: Sequence[str] = (),
        sends_merged: bool = False,
    ) -> None:
        self.format, self.unused, self.sends_merged = format, unused, sends_merged
        self._started = False

    def __getattr__(self, event: str) -> Any:
        # Trainer calls every event of every callback, and its list of events grows.
        if event.startswith("on_"):
            return _ignore
        raise AttributeError(event)

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        """Rename half-written checkpoints, and silence the warning on loading adapters only."""
        del state, control
        model = unwrapped(model)
        saves = model.__dict__.get(SAVE)
        if saves is not None:
            saves.format, saves.unused = self.format, self.unused
        forgiving = model.register_load_state_dict_post_hook(_forgive_base)  # type: ignore[no-untyped-call]
        weakref.finalize(self, forgiving.remove)  # a trainer trains, and loads, more than once
        folder = Path(args.output_dir)
        for path in folder.iterdir() if args.should_save and folder.is_dir() else ():
            if not CHECKPOINT.fullmatch(path.name) or not path.is_dir():
                continue
            if not _is_whole(path) or (saves is None and not _has_adapters(path, model)):
                aside, n = path.with_name(f"{path.name}.incomplete"), 1
                while aside.exists():
                    n += 1
                    aside = path.with_name(f"{path.name}.incomplete-{n}")
                path.rename(aside)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any
    ) -> None:
        """Refuse a run that could not be resumed."""
        del state, control
        if find_root(model, _ASKED) is None:
            remedy = "Inject first, and list other trained parameters under `train` in the config"
            raise StateError(_ASKED, "the model has no adapter", remedy)
        survey = Injected(model, _ASKED)
        check_unmerged(_ASKED, survey.root)
        ours = {id(parameter) for parameter in adapter_parameters(model).values()}
        trained = [(n, id(p) in ours) for n, p in model.named_parameters() if p.requires_grad]
        if not any(is_ours for _, is_ours in trained):
            # torch says so in the first backward only
            names = ", ".join(sorted(survey.root.adapters))
            problem = f"none of the model's adapters trains ({names})"
            raise StateError(_ASKED, problem, "Call train_only(model, name) first")
        if others := [name for name, is_ours in trained if not is_ours]:
            problem = f"{len(others)} parameters outside of adapters train, of which {others[0]!r}"
            remedy = "List trained parameters of the base under `train` in the config"
            raise StateError(_ASKED, problem, remedy)
        folders_of(survey)
        check_live_inputs(survey, "train", modules_that_train(survey), watched=True)
        if getattr(args, "use_vllm", False) and not self.sends_merged:
            problem = "use_vllm is set, and TRL would send vLLM the base without the adapters"
            remedy = "Send merged ones (docs/cookbook/trl-vllm.md) and pass sends_merged=True"
            raise StateError(_ASKED, problem, remedy)
        drops = [item.entry.spec.dropout for item in entries(survey) if item.entry.spec]
        if getattr(args, "disable_dropout", False) and any(drops):
            problem = (
                "TRL's disable_dropout is set, and reaches modules only, not the dropout of an "
            )
            problem += f"adapter ({max(drops):g})"
            remedy = "Inject with dropout: 0, or pass disable_dropout=False"
            raise StateError(_ASKED, problem, remedy)

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any
    ) -> None:
        """Refuse inert sites when the first gradients are there."""
        del args, state, control
        if not self._started:
            self._started, survey = True, Injected(model, _ASKED)
            check_buffers(survey, _ASKED)
            for name in survey.root.adapters:
                asked = f"train adapter {name!r}"
                refuse_unused(survey, name, has_gradient, self.unused, asked, lists=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Log at each save, so that the losses since the last log are not lost."""
        del state
        control.should_save = control.should_save or control.should_training_stop
        may_be_best = control.should_evaluate and args.save_strategy == "best"
        control.should_log = control.should_log or control.should_save or may_be_best

    on_epoch_end = on_step_end

    def on_save(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        """Write the adapters of a model without `save_pretrained`, which Trainer saves whole."""
        del control
        if SAVE in unwrapped(model).__dict__:
            return
        files = adapter_files(Injected(model, _ASKED), self.format, self.unused)
        if args.should_save:
            write_files(Path(args.output_dir, f"checkpoint-{state.global_step}"), files)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save if the evaluation ends the run."""
        del args, state
        control.should_save = control.should_save or control.should_training_stop


def _ignore(*_: Any, **__: Any) -> None:
    """An event that nothing is to be done about."""


def _is_whole(checkpoint: Path) -> bool:
    """Return whether a checkpoint has the file that Trainer writes last.

    No other is asked for: with `save_only_model=True` Trainer writes no optimizer.pt, and resumes
    with a fresh optimizer.
    """
    try:
        json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _has_adapters(checkpoint: Path, model: nn.Module) -> bool:
    """Return whether a checkpoint has files of each adapter of a model, which come last."""
    folders = (checkpoint / folder for folder in folders_of(Injected(model, _ASKED)).values())
    return all(any(folder.glob("adapter*.safetensors")) for folder in folders)


def _forgive_base(model: nn.Module, keys: Any) -> None:
    """Say of a checkpoint that holds adapters only that the base is not missing from it."""
    ours = adapter_tensors(Survey(model))
    base = [key for key in model.state_dict(keep_vars=True) if key not in ours]
    if set(keys.missing_keys).issuperset(base):
        keys.missing_keys[:] = [key for key in keys.missing_keys if key in ours]
