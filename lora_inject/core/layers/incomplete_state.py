"""The error of a layer whose own state leaves out its adapters."""

from __future__ import annotations

from lora_inject.errors import LayerError


def incomplete_state(cls: type) -> LayerError:
    """Return the error of a copy or pickle of a layer of a class."""
    problem = "its own __getstate__ leaves out what carries the adapters"
    remedy = "Let it return all of __dict__, or eject first"
    return LayerError(f"a copy or pickle of a {cls.__name__}", problem, remedy)
