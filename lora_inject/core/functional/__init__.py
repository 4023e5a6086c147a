"""The arithmetic: low-rank forward and backward, effective weight, dense delta, and merging.

The same fact, `W' = W + scale * B @ A`, is stated once for each use. `linear` adds the
update to a layer's output and never forms the delta (arXiv:2106.09685, eq. 3); `embedding` for
looked-up rows; `weight` forms `W'` where a model reads the weight instead of calling the layer;
`fold` adds the delta to rows of W for merging.
"""

from lora_inject.core.functional.factors import Factors, master_dtype
from lora_inject.core.functional.fold import (
    Delta,
    Tally,
    Term,
    all_finite,
    block_rows,
    fold_rows,
    mix_copies,
)
from lora_inject.core.functional.gain import Gain, norms_of
from lora_inject.core.functional.linear import add_updates, linear
from lora_inject.core.functional.lookup import embedding
from lora_inject.core.functional.merge_report import MergeReport, TensorReport
from lora_inject.core.functional.weight import dense_delta, effective_weight

__all__ = [
    "Delta",
    "Factors",
    "Gain",
    "MergeReport",
    "Tally",
    "TensorReport",
    "Term",
    "add_updates",
    "all_finite",
    "block_rows",
    "dense_delta",
    "effective_weight",
    "embedding",
    "fold_rows",
    "linear",
    "master_dtype",
    "mix_copies",
    "norms_of",
]
