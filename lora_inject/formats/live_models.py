"""What a live model says to files: facts of it, and where PEFT would compute something else.

PEFT adds to the output of layers that it finds by name, and swaps a weight while its owner runs.
Whether that equals W + delta depends on the model, not on the file. One function says it
(`_otherwise`), of an adapter that is saved for PEFT and of one that PEFT's file holds. What a
model's objects show is asked of one on the meta device too; what only a run shows (who reads a
weight) is known when an adapter is saved, and of a loaded one is refused when it happens.

Source: peft 0.21.2, tuners/lora/layer.py (`LoraLayer`, `_ConvNd`), tuners/tuners_utils.py
(`BaseTunerLayer`, `_check_lora_target_modules_mamba`).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.layers.adapted import plain_class
from lora_inject.core.layers.attached import attached_to
from lora_inject.core.layers.kinds import KINDS
from lora_inject.core.layers.survey import Survey
from lora_inject.core.roots.root import entries
from lora_inject.core.spec.names import leaf
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.errors import AS_NATIVE, FormatError
from lora_inject.formats.exchange import DEFAULT
from lora_inject.formats.model_facts import ModelFacts
from lora_inject.formats.peft.folder import check_sites
from lora_inject.formats.peft.tensor_layout import attentions
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
        language_model=_language_model(model, plain, modules),
        config=dict(plain) if isinstance(plain, Mapping) else None,
        base_model=getattr(config, "_name_or_path", None) or None,
        task_type=_task_type(model, model_type),
        unfit=_unfit(model_type, modules),
    )


def _language_model(
    model: Any, config: object, modules: Mapping[str, nn.Module]
) -> tuple[str, ...] | None:
    """Return the names of the language model and of its head, in a model of several parts."""
    if not isinstance(config, Mapping) or "text_config" not in config:
        return None
    try:
        parts = [model.get_decoder(), model.get_output_embeddings()]
    except (AttributeError, NotImplementedError):  # not of transformers, or without one
        return None
    known = [id(part) for part in parts if part is not None and part is not model]
    return tuple(name for name, module in modules.items() if id(module) in known) or None


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
    known = (nn.Embedding, *_CONVOLUTIONS)
    classes = {cls for cls in set(map(type, modules.values())) if issubclass(cls, known)}
    if model_type not in _MAMBA and classes <= {nn.Embedding}:
        return None
    return lambda name: _why_unfit(model_type, modules.get(name), name)


def _why_unfit(model_type: object, module: nn.Module | None, name: str) -> str:
    """Return why PEFT would refuse a module, fail, or compute something else than W + delta."""
    if module is None:
        return ""
    if model_type in _MAMBA and leaf(name) in _NOT_IN_MAMBA:
        return f"it refuses every '{leaf(name)}' in models of the type '{model_type}'"
    cls = plain_class(type(module))
    own = f"{cls.__name__} has a forward of its own, which is not linear in W"
    if isinstance(module, nn.Embedding):  # whose scale PEFT knows by this name
        known = KINDS["embedding"].stock(cls) or hasattr(module, "embed_scale")
        return "" if known else own
    return _why_no_convolution(module, cls, own) if isinstance(module, _CONVOLUTIONS) else ""


def _why_no_convolution(module: Any, cls: type[nn.Module], own: str) -> str:
    """Return the same of a convolution; `own` is what a forward of its own is."""
    if module.groups > 1:
        problem = f"its A reads the inputs of all {module.groups} groups"
        return f"{problem}, and a rank that they do not divide is refused"
    if any(step != 1 for step in module.dilation):
        return "its A is not dilated"
    if module.padding_mode != "zeros":
        return f"its A pads with zeros, and the layer with padding_mode={module.padding_mode!r}"
    if "__init__" in vars(cls) and cls not in _CONVOLUTIONS:
        return f"it makes A and B as {cls.__name__}, whose arguments are not a convolution's"
    return "" if _convolving(cls) in map(_convolving, _CONVOLUTIONS) else own


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


def refuse_misread(survey: Survey, name: str, client: str = "PEFT") -> None:
    """Raise if PEFT would load the adapter's file without an error and compute other outputs.

    This happens where it computes otherwise than here (`_otherwise`), and where it would look for
    a site under another name. `client` is PEFT, or a program that uses its layers.
    """
    renamed, places = _renaming(survey.model), _places(survey)
    called = attentions(e.spec for _, _, e in entries(survey, name) if e.spec is not None)
    for path, module, entry in entries(survey, name):
        if entry.spec is None:
            continue
        spec = entry.spec
        if spec.kind == "linear" and spec.update == "weight":  # which is written as a parameter
            spec = replace(spec, kind="parameter")
        attention = called.get(spec.name) if client == "PEFT" else None
        problem = _otherwise(survey, spec, module, places, attention)
        key = f"{path}.lora_A.weight"
        if not problem and not key.endswith(there := renamed(key)):
            problem = "it renames the keys of this model's files (of its own, too), and would look "
            problem += f"for it at {there!r}"
        if problem:
            asked = f"write adapter {name!r}, site {entry.spec.name!r}"
            problem = f"{client} would load it wrong: {problem}"
            remedy = 'Write it with format="native": save_adapter(model, path, format="native")'
            raise FormatError(asked, problem, remedy)


def refuse_other_outputs(survey: Survey, state: AdapterState, asked: str) -> None:
    """Raise if the program that made a fitted adapter's file computes something else with it.

    Where a site's update is zero, nothing differs. What only a run shows, a read of the weight by
    another module, is refused when a forward does it: see `AdapterState.layers`.
    """
    if not state.layers:
        return
    places, called = _places(survey), attentions(s.spec for s in state.sites.values())
    for site in state.sites.values():
        module = survey.at(site.spec.weight).module
        problem = _otherwise(survey, site.spec, module, places, called.get(site.spec.name))
        if problem and not site.is_zero:
            made = f"its file is of {state.layers}, which computes something else than W + delta"
            shared = places[id(module)] > 1
            remedy = "Give each place a layer of its own, with copy.deepcopy. " * shared + AS_NATIVE
            raise FormatError(f"{asked}, site {site.spec.name!r}", f"{made}: {problem}", remedy)


def _otherwise(
    survey: Survey,
    spec: SiteSpec,
    module: nn.Module,
    places: Mapping[int, int],
    attention: str | None,
) -> str:
    """Return why PEFT's layers compute something else at a site than W + delta, or "".

    They add to the output of the layer that is called, or put W + delta into a parameter while the
    module that owns it runs. `places` are those of each module; `attention` is the one whose two
    projections PEFT adapts together, if the site is one of them.
    """
    if (n := places[id(module)]) > 1:
        return f"its layer stands in {n} places of the model, and PEFT adapts only the first"
    if attention is not None:
        known = isinstance(survey.by_name[attention], nn.MultiheadAttention)
        return "" if known else f"it knows the attention of torch.nn only, and {attention!r} is not"
    attached, param = attached_to(module), leaf(spec.weight)
    seen = attached.read_from_outside if attached is not None else ()
    if seen and any(e.mark in seen and e.param == param for e in attached.entries()):  # type: ignore[union-attr]
        return "another module reads the weight, and nothing would call the adapter"
    if spec.kind == "parameter":
        return ""
    model_type = getattr(getattr(survey.model, "config", None), "model_type", None)
    if reason := _why_unfit(model_type, module, spec.name):
        return reason
    if spec.kind in ("linear", "conv1d") and spec.update == "weight":
        cls = plain_class(type(module))
        if isinstance(module, NonDynamicallyQuantizableLinear):
            return "an attention reads the weight, and nothing would call the adapter"
        return f"{cls.__name__} has a forward of its own, which is not known to be linear in W"
    return ""


def _places(survey: Survey) -> Counter[int]:
    """Return in how many places of the model each module stands, by its id.

    What PEFT puts in the place of a shared container's child is seen under all names of it.
    """
    return Counter(id(child) for _, m in survey.modules for child in m._modules.values())


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
