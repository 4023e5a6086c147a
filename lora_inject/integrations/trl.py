"""What TRL's trainers need of a model with adapters: a reference.

TRL knows adapters by PEFT's class. For any other model it loads a second base as reference.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lora_inject.core.layers.attached import attached_to
from lora_inject.core.layers.selection import Mix
from lora_inject.core.layers.survey import evaluating
from lora_inject.core.roots.root import root_of
from lora_inject.core.roots.selecting import selecting
from lora_inject.errors import StateError


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
