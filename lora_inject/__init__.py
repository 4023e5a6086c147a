"""LoRA adapters on any torch module: inject, train, switch, save, load, merge, exactly.

The verbs are functions on the model, and the model is the only state. Importing this package does
not import transformers or peft.
"""

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
from lora_inject.switching import activate, disabled, routed, unreached
from lora_inject.version import __version__

__all__ = [
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
    "train_only",
    "unmerge",
    "unreached",
]
