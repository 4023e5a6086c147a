"""What takes a merge back: where each merged tensor was put, what stood there, and `unmerge`.

A merge writes to no weight's memory: it puts new values in the place of the old ones, which are
kept. So nothing is subtracted to restore them, and whoever shares the memory of W keeps W.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lora_inject.core.functional.torch_inside import version_of
from lora_inject.core.layers.selection import Selected
from lora_inject.core.layers.snapshot import all_or_nothing
from lora_inject.core.layers.survey import Holder, Survey
from lora_inject.core.layers.weight_kinds import Undo
from lora_inject.core.roots.root import Injected, alone
from lora_inject.errors import StateError

M = TypeVar("M", bound=nn.Module)


@dataclass
class Put:
    """A merged tensor in its place, and what takes it back."""

    holder: Holder
    now: nn.Parameter
    before: nn.Parameter
    kept: Tensor | None = None  # the values before, where the Parameter stays
    partner: Holder | None = None  # of an untied tensor: who held its memory as well
    layer: Undo | None = None  # of a packed weight: the state of its layer

    def __post_init__(self) -> None:
        self.version = version_of(self.now)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()  # a copy of the Parameter counts anew

    @property
    def lost(self) -> bool:
        """Whether nothing keeps the values before."""
        return self.kept is None and self.partner is None and self.layer is None

    def check(self, survey: Survey, *, discard: bool) -> None:
        """Raise if what was merged does not stand there any more."""
        asked = f"unmerge of {self.holder.name!r}"
        module, standing = self.holder.module, self.holder.module._parameters.get(self.holder.param)
        if id(module) not in survey.paths:
            problem = "its layer is not in the model any more"
            raise StateError(asked, problem, "Put the layer back first")
        if standing is self.before is not self.now:
            return  # an interrupted call has put it back
        resized = self.kept is not None and self.now.shape != self.kept.shape
        if standing is not self.now or resized:
            problem = "the weight was replaced since the merge, and what was kept is not its base"
            remedy = "Put the merged Parameter back, or eject the adapters and load the base again"
            raise StateError(asked, problem, remedy)
        if self.layer is not None:
            if standing.device != self.before.device:
                problem = f"it was moved to {standing.device} since the merge"
                raise StateError(
                    asked, problem, f"Move the model back to {self.before.device} first"
                )
            return
        # An embedding with max_norm scales the rows that it looks up, in place.
        scales_rows = getattr(module, "max_norm", None) is not None
        if version_of(standing) != self.version and not discard and not scales_rows:
            problem = "its values were changed since the merge, which unmerge would drop"
            remedy = (
                "Call unmerge(model, discard=True) to drop the change, or eject(model) to keep it "
            )
            remedy += "with what was merged"
            raise StateError(asked, problem, remedy)

    @torch.no_grad()
    def take_back(self) -> None:
        """Put back what stood there, on the device and in the dtype that the model has now."""
        if self.layer is not None:
            self.layer.put_back()
        elif self.partner is not None:
            there = self.partner.tensor
            if there.untyped_storage().data_ptr() != self.before.untyped_storage().data_ptr():
                self.before.data = there.data  # the model was cast or moved meanwhile
            self.holder.module._parameters[self.holder.param] = self.before
        elif self.kept is not None:
            self.now.data = self.kept.to(self.now.device, self.now.dtype)


@dataclass
class Merged:
    """What the root remembers while it is merged."""

    setting: Selected
    trainable: list[nn.Parameter]
    undo: bool  # whether the values before are kept
    untied: Mapping[str, str]  # that no config tells of; see `ties.check_ties`
    done: list[Put] = field(default_factory=list)
    said: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)
    """What models and configs said of quantization and ties: each with attributes of its."""

    @contextmanager
    def taken_back(self) -> Iterator[None]:
        """Take back what was put, where the body raises."""
        try:
            yield
        except BaseException as error:
            self.take_back()
            if any(put.lost for put in self.done):
                problem = (
                    f"it failed at tensor {len(self.done)}, and what was written stays written"
                )
                remedy = "Load the base weights again, which undo=False did not keep"
                raise StateError("merge(undo=False)", problem, remedy) from error
            raise

    def take_back(self) -> None:
        """Restore weights and what was said of them, the last first: a tie needs its partner."""
        for put in reversed(self.done):
            put.take_back()
        for owner, attributes in self.said:
            for name, value in attributes.items():
                setattr(owner, name, value)


@alone
def unmerge(model: M, *, discard: bool = False) -> M:
    """Restore the weights that `merge` folded an adapter into, bit for bit.

    Args:
        model: The injected root.
        discard: Drop what was changed in place in merged weights since, which is an error
            otherwise. A change through `.data` is not noticed, nor one of an embedding with
            `max_norm`, which scales its rows as it runs.

    Returns:
        The same object, with the selection and the `requires_grad` flags from before the merge.

    Raises:
        StateError: Nothing is merged, it was merged with `undo=False`, or a weight or its layer was
            replaced or changed since. Nothing was changed.
    """
    survey = Injected(model, "unmerge")
    root = survey.root
    merged: Merged | None = root.before_merge
    if merged is None:
        raise StateError("unmerge", "nothing is merged", "Call merge(model) first")
    if not merged.undo:
        problem = "the merge kept nothing to restore (undo=False)"
        remedy = "Eject the adapters, load the base weights, then load the adapters again"
        raise StateError("unmerge", problem, remedy)
    root.selection.check_settled("unmerge", others=True)
    for put in merged.done:
        put.check(survey, discard=discard)
    merged.take_back()
    with all_or_nothing((module for _, module in survey.modules), (root.selection, root)):
        root.selection.replace(merged.setting)
        for parameter in merged.trainable:
            parameter.requires_grad_(True)
        root.before_merge = None
    return model
