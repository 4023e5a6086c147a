"""LoRA adapters on any torch module: inject, train, switch, save, load, merge, exactly.

The verbs are functions on the model, and the model is the only state. Importing this package does
not import transformers or peft, nor any file of its own before a name from it is asked for: the
commands on checkpoints start without what only models need.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lora_inject.version import __version__ as __version__

if TYPE_CHECKING:
    from lora_inject import analysis as analysis
    from lora_inject.algebra.combine_files import combine as combine
    from lora_inject.algebra.combine_files import diff as diff
    from lora_inject.algebra.combine_files import truncate as truncate
    from lora_inject.checkpoint.conversion import check_adapter as check_adapter
    from lora_inject.checkpoint.conversion import convert as convert
    from lora_inject.checkpoint.extract import extract_adapter as extract_adapter
    from lora_inject.checkpoint.merge_files import merge_checkpoint as merge_checkpoint
    from lora_inject.checkpoint.merge_inputs import MergeOptions as MergeOptions
    from lora_inject.checks.reached import unreached as unreached
    from lora_inject.core.adapter.exchange import read_adapter as read_adapter
    from lora_inject.core.adapter.exchange import write_adapter as write_adapter
    from lora_inject.core.adapter.own_formats import register_format as register_format
    from lora_inject.core.adapter.site_state import SiteState as SiteState
    from lora_inject.core.adapter.state import AdapterState as AdapterState
    from lora_inject.core.adapter.variants import Variant as Variant
    from lora_inject.core.adapter.variants import register_variant as register_variant
    from lora_inject.core.functional.merge_report import MergeReport as MergeReport
    from lora_inject.core.layers.adapted import WeightUpdate as WeightUpdate
    from lora_inject.core.layers.linear_kinds import LoRALinear as LoRALinear
    from lora_inject.core.layers.own_kinds import register_kind as register_kind
    from lora_inject.core.model.disabling import disabled as disabled
    from lora_inject.core.model.eject import eject as eject
    from lora_inject.core.model.inject import inject as inject
    from lora_inject.core.model.inject import plan as plan
    from lora_inject.core.model.listing import adapters as adapters
    from lora_inject.core.model.listing import summary as summary
    from lora_inject.core.model.load import install as install
    from lora_inject.core.model.load import load_adapter as load_adapter
    from lora_inject.core.model.merge import merge as merge
    from lora_inject.core.model.merge import unmerge as unmerge
    from lora_inject.core.model.merged_weights import merged_weights as merged_weights
    from lora_inject.core.model.optimizing import parameter_groups as parameter_groups
    from lora_inject.core.model.parameters import adapter_parameters as adapter_parameters
    from lora_inject.core.model.read_off import adapter_state as adapter_state
    from lora_inject.core.model.save import save_adapter as save_adapter
    from lora_inject.core.model.select import activate as activate
    from lora_inject.core.model.swap import swap_adapter as swap_adapter
    from lora_inject.core.model.train import train_only as train_only
    from lora_inject.core.spec.config import Config as Config
    from lora_inject.core.spec.config import Expect as Expect
    from lora_inject.core.spec.config import Rule as Rule
    from lora_inject.core.spec.plan import Plan as Plan
    from lora_inject.core.spec.sites import Geometry as Geometry
    from lora_inject.errors import CheckpointError as CheckpointError
    from lora_inject.errors import ConfigError as ConfigError
    from lora_inject.errors import FormatError as FormatError
    from lora_inject.errors import LayerError as LayerError
    from lora_inject.errors import LoraInjectError as LoraInjectError
    from lora_inject.errors import MatchError as MatchError
    from lora_inject.errors import ServerError as ServerError
    from lora_inject.errors import StateError as StateError
    from lora_inject.experts.kept_packed import packed_experts as packed_experts
    from lora_inject.experts.profile import ExpertProfile as ExpertProfile
    from lora_inject.experts.profile import profile_experts as profile_experts
    from lora_inject.formats.publishing import push as push
    from lora_inject.integrations.trainer import AdapterCheckpoint as AdapterCheckpoint
    from lora_inject.integrations.trl import reference as reference
    from lora_inject.integrations.trl import sync_merged as sync_merged
    from lora_inject.rows.routed import routed as routed
    from lora_inject.serving.peft_state import peft_state as peft_state
    from lora_inject.serving.slots import reserve as reserve
    from lora_inject.serving.verdict import Verdict as Verdict
    from lora_inject.serving.verifying import verify_loaded as verify_loaded
    from lora_inject.serving.verifying import verify_served as verify_served
    from lora_inject.trials.advise import advise as advise
    from lora_inject.trials.losses import causal_loss as causal_loss
    from lora_inject.trials.runs import Trials as Trials
    from lora_inject.trials.search import Search as Search
    from lora_inject.trials.search import search as search
    from lora_inject.trials.space import Space as Space
    from lora_inject.trials.trial import Trial as Trial

_HOMES = {
    "core.adapter.site_state": "SiteState",
    "core.adapter.state": "AdapterState",
    "core.adapter.variants": "Variant register_variant",
    "checkpoint.conversion": "check_adapter convert",
    "checkpoint.extract": "extract_adapter",
    "checkpoint.merge_files": "merge_checkpoint",
    "checkpoint.merge_inputs": "MergeOptions",
    "errors": "CheckpointError ConfigError FormatError LayerError LoraInjectError MatchError "
    "ServerError StateError",
    "core.adapter.exchange": "read_adapter write_adapter",
    "core.adapter.own_formats": "register_format",
    "algebra.combine_files": "combine diff truncate",
    "core.functional.merge_report": "MergeReport",
    "experts.kept_packed": "packed_experts",
    "experts.profile": "ExpertProfile profile_experts",
    "integrations.trainer": "AdapterCheckpoint",
    "integrations.trl": "reference sync_merged",
    "core.layers.adapted": "WeightUpdate",
    "core.layers.own_kinds": "register_kind",
    "core.layers.linear_kinds": "LoRALinear",
    "core.model.eject": "eject",
    "core.model.inject": "inject plan",
    "core.model.listing": "adapters summary",
    "core.model.merge": "merge unmerge",
    "core.model.merged_weights": "merged_weights",
    "checks.reached": "unreached",
    "core.model.load": "install load_adapter",
    "core.model.read_off": "adapter_state",
    "core.model.save": "save_adapter",
    "formats.publishing": "push",
    "core.model.select": "activate",
    "core.model.disabling": "disabled",
    "core.model.swap": "swap_adapter",
    "core.model.train": "train_only",
    "core.model.parameters": "adapter_parameters",
    "core.model.optimizing": "parameter_groups",
    "core.spec.config": "Config Expect Rule",
    "core.spec.plan": "Plan",
    "core.spec.sites": "Geometry",
    "serving.peft_state": "peft_state",
    "serving.slots": "reserve",
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
"""File to the public names that it has; the imports above say the same to type checkers."""

_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}
if not TYPE_CHECKING:  # the imports above export to type checkers
    __all__ = sorted([*_HOME, "__version__"])  # noqa: PLE0605  (a list, made of the table)


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
    """Return the public names, for completion."""
    return sorted([*_HOME, "analysis", "__version__", "__doc__", "__file__", "__path__"])
