"""The variants by name."""

from __future__ import annotations

from lora_inject.core.adapter.dora import Dora
from lora_inject.core.adapter.variants import Variant

VARIANTS: dict[str, Variant] = {"lora": Variant(), "dora": Dora()}
"""Those of the package and those from outside; each has a row in `spec.sites.ROLES` too."""
