"""What a live model says to files: facts of it, and what a file cannot hold of a plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lora_inject.core.layers.survey import Survey
from lora_inject.core.spec.sites import SiteSpec
from lora_inject.errors import FormatError
from lora_inject.formats.exchange import DEFAULT, format_of
from lora_inject.formats.model_facts import ModelFacts


def facts_about(survey: Survey) -> ModelFacts:
    """Return the facts about a live model that files depend on."""
    return ModelFacts.of(survey.model, survey.by_name, survey.weights)


def notes_on_files(survey: Survey, specs: Sequence[SiteSpec]) -> Iterator[str]:
    """Yield what the default format cannot hold of sites, and the call that works."""
    check = format_of(DEFAULT).check_sites
    try:
        if check is not None:
            check(specs, facts_about(survey))
    except FormatError as problem:
        what = ", ".join(filter(None, (problem.asked, problem.found)))
        yield f"save_adapter cannot write this as {DEFAULT!r}: {what}. {problem.remedy}"
    if any(spec.only or spec.share for spec in specs):
        yield (
            f"files of {DEFAULT!r} hold every expert: loaded again, those that are left out train "
            "with zeros, and a shared factor is one for each. save_adapter(model, path, format="
            '"native") keeps both'
        )
