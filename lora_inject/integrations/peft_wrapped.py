"""A model that PEFT has wrapped: an adapter of ours on PEFT's own A or B is refused."""

from __future__ import annotations

from collections.abc import Iterator

from lora_inject.core.layers.library import Library
from lora_inject.core.layers.survey import Survey
from lora_inject.core.spec.names import parent
from lora_inject.core.spec.plan import Plan


class Peft(Library):
    """PEFT's own layers in a model."""

    modules = ("peft.tuners.tuners_utils",)

    def against(self, survey: Survey, plan: Plan, *, leave_new: bool) -> Iterator[tuple[str, str]]:
        """Yield that sites are a part of PEFT's adapters, as all-linear would take them.

        What lies in one of PEFT's layers, beside the layer that it wraps, is such a part.
        """
        del leave_new
        from peft.tuners.tuners_utils import BaseTunerLayer

        wrapped = {name for name, module in survey.modules if isinstance(module, BaseTunerLayer)}
        theirs = [site.name for site in plan.sites if _is_inside(site.name, wrapped)]
        if theirs:
            problem = f"{theirs[0]!r} is a part of an adapter of PEFT ({len(theirs)} such sites)"
            remedy = (
                "Exclude these; or save that adapter with PEFT, take the base, model.unload(), "
            )
            yield problem, f"{remedy}and give it the adapter with load_adapter"


def _is_inside(name: str, wrapped: set[str]) -> bool:
    """Whether a name lies in one of PEFT's layers, and not in the layer that this one wraps."""
    below = name
    while below:
        above = parent(below)
        if above in wrapped:
            return below.removeprefix(f"{above}.") != "base_layer"
        below = above
    return False
