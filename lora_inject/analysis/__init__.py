"""What an adapter has learned: spectra, its size, and what rounding leaves of it.

Every figure is a pure function of tensors or of an `AdapterState`; W is needed by few of
them, and is then streamed from a checkpoint. Nothing here needs a model.
"""

from lora_inject.algebra.svd import ThinProduct
from lora_inject.analysis.figures import Analysis, Finding, analyze
from lora_inject.analysis.inspection import Inspection, inspect_state
from lora_inject.analysis.numbers import (
    SHARES,
    SiteBlock,
    Spectrum,
    site_blocks,
    spectrum,
)
from lora_inject.analysis.page import report
from lora_inject.analysis.weights import FORMATS, Rounded

__all__ = [
    "FORMATS",
    "SHARES",
    "Analysis",
    "Finding",
    "Inspection",
    "Rounded",
    "SiteBlock",
    "Spectrum",
    "ThinProduct",
    "analyze",
    "inspect_state",
    "report",
    "site_blocks",
    "spectrum",
]
