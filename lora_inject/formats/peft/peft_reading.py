"""Refuse files with which PEFT would compute other outputs.

PEFT adds to the output of layers that it finds by name, and swaps a weight while its owner runs.
Whether that equals W + delta depends on the live model, not on the file.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

from torch import nn

from lora_inject.core.layers.adapted import plain_class
from lora_inject.core.layers.attached import Entry, attached_to
from lora_inject.core.layers.kinds import mixin_for
from lora_inject.core.layers.survey import Survey
from lora_inject.core.roots.carried import entries
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.errors import FormatError
from lora_inject.formats.peft.tensor_layout import attentions


def refuse_misread(survey: Survey, name: str) -> None:
    """Raise if PEFT would load the adapter's file without an error and compute other outputs.

    This happens if a site is read by another module than its own, its layer's forward is not linear
    in the weight as PEFT assumes, the layer stands in several places, or PEFT would look for it
    under another name.
    """
    renamed, held = _renaming(survey.model), _places(survey)
    carried = [*entries(survey, name)]
    called = attentions(entry.spec for _, _, entry in carried if entry.spec is not None)
    for path, module, entry in carried:
        if entry.spec is None:
            continue
        if (attention := called.get(entry.spec.name)) is None:
            problem = _misread(module, entry)
        elif not isinstance(survey.by_name[attention], nn.MultiheadAttention):
            problem = f"it knows the attention of torch.nn only, and '{attention}' is another"
        else:
            problem = ""
        if held[id(module)] > 1:
            problem = (
                f"its layer stands in {held[id(module)]} places, and PEFT adapts only the first"
            )
        key = f"{path}.lora_A.weight"
        if not problem and not key.endswith(there := renamed(key)):
            problem = "it renames the keys of this model's files (of its own, too), and would look "
            problem += f"for it at {there!r}"
        if problem:
            asked = f"write adapter {name!r}, site {entry.spec.name!r}"
            problem = f"PEFT would load it wrong: {problem}"
            remedy = 'Write it with format="native": save_adapter(model, path, format="native")'
            raise FormatError(asked, problem, remedy)


def refuse_first_places(survey: Survey, sites: Iterable[SiteSpec], asked: str) -> None:
    """Raise if PEFT put an adapter into one of several places of a layer, which is one here."""
    held = _places(survey)
    for spec in sites:
        n = held[id(survey.at(spec.weight).module)]
        if n > 1:
            raise FormatError(
                f"{asked}, site {spec.name!r}",
                f"its layer stands in {n} places of the model, and PEFT adapts only the first",
                "Give each place a layer of its own first, with copy.deepcopy",
            )


def _places(survey: Survey) -> Counter[int]:
    """Return in how many places of the model each module stands, by its id.

    What PEFT puts in the place of a shared container's child is seen under all names of it.
    """
    return Counter(id(child) for _, m in survey.modules for child in m._modules.values())


def _misread(module: nn.Module, entry: Entry) -> str:
    """Return why PEFT's layer would compute something else, or ""."""
    attached, plain = attached_to(module), plain_class(type(module))
    assert attached is not None
    if entry.mark in attached.read_from_outside:
        return "another module reads the weight, and nothing would call the adapter"
    kind = entry.spec.kind if entry.spec else ""
    if kind == "conv":
        known = _convolving(plain) in map(_convolving, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    elif kind == "embedding":  # whose scale PEFT knows by this name
        known = mixin_for(kind).stock(plain) or hasattr(module, "embed_scale")
    else:
        return ""
    return "" if known else f"{plain.__name__} has a forward of its own, which is not linear in W"


def _convolving(plain: Any) -> tuple[Any, Any]:
    """Return the methods by which a class convolves."""
    return plain.forward, getattr(plain, "_conv_forward", None)


def _renaming(model: nn.Module) -> Callable[[str], str]:
    """Return PEFT's name of a key: that of transformers 5 for keys of old checkpoints."""
    if not hasattr(model, "config") or "transformers" not in sys.modules:
        return str
    try:
        mapping = import_module("transformers.conversion_mapping")
        loading = import_module("transformers.core_model_loading")
    except ImportError:  # transformers 4
        return str
    if mapping.get_checkpoint_conversion_mapping(getattr(model.config, "model_type", "")) is None:
        return str
    steps = mapping.get_model_conversion_mapping(model)
    renamings: list[Any] = [step for step in steps if isinstance(step, loading.WeightRenaming)]
    return lambda key: str(loading.rename_source_key(key, renamings, [])[0])
