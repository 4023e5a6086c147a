"""What transformers knows of a model that it has loaded: which weights no checkpoint had.

Since 5.0, `from_pretrained` marks each parameter that it has read from a checkpoint, or that it
ties to one (`core_model_loading.set_param_for_module`, `mark_tied_weights_as_initialized`), and
then each module that it has gone through for the others (`PreTrainedModel._initialize_weights`). So
a parameter without the mark, in a module that has it, got its values from an initializer.
transformers 4 leaves no such trace, and nothing is noticed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lora_inject.core.adapter.fingerprint import samples
from lora_inject.core.adapter.site_state import FLOATS
from lora_inject.core.layers.library import Library
from lora_inject.core.layers.survey import Holder, Survey
from lora_inject.core.spec.names import around, joined, parent, quoted
from lora_inject.core.spec.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MARK = "_is_hf_initialized"


class Transformers(Library):
    """What `from_pretrained` has left on a model."""

    modules = ("transformers",)

    def against(self, survey: Survey, plan: Plan, *, leave_new: bool) -> Iterator[tuple[str, str]]:
        """Yield which weights that are new in this process a plan leaves out, and what to do."""
        if leave_new:
            return
        whole = [trained.name for trained in plan.trained if trained.rows is None]
        held = {name for trained in whole for name in survey.names_of(trained)}
        unmarked = _unmarked(survey)
        left = [name for name in _random(survey, unmarked) if name not in held]
        if not left:
            return
        lines = _train_lines(survey, unmarked, left)
        remedy = f"Add train: {lines} to the config"
        adapted = {site.weight for site in plan.sites}
        if not adapted.isdisjoint(left):
            remedy += f" and exclude: {lines} (what trains in full is not adapted as well)"
        remedy += (
            ", or pass leave_new=True where nothing uses them or their values come from elsewhere"
        )
        problem = (
            f"{quoted(left)} were not in the checkpoint: transformers has initialized them, with "
        )
        yield f"{problem}other values in each process, and this adapter would not hold them", remedy

    def new_weights(self, survey: Survey) -> list[str]:
        """Return the parameters that `from_pretrained` has initialized, as no checkpoint had them.

        Left out are: all weights of a model of which nothing was loaded; what transformers itself
        lets a checkpoint lack; the output head, which `resize_token_embeddings` makes anew; copies
        of loaded tensors (layers of a model that was made deeper with `copy.deepcopy`); and
        constants, which every process starts from.
        """
        return _random(survey, _unmarked(survey))


def _train_lines(survey: Survey, unmarked: Iterable[Holder], left: Iterable[str]) -> list[str]:
    """Return `train` entries for the weights that are left: whole modules where all is new."""
    loaded = {holder.name for holder in survey.holders} - {holder.name for holder in unmarked}
    kept = {*around(loaded), ""}
    lines: dict[str, None] = {}
    for name in left:
        module = name
        while parent(module) not in kept:
            module = parent(module)
        lines[module] = None
    return list(lines)


def _unmarked(survey: Survey) -> list[Holder]:
    """Return the plain parameters that lack the mark, in modules that have it."""
    return [
        holder
        for path, model in _outermost(survey)
        for holder in _unmarked_of(survey, path, model)
        if not any(_is_marked(each.tensor) for each in survey.sharing(holder.tensor))
    ]


def _outermost(survey: Survey) -> Iterator[tuple[str, PreTrainedModel]]:
    """Yield the models of transformers that lie in no other one, and of which a part was loaded."""
    from transformers import PreTrainedModel

    inside: set[int] = set()
    for path, module in survey.modules if any(map(_is_marked, survey.tensors)) else ():
        if isinstance(module, PreTrainedModel) and id(module) not in inside:
            inside |= {id(each) for each in module.modules()}
            if any(map(_is_marked, module.parameters())):
                yield path, module


def _unmarked_of(survey: Survey, path: str, model: PreTrainedModel) -> Iterator[Holder]:
    below, heads = f"{path}." if path else "", survey.tables("get_output_embeddings")
    for name, module in survey.modules:
        if not f"{name}.".startswith(below) or module in heads or not _is_marked(module):
            continue
        for key, tensor in survey.own[id(module)].items():
            holder = Holder(joined(name, key), module, key)
            due = not _may_be_missing(model, holder.name.removeprefix(below))
            if due and _is_plain(tensor) and not _is_marked(tensor):
                yield holder


def _is_marked(of: object) -> bool:
    return bool(getattr(of, _MARK, False))


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) is nn.Parameter and tensor.dtype in FLOATS and not tensor.is_meta


def _may_be_missing(model: PreTrainedModel, name: str) -> bool:
    """Whether the model's class says that its checkpoints may lack a parameter."""
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)


def _random(survey: Survey, unmarked: Iterable[Holder]) -> list[str]:
    """Return those of the parameters that hold neither a constant nor a loaded tensor's values."""
    mine = samples({holder.name: holder.tensor for holder in unmarked})
    shapes = {tuple(holder.tensor.shape) for holder in unmarked}
    loaded = {
        holder.name: holder.tensor
        for holder in (survey.holders if mine else ())
        if _is_marked(holder.tensor) and _is_plain(holder.tensor)
        if tuple(holder.tensor.shape) in shapes
    }
    known = set(samples(loaded).values())
    return [name for name, values in mine.items() if len({*values}) > 1 and values not in known]
