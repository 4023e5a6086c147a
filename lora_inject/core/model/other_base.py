"""What to say of a base that is not, value for value, the one that an adapter was made on."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lora_inject.core.adapter.base_differences import base_differences, unverifiable
from lora_inject.core.adapter.fingerprint import Fingerprint, without_weights
from lora_inject.core.adapter.fingerprints import same_values
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.layers.library import loaded_libraries
from lora_inject.core.layers.survey import Survey
from lora_inject.core.spec.names import joined
from lora_inject.errors import FormatError


def check_differences(
    survey: Survey,
    saved: Fingerprint,
    here: Fingerprint,
    adapted: Mapping[str, Tensor],
    base: str,
    asked: str,
    *,
    leave_new: bool,
) -> None:
    """Refuse a base whose fingerprint `here` differs from the saved one; see `check_base`."""
    common = without_weights(saved, saved.keys() - here.keys())
    unknown = unverifiable(common, here)
    hidden = [name for name in unknown if name in adapted]
    if hidden and base != "quantized":
        raise FormatError(
            asked,
            f"the base cannot be compared at {len(hidden)} sites, of which {hidden[0]!r}: "
            "its weight is quantized here or where the adapter was made, but not in both, "
            "or it is sharded or on the meta device",
            'Pass base="quantized" where it is the right base',
        )
    common = without_weights(common, unknown)
    _check_values(survey, common, here, adapted, asked, leave_new=leave_new)


def _check_values(
    survey: Survey,
    saved: Fingerprint,
    here: Fingerprint,
    adapted: Mapping[str, Tensor],
    asked: str,
    *,
    leave_new: bool,
) -> None:
    """Refuse a base with other values; name an adapted tensor that differs, if there is one."""
    differences = base_differences(saved, here)
    new = _new_weights(survey) if differences.keys() - adapted.keys() else set()
    if leave_new:
        differences = {n: what for n, what in differences.items() if n not in new}
    if not differences:
        return
    key = next((name for name in differences if name in adapted), next(iter(differences)))
    what = differences[key]
    remedy = 'Load it onto its own base, or pass base="any"'
    if differences.keys() <= new:
        what += ", where no checkpoint had it"
        remedy = "Load the base with the weights that it had there, or pass leave_new=True "
        remedy += "where nothing uses them"
    raise FormatError(
        asked,
        f"the adapter was made on another base: {key!r} {what} ({len(differences)} of "
        f"{len(saved)} tensors differ)",
        remedy,
    )


def vocabulary(survey: Survey) -> set[str]:
    """Return all names of the tables and heads over a vocabulary, which is resized at times."""
    names: set[str] = set()
    for _, module in survey.modules:
        for getter in ("get_input_embeddings", "get_output_embeddings"):
            get = getattr(module, getter, None)
            try:
                table = get() if callable(get) else None
            except (AttributeError, NotImplementedError):
                continue
            if isinstance(table, nn.Module) and (path := survey.paths.get(id(table))) is not None:
                for key in survey.own[id(table)]:
                    names |= {*survey.names_of(joined(path, key))}
    return names


def _new_weights(survey: Survey) -> set[str]:
    """Return the parameters that no checkpoint of this model had."""
    return {name for library in loaded_libraries() for name in library.new_weights(survey)}


def check_base_copies(state: AdapterState, weights: Mapping[str, Tensor], asked: str) -> None:
    """Refuse a copy of a base tensor, which some programs store, if it is not the model's."""
    for key, copy in state.base_copies.items():
        weight = weights.get(key)
        if weight is None or not same_values(weight.detach().cpu(), copy):
            problem = "the file carries a copy of this base tensor that is not the model's"
            remedy = "Load the adapter onto the base that it was made on (was the vocabulary "
            raise FormatError(f"{asked}, {key!r}", problem, remedy + "resized?)")
