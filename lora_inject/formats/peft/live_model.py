"""Facts about a live model that files depend on: names, config, and PEFT's view of it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

from torch import nn


def options_for_reading(
    modules: Mapping[str, nn.Module], tensor_names: Iterable[str]
) -> dict[str, Any]:
    """Return the options of `read` that a model answers; modules and tensors by all their names.

    That a module holds experts as (experts, in, out) is said by its class, by transformers'
    `is_transposed`; PEFT goes by the same attribute.
    """
    turned = tuple(name for name, m in modules.items() if getattr(m, "is_transposed", False))
    return {
        "tensor_names": tuple(tensor_names),
        "transposed_modules": turned,
        "module_names": tuple(name for name in modules if name),
    }


def options_for_writing(
    model: nn.Module, modules: Mapping[str, nn.Module], tensor_names: Iterable[str]
) -> dict[str, Any]:
    """Return the options of `write` that a model answers."""
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    return options_for_reading(modules, tensor_names) | {
        "config": plain_config(model),
        "expert_names": expert_names(model),
        "base_model": getattr(config, "_name_or_path", None) or None,
        "task_type": _task_type(model, model_type),
    }


def plain_config(model: nn.Module) -> dict[str, Any] | None:
    """Return a model's config as plain data, as its config.json has it; None without one."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        found: dict[str, Any] = config.to_dict()
        return found
    return dict(config) if isinstance(config, Mapping) else None


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
    try:
        table = import_module("transformers.conversion_mapping")._MODEL_TO_CONVERSION_PATTERN
    except (ImportError, AttributeError):
        return {}  # transformers 4 has no stacked experts, and PEFT renames nothing
    family = "mixtral" if model_type == "mixtral" else table.get(model_type)
    return _EXPERT_NAMES.get(family, {})


_TASKS = {
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "CAUSAL_LM",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": "SEQ_2_SEQ_LM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "SEQ_CLS",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "TOKEN_CLS",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": "QUESTION_ANS",
}


def _task_type(model: nn.Module, model_type: str | None) -> str | None:
    """Return PEFT's task type of a model whose class transformers registers for one task."""
    if model_type is None or "transformers" not in sys.modules:
        return None
    auto = import_module("transformers.models.auto.modeling_auto")
    classes = {cls.__name__ for cls in type(model).__mro__}
    for table, task in _TASKS.items():
        if getattr(auto, table, {}).get(model_type) in classes:
            return task
    return None
