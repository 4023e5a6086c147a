"""The buffers of a frozen base: noted when training begins, told if they moved, put back by eject.

A base is frozen with its buffers. What moves them in training (the statistics of BatchNorm, a
moving average) moves the base, and no file of an adapter holds it: loaded onto the base that it was
made on, the adapter would compute something else.

1. Each module keeps the notes of its own buffers in its `__dict__`, so they go with copies of it.
2. No class and no name tells which buffers move: those that a state dict holds are compared by
   their values, if they are floating point numbers. Counters move without a consequence.
3. What `load_state_dict` gives is the base from then on, unless adapters are in the dict: then it
   is a run that goes on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_inject.core.functional.patches import patch
from lora_inject.core.layers.library import packed_weight
from lora_inject.core.layers.state_dict import FORMS
from lora_inject.core.layers.survey import Survey
from lora_inject.core.spec.names import counted, joined, leaf
from lora_inject.errors import StateError

NOTES = "_lora_buffers"

# What a cast to bfloat16 and back may leave.
_CAST = 2.0**-8


class Noted(NamedTuple):
    """A buffer as it was: the tensor, and a copy of its values."""

    tensor: Tensor
    values: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> Noted:
        """Note a buffer."""
        return cls(tensor, tensor.detach().clone())

    def moved(self, now: Tensor | None) -> bool:
        """Return whether what stands there has other values; a cast of the whole model is none."""
        if now is None or now.shape != self.values.shape:
            return True
        if now.is_meta or not now.is_floating_point():
            return False
        rtol = 0.0 if now is self.tensor else _CAST
        then = self.values.to(now.device).double()
        return not torch.allclose(now.detach().double(), then, rtol=rtol, atol=0.0, equal_nan=True)


def note_buffers(modules: Iterable[nn.Module]) -> None:
    """Note the buffers of modules that have no notes yet.

    A layer that holds its packed weight in buffers is left out: that is as large as the model.
    """
    for module in modules:
        if not module._buffers or NOTES in module.__dict__ or packed_weight(type(module)):
            continue
        if noted := {name: Noted.of(buffer) for name, buffer in _saved(module)}:
            module.__dict__[NOTES] = noted


def _saved(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers of a module that a state dict holds and that have values here."""
    for name, buffer in module._buffers.items():
        kept = name not in module._non_persistent_buffers_set
        if kept and type(buffer) is Tensor and not buffer.is_meta:
            yield name, buffer


def check_buffers(survey: Survey, asked: str) -> None:
    """Raise if buffers of the frozen base have moved since training began.

    Raises:
        StateError: They have, with the way out.
    """
    moved = [
        joined(path, name)
        for path, module in survey.modules
        for name, noted in _notes(module).items()
        if noted.moved(_held(module, name))
    ]
    if moved:
        problem = f"the base is frozen, and its buffer {moved[0]!r} moved while the adapter "
        problem += f"trained ({counted(len(moved), 'such buffer')}): it would be in no file"
        remedy = "Train with these modules in eval(), or with momentum=0 where they have one; "
        remedy += "eject(model) puts the buffers back"
        raise StateError(asked, problem, remedy)


def forget_buffers(modules: Iterable[nn.Module], *, put_back: bool) -> None:
    """Remove the notes, after the buffers have their values again if they are to be put back."""
    for module in modules:
        for name, noted in module.__dict__.pop(NOTES, {}).items() if put_back else ():
            _put_back(module, name, noted)
        module.__dict__.pop(NOTES, None)


@torch.no_grad()
def _put_back(module: nn.Module, name: str, noted: Noted) -> None:
    """Restore a buffer: the very tensor, unless the module was moved or cast since."""
    now = _held(module, name)
    there = now is not None and now.shape == noted.values.shape
    if not there or (now.device, now.dtype) == (noted.tensor.device, noted.tensor.dtype):  # type: ignore[union-attr]
        module._buffers[name] = now = noted.tensor
    assert now is not None
    with torch.inference_mode(now.is_inference()):
        now.copy_(noted.values)


def _held(module: nn.Module, name: str) -> Tensor | None:
    return dict(module._buffers.items()).get(name)  # the table of a scripted module is no dict


def _notes(module: nn.Module) -> Mapping[str, Noted]:
    notes: Mapping[str, Noted] = module.__dict__.get(NOTES, {})
    return notes


def _noting(load: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `load_state_dict` after which another base is noted."""

    @functools.wraps(load)
    def load_state_dict(
        self: nn.Module, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        loaded = load(self, state_dict, *args, **kwargs)
        if not any(leaf(key) == FORMS for key in state_dict):
            for path, module in self.named_modules():
                notes = module.__dict__.get(NOTES, {})
                for name in notes:
                    if joined(path, name) in state_dict:
                        notes[name] = Noted.of(module._buffers[name])  # type: ignore[arg-type]
        return loaded

    return load_state_dict


patch(nn.Module, "load_state_dict", _noting)
