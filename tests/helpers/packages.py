"""Packages that a machine may lack."""

import contextlib
import importlib
import sys
import warnings
from types import ModuleType
from typing import Any

import pytest


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
