"""What TRL's trainers need of a model with adapters: a reference, and weights for vLLM.

TRL knows adapters by PEFT's class. For any other model it loads a second base as reference, and
sends every parameter to vLLM as it is: of ours the plain base, and names that vLLM does not have.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar
from weakref import WeakSet

from torch import Tensor, nn

from lora_inject.core.layers.attached import attached_to
from lora_inject.core.layers.selection import Mix
from lora_inject.core.layers.survey import evaluating, unwrapped
from lora_inject.core.model.merge import merged_weights
from lora_inject.core.roots.root import Injected, entries, root_of
from lora_inject.core.roots.selecting import selecting
from lora_inject.errors import StateError
from lora_inject.formats.checkpoint_names import knows_names

T = TypeVar("T")

SENT_MERGED: WeakSet[nn.Module] = WeakSet()
"""Models whose trainer sends merged weights."""


def sync_merged(trainer: T, *, dequantize: str | None = None) -> T:
    """Let a trainer of TRL that generates with vLLM send it the merged weights of its model.

    For GRPO and others with `use_vllm=True`, colocated or with a server. Each synchronization folds
    the active adapters, one tensor at a time, and writes nothing of the model. Tensors have the
    names and shapes of the checkpoint on disk, as vLLM loads them: each expert by itself; those of
    the model where transformers cannot tell them (before 5, or quantized). `AdapterCheckpoint`
    refuses a run that lacks this call: vLLM would get the base, and names that it does not know.

    Args:
        trainer: The trainer, after it was made.
        dequantize: For a quantized base: the dtype that vLLM serves; see `merged_weights`.

    Returns:
        The trainer.

    Raises:
        StateError: The trainer does not use vLLM, its model has no adapter, or TRL has changed. At
            a synchronization: what `merged_weights` raises, or a tied tensor is adapted under one
            of its names, which vLLM holds once.

    Examples:
        >>> sync_merged(object())  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        lora_inject.errors.StateError: sync_merged: the trainer does not generate with vLLM. ...
    """
    generation: Any = getattr(trainer, "vllm_generation", None)
    if generation is None:
        problem = "the trainer does not generate with vLLM"
        raise StateError("sync_merged", problem, "Give one that was made with use_vllm=True")
    if not callable(getattr(generation, "_iter_named_params", None)):
        problem = "this version of TRL iterates over the weights in another way"
        raise StateError("sync_merged", problem, "Use TRL 1.16, with which it was tested")
    root_of(generation.model, "sync_merged")
    generation._iter_named_params = lambda: _weights_for_vllm(generation.model, dequantize)
    SENT_MERGED.add(unwrapped(generation.model))
    return trainer


def _weights_for_vllm(model: nn.Module, dequantize: str | None) -> Iterator[tuple[str, Tensor]]:
    """Yield merged weights under the first name of each, as `named_parameters` does."""
    survey = Injected(model, "sync_merged")
    again = {name for names in survey.tied.values() for name in names[1:]}
    for item in entries(survey):
        if item.entry.spec is not None and len(survey.sharing(item.weight)) > 1:
            problem = "it is tied to another tensor, and vLLM would give both the same values"
            remedy = "Leave the site out of the adapter, or untie the two"
            raise StateError(f"sync_merged, {item.name!r}", problem, remedy)
    names: Literal["model", "checkpoint"] = "checkpoint" if knows_names(model) else "model"
    for name, tensor in merged_weights(model, dequantize=dequantize, names=names):
        if name not in again:
            yield name, tensor


def reference(model: nn.Module) -> nn.Module:
    """Return a module that computes what the model would without adapters, on the same weights.

    It stands where a second, frozen model is asked for, as `ref_model` of TRL's DPO and KTO. For
    GRPO, which takes none, set it after construction; see the guide of Trainer and TRL.

    Args:
        model: The model that trains.

    Returns:
        A module without parameters of its own. Whatever else is asked of it, such as `config`, is
        the model's. It runs under `disabled(model)`, in evaluation mode; so do its methods and
        parts, such as `generate` and `base_model`.

    Raises:
        StateError: The model has no adapter; in a call: it is merged.

    Examples:
        >>> import torch
        >>> from lora_inject.core.model.inject import inject
        >>> net = nn.Sequential(nn.Linear(4, 6))
        >>> x = torch.ones(1, 4)
        >>> before = net(x)
        >>> _ = inject(net, {"rank": 2, "targets": ["0"], "init": "pissa"})
        >>> torch.equal(reference(net)(x), before)
        True
    """
    root_of(model, "reference")
    return _Reference(model, model).eval()


# Functions whose body runs after the call.
_RUN_LATER = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)


class _Reference(nn.Module):
    """A model without its adapters, or a part of one; see `reference`."""

    def __init__(self, policy: nn.Module, part: nn.Module) -> None:
        super().__init__()
        # Not children: this module has no parameters, modes or hooks of them.
        self.__dict__.update(policy=policy, part=part)

    def __getattr__(self, name: str) -> Any:
        part = self.__dict__["part"]
        if attached_to(part) is None:
            return self._plain(getattr(part, name))
        with selecting(
            self.policy, Mix(), "reference"
        ):  # a forward of the model would read W + delta
            return self._plain(getattr(part, name))

    def _plain(self, attribute: Any) -> Any:
        """Return a part or a method of the model so that it computes without adapters as well.

        So are those in lists, tuples, dicts and partials.
        """
        if isinstance(attribute, nn.Module):
            return _Reference(self.policy, attribute).eval()
        if type(attribute) in (list, tuple):
            return type(attribute)(map(self._plain, attribute))
        if type(attribute) is dict:
            return {key: self._plain(value) for key, value in attribute.items()}
        if type(attribute) is functools.partial:
            given = self._plain(attribute.args), self._plain(attribute.keywords)
            return functools.partial(self._plain(attribute.func), *given[0], **given[1])
        if not isinstance(getattr(attribute, "__self__", None), nn.Module):
            return attribute

        @functools.wraps(attribute)
        def method(*args: Any, **kwargs: Any) -> Any:
            if any(is_one(attribute) for is_one in _RUN_LATER):
                asked = f"reference around {attribute.__name__!r}"
                problem = "its body runs after the call, when the context has been left"
                raise StateError(asked, problem, "Call it within disabled(model)")
            with self._alone():
                return self._plain(attribute(*args, **kwargs))

        return method

    def __iter__(self) -> Iterator[Any]:
        return map(self._plain, self.part)

    def __getitem__(self, index: Any) -> Any:
        return self._plain(self.part[index])

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with selecting(self.policy, Mix(), "reference"), evaluating(self.part):
            yield

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call without adapters, also where somebody has put another `forward` on this module."""
        with self._alone():
            return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the model does."""
        with self._alone():
            return self.part(*args, **kwargs)
