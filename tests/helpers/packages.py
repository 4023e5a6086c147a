"""Packages that a machine may lack."""

import contextlib
import importlib
import warnings
from typing import Any

import pytest


def installed(package: str) -> Any:
    """Import quietly, since the packages warn of what this machine lacks; None without it."""
    with warnings.catch_warnings(), contextlib.suppress(ImportError):
        warnings.simplefilter("ignore")
        return importlib.import_module(package)


def imported(package: str) -> Any:
    return installed(package) or pytest.skip(f"{package} is not installed")
