"""The error of something else in the place of a model."""

from __future__ import annotations

from lora_inject.errors import LayerError, article


def no_module(given: object) -> LayerError:
    """Return the error of what was given as a model and is no module, but maybe its class."""
    if isinstance(given, type):
        name = given.__name__
        return LayerError("the model", f"it is the class {name}", f"Give an instance: {name}(...)")
    problem = f"it is {article(type(given).__name__)}"
    return LayerError("the model", problem, "Give a torch.nn.Module")
