"""What an adapter's file says about itself, beyond its tensors.

Everything that the tensors alone do not tell (alpha above all, then slices, kinds, the
config, the base's fingerprint) travels as text in the same file as the tensors, so it cannot be
lost or exchanged for another adapter's. Reading it back is strict: an unknown field, a wrong type
or an impossible number is an error that names the site.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_inject.adapter.state import AdapterState, Fingerprint
from lora_inject.errors import FormatError
from lora_inject.spec.sites import SiteSpec, Slices
from lora_inject.storage.strict_json import parse_json
from lora_inject.version import __version__

FORMAT_VERSION = "1"
_PREFIX = "lora_inject."
_VERSION = _PREFIX + "format_version"
_LAYOUT = _PREFIX + "layout"
_PARTS = ("config", "fingerprint", "kinds", "sites", "trained")


@dataclass(frozen=True)
class Described:
    """The metadata of a file that this package wrote.

    Attributes:
        specs: Site name to its spec, in the order of the model.
        derived: Names of the sites that carry A0 and B0.
        turned: Names of the sites whose pair has changed places in the file (`peft_layout`).
        trained: Names of the base's tensors that travel in full.
        config: The config, as plain data, or None.
        fingerprint: Of the base, or None.
    """

    specs: Mapping[str, SiteSpec]
    derived: frozenset[str]
    turned: frozenset[str]
    trained: tuple[str, ...]
    config: Mapping[str, Any] | None
    fingerprint: Fingerprint | None


def describe(state: AdapterState, layout: str, turned: Collection[str] = ()) -> dict[str, str]:
    """Return the text metadata of a state.

    Args:
        state: The adapter.
        layout: Name of the layout of the tensors, `peft` or `native`.
        turned: Names of the sites whose pair has changed places.

    Returns:
        Text by key, for the header of a safetensors file.

    Raises:
        FormatError: The config is not plain data.
    """
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
    }


def is_native(metadata: Mapping[str, str], layout: str) -> bool:
    """Whether a file was written by this package in the given layout.

    Example:
        >>> is_native({"format": "pt"}, "peft")
        False
    """
    return _VERSION in metadata and metadata.get(_LAYOUT) == layout


def parse(metadata: Mapping[str, str], asked: str) -> Described:
    """Read back what `describe` wrote.

    Args:
        metadata: Text metadata of a file for which `is_native` holds.
        asked: The file, for messages.

    Returns:
        The description.

    Raises:
        FormatError: It is of a newer format version, incomplete, or holds impossible values.
    """
    version = metadata[_VERSION]
    if version != FORMAT_VERSION:
        raise FormatError(
            asked,
            f"its format version is '{version[:20]}', and this package reads {FORMAT_VERSION}",
            "Install a newer lora-inject",
        )
    parts = {}
    for part in _PARTS:
        if _PREFIX + part not in metadata:
            raise FormatError(asked, f"its metadata lacks '{_PREFIX}{part}'", _EDITED)
        parts[part] = parse_json(metadata[_PREFIX + part], f"{asked}, metadata '{_PREFIX}{part}'")
    specs, flags = _parse_sites(parts["kinds"], parts["sites"], asked)
    return Described(
        specs=specs,
        derived=flags["derived"],
        turned=flags["turned"],
        trained=_parse_names(parts["trained"], asked),
        config=_parse_config(parts["config"], asked),
        fingerprint=_parse_fingerprint(parts["fingerprint"], asked),
    )


_EDITED = (
    'The file was edited; fetch it again, or read it as a plain PEFT file with prefer="config"'
)


def _to_json(value: Any) -> str:
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise FormatError(
            "write adapter: its config", f"it is not plain data ({error})", "Pass config.to_dict()"
        ) from error


# Sites ------------------------------------------------------------------------------------------

# Stated here and not taken from the dataclass: they are the format. `rule` belongs to a config, and
# `aliases` to a model.
_FIELDS = frozenset(
    {
        "alpha", "compute", "dropout", "experts", "in_features", "init", "kind", "update", "name",
        "out_features", "rank", "scaling", "slices", "transposed", "weight", "weight_shape",
    }
)  # fmt: skip


_FLAGS = frozenset({"derived", "turned"})
_NAMES = frozenset({"name", "weight"})
_OF_KIND = (_FIELDS | _FLAGS) - _NAMES


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
        fields = _spec_to_plain(site.spec)
        fields |= {"derived": site.A0 is not None, "turned": name in turned}
        number = kinds.setdefault(repr(fields), len(kinds))
        if number == len(plain):
            plain.append(fields)
        sites.append((site.spec.name, site.spec.weight, number))
    return plain, sites


def _spec_to_plain(spec: SiteSpec) -> dict[str, Any]:
    plain = {name: getattr(spec, name) for name in sorted(_FIELDS - _NAMES)}
    if spec.slices is not None:
        plain["slices"] = {"sizes": spec.slices.sizes, "adapt": spec.slices.adapt}
    return plain


def _parse_sites(
    kinds: Any, sites: Any, asked: str
) -> tuple[dict[str, SiteSpec], dict[str, frozenset[str]]]:
    _require(isinstance(kinds, list), asked, "its list of kinds of sites is not a list")
    _require(isinstance(sites, list), asked, "its list of sites is not a list")
    specs: dict[str, SiteSpec] = {}
    models: dict[int, SiteSpec] = {}  # of each kind: checked and made once
    members: dict[int, list[str]] = {}
    for number, site in enumerate(sites):
        if not isinstance(site, list) or [*map(type, site)] != [str, str, int]:
            found = "it is not [name, weight, kind]"
            raise FormatError(f"{asked}, site {number}", found, _EDITED)
        name, weight, kind = site
        if name in specs:
            raise FormatError(str(_Where(asked, name)), "its name is there twice", _EDITED)
        if kind not in models:
            models[kind] = _parse_kind(kinds, kind, name, weight, _Where(asked, name))
        specs[name] = models[kind].at(name, weight)
        members.setdefault(kind, []).append(name)
    _require(len(models) == len(kinds), asked, "it states a kind of sites that no site has")
    return specs, {
        flag: frozenset(
            name for kind, names in members.items() if kinds[kind][flag] for name in names
        )
        for flag in _FLAGS
    }


def _parse_kind(kinds: list[Any], kind: int, name: str, weight: str, where: _Where) -> SiteSpec:
    """One kind of sites, as the first of them."""
    _require(0 <= kind < len(kinds), where, f"there is no kind {kind}")
    fields = kinds[kind]
    _require(isinstance(fields, dict), where, "its kind is not a table")
    if fields.keys() != _OF_KIND:
        wrong = sorted(fields.keys() ^ _OF_KIND)
        raise FormatError(str(where), f"fields {wrong[:3]} are unknown or missing", _EDITED)
    for flag in _FLAGS:
        _require(isinstance(fields[flag], bool), where, f"'{flag}' is not true or false")
    values = {key: value for key, value in fields.items() if key not in _FLAGS}
    return _parse_spec({**values, "name": name, "weight": weight}, where)


class _Where:
    """Names a site in messages; the text is made where one is raised."""

    def __init__(self, asked: str, name: Any) -> None:
        self.asked, self.name = asked, name

    def __str__(self) -> str:
        return f"{self.asked}, site '{str(self.name)[:200]}'"


def _parse_spec(fields: dict[str, Any], where: str | _Where) -> SiteSpec:
    """One site; every field has been seen to be present."""
    for key in ("in_features", "out_features", "rank"):
        _require(_is_count(fields[key]), where, f"'{key}' is not a positive whole number")
    _require(isinstance(fields["kind"], str), where, "'kind' is not text")
    _require(isinstance(fields["transposed"], bool), where, "'transposed' is not true or false")
    _require(_is_number(fields["alpha"]) and fields["alpha"] > 0, where, "'alpha' is not above 0")
    _require(_is_number(fields["dropout"]), where, "'dropout' is not a number")
    _require(0 <= fields["dropout"] < 1, where, "'dropout' is not in [0, 1)")
    _require(fields["scaling"] in ("standard", "rslora"), where, "'scaling' is unknown")
    _require(fields["compute"] in ("base", "float32"), where, "'compute' is unknown")
    _require(fields["update"] in ("forward", "weight"), where, "'update' is unknown")
    experts = fields["experts"]
    _require(experts is None or _is_count(experts), where, "'experts' is not a count")
    shape = fields["weight_shape"]
    _require(isinstance(shape, list) and all(map(_is_count, shape)), where, "bad 'weight_shape'")
    elements = fields["in_features"] * fields["out_features"] * (experts or 1)
    _require(math.prod(shape) == elements, where, "'weight_shape' does not fit in and out features")
    fields["weight_shape"] = tuple(shape)
    fields["init"] = _parse_init(fields["init"], where)
    fields["slices"] = _parse_slices(fields["slices"], fields["out_features"], where)
    return SiteSpec(**fields)


def _parse_init(plain: Any, where: str | _Where) -> str | tuple[str, float]:
    if isinstance(plain, str):
        return plain
    good = isinstance(plain, list) and len(plain) == 2 and isinstance(plain[0], str)
    _require(good and _is_number(plain[1]), where, "'init' is neither a name nor [name, number]")
    return plain[0], plain[1]


def _parse_slices(plain: Any, out_features: int, where: str | _Where) -> Slices | None:
    if plain is None:
        return None
    shaped = isinstance(plain, dict) and plain.keys() == {"sizes", "adapt"}
    _require(shaped and all(isinstance(v, list) for v in plain.values()), where, "bad 'slices'")
    for pair in plain["sizes"]:
        good = isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)
        _require(good and _is_count(pair[1]), where, "a slice is not [name, width]")
    sizes = tuple((name, width) for name, width in plain["sizes"])
    _require(sum(w for _, w in sizes) == out_features, where, "the slices do not fill the output")
    adapt = plain["adapt"]
    in_order = [name for name, _ in sizes if name in adapt]
    _require(bool(adapt) and adapt == in_order, where, "'adapt' does not name its slices in order")
    return Slices(sizes, tuple(adapt))


# The other parts --------------------------------------------------------------------------------


def _parse_names(plain: Any, asked: str) -> tuple[str, ...]:
    good = isinstance(plain, list) and all(isinstance(name, str) for name in plain)
    _require(good and len(set(plain)) == len(plain), asked, "its trained names are not a list")
    return tuple(plain)


def _parse_config(plain: Any, asked: str) -> dict[str, Any] | None:
    _require(plain is None or isinstance(plain, dict), asked, "its config is not a table")
    return plain  # type: ignore[no-any-return]


def _fingerprint_to_plain(fingerprint: Fingerprint | None) -> dict[str, Any] | None:
    if fingerprint is None:
        return None
    samples = {name: _packed(values, name) for name, values in fingerprint.samples.items()}
    shapes = {name: list(shape) for name, shape in fingerprint.shapes.items()}
    return {"shapes": shapes, "samples": samples, "quantised": list(fingerprint.quantised)}


def _packed(values: Sequence[float], name: str) -> str:
    """Return samples as base64 of little-endian float32.

    As numbers they would be two thirds of a header, and take most of the time to parse it.
    """
    try:
        return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
    except (OverflowError, struct.error) as error:
        raise FormatError(
            f"write adapter: its fingerprint of {name!r}",
            f"a sample is no float32 ({error})",
            "Take it with lora_inject.formats.sample",
        ) from error


def _unpacked(text: Any, name: str, where: str) -> tuple[float, ...]:
    try:
        packed = binascii.a2b_base64(text, strict_mode=True)
        return struct.unpack(f"<{len(packed) // 4}f", packed)
    except (TypeError, ValueError, struct.error) as error:
        raise FormatError(
            where, f"the samples of {name!r} are not float32 in base64 ({error})", _EDITED
        ) from error


def _parse_fingerprint(plain: Any, asked: str) -> Fingerprint | None:
    if plain is None:
        return None
    where = f"{asked}, fingerprint"
    parts = isinstance(plain, dict) and plain.keys() == {"shapes", "samples", "quantised"}
    _require(parts, where, "its parts are not shapes, samples, quantised")
    _require(isinstance(plain["shapes"], dict), where, "its shapes are not a table")
    _require(isinstance(plain["samples"], dict), where, "its samples are not a table")
    shapes = {}
    for name, shape in plain["shapes"].items():
        if not isinstance(shape, list) or not {int}.issuperset(map(type, shape)):
            raise FormatError(where, f"the shape of {name!r} is not a list of numbers", _EDITED)
        shapes[name] = tuple(shape)
    samples = {name: _unpacked(text, name, where) for name, text in plain["samples"].items()}
    return Fingerprint(shapes, samples, _parse_names(plain["quantised"], where))


_LIMIT = 1e300
_MOST = 2**63  # elements that torch can count


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < _MOST


def _is_number(value: Any) -> bool:
    return type(value) in {int, float} and abs(value) < _LIMIT


def _require(holds: Any, where: str | _Where, found: str) -> None:
    if not holds:
        raise FormatError(str(where), found, _EDITED)


def one_line(names: Iterable[str], n: int = 3) -> str:
    """The first few names for a message, and how many more there are.

    Example:
        >>> one_line(["a", "b", "c", "d", "e"])
        "'a', 'b', 'c' and 2 more"
    """
    listed = list(names)
    shown = ", ".join(f"'{name[:200]}'" for name in listed[:n])
    return shown if len(listed) <= n else f"{shown} and {len(listed) - n} more"
