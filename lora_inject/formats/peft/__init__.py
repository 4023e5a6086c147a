"""PEFT's folder: `adapter_model.safetensors` and `adapter_config.json`."""

from typing import Any

from lora_inject.core.adapter.state import AdapterState
from lora_inject.formats.format import Format
from lora_inject.formats.peft.folder import check_sites, detects, read, write
from lora_inject.formats.peft.peft_reading import refuse_first_places, refuse_misread
from lora_inject.formats.peft.tensor_layout import PREFIX

__all__ = ["FORMATS", "PREFIX", "check_save", "detects", "read", "write"]


def check_save(survey: Any, name: str) -> None:
    """Refuse what PEFT would load wrong; for each format that PEFT or its layers read."""
    refuse_misread(survey, name)


def _check_load(survey: Any, state: AdapterState, fitted: AdapterState, asked: str) -> None:
    if state.fingerprint is None:  # it was made by PEFT, and means what PEFT computes
        refuse_first_places(survey, (site.spec for site in fitted.sites.values()), asked)


FORMATS = {
    "peft": Format(
        write,
        read,
        detects,
        check_sites=check_sites,
        check_save=check_save,
        check_load=_check_load,
    ),
}
