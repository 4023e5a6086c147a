"""The error of training on a layer that a library offloads."""

from __future__ import annotations

from lora_inject.errors import LayerError


def offloaded(cls: type) -> LayerError:
    """Return the error of training an adapter on a layer of a class."""
    asked = f"training an adapter on a {cls.__name__} that is offloaded"
    problem = "its forward gets copies of all parameters, whose gradients are lost"
    return LayerError(asked, problem, "Train without offload; for inference call model.eval()")
