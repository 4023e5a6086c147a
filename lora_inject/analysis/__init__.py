"""What an adapter has learned: spectra, subspaces, amplification, and what rounding leaves of it.

Every figure is a pure function of tensors or of an `AdapterState`; W is needed by few of
them, and is then streamed from a checkpoint. Nothing here needs a model.
"""

from lora_inject.analysis.blocks import SHARES, SiteBlock, Spectrum, site_blocks, spectrum
from lora_inject.analysis.drawings import draw_similarity, draw_spectra, need_matplotlib
from lora_inject.analysis.figures import Analysis, Finding, analyze, findings
from lora_inject.analysis.gallery import draw_gallery
from lora_inject.analysis.inspection import Inspection, inspect_state
from lora_inject.analysis.report.write_page import report, write_report
from lora_inject.analysis.rounding import FORMATS, Rounded, rounding
from lora_inject.analysis.subspaces import (
    Comparison,
    across_layers,
    compare,
    directions,
    gaussian_similarity,
    similarity,
    subspace_similarity,
)
from lora_inject.analysis.weights import Amplification, Weights, amplification
from lora_inject.core.adapter.svd import ThinProduct

__all__ = [
    "FORMATS",
    "SHARES",
    "Amplification",
    "Analysis",
    "Comparison",
    "Finding",
    "Inspection",
    "Rounded",
    "SiteBlock",
    "Spectrum",
    "ThinProduct",
    "Weights",
    "across_layers",
    "amplification",
    "analyze",
    "compare",
    "directions",
    "draw_gallery",
    "draw_similarity",
    "draw_spectra",
    "findings",
    "gaussian_similarity",
    "inspect_state",
    "need_matplotlib",
    "report",
    "rounding",
    "similarity",
    "site_blocks",
    "spectrum",
    "subspace_similarity",
    "write_report",
]
