"""What must hold around a verb because another library is there: one row for each such library.

A row's module is imported only where the process has imported the library. It has these functions:
`before_inject(survey, plan, asked, leave_new=)`, which raises, and `notes_on(survey, plan)`, which
yields sentences for the plan; `new_weights(survey)` names parameters that no checkpoint had.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

GUARDS = {
    "transformers": "lora_inject.integrations.transformers",
}
"""Library, and the module that knows it."""


def guards() -> Iterator[Any]:
    """Yield the modules that know the libraries of this process."""
    for library, place in GUARDS.items():
        if library in sys.modules:
            yield import_module(place)
