"""Packages that a machine may lack."""

import contextlib
import functools
import importlib
import sys
import warnings
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torch import nn


def installed(package: str) -> Any:
    """Import quietly, since the packages warn of what this machine lacks; None without it."""
    with warnings.catch_warnings(), contextlib.suppress(ImportError):
        warnings.simplefilter("ignore")
        module = importlib.import_module(package)
        return module if module.__spec__ is not None else None  # one of `loaded`


def imported(package: str) -> Any:
    return installed(package) or pytest.skip(f"{package} is not installed")


def loaded(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """Let modules of packages count as loaded, for objects of a test that are as theirs."""
    for name in modules:
        if name not in sys.modules:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))


_FORWARD = """
def quantized_forward(self, x):
    held = self.weight.data
    self.weight.data = held.round(decimals=1)
    try:
        return self.__class__.forward(self, x)
    finally:
        self.weight.data = held
"""


def compressed(layer: nn.Linear) -> nn.Linear:
    """As compressed-tensors does, let a forward on the instance round the weight in its place."""
    made: dict[str, Any] = {"__name__": "compressed_tensors.quantization.lifecycle.forward"}
    exec(_FORWARD, made)
    layer.quantization_scheme = SimpleNamespace()
    layer.forward = functools.wraps(nn.Linear.forward)(made["quantized_forward"]).__get__(layer)
    return layer
