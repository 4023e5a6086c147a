"""A reference model for TRL's trainers that is the trained model with its adapters left out.

TRL knows adapters by PEFT's class, and loads a second base as reference for any other model.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lora_inject.core.layers.attached import attached_to
from lora_inject.core.layers.selected import Mix
from lora_inject.core.layers.survey import Survey
from lora_inject.core.model.carried import reach
from lora_inject.core.model.select import selecting
from lora_inject.errors import StateError


def reference(model: nn.Module) -> nn.Module:
    """Return a module that computes what the model would without adapters, on the same weights.

    It stands where a second, frozen model is asked for, as `ref_model` of TRL's DPO and KTO. For
    GRPO, which takes none, set it after construction; see the guide of Trainer and TRL.

    Args:
        model: The model that trains.

    Returns:
        A module without parameters of its own. Whatever else is asked of it, such as `config`, is
        the model's. It runs under `disabled(model)`, in its own mode, which is evaluation; so do
        its methods and parts, such as `generate` and `base_model`.

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
    if not reach(model, Survey(model)).names:
        problem = "the model has no adapter"
        raise StateError("reference", problem, "Inject or load one first")
    return _Reference(model, model).eval()


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
        """Return a part or a method of the model so that it computes without adapters as well."""
        if isinstance(attribute, nn.Module):
            return _Reference(self.policy, attribute).train(self.training)
        if not isinstance(getattr(attribute, "__self__", None), nn.Module):
            return attribute

        @functools.wraps(attribute)
        def method(*args: Any, **kwargs: Any) -> Any:
            with self._alone():
                return self._plain(attribute(*args, **kwargs))

        return method

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with selecting(self.policy, Mix(), "reference"), _mode(self.part, self.training):
            yield

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call without adapters, also where somebody has put another `forward` on this module."""
        with self._alone():
            return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the model does."""
        with self._alone():
            return self.part(*args, **kwargs)


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put a model into training or evaluation mode, and each module back into its own."""
    changed = [module for module in model.modules() if module.training is not training]
    for module in changed:
        module.training = training
    try:
        yield
    finally:
        for module in changed:
            module.training = not training
