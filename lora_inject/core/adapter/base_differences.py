"""How two bases differ, by their fingerprints: loaded where they are not equal."""

from __future__ import annotations

import math

from lora_inject.core.adapter.fingerprint import Fingerprint, Moved

# bfloat16 keeps 8 significant bits: rounding moves a value by at most 2**-8 of itself. The saved
# and the found base may each have been rounded. The smallest step of float16 is 2**-24.
_RELATIVE = 2.0**-7
_ABSOLUTE = 2.0**-24


def base_differences(saved: Fingerprint, current: Fingerprint) -> dict[str, str]:
    """Return how weights of the base at hand differ from the one that an adapter was made on.

    Empty: the same base, as far as the values reach (see `unverifiable`).
    """
    differences = {name: _difference(saved, current, name) for name in saved.shapes}
    return {name: how for name, how in differences.items() if how}


def _difference(saved: Fingerprint, current: Fingerprint, name: str) -> str:
    """Return how a weight differs, "" if it does not as far as can be seen."""
    if name not in current.shapes:
        return "is not in this model"
    if saved.quantized.get(name) and current.quantized.get(name):
        packed, other = saved.quantized[name], current.quantized[name]  # shapes included
        same = packed == other
        return "" if same else f"is {packed[:300]} in the file and {other[:300]} here"
    shape, shape_here = tuple(saved.shapes[name]), tuple(current.shapes[name])
    if shape != shape_here:
        return f"has shape {shape} in the file and {current.shapes[name]} here"
    if name not in saved.samples or name not in current.samples:
        return ""
    there, here = saved.samples[name], current.samples[name]
    if len(there) != len(here):
        return f"has {len(there)} sampled values in the file and {len(here)} here"
    if wrong := _differing(there, here):
        return _words(wrong, len(there))
    if wrong := _differing(*_moved_in_both(saved, current, name)):
        return f"where the adapter moves it, {_words(wrong, len(wrong))}"
    return ""


def _moved_in_both(
    saved: Fingerprint, current: Fingerprint, name: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return two fingerprints' values where an adapter moves a weight, if at equal positions."""
    nothing = Moved((), ())
    there, here = saved.moved.get(name, nothing), current.moved.get(name, nothing)
    return (there.values, here.values) if there.positions == here.positions else ((), ())


def _differing(there: tuple[float, ...], here: tuple[float, ...]) -> list[tuple[float, float]]:
    """Return the pairs of values that differ by more than a rounding."""
    pairs = () if there == here else zip(there, here, strict=True)
    return [pair for pair in pairs if not _close(*pair)]


def _words(wrong: list[tuple[float, float]], n: int) -> str:
    first = "first {:.6g} in the file and {:.6g} here".format(*wrong[0])
    return f"{len(wrong)} of {n} sampled values differ, {first}"


def unverifiable(saved: Fingerprint, current: Fingerprint) -> tuple[str, ...]:
    """Names of weights that cannot be compared: quantized on one side only, sharded or on meta."""
    return tuple(
        name
        for name in saved.shapes
        if (name not in saved.samples or name not in current.samples)
        and not (saved.quantized.get(name) and current.quantized.get(name))
    )


def _close(a: float, b: float) -> bool:
    if math.isfinite(a) and math.isfinite(b):
        return abs(a - b) <= _RELATIVE * max(abs(a), abs(b)) + _ABSOLUTE
    return a == b or (math.isnan(a) and math.isnan(b))
