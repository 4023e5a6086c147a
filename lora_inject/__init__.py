"""LoRA adapters on any torch module: inject, train, switch, save, load, merge, exactly.

The verbs are functions on the model, and the model is the only state. Importing this package does
not import transformers or peft, nor any file of its own before a name from it is asked for: the
commands on checkpoints start without what only models need.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lora_inject.version import __version__

if TYPE_CHECKING:
    from lora_inject import analysis as analysis
    from lora_inject.adapter.site_state import SiteState
    from lora_inject.adapter.state import AdapterState
    from lora_inject.adapter.variants import Variant, register_variant
    from lora_inject.checkpoint.conversion import check_adapter, convert
    from lora_inject.checkpoint.extract import extract_adapter
    from lora_inject.checkpoint.merge_files import merge_checkpoint
    from lora_inject.checkpoint.options import MergeOptions
    from lora_inject.errors import (
        CheckpointError,
        ConfigError,
        FormatError,
        LayerError,
        LoraInjectError,
        MatchError,
        StateError,
    )
    from lora_inject.formats import read_adapter, register_format, write_adapter
    from lora_inject.formats.combine_files import combine, diff, truncate
    from lora_inject.functional.merge_report import MergeReport
    from lora_inject.integrations.mxfp4 import packed_experts
    from lora_inject.integrations.trainer import AdapterCheckpoint
    from lora_inject.integrations.trl import reference
    from lora_inject.layers.kinds import register_kind
    from lora_inject.model.eject import eject
    from lora_inject.model.inject import inject, plan
    from lora_inject.model.listing import adapters, summary
    from lora_inject.model.load import install, load_adapter
    from lora_inject.model.merge import merge, merged_weights, unmerge
    from lora_inject.model.reached import unreached
    from lora_inject.model.save import adapter_state, push, save_adapter
    from lora_inject.model.select import activate, disabled, routed
    from lora_inject.model.swap import swap_adapter
    from lora_inject.model.train import adapter_parameters, parameter_groups, train_only
    from lora_inject.spec.config import Config, Expect, Rule
    from lora_inject.spec.plan import Plan
    from lora_inject.spec.space import Space
    from lora_inject.trials.advise import advise
    from lora_inject.trials.losses import causal_loss
    from lora_inject.trials.runs import Trials
    from lora_inject.trials.search import Search, search
    from lora_inject.trials.trial import Trial

__all__ = [
    "AdapterCheckpoint",
    "AdapterState",
    "CheckpointError",
    "Config",
    "ConfigError",
    "Expect",
    "FormatError",
    "LayerError",
    "LoraInjectError",
    "MatchError",
    "MergeOptions",
    "MergeReport",
    "Plan",
    "Rule",
    "Search",
    "SiteState",
    "Space",
    "StateError",
    "Trial",
    "Trials",
    "Variant",
    "__version__",
    "activate",
    "adapter_parameters",
    "adapter_state",
    "adapters",
    "advise",
    "causal_loss",
    "check_adapter",
    "combine",
    "convert",
    "diff",
    "disabled",
    "eject",
    "extract_adapter",
    "inject",
    "install",
    "load_adapter",
    "merge",
    "merge_checkpoint",
    "merged_weights",
    "packed_experts",
    "parameter_groups",
    "plan",
    "push",
    "read_adapter",
    "reference",
    "register_format",
    "register_kind",
    "register_variant",
    "routed",
    "save_adapter",
    "search",
    "summary",
    "swap_adapter",
    "train_only",
    "truncate",
    "unmerge",
    "unreached",
    "write_adapter",
]

_HOMES = {
    "adapter.site_state": "SiteState",
    "adapter.state": "AdapterState",
    "checkpoint.conversion": "check_adapter convert",
    "adapter.variants": "Variant register_variant",
    "checkpoint.extract": "extract_adapter",
    "checkpoint.merge_files": "merge_checkpoint",
    "checkpoint.options": "MergeOptions",
    "errors": "CheckpointError ConfigError FormatError LayerError LoraInjectError MatchError "
    "StateError",
    "formats": "read_adapter register_format write_adapter",
    "formats.combine_files": "combine diff truncate",
    "functional.merge_report": "MergeReport",
    "integrations.mxfp4": "packed_experts",
    "integrations.trainer": "AdapterCheckpoint",
    "integrations.trl": "reference",
    "layers.kinds": "register_kind",
    "model.eject": "eject",
    "model.inject": "inject plan",
    "model.listing": "adapters summary",
    "model.merge": "merge merged_weights unmerge",
    "model.reached": "unreached",
    "model.load": "install load_adapter",
    "model.save": "adapter_state push save_adapter",
    "model.select": "activate disabled routed",
    "model.swap": "swap_adapter",
    "model.train": "adapter_parameters parameter_groups train_only",
    "spec.config": "Config Expect Rule",
    "spec.plan": "Plan",
    "spec.space": "Space",
    "trials.advise": "advise",
    "trials.losses": "causal_loss",
    "trials.trial": "Trial",
    "trials.runs": "Trials",
    "trials.search": "Search search",
}
"""File to the public names that it has; the imports above say the same to type checkers."""

_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Import the file that a public name comes from when it is first asked for (PEP 562)."""
    if name == "analysis":
        return importlib.import_module("lora_inject.analysis")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"lora_inject.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__, "analysis"]
