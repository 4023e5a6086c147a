"""How two bases differ, by their fingerprints: loaded where they are not equal."""

from __future__ import annotations

import math

from lora_inject.core.adapter.fingerprint import Fingerprint, Sampled, sample_positions

# bfloat16 keeps 8 significant bits: rounding moves a value by at most 2**-8 of itself. The saved
# and the found base may each have been rounded. The smallest step of float16 is 2**-24.
_RELATIVE = 2.0**-7
_ABSOLUTE = 2.0**-24


def base_differences(saved: Fingerprint, current: Fingerprint) -> dict[str, str]:
    """Return how weights of the base at hand differ from the one that an adapter was made on.

    Empty: the same base, as far as the values reach (see `unverifiable`).
    """
    differences = {
        name: _difference(there, current[name]) if name in current else "is not in this model"
        for name, there in saved.items()
    }
    return {name: how for name, how in differences.items() if how}


def _difference(there: Sampled, here: Sampled) -> str:
    """Return how a weight differs, "" if it does not as far as can be seen."""
    if there.packed and here.packed:
        packed, other = there.packed, here.packed  # shapes included
        same = packed == other
        return "" if same else f"is {packed[:300]} in the file and {other[:300]} here"
    if there.shape != here.shape:
        return f"has shape {there.shape} in the file and {here.shape} here"
    if there.values is None or here.values is None:
        return ""
    n = len(sample_positions(there.shape))
    if wrong := _differing(there.values[:n], here.values[:n]):
        return _words(wrong, n)
    in_both = there.moved == here.moved
    if in_both and (wrong := _differing(there.values[n:], here.values[n:])):
        return f"where the adapter moves it, {_words(wrong, len(wrong))}"
    return ""


def _differing(there: tuple[float, ...], here: tuple[float, ...]) -> list[tuple[float, float]]:
    """Return the pairs of values that differ by more than a rounding."""
    pairs = () if there == here else zip(there, here, strict=True)
    return [pair for pair in pairs if not _close(*pair)]


def _words(wrong: list[tuple[float, float]], n: int) -> str:
    first = "first {:.6g} in the file and {:.6g} here".format(*wrong[0])
    return f"{len(wrong)} of {n} sampled values differ, {first}"


def unverifiable(saved: Fingerprint, current: Fingerprint) -> tuple[str, ...]:
    """Names of weights that cannot be compared: quantized on one side only, sharded or on meta."""
    nothing = Sampled(())
    return tuple(n for n, there in saved.items() if not _alike(there, current.get(n, nothing)))


def _alike(there: Sampled, here: Sampled) -> bool:
    """Whether a weight is plain in both bases, or packed in both."""
    plain = there.values is not None and here.values is not None
    return plain or bool(there.packed and here.packed)


def _close(a: float, b: float) -> bool:
    if math.isfinite(a) and math.isfinite(b):
        return abs(a - b) <= _RELATIVE * max(abs(a), abs(b)) + _ABSOLUTE
    return a == b or (math.isnan(a) and math.isnan(b))
