"""What a live model says to files: facts of it, and where PEFT would compute something else.

PEFT adds to the output of layers that it finds by name, and swaps a weight while its owner runs.
Whether that equals W + delta depends on the model, not on the file. What a model's objects show is
asked of one on the meta device too, so before anything ran; what only a run shows (who read a
weight) is asked when an adapter is saved.

Source: peft 0.21.2, tuners/lora/layer.py (`LoraLayer`, `_ConvNd`), tuners/tuners_utils.py
(`BaseTunerLayer`, `_check_lora_target_modules_mamba`).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

from torch import nn

from lora_inject.core.layers.adapted import plain_class
from lora_inject.core.layers.attached import Entry, attached_to
from lora_inject.core.layers.kinds import KINDS
from lora_inject.core.layers.survey import Survey
from lora_inject.core.roots.root import entries
from lora_inject.core.spec.names import leaf
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.errors import FormatError
from lora_inject.formats.exchange import DEFAULT
from lora_inject.formats.model_facts import ModelFacts
from lora_inject.formats.peft.folder import check_sites
from lora_inject.private import look_up

_MAMBA = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
_NOT_IN_MAMBA = {"out_proj", "conv1d"}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TASKS = {
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "CAUSAL_LM",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": "SEQ_2_SEQ_LM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "SEQ_CLS",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "TOKEN_CLS",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": "QUESTION_ANS",
}


# Facts ------------------------------------------------------------------------------------------


def facts_about(survey: Survey) -> ModelFacts:
    """Return the facts about a live model that files depend on."""
    return facts_of_model(survey.model, survey.by_name, survey.weights)


def facts_of_model(
    model: nn.Module, modules: Mapping[str, nn.Module], tensor_names: Iterable[str]
) -> ModelFacts:
    """Return what a model answers, also one on meta; its modules and tensors by all their names."""
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    plain = config.to_dict() if hasattr(config, "to_dict") else config
    return ModelFacts(
        module_names=tuple(filter(None, modules)),
        tensor_names=tuple(tensor_names),
        transposed_modules=tuple(_transposed(modules)),
        orientation_known=_orientation_known(model),
        expert_names=expert_names(model),
        config=dict(plain) if isinstance(plain, Mapping) else None,
        base_model=getattr(config, "_name_or_path", None) or None,
        task_type=_task_type(model, model_type),
        unfit=_unfit(model_type, modules),
    )


def _orientation_known(model: nn.Module) -> bool:
    return not (hasattr(model, "base_model_prefix") and is_transformers_4())


def is_transformers_4() -> bool:
    """Whether the transformers here is of version 4, whose classes say less about themselves.

    No class states how its stacks of experts are stored, and one whose config says that its ends
    are not tied may leave embeddings without values.
    """
    library: Any = sys.modules.get("transformers")
    return library is not None and int(library.__version__.partition(".")[0]) < 5


# peft/utils/transformers_weight_conversion.py, `_MOE_TARGET_MODULE_MAPPING` (0.21.2).
_EXPERT_NAMES: dict[str | None, dict[str, str]] = {
    "qwen2_moe": {
        "gate": "gate.weight",
        "gate_proj": "gate_up_proj",
        "up_proj": "gate_up_proj",
        "down_proj": "down_proj",
    },
    "mixtral": {
        "gate": "gate.weight",
        "w1": "gate_up_proj",
        "w2": "down_proj",
        "w3": "gate_up_proj",
    },
}


def expert_names(model: nn.Module) -> dict[str, str]:
    """Return what PEFT on transformers 5 takes for experts in any `target_modules` of a model.

    It renames the targets of adapters from before transformers 5, where experts were modules, by
    the model's type alone. Dense layers of the same names get no adapter then. The new name of each
    is that of a parameter.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None or "transformers" not in sys.modules:
        return {}
    table = look_up("transformers.conversion_mapping._MODEL_TO_CONVERSION_PATTERN")
    if table is None:
        return {}  # transformers 4 has no stacked experts, and PEFT renames nothing
    family = "mixtral" if model_type == "mixtral" else table.get(model_type)
    return _EXPERT_NAMES.get(family, {})


