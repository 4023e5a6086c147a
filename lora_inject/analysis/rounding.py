"""What rounding or quantizing the merged weight leaves of a delta.

A model of 16, 8 or 4 bits holds `Q(W)`, and after merging `Q(W + D)`. The effective delta is their
difference, measured as in a merge: `kept` is `<Q(W + D) - Q(W), D> / <D, D>`, `error` is
`|Q(W + D) - Q(W) - D| / |D|`. If W is stored in that format, `Q(W) = W`, and both are what `merge`
reports.

The formats are round trips, values in and values out:

- `bfloat16`, `float16`: to the nearest, ties to even.
- `int8`: whole numbers from -127 to 127 times a scale for each row of the stored matrix, which is
  the row's largest absolute value over 127.
- `int4`: whole numbers from -7 to 7 times a scale for each 64 consecutive values of a row,
  likewise.

W and W + D have scales of their own: quantizing comes after merging.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from lora_inject.analysis.blocks import Figures
from lora_inject.core.functional.rounded_fold import Tally
from lora_inject.errors import StateError

INT4_GROUP = 64


@dataclass(frozen=True)
class Rounded(Figures):
    """What a format leaves of a delta.

    Attributes:
        kept: 1 if the delta survived, 0 if it was rounded away, NaN if a value overflows. If steps
            are larger than the delta, it may be far above 1 or below 0 by chance: see `likeness`.
        error: Relative error of the effective delta; above 1 if rounding noise is larger than D.
    """

    kept: float
    error: float

    @property
    def likeness(self) -> float:
        """Cosine between what the weights got and the delta: 1 is all of it and nothing else.

        Follows from the two: `|Q(W + D) - Q(W)|^2 / |D|^2 = error^2 + 2 kept - 1`.
        """
        square = self.error**2 + 2 * self.kept - 1
        return 0.0 if square <= 0 else self.kept / math.sqrt(square)  # 0: nothing changed


def rounding(weight: Tensor, delta: Tensor) -> dict[str, Rounded]:
    """Return what each format leaves of a delta after merging.

    Args:
        weight: W, two dimensions, as the file stores it (the scales of `int8` and `int4` go by its
            rows).
        delta: D, of the same shape and orientation.

    Returns:
        Name from `FORMATS` to what it leaves.

    Raises:
        StateError: The shapes differ.

    Examples:
        >>> W, D = torch.ones(2, 64), torch.full((2, 64), 0.001)
        >>> rounding(W, D)["bfloat16"].kept  # 1.001 is not a number of 8 bits
        0.0
    """
    if weight.shape != delta.shape or weight.dim() != 2:
        problem = f"W is {list(weight.shape)}, the delta {list(delta.shape)}"
        raise StateError("round a merged weight", problem, "Give two matrices of one shape")
    return rounding_of_rows([(weight, delta)])


def rounding_of_rows(rows: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Rounded]:
    """Return what roundings lose of a weight in blocks of rows of W and of D, `(n, cols)`."""
    tallies = {name: Tally() for name in FORMATS}
    for some, delta in rows:
        wide = torch.float64 if some.dtype == torch.float64 else torch.float32
        before, change = some.detach().to(wide), delta.detach().to(wide)
        wanted = before + change
        for name, tally in tallies.items():
            base = FORMATS[name](before)
            tally.count(base, change, change - (FORMATS[name](wanted) - base))
    return {name: Rounded(tally.kept, tally.error) for name, tally in tallies.items()}


def _by_largest(values: Tensor, levels: int) -> Tensor:
    """Round to `levels` steps on either side of zero; the last dimension shares a scale."""
    scale = values.abs().amax(-1, keepdim=True) / levels
    scale = torch.where(scale > 0, scale, 1.0)
    return (values / scale).round_().mul_(scale)


def _int4(values: Tensor) -> Tensor:
    n_cols = values.shape[1]
    padded = torch.nn.functional.pad(values, (0, -n_cols % INT4_GROUP))
    groups = padded.reshape(len(values), -1, INT4_GROUP)
    return _by_largest(groups, 7).reshape(len(values), -1)[:, :n_cols]


FORMATS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "bfloat16": lambda values: values.bfloat16().to(values.dtype),
        "float16": lambda values: values.half().to(values.dtype),
        "int8": lambda values: _by_largest(values, 127),
        "int4": _int4,
    }
)
"""Name to the round trip on rows of a float32 or float64 matrix."""
