"""What an adapter has learned: spectra, subspaces, amplification, and what rounding leaves of it.

Every figure is a pure function of tensors or of an `AdapterState`; W is needed by few of
them, and is then streamed from a checkpoint. Nothing here needs a model.
"""

from lora_inject.analysis.amplifying import Amplification, amplification, amplification_of_rows
from lora_inject.analysis.comparison import Comparison, Overlap, Pair, across_layers, compare
from lora_inject.analysis.figures import Analysis, BlockFigures, analyze
from lora_inject.analysis.findings import Finding, findings
from lora_inject.analysis.gallery import draw_gallery
from lora_inject.analysis.inspection import Inspection, inspect_state
from lora_inject.analysis.pictures import (
    Panel,
    draw_panels,
    figure_ranks,
    figure_seeds,
    figure_spectra,
    figure_weight,
    need_matplotlib,
    zoomed,
)
from lora_inject.analysis.places import Place, place_of
from lora_inject.analysis.report.write_page import report, write_report
from lora_inject.analysis.rounding import FORMATS, Rounded, RoundingTally, rounding
from lora_inject.analysis.spectra import SHARES, Spectrum, spectrum, spectrum_of
from lora_inject.analysis.subspaces import (
    block_directions,
    deviation_of_similarity,
    directions,
    expected_similarity,
    gaussian_similarity,
    similarity,
    subspace_similarity,
)
from lora_inject.analysis.thin import SiteBlock, ThinProduct, site_blocks
from lora_inject.analysis.weights import BlockOnWeight, SiteOnWeight, Weights

__all__ = [
    "FORMATS",
    "SHARES",
    "Amplification",
    "Analysis",
    "BlockFigures",
    "BlockOnWeight",
    "Comparison",
    "Finding",
    "Inspection",
    "Overlap",
    "Pair",
    "Panel",
    "Place",
    "Rounded",
    "RoundingTally",
    "SiteBlock",
    "SiteOnWeight",
    "Spectrum",
    "ThinProduct",
    "Weights",
    "across_layers",
    "amplification",
    "amplification_of_rows",
    "analyze",
    "block_directions",
    "compare",
    "deviation_of_similarity",
    "directions",
    "draw_gallery",
    "draw_panels",
    "expected_similarity",
    "figure_ranks",
    "figure_seeds",
    "figure_spectra",
    "figure_weight",
    "findings",
    "gaussian_similarity",
    "inspect_state",
    "need_matplotlib",
    "place_of",
    "report",
    "rounding",
    "similarity",
    "site_blocks",
    "spectrum",
    "spectrum_of",
    "subspace_similarity",
    "write_report",
    "zoomed",
]
