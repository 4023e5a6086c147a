"""Classes that the functions of the package take and return: for annotations and `isinstance`.

Nobody needs one to call a function: it takes a dict or a path in its place, and returns the rest.
"""

from lora_inject.checkpoint.merge import MergedFiles
from lora_inject.checkpoint.merge_inputs import MergeOptions
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.functional.merge_report import MergeReport
from lora_inject.core.spec.config import Expect, Rule
from lora_inject.core.spec.plan import Plan
from lora_inject.serving.verifying import Verdict

__all__ = [
    "Expect",
    "MergeOptions",
    "MergeReport",
    "MergedFiles",
    "Plan",
    "Rule",
    "SiteState",
    "Verdict",
]
