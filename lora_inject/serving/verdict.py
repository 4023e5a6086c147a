"""What computed values say about an adapter: with it, without it, scaled by k, or something else.

1. The values of a proof at its strengths, joined by straight lines, are a path from the base
   through the adapter and beyond.
2. The nearest point of that path to the values that were computed has a strength k, and a distance.
3. `with` and `without` hold within the tolerance of strength 1 and 0. Where the distance from the
   path is within it, or within a quarter of the piece of the path that k is on, the adapter is
   there scaled by about k. Anything else is neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor

from lora_inject.core.spec.tables import wrapped
from lora_inject.errors import StateError
from lora_inject.formats.proof import Proof, rms

Word = Literal["with", "without", "scaled", "neither"]
_SMALL = 10  # of the adapter's effect: what a tenth changes is no other adapter
_NEAR = 4  # of a piece of the path, which is bent where the proof has a straight line


@dataclass(frozen=True)
class Verdict:
    """What was computed, compared with the proof of an adapter.

    Attributes:
        word: `with`, `without`, `scaled` or `neither`.
        scale: By how much the adapter is multiplied, as far as can be told; None for `neither`.
        from_adapter: Distance of the values from those with the adapter (root of a mean square).
        from_base: Distance from those without it.
        from_path: Distance from those with the adapter at its best scale.
        effect: Distance between the two, of the same places.
        tolerance: What rounding explains.
        n: How many values were compared.
        what: What the values are.
        notes: What a server did not return, or what else limits the comparison.
    """

    word: Word
    scale: float | None
    from_adapter: float
    from_base: float
    from_path: float
    effect: float
    tolerance: float
    n: int
    what: str
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the adapter is there, as it was saved."""
        return self.word == "with"

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {**asdict(self), "notes": [*self.notes], "ok": self.ok}

    def text(self, width: int = 80) -> str:
        """Return it in words, in lines that fit."""
        return "\n".join(wrapped(str(self), width))

    def __str__(self) -> str:
        """Say it in words, with the distances."""
        said = {
            "with": "with the adapter",
            "without": "without the adapter",
            "scaled": f"with the adapter scaled by about {self.scale or 0:.2g}",
            "neither": "neither with the adapter nor without it",
        }[self.word]
        distances = (
            f"{self.n} {self.what} differ by {self.from_adapter:.2g} from those with the adapter "
            f"and by {self.from_base:.2g} from those without it; the two differ by "
            f"{self.effect:.2g}, and the tolerance is {self.tolerance:.2g}"
        )
        if self.word == "neither":
            distances += f"; at its best scale the adapter differs by {self.from_path:.2g}"
        return ". ".join([f"{said}: {distances}", *self.notes])


def judge(
    proof: Proof,
    residuals: Sequence[Tensor],
    what: str,
    *,
    dtype: str | None = None,
    same_program: bool = False,
    notes: Sequence[str] = (),
) -> Verdict:
    """Compare what was computed with a proof.

    Args:
        proof: The proof of the adapter.
        residuals: For each of its strengths, the computed values less those of the proof, float64
            `(n,)`.
        what: What the values are, for the words.
        dtype: What they were computed in; by default as in the proof.
        same_program: Whether what made the proof computed this as well, so that rounding explains
            less than a tenth of the effect, by which servers may differ.
        notes: For the verdict.

    Examples:
        >>> values = [[0.0, 0.0], [1.0, 2.0], [2.0, 4.0]]
        >>> rest = {"texts": [], "pieces": [], "ahead": [], "vocabulary": 9}
        >>> proof = Proof(strengths=[0.0, 1.0, 2.0], values=values, prompts=[[1, 2, 3]],
        ...     dtype="float32", size=1.0, **rest)
        >>> computed = 1.5 * proof.at(1.0)
        >>> verdict = judge(proof, [computed - proof.at(k) for k in proof.strengths], "numbers")
        >>> verdict.word, verdict.scale
        ('scaled', 1.5)
    """
    base, adapter = (residuals[proof.strengths.index(k)] for k in (0.0, 1.0))
    effect = rms(base - adapter)
    noise = proof.noise(dtype)
    tolerance = noise if same_program else max(noise, effect / _SMALL)
    if effect <= 2 * tolerance:
        raise StateError(
            "compare with the proof",
            f"with and without the adapter these {len(adapter)} {what} differ by {effect:.2g}, of "
            f"which rounding in {dtype or proof.dtype} alone explains {noise:.2g}: they tell "
            "nothing",
            "Compute in a wider dtype, or save the adapter with a probe on which it acts",
        )
    scale, off, piece = _nearest(proof.strengths, residuals)
    word: Word = "neither"
    if rms(adapter) <= tolerance:
        word, scale = "with", 1.0
    elif rms(base) <= tolerance:
        word, scale = "without", 0.0
    elif off <= max(tolerance, piece / _NEAR) and scale < proof.strengths[-1]:
        word = "scaled"
    return Verdict(
        word=word,
        scale=None if word == "neither" else scale,
        from_adapter=rms(adapter),
        from_base=rms(base),
        from_path=off,
        effect=effect,
        tolerance=tolerance,
        n=len(adapter),
        what=what,
        notes=(*notes, *_hint(word, rms(adapter), proof, dtype)),
    )


def _nearest(strengths: Sequence[float], residuals: Sequence[Tensor]) -> tuple[float, float, float]:
    """Return the strength of the path's nearest point, its distance, and its piece's length."""
    best = (0.0, float("inf"), 0.0)
    for i in range(len(strengths) - 1):
        start, step = residuals[i], residuals[i + 1] - residuals[i]
        length = float(step.square().sum())
        share = min(max(-float(start @ step) / length, 0.0), 1.0) if length else 0.0
        off = rms(start + share * step)
        if off < best[1]:
            between = strengths[i] + share * (strengths[i + 1] - strengths[i])
            best = (between, off, rms(step))
    return best


def _hint(word: Word, off: float, proof: Proof, dtype: str | None) -> Sequence[str]:
    """Say where a narrower dtype would explain the distance."""
    narrow = next((d for d in ("float16", "bfloat16") if off <= proof.noise(d)), None)
    if word != "neither" or narrow is None or narrow == (dtype or proof.dtype):
        return ()
    return (f"If it computes in {narrow}, say so: dtype={narrow!r} explains the distance",)
