"""What an adapter's file says about itself, beyond its tensors.

What the tensors do not tell (alpha, slices, kinds, the config, the base's fingerprint) travels as
text in the same file, so it cannot be lost or exchanged for another adapter's. Reading it back is
strict: an unknown field, a wrong type or an impossible number is an error.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from lora_inject.adapter.fingerprint import Fingerprint
from lora_inject.adapter.state import AdapterState
from lora_inject.errors import FormatError
from lora_inject.spec.roles import FURTHER
from lora_inject.spec.sites import SiteSpec, Slices
from lora_inject.storage.strict_json import parse_json
from lora_inject.version import __version__

T = TypeVar("T")

FORMAT_VERSION = "1"
_PREFIX = "lora_inject."
_VERSION = _PREFIX + "format_version"
_LAYOUT = _PREFIX + "layout"


@dataclass(frozen=True)
class Described:
    """The metadata of a file that this package wrote: specs are in the order of the model.

    `derived` names the sites that carry A0 and B0, `turned` those whose pair has changed places in
    the file (`peft.tensor_layout`), `trained` the tensors of the base that travel in full, or of
    which `rows` do.
    """

    specs: Mapping[str, SiteSpec]
    derived: frozenset[str]
    turned: frozenset[str]
    trained: tuple[str, ...]
    config: Mapping[str, Any] | None
    fingerprint: Fingerprint | None
    rows: Mapping[str, tuple[int, ...]]


def describe(state: AdapterState, layout: str, turned: Collection[str] = ()) -> dict[str, str]:
    """Return the text metadata of a state, for the header of a safetensors file."""
    kinds, sites = _sites_to_plain(state, turned)
    return {
        "format": "pt",
        _VERSION: FORMAT_VERSION,
        _PREFIX + "version": __version__,
        _LAYOUT: layout,
        _PREFIX + "config": _to_json(state.config),
        _PREFIX + "fingerprint": _to_json(_fingerprint_to_plain(state.fingerprint)),
        _PREFIX + "kinds": _to_json(kinds),
        _PREFIX + "sites": _to_json(sites),
        _PREFIX + "trained": _to_json(list(state.trained)),
        _PREFIX + "rows": _to_json({name: list(rows) for name, rows in state.rows.items()}),
    }


def is_native(metadata: Mapping[str, str], layout: str) -> bool:
    """Whether a file was written by this package in the given layout.

    Examples:
        >>> is_native({"format": "pt"}, "peft")
        False
    """
    return _VERSION in metadata and metadata.get(_LAYOUT) == layout


def parse(metadata: Mapping[str, str], asked: str) -> Described:
    """Read back what `describe` wrote; strictly, since files are edited."""
    version = metadata[_VERSION]
    if version != FORMAT_VERSION:
        raise FormatError(
            asked,
            f"its format version is '{version[:20]}', and this package reads {FORMAT_VERSION}",
            "Install a newer lora-inject",
        )
    sites = _part(metadata, "sites", _SITES, asked)
    kinds = _part(metadata, "kinds", _KINDS, asked, sites)
    specs, flags = _specs(kinds, sites, asked)
    trained = _part(metadata, "trained", _NAMES, asked)
    _require(len(set(trained)) == len(trained), asked, "it names a trained tensor twice")
    rows = _part(metadata, "rows", _ROWS, asked)
    _require(rows.keys() <= set(trained), asked, "it has rows of a tensor that is not in the file")
    return Described(
        specs=specs,
        derived=flags["derived"],
        turned=flags["turned"],
        trained=tuple(trained),
        config=_part(metadata, "config", _CONFIG, asked),
        fingerprint=_fingerprint(_part(metadata, "fingerprint", _FINGERPRINT, asked), asked),
        rows=rows,
    )


_EDITED = (
    'The file was edited; fetch it again, or read it as a plain PEFT file with prefer="config"'
)


def _part(
    metadata: Mapping[str, str],
    part: str,
    due: TypeAdapter[T],
    asked: str,
    sites: Sequence[tuple[str, str, int]] = (),
) -> T:
    """Parse one part; of sites with a wrong kind the first is named."""
    if _PREFIX + part not in metadata:
        raise FormatError(asked, f"its metadata lacks '{_PREFIX}{part}'", _EDITED)
    text, asked = metadata[_PREFIX + part], f"{asked}, metadata '{_PREFIX}{part}'"
    parse_json(text, asked)  # refuses what pydantic lets pass: a key twice, NaN
    try:
        return due.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = next((name for name, _, kind in sites if (kind,) == first["loc"][:1]), None)
        where = asked if name is None else f"{asked}, site '{name[:200]}'"
        place = ".".join(str(part)[:100] for part in first["loc"])
        raise FormatError(where, f"{place or 'it'}: {first['msg'][:200]}", _EDITED) from None


def _to_json(value: Any) -> str:
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise FormatError(
            "write adapter: its config", f"it is not plain data ({error})", "Pass config.to_dict()"
        ) from error


# Sites ------------------------------------------------------------------------------------------

_Count = Annotated[int, Field(gt=0, lt=2**63)]  # what torch can count
_Number = Annotated[float, Field(gt=-1e300, lt=1e300)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class _Slices(_Strict):
    sizes: tuple[tuple[str, _Count], ...]
    adapt: tuple[str, ...] = Field(min_length=1)


class _Kind(_Strict):
    """What sites have in common but for their names; these fields are the format.

    `rule` belongs to a config and `aliases` to a model: neither is a part of a file.
    """

    alpha: Annotated[float, Field(gt=0, lt=1e300)]
    compute: Literal["base", "float32"]
    derived: bool
    dropout: Annotated[float, Field(ge=0, lt=1)]
    experts: _Count | None
    in_features: _Count
    init: str | tuple[str, _Number]
    kind: str
    lora_bias: bool
    out_features: _Count
    rank: _Count
    scaling: Literal["standard", "rslora"]
    slices: _Slices | None
    transposed: bool
    turned: bool
    update: Literal["forward", "weight"]
    variant: str
    weight_shape: tuple[_Count, ...]

    @model_validator(mode="after")
    def _consistent(self) -> _Kind:
        elements = self.in_features * self.out_features * (self.experts or 1)
        if self.variant not in FURTHER:
            raise ValueError(f"the variant '{self.variant[:80]}' is not registered here")
        if math.prod(self.weight_shape) != elements:
            raise ValueError("weight_shape does not fit in_features and out_features")
        if self.slices is not None:
            in_order = tuple(name for name, _ in self.slices.sizes if name in self.slices.adapt)
            if sum(width for _, width in self.slices.sizes) != self.out_features:
                raise ValueError("the slices do not fill the output")
            if self.slices.adapt != in_order:
                raise ValueError("'adapt' does not name its slices in order")
        return self

    def spec(self, name: str, weight: str) -> SiteSpec:
        fields = {field: getattr(self, field) for field in _Kind.model_fields.keys() - _FLAGS}
        if self.slices is not None:
            fields["slices"] = Slices(self.slices.sizes, self.slices.adapt)
        return SiteSpec(name=name, weight=weight, **fields)


_FLAGS = frozenset({"derived", "turned"})
_SITES = TypeAdapter(list[tuple[str, str, int]], config=ConfigDict(strict=True))
_KINDS = TypeAdapter(list[_Kind])
_NAMES = TypeAdapter(list[str], config=ConfigDict(strict=True))
_ROWS = TypeAdapter(
    dict[str, Annotated[tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], Field(min_length=1)]]
)
_CONFIG = TypeAdapter(dict[str, Any] | None, config=ConfigDict(strict=True))


def _sites_to_plain(
    state: AdapterState, turned: Collection[str]
) -> tuple[list[dict[str, Any]], list[tuple[str, str, int]]]:
    """Return what sites have in common but for their names, stated once, and who has which.

    An adapter of thousands of sites has a handful of kinds: its header stays short.
    """
    kinds: dict[str, int] = {}
    plain: list[dict[str, Any]] = []
    sites = []
    for name, site in state.sites.items():
        spec, slices = site.spec, site.spec.slices
        fields = {f: getattr(spec, f) for f in _Kind.model_fields if f not in _FLAGS}
        if slices is not None:
            fields["slices"] = {"sizes": slices.sizes, "adapt": slices.adapt}
        fields |= {"derived": site.A0 is not None, "turned": name in turned}
        number = kinds.setdefault(repr(fields), len(kinds))
        if number == len(plain):
            plain.append(fields)
        sites.append((spec.name, spec.weight, number))
    return plain, sites


def _specs(
    kinds: Sequence[_Kind], sites: Sequence[tuple[str, str, int]], asked: str
) -> tuple[dict[str, SiteSpec], dict[str, frozenset[str]]]:
    """Return the spec of each site, and who has which flag."""
    specs: dict[str, SiteSpec] = {}
    first: dict[int, SiteSpec] = {}
    flags: dict[str, set[str]] = {flag: set() for flag in _FLAGS}
    for name, weight, kind in sites:
        where = f"{asked}, site '{name[:200]}'"
        _require(name not in specs, where, "its name is there twice")
        _require(0 <= kind < len(kinds), where, f"there is no kind {kind}")
        if kind not in first:
            first[kind] = kinds[kind].spec(name, weight)
        specs[name] = first[kind].at(name, weight)
        for flag in _FLAGS:
            if getattr(kinds[kind], flag):
                flags[flag].add(name)
    _require(len(first) == len(kinds), asked, "it states a kind of sites that no site has")
    return specs, {flag: frozenset(names) for flag, names in flags.items()}


# The fingerprint --------------------------------------------------------------------------------


class _FingerprintText(_Strict):
    shapes: dict[str, tuple[int, ...]]
    samples: dict[str, str]
    quantized: dict[str, str]


_FINGERPRINT = TypeAdapter(_FingerprintText | None)


def _fingerprint_to_plain(fingerprint: Fingerprint | None) -> dict[str, Any] | None:
    if fingerprint is None:
        return None
    samples = {name: _packed(values, name) for name, values in fingerprint.samples.items()}
    shapes = {name: list(shape) for name, shape in fingerprint.shapes.items()}
    return {"shapes": shapes, "samples": samples, "quantized": dict(fingerprint.quantized)}


def _packed(values: Sequence[float], name: str) -> str:
    """Return samples as base64 of little-endian float32.

    As numbers they would be two thirds of a header, and take most of the time to parse it.
    """
    try:
        return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
    except (OverflowError, struct.error) as error:
        raise FormatError(
            f"write adapter: its fingerprint of {name!r}",
            f"a sample is not a float32 ({error})",
            "Take it with lora_inject.adapter.fingerprint.sample",
        ) from error


def _unpacked(text: str, name: str, where: str) -> tuple[float, ...]:
    try:
        packed = binascii.a2b_base64(text, strict_mode=True)
        return struct.unpack(f"<{len(packed) // 4}f", packed)
    except (ValueError, struct.error) as error:
        raise FormatError(
            where, f"the samples of {name!r} are not float32 in base64 ({error})", _EDITED
        ) from error


def _fingerprint(text: _FingerprintText | None, asked: str) -> Fingerprint | None:
    if text is None:
        return None
    where = f"{asked}, fingerprint"
    samples = {name: _unpacked(packed, name, where) for name, packed in text.samples.items()}
    return Fingerprint(text.shapes, samples, text.quantized)


def _require(holds: bool, where: str, found: str) -> None:
    if not holds:
        raise FormatError(where, found, _EDITED)


def one_line(names: Iterable[str], n: int = 3) -> str:
    """The first few names for a message, and how many more there are.

    Examples:
        >>> one_line(["a", "b", "c", "d", "e"])
        "'a', 'b', 'c' and 2 more"
    """
    listed = list(names)
    shown = ", ".join(f"'{name[:200]}'" for name in listed[:n])
    return shown if len(listed) <= n else f"{shown} and {len(listed) - n} more"
