"""One safetensors file with the tensors as this package holds them, and what it says about them.

No other program reads this file, so tensors keep their form and every adapter can be written: sites
that other files cannot express (a MultiheadAttention's output projection alone, convolutions in
groups, parameters of the root) are saved by the same call.

Keys: `ROLE/SITE` (`A/SITE`, `B/SITE`, ...), `trained/NAME`. What the tensors do not say (alpha,
slices, kinds, the config, the base's fingerprint) is stored as text in the header, so it cannot be
lost or mixed up with another adapter's. Folders that this package writes for other programs have
the same text. Reading is strict: an unknown field, a wrong type or an impossible number is an
error.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from torch import Tensor

from lora_inject.core.adapter.file_keys import check_keys
from lora_inject.core.adapter.fingerprint import Fingerprint, Sampled, sample_positions
from lora_inject.core.adapter.site_state import SiteState
from lora_inject.core.adapter.state import AdapterState
from lora_inject.core.files.strict_json import Count, Index, Positive, fault_in
from lora_inject.core.files.tensors import read_tensors, serialize
from lora_inject.core.spec.sites import InitName, SiteSpec, Slices
from lora_inject.core.spec.variants import VARIANTS
from lora_inject.errors import FormatError
from lora_inject.version import __version__

FORMAT_VERSION = "1"
_PREFIX = "lora_inject."
_VERSION = _PREFIX + "format_version"
_LAYOUT = _PREFIX + "layout"
_EDITED = "The file was edited; fetch it again"


class _Kind(BaseModel):
    """What sites have in common but for names; `rule` belongs to a config and is not written."""

    model_config = ConfigDict(extra="forbid", strict=True, defer_build=True)

    alpha: Positive
    compute: Literal["base", "float32"]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    experts: Count | None
    in_features: Count
    init: InitName | tuple[Literal["normal"], Positive]
    kind: str
    lora_bias: bool
    only: tuple[Index, ...] | None
    out_features: Count
    rank: Count
    scaling: Literal["standard", "rslora"]
    share: Literal["", "A", "B"]
    slices: Slices | None
    transposed: bool
    update: Literal["forward", "weight"]
    variant: str
    weight_shape: tuple[Count, ...]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.variant not in VARIANTS:
            raise ValueError(f"the variant '{self.variant[:80]}' is not registered here")
        elements = self.in_features * self.out_features * (self.experts or 1)
        if math.prod(self.weight_shape) != elements:
            raise ValueError("weight_shape does not fit in_features and out_features")
        if self.slices is not None:
            sizes, adapt = self.slices.sizes, self.slices.adapt
            if sum(width for _, width in sizes) != self.out_features:
                raise ValueError("the slices do not fill the output")
            if not adapt or adapt != tuple(name for name, _ in sizes if name in adapt):
                raise ValueError("'adapt' does not name its slices in order")
        if (only := self.only) is not None and not (
            only and [*only] == sorted({*only}) and only[-1] < (self.experts or 0)
        ):
            raise ValueError("'only' does not name experts of its stack in order")
        return self


_fields_of = attrgetter(*_Kind.model_fields)
_Sampled = tuple[tuple[Index, ...], str | None, str, tuple[Index, ...]]
_PARTS: dict[str, TypeAdapter[Any]] = {
    "config": TypeAdapter(dict[str, Any] | None),
    # Of each weight what is `Sampled`: its shape, values, packing, and where the adapter moves it.
    "fingerprint": TypeAdapter(dict[str, _Sampled] | None),
    "kinds": TypeAdapter(list[_Kind]),
    "sites": TypeAdapter(dict[str, tuple[str, Index, tuple[str, ...]]]),  # weight, kind, aliases
    "trained": TypeAdapter(dict[str, tuple[Index, ...] | None]),  # its rows, null for all
}


def write(
    state: AdapterState, _path: Path, _facts: object, *, proof: Mapping[str, str] | None = None
) -> bytes:
    """Write any adapter as one file; `proof` is further text of its header."""
    sites = state.sites.items()
    tensors = {f"{role}/{n}": t for n, site in sites for role, t in site.tensors.items()}
    tensors |= {f"trained/{name}": tensor for name, tensor in state.trained.items()}
    return serialize(tensors, describe(state, "native") | {**(proof or {})})


def read(path: Path, _facts: object) -> AdapterState:
    """Read what `write` wrote, bit for bit."""
    tensors, text = read_tensors(path)
    if not is_native(text, "native"):
        raise FormatError("", "it is not a file of this format", "Leave format out")
    said = parse(text)
    trained = {name: f"trained/{name}" for name in said.trained}
    due = (f"{role}/{name}" for name, spec in said.specs.items() for role in spec.roles)
    check_keys(tensors, {*due, *trained.values()})
    sites = {
        name: SiteState.of(spec, {role: tensors[f"{role}/{name}"] for role in spec.roles})
        for name, spec in said.specs.items()
    }
    return said.state(sites, {name: tensors[key] for name, key in trained.items()})


# The text ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Described:
    """The metadata of a file that this package wrote: an adapter without its tensors.

    Specs are in the order of the model. `trained` names the tensors of the base that the file has
    in full, or of which it has `rows`.
    """

    specs: Mapping[str, SiteSpec]
    trained: Sequence[str]
    config: Mapping[str, Any] | None
    fingerprint: Fingerprint | None
    rows: Mapping[str, tuple[int, ...]]

    def state(self, sites: Mapping[str, SiteState], trained: Mapping[str, Tensor]) -> AdapterState:
        """Return the adapter that has these tensors."""
        return AdapterState(sites, trained, self.config, self.fingerprint, rows=self.rows)


def describe(state: AdapterState, layout: str) -> dict[str, str]:
    """Return the text metadata of a state, for the header of a safetensors file.

    The fields that sites share are stated once, as a kind: thousands of sites have only a few
    kinds.
    """
    kinds: dict[tuple[object, ...], int] = {}
    sites = {}
    for spec in (site.spec for site in state.sites.values()):
        number = kinds.setdefault(_fields_of(spec), len(kinds))
        sites[spec.name] = spec.weight, number, spec.aliases
    mark = None
    if state.fingerprint is not None:
        mark = {name: _plain(known) for name, known in state.fingerprint.items()}
    parts = {
        "config": state.config,
        "fingerprint": mark,
        "kinds": [dict(zip(_Kind.model_fields, kind, strict=True)) for kind in kinds],
        "sites": sites,
        "trained": {name: state.rows.get(name) for name in state.trained},
    }
    said = {_VERSION: FORMAT_VERSION, _PREFIX + "version": __version__, _LAYOUT: layout}
    try:
        for part, value in parts.items():
            said[_PREFIX + part] = json.dumps(value, allow_nan=False, default=asdict)
    except (TypeError, ValueError) as error:
        problem = f"it is not plain data ({error})"
        raise FormatError("its config", problem, "Pass config.to_dict()") from error
    return {"format": "pt", **said}


def is_native(metadata: Mapping[str, str], layout: str) -> bool:
    """Whether a file was written by this package in the given layout."""
    return _VERSION in metadata and metadata.get(_LAYOUT) == layout


def parse(metadata: Mapping[str, str]) -> Described:
    """Read what `describe` wrote, strictly, because users edit files."""
    version = metadata[_VERSION]
    if version != FORMAT_VERSION:
        problem = f"its format version is '{version[:20]}', and this package reads {FORMAT_VERSION}"
        raise FormatError("", problem, "Install a newer lora-inject")
    said: dict[str, Any] = {}
    for part, form in _PARTS.items():
        try:
            said[part] = form.validate_json(metadata.get(_PREFIX + part, ""), strict=True)
        except ValidationError as error:
            raise FormatError(f"its metadata, {part}", fault_in(error), _EDITED) from None
    kinds = [SiteSpec(name="", **dict(kind)) for kind in said["kinds"]]
    specs: dict[str, SiteSpec] = {}
    for name, (weight, number, aliases) in said["sites"].items():
        if number >= len(kinds):
            raise FormatError(f"site '{name[:200]}'", f"there is no kind {number}", _EDITED)
        specs[name] = kinds[number].at(name, weight, aliases)
    mark = said["fingerprint"]
    return Described(
        specs=specs,
        trained=[*said["trained"]],
        config=said["config"],
        fingerprint=mark and {name: _sampled(name, *known) for name, known in mark.items()},
        rows={name: rows for name, rows in said["trained"].items() if rows is not None},
    )


# Samples are base64 of little-endian float32: as numbers they would be two thirds of a header and
# most of the time to parse it.


def _plain(known: Sampled) -> _Sampled:
    shape, values, packed, moved = known
    text = None
    if values is not None:
        text = base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
    return shape, text, packed, moved


def _sampled(
    name: str,
    shape: tuple[int, ...],
    text: str | None,
    packed: str,
    moved: tuple[int, ...],
) -> Sampled:
    """Return what is said of one weight of the base; it has a value for each position."""
    n = len(sample_positions(shape)) + len(moved)
    if moved and max(moved) >= math.prod(shape):
        problem = f"the positions of {name!r} are not all inside of it"
        raise FormatError("fingerprint", problem, _EDITED)
    if text is None:
        return Sampled(shape, None, packed, moved)
    try:
        values = struct.unpack(f"<{n}f", binascii.a2b_base64(text, strict_mode=True))
    except (ValueError, struct.error) as error:
        problem = f"the samples of {name!r} are not {n} float32 in base64 ({error})"
        raise FormatError("fingerprint", problem, _EDITED) from error
    return Sampled(shape, values, packed, moved)
