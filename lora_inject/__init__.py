"""LoRA adapters on any torch module: inject, train, switch, save, load, merge, exactly.

The verbs are functions on the model, and the model is the only state. Importing this package does
not import transformers or peft.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lora_inject.config import Config, Expect, Rule
from lora_inject.errors import (
    CheckpointError,
    ConfigError,
    FormatError,
    LayerError,
    LoraInjectError,
    MatchError,
    StateError,
)
from lora_inject.merging import MergeReport, merge, unmerge
from lora_inject.plans import Plan
from lora_inject.saving import adapter_state, install, load_adapter, save_adapter
from lora_inject.state import AdapterState, SiteState
from lora_inject.surgery import (
    adapter_parameters,
    adapters,
    eject,
    inject,
    parameter_groups,
    plan,
    summary,
    train_only,
)
from lora_inject.swapping import swap_adapter
from lora_inject.switching import activate, disabled, routed, unreached
from lora_inject.training import AdapterCheckpoint
from lora_inject.version import __version__

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
    "MergeReport",
    "Plan",
    "Rule",
    "SiteState",
    "StateError",
    "__version__",
    "activate",
    "adapter_parameters",
    "adapter_state",
    "adapters",
    "disabled",
    "eject",
    "inject",
    "install",
    "load_adapter",
    "merge",
    "parameter_groups",
    "plan",
    "routed",
    "save_adapter",
    "summary",
    "swap_adapter",
    "train_only",
    "unmerge",
    "unreached",
]

if TYPE_CHECKING:
    from lora_inject import analysis as analysis
else:

    def __getattr__(name: str) -> Any:
        """Import `lora_inject.analysis` when it is first asked for: training does not need it."""
        if name == "analysis":
            return importlib.import_module("lora_inject.analysis")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
