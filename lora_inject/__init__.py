"""LoRA adapters on any torch module: inject, train, switch, save, load, merge, exactly.

The verbs are functions on the model, and the model is the only state. Importing this package does
not import transformers or peft, nor any file of its own before a name from it is asked for: the
commands on checkpoints start without what only models need.
"""

import importlib
from typing import Any

from lora_inject.version import __version__ as __version__

_HOMES = {
    "core.adapter.site_state": "SiteState",
    "core.adapter.state": "AdapterState",
    "core.spec.variants": "Variant register_variant",
    "checkpoint.conversion": "check_adapter convert",
    "checkpoint.extract": "extract_adapter",
    "checkpoint.merge": "MergedFiles merge_checkpoint",
    "checkpoint.merge_inputs": "MergeOptions",
    "errors": "CheckpointError ConfigError FormatError LayerError LoraInjectError MatchError "
    "ServerError StateError",
    "formats.exchange": "read_adapter register_format write_adapter",
    "algebra.combining": "combine diff truncate",
    "algebra.other_shapes": "as_dtype join join_experts rename split split_experts subset",
    "core.functional.merge_report": "MergeReport",
    "experts.kept_packed": "packed_experts",
    "core.spec.expert_profile": "ExpertProfile",
    "experts.profile": "profile_experts",
    "integrations.trainer": "AdapterCheckpoint",
    "integrations.trl": "reference sync_merged",
    "core.layers.adapted": "WeightUpdate",
    "core.layers.kinds": "LoRALinear register_kind",
    "core.model.eject": "eject",
    "core.model.inject": "inject plan",
    "core.model.listing": "adapters summary",
    "core.model.merge": "merge merged_weights",
    "core.model.undo": "unmerge",
    "core.model.used": "unreached",
    "core.model.load": "install load_adapter",
    "core.model.read_off": "adapter_state",
    "core.model.save": "save_adapter",
    "formats.from_peft": "from_peft",
    "integrations.publishing": "push",
    "core.roots.selecting": "activate disabled",
    "core.model.stages": "inject_stages load_stages save_stages",
    "core.model.swap": "swap_adapter",
    "core.model.training": "adapter_parameters parameter_groups train_only",
    "core.spec.config": "Config Expect Rule",
    "core.spec.plan": "Plan",
    "core.spec.sites": "Geometry",
    "serving.peft_state": "peft_state",
    "core.model.slots": "reserve",
    "serving.verdict": "Verdict",
    "serving.verifying": "verify_loaded verify_served",
    "trials.space": "Space",
    "rows.routed": "routed",
    "trials.advise": "advise",
    "trials.losses": "causal_loss",
    "trials.trial": "Trial",
    "trials.runs": "Trials",
    "trials.search": "Search search",
}
"""File to the public names that it has; `__init__.pyi` says the same to type checkers."""

_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}
__all__ = sorted([*_HOME, "__version__"])  # noqa: PLE0605  (a list, made of the table)


def __getattr__(name: str) -> Any:
    """Import the file that a public name comes from when it is first asked for (PEP 562)."""
    if name == "analysis":
        return importlib.import_module("lora_inject.analysis")
    if name not in _HOME:
        raise importlib.import_module("lora_inject.integrations.peft_names").lacking(name, _HOME)
    value = getattr(importlib.import_module(f"lora_inject.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, for completion."""
    return sorted([*_HOME, "analysis", "__version__", "__doc__", "__file__", "__path__"])
