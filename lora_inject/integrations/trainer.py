"""Checkpoints for transformers' Trainer that hold the adapter and not the model.

Trainer keeps its schedule, its file names and its way to resume, and only the writing is
taken over. `AdapterCheckpoint` is a callback that sees that a save is due, stops Trainer from
writing the whole model, and writes a folder of the same layout in one step: the adapter's tensors
under their names in the model's state dict, the state of optimizer, schedule and random numbers,
and Trainer's own record. So `save_steps`, `save_total_limit`, `load_best_model_at_end` and
`train(resume_from_checkpoint=True)` mean what they always mean.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import random
import re
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save
from torch import Tensor, nn

from lora_inject.adapter.fingerprint import Fingerprint
from lora_inject.errors import StateError
from lora_inject.formats import write_adapter
from lora_inject.layers.survey import Survey, unwrapped
from lora_inject.model.carried import entries
from lora_inject.model.save import adapter_state, format_options
from lora_inject.model.train import adapter_parameters
from lora_inject.storage.atomic import write_directory

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_LEFT_OVER = re.compile(r"\.checkpoint-\d+\.[0-9a-f]+\.tmp")
# What a checkpoint that is written over may hold; with anything else in it, it is not.
_OURS = re.compile(r"(model|adapter|adapter_model)\.safetensors|adapter_config\.json|README\.md|"
                   r"trainer_state\.json|(optimizer|scheduler|scaler)\.pt|rng_state(_\d+)?\.pth|"
                   r"pytorch_model_fsdp\.bin|optimizer\.bin")  # fmt: skip


class AdapterCheckpoint:
    """A callback for transformers' Trainer: small checkpoints, whole or not at all.

    Each `checkpoint-N` in `args.output_dir` is what PEFT and `load_adapter` read, and what Trainer
    resumes from: alone, under DistributedDataParallel, and under FSDP2. It is written when step N
    is over with its log and its evaluation, and a step that is saved is also logged, so that the
    losses of a run that was killed and resumed are those of one that was not.

    How many are kept (`save_total_limit`; the best and the newest always are) and which is loaded
    at the end (`load_best_model_at_end`) is for the TrainingArguments to say. As Trainer does not
    save, it sends no `on_save` to other callbacks, and their own state is not saved.

    Args:
        name: The adapter that trains.
        format: `peft`, or `native` for an adapter that PEFT's files cannot express: of the copy
            that `load_adapter` reads.

    Raises:
        StateError: At the start of training: where Trainer never saves (`save_strategy` is `no` or
            `best`), where parameters train that are no part of the adapter and would be lost, or
            under DeepSpeed, which keeps the optimizer's state to itself.

    Examples:
        >>> import lora_inject as li
        >>> from lora_inject.integrations.trainer import AdapterCheckpoint
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

    def __init__(self, name: str = "default", format: str = "peft") -> None:  # noqa: A002
        self.name = name
        self.format = format
        self._fingerprint: Fingerprint | None = None
        self._due = False
        self._random: dict[str, Any] | None = None
        self._hook: Any = None

    def __getattr__(self, event: str) -> Any:
        # Trainer calls every event of every callback, and its list of events grows.
        if event.startswith("on_"):
            return _ignore
        raise AttributeError(event)

    # ------------------------------------------------------------------------- Trainer's events

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        """Look at the base before it is sharded, and let a checkpoint of adapters load quietly."""
        del args, state, control
        model = unwrapped(model)
        self._fingerprint = adapter_state(model, self.name).fingerprint
        self._hook = model.register_load_state_dict_post_hook(_forgive_base)  # type: ignore[no-untyped-call]

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any
    ) -> None:
        """Refuse what could not be resumed; remove what a killed run left half written."""
        del state, control
        self._due, self._random = False, None
        _check(args, model, self.name)
        if args.should_save and Path(args.output_dir).is_dir():
            for path in Path(args.output_dir).iterdir():
                if _LEFT_OVER.fullmatch(path.name):
                    shutil.rmtree(path)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take over a save that is due."""
        del args, state
        self._take_over(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over a save that is due; note the random numbers where an epoch is cut short."""
        del kwargs
        self._take_over(control)
        if control.should_training_stop and state.epoch != int(state.epoch):
            # What Trainer evaluates from here on, a run that went on would not have evaluated.
            self._random = _random_states(args)

    def _take_over(self, control: Any) -> None:
        if control.should_save or control.should_training_stop:
            self._due = True
            control.should_save = False
            control.should_log = True  # else the losses since the last log would be lost

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the step before, which is over only now: its log and evaluation came after it."""
        del control
        self._write_if_due(args, state, **kwargs)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the last step of the epoch before, ahead of the shuffling of the next."""
        del control
        self._write_if_due(args, state, **kwargs)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **kwargs: Any
    ) -> None:
        """Write the last step: Trainer logs its speed just before it loads the best checkpoint."""
        del control
        if "train_runtime" in logs:
            self._write_if_due(args, state, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the model as it was."""
        del args, state, control
        if self._hook is not None:
            self._hook.remove()

    # --------------------------------------------------------------------------------- writing

    def _write_if_due(
        self,
        args: Any,
        state: Any,
        *,
        model: nn.Module,
        optimizer: Any,
        lr_scheduler: Any,
        **_: Any,
    ) -> None:
        if not self._due or not state.global_step:
            return
        self._due = False
        folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")  # noqa: PTH118
        _note_best(args, state)
        # Every process takes part: shards are gathered, and each has random numbers of its own.
        files = self._adapter_files(args, model) | _weight_files(model)
        if not args.save_only_model:
            files |= _optimizer_files(model, optimizer, lr_scheduler)
            files |= _random_files(self._random or _random_states(args), args)
        files["trainer_state.json"] = _record(state)
        if args.should_save:
            _write(Path(folder), files)
            _rotate(args, state)
        if _world() > 1:
            dist.barrier()

    def _adapter_files(self, args: Any, model: nn.Module) -> dict[str, bytes]:
        """The adapter as other programs read it."""
        adapter = adapter_state(model, self.name)
        # Sampled before the base was sharded: shards have no samples.
        adapter = dataclasses.replace(adapter, fingerprint=self._fingerprint)
        if not args.should_save:
            return {}
        options = format_options(Survey(model), self.format, self.name)
        with tempfile.TemporaryDirectory() as place:
            target = Path(place, "adapter" if self.format == "peft" else "adapter.safetensors")
            path = write_adapter(adapter, target, self.format, **options)
            files = path.iterdir() if path.is_dir() else [path]
            return {file.name: file.read_bytes() for file in files}


def _ignore(*_: Any, **__: Any) -> None:
    """An event that nothing is to be done about."""


def _check(args: Any, model: nn.Module, name: str) -> None:
    """Refuse a run whose checkpoints would not be written or could not be resumed."""
    asked = f"AdapterCheckpoint({name!r})"
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    if strategy not in ("steps", "epoch"):
        raise StateError(
            asked,
            f"save_strategy is {strategy!r}, at which it is never asked to save",
            'Pass save_strategy="steps" or "epoch"; load_best_model_at_end keeps the best as well',
        )
    if getattr(args, "deepspeed", None):
        raise StateError(asked, "DeepSpeed keeps the optimizer's state to itself", "Use FSDP2")
    ours = {id(parameter) for parameter in adapter_parameters(model, name).values()}
    others = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in ours]
    if others:
        raise StateError(
            asked,
            f"{len(others)} parameters train that are no part of it, of which {others[0]!r}",
            "Name them under `train` in the config, or call train_only(model, name)",
        )
    if _sharded(model) and "FULL" not in str(_fsdp_plugin().state_dict_type):
        raise StateError(
            asked,
            f"FSDP is set to {_fsdp_plugin().state_dict_type}, of which Trainer loads no part",
            'Set state_dict_type to "FULL_STATE_DICT"; an adapter is small',
        )


def _fsdp_plugin() -> Any:
    from accelerate.state import AcceleratorState

    return AcceleratorState().fsdp_plugin


def _sharded(model: nn.Module) -> bool:
    return any(hasattr(p, "full_tensor") for p in model.parameters() if p.requires_grad)


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _forgive_base(model: nn.Module, found: Any) -> None:
    """Say of a checkpoint that holds adapters only that the base is not missing from it."""
    ours = _adapter_keys(model)
    base = [key for key in model.state_dict(keep_vars=True) if key not in ours]
    missing = set(found.missing_keys)
    if missing.issuperset(base):
        found.missing_keys[:] = [key for key in found.missing_keys if key in ours]


def _adapter_keys(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of all adapters by their names in the state dict, frozen starts included."""
    # First, as FSDP2 puts shards back in place of what a forward left gathered.
    state = model.state_dict(keep_vars=True)
    ours = {
        id(module._parameters[flat])
        for _, module, entry in entries(Survey(model))
        for flat in entry.names.values()
    }
    return {key: tensor for key, tensor in state.items() if id(tensor) in ours}


def _weight_files(model: nn.Module) -> dict[str, bytes]:
    """The adapters' tensors where Trainer looks for the model's."""
    tensors = {key: _whole(tensor) for key, tensor in _adapter_keys(model).items()}
    if _sharded(model):
        return {"pytorch_model_fsdp.bin": _pickled(tensors)}
    return {"model.safetensors": save(tensors, {"format": "pt"})}


def _whole(tensor: Tensor) -> Tensor:
    """A copy on the CPU, gathered where FSDP2 holds a shard of it."""
    tensor = tensor.detach()
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.to("cpu", copy=True).contiguous()


def _optimizer_files(model: nn.Module, optimizer: Any, lr_scheduler: Any) -> dict[str, bytes]:
    files = {"scheduler.pt": _pickled(lr_scheduler.state_dict())}
    if getattr(optimizer, "scaler", None) is not None:  # accelerate's wrapper, with fp16
        files["scaler.pt"] = _pickled(optimizer.scaler.state_dict())
    if not _sharded(model):
        return files | {"optimizer.pt": _pickled(optimizer.state_dict())}
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return files | {
        "optimizer.bin": _pickled(get_optimizer_state_dict(model, optimizer, options=whole))
    }


def _random_states(args: Any) -> dict[str, Any]:
    """The state of every generator that Trainer restores."""
    import numpy as np

    found = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        all_devices = _world() > 1 and args.world_size > 1
        cuda = torch.cuda.random
        found["cuda"] = cuda.get_rng_state_all() if all_devices else cuda.get_rng_state()
    return found


def _random_files(states: dict[str, Any], args: Any) -> dict[str, bytes]:
    """One file for each process, under Trainer's names."""
    if args.world_size <= 1:
        return {"rng_state.pth": _pickled(states)}
    gathered: list[Any] = [None] * _world()
    dist.all_gather_object(gathered, _pickled(states))
    return {f"rng_state_{rank}.pth": content for rank, content in enumerate(gathered)}


def _pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _record(state: Any) -> bytes:
    """Trainer's record of the run, without the summary that ends each session."""
    history = [entry for entry in state.log_history if "train_runtime" not in entry]
    plain = dataclasses.asdict(state) | {"log_history": history}
    return (json.dumps(plain, indent=2, sort_keys=True) + "\n").encode()


def _note_best(args: Any, state: Any) -> None:
    """Tell Trainer where the best step is, as its own saving would."""
    if state.best_global_step:
        folder = os.path.join(args.output_dir, f"checkpoint-{state.best_global_step}")  # noqa: PTH118
        if state.best_global_step == state.global_step or Path(folder).is_dir():
            state.best_model_checkpoint = folder


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    there = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    replaceable = [name for name in there if _OURS.fullmatch(name)]
    write_directory(folder, files, overwrite=True, replaceable=replaceable)


def _rotate(args: Any, state: Any) -> None:
    """Remove the oldest checkpoints beyond the limit, never the newest and never the best."""
    if not args.save_total_limit or args.save_total_limit <= 0:
        return
    folders = [path for path in Path(args.output_dir).iterdir() if _step(path)]
    newest_first = sorted(folders, key=_step, reverse=True)
    steps = {state.global_step, state.best_global_step}
    kept = [path for path in newest_first if _step(path) in steps]
    others = [path for path in newest_first if _step(path) not in steps]
    for path in others[max(0, args.save_total_limit - len(kept)) :]:
        # Under another name first: a kill in the middle leaves no half of a checkpoint to resume.
        doomed = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
        path.rename(doomed)
        shutil.rmtree(doomed)


def _step(path: Path) -> int:
    """The step of a checkpoint's folder, 0 for anything else."""
    found = _CHECKPOINT.fullmatch(path.name)
    return int(found[1]) if found and path.is_dir() else 0