def _transposed(modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Yield the names of modules that say `is_transposed`.

    `getattr` of a module that does not takes as long as all else that is asked of it here.
    """
    stating = {cls for cls in set(map(type, modules.values())) if hasattr(cls, "is_transposed")}
    for name, module in modules.items():
        states = type(module) in stating or "is_transposed" in module.__dict__
        if states and module.is_transposed:
            yield name


def _task_type(model: nn.Module, model_type: str | None) -> str | None:
    """Return PEFT's task type of a model whose class transformers registers for one task."""
    if model_type is None or "transformers" not in sys.modules:
        return None
    from transformers.models.auto import modeling_auto as auto

    classes = {cls.__name__ for cls in type(model).__mro__}
    for table, task in _TASKS.items():
        if getattr(auto, table, {}).get(model_type) in classes:
            return task
    return None


def _unfit(model_type: object, modules: Mapping[str, nn.Module]) -> Callable[[str], str] | None:
    """Return what says why PEFT's layers cannot stand in the place of a module; None if all can."""
    classes = set(map(type, modules.values()))
    if model_type not in _MAMBA and not any(issubclass(cls, _CONVOLUTIONS) for cls in classes):
        return None
    return lambda name: _why_unfit(model_type, modules.get(name), name)


def _why_unfit(model_type: object, module: nn.Module | None, name: str) -> str:
    """Return why PEFT would refuse, fail or do nothing with an adapter of a module, or ""."""
    if module is None:
        return ""
    if model_type in _MAMBA and leaf(name) in _NOT_IN_MAMBA:
        return f"it refuses every '{leaf(name)}' in models of the type '{model_type}'"
    if not isinstance(module, _CONVOLUTIONS):
        return ""
    cls = plain_class(type(module))
    if module.groups > 1:
        problem = f"its A reads the inputs of all {module.groups} groups"
        return f"{problem}, and a rank that they do not divide is refused"
    if any(step != 1 for step in module.dilation):
        return "its A is not dilated"
    if module.padding_mode != "zeros":
        return f"its A pads with zeros, and the layer with padding_mode={module.padding_mode!r}"
    if "__init__" in vars(cls) and cls not in _CONVOLUTIONS:
        return f"it makes A and B as {cls.__name__}, whose arguments are not a convolution's"
    return ""


def notes_on_files(
    survey: Survey, specs: Sequence[SiteSpec], tensor_names: Iterable[str]
) -> Iterator[str]:
    """Yield what the default format cannot hold of sites, and the call that works."""
    model_type = getattr(getattr(survey.model, "config", None), "model_type", None)
    facts = ModelFacts(  # what `check_sites` asks for
        tensor_names=tuple(tensor_names),
        orientation_known=_orientation_known(survey.model),
        unfit=_unfit(model_type, survey.by_name),
    )
    try:
        check_sites(specs, facts)
    except FormatError as problem:
        what = ", ".join(filter(None, (problem.asked, problem.found)))
        yield f"save_adapter cannot write this as {DEFAULT!r}: {what}. {problem.remedy}"
    if any(spec.only or spec.share for spec in specs):
        yield (
            f"files of {DEFAULT!r} hold every expert: loaded again, those that are left out train "
            "with zeros, and a shared factor is one for each. save_adapter(model, path, format="
            '"native") keeps both'
        )


# PEFT's reading ---------------------------------------------------------------------------------


def refuse_misread(survey: Survey, name: str) -> None:
    """Raise if PEFT would load the adapter's file without an error and compute other outputs.

    This happens if a site is read by another module than its own, its layer's forward is not linear
    in the weight as PEFT assumes, the layer stands in several places, or PEFT would look for it
    under another name.
    """
    renamed, held = _renaming(survey.model), _places(survey)
    for path, module, entry in entries(survey, name):
        if entry.spec is None:
            continue
        problem = _misread(module, entry)
        if (n := held[id(module)]) > 1:
            problem = f"its layer stands in {n} places, and PEFT adapts only the first"
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
        known = _convolving(plain) in map(_convolving, _CONVOLUTIONS)
    elif kind == "embedding":  # whose scale PEFT knows by this name
        known = KINDS[kind].stock(plain) or hasattr(module, "embed_scale")
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
